"""What is fine, missing or wrong in a PASCAL VOC or COCO folder, and where the official parts come from.

Nothing is written. Lists, names and annotations are looked at in full, pixels of a sample spread over each split.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dfa.data import storage
from dfa.data.classes import ClassSet
from dfa.data.labels import read_label_text
from dfa.data.samples import IMAGE_EXTENSIONS
from dfa.data.sources import contiguous_indices, images_by_stem, read_coco, voc_folder, voc_split
from dfa.data.transforms import decode_mask, decode_rgb

VOC_SOURCE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (VOCtrainval_11-May-2012.tar)"
SBD_SOURCE = "http://home.bharathh.info/pubs/codes/SBD/download.html (SBD, whose masks extend VOC's to 10 582 images)"
COCO_SOURCE = "https://cocodataset.org/#download (2014 Train/Val images and annotations)"
_VOC_SIZES = {"train": 1_464, "val": 1_449, "train_aug": 10_582}
_COCO_SIZES = {"train2014": 82_783, "val2014": 40_504}
_MAX_PIXELS = 200_000_000
_EXAMPLES = 3
_NO_LABELS = (
    "no Annotations/*.xml, from which image-level labels come, and no file *labels.txt (lines of `id class class ...`) there or in "
    "the folder that was given"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    state: `fine`; `missing`, `wrong`; or `note`: what a weakly supervised run can do without. source: where the official
    part comes from, "" where nothing is to be fetched. needed: False for what no command reads.
    """

    state: Literal["fine", "note", "missing", "wrong"]
    what: str
    source: str = ""
    needed: bool = True


@dataclass(frozen=True)
class Inspection:
    """kind: which data set. commands: arguments of jobs.shard for the splits that can be sharded."""

    kind: Literal["voc", "coco"]
    findings: tuple[Finding, ...]
    commands: tuple[tuple[str, ...], ...]

    @property
    def num_problems(self) -> int:
        """Findings that are missing or wrong, and needed."""
        return sum(finding.needed and finding.state in ("missing", "wrong") for finding in self.findings)


def inspect(root: str, *, voc: ClassSet, coco: ClassSet, num_sampled: int) -> Inspection:
    """Look at a folder that is a VOC devkit or holds COCO.

    Args:
        root: the folder, or for VOC one of its two parents.
        voc, coco: their class lists.
        num_sampled: images of each split that are decoded.

    Raises:
        ValueError: no such folder, or neither of the two.
    """
    if not os.path.isdir(root):
        raise ValueError(f"no folder {root}")
    annotations = _coco_annotations(root)
    if annotations or any(_coco_images(root, split) for split in _COCO_SIZES):
        return _inspect_coco(root, annotations, coco, num_sampled)
    try:
        folder = voc_folder(root)
    except ValueError as error:
        held = ", ".join(storage.list_names(root)[:6]) or "nothing"
        raise ValueError(
            f"{root} is neither VOC nor COCO: there is no JPEGImages in it, in VOC2012 or VOCdevkit/VOC2012, and no "
            f"annotations/instances_*.json; it holds {held}. Your own images need no check: python -m jobs.shard own "
            "data.root=FOLDER"
        ) from error
    return _inspect_voc(root, folder, voc, num_sampled)


def _inspect_voc(root: str, folder: str, classes: ClassSet, num_sampled: int) -> Inspection:
    images = images_by_stem(os.path.join(folder, "JPEGImages"))
    findings = [
        Finding("fine" if images else "missing", f"JPEGImages: {len(images)} images", VOC_SOURCE if not images else "")
    ]
    label_file, commands = _label_file(root, folder), []
    if label_file is None:
        findings.append(Finding("missing", _NO_LABELS, VOC_SOURCE))
    for split in ("train_aug", "train", "val"):
        try:
            names = voc_split(folder, split)
        except ValueError:
            findings.append(_without_list(split))
            continue
        source = SBD_SOURCE if split == "train_aug" else VOC_SOURCE
        findings.append(_listed(f"split {split}", names, images, _VOC_SIZES[split], source))
        if label_file is not None:
            findings.append(_voc_labels(folder, label_file, split, names, classes))
        findings += _decoded(f"split {split}", [images[name] for name in _spread(names, num_sampled) if name in images])
        masks, found = _voc_masks(folder, split, names, images, classes, num_sampled)
        findings += found
        if label_file is not None:
            given = [f"data.label_file={label_file}"] if label_file else []
            given += [f"data.masks={masks}"] if masks else []
            commands.append(
                ("voc_dfa", f"data.root={folder}", f"data.split={split}", *given, f"data.output=shards/voc_{split}")
            )
    return Inspection("voc", tuple(findings), tuple(commands))


def _without_list(split: str) -> Finding:
    if split == "train_aug":
        return Finding(
            "note",
            "no list ImageSets/Segmentation/train_aug.txt: only VOC's own 1 464 train images; conf/voc_dfa.yaml makes it of VOC's"
            " and SBD's lists",
            SBD_SOURCE,
        )
    return Finding("missing", f"no list ImageSets/Segmentation/{split}.txt", VOC_SOURCE)


