"""Pseudo-labels on disk as training reads them (the offline `Y`).

`shards.labels` names one of two things:

    a folder of labels       index.json of kind "dfa-labels" beside label shards with the names of the image shards
    a folder of generations  current.json {"kind": "dfa-label-generations", "folder": "step-00000080-1f3a90c2"}: the
                             folder of labels to read now, null before the first is finished; labelling replaces the
                             file whenever a generation is finished, and deletes old ones

Neither torch nor Ray is imported here: read tasks load this module.
"""

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dfa.data import storage
from dfa.data.shards import FORMAT_VERSION, INDEX_NAME, ShardIndex, read_shard

LABELS_KIND = "dfa-labels"
GENERATIONS_KIND = "dfa-label-generations"
CURRENT_NAME = "current.json"

_PLAN_NAME = "plan.json"  # of a folder that labelling has begun
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-]+")


def resolve(root: str) -> str | None:
    """The folder of labels to read now; None where a follower has begun and no generation is finished yet.

    Raises:
        ValueError: nothing that labels are or will be in, labels whose job was not finished, or a broken current.json.
    """
    if storage.exists(storage.join(root, INDEX_NAME)):
        return root
    if storage.exists(storage.join(root, CURRENT_NAME)):
        name = current_generation(root)
        return None if name is None else storage.join(root, name)
    if storage.exists(storage.join(root, _PLAN_NAME)):
        raise ValueError(
            f"{root} has a {_PLAN_NAME} and no {INDEX_NAME}: it is no finished folder of labels; run jobs/pseudo_label again"
        )
    raise ValueError(
        f"{root} {'holds' if storage.exists(root) else 'is not there: it has'} neither finished labels ({INDEX_NAME}) nor"
        f" the {CURRENT_NAME} of a follower; give the folder that jobs/pseudo_label wrote, or start jobs/pseudo_label"
        " label.follow=true before the training that reads its labels"
    )


def begin_generations(root: str) -> str | None:
    """Declare `root` a folder of generations, so that training may wait for the first; return the current one's name.

    Raises:
        ValueError: the folder holds labels itself, or cannot be written.
    """
    if storage.exists(storage.join(root, INDEX_NAME)) or storage.exists(storage.join(root, _PLAN_NAME)):
        raise ValueError(f"{root} is a folder of labels; those of a follower need a folder of their own: label.output")
    if storage.exists(storage.join(root, CURRENT_NAME)):
        return current_generation(root)
    try:
        storage.make_folder(root)
        set_current(root, None)
    except OSError as error:
        raise ValueError(f"labels cannot be written to {root}: {error}") from error
    return None


def set_current(root: str, name: str | None) -> None:
    """Let training read the generation ROOT/NAME from now on."""
    storage.write_json(storage.join(root, CURRENT_NAME), {"kind": GENERATIONS_KIND, "folder": name})


def current_generation(root: str) -> str | None:
    """The name of the generation that is current, None before the first: a folder inside `root`, whatever the file says.

    Raises:
        ValueError: no current.json of a follower.
    """
    current = storage.join(root, CURRENT_NAME)
    document = storage.read_json(current)
    if not isinstance(document, dict) or document.get("kind") != GENERATIONS_KIND:
        raise ValueError(f"{current} is not of kind {GENERATIONS_KIND!r}")
    name = document.get("folder", "")
    if name is not None and (not isinstance(name, str) or not _FOLDER_NAME.fullmatch(name)):
        raise ValueError(f"{current} names the folder {name!r}; allowed are letters, digits, _ and -")
    return name


def read_masks(folder: str, shard: str, keys: Collection[str]) -> dict[str, bytes]:
    """Key -> PNG bytes of the masks of one shard. Keys that labelling rejected are absent.

    Raises:
        ValueError: the label shard is missing; BrokenShardError where it cannot be read.
    """
    address = storage.join(folder, shard)
    try:
        return {raw.key: raw.image for raw in read_shard(address) if raw.key in keys}
    except FileNotFoundError as error:
        raise ValueError(f"label shard {address} is missing; label again, or leave shards.labels empty") from error


def check_labels(folder: str, index: ShardIndex) -> None:
    """Compare a finished folder of labels with the image shards that they shall label.

    Raises:
        ValueError: other classes, another sharding, other bytes in a shard, or shards without labels.
    """
    document = _index(folder)
    _check_origin(document, folder, class_names=index.class_names, plan_hash=index.plan_hash)
    labelled = {shard["name"]: shard["image_sha256"] for shard in document["shards"]}
    if missing := [shard.name for shard in index.shards if shard.name not in labelled]:
        raise ValueError(
            f"{folder} has no labels of {len(missing)} of the {len(index.shards)} shards of {index.root}:"
            f" {missing[:5]}; label all of them"
        )
    if changed := [shard.name for shard in index.shards if labelled[shard.name] != shard.sha256]:
        raise ValueError(
            f"{folder} labels other images than {index.root} holds: the sha256 of {changed[:5]} differ; label again"
        )


@dataclass(frozen=True)
class OfflineLabels:
    """Where one set of image shards has its labels. Small, because every read task carries one.

    class_names, plan_hash: of the image shards; every generation is held against them.
    """

    root: str
    class_names: tuple[str, ...]
    plan_hash: str

    def masks(self, shard: str, keys: Collection[str]) -> dict[str, bytes]:
        """Key -> PNG bytes from the newest finished labels; nothing where there are none yet.

        A generation may be deleted while it is read, since a newer one is there then: that one is read instead.

        Raises:
            ValueError: see `resolve`, `read_masks` and `check_labels`.
        """
        folder = resolve(self.root)
        if folder is None:
            return {}
        try:
            return self._masks(folder, shard, keys)
        except (ValueError, FileNotFoundError):
            newer = resolve(self.root)
            if newer is None or newer == folder:
                raise
            return self._masks(newer, shard, keys)

    def _masks(self, folder: str, shard: str, keys: Collection[str]) -> dict[str, bytes]:
        _check_origin(_index(folder), folder, class_names=self.class_names, plan_hash=self.plan_hash)
        return read_masks(folder, shard, keys)


def _index(folder: str) -> dict[str, Any]:
    address = storage.join(folder, INDEX_NAME)
    if not storage.exists(address):
        raise ValueError(f"{folder} has no {INDEX_NAME}, it is no finished folder of labels")
    document = storage.read_json(address)
    if not isinstance(document, dict) or document.get("kind") != LABELS_KIND:
        kind = document.get("kind") if isinstance(document, dict) else None
        raise ValueError(
            f"{address} is of kind {kind!r}, not {LABELS_KIND!r}: give a folder that jobs/pseudo_label wrote"
        )
    if document.get("format") != FORMAT_VERSION:
        raise ValueError(f"{address} has format {document.get('format')}; this version reads format {FORMAT_VERSION}")
    return document


def _check_origin(document: dict[str, Any], folder: str, *, class_names: tuple[str, ...], plan_hash: str) -> None:
    found = tuple(document["class_names"])
    if found != class_names:
        pairs = itertools.zip_longest(found, class_names)
        first, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        raise ValueError(
            f"{folder} labels {len(found)} classes, the image shards hold {len(class_names)}, and they differ:"
            f" class {first} is {theirs!r} in the labels and {ours!r} in the shards; give the labels of this data set"
        )
    if document["image_plan_hash"] != plan_hash:
        raise ValueError(
            f"{folder} was made for another sharding (plan {document['image_plan_hash'][:12]}) than the image shards"
            f" (plan {plan_hash[:12]}); run jobs/pseudo_label on these shards"
        )
