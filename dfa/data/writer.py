"""Sources -> WebDataset shards: plan once, write each shard as an independent task, finish with the index.

    plan = plan_shards(source, class_names=..., seed=0, shuffle=True, samples_per_shard=512, max_pixels=...)
    write_plan(root, plan)                       # refuses a foreign or differently planned folder
    for item in pending(root, plan):             # in any process, in any order, as often as one likes
        write_shard(root, item)
    index = finish(root, plan, max_reject_share=0.01)

A shard is a pure function of its plan item and of the files that it names: the same bytes at every attempt. Its commit
marker is written after it, so that a restart repeats exactly what was not committed.
"""

import hashlib
import io
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from dfa.data import storage
from dfa.data.classes import voc_palette
from dfa.data.samples import MaskFile, Reject, Sample, sample_key
from dfa.data.shards import (
    FORMAT_VERSION,
    INDEX_KIND,
    INDEX_NAME,
    LABEL_EXTENSION,
    MASK_EXTENSION,
    REJECTS_NAME,
    SAMPLES_NAME,
    SAMPLES_SCHEMA,
    SampleRow,
    ShardIndex,
    load_index,
    sha256_of,
)
from dfa.data.sources import mask_array
from dfa.data.storage import write_json
from dfa.data.transforms import decode_rgb, encode_mask, header, image_extension, upright

PLAN_KIND = "dfa-shard-plan"
PLAN_NAME = "plan.json"

logger = logging.getLogger(__name__)

_ROW_GROUP = 65536  # of samples.parquet
_NAMES_AND_NUMBERS = re.compile(r"'[^']*'|\S*/\S*|\d+")


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


@dataclass(frozen=True)
class ShardReport:
    """What a commit marker says about its shard; `samples` in row order."""

    shard: str
    num_samples: int
    size_bytes: int
    sha256: str
    class_histogram: tuple[int, ...]
    samples: tuple[SampleRow, ...]
    rejects: tuple[Reject, ...]
    config_hash: str


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


def marker_address(root: str, shard: str) -> str:
    """Return the address of a shard's commit marker."""
    return storage.join(root, shard.removesuffix(".tar") + ".json")


def _committed(root: str, item: PlanItem) -> ShardReport | None:
    """Return the report of a shard that is whole on disk and was written for this very item."""
    marker, address = marker_address(root, item.shard), storage.join(root, item.shard)
    if not storage.exists(marker) or not storage.exists(address):
        return None
    try:
        document = storage.read_json(marker)
    except storage.StoreError:
        raise  # what cannot be asked is not therefore unwritten
    except ValueError:
        return None
    if document.get("config_hash") != item.hash or document.get("size_bytes") != storage.size_bytes(address):
        return None
    rows = [
        SampleRow(key, item.shard, row, tuple(labels), width, height, has_mask)
        for row, (key, labels, width, height, has_mask) in enumerate(document.pop("samples"))
    ]
    rejects = tuple(Reject(**reject) for reject in document.pop("rejects"))
    histogram = tuple(document.pop("class_histogram"))
    return ShardReport(**document, class_histogram=histogram, samples=tuple(rows), rejects=rejects)


def pending(root: str, plan: ShardPlan) -> tuple[PlanItem, ...]:
    """Return the items that have no valid commit marker yet."""
    return tuple(item for item in plan.items if _committed(root, item) is None)


def write_shard(root: str, item: PlanItem) -> ShardReport:
    """Write one shard and then its commit marker, each under a temporary name first.

    An image that does not decode, is too large, or does not fit its mask is left out and reported.
    """
    address = storage.join(root, item.shard)
    rows, rejects = [], []
    storage.write_atomic(address, lambda file: _write_tar(file, item, rows, rejects))
    counts = Counter(label for row in rows for label in row.labels)
    report = ShardReport(
        shard=item.shard,
        num_samples=len(rows),
        size_bytes=storage.size_bytes(address),
        sha256=sha256_of(address),
        class_histogram=tuple(counts[label] for label in range(1, len(item.class_names) + 1)),
        samples=tuple(rows),
        rejects=tuple(rejects),
        config_hash=item.hash,
    )
    document = asdict(report)
    document["samples"] = [[row.key, row.labels, row.width, row.height, row.has_mask] for row in rows]
    write_json(marker_address(root, item.shard), document)
    return report


