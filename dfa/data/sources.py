"""Data sets as users have them on disk -> Sample: VOC 2012 folders, COCO instances JSON, any folder with a label table.

A source is a small picklable description; iterating it reads what is there now and yields, in a fixed order, a `Sample`
for each usable image and a `Reject` with the reason for each other. Image-level labels come from annotations or label
files; ground-truth masks are read for labels only where `labels="masks"` asks for it by name, and a mask folder may be
missing unless masks are wanted.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from dfa.core.void import label_dtype, void_label
from dfa.data import storage
from dfa.data.classes import ClassSet, nearest
from dfa.data.folder import FolderSource
from dfa.data.labels import (
    LabelKind,
    LabelProblem,
    Labels,
    check_label_kind,
    labels_in_mask,
    read_label_text,
    read_voc_annotation,
    strip_image_extension,
)
from dfa.data.samples import (
    IMAGE_EXTENSIONS,
    MaskFile,
    MaskSegments,
    Reject,
    Sample,
    Segment,
    check_mask_values,
    judge,
    sample_key,
)
from dfa.data.transforms import LabelArray, decode_mask

logger = logging.getLogger(__name__)

__all__ = [
    "ClassSet",
    "CocoSource",
    "FolderSource",
    "MaskFile",
    "MaskSegments",
    "Reject",
    "Sample",
    "Segment",
    "VocSource",
    "mask_array",
    "sample_key",
]

#: Masks are decoded only after their image passed the writer's own limit; this one stops absurd files.
_MAX_MASK_PIXELS = 200_000_000


def mask_array(sample: Sample, *, num_classes: int) -> LabelArray:
    """Return a sample's ground truth (H, W): 0 background, 1..C classes, 255 void; type and void are those of C classes.

    Raises:
        ValueError: no mask, an RGB picture of one, or values outside 0..C and void.
    """
    if sample.mask is None:
        raise ValueError(f"sample {sample.key!r} has no mask")
    if isinstance(sample.mask, MaskSegments):
        mask, where = _paint(sample.mask, label_dtype(num_classes)), f"annotations of {sample.key!r}"
    else:
        where = f"mask {sample.mask.path}"
        try:
            mask = decode_mask(storage.read_bytes(sample.mask.path), max_pixels=_MAX_MASK_PIXELS)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    check_mask_values(mask, num_classes=num_classes, where=where)
    return mask


def _paint(mask: MaskSegments, dtype: str) -> LabelArray:
    canvas = np.zeros((mask.height, mask.width), dtype)
    for segment in mask.segments:
        code = {"size": [mask.height, mask.width], "counts": segment.counts}
        canvas[coco_mask.decode(code).astype(bool)] = segment.value  # type: ignore[arg-type]
    return canvas


def images_by_stem(folder: str) -> dict[str, str]:
    """Map stem -> path of the images that lie directly in a folder."""
    return {
        os.path.splitext(name)[0]: os.path.join(folder, name)
        for name in storage.list_names(folder)
        if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
    }


@dataclass(frozen=True)
class VocSource:
    """A PASCAL VOC 2012 folder.

    Attributes:
        root: the folder with JPEGImages, or its parent VOCdevkit, or the one above.
        split: name of a list in ImageSets/Segmentation (`train`, `train_aug`, `val`), or the path of a .txt file.
        classes: the class list.
        labels: `auto` takes the label file if one is given, else Annotations/*.xml; `masks` reads ground truth.
        label_file: text file of `id class class ...`.
        label_kind: how the label file names classes.
        keep_difficult: count XML objects marked `difficult`; the field does.
        masks: name of the mask folder (`SegmentationClass`, `SegmentationClassAug`), or None for a run without masks.
        keep_unlabelled: keep an image without labels as all-background instead of rejecting it.
    """

    root: str
    split: str
    classes: ClassSet
    labels: Literal["auto", "annotations", "file", "masks"] = "auto"
    label_file: str | None = None
    label_kind: LabelKind = "names"
    keep_difficult: bool = True
    masks: str | None = None
    keep_unlabelled: bool = False

    def __post_init__(self) -> None:
        check_label_kind(self.label_kind)
        if self.labels not in ("auto", "annotations", "file", "masks"):
            raise ValueError(f"labels is {self.labels!r}; allowed: 'auto', 'annotations', 'file', 'masks'")
        if self.labels == "file" and self.label_file is None:
            raise ValueError("labels='file' needs label_file")
        if self.labels == "masks" and self.masks is None:
            raise ValueError("labels='masks' needs masks, the name of the mask folder")

    def __iter__(self) -> Iterator[Sample | Reject]:
        folder = voc_folder(self.root)
        images = images_by_stem(os.path.join(folder, "JPEGImages"))
        if not images:
            raise ValueError(f"{folder}/JPEGImages holds no image (looked for {', '.join(IMAGE_EXTENSIONS)})")
        mask_folder = self._mask_folder(folder)
        mask_names = set() if mask_folder is None else set(storage.list_names(mask_folder))
        how = self._labels_from(folder)
        table = None
        if how == "file" and self.label_file is not None:
            table = read_label_text(self.label_file, classes=self.classes, kind=self.label_kind)
        for name in voc_split(folder, self.split):
            key = sample_key(name)
            if name not in images:
                yield Reject(key, f"{folder}/JPEGImages/{name}.jpg", f"listed in split {self.split!r} but not there")
                continue
            mask = None
            if mask_folder is not None:
                mask = MaskFile(os.path.join(mask_folder, f"{name}.png"))
                if f"{name}.png" not in mask_names:
                    yield Reject(key, images[name], f"mask {mask.path} is missing")
                    continue
            labels = table.get(name) if table is not None else self._labels(folder, how, name, mask)
            yield judge(key, images[name], labels, mask, keep_unlabelled=self.keep_unlabelled)

    def _mask_folder(self, folder: str) -> str | None:
        if self.masks is None:
            return None
        path = os.path.join(folder, self.masks)
        if not os.path.isdir(path):
            raise ValueError(
                f"masks={self.masks!r} but there is no folder {path}; it holds {storage.list_names(folder)}"
            )
        return path

    def _labels_from(self, folder: str) -> str:
        if self.labels != "auto":
            return self.labels
        if self.label_file is not None:
            return "file"
        if os.path.isdir(os.path.join(folder, "Annotations")):
            return "annotations"
        raise ValueError(
            f"{folder} has no Annotations and no label_file is given: give one (lines of `id class class ...`), "
            "or ask for labels='masks' by name"
        )

    def _labels(self, folder: str, how: str, name: str, mask: MaskFile | None) -> Labels:
        if how == "annotations":
            path = os.path.join(folder, "Annotations", f"{name}.xml")
            return read_voc_annotation(path, classes=self.classes, keep_difficult=self.keep_difficult)
        return _labels_from_mask(Sample(name, "", (), mask), num_classes=self.classes.num_classes)


def voc_folder(root: str) -> str:
    """Return the folder with JPEGImages: `root` itself, VOC2012 or VOCdevkit/VOC2012 in it; else a ValueError."""
    tried = [os.path.join(root, *parts) for parts in ((), ("VOC2012",), ("VOCdevkit", "VOC2012"))]
    for folder in tried:
        if os.path.isdir(os.path.join(folder, "JPEGImages")):
            return folder
    raise ValueError(f"no VOC folder at {root}: looked for JPEGImages in {', '.join(tried)}")


def voc_split(folder: str, split: str) -> list[str]:
    """Return the image names of a list in ImageSets/Segmentation, or in a .txt file. Raises ValueError if it is not there."""
    lists = os.path.join(folder, "ImageSets", "Segmentation")
    path = split if split.endswith(".txt") else os.path.join(lists, f"{split}.txt")
    if not os.path.isfile(path):
        known = [os.path.splitext(name)[0] for name in storage.list_names(lists)] if os.path.isdir(lists) else []
        raise ValueError(f"no split {split!r} ({path}); known: {known}; nearest: {nearest(split, known)!r}")
    lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    # Some published lists have `/JPEGImages/ID.jpg /SegmentationClassAug/ID.png` lines instead of ids.
    return [strip_image_extension(os.path.basename(line.split()[0])) for line in lines if line.strip()]


def _labels_from_mask(sample: Sample, *, num_classes: int) -> Labels:
    try:
        return labels_in_mask(mask_array(sample, num_classes=num_classes))
    except (ValueError, OSError) as error:
        return LabelProblem(str(error))


@dataclass(frozen=True)
class CocoSource:
    """A COCO instances JSON with its image folder.

    Categories become 1..C by their names, which must be those of the class list (COCO's own ids run to 90 with gaps).

    Masks are painted from the annotations: crowd regions first, then objects by descending area (ties by annotation
    id), so that a small object on a large one stays visible.

    Attributes:
        images: folder of `file_name`s.
        annotations: the JSON file.
        classes: the class list, in any order.
        masks: paint ground-truth masks.
        crowd: what an `iscrowd` region is. `class`: painted and labelled like an object, as in the field's VOC-style
            COCO masks; `void`: painted void, no label; `drop`: ignored.
        label_file: text file of `file_stem class class ...` to take instead of the annotations' classes.
        label_kind: how the label file names classes (multi-word names need an index kind).
        keep_unlabelled: keep an image without labels as all-background instead of rejecting it.
    """

    images: str
    annotations: str
    classes: ClassSet
    masks: bool = False
    crowd: Literal["class", "void", "drop"] = "class"
    label_file: str | None = None
    label_kind: LabelKind = "names"
    keep_unlabelled: bool = False

    def __post_init__(self) -> None:
        check_label_kind(self.label_kind)
        if self.crowd not in ("class", "void", "drop"):
            raise ValueError(f"crowd is {self.crowd!r}; allowed: 'class', 'void', 'drop'")

    def __iter__(self) -> Iterator[Sample | Reject]:
        document = read_coco(self.annotations)
        contiguous = contiguous_indices(document["categories"], classes=self.classes, where=self.annotations)
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in document["annotations"]:
            if not (self.crowd == "drop" and annotation.get("iscrowd")):
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        if strangers := by_image.keys() - {image["id"] for image in document["images"]}:
            logger.warning(
                "%s: %d annotations are of image ids that it does not list, such as %s; they are left out",
                self.annotations,
                sum(len(by_image[stranger]) for stranger in strangers),
                sorted(map(str, strangers))[:4],
            )
        table = None
        if self.label_file is not None:
            table = read_label_text(self.label_file, classes=self.classes, kind=self.label_kind)
        on_disk = set(storage.list_names(self.images)) if os.path.isdir(self.images) else set()
        if not on_disk:
            raise ValueError(f"image folder {self.images} is missing or empty")
        for image in sorted(document["images"], key=lambda image: str(image["file_name"])):
            name = str(image["file_name"])
            path = os.path.join(self.images, name)
            key = coco_key(name)
            if os.path.isabs(name) or ".." in name.split("/"):
                yield Reject(key, name, "file_name leaves the image folder")
            elif name not in on_disk and not os.path.isfile(path):
                yield Reject(key, path, f"listed in {self.annotations} but not there")
            else:
                yield self._sample(key, path, image, by_image.get(image["id"], []), contiguous, table)

    def _sample(
        self,
        key: str,
        path: str,
        image: dict[str, Any],
        annotations: list[dict[str, Any]],
        contiguous: dict[int, int],
        table: dict[str, Labels] | None,
    ) -> Sample | Reject:
        unknown = sorted({a["category_id"] for a in annotations} - set(contiguous))
        if unknown:
            return Reject(key, path, f"annotations have category ids {unknown} that the categories do not list")
        present = {contiguous[a["category_id"]] for a in annotations if not (self.crowd == "void" and a.get("iscrowd"))}
        labels: Labels | None = tuple(sorted(present)) or None
        if table is not None:
            labels = table.get(os.path.splitext(os.path.basename(path))[0])
        mask = None
        if self.masks:
            try:
                mask = self._segments(image, annotations, contiguous)
            except (ValueError, TypeError, KeyError) as error:
                return Reject(key, path, f"annotations cannot be painted: {error}")
        return judge(key, path, labels, mask, keep_unlabelled=self.keep_unlabelled)

    def _segments(
        self, image: dict[str, Any], annotations: list[dict[str, Any]], contiguous: dict[int, int]
    ) -> MaskSegments:
        height, width = int(image["height"]), int(image["width"])
        order, void = [], void_label(self.classes.num_classes)
        for annotation in annotations:
            code = _run_lengths(annotation["segmentation"], height, width)
            crowd = bool(annotation.get("iscrowd"))
            value = void if crowd and self.crowd == "void" else contiguous[annotation["category_id"]]
            rank = (not crowd, -int(coco_mask.area(code)), int(annotation["id"]))  # type: ignore[arg-type]
            order.append((rank, Segment(value, code["counts"])))
        return MaskSegments(height, width, tuple(segment for _, segment in sorted(order, key=lambda pair: pair[0])))


def read_coco(annotations: str) -> dict[str, Any]:
    """Read a COCO instances JSON with its lists `images`, `annotations` and `categories`.

    Raises:
        ValueError: no such file, broken JSON, or a list that is missing.
    """
    if not storage.exists(annotations):
        raise ValueError(f"no annotation file {annotations}")
    document = storage.read_json(annotations)
    for part in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(part), list):
            raise ValueError(f"{annotations} is no COCO instances file: it has no list {part!r}")
        for number, entry in enumerate(document[part]):
            _check_entry(entry, _ENTRY_KEYS[part], f"{annotations}, {part}[{number}]")
    return document


_ENTRY_KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,)},
    "annotations": {"image_id": (int, str), "category_id": (int,)},
    "categories": {"id": (int,), "name": (str,)},
}


def _check_entry(entry: Any, keys: dict[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {str(entry)[:80]!r}, not an object")
    for key, kinds in keys.items():
        if not isinstance(entry.get(key), kinds):
            names = " or ".join("text" if kind is str else "a whole number" for kind in kinds)
            raise ValueError(f"{where} has {key} {entry.get(key)!r}; needed is {names}")


def category_names(annotations: str) -> tuple[str, ...]:
    """Return the names of a file's categories by ascending id. Raises ValueError as `read_coco`."""
    return tuple(
        name for _, name in sorted((each["id"], each["name"]) for each in read_coco(annotations)["categories"])
    )


def coco_key(file_name: str) -> str:
    """Return the sample key of a COCO `file_name`."""
    return sample_key(strip_image_extension(file_name))


def contiguous_indices(categories: list[dict[str, Any]], *, classes: ClassSet, where: str) -> dict[int, int]:
    """Map category id -> 1..C by name, whatever the ids are.

    Raises:
        ValueError: names that are not those of the class list, or repeated ids or names.
    """
    ids = [int(category["id"]) for category in categories]
    names = [str(category["name"]) for category in categories]
    for what, entries in (("id", ids), ("name", names)):
        if len(set(entries)) != len(entries):
            raise ValueError(f"{where} lists a category {what} twice")
    if unknown := [name for name in names if name not in classes.names]:
        raise ValueError(
            f"{where} has {len(names)} categories, the class list {classes.num_classes}; category {unknown[0]!r} is not in the"
            f" list (nearest: {nearest(unknown[0], classes.names)!r}); data.classes=auto takes the categories as classes"
        )
    if missing := [name for name in classes.names if name not in names]:
        raise ValueError(
            f"{where} has {len(names)} categories, the class list {classes.num_classes}; no category is called {missing[0]!r}"
            f" (nearest: {nearest(missing[0], names)!r})"
        )
    index = {name: number for number, name in enumerate(classes.names, start=1)}
    return {identity: index[name] for identity, name in zip(ids, names, strict=True)}


def _run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return polygons or run lengths as one compressed run-length code of exactly this size."""
    if isinstance(segmentation, list):
        # pycocotools takes four numbers for a box, and fewer for nonsense.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            raise ValueError("a polygon has fewer than three points")
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))  # type: ignore[arg-type, return-value]
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"run lengths are of size {segmentation['size']}, the image is {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        # The decoder in C trusts its input, so it is checked here.
        if sum(counts) != height * width or min(counts) < 0:
            raise ValueError(f"run lengths sum to {sum(counts)}, the image has {height * width} pixels")
        return coco_mask.frPyObjects(segmentation, height, width)  # type: ignore[arg-type, return-value]
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else bytes(counts)}
