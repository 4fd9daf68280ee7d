"""The one composition root: Config -> objects. Only this module and jobs know Config."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dfa import config as configuration
from dfa.clip import FrozenClip, load_clip
from dfa.config import Config
from dfa.core.affinity import PairLogit
from dfa.data.classes import ClassSet
from dfa.data.folder import FolderSource
from dfa.data.samples import Reject, Sample
from dfa.data.shards import ShardIndex, load_index, sha256_of
from dfa.data.sources import CocoSource, VocSource
from dfa.data.stream import Batch, CropSettings, eval_batches, train_stream
from dfa.label.crf import PRESETS, CrfSettings
from dfa.label.factory import FactoryPlan, LabelPass, Scorer
from dfa.label.pseudo import PseudoSettings
from dfa.label.refine import RefineSettings
from dfa.label.scoring import ImageScores, LabelSettings, model_scores, seed_scores
from dfa.label.seed import SeedSettings
from dfa.model.decoder import Decoder
from dfa.model.segmenter import EncoderSettings, Segmenter
from dfa.model.student import Student
from dfa.train.checkpoint import check_classes, find_checkpoint, load_weights, read_info
from dfa.train.engine import OptimizerSettings
from dfa.train.plan import LoopPlan, Resources
from dfa.train.progress import Progress
from dfa.train.step import StepSettings, TrainStep

_EVALUATION_BATCH = 8


def class_set(config: Config) -> ClassSet:
    """The classes of the run's data set."""
    return configuration.class_set(config.data.classes)


def source(config: Config) -> Iterable[Sample | Reject]:
    """The reader that data.source names."""
    data, classes = config.data, class_set(config)
    if not data.root:
        raise ValueError("data.root is empty: give the folder of the images")
    common: dict[str, Any] = {"classes": classes, "keep_unlabelled": data.unlabelled == "background"}
    common |= {"label_kind": data.label_kind}
    if data.source == "voc":
        file, masks, labels = data.label_file or None, data.masks or None, data.labels
        return VocSource(data.root, data.split, label_file=file, masks=masks, labels=labels, **common)  # type: ignore[arg-type]
    if data.labels == "masks":
        raise ValueError(f"data.labels=masks is for data.source=voc, not {data.source!r}")
    if data.source == "coco":
        if not data.annotations:
            raise ValueError("data.annotations is empty: give the instances JSON")
        masks, crowd, file = bool(data.masks), data.crowd, data.label_file or None
        return CocoSource(data.root, data.annotations, masks=masks, crowd=crowd, label_file=file, **common)  # type: ignore[arg-type]
    return FolderSource(
        data.root,
        table=data.label_file or None,
        image_column=data.image_column,
        label_column=data.label_column,
        separator=data.separator,
        masks=data.masks or None,
        **common,
    )


def index(config: Config, split: str) -> ShardIndex:
    """The index of the `train` or `val` shards.

    Raises:
        ValueError: the field is empty, the folder is no shard set, or its classes are not those of data.classes.
    """
    root = getattr(config.shards, split)
    if not root:
        raise ValueError(f"shards.{split} is empty: give a folder that jobs.shard wrote")
    found, wanted = load_index(root), class_set(config).names
    if found.class_names != wanted:
        raise ValueError(
            f"shards.{split} {root} holds the {len(found.class_names)} classes {list(found.class_names)[:5]}...,"
            f" data.classes={config.data.classes} names {len(wanted)}: {list(wanted)[:5]}..."
        )
    return found


def encoder(config: Config, device: torch.device) -> FrozenClip:
    """The frozen CLIP."""
    clip = config.clip
    return load_clip(
        _beside_conf(clip.model),
        _beside_conf(clip.checkpoint),
        device=device,
        precision=clip.precision,
        mean=clip.mean,
        std=clip.std,
    )


def _beside_conf(name: str) -> str:
    """A file named relative to the project's folder is found from any working directory."""
    beside = configuration.CONF.parent / name
    return str(beside) if not Path(name).exists() and beside.is_file() else name


