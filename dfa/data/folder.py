"""Any folder of images with a table of labels, or with one sub-folder per class."""

import contextlib
import functools
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dfa.data.classes import ClassSet, nearest
from dfa.data.labels import (
    NO_LABEL,
    LabelKind,
    LabelProblem,
    Labels,
    check_label_kind,
    read_label_table,
    strip_image_extension,
)
from dfa.data.samples import IMAGE_EXTENSIONS, MaskFile, Reject, Sample, judge, sample_key

#: Pictures by their suffix, of formats that are not read: JPEG and PNG alone are, so that few decoders see foreign files.
_UNREAD_EXTENSIONS = tuple(
    [".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".ppm", ".tif", ".tiff", ".webp"]
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource:
    """Any folder of images with a table of labels, or with one sub-folder per class.

    Attributes:
        root: folder; images are looked for in all sub-folders.
        classes: the class list.
        table: .csv, .tsv or .jsonl file with an image and a label column; None means one sub-folder per class.
        image_column, label_column: names of the table's columns. Images are paths relative to `root`, with or without
            extension.
        separator: between several labels in one cell.
        label_kind: how the table names classes.
        masks: folder (absolute, or inside `root`) of PNG masks with the images' relative stems, or None.
        keep_unlabelled: keep an image without labels as all-background instead of rejecting it.
    """

    root: str
    classes: ClassSet
    table: str | None = None
    image_column: str = "image"
    label_column: str = "labels"
    separator: str = ";"
    label_kind: LabelKind = "names"
    masks: str | None = None
    keep_unlabelled: bool = False

    def __post_init__(self) -> None:
        check_label_kind(self.label_kind)

    def __iter__(self) -> Iterator[Sample | Reject]:
        mask_folder = None if self.masks is None else os.path.join(self.root, self.masks)
        if mask_folder is not None and not os.path.isdir(mask_folder):
            raise ValueError(f"masks={self.masks!r} but there is no folder {mask_folder}")
        names, _ = image_names(self.root, without=mask_folder)
        table = self._table()
        used = set()
        for name in names:
            stem = strip_image_extension(name)
            used |= {name, stem}
            labels = self._folder_labels(name) if table is None else table.get(name, table.get(stem))
            key, path, mask = sample_key(stem), os.path.join(self.root, name), None
            if mask_folder is not None:
                mask = MaskFile(os.path.join(mask_folder, f"{stem}.png"))
                if not os.path.isfile(mask.path):
                    yield Reject(key, path, f"mask {mask.path} is missing")
                    continue
            yield judge(key, path, labels, mask, keep_unlabelled=self.keep_unlabelled)
        for name in sorted(set(table or ()) - used):
            reason = f"listed in {self.table} but not there"
            yield Reject(sample_key(strip_image_extension(name) or "_"), os.path.join(self.root, name), reason)

    def _table(self) -> dict[str, Labels] | None:
        if self.table is None:
            return None
        return read_label_table(
            self.table,
            classes=self.classes,
            kind=self.label_kind,
            image_column=self.image_column,
            label_column=self.label_column,
            separator=self.separator,
        )

    def _folder_labels(self, name: str) -> Labels:
        folder, slash, _ = name.partition("/")
        if slash and folder.casefold() == "background":
            return LabelProblem(
                f"{NO_LABEL} (the folder {folder!r} is no class; data.unlabelled=background keeps its images)"
            )
        if not slash:
            return LabelProblem(f"{NO_LABEL} (no label table, and {name!r} lies in no sub-folder named for a class)")
        with contextlib.suppress(ValueError):
            return (self.classes.index(folder),)
        return LabelProblem(f"unknown class folder {folder!r}; nearest known: {nearest(folder, self.classes.names)!r}")


def folder_names(root: str, *, masks: str | None) -> tuple[str, ...]:
    """Return the names of the sub-folders that hold images, sorted: the classes of a folder without a table.

    Raises:
        ValueError: no image there, or none in a sub-folder.
    """
    names, _ = image_names(root, without=None if masks is None else os.path.join(root, masks))
    found = tuple(sorted({folder for folder, slash, _ in (name.partition("/") for name in names) if slash}))
    if not found:
        raise ValueError(
            f"the {len(names)} images of {root} lie in no sub-folder; put those of a class into a folder of its name, or "
            "give a table of labels (data.label_file)"
        )
    return found


def image_names(root: str, *, without: str | None = None) -> tuple[list[str], dict[str, int]]:
    """List the images in all sub-folders as sorted paths relative to `root`; hidden files and folders are none.

    Args:
        root: folder.
        without: a sub-folder to leave out (masks), or None.

    Returns:
        The paths, and how many pictures of other formats lie there, by suffix: they are not read, and a warning says so.

    Raises:
        ValueError: no such folder, or no image there.
    """
    if not os.path.isdir(root):
        raise ValueError(f"no folder of images {root}")
    skipped = None if without is None else os.path.realpath(without)
    names, unread = [], Counter[str]()
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(folder, f)) != skipped]
        relative = os.path.relpath(folder, root)
        for name in (each for each in files if not each.startswith(".")):
            if name.lower().endswith(IMAGE_EXTENSIONS):
                names.append(os.path.normpath(os.path.join(relative, name)).replace(os.sep, "/"))
            elif (suffix := os.path.splitext(name)[1].lower()) in _UNREAD_EXTENSIONS:
                unread[suffix] += 1
    shown = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
    if not names:
        also = f"; there are {shown}, to be converted" if unread else ""
        raise ValueError(f"no image in {root} (looked for {', '.join(IMAGE_EXTENSIONS)} in all sub-folders{also})")
    if unread:
        _tell_unread(root, shown)
    return sorted(names), dict(sorted(unread.items()))


@functools.cache
def _tell_unread(root: str, shown: str) -> None:
    """Once: classes are looked for before images are."""
    logger.warning("%s: JPEG and PNG are read; left out are %s, convert them", root, shown)
