"""Checkpoints: plain files that any engine, world size and precision can continue from, and that evaluation can read
alone.

    RUN/checkpoints/step-00000500/model.safetensors      trainable weights, float32
                                  optimizer.safetensors  both Adam moments, float32
                                  progress.safetensors   what was consumed, packed bits
                                  state.json             numbers, class names, model description, sha256 of the files
                                  and of itself

A folder is written under a hidden name and renamed when complete, so one that has its name is whole unless the disk
lied; hashes tell. No pickled objects anywhere.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dfa.train.objective import EngineState
from dfa.train.progress import Progress

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
KIND = "dfa-checkpoint"
FOLDER = "checkpoints"
_PREFIX, _PARTIAL = "step-", ".partial-"
_MODEL, _OPTIMIZER, _PROGRESS, STATE_NAME = (
    "model.safetensors",
    "optimizer.safetensors",
    "progress.safetensors",
    "state.json",
)


class CorruptCheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or no checkpoint at all; the message names the file."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What `state.json` says. `val_miou` is None where the step was not validated; `model` describes how to build
    the model."""

    step: int
    samples_seen: int
    num_rejected: int
    val_miou: float | None
    num_updates: int
    loss_scale: float
    class_names: tuple[str, ...]
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    folder: Path
    info: CheckpointInfo
    engine: EngineState
    progress: Progress


def save_checkpoint(run: Path, engine: EngineState, progress_tensors: dict[str, Tensor], info: CheckpointInfo) -> Path:
    """Write one checkpoint atomically into RUN/checkpoints and return its folder; an older one of the same step is
    replaced."""
    root = run / FOLDER
    target, partial = root / f"{_PREFIX}{info.step:08d}", root / f"{_PARTIAL}{uuid.uuid4().hex}"
    partial.mkdir(parents=True)
    moments = {f"moment1.{k}": v for k, v in engine.moment1.items()} | {
        f"moment2.{k}": v for k, v in engine.moment2.items()
    }
    contents = {_MODEL: engine.weights, _OPTIMIZER: moments, _PROGRESS: progress_tensors}
    hashes = {name: _write(partial / name, safetensors.torch.save(tensors)) for name, tensors in contents.items()}
    document = {"kind": KIND, "schema": SCHEMA_VERSION, **asdict(info), "sha256": hashes}
    document["digest"] = _digest(document)
    _write(partial / STATE_NAME, json.dumps(document, indent=1).encode())
    _sync_folder(partial)
    if target.exists():
        target.rename(root / f"{_PARTIAL}{uuid.uuid4().hex}")
    partial.rename(target)
    _sync_folder(root)
    return target