def segmenter(config: Config, device: torch.device) -> Segmenter:
    """Frozen CLIP, text bank and a student with fresh weights (drawn from train.seed)."""
    clip, classes = encoder(config, device), class_set(config)
    blocks, settings = clip.num_blocks, config.clip
    token_blocks = tuple(range(settings.token_blocks or max(1, blocks - 1)))
    attention_blocks = tuple(range(max(0, blocks - settings.attention_blocks), blocks))
    if token_blocks[-1] >= blocks:
        raise ValueError(f"clip.token_blocks is {settings.token_blocks}, {settings.model} has {blocks} blocks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        student = _student(config, clip.width, len(token_blocks), len(attention_blocks), len(classes.names))
    bank_KE = clip.text_bank([*classes.prompts, *((text,) for text in classes.background)], classes.templates)
    return Segmenter(
        clip,
        bank_KE,
        student.to(device),
        encoder=EncoderSettings(token_blocks, attention_blocks, settings.similarity, settings.surgery_blocks),  # type: ignore[arg-type]
        seed=_seed_settings(config, clip),
        sinkhorn_rounds=config.affinity.sinkhorn_rounds,
    )


def trained_segmenter(config: Config, device: torch.device, which: str = "best") -> Segmenter:
    """The run's segmenter with the student of a checkpoint: `best`, `latest` or a step number."""
    built = segmenter(config, device)
    folder = find_checkpoint(Path(config.run), which)
    weights, _ = load_weights(folder, class_names=class_set(config).names)
    own = {name.removeprefix("student."): value for name, value in weights.items()}
    _check_fit(own, built.student.state_dict(), folder)
    built.student.load_state_dict(own)
    built.student.eval()
    return built


def _check_fit(saved: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], folder: Path) -> None:
    bad = sorted(saved.keys() ^ wanted.keys())
    bad += [name for name in saved.keys() & wanted.keys() if saved[name].shape != wanted[name].shape]
    if bad:
        raise ValueError(f"checkpoint {folder} does not fit this configuration's decoder and affinity: {bad[:4]}")


def _student(config: Config, width: int, num_tokens: int, num_attention: int, num_classes: int) -> Student:
    decoder, affinity = config.decoder, config.affinity
    num_features = num_tokens if affinity.source == "attention+features" else 0

    def pair_logit(prior: Any) -> PairLogit:
        return PairLogit(
            num_attention + num_features,
            hidden=affinity.hidden,
            clip=affinity.clip,
            prior=prior,
            num_feature_channels=num_features,
        )

    return Student(
        Decoder(
            num_blocks=num_tokens,
            token_width=width,
            num_classes=num_classes,
            width=decoder.width,
            depth=decoder.depth,
            heads=decoder.heads,
            mlp_ratio=decoder.mlp_ratio,
            dropout=decoder.dropout,
            normalize_tokens=decoder.normalize_tokens,
        ),
        pair_logit("low"),
        pair_logit("high"),
        source=affinity.source,  # type: ignore[arg-type]
    )


def _seed_settings(config: Config, clip: FrozenClip) -> SeedSettings:
    cam: Any = config.cam
    return SeedSettings(
        generator=cam.generator,
        scale=cam.scale or clip.logit_scale,
        propagation=cam.propagation,
        lambda_low=cam.lambda_low,
        lambda_high=cam.lambda_high,
        form=cam.form,
        columns=cam.columns,
        constant=cam.constant,
        marginal=cam.marginal,
        marginal_temperature=cam.marginal_temperature,
        epsilon=cam.epsilon,
        max_iterations=cam.iterations,
        tolerance=cam.tolerance,
    )


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


def crf_settings(config: Config) -> CrfSettings:
    """The CRF preset."""
    return PRESETS[config.crf.preset]


