"""Checkpoints: plain files that any engine, world size and precision can continue from, and that evaluation can read
alone.

    RUN/checkpoints/step-00000500/model.safetensors      trainable weights, float32
                                  average.safetensors    their moving average, where one is kept
                                  optimizer.safetensors  both Adam moments, float32
                                  progress.safetensors   what was consumed, packed bits
                                  state.json             numbers, class names, model description, sha256 of the files
                                  and of itself

RUN is a local folder or any address that `dfa.data.storage` knows. On a disk a checkpoint is written under a hidden name
and renamed when complete. An object store cannot rename a folder: there the files go to their names one by one, and
state.json, which holds their hashes, comes last; a folder without it is no checkpoint. So one that is listed is whole
unless the disk or the store lied; hashes tell. No pickled objects anywhere.

An upload that a killed process left open is invisible but kept (and paid for) by S3-like stores: give the bucket a rule
that aborts incomplete multipart uploads.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor

from dfa.data import storage
from dfa.data.classes import check_classes
from dfa.train.objective import EngineState
from dfa.train.progress import Progress

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
KIND = "dfa-checkpoint"
FOLDER = "checkpoints"
_PREFIX, _PARTIAL = "step-", ".partial-"
_MODEL, _AVERAGE, _OPTIMIZER, _PROGRESS, STATE_NAME = (
    "model.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "progress.safetensors",
    "state.json",
)


Address = str | os.PathLike[str]
WeightKind = Literal["auto", "trained", "average"]
"""Weights of a checkpoint: as trained, their average, or (auto) the average where one is kept."""


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
    """A verified checkpoint in memory; `folder` is its address."""

    folder: str
    info: CheckpointInfo
    engine: EngineState
    progress: Progress
    average: dict[str, Tensor] | None = None


def save_checkpoint(
    run: Address,
    engine: EngineState,
    progress_tensors: dict[str, Tensor],
    info: CheckpointInfo,
    average: dict[str, Tensor] | None = None,
) -> str:
    """Write one checkpoint into RUN/checkpoints, complete or not at all, and return its folder; an older one of the same
    step is replaced. average: of the trained weights, by name."""
    root, name = _root(run), f"{_PREFIX}{info.step:08d}"
    moments = {f"moment1.{k}": v for k, v in engine.moment1.items()} | {
        f"moment2.{k}": v for k, v in engine.moment2.items()
    }
    contents = {_MODEL: engine.weights, _OPTIMIZER: moments, _PROGRESS: progress_tensors}
    if average is not None:
        contents[_AVERAGE] = average
    files = {name: safetensors.torch.save(tensors) for name, tensors in contents.items()}
    document: dict[str, Any] = {"kind": KIND, "schema": SCHEMA_VERSION, **asdict(info)}
    document["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    document["digest"] = _digest(document)
    files[STATE_NAME] = json.dumps(document, indent=1).encode()  # the last one, see above
    _write(root, name, files)
    return storage.join(root, name)


def _root(run: Address) -> str:
    return storage.join(os.fspath(run), FOLDER)


def _write(root: str, name: str, files: Mapping[str, bytes]) -> None:
    """Files of the folder ROOT/NAME in their order, complete or not at all."""
    if storage.is_local(root):
        _write_local(storage.local_path(root), name, files)
    else:
        _write_remote(root, name, files)


def _write_local(root: str, name: str, files: Mapping[str, bytes]) -> None:
    target, partial = f"{root}/{name}", f"{root}/{_PARTIAL}{uuid.uuid4().hex}"
    os.makedirs(partial)
    try:
        for file, data in files.items():
            storage.write_atomic(f"{partial}/{file}", lambda stream, data=data: stream.write(data))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk would become fuller with every attempt
        raise
    if os.path.exists(target):
        os.rename(target, f"{root}/{_PARTIAL}{uuid.uuid4().hex}")
    os.rename(partial, target)
    storage.sync_folder(root)


def _write_remote(root: str, name: str, files: Mapping[str, bytes]) -> None:
    target = storage.join(root, name)
    _delete(target)
    storage.make_folder(target)
    for file, data in files.items():
        storage.write_atomic(storage.join(target, file), lambda stream, data=data: stream.write(data))


def _delete(folder: str) -> None:
    """Remove a checkpoint; its state first, so that half of one is none."""
    storage.remove(storage.join(folder, STATE_NAME))
    storage.remove_tree(folder)


def _digest(document: Mapping[str, Any]) -> str:
    """Hash of a state document without its own digest."""
    rest = {k: v for k, v in document.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_info(folder: Address) -> CheckpointInfo:
    """Read and verify `state.json` alone."""
    return _info(_document(os.fspath(folder)))


def _document(folder: str) -> dict[str, Any]:
    path = storage.join(folder, STATE_NAME)
    try:
        document = json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, CorruptCheckpointError | storage.StoreError):
            raise
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


def _read(path: str) -> bytes:
    """The content of a checkpoint's file. A store that does not answer is no damage: its StoreError passes through, lest
    a run go back or begin anew because a network was down."""
    try:
        return storage.read_bytes(path)
    except storage.StoreError:
        raise
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error


def _tensors(folder: str, name: str, document: Mapping[str, Any]) -> dict[str, Tensor]:
    path = storage.join(folder, name)
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != document["sha256"].get(name):
        raise CorruptCheckpointError(f"{path} is damaged: its sha256 is not the one in {STATE_NAME}")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CorruptCheckpointError(f"{path} is not a safetensors file: {error}") from error


def load_weights(
    folder: Address, *, class_names: Sequence[str] | None, kind: WeightKind = "trained"
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Verified weights and description of a checkpoint, for evaluation and labelling.

    Args:
        class_names: foreground classes that the caller expects; None accepts any.
        kind: see `WeightKind`.

    Raises:
        CorruptCheckpointError: unreadable or changed files.
        ValueError: a model of other classes; both lists are named. No average where one is asked for.
        StoreError: a remote store that does not answer.
    """
    folder = os.fspath(folder)
    document = _document(folder)
    info = _info(document)
    if class_names is not None:
        check_classes(info.class_names, class_names, where=folder)
    weights = _tensors(folder, _MODEL, document)
    if _has_average(document, kind, folder):
        weights |= _tensors(folder, _AVERAGE, document)
    return weights, info