def _write(path: Path, data: bytes) -> str:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(document: Mapping[str, Any]) -> str:
    """Hash of a state document without its own digest."""
    rest = {k: v for k, v in document.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_info(folder: Path) -> CheckpointInfo:
    """Read and verify `state.json` alone."""
    return _info(_document(folder))


def _document(folder: Path) -> dict[str, Any]:
    path = folder / STATE_NAME
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise CorruptCheckpointError(f"{path} is not the state of a dfa checkpoint")
    if document.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema {document.get('schema')}, this version reads {SCHEMA_VERSION}")
    if document.get("digest") != _digest(document):
        raise CorruptCheckpointError(f"{path} was changed after it was written: its digest does not match")
    return document


def _info(document: Mapping[str, Any]) -> CheckpointInfo:
    fields = {name: document[name] for name in CheckpointInfo.__dataclass_fields__}
    return CheckpointInfo(**{**fields, "class_names": tuple(fields["class_names"])})


def _tensors(folder: Path, name: str, document: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != document["sha256"].get(name):
        raise CorruptCheckpointError(f"{path} is damaged: its sha256 is not the one in {STATE_NAME}")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CorruptCheckpointError(f"{path} is not a safetensors file: {error}") from error


def load_weights(folder: Path, *, class_names: Sequence[str] | None) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Verified weights and description of a checkpoint, for evaluation and labelling.

    Args:
        class_names: foreground classes that the caller expects; None accepts any.

    Raises:
        CorruptCheckpointError: unreadable or changed files.
        ValueError: a model of other classes; both lists are named.
    """
    document = _document(folder)
    info = _info(document)
    if class_names is not None:
        check_classes(info.class_names, class_names, where=str(folder))
    return _tensors(folder, _MODEL, document), info


def load_checkpoint(folder: Path, *, class_names: Sequence[str]) -> Checkpoint:
    """Load everything that training needs to continue; errors as in `load_weights`."""
    weights, info = load_weights(folder, class_names=class_names)
    document = _document(folder)
    moments = _tensors(folder, _OPTIMIZER, document)
    first, second = (
        {k.removeprefix(p): v for k, v in moments.items() if k.startswith(p)} for p in ("moment1.", "moment2.")
    )
    progress = Progress.from_tensors(_tensors(folder, _PROGRESS, document))
    return Checkpoint(folder, info, EngineState(weights, first, second, info.num_updates, info.loss_scale), progress)


def copy_model(folder: Path, run: Path, *, name: str) -> Path:
    """Copy a checkpoint's model, without optimizer and progress, to RUN/checkpoints/NAME; return that folder.

    The run that wrote it may delete it at any time: the copy is whole and verified, or not there.

    Raises:
        CorruptCheckpointError: the checkpoint is damaged, or was deleted meanwhile.
    """
    target, partial = run / FOLDER / name, run / FOLDER / f"{_PARTIAL}{uuid.uuid4().hex}"
    if target.exists():
        return target
    partial.mkdir(parents=True)
    try:
        for file in (_MODEL, STATE_NAME):
            try:
                data = (folder / file).read_bytes()
            except OSError as error:
                raise CorruptCheckpointError(f"{folder / file} cannot be read: {error}") from error
            _write(partial / file, data)
        load_weights(partial, class_names=None)
        _sync_folder(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    _sync_folder(target.parent)
    return target


def check_classes(saved: Sequence[str], wanted: Sequence[str], *, where: str) -> None:
    """Raise a ValueError that names both sides when the class lists differ."""
    if tuple(saved) == tuple(wanted):
        return
    if len(saved) != len(wanted):
        raise ValueError(
            f"{where} has {len(saved)} foreground classes ({', '.join(saved)}), "
            f"this run has {len(wanted)} ({', '.join(wanted)})"
        )
    number, (old, new) = next(
        (i, pair) for i, pair in enumerate(zip(saved, wanted, strict=True), 1) if pair[0] != pair[1]
    )
    raise ValueError(
        f"{where} calls class {number} {old!r}, this run calls it {new!r} (both have {len(saved)} classes)"
    )


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; unfinished ones are not listed."""
    root = run / FOLDER
    return sorted(path for path in root.iterdir() if path.name.startswith(_PREFIX)) if root.is_dir() else []


def latest_checkpoint(run: Path, *, class_names: Sequence[str]) -> Checkpoint | None:
    """Newest checkpoint that is whole, None where there is none; damaged ones are passed over with a warning.

    Raises:
        ValueError: the checkpoint is whole but belongs to other classes.
    """
    for folder in reversed(list_checkpoints(run)):
        try:
            return load_checkpoint(folder, class_names=class_names)
        except CorruptCheckpointError as error:
            logger.warning("checkpoint %s is passed over, the one before it is used: %s", folder.name, error)
    return None


def best_checkpoint(run: Path) -> Path | None:
    """Folder with the highest validation mIoU (the later one of equals), None where none was validated."""
    scored = [(info.val_miou, info.step, path) for path, info in _readable(run) if info.val_miou is not None]
    return max(scored)[2] if scored else None


def find_checkpoint(run: Path, which: str) -> Path:
    """Folder of `best` (the newest where none was validated), `latest`, or the step number `which` of a run."""
    folders = list_checkpoints(run)
    names = [path.name for path in folders]
    if not folders:
        raise ValueError(f"{run} holds no finished checkpoint")
    if which in ("best", "latest"):
        return (best_checkpoint(run) if which == "best" else None) or folders[-1]
    wanted = f"{_PREFIX}{int(which):08d}" if which.isdigit() else which
    if wanted not in names:
        raise ValueError(f"{run} holds no checkpoint {which!r}; allowed are best, latest or one of {names}")
    return folders[names.index(wanted)]


def prune(run: Path, *, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one, and what interrupted writers left behind."""
    folders, best = list_checkpoints(run), best_checkpoint(run)
    leftovers = [path for path in (run / FOLDER).iterdir() if path.name.startswith(_PARTIAL)] if folders else []
    for folder in [*(f for f in folders[: -max(1, keep_last)] if f != best), *leftovers]:
        shutil.rmtree(folder)


def _readable(run: Path) -> list[tuple[Path, CheckpointInfo]]:
    found = []
    for folder in list_checkpoints(run):
        try:
            found.append((folder, read_info(folder)))
        except CorruptCheckpointError as error:
            logger.warning("checkpoint %s is passed over: %s", folder.name, error)
    return found
