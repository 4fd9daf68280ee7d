"""A finished folder of labels in the forms that other tools read: VOC's PNG folder, COCO's JSON.

Exports are pure functions of the folder: the same bytes at every run, each file whole or not there.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pycocotools import mask as coco_mask

from dfa.data import storage
from dfa.data.classes import nearest
from dfa.data.samples import check_mask_values
from dfa.data.shards import (
    RawSample,
    ShardIndex,
    samples_by_shard,
)
from dfa.data.sources import coco_key, read_coco
from dfa.data.transforms import decode_mask
from dfa.label.claim import UnwritableError
from dfa.label.finished import MAX_MAP_PIXELS, LabelRow, read_label_index, read_label_rows, samples_of
from dfa.label.output import MASK_EXTENSION

_EXPORTED_NAME = "pngs.json"  # which PNGs were written where
_PROBE_NAME = ".probe"


@dataclass(frozen=True)
class OriginalIds:
    """How a COCO annotation file numbers things.

    categories: (id, name) by ascending id. images: sample key -> (id, file name).
    """

    categories: tuple[tuple[int, str], ...]
    images: dict[str, tuple[int, str]]


def export_pngs(root: str, folder: str, names: Mapping[str, str] | None = None) -> int:
    """Write the masks of a finished folder of labels as FOLDER/KEY.png (VOC's palette; 16-bit grey above 254 classes);
    return their number.

    A file that has these bytes already is left alone, so that an export that was killed continues where it was. Masks of
    an earlier export that the labels no longer have are deleted (pngs.json in the folder of labels lists what was
    written); other files in FOLDER are not touched.

    Args:
        root: the folder of labels.
        folder: where the PNGs go.
        names: key -> path inside FOLDER, such as "trip/a.png", of keys that shall not be named KEY.png.

    Raises:
        ValueError: no finished labels, damaged ones, or a folder that cannot be written.
    """
    index, names = read_label_index(root), names or {}
    wanted = {row.key: names.get(row.key, f"{row.key}.{MASK_EXTENSION}") for row in read_label_rows(root)}
    with _writing(folder):
        old, inside = _exported(root, folder), set(wanted.values())
        _note_exported(root, folder, old | inside)  # first: what a killed export wrote is known
        there = set[str]()
        for prefix in sorted({name[: name.rfind("/") + 1] for name in inside} | {""}):
            subfolder = storage.join(folder, prefix.rstrip("/")) if prefix else folder
            storage.make_folder(subfolder)
            there |= {prefix + name for name in storage.list_names(subfolder)}
        for _, sample in samples_of(root, index):
            name, data = wanted[sample.key], sample.image
            address = storage.join(folder, name)
            if name not in there or storage.read_bytes(address) != data:
                storage.write_atomic(address, lambda file, data=data: file.write(data))
        for name in old - inside:
            storage.remove(storage.join(folder, name))
        _note_exported(root, folder, inside)
    return len(wanted)


def _exported(root: str, folder: str) -> set[str]:
    """Names of the PNGs that an earlier export wrote into this folder."""
    address = storage.join(root, _EXPORTED_NAME)
    document = storage.read_json(address) if storage.exists(address) else {}
    if document.get("folder") != folder:
        return set()
    wrong = [name for name in document["names"] if name.startswith("/") or ".." in name.split("/")]
    if wrong:
        raise ValueError(f"{address} names {wrong[0]!r}, which is not inside {folder}")
    return set(document["names"])


def _note_exported(root: str, folder: str, names: set[str]) -> None:
    if names != _exported(root, folder):
        storage.write_json(storage.join(root, _EXPORTED_NAME), {"folder": folder, "names": sorted(names)})


def export_coco(
    root: str,
    address: str,
    *,
    categories: Sequence[tuple[int, str]] | None = None,
    images: Mapping[str, tuple[int, str]] | None = None,
) -> int:
    """Write the masks of a finished folder of labels as a COCO "instances" JSON; return the number of annotations.

    Masks are semantic: an annotation is *all* of one class in one image, not one object. It has `segmentation`
    (compressed run lengths), `area`, `bbox` [x, y, width, height], `iscrowd` 0, and `score`, the image's mean
    confidence. Void pixels belong to no annotation; an image without foreground is in `images` alone.

    Args:
        root: the folder of labels.
        address: the JSON file to write.
        categories: (id, name) to use, matched to the class names by name; more than the classes are fine. None: the
            class indices 1..C.
        images: key -> (id, file name). None: 1..n in shard order, KEY.jpg.

    Raises:
        ValueError: a class that categories do not name, a key that images do not have, repeated ids or names, a mask
            that is not of these classes, a file that cannot be written. A file that was there stays as it was then.
    """
    index = read_label_index(root)
    names = index["class_names"]
    categories = tuple(enumerate(names, start=1)) if categories is None else categories
    ids = _category_ids(names, categories)
    document = {
        "categories": ({"id": identity, "name": name} for identity, name in categories),
        "images": _coco_images(root, images),
        "annotations": _coco_annotations(root, index, ids, images),
    }
    num_annotations = 0

    def write(file: BinaryIO) -> None:
        nonlocal num_annotations
        file.write(b'{"info":{"description":"dfa pseudo-labels, semantic: one annotation per image and class"}')
        for part, entries in document.items():
            num_annotations = _write_list(file, part, entries)
        file.write(b"}\n")

    with _writing(address):
        storage.write_atomic(address, write)
    return num_annotations


def read_original_ids(annotations: str, class_names: Sequence[str]) -> OriginalIds:
    """Read the category and image ids of an original COCO annotation file, for `export_coco`.

    Keys are those that `dfa.data.sources.CocoSource` gives to the same file's images.

    Raises:
        ValueError: no such file, a class that its categories do not name, repeated ids or names, two images with one
            key.
    """
    document = read_coco(annotations)
    categories = tuple(sorted((int(entry["id"]), str(entry["name"])) for entry in document["categories"]))
    try:
        _category_ids(class_names, categories)
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from error
    images: dict[str, tuple[int, str]] = {}
    for entry in document["images"]:
        name = str(entry["file_name"])
        key = coco_key(name)
        if key in images:
            raise ValueError(f"{annotations}: images {images[key][1]!r} and {name!r} have the same key {key!r}")
        images[key] = (int(entry["id"]), name)
    return OriginalIds(categories, images)


def check_listed(original: OriginalIds, index: ShardIndex, *, where: str) -> None:
    """Raise a ValueError where an annotation file does not list the images of some shards; `where` names the file."""
    missing = [
        row.key for _, rows in samples_by_shard(index, limit=None) for row in rows if row.key not in original.images
    ]
    if missing:
        raise ValueError(
            f"{where} does not list {len(missing)} of the {index.num_samples} images of {index.root}: {missing[:3]}; it"
            f" lists {len(original.images)}, such as {next(iter(original.images), '')!r}. Give the file of this split"
        )


def check_folder(folder: str) -> None:
    """Raise an UnwritableError where files cannot be written into a folder; it is made if it is not there."""
    with _writing(folder):
        storage.make_folder(folder)
        _try_to_write(storage.join(folder, _PROBE_NAME))


def check_file(address: str) -> None:
    """Raise an UnwritableError where a file of this address cannot be written."""
    with _writing(address):
        if storage.is_local(address):
            path = Path(storage.local_path(address))
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), address)
            path.parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(storage.beside(address, _PROBE_NAME))


def _try_to_write(address: str) -> None:
    storage.write_atomic(address, lambda file: file.write(b"can be written"))
    storage.remove(address)


@contextmanager
def _writing(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"labels cannot be exported to {address}: {error}") from error


def _category_ids(class_names: Sequence[str], categories: Sequence[tuple[int, str]]) -> tuple[int, ...]:
    """The category id of each class, in the order of `class_names`."""
    by_name = {name: identity for identity, name in categories}
    if len(by_name) != len(categories) or len(set(by_name.values())) != len(categories):
        raise ValueError("a category id or name is listed twice")
    for name in class_names:
        if name not in by_name:
            raise ValueError(f"no category is called {name!r}; the nearest is {nearest(name, by_name)!r}")
    return tuple(by_name[name] for name in class_names)


def _coco_images(root: str, images: Mapping[str, tuple[int, str]] | None) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    for number, row in enumerate(read_label_rows(root), start=1):
        identity, name = _image_id(row.key, number, images)
        if identity in seen:
            raise ValueError(f"two images have the id {identity}; the second is key {row.key!r}")
        seen.add(identity)
        yield {"id": identity, "file_name": name, "width": row.width, "height": row.height}


def _image_id(key: str, number: int, images: Mapping[str, tuple[int, str]] | None) -> tuple[int, str]:
    if images is None:
        return number, f"{key}.jpg"
    if key not in images:
        raise ValueError(
            f"no image id for key {key!r}; there are {len(images)} keys, such as {next(iter(images), '')!r}"
        )
    return images[key]


def _coco_annotations(
    root: str, index: dict[str, Any], category_ids: tuple[int, ...], images: Mapping[str, tuple[int, str]] | None
) -> Iterator[dict[str, Any]]:
    identity = 0
    for number, (row, sample) in enumerate(samples_of(root, index), start=1):
        image_id, _ = _image_id(row.key, number, images)
        for label, region in _regions(row, sample, len(category_ids)):
            identity += 1
            yield {
                "id": identity,
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                **region,
                "iscrowd": 0,
                "score": round(row.confidence, 4),
            }


def _regions(row: LabelRow, sample: RawSample, num_classes: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The classes 1..C that a mask shows, ascending, with the segmentation, area and box of each."""
    where = f"{row.shard}, key {row.key!r}"
    try:
        mask_HW = decode_mask(sample.image, max_pixels=MAX_MAP_PIXELS)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if mask_HW.shape != (row.height, row.width):
        raise ValueError(f"{where}: the mask is {mask_HW.shape}, its row says {(row.height, row.width)}")
    check_mask_values(mask_HW, num_classes=num_classes, where=where)
    present = [int(value) for value in np.flatnonzero(np.bincount(mask_HW.reshape(-1)))]
    for label in (value for value in present if 1 <= value <= num_classes):
        code: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask_HW == label, np.uint8))  # type: ignore[assignment]
        yield (
            label,
            {
                "segmentation": {"size": [row.height, row.width], "counts": code["counts"].decode("ascii")},
                "area": int(coco_mask.area(code)),  # type: ignore[arg-type]
                "bbox": [int(side) for side in coco_mask.toBbox(code)],  # type: ignore[arg-type]
            },
        )


def _write_list(file: BinaryIO, name: str, entries: Iterable[dict[str, Any]]) -> int:
    """Write `,"name":[...]`, an entry a line; return the number of entries."""
    file.write(f",\n{json.dumps(name)}:[".encode())
    number = 0
    for number, entry in enumerate(entries, start=1):
        file.write((",\n" if number > 1 else "\n").encode() + json.dumps(entry, separators=(",", ":")).encode())
    file.write(b"]")
    return number
