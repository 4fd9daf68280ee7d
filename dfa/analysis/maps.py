"""Where maps lie: predictions or ground truth of many images, found by key.

    a folder of files     STEM.png (class indices), STEM.npy or STEM.npz, in any sub-folders; the key is the stem with its
                          sub-folder, as jobs/shard and jobs/predict make keys of image names
    image shards          of jobs/shard, with masks
    label shards          of jobs/pseudo_label, jobs/predict or `dfa.label.blocks`, or the folder of a follower

An array holds class indices (H, W) of any integer type, or logits (C + 1, H, W) of any float type, background first. A .npz
holds one array. Nothing is unpickled, and shapes are checked before anything is read.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from dfa.core.void import VOID
from dfa.data import storage
from dfa.data.offline import resolve
from dfa.data.samples import sample_key
from dfa.data.shards import INDEX_KIND, INDEX_NAME, MASK_EXTENSION, load_index, samples_by_shard
from dfa.data.transforms import decode_mask
from dfa.label.finished import read_label_index, read_label_rows, read_members

SUFFIXES = (".png", ".npy", ".npz")
Array = np.ndarray[Any, np.dtype[Any]]
Reader = Callable[[str], Array]


@dataclass(frozen=True)
class MapLimits:
    """What a map may be. num_classes: background included."""

    num_classes: int
    max_pixels: int


class MapPart(Protocol):
    """The maps of some keys: small and picklable, since it travels with a task."""

    def open(self, keys: Collection[str], limits: MapLimits) -> Reader:
        """Key -> uint8 (H, W) or float logits (C + 1, H, W). The reader raises a ValueError for a map that is missing or broken.

        Raises:
            BrokenShardError, OSError: the part itself cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Differs where the maps have changed."""
        ...


@dataclass(frozen=True)
class FileMaps:
    """Files below a local folder: key -> path inside it."""

    root: str
    names: Mapping[str, str]

    def open(self, keys: Collection[str], limits: MapLimits) -> Reader:
        def read(key: str) -> Array:
            if key not in self.names:
                raise ValueError("no such file")
            return read_map(os.path.join(self.root, self.names[key]), limits)

        return read

    def fingerprint(self) -> str:
        facts = []
        for name in self.names.values():
            found = os.stat(os.path.join(self.root, name))
            facts.append((name, found.st_size, found.st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class ShardMaps:
    """The masks in one tar: KEY.extension."""

    address: str
    sha256: str
    extension: str

    def open(self, keys: Collection[str], limits: MapLimits) -> Reader:
        masks = read_members(self.address, {f"{key}.{self.extension}" for key in keys})

        def read(key: str) -> Array:
            data = masks.get(f"{key}.{self.extension}")
            if data is None:
                raise ValueError(f"{storage.base_name(self.address)} has no {key}.{self.extension}")
            return decode_mask(data, max_pixels=limits.max_pixels)

        return read

    def fingerprint(self) -> str:
        return self.sha256


@dataclass(frozen=True)
class MapSet:
    """All maps of one side. parts: by shard name; a folder of files is one part, named "". origin: the sharding's plan."""

    root: str
    parts: Mapping[str, MapPart]
    keys: Mapping[str, Sequence[str]]
    origin: str = ""

    @property
    def is_sharded(self) -> bool:
        return "" not in self.parts

    def key_count(self) -> int:
        return sum(map(len, self.keys.values()))


def find_maps(root: str, *, field: str, num_classes: int) -> MapSet:
    """What a folder holds. field: the configuration's, for messages. num_classes: background included.

    Raises:
        ValueError: nothing that can be read, shards without masks or of another number of classes.
    """
    if not root:
        raise ValueError(f"{field} is empty: give a folder of PNGs or arrays, or of shards")
    if storage.exists(storage.join(root, INDEX_NAME)) and _kind(root) == INDEX_KIND:
        return _image_shards(root, field=field, num_classes=num_classes)
    if any(storage.exists(storage.join(root, name)) for name in (INDEX_NAME, "current.json", "plan.json")):
        return _label_shards(root, field=field, num_classes=num_classes)
    if not storage.is_local(root):
        raise ValueError(f"{field} {root} has no {INDEX_NAME}: maps at a remote address are read from shards")
    return _files(storage.local_path(root), field=field)