def _write_tar(file: BinaryIO, item: PlanItem, rows: list[SampleRow], rejects: list[Reject]) -> None:
    num_turned = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in item.samples:
            try:
                members, row, turned = _pack(sample, item, len(rows))
            except (ValueError, OSError) as error:
                rejects.append(Reject(sample.key, sample.image, str(error)))
                continue
            rows.append(row)
            num_turned += turned
            for extension, data in members:
                add_member(tar, f"{sample.key}.{extension}", data)
    if num_turned:
        logger.warning(
            "%s: %d images carry an EXIF orientation; their pixels are used %s",
            item.shard,
            num_turned,
            "as viewers turn them" if item.apply_exif else "as stored (data.apply_exif=true: as viewers turn them)",
        )


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append one file with fixed owner, mode and time (TarInfo's defaults): the same bytes at every attempt."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _pack(sample: Sample, item: PlanItem, row: int) -> tuple[list[tuple[str, bytes]], SampleRow, bool]:
    """Check one sample completely; return its members, its row and whether a viewer would turn it.

    Raises:
        ValueError, OSError: why it is rejected.
    """
    stored = storage.read_bytes(sample.image)
    data = upright(stored, max_pixels=item.max_pixels) if item.apply_exif else stored
    height, width = decode_rgb(data, max_pixels=item.max_pixels).shape[:2]
    if any(not 1 <= label <= len(item.class_names) for label in sample.labels):
        raise ValueError(f"labels {sample.labels} are outside 1..{len(item.class_names)}")
    label = {
        "height": height,
        "key": sample.key,
        "labels": list(sample.labels),
        "names": [item.class_names[index - 1] for index in sample.labels],
        "width": width,
    }
    members = [
        (image_extension(data), data),
        (LABEL_EXTENSION, json.dumps(label, sort_keys=True, separators=(",", ":")).encode()),
    ]
    if sample.mask is not None:
        members.append((MASK_EXTENSION, _mask_bytes(sample, item, height, width)))
    index_row = SampleRow(sample.key, item.shard, row, sample.labels, width, height, sample.mask is not None)
    return members, index_row, header(io.BytesIO(stored), max_pixels=item.max_pixels)[2]


def _mask_bytes(sample: Sample, item: PlanItem, height: int, width: int) -> bytes:
    """Return a checked mask: the original bytes of a file, a palette PNG of painted annotations."""
    mask = mask_array(sample, num_classes=len(item.class_names))
    if mask.shape != (height, width):
        raise ValueError(
            f"mask is {mask.shape[1]} x {mask.shape[0]}, image is {width} x {height} (width x height); "
            f"pixels count as {'viewers show them' if item.apply_exif else 'stored, EXIF orientation is not applied'} (data.apply_exif)"
        )
    if isinstance(sample.mask, MaskFile):
        return storage.read_bytes(sample.mask.path)
    return encode_mask(mask, voc_palette())


def summarize_rejects(rejects: Iterable[Reject], *, num_shown: int = 4) -> str:
    """Return one reject of each of the first few kinds of reasons, and how many are like it, for a message.

    Reasons are of one kind that differ in names and numbers alone.
    """
    kinds: dict[str, list[Reject]] = {}
    for reject in rejects:
        kinds.setdefault(_NAMES_AND_NUMBERS.sub("", reject.reason), []).append(reject)
    told = [
        f"{first.key}: {first.reason}" + (f" (and {len(others)} like it)" if others else "")
        for first, *others in list(kinds.values())[:num_shown]
    ]
    return "; ".join(told + ([f"and {len(kinds) - num_shown} more kinds"] if len(kinds) > num_shown else []))


def finish(root: str, plan: ShardPlan, *, max_reject_share: float) -> ShardIndex:
    """Write samples.parquet, rejects.jsonl and, last, index.json, from the commit markers alone.

    Args:
        root: folder of the plan.
        plan: the plan that was written.
        max_reject_share: largest share of rejected images that is still a success. Not part of the plan: a second run
            with another share repeats no shard.

    Raises:
        ValueError: shards are missing, or too many rejects. In the latter case everything but the index is on disk.
    """
    reports: list[ShardReport] = []
    storage.write_atomic(
        storage.join(root, SAMPLES_NAME), lambda file: reports.extend(_write_samples(file, root, plan))
    )
    rejects = [*plan.rejects, *(reject for report in reports for reject in report.rejects)]
    num_samples = sum(report.num_samples for report in reports)
    for name in storage.list_names(root):
        if name.endswith(storage.PARTIAL_SUFFIX):
            storage.remove(storage.join(root, name))
    write_rejects(root, rejects)
    share = len(rejects) / (len(rejects) + num_samples)
    if num_samples == 0 or share > max_reject_share:
        raise ValueError(
            f"{len(rejects)} of {len(rejects) + num_samples} images rejected ({share:.2%}), allowed are "
            f"{max_reject_share:.2%} (data.max_reject_share); reasons in {storage.join(root, REJECTS_NAME)}: {summarize_rejects(rejects)}"
        )
    write_json(storage.join(root, INDEX_NAME), _index_document(plan, reports, num_samples, len(rejects)))
    return load_index(root)


def _index_document(plan: ShardPlan, reports: list[ShardReport], num_samples: int, num_rejects: int) -> dict[str, Any]:
    keep = ("size_bytes", "sha256", "num_samples", "class_histogram")
    return {
        "kind": INDEX_KIND,
        "format": FORMAT_VERSION,
        "class_names": list(plan.class_names),
        "num_samples": num_samples,
        "num_rejects": num_rejects,
        "plan_hash": plan.hash,
        "shards": [
            {"name": report.shard, **{name: getattr(report, name) for name in keep}}
            for report in reports
            if report.num_samples > 0
        ],
    }


def write_rejects(root: str, rejects: Iterable[Any]) -> None:
    """Write ROOT/rejects.jsonl anew: one line per record, a dataclass with the key and the reason."""
    text = "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
    storage.write_atomic(storage.join(root, REJECTS_NAME), lambda file: file.write(text.encode()))


def _write_samples(file: BinaryIO, root: str, plan: ShardPlan) -> list[ShardReport]:
    """Write the rows of all shards, a shard at a time; return the reports without them, which is what millions of images leave room for."""
    reports, missing = list[ShardReport](), list[str]()
    with pyarrow.parquet.ParquetWriter(file, SAMPLES_SCHEMA) as writer:
        rows: list[dict[str, Any]] = []
        for item in plan.items:
            if (report := _committed(root, item)) is None:
                missing.append(item.shard)
                continue
            reports.append(replace(report, samples=()))
            rows += [asdict(row) for row in report.samples]
            if len(rows) >= _ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=SAMPLES_SCHEMA))
                rows.clear()
        writer.write_table(pyarrow.Table.from_pylist(rows, schema=SAMPLES_SCHEMA))
    if missing:
        raise ValueError(f"{root}: {len(missing)} of {len(plan.items)} shards are not written: {missing[:5]}")
    return reports
