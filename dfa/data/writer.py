"""Planned samples -> WebDataset shards: write each shard as an independent task, finish with the index.

    plan = plan_shards(source, class_names=..., seed=0, shuffle=True, samples_per_shard=512, max_pixels=...)
    write_plan(root, plan)                       # refuses a foreign or differently planned folder
    for item in pending(root, plan):             # in any process, in any order, as often as one likes
        write_shard(root, item)
    index = finish(root, plan, max_reject_share=0.01)

A shard is a pure function of its plan item and of the files that it names: the same bytes at every attempt. Its commit
marker is written after it, so that a restart repeats exactly what was not committed.
"""

import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from dfa.data import storage
from dfa.data.classes import voc_palette
from dfa.data.planning import PlanItem, ShardPlan
from dfa.data.samples import MaskFile, Reject, Sample, summarize_rejects
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

logger = logging.getLogger(__name__)

_ROW_GROUP = 65536  # of samples.parquet


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