def _kind(root: str) -> Any:
    document = storage.read_json(storage.join(root, INDEX_NAME))
    return document.get("kind") if isinstance(document, dict) else None


def _image_shards(root: str, *, field: str, num_classes: int) -> MapSet:
    index = load_index(root)
    _check_classes(root, field, len(index.class_names) + 1, num_classes)
    keys = {
        shard.name: [row.key for row in rows if row.has_mask] for shard, rows in samples_by_shard(index, limit=None)
    }
    if not any(keys.values()):
        raise ValueError(f"{field} {root} holds images without masks; shard them with data.masks")
    parts = {shard.name: ShardMaps(index.path(shard.name), shard.sha256, MASK_EXTENSION) for shard in index.shards}
    return MapSet(root, parts, keys, origin=index.plan_hash)


def _label_shards(root: str, *, field: str, num_classes: int) -> MapSet:
    folder = resolve(root)
    if folder is None:
        raise ValueError(f"{field} {root}: the follower has not finished any labels yet")
    index = read_label_index(folder)
    _check_classes(root, field, len(index["class_names"]) + 1, num_classes)
    keys: dict[str, list[str]] = {shard["name"]: [] for shard in index["shards"]}
    for row in read_label_rows(folder):
        keys[row.shard].append(row.key)
    parts = {
        shard["name"]: ShardMaps(storage.join(folder, shard["name"]), shard["sha256"], "png")
        for shard in index["shards"]
    }
    return MapSet(folder, parts, keys, origin=index["image_plan_hash"])


def _check_classes(root: str, field: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"{field} {root} is of {found - 1} classes, data.classes names {wanted - 1}; give the class list of this data set"
        )


def _files(root: str, *, field: str) -> MapSet:
    if not os.path.isdir(root):
        raise ValueError(f"{field} {root} is no folder")
    names: dict[str, str] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            suffix = os.path.splitext(file)[1]
            if suffix.lower() not in SUFFIXES or file.startswith("."):
                continue
            name = os.path.normpath(os.path.join(os.path.relpath(folder, root), file)).replace(os.sep, "/")
            key = sample_key(name[: -len(suffix)])
            if key in names:
                raise ValueError(f"{field} {root}: {names[key]} and {name} have the same key {key!r}; keep one of them")
            names[key] = name
    if not names:
        raise ValueError(f"{field} {root} holds no {', '.join(SUFFIXES)} in any sub-folder")
    return MapSet(root, {"": FileMaps(root, names)}, {"": tuple(names)})


