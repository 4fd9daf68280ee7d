"""Where images and labels come from."""

from collections.abc import Iterable
from typing import Any

from dfa import config as configuration
from dfa.config import Config, to_yaml
from dfa.data import storage
from dfa.data.classes import ClassSet, own_class_set
from dfa.data.folder import FolderSource, folder_names
from dfa.data.labels import table_names
from dfa.data.samples import Reject, Sample
from dfa.data.shards import ShardIndex, load_index
from dfa.data.sources import CocoSource, VocSource, category_names

CLASSES_NAME = "classes.yaml"
"""Where jobs/shard writes the class list that it found in the data, beside the shards."""

_AUTO = "auto"
_LIKE = "classes_coco"  # whose background prompts and templates classes have that are found in the data


def class_set(config: Config) -> ClassSet:
    """The classes of the run's data set; with data.classes=auto those that jobs/shard wrote beside the shards.

    Raises:
        ValueError: a class list that is not there or is none.
    """
    if config.data.classes != _AUTO:
        return configuration.class_set(config.data.classes)
    tried = [root for root in (config.shards.train, config.shards.val) if root]
    for root in tried:
        if storage.exists(address := storage.join(root, CLASSES_NAME)):
            return configuration.class_set(address)
    raise ValueError(
        f"data.classes=auto is the {CLASSES_NAME} that jobs.shard writes beside the shards, and "
        + (f"there is none in {' or '.join(tried)}" if tried else "shards.train and shards.val are empty")
        + "; shard with data.classes=auto too, or give the class list that the shards were made with"
    )


def source_classes(config: Config) -> ClassSet:
    """The classes of the images that data.root names; with data.classes=auto those that the data itself names.

    Of a folder these are its sub-folders, of a table all labels in it, of COCO annotations the categories; each is its own
    prompt, background prompts and templates are those of conf/classes_coco.yaml.

    Raises:
        ValueError: data that does not name its classes.
    """
    data = config.data
    if data.classes != _AUTO:
        return configuration.class_set(data.classes)
    if data.source == "voc":
        raise ValueError("data.classes=auto is for data.source=folder and coco; VOC's classes are classes_voc")
    if data.source == "coco":
        where, names = data.annotations, category_names(_annotations(config))
    elif not data.label_file:
        where, names = _root(config), folder_names(_root(config), masks=data.masks or None)
    else:
        if data.label_kind != "names":
            raise ValueError(
                f"data.classes=auto needs names in {data.label_file}, data.label_kind is {data.label_kind}"
            )
        columns = {"image_column": data.image_column, "label_column": data.label_column}
        where, names = data.label_file, table_names(data.label_file, separator=data.separator, **columns)
    try:
        return own_class_set(names, like=configuration.class_set(_LIKE))
    except ValueError as error:
        raise ValueError(f"the classes that {where} names: {error}") from error


def write_classes(config: Config, classes: ClassSet) -> str | None:
    """With data.classes=auto keep the class list beside the shards of data.output; return its address.

    One that is there and has these names stays: its prompts and background are the user's.

    Raises:
        ValueError: one is there and has other names.
    """
    if config.data.classes != _AUTO:
        return None
    address = storage.join(config.data.output, CLASSES_NAME)
    if storage.exists(address):
        if configuration.class_set(address).names != classes.names:
            raise ValueError(f"{address} lists other classes than the data; delete it, or choose another data.output")
        return address
    text = f"# Edit prompts, background and templates before training; the names stay.\n{to_yaml(classes)}"
    storage.write_atomic(address, lambda file: file.write(text.encode()))
    return address


def _root(config: Config) -> str:
    if not config.data.root:
        raise ValueError("data.root is empty: give the folder of the images")
    return config.data.root


def _annotations(config: Config) -> str:
    if not config.data.annotations:
        raise ValueError("data.annotations is empty: give the instances JSON")
    return config.data.annotations


def source(config: Config) -> Iterable[Sample | Reject]:
    """The reader that data.source names."""
    _root(config)
    data, classes = config.data, source_classes(config)
    common: dict[str, Any] = {"classes": classes, "keep_unlabelled": data.unlabelled == "background"}
    common |= {"label_kind": data.label_kind}
    if data.source == "voc":
        file, masks, labels = data.label_file or None, data.masks or None, data.labels
        return VocSource(data.root, data.split, label_file=file, masks=masks, labels=labels, **common)  # type: ignore[arg-type]
    if data.labels == "masks":
        raise ValueError(f"data.labels=masks is for data.source=voc, not {data.source!r}")
    if data.source == "coco":
        _annotations(config)
        if data.masks not in ("", "annotations"):
            raise ValueError(
                f"data.masks={data.masks!r} with data.source=coco: allowed is annotations, which paints masks from"
                " data.annotations, or nothing; a folder of PNGs goes with data.source=folder"
            )
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