def train_step(config: Config, device: torch.device) -> TrainStep:
    """The objective of the run on one device."""
    frequency, loss, train = config.frequency, config.loss, config.train
    settings = StepSettings(
        mu=frequency.mu,
        mu_as=frequency.mu_as,  # type: ignore[arg-type]
        relation_gain=frequency.relation_gain,
        alignment=frequency.alignment,  # type: ignore[arg-type]
        use_quality_mask=frequency.use_quality_mask,
        window=frequency.window,
        resolve_unreliable=frequency.resolve_unreliable,
        alignment_weight=loss.alignment,
        rectification_weight=loss.rectification,
        supervision=loss.supervision,  # type: ignore[arg-type]
        pseudo=pseudo_settings(config),
        decoder_rate_scale=train.decoder_rate_scale,
        affinity_rate_scale=train.affinity_rate_scale,
        weight_decay=train.weight_decay,
    )
    built = segmenter(config, device)
    if config.crop.size % built.patch_size:
        raise ValueError(f"crop.size {config.crop.size} is not a multiple of the encoder's patch, {built.patch_size}")
    return TrainStep(built, settings, num_classes=len(class_set(config).names))


def loop_plan(config: Config) -> LoopPlan:
    """The training run, to be handed to `dfa.train.loop.run`."""
    train, shards = config.train, index(config, "train")
    if config.crop.scale_min > config.crop.scale_max:
        raise ValueError(f"crop.scale_min {config.crop.scale_min} exceeds crop.scale_max {config.crop.scale_max}")
    return LoopPlan(
        run_folder=str(Path(config.run).resolve()),
        class_names=shards.class_names,
        model_description=model_description(config),
        num_samples=shards.num_samples,
        make_objective=_objective_maker(config),
        make_dataset=_dataset_maker(config, shards),
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
        use_gpu=train.use_gpu,
        validate_every=train.validate_every,
        checkpoint_every=train.checkpoint_every,
        keep_last=train.keep_checkpoints,
        log_every=train.log_every,
        seed=train.seed,
    )


def model_description(config: Config) -> dict[str, Any]:
    """What a checkpoint's weights fit: kept in checkpoints, and compared when one is loaded for training."""
    described = configuration.to_dict(config)
    return {name: described[name] for name in ("clip", "decoder", "affinity")}


def _micro_batch(config: Config) -> int:
    train = config.train
    if train.micro_batch_size:
        return train.micro_batch_size
    if train.batch_size % train.workers:
        raise ValueError(f"train.batch_size {train.batch_size} is not a multiple of train.workers {train.workers}")
    return train.batch_size // train.workers


def _objective_maker(config: Config) -> Callable[[torch.device], TrainStep]:
    return lambda device: train_step(config, device)


def _dataset_maker(config: Config, shards: ShardIndex) -> Callable[[Progress, Resources], Any]:
    crop = CropSettings(
        size=config.crop.size,
        scale_range=(config.crop.scale_min, config.crop.scale_max),
        flip_probability=config.crop.flip,
        max_pixels=config.data.max_pixels,
    )

    def make(progress: Progress, resources: Resources) -> Any:
        return train_stream(
            shards,
            seed=config.train.seed,
            num_samples=config.train.steps * config.train.batch_size,
            finished_epochs=progress.finished_epochs,
            open_epochs=progress.open_epochs,
            crop=crop,
            with_masks=config.loss.supervision == "masks",
            multiple_of=resources.num_workers,
            read_cpus=resources.read_cpus,
            max_readers=resources.max_readers,
        )

    return make


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


def checkpoint(config: Config) -> Path:
    """The folder of the checkpoint that label.checkpoint names; a ValueError where its classes are not the run's."""
    folder = find_checkpoint(Path(config.run), config.label.checkpoint)
    check_classes(read_info(folder).class_names, class_set(config).names, where=str(folder))
    return folder


def factory_plan(config: Config, passes: Sequence[LabelPass]) -> FactoryPlan:
    """Label `passes` with the run's checkpoint."""
    label = config.label
    return FactoryPlan(
        make_scorers=_scorer_maker(config, checkpoint(config).name),
        passes=tuple(passes),
        use_gpu=config.train.use_gpu,
        batch_images=label.batch_size,
        batch_pixels=label.batch_pixels,
    )


