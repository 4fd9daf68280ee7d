"""What the label factory needs."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfa import config as configuration
from dfa.build.data import class_set, index
from dfa.build.model import (
    beside_conf,
    device,
    model_description,
    other_clips,
    patch_size,
    trained_segmenter,
    uses_learned,
)
from dfa.build.predicting import (
    checkpoint_config,
    checkpoint_segmenter,
    input_address,
    prediction_input,
    prediction_output,
)
from dfa.build.training import pseudo_settings
from dfa.config import ClipConfig, Config
from dfa.core.void import label_dtype
from dfa.data import storage
from dfa.data.classes import check_classes
from dfa.data.shards import ShardIndex, sha256_of
from dfa.label.crf import PRESETS, CrfSettings
from dfa.label.factory import FactoryPlan, LabelPass
from dfa.label.images import ImageSet, ListedImages, ShardImages
from dfa.label.pseudo import PseudoSettings
from dfa.label.scoring import ImageScores, LabelSettings, model_scores, seed_scores
from dfa.label.slots import Share
from dfa.label.work import Scorer
from dfa.model.inference import InputSize, Merge, size_class
from dfa.model.segmenter import Segmenter
from dfa.train.checkpoint import STATE_NAME, find_checkpoint, read_info, uses_average
from dfa.train.follow import FollowPlan
from dfa.train.starts import RUN_NAME

logger = logging.getLogger(__name__)

Labels = Sequence[tuple[int, ...]]
_PUBLISHED_SIZE = {"square": 320, "long_side": 512}

_COCO_CHANNELS = 81


def crf_settings(config: Config) -> CrfSettings:
    """The CRF preset."""
    return PRESETS[config.crf.preset]


def _checkpoint(config: Config) -> str:
    return find_checkpoint(config.run, config.label.checkpoint)


def checkpoint(config: Config) -> str:
    """The folder of the checkpoint that label.checkpoint names; a ValueError where its classes are not the run's."""
    folder = _checkpoint(config)
    check_classes(read_info(folder).class_names, class_set(config).names, where=folder)
    return folder


def factory_plan(config: Config, passes: Sequence[LabelPass]) -> FactoryPlan:
    """Label `passes` with the run's checkpoint."""
    label = config.label
    share = Share(
        use_gpu=config.train.use_gpu,
        num_scorers=label.scorers,
        scorer_cpus=label.scorer_cpus,
        scorer_gpus=label.scorer_gpus,
        crf_cpus=label.crf_cpus,
        crf_resource=label.crf_resource,
    )
    return FactoryPlan(
        make_scorers=_scorer_maker(config, _checkpoint(config), {each.scorer for each in passes}),
        passes=tuple(passes),
        share=share,
        batch_images=label.batch_size,
        batch_pixels=_batch_pixels(config, passes),
        crf_images=label.crf_images,
    )