def uses_average(folder: Address, kind: WeightKind) -> bool:
    """Whether `load_weights` of this kind gives the average; errors as there."""
    return _has_average(_document(os.fspath(folder)), kind, os.fspath(folder))


def _has_average(document: Mapping[str, Any], kind: WeightKind, folder: str) -> bool:
    if kind == "average" and _AVERAGE not in document["sha256"]:
        raise ValueError(
            f"checkpoint {folder} has no averaged weights: train with train.ema_decay, or take label.weights=trained"
        )
    return kind != "trained" and _AVERAGE in document["sha256"]


def load_checkpoint(folder: Address, *, class_names: Sequence[str]) -> Checkpoint:
    """Load everything that training needs to continue; errors as in `load_weights`."""
    folder = os.fspath(folder)
    weights, info = load_weights(folder, class_names=class_names)
    document = _document(folder)
    moments = _tensors(folder, _OPTIMIZER, document)
    first, second = (
        {k.removeprefix(p): v for k, v in moments.items() if k.startswith(p)} for p in ("moment1.", "moment2.")
    )
    progress = Progress.from_tensors(_tensors(folder, _PROGRESS, document))
    average = _tensors(folder, _AVERAGE, document) if _has_average(document, "auto", folder) else None
    state = EngineState(weights, first, second, info.num_updates, info.loss_scale)
    return Checkpoint(folder, info, state, progress, average)


def copy_model(folder: Address, run: Address, *, name: str) -> str:
    """Copy a checkpoint's model, without optimizer and progress, to RUN/checkpoints/NAME; return that folder.

    The run that wrote it may delete it at any time: the copy is whole and verified, or not there.

    Raises:
        CorruptCheckpointError: the checkpoint is damaged, or was deleted meanwhile.
    """
    source, root = os.fspath(folder), _root(run)
    target = storage.join(root, name)
    if storage.exists(target) and not _unfinished(target):
        return target
    document = _document(source)
    kept = (_MODEL, _AVERAGE) if _AVERAGE in document["sha256"] else (_MODEL,)
    files = {file: _read(storage.join(source, file)) for file in (*kept, STATE_NAME)}
    for file in kept:
        if hashlib.sha256(files[file]).hexdigest() != document["sha256"].get(file):
            raise CorruptCheckpointError(
                f"{storage.join(source, file)} is damaged: its sha256 is not the one in {STATE_NAME}"
            )
    _write(root, name, files)
    return target


def list_checkpoints(run: Address) -> list[str]:
    """Folders of a run's checkpoints, oldest first; unfinished ones are not listed."""
    return [folder for folder in _folders(run) if not _unfinished(folder)]