def seed_pass(config: Config, split: str, *, with_crf: bool, limit: int) -> LabelPass:
    """CAMs of `train` or `val` shards, with dense CRF as labels into RUN/labels, without as seeds into RUN/seeds."""
    scores = [config.evaluate.cam_scales, config.cam, _label_pseudo_settings(config)]
    return _label_pass(config, split, "seed", "labels" if with_crf else "seeds", scores, with_crf, limit)


def model_pass(config: Config, split: str, *, limit: int) -> LabelPass:
    """The trained model's masks of `train` or `val` shards, with dense CRF, into RUN/predictions."""
    scores = [config.evaluate.scales, config.label.min_probability]
    return _label_pass(config, split, "model", "predictions", scores, True, limit)


def _label_pass(
    config: Config, split: str, scorer: str, folder: str, scores: Sequence[Any], with_crf: bool, limit: int
) -> LabelPass:
    shards, label, part = index(config, split), config.label, f"{split}_first_{limit}" if limit else split
    thresholds = tuple(sorted(set(config.evaluate.thresholds))) if scorer == "seed" else ()
    clip_weights = Path(_beside_conf(config.clip.checkpoint))
    # All that decides the labels; the checkpoint's state holds the hashes of its weights.
    decisive = [model_description(config), config.evaluate.flip, *scores, label.batch_size, label.batch_pixels]
    decisive += [sha256_of(str(checkpoint(config) / "state.json")), class_set(config)]
    decisive += [sha256_of(str(clip_weights)) if clip_weights.is_file() else config.clip.checkpoint]
    return LabelPass(
        name=f"{folder} of {split}",
        scorer=scorer,
        index=shards,
        output=str(Path(config.run) / folder / part),
        settings=LabelSettings(
            num_classes=len(shards.class_names),
            crf=crf_settings(config) if with_crf else None,
            sharpness=label.sharpness if scorer == "seed" else 1.0,
            min_confidence=label.min_confidence if with_crf else 0.0,
            thresholds=thresholds,
        ),
        hash=configuration.digest(*decisive),
        max_pixels=config.data.max_pixels,
        limit=limit,
    )


def _label_pseudo_settings(config: Config) -> PseudoSettings:
    settings = pseudo_settings(config)
    return replace(settings, threshold=config.label.threshold or settings.threshold)


def _scorer_maker(config: Config, which: str) -> Callable[[], Mapping[str, Scorer]]:
    def make() -> Mapping[str, Scorer]:
        built, settings = trained_segmenter(config, device(config), which), _label_pseudo_settings(config)

        def seeds(image_B3HW: torch.Tensor, labels: Sequence[tuple[int, ...]]) -> list[ImageScores]:
            labels_BC = torch.zeros(len(labels), len(class_set(config).names), dtype=torch.bool)
            for row, present in zip(labels_BC, labels, strict=True):
                row[[number - 1 for number in present]] = True
            on_device = built.bank_KE.device
            found = built.pixel_seeds(
                image_B3HW.to(on_device),
                labels_BC.to(on_device),
                scales=config.evaluate.cam_scales,
                flip=config.evaluate.flip,
            )
            return seed_scores(found.score_BMHW, found.class_BM, found.background_BHW, settings)

        def model(image_B3HW: torch.Tensor, labels: Sequence[tuple[int, ...]]) -> list[ImageScores]:
            logits = built.logits(
                image_B3HW.to(built.bank_KE.device), scales=config.evaluate.scales, flip=config.evaluate.flip
            )
            return model_scores(logits, min_probability=config.label.min_probability)

        return {"seed": seeds, "model": model}

    return make


def device(config: Config) -> torch.device:
    """Where a job without workers of its own computes."""
    if config.train.use_gpu and not torch.cuda.is_available():
        raise ValueError("train.use_gpu is true and torch sees no GPU; set train.use_gpu=false")
    return torch.device("cuda" if config.train.use_gpu else "cpu")


def versions() -> dict[str, str]:
    """Python and the packages that decide a result."""
    packages = ("torch", "ray", "deepspeed", "open_clip_torch", "pydensecrf2", "webdataset", "pyarrow", "numpy")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
