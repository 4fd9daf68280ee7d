"""A trained model from its checkpoint alone, and what jobs/predict labels with it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dfa import config as configuration
from dfa.build.model import assemble, beside_conf, encoder, load_student
from dfa.config import Config
from dfa.data import storage
from dfa.data.classes import check_classes
from dfa.data.listing import ImageListing, list_images
from dfa.data.shards import INDEX_NAME, ShardIndex, load_index
from dfa.model.inference import NATIVE, InputSize
from dfa.model.predictor import Predictor
from dfa.model.segmenter import Segmenter
from dfa.train.checkpoint import FOLDER, STATE_NAME, WeightKind, find_checkpoint, read_info

_SECTIONS = ("clip", "decoder", "affinity")
# Fields that came after the first checkpoints; their defaults are what a model without them does.
_ADDED = {
    "affinity.encoder",
    "affinity.encoder_blocks",
    "affinity.encoder_checkpoint",
    "affinity.heads",
    "affinity.high_prior",
    "affinity.use_from_step",
    "clip.others",
    "decoder.drop",
    "decoder.grid",
    "decoder.mixer",
    "decoder.radius",
}
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def load(
    checkpoint: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    scales: Sequence[float] = (1.0, 1.2, 1.5),
    flip: bool = True,
    long_side: int | None = None,
    clip_checkpoint: str | os.PathLike[str] | None = None,
    clip_model: str | os.PathLike[str] | None = None,
    weights: WeightKind = "auto",
) -> Predictor:
    """A predictor of a checkpoint; documented as `dfa.load`."""
    folder = checkpoint_folder(checkpoint)
    built = checkpoint_segmenter(
        folder, _device(device), clip_checkpoint=clip_checkpoint, clip_model=clip_model, kind=weights
    )
    defaults = Config()
    return Predictor(
        built,
        read_info(folder).class_names,
        scales=scales,
        flip=flip,
        input_size=NATIVE if long_side is None else InputSize("long_side", long_side),
        min_probability=defaults.label.min_probability,
        max_pixels=defaults.data.max_pixels,
    )


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none that PyTorch knows; give cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but PyTorch finds no GPU here; give cpu")
    return found


def checkpoint_folder(checkpoint: str | os.PathLike[str]) -> str:
    """The address of a checkpoint: `checkpoint` itself, or the best one of the run `checkpoint`.

    Raises:
        ValueError: it is neither.
    """
    folder = os.fspath(checkpoint)
    if storage.exists(storage.join(folder, STATE_NAME)):
        return folder
    if storage.exists(storage.join(folder, FOLDER)):
        return find_checkpoint(folder, "best")
    raise ValueError(
        f"{folder} is no folder with {STATE_NAME} or {FOLDER}/ in it; "
        f"give a checkpoint's folder (RUN/{FOLDER}/step-00000500) or a run's"
    )


def checkpoint_segmenter(
    folder: str,
    device: torch.device,
    *,
    clip_checkpoint: str | os.PathLike[str] | None = None,
    clip_model: str | os.PathLike[str] | None = None,
    kind: WeightKind = "auto",
) -> Segmenter:
    """The segmenter that a checkpoint's own description asks for. It has no text bank: it makes logits, not seeds.

    Args:
        folder: of the checkpoint.
        clip_checkpoint, clip_model: where the CLIP's weights and its model JSON are now, if not where they were in
            training.
        kind: which weights of the checkpoint.

    Raises:
        ValueError: as `dfa.load`.
    """
    names = read_info(folder).class_names
    config = checkpoint_config(folder, clip_checkpoint=clip_checkpoint, clip_model=clip_model)
    config.clip.others = []  # masks read the tokens of the first one alone
    clip = encoder(config, device)
    no_text_KE = torch.zeros(0, clip.embed_dim, device=device)
    built = assemble(config, clip, no_text_KE, num_classes=len(names))
    load_student(built, folder, class_names=names, kind=kind)
    return built


def checkpoint_config(
    folder: str,
    *,
    clip_checkpoint: str | os.PathLike[str] | None = None,
    clip_model: str | os.PathLike[str] | None = None,
) -> Config:
    """What a checkpoint says of its model, with the defaults elsewhere; the CLIP's files are known to be there.

    Arguments and errors as in `checkpoint_segmenter`.
    """
    config = _described(read_info(folder).model, where=f"checkpoint {folder}")
    if clip_checkpoint is not None:
        config.clip.checkpoint = os.fspath(clip_checkpoint)
    if clip_model is not None:
        config.clip.model = os.fspath(clip_model)
    _check_clip_files(config, folder)
    return config


def _described(description: Mapping[str, Any], *, where: str) -> Config:
    """The configuration of a model description; all fields but `_ADDED` must be there, so that no default changes the model."""
    known, problems = configuration.to_dict(Config()), list[str]()
    for name in _SECTIONS:
        section = description.get(name)
        given = set(section) if isinstance(section, Mapping) else set()
        problems += [f"{name}.{each} is unknown here" for each in sorted(given - set(known[name]))]
        missing = {f"{name}.{each}" for each in set(known[name]) - given}
        problems += [f"{each} is missing" for each in sorted(missing - _ADDED)]
    if problems:
        raise ValueError(
            f"{where} describes a model of another version of dfa: {', '.join(problems[:4])}"
            f"{f' and {len(problems) - 4} more' if problems[4:] else ''}; use that version, or train again"
        )
    return configuration.from_sections({name: description[name] for name in _SECTIONS}, where=where)


def _check_clip_files(config: Config, folder: str) -> None:
    """Names of files that are not there, before open_clip takes them for names of its own."""
    for field, suffixes in (("checkpoint", _WEIGHT_SUFFIXES), ("model", (".json",))):
        name = getattr(config.clip, field)
        if name.endswith(suffixes) and not Path(beside_conf(name)).is_file():
            raise ValueError(
                f"checkpoint {folder} was trained with clip.{field}={name}, and there is no such file"
                f" (working directory {Path.cwd()}); give its place as clip_{field}= of dfa.load"
            )


def prediction_input(config: Config, class_names: tuple[str, ...]) -> ShardIndex | ImageListing:
    """What predict.input holds: shards where it has an index.json, else images in all its sub-folders.

    Raises:
        ValueError: the field is empty, no such folder, no image there, or shards of other classes.
    """
    root = _input_root(config)
    if storage.exists(storage.join(root, INDEX_NAME)):
        index = load_index(root)
        check_classes(index.class_names, class_names, where=f"predict.input {root}")
        return index
    if not storage.is_local(root):
        raise ValueError(
            f"predict.input {root} has no {INDEX_NAME}: images at a remote address are read from shards; write them with"
            " jobs.shard, or copy the folder here"
        )
    return list_images(
        storage.local_path(root),
        class_names=class_names,
        images_per_shard=config.data.samples_per_shard,
        max_pixels=config.data.max_pixels,
        apply_exif=config.data.apply_exif,
    )


def prediction_output(config: Config) -> str:
    """The folder of the masks: predict.output, or RUN/predict/NAME of the input.

    Raises:
        ValueError: it lies inside the input, where the next run would take its masks for images.
    """
    root = input_address(config)
    output = config.predict.output or storage.join(config.run, f"predict/{storage.base_name(root)}")
    local = storage.is_local(root) and storage.is_local(output)
    if local and Path(storage.local_path(output)).resolve().is_relative_to(root):
        raise ValueError(f"predict.output {output} lies inside predict.input {root}; choose a folder outside of it")
    return output


def input_address(config: Config) -> str:
    """What predict.input is, however it is written: an absolute path, or a remote address without its query."""
    root = _input_root(config)
    if storage.is_local(root):
        return str(Path(storage.local_path(root)).resolve())
    return root.partition("?")[0].rstrip("/")


def _input_root(config: Config) -> str:
    if not config.predict.input:
        raise ValueError("predict.input is empty: give a folder of images, or of shards that jobs.shard wrote")
    return config.predict.input