def _label_file(root: str, folder: str) -> str | None:
    """The label file to give ("" for the annotations), None if there is neither."""
    if os.path.isdir(os.path.join(folder, "Annotations")):
        return ""
    found = (os.path.join(place, name) for place in (folder, root) for name in storage.list_names(place))
    return next((path for path in found if path.endswith("labels.txt")), None)


def _voc_labels(folder: str, label_file: str, split: str, names: Sequence[str], classes: ClassSet) -> Finding:
    if label_file:
        try:
            known: Collection[str] = read_label_text(label_file, classes=classes, kind="names")
        except ValueError as error:
            return Finding("wrong", f"label file {error}")
        where = os.path.basename(label_file)
    else:
        known = {name.removesuffix(".xml") for name in storage.list_names(os.path.join(folder, "Annotations"))}
        where = "Annotations"
    missing = [name for name in names if name not in known]
    if missing:
        what = f"split {split}: {len(missing)} of {len(names)} images have no labels in {where} ({_some(missing)})"
        return Finding("missing", what, VOC_SOURCE)
    return Finding("fine", f"split {split}: image-level labels in {where}")


def _voc_masks(
    folder: str, split: str, names: Sequence[str], images: dict[str, str], classes: ClassSet, num_sampled: int
) -> tuple[str, list[Finding]]:
    """The mask folder that holds a whole split, "" for none; masks are needed for scoring, and so for val."""
    weak = split != "val"
    state: Literal["note", "missing"] = "note" if weak else "missing"
    why = "needed to score seeds and masks on it, not to train" if weak else "needed to score"
    found, best = [], ("", len(names))
    for name in ("SegmentationClass", "SegmentationClassAug"):
        there = set(storage.list_names(place)) if os.path.isdir(place := os.path.join(folder, name)) else set()
        missing = [each for each in names if f"{each}.png" not in there]
        if len(missing) < best[1]:
            best = (name, len(missing))
    source = SBD_SOURCE if split == "train_aug" else VOC_SOURCE
    if not best[0]:
        wanted = "SegmentationClassAug" if split == "train_aug" else "SegmentationClass"
        return "", [Finding(state, f"split {split}: no masks in {wanted}, {why}", source)]
    there = set(storage.list_names(os.path.join(folder, best[0])))
    if best[1]:
        missing = [name for name in names if f"{name}.png" not in there]
        what = f"split {split}: {len(missing)} of {len(names)} masks are not in {best[0]} ({_some(missing)}), {why}"
        found.append(Finding(state, what, source))
    sampled = [name for name in _spread(names, num_sampled) if f"{name}.png" in there]
    paths = {name: os.path.join(folder, best[0], f"{name}.png") for name in sampled}
    reasons = Counter(
        filter(None, (_mask_problem(path, images.get(name), classes.num_classes) for name, path in paths.items()))
    )
    found += [
        Finding("wrong", f"{best[0]}: {number} of {len(paths)} masks looked at: {reason}", source)
        for reason, number in reasons.items()
    ]
    if not found:
        found.append(Finding("fine", f"split {split}: masks in {best[0]}, {len(paths)} looked at"))
    return (best[0] if not best[1] and not reasons else ""), found


def _mask_problem(path: str, image: str | None, num_classes: int) -> str | None:
    """What is wrong with a mask of 8-bit class indices, None if nothing is."""
    try:
        mask_HW = decode_mask(storage.read_bytes(path), max_pixels=_MAX_PIXELS)
    except (ValueError, OSError) as error:
        return str(error)
    values = {int(value) for value in np.unique(mask_HW)} - {255}
    if values and max(values) > num_classes:
        return f"values above {num_classes}, such as {max(values)}; allowed are 0..{num_classes} and 255"
    if image is not None:
        try:
            shape = decode_rgb(storage.read_bytes(image), max_pixels=_MAX_PIXELS).shape[:2]
        except (ValueError, OSError):
            return None  # said of the image itself
        if shape != mask_HW.shape:
            return "another size than its image"
    return None


def _coco_annotations(root: str) -> dict[str, str]:
    """Split -> annotation file."""
    found = {}
    for place in (root, os.path.join(root, "annotations")):
        for name in storage.list_names(place) if os.path.isdir(place) else ():
            if name.startswith("instances_") and name.endswith(".json"):
                found[name.removeprefix("instances_").removesuffix(".json")] = os.path.join(place, name)
    return dict(sorted(found.items()))


def _coco_images(root: str, split: str) -> str:
    """The folder of a split's images, "" where there is none."""
    places = (os.path.join(root, split), os.path.join(root, "images", split))
    return next((place for place in places if os.path.isdir(place)), "")