@dataclass(frozen=True)
class PairPart:
    """Some pairs, the unit of work. truth and prediction hold the maps of `keys`, perhaps more."""

    name: str
    keys: tuple[str, ...]
    prediction: MapPart
    truth: MapPart

    def digest(self, settings: str) -> str:
        """Of all that decides the sums of this part."""
        facts = [settings, self.keys, self.prediction.fingerprint(), self.truth.fingerprint()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def join_pairs(prediction: MapSet, truth: MapSet, *, pairs_per_part: int) -> list[PairPart]:
    """Parts of the pairs of all keys of the truth, in the order of their keys, shard by shard where there are shards.

    Raises:
        ValueError: no key in common, or shards of two different shardings.
    """
    predicted = {key for keys in prediction.keys.values() for key in keys}
    if not any(key in predicted for keys in truth.keys.values() for key in keys):
        shown = [next((key for keys in each.keys.values() for key in keys), "") for each in (prediction, truth)]
        raise ValueError(
            f"{prediction.root} and {truth.root} have no key in common: such as {shown[0]!r} and {shown[1]!r}"
        )
    if prediction.is_sharded and truth.is_sharded and prediction.origin != truth.origin:
        raise ValueError(
            f"{prediction.root} and {truth.root} are of two shardings (plans {prediction.origin[:12]} and"
            f" {truth.origin[:12]}); give masks of the same shards, or a folder of PNGs"
        )
    parts = list[PairPart]()
    for shard, keys in _grouped(prediction, truth).items():
        ordered = sorted(keys)
        for start in range(0, len(ordered), pairs_per_part):
            chunk = tuple(ordered[start : start + pairs_per_part])
            sides = (_narrow(each, shard, chunk) for each in (prediction, truth))
            parts.append(PairPart(f"part-{len(parts):06d}", chunk, *sides))
    return parts


def _grouped(prediction: MapSet, truth: MapSet) -> Mapping[str, Sequence[str]]:
    """Keys of the truth, by the shard that they lie in on the side that is sharded."""
    if truth.is_sharded or not prediction.is_sharded:
        return truth.keys
    wanted = set(truth.keys[""])
    groups: dict[str, list[str]] = {
        name: [key for key in keys if key in wanted] for name, keys in prediction.keys.items()
    }
    # Those without a prediction are counted as such, with the last shard.
    groups[next(reversed(groups))] += sorted(wanted - {key for keys in groups.values() for key in keys})
    return groups


def _narrow(side: MapSet, shard: str, keys: Sequence[str]) -> MapPart:
    part = side.parts[shard if side.is_sharded else ""]
    if isinstance(part, FileMaps):
        return FileMaps(part.root, {key: part.names[key] for key in keys if key in part.names})
    return part


def read_map(path: str, limits: MapLimits) -> Array:
    """One file: uint8 (H, W), or float logits (C + 1, H, W).

    Raises:
        ValueError: neither, broken, or too large.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        return decode_mask(storage.read_bytes(path), max_pixels=limits.max_pixels)
    try:
        if suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                entries = archive.namelist()
                if len(entries) != 1:
                    raise ValueError(f"it holds {len(entries)} arrays, needed is one: {entries[:4]}")
                with archive.open(entries[0]) as file:
                    found = _read_array(file, limits)  # type: ignore[arg-type]
        else:
            with open(path, "rb") as file:
                found = _read_array(file, limits)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.path.basename(path)} cannot be read: {error}") from error
    return found if found.ndim == 3 else _labels(found, os.path.basename(path))


def _read_array(file: BinaryIO, limits: MapLimits) -> Array:
    """The array of a .npy stream, after a look at its header: no shape makes us allocate what is too large."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f".npy of version {version}, readable are {sorted(readers)}")
    shape, in_columns, kind = readers[version](file)
    is_logits = len(shape) == 3 and kind.kind == "f" and shape[0] == limits.num_classes
    if not is_logits and not (len(shape) == 2 and kind.kind in "iu"):
        raise ValueError(
            f"it is {kind} {shape}; needed are integers (H, W) or floats ({limits.num_classes}, H, W), background first"
        )
    if not 0 < shape[-1] * shape[-2] <= limits.max_pixels:
        raise ValueError(f"it has {shape[-2]} x {shape[-1]} pixels, allowed are 1 to max_pixels={limits.max_pixels}")
    count = int(np.prod(shape, dtype=np.int64))
    data = file.read(count * kind.itemsize)
    if len(data) != count * kind.itemsize:
        raise ValueError(f"it ends after {len(data)} of {count * kind.itemsize} bytes")
    found = np.frombuffer(data, kind).reshape(shape, order="F" if in_columns else "C")
    return found.astype(kind.newbyteorder("="), order="C")  # a copy that may be written to, as torch wants it


def _labels(found_HW: Array, name: str) -> Array:
    if found_HW.dtype == np.uint8:
        return found_HW
    low, high = int(found_HW.min()), int(found_HW.max())
    if low < 0 or high > VOID:
        raise ValueError(f"{name} has labels from {low} to {high}; allowed are 0 to {VOID}")
    return found_HW.astype(np.uint8)
