"""Sources -> the plan of a shard set: which sample goes into which shard, and whose the folder is."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dfa.data import storage
from dfa.data.samples import Reject, Sample, sample_key, summarize_rejects
from dfa.data.shards import FORMAT_VERSION
from dfa.data.storage import write_json

PLAN_KIND = "dfa-shard-plan"
PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class PlanItem:
    """All that one task needs to write one shard."""

    shard: str
    samples: tuple[Sample, ...]
    class_names: tuple[str, ...]
    max_pixels: int
    apply_exif: bool
    hash: str


@dataclass(frozen=True)
class ShardPlan:
    """Which sample goes into which shard, and what was rejected before any image was opened."""

    items: tuple[PlanItem, ...]
    rejects: tuple[Reject, ...]
    class_names: tuple[str, ...]
    seed: int
    shuffle: bool
    samples_per_shard: int
    max_pixels: int
    apply_exif: bool
    hash: str

    @property
    def num_samples(self) -> int:
        """Samples in all items."""
        return sum(len(item.samples) for item in self.items)

    def summary(self) -> dict[str, Any]:
        """Return what plan.json holds."""
        return {
            "kind": PLAN_KIND,
            "format": FORMAT_VERSION,
            "hash": self.hash,
            "num_samples": self.num_samples,
            "num_shards": len(self.items),
            "samples_per_shard": self.samples_per_shard,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_pixels": self.max_pixels,
            "apply_exif": self.apply_exif,
            "class_names": list(self.class_names),
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    raise TypeError(f"cannot hash a {type(value).__name__}")


def plan_shards(
    samples: Iterable[Sample | Reject],
    *,
    class_names: tuple[str, ...],
    seed: int,
    shuffle: bool,
    samples_per_shard: int,
    max_pixels: int,
    apply_exif: bool = False,
) -> ShardPlan:
    """Assign samples to shards of nearly equal size, at most `samples_per_shard` each.

    With `apply_exif` pictures that carry an EXIF orientation are stored as viewers show them, which is what their masks must fit.

    With `shuffle` the order is that of a hash of (seed, key): it does not depend on the order in which samples came,
    and any run of rows within a shard is a random sample of the whole set. Without it the source's order is kept.

    Raises:
        ValueError: no usable sample, two samples with one key, a key that is not clean.
    """
    if min(samples_per_shard, max_pixels) < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} and max_pixels={max_pixels} must be at least 1")
    kept: dict[str, Sample] = {}
    rejects = []
    for sample in samples:
        if isinstance(sample, Reject):
            rejects.append(sample)
        elif sample.key in kept:
            raise ValueError(f"two images have the key {sample.key!r}: {kept[sample.key].image} and {sample.image}")
        elif sample.key != sample_key(sample.key):
            raise ValueError(f"key {sample.key!r} of {sample.image} is not clean; make it with sample_key")
        else:
            kept[sample.key] = sample
    if not kept:
        raise ValueError(f"no usable sample; {len(rejects)} rejected: {summarize_rejects(rejects)}")
    order = list(kept.values())
    if shuffle:
        order.sort(key=lambda s: (hashlib.blake2b(f"{seed}:{s.key}".encode(), digest_size=16).digest(), s.key))
    each = {"class_names": class_names, "max_pixels": max_pixels, "apply_exif": apply_exif}
    items = tuple(_items(order, samples_per_shard, **each))
    settings = [FORMAT_VERSION, seed, shuffle, samples_per_shard, max_pixels, list(class_names), *_if_so(apply_exif)]
    plan_hash = _digest([settings, [item.hash for item in items]])
    return ShardPlan(
        items, tuple(rejects), class_names, seed, shuffle, samples_per_shard, max_pixels, apply_exif, plan_hash
    )


def _if_so(apply_exif: bool) -> list[str]:
    """What a hash takes in: nothing where the pictures are as stored, so that shards from before the setting stay valid."""
    return ["apply_exif"] if apply_exif else []


def _items(
    order: list[Sample], samples_per_shard: int, *, class_names: tuple[str, ...], max_pixels: int, apply_exif: bool
) -> Iterator[PlanItem]:
    num_shards = -(-len(order) // samples_per_shard)
    for number in range(num_shards):
        first, last = (len(order) * n // num_shards for n in (number, number + 1))
        shard, part = f"shard-{number:06d}.tar", tuple(order[first:last])
        content = [
            FORMAT_VERSION,
            shard,
            list(class_names),
            max_pixels,
            [asdict(sample) for sample in part],
            *_if_so(apply_exif),
        ]
        yield PlanItem(shard, part, class_names, max_pixels, apply_exif, _digest(content))


def write_plan(root: str, plan: ShardPlan) -> None:
    """Claim the folder `root` for this plan.

    Raises:
        ValueError: the folder holds something else, or shards of another plan.
    """
    storage.make_folder(root)
    address = storage.join(root, PLAN_NAME)
    if storage.exists(address):
        _check_same_plan(address, plan.summary())
        return
    found = [name for name in storage.list_names(root) if not name.endswith(storage.PARTIAL_SUFFIX)]
    if found:
        raise ValueError(
            f"{root} is not empty and holds no dfa shards ({len(found)} entries: {', '.join(found[:4])}, ...); "
            "choose an empty or a new folder"
        )
    write_json(address, plan.summary())


def _check_same_plan(address: str, wanted: dict[str, Any]) -> None:
    found = storage.read_json(address)
    if not isinstance(found, dict) or found.get("kind") != PLAN_KIND:
        raise ValueError(f"{address} is no plan of dfa shards; choose an empty or a new folder")
    if found.get("hash") == wanted["hash"]:
        return
    names = [name for name in wanted if name != "hash" and found.get(name) != wanted[name]]
    different = [f"{name} was {found.get(name)!r}, is {wanted[name]!r}" for name in names]
    raise ValueError(
        f"{address} belongs to another configuration ({'; '.join(different) or 'other paths, labels or masks'}); "
        "choose another folder, or delete this one to shard anew"
    )