def _folders(run: Address) -> list[str]:
    """Folders with a checkpoint's name, oldest first, finished or not."""
    root = _root(run)
    names = storage.list_names(root) if storage.exists(root) else []
    return [storage.join(root, name) for name in names if name.startswith(_PREFIX) and _step(name) >= 0]


def _unfinished(folder: str) -> bool:
    return not storage.is_local(folder) and not storage.exists(storage.join(folder, STATE_NAME))


def latest_checkpoint(run: Address, *, class_names: Sequence[str]) -> Checkpoint | None:
    """Newest checkpoint that is whole, None where there is none; damaged and unfinished ones are passed over with a
    warning.

    Raises:
        ValueError: the checkpoint is whole but belongs to other classes.
        CorruptCheckpointError: there are finished ones and all are damaged: a run that began anew would delete what the last
            one recorded.
        StoreError: a remote store that does not answer.
    """
    damaged: list[CorruptCheckpointError] = []
    for folder in reversed(_folders(run)):
        try:
            return load_checkpoint(folder, class_names=class_names)
        except CorruptCheckpointError as error:
            name = storage.base_name(folder)
            logger.warning("checkpoint %s is passed over, the one before it is used: %s", name, error)
            if not _unfinished(folder):
                damaged.append(error)
    if damaged:
        raise CorruptCheckpointError(
            f"none of the {len(damaged)} checkpoints in {_root(run)} can be read ({damaged[0]}): give another run folder, or"
            " delete them to begin anew"
        )
    return None


def best_checkpoint(run: Address, *, up_to: int | None = None) -> str | None:
    """Folder with the highest validation mIoU (the later one of equals) of all steps, or of those up to `up_to`; None where
    none was validated."""
    scored = [
        (info.val_miou, info.step, folder)
        for folder, info in _readable(run)
        if info.val_miou is not None and (up_to is None or info.step <= up_to)
    ]
    return max(scored)[2] if scored else None


def find_checkpoint(run: Address, which: str) -> str:
    """Folder of `best` (the newest where none was validated), `latest`, or the step number `which` of a run."""
    folders = list_checkpoints(run)
    names = [storage.base_name(folder) for folder in folders]
    if not folders:
        raise ValueError(f"{run} holds no finished checkpoint; give the run of a jobs.train, with run=FOLDER")
    if which in ("best", "latest"):
        return (best_checkpoint(run) if which == "best" else None) or folders[-1]
    wanted = f"{_PREFIX}{int(which):08d}" if which.isdigit() else which
    if wanted not in names:
        raise ValueError(f"{run} holds no checkpoint {which!r}; allowed are best, latest or one of {names}")
    return folders[names.index(wanted)]


def prune(run: Address, *, keep_last: int, newest: int) -> None:
    """Delete all but the newest `keep_last` checkpoints up to step `newest` and the best one of these, and what interrupted
    writers left behind.

    Later steps than `newest`, the one just written, go too: they were passed over when the run went back to one before
    them, so they are damaged, and what counted them would delete the whole ones in their stead.
    """
    listed, root = list_checkpoints(run), _root(run)
    folders = [folder for folder in listed if _step(folder) <= newest]
    if not folders:
        return
    best = best_checkpoint(run, up_to=newest)
    superseded = [folder for folder in listed if _step(folder) > newest]
    if superseded:
        logger.warning("deleting checkpoints that were passed over: %s", [storage.base_name(f) for f in superseded])
    leftovers = [storage.join(root, name) for name in storage.list_names(root) if name.startswith(_PARTIAL)]
    leftovers += [folder for folder in _folders(run) if _unfinished(folder)]
    for folder in [*(f for f in folders[: -max(1, keep_last)] if f != best), *superseded, *leftovers]:
        _delete(folder)


def _step(folder: str) -> int:
    """Step of a checkpoint's folder, which copies have in front of more; -1 where somebody put a folder of his own."""
    number = storage.base_name(folder).removeprefix(_PREFIX).partition("-")[0]
    return int(number) if number.isdigit() else -1


def _readable(run: Address) -> list[tuple[str, CheckpointInfo]]:
    found = []
    for folder in list_checkpoints(run):
        try:
            found.append((folder, read_info(folder)))
        except CorruptCheckpointError as error:
            logger.warning("checkpoint %s is passed over: %s", storage.base_name(folder), error)
    return found