def _inspect_coco(root: str, annotations: dict[str, str], classes: ClassSet, num_sampled: int) -> Inspection:
    findings, commands = list[Finding](), []
    for split in ("train2014", "val2014"):
        if split not in annotations:
            findings.append(Finding("missing", f"no annotations/instances_{split}.json", COCO_SOURCE))
    for split, file in annotations.items():
        try:
            document = read_coco(file)
            ids = contiguous_indices(document["categories"], classes=classes, where=os.path.basename(file))
        except ValueError as error:
            findings.append(Finding("wrong", str(error), COCO_SOURCE))
            continue
        if not (place := _coco_images(root, split)):
            findings.append(Finding("missing", f"no folder of images {split}", COCO_SOURCE))
            continue
        images = {str(entry["file_name"]): entry for entry in document["images"]}
        there = {name: os.path.join(place, name) for name in storage.list_names(place)}
        findings.append(_listed(f"images {split}", list(images), there, _COCO_SIZES.get(split, 0), COCO_SOURCE))
        sampled = [name for name in _spread(sorted(images), num_sampled) if name in there]
        findings += _decoded(f"images {split}", [there[name] for name in sampled])
        findings += _coco_masks(root, split, document, ids, num_sampled)
        short = split.removesuffix("2014")
        masks = [] if short == "train" else ["data.masks=annotations"]
        given = (f"data.root={place}", f"data.annotations={file}", *masks, f"data.output=shards/coco_{short}")
        commands.append(("coco_dfa", *given))
    return Inspection("coco", tuple(findings), tuple(commands))


def _coco_masks(
    root: str, split: str, document: dict[str, Any], ids: dict[int, int], num_sampled: int
) -> list[Finding]:
    """Mask PNGs that lie beside the images are not needed; those that mislead other tools are told of."""
    stems = {os.path.splitext(str(entry["file_name"]))[0]: entry["id"] for entry in document["images"]}
    present: dict[Any, set[int]] = {}
    for annotation in document["annotations"]:
        present.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
    found = []
    for place in _folders(root):
        names = [name for name in storage.list_names(place) if name.endswith(".png") and name[:-4] in stems]
        reasons = Counter[str]()
        sampled = _spread(sorted(names), num_sampled)
        for name in sampled:
            categories = present.get(stems[name[:-4]], set()) & ids.keys()
            if reason := _coco_mask_problem(os.path.join(place, name), categories, ids):
                reasons[reason] += 1
        shown = os.path.relpath(place, root)
        hint = "not needed: data.masks=annotations paints them"
        found += [
            Finding(
                "wrong",
                f"{shown}: {number} of {len(sampled)} masks of {split} looked at: {reason}; {hint}",
                needed=False,
            )
            for reason, number in reasons.items()
        ]
        if names and not reasons:
            found.append(Finding("fine", f"{shown}: {len(names)} masks of {split}; {hint}"))
    return found


def _folders(root: str) -> list[str]:
    """The folders of a root, two levels deep, links and hidden ones left out."""
    found = []
    for folder, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.append(folder)
        if os.path.relpath(folder, root).count(os.sep) >= 1:
            folders.clear()
    return found


def _coco_mask_problem(path: str, categories: set[int], ids: dict[int, int]) -> str | None:
    try:
        mask_HW = decode_mask(storage.read_bytes(path), max_pixels=_MAX_PIXELS)
    except (ValueError, OSError) as error:
        return str(error)
    values = {int(value) for value in np.unique(mask_HW)} - {0, 255}
    if values <= {ids[category] for category in categories}:
        return None
    if values <= categories:
        return f"COCO's original ids up to 90 instead of 1..{len(ids)} by ascending id"
    return (
        f"classes that the annotations of the image do not name, such as {max(values)} (COCO-Stuff, or another order)"
    )


def _listed(what: str, names: Sequence[str], there: Collection[str], official: int, source: str) -> Finding:
    missing = [name for name in names if name not in there]
    if missing:
        return Finding(
            "wrong", f"{what}: {len(missing)} of {len(names)} listed images are not there ({_some(missing)})", source
        )
    if len(names) < official:
        return Finding("note", f"{what}: {len(names)} images, the official one has {official}", source)
    return Finding("fine", f"{what}: {len(names)} images")


def _decoded(what: str, paths: Sequence[str]) -> list[Finding]:
    """Images that do not decode, from a sample."""
    bad = []
    for path in paths:
        if not path.lower().endswith(IMAGE_EXTENSIONS):
            continue
        try:
            decode_rgb(storage.read_bytes(path), max_pixels=_MAX_PIXELS)
        except (ValueError, OSError) as error:
            bad.append(f"{os.path.basename(path)}: {error}")
    if not bad:
        return [Finding("fine", f"{what}: {len(paths)} images decode")] if paths else []
    return [
        Finding(
            "wrong",
            f"{what}: {len(bad)} of {len(paths)} images looked at do not decode ({_some(bad)}); fetch them again",
        )
    ]


def _spread(names: Sequence[str], number: int) -> list[str]:
    """So many of them, from the first to the last."""
    if len(names) <= number:
        return list(names)
    return [names[round(float(place))] for place in np.linspace(0, len(names) - 1, number)]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
