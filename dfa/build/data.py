"""Where images and labels come from."""

from collections.abc import Iterable
from typing import Any

from dfa import config as configuration
from dfa.config import Config
from dfa.data.classes import ClassSet
from dfa.data.folder import FolderSource
from dfa.data.samples import Reject, Sample
from dfa.data.shards import ShardIndex, load_index
from dfa.data.sources import CocoSource, VocSource


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
    """The index of the `train`, `val` or `test` shards.

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
