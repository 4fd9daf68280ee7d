"""What a training run needs."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dfa import config as configuration
from dfa.build.data import class_set, index
from dfa.build.model import model_description, num_token_blocks, segmenter
from dfa.config import Config
from dfa.data import storage
from dfa.data.offline import check_labels, resolve
from dfa.data.shards import ShardIndex
from dfa.data.stream import Batch, CropSettings, eval_batches, train_stream
from dfa.label.pseudo import PseudoSettings
from dfa.label.refine import RefineSettings
from dfa.train.engine import OptimizerSettings
from dfa.train.ffr_step import FfrSettings, FfrStep
from dfa.train.plan import LoopPlan, Readers
from dfa.train.progress import Progress
from dfa.train.record import Observer
from dfa.train.step import StepSettings, TrainStep
from dfa.train.tracking import MlflowTracker, check_installed

logger = logging.getLogger(__name__)

_EVALUATION_BATCH = 8
_SMALLEST_WINDOW_BYTES = 32 * 2**20


def pseudo_settings(config: Config) -> PseudoSettings:
    """How CAMs become labels during training."""
    pseudo, cam = config.pseudo, config.cam
    if len(pseudo.band) not in (0, 2):
        raise ValueError(f"pseudo.band is {pseudo.band}, allowed are [] and [low, high]")
    refine = RefineSettings(
        dilations=tuple(pseudo.dilations),
        iterations=pseudo.iterations,
        colour_scale=pseudo.colour_scale,
        position_scale=pseudo.position_scale,
        position_weight=pseudo.position_weight,
        stride=pseudo.stride,
    )
    return PseudoSettings(
        background=cam.background,  # type: ignore[arg-type]
        threshold=cam.threshold,
        gamma=cam.power,
        band=(pseudo.band[0], pseudo.band[1]) if pseudo.band else None,
        refine=refine if pseudo.refine else None,
    )


def train_step(config: Config, device: torch.device) -> TrainStep:
    """The objective of the run on one device."""
    frequency, loss, train = config.frequency, config.loss, config.train
    settings = StepSettings(
        mu=frequency.mu,
        mu_as=frequency.mu_as,  # type: ignore[arg-type]
        relation_gain=frequency.relation_gain,
        use_quality_mask=frequency.use_quality_mask,
        dense=frequency.dense,  # type: ignore[arg-type]
        dense_share=frequency.dense_share,
        teacher=frequency.teacher,  # type: ignore[arg-type]
        alignment=frequency.alignment,  # type: ignore[arg-type]
        window=frequency.window,
        resolve_unreliable=frequency.resolve_unreliable,
        rectified_pairs=frequency.rectified_pairs,  # type: ignore[arg-type]
        agreement=frequency.agreement,  # type: ignore[arg-type]
        alignment_weight=loss.alignment,
        rectification_weight=loss.rectification,
        supervision=loss.supervision,  # type: ignore[arg-type]
        annotation_grid=loss.annotation_grid,
        pseudo=pseudo_settings(config),
        use_from_step=config.affinity.use_from_step,
        decoder_rate_scale=train.decoder_rate_scale,
        affinity_rate_scale=train.affinity_rate_scale,
        weight_decay=train.weight_decay,
    )
    built = segmenter(config, device)
    if config.crop.size % built.patch_size:
        raise ValueError(f"crop.size {config.crop.size} is not a multiple of the encoder's patch, {built.patch_size}")
    num_classes = len(class_set(config).names)
    if config.method == "dfa" or loss.supervision == "masks":  # the supervised bound trains the decoder alone
        return TrainStep(built, settings, num_classes=num_classes)
    return FfrStep(built, settings, _ffr_settings(config), num_classes=num_classes)


def _ffr_settings(config: Config) -> FfrSettings:
    ffr = config.ffr
    return FfrSettings(
        high_weight=ffr.high,
        rectification_weight=ffr.rectification,
        classifier_weight=ffr.classifier,
        confidence=ffr.confidence,
        fallback_share=ffr.fallback_share,
        deviations=ffr.deviations,
        block=ffr.block,
        high_labels=ffr.high_labels,
        with_affinities=config.method == "dfa+ffr",
    )


def _check_block(config: Config) -> None:
    """What FfrStep would refuse, before workers are started for it."""
    num_blocks = num_token_blocks(config)
    if config.method != "dfa" and config.ffr.block > num_blocks:
        raise ValueError(
            f"ffr.block is {config.ffr.block}, allowed is 0 to {num_blocks}: the decoder reads so many blocks"
            " (clip.token_blocks)"
        )


def loop_plan(config: Config) -> LoopPlan:
    """The training run, to be handed to `dfa.train.loop.run`."""
    train, shards = config.train, index(config, "train")
    _check_block(config)
    if config.crop.scale_min > config.crop.scale_max:
        raise ValueError(f"crop.scale_min {config.crop.scale_min} exceeds crop.scale_max {config.crop.scale_max}")
    labels = _labels_address(config, shards)
    if config.affinity.use_from_step > train.steps and config.loss.supervision == "pseudo":
        logger.warning(
            "affinity.use_from_step %d is not reached in %d steps: all labels are made with the un-learned affinities",
            config.affinity.use_from_step,
            train.steps,
        )
    return LoopPlan(
        run_folder=storage.absolute(config.run),
        class_names=shards.class_names,
        model_description=model_description(config),
        shard_sizes=tuple(shard.num_samples for shard in shards.shards),
        make_objective=_objective_maker(config),
        make_dataset=_dataset_maker(config, shards, labels),
        make_validation=_validation_maker(config, index(config, "val")) if config.shards.val else None,
        total_steps=train.steps,
        global_batch=train.batch_size,
        micro_batch=_micro_batch(config),
        warmup_steps=train.warmup_steps,
        decay_power=train.decay_power,
        optimizer=OptimizerSettings(
            learning_rate=train.learning_rate, beta1=0.9, beta2=0.999, epsilon=1e-8, gradient_clip=train.clip_norm
        ),
        engine=train.engine,  # type: ignore[arg-type]
        precision=train.precision,  # type: ignore[arg-type]
        zero_stage=train.zero_stage,
        num_workers=train.workers,
        min_workers=train.min_workers,
        resize_interval_s=train.resize_interval_s,
        worker_cpus=train.worker_cpus,
        max_failures=train.max_failures,
        collective_timeout_s=train.collective_timeout_s,
        keep_history=train.history,
        average_decay=train.ema_decay,
        use_gpu=train.use_gpu,
        validate_every=train.validate_every,
        checkpoint_every=train.checkpoint_every,
        keep_last=train.keep_checkpoints,
        log_every=train.log_every,
        seed=train.seed,
        window_bytes=_window_bytes(config, shards, labels),
        make_observers=_observer_maker(config),
    )


def _observer_maker(config: Config) -> Callable[[], Sequence[Observer]]:
    if not config.train.mlflow:
        return tuple
    check_installed()  # now, not in a worker minutes later
    run, parameters = storage.absolute(config.run), configuration.to_dict(config)
    return lambda: (MlflowTracker(config.train.mlflow, run, name=config.name, parameters=parameters),)


def _micro_batch(config: Config) -> int:
    train = config.train
    if train.micro_batch_size:
        return train.micro_batch_size
    if train.batch_size % train.workers and not train.min_workers:
        raise ValueError(f"train.batch_size {train.batch_size} is not a multiple of train.workers {train.workers}")
    return max(1, train.batch_size // train.workers)


def _objective_maker(config: Config) -> Callable[[torch.device], TrainStep]:
    return lambda device: train_step(config, device)


def _dataset_maker(config: Config, shards: ShardIndex, labels: str | None) -> Callable[[Progress, Readers], Any]:
    crop = CropSettings(
        size=config.crop.size,
        scale_range=(config.crop.scale_min, config.crop.scale_max),
        flip_probability=config.crop.flip,
        max_pixels=config.data.max_pixels,
        long_side=config.crop.long_side,
    )

    def make(progress: Progress, readers: Readers) -> Any:
        return train_stream(
            shards,
            seed=config.train.seed,
            num_samples=config.train.steps * config.train.batch_size,
            finished_epochs=progress.finished_epochs,
            open_epochs=progress.open_epochs,
            crop=crop,
            with_masks=config.loss.supervision == "masks",
            num_workers=readers.num_workers,
            read_cpus=readers.read_cpus,
            max_readers=readers.max_readers,
            labels=labels,
        )

    return make


def _labels_address(config: Config, shards: ShardIndex) -> str | None:
    """shards.labels, held against the train shards where labels lie there already; None where Y is something else."""
    root, supervision = config.shards.labels, config.loss.supervision
    if supervision != "labels":
        if root:
            raise ValueError(
                f"shards.labels is {root!r} and loss.supervision is {supervision!r}, which reads no labels from disk:"
                " set loss.supervision=labels, or leave shards.labels empty"
            )
        return None
    if not root:
        raise ValueError("loss.supervision=labels needs shards.labels: give a folder that jobs/pseudo_label wrote")
    folder = resolve(root)
    if folder is None:
        logger.warning(
            "%s holds no finished labels yet: until it does, samples are trained on labels made online", root
        )
    else:
        check_labels(folder, shards)
    return root


def _window_bytes(config: Config, shards: ShardIndex, labels: str | None) -> int:
    """Pixels decoded ahead of training. Where labels are refreshed beside it, about half an epoch: they come that late.

    The demo's whole run is smaller than the usual window: it would be read before the first refresh.
    """
    if labels is None or resolve(labels) == labels:
        return LoopPlan.window_bytes
    epoch_bytes = shards.num_samples * config.crop.size**2 * 4  # RGB and label
    return min(LoopPlan.window_bytes, max(_SMALLEST_WINDOW_BYTES, epoch_bytes // 2))


def _validation_maker(config: Config, shards: ShardIndex) -> Callable[[int, int], Iterable[Batch]]:
    limit = config.train.validate_images or None

    def make(rank: int, num_ranks: int) -> Iterable[Batch]:
        return eval_batches(
            shards,
            rank=rank,
            world=num_ranks,
            batch_size=_EVALUATION_BATCH,
            max_pixels=config.data.max_pixels,
            limit=limit,
        )

    return make