def _batch_pixels(config: Config, passes: Sequence[LabelPass]) -> int:
    """label.batch_pixels, less where the logits of more classes than COCO's would take more memory than those of COCO's."""
    channels = [
        1 + len(each.images.class_names) for each in passes if each.scorer != "seed" or config.label.compare_model
    ]
    return max(1, config.label.batch_pixels * _COCO_CHANNELS // max(_COCO_CHANNELS, *channels, 0))


def label_pass(config: Config, split: str, *, limit: int = 0, output: str = "") -> LabelPass:
    """The pseudo-labels that label.unary names, for `train` or `val` shards, into RUN/labels/SPLIT (SPLIT_model where the
    model's logits are the unary), or `output`."""
    if config.label.unary == "cam":
        return seed_pass(config, split, with_crf=True, limit=limit, output=output)
    scorer = "restricted" if config.label.restrict else "model"
    output = output or storage.join(config.run, f"labels/{split}_model")
    return _shard_pass(config, split, scorer, "labels", with_crf=True, limit=limit, output=output)


def seed_pass(config: Config, split: str, *, with_crf: bool, limit: int, output: str = "") -> LabelPass:
    """CAMs of `train` or `val` shards, with dense CRF as labels into RUN/labels, without as seeds into RUN/seeds."""
    folder = "labels" if with_crf else "seeds"
    return _shard_pass(config, split, "seed", folder, with_crf=with_crf, limit=limit, output=output)


def model_pass(config: Config, split: str, *, limit: int, output: str = "") -> LabelPass:
    """The trained model's masks of `train`, `val` or `test` shards, with dense CRF, into RUN/predictions or `output`. Masks of
    the other CRFs of evaluate.crf_presets are counted.

    Raises:
        ValueError: an unknown preset, and what the other passes refuse.
    """
    found = _shard_pass(config, split, "model", "predictions", with_crf=True, limit=limit, output=output)
    names = config.evaluate.crf_presets
    if set(names) - set(PRESETS):
        raise ValueError(f"evaluate.crf_presets is {names}, allowed are {', '.join(PRESETS)}")
    return replace(found, settings=replace(found.settings, other_crfs=tuple(PRESETS[name] for name in names)))


def label_facts(config: Config) -> dict[str, str]:
    """What made the labels of `label_pass`, in words for a page; the same wherever the files lie."""
    label, folder, classes = config.label, _checkpoint(config), class_set(config)
    info, from_cam = read_info(folder), label.unary == "cam"
    score = "not validated" if info.val_miou is None else f"validation mIoU {100 * info.val_miou:.1f} %"
    learned = "learned" if uses_learned(config, info.step) else "un-learned"
    from_model = "model, " + ("restricted" if label.restrict else "all classes")
    unary = f"CAM ({config.cam.generator}, {learned} affinities)" if from_cam else from_model
    evaluate = config.evaluate
    scales = evaluate.cam_scales if from_cam else evaluate.scales
    seen = _input_size(config)
    size = "" if seen.kind == "native" else f", {seen.kind} {seen.pixels}"
    averaged = ", averaged weights" if uses_average(folder, label.weights) else ""  # type: ignore[arg-type]
    return {
        "checkpoint": f"step {info.step}{averaged}, {score}, {STATE_NAME} {sha256_of(storage.join(folder, STATE_NAME))[:12]}",
        "encoder": f"{Path(config.clip.model).name}, {Path(config.clip.checkpoint).name}",
        "unary": f"{unary}, scales {list(scales)}{', mirrored too' if evaluate.flip else ''}, {evaluate.merge}{size}",
        "CRF": f"preset {config.crf.preset}",
        "class list": f"{Path(config.data.classes).name}, {len(classes.names)} classes",
    }


def follow_plan(config: Config) -> FollowPlan:
    """Label beside the training of config.run, into label.output or RUN/labels/SPLIT_follow.

    Raises:
        ValueError: label.checkpoint is a step: that one never changes.
    """
    label = config.label
    if label.checkpoint not in ("best", "latest"):
        raise ValueError(f"label.follow=true follows label.checkpoint=best or latest, not {label.checkpoint!r}")
    own = storage.join(config.run, f"labels/{label.split}_follow")
    root = label.output or own
    # Followers of one training keep their models apart.
    name = label.split if root == own else f"{label.split}-{configuration.digest(root)}"
    return FollowPlan(
        run=config.run,
        root=root,
        snapshots=storage.join(config.run, f"follow/{name}"),
        which=label.checkpoint,  # type: ignore[arg-type]
        planned_samples=partial(_planned_samples, config.run),
        interval_s=label.follow_interval_s,
        patience_s=label.follow_patience_s,
    )


def _planned_samples(run: str) -> int | None:
    """How many samples the training in a folder consumes in all, by the configuration that jobs/train keeps there."""
    address = storage.join(run, RUN_NAME)
    if not storage.exists(address):
        return None
    document = storage.read_json(address)
    try:
        train = document["config"]["train"]
        return int(train["steps"]) * int(train["batch_size"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{address} is no description of a training: it has no config.train.{error}") from error


def predict_pass(config: Config) -> LabelPass:
    """The trained model's masks of what predict.input holds. Model and classes come from the checkpoint alone."""
    folder = _checkpoint(config)
    found = prediction_input(config, read_info(folder).class_names)
    images = ShardImages(found) if isinstance(found, ShardIndex) else ListedImages(found)
    name, output, clip = f"predictions of {images.root}", prediction_output(config), checkpoint_config(folder).clip
    found_pass = _pass(config, name, "predict", images, output, with_crf=config.predict.crf, limit=0, clip=clip)
    return replace(found_pass, origin=input_address(config))


def _shard_pass(
    config: Config, split: str, scorer: str, folder: str, *, with_crf: bool, limit: int, output: str
) -> LabelPass:
    shards: ShardIndex = index(config, split)
    part = f"{split}_first_{limit}" if limit else split
    output = output or storage.join(config.run, f"{folder}/{part}")
    checkpoint(config)  # refuses one of other classes
    name, images = f"{folder} of {split}", ShardImages(shards)
    return _pass(config, name, scorer, images, output, with_crf=with_crf, limit=limit, clip=config.clip)


def _pass(
    config: Config,
    name: str,
    scorer: str,
    images: ImageSet,
    output: str,
    *,
    with_crf: bool,
    limit: int,
    clip: ClipConfig,
) -> LabelPass:
    label, from_cam, folder = config.label, scorer == "seed", _checkpoint(config)
    scales = config.evaluate.cam_scales if from_cam else config.evaluate.scales
    files = [clip.checkpoint]
    if from_cam:
        files += [checkpoint for _, checkpoint in other_clips(clip)]
        files += [config.affinity.encoder_checkpoint] if config.affinity.encoder else []
    # All that decides the labels; the checkpoint's state describes the model and holds the hashes of its weights.
    decisive: list[Any] = [scorer, scales, config.evaluate.flip, label.batch_size, label.batch_pixels]
    decisive += [images.class_names, sha256_of(storage.join(folder, STATE_NAME))]
    decisive += [sha256_of(beside_conf(each)) if Path(beside_conf(each)).is_file() else each for each in files]
    if scorer != "predict":
        decisive += [model_description(config)]
    if uses_average(folder, label.weights):  # type: ignore[arg-type]
        decisive += ["average"]
    if (config.evaluate.merge, config.evaluate.input) != ("mean", "native"):
        decisive += [config.evaluate.merge, _input_size(config)]
    if from_cam:
        decisive += [config.cam, _label_pseudo_settings(config), label.compare_model, class_set(config)]
        if not uses_learned(config, step := read_info(folder).step):
            decisive += ["un-learned affinities"]
            text = "%s is of step %d: its CAMs are made with the un-learned affinities (affinity.use_from_step is %d)"
            logger.warning(text, folder, step, config.affinity.use_from_step)
    else:
        decisive += [label.min_probability]
    return LabelPass(
        name=name,
        scorer=scorer,
        images=images,
        output=output,
        settings=LabelSettings(
            num_classes=len(images.class_names),
            crf=crf_settings(config) if with_crf else None,
            sharpness=label.sharpness if from_cam else 1.0,
            min_confidence=label.min_confidence if with_crf else 0.0,
            thresholds=tuple(sorted(set(config.evaluate.thresholds))) if from_cam else (),
            soft=label.soft,
            confidence=label.confidence,
            skip_unlabelled=label.unlabelled == "skip" and scorer in ("seed", "restricted"),
        ),
        hash=configuration.digest(*decisive),
        max_pixels=config.data.max_pixels,
        size_class=partial(
            size_class,
            scales=tuple(scales),
            multiple_of=patch_size(clip.model),
            input_size=_input_size(config),
        ),
        limit=limit,
    )


def views(config: Config) -> dict[str, Any]:
    """How inference sees an image besides its scales, as keywords of the segmenter: evaluate.flip, merge and input."""
    return {"flip": config.evaluate.flip, "merge": _merge(config), "input_size": _input_size(config)}


def _input_size(config: Config) -> InputSize:
    evaluate: Any = config.evaluate
    return InputSize(evaluate.input, evaluate.input_size or _PUBLISHED_SIZE.get(evaluate.input, 0))


def _merge(config: Config) -> Merge:
    return "max" if config.evaluate.merge == "max" else "logits"


def _label_pseudo_settings(config: Config) -> PseudoSettings:
    settings = pseudo_settings(config)
    return replace(settings, threshold=config.label.threshold or settings.threshold)


def _scorer_maker(config: Config, folder: str, scorers: Collection[str]) -> Callable[[], Mapping[str, Scorer]]:
    def make() -> Mapping[str, Scorer]:
        on_device = device(config)
        if "predict" in scorers:
            kind: Any = config.label.weights
            predicting = checkpoint_segmenter(folder, on_device, kind=kind)
            return {"predict": partial(_model, predicting, config, restrict=False)}
        built = trained_segmenter(config, on_device, storage.base_name(folder))
        return {
            "seed": partial(seed_images, built, config),
            "model": partial(_model, built, config, restrict=False),
            "restricted": partial(_model, built, config, restrict=True),
        }

    return make


def seed_images(built: Segmenter, config: Config, images: Sequence[torch.Tensor], labels: Labels) -> list[ImageScores]:
    """Seeds of images of one size class (3 x H x W uint8) that show `labels` (1..C), with the background's score: what
    a scorer of the factory does."""
    labels_BC = torch.zeros(len(labels), built.student.decoder.classify.out_features - 1, dtype=torch.bool)
    for row, present in zip(labels_BC, labels, strict=True):
        row[[number - 1 for number in present]] = True
    groups = _equal_sizes(images, built.bank_KE.device)
    found = built.pixel_seeds_together(
        groups,
        labels_BC.to(built.bank_KE.device),
        scales=config.evaluate.cam_scales,
        with_model=config.label.compare_model,
        **views(config),
    )
    settings, scores = _label_pseudo_settings(config), list[ImageScores]()
    for seeds in found:
        part = seed_scores(seeds.score_BMHW, seeds.class_BM, seeds.background_BHW, settings)
        if seeds.logits_BCHW is not None:
            masks_BHW = seeds.logits_BCHW.argmax(1).cpu().numpy().astype(label_dtype(labels_BC.shape[1]))
            part = [replace(each, model_HW=mask_HW) for each, mask_HW in zip(part, masks_BHW, strict=True)]
        scores += part
    return scores


def _model(
    built: Segmenter, config: Config, images: Sequence[torch.Tensor], labels: Labels, *, restrict: bool
) -> list[ImageScores]:
    groups = _equal_sizes(images, built.bank_KE.device)
    found = built.logits_together(groups, scales=config.evaluate.scales, **views(config))
    scores, start = list[ImageScores](), 0
    for logits_BCHW in found:
        part = labels[start : start + len(logits_BCHW)] if restrict else None
        scores += model_scores(logits_BCHW, min_probability=config.label.min_probability, labels=part)
        start += len(logits_BCHW)
    return scores


def _equal_sizes(images: Sequence[torch.Tensor], on_device: torch.device) -> list[torch.Tensor]:
    """Neighbours of one size stacked: the factory's batches have them side by side."""
    groups: list[list[torch.Tensor]] = []
    for image in images:
        if groups and groups[-1][0].shape == image.shape:
            groups[-1].append(image)
        else:
            groups.append([image])
    return [torch.stack(group).to(on_device) for group in groups]
