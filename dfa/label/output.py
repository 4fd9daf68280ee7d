"""Label shards on disk, joined by key with the image shards that they label. In one folder, in commit order:

    plan.json            which labels these are; a folder without it is never written into
    shard-000000.tar     KEY.png (palette PNG, 0..C and 255) and KEY.json (labels, size, pixels by class, confidence)
    shard-000000.json    commit marker: counts, rejects, sha256 of both shards, hash of what decides the content
    index.json           last; without it the folder is unfinished

Shards have the names of the image shards, and their form with the mask in the image's place: `dfa.data.shards.read_shard`
and any WebDataset reader take them. No file holds a time or a path: the same work gives the same bytes.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any, BinaryIO

import numpy as np
import torch

from dfa.data import storage
from dfa.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    LABEL_EXTENSION,
    SampleRow,
    ShardIndex,
    read_shard,
    sha256_of,
)
from dfa.data.writer import PLAN_NAME, add_member, marker_address, write_json
from dfa.label.scoring import LabelSettings, Tally

PLAN_KIND, INDEX_KIND = "dfa-label-plan", "dfa-labels"
_COUNTS = ("pixels_C", "argmax_CC", "mask_CC", "sweep_TCC")


@dataclass(frozen=True)
class LabelItem:
    """The unit of work: one image shard, or its first rows. hash covers all that decides the label shard's bytes."""

    shard: str
    image_path: str
    image_sha256: str
    rows: tuple[SampleRow, ...]
    hash: str


@dataclass(frozen=True)
class LabelRecord:
    """One sample's two members, encoded."""

    row: int
    key: str
    png: bytes
    json: bytes


@dataclass(frozen=True)
class LabelReject:
    """One sample that has no label, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardReport:
    """What a commit marker says."""

    shard: str
    num_samples: int
    size_bytes: int
    sha256: str
    image_sha256: str
    hash: str
    rejects: tuple[LabelReject, ...]
    tally: Tally


@dataclass(frozen=True)
class LabelReport:
    """A finished folder of labels."""

    root: str
    num_samples: int
    rejects: tuple[LabelReject, ...]
    tally: Tally


def claim(root: str, *, class_names: Sequence[str], hash: str) -> None:
    """Make `root` the folder of these labels. Older labels of other content there are replaced shard by shard.

    Raises:
        ValueError: the folder holds something else.
    """
    storage.make_folder(root)
    address = storage.join(root, PLAN_NAME)
    wanted = {"kind": PLAN_KIND, "format": FORMAT_VERSION, "class_names": list(class_names), "hash": hash}
    if storage.exists(address):
        found = storage.read_json(address)
        if found == wanted:
            return
        if not isinstance(found, dict) or found.get("kind") != PLAN_KIND:
            raise ValueError(f"{address} is no plan of dfa labels; choose an empty or a new folder")
        storage.remove(storage.join(root, INDEX_NAME))
    elif names := [name for name in storage.list_names(root) if not name.endswith(storage.PARTIAL_SUFFIX)]:
        raise ValueError(
            f"{root} is not empty and holds no dfa labels ({', '.join(names[:4])}); choose an empty or a new folder"
        )
    write_json(address, wanted)


def committed(root: str, item: LabelItem, settings: LabelSettings) -> ShardReport | None:
    """The report of a label shard that is whole on disk and was made for this very item, else None."""
    marker, address = marker_address(root, item.shard), storage.join(root, item.shard)
    if not storage.exists(marker) or not storage.exists(address):
        return None
    try:
        document = storage.read_json(marker)
    except ValueError:
        return None
    same = document.get("hash") == item.hash and document.get("image_sha256") == item.image_sha256
    if not same or document.get("size_bytes") != storage.size_bytes(address):
        return None
    tally = _tally_from_plain(document.pop("tally"), settings)
    rejects = tuple(LabelReject(**reject) for reject in document.pop("rejects"))
    return ShardReport(**document, rejects=rejects, tally=tally)


def commit(
    root: str, item: LabelItem, records: Sequence[LabelRecord], rejects: Sequence[LabelReject], tally: Tally
) -> ShardReport:
    """Write the label shard and then its marker, each under a temporary name first; members in the rows' order."""
    address = storage.join(root, item.shard)
    ordered = sorted(records, key=lambda record: record.row)
    storage.write_atomic(address, lambda file: _write_tar(file, ordered))
    report = ShardReport(
        shard=item.shard,
        num_samples=len(ordered),
        size_bytes=storage.size_bytes(address),
        sha256=sha256_of(address),
        image_sha256=item.image_sha256,
        hash=item.hash,
        rejects=tuple(rejects),
        tally=tally,
    )
    document = {name: getattr(report, name) for name in ShardReport.__dataclass_fields__}
    document |= {"rejects": [asdict(reject) for reject in rejects], "tally": _tally_to_plain(tally)}
    write_json(marker_address(root, item.shard), document)
    return report


def _write_tar(file: BinaryIO, records: Sequence[LabelRecord]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            add_member(tar, f"{record.key}.png", record.png)
            add_member(tar, f"{record.key}.{LABEL_EXTENSION}", record.json)


def finish(root: str, items: Sequence[LabelItem], index: ShardIndex, settings: LabelSettings) -> LabelReport:
    """Write index.json from the commit markers alone.

    Raises:
        ValueError: shards are missing.
    """
    reports = [(item.shard, committed(root, item, settings)) for item in items]
    if missing := [shard for shard, report in reports if report is None]:
        raise ValueError(f"{root}: {len(missing)} of {len(items)} label shards are not written: {missing[:5]}")
    done = [report for _, report in reports if report is not None]
    for name in storage.list_names(root):
        if name.endswith(storage.PARTIAL_SUFFIX):
            storage.remove(storage.join(root, name))
    tally = reduce(add, (report.tally for report in done), Tally.zero(settings))
    rejects = tuple(reject for report in done for reject in report.rejects)
    num_samples = sum(report.num_samples for report in done)
    document = {
        "kind": INDEX_KIND,
        "format": FORMAT_VERSION,
        "class_names": list(index.class_names),
        "image_plan_hash": index.plan_hash,
        "num_samples": num_samples,
        "num_rejects": len(rejects),
        "reject_reasons": dict(sorted(Counter(reject.reason for reject in rejects).items())),
        "pixels": tally.pixels_C.tolist(),
        "void_pixels": tally.void_pixels,
        "shards": [
            {
                "name": report.shard,
                "num_samples": report.num_samples,
                "size_bytes": report.size_bytes,
                "sha256": report.sha256,
                "image_sha256": report.image_sha256,
            }
            for report in done
        ],
    }
    write_json(storage.join(root, INDEX_NAME), document)
    return LabelReport(root, num_samples, rejects, tally)


def export_pngs(root: str, folder: str) -> int:
    """Write the masks of a finished folder of labels as FOLDER/KEY.png (VOC's palette); return their number."""
    storage.make_folder(folder)
    num_masks = 0
    for shard in storage.read_json(storage.join(root, INDEX_NAME))["shards"]:
        for sample in read_shard(storage.join(root, shard["name"])) if shard["num_samples"] else ():
            address, data = storage.join(folder, f"{sample.key}.png"), sample.image
            if not storage.exists(address) or storage.read_bytes(address) != data:
                storage.write_atomic(address, lambda file, data=data: file.write(data))
            num_masks += 1
    return num_masks


def label_json(sample: SampleRow, class_names: Sequence[str], mask_HW: np.ndarray, confidence: float) -> bytes:
    """KEY.json: the image-level labels, the mask's size, its pixels per class and the CRF's mean confidence."""
    pixels = np.bincount(mask_HW.reshape(-1), minlength=256)
    document = {
        "key": sample.key,
        "labels": list(sample.labels),
        "names": [class_names[index - 1] for index in sample.labels],
        "width": int(mask_HW.shape[1]),
        "height": int(mask_HW.shape[0]),
        "pixels": {str(index): int(pixels[index]) for index in np.flatnonzero(pixels)},
        "confidence": round(confidence, 4),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _tally_to_plain(tally: Tally) -> dict[str, Any]:
    """Counts of many classes are mostly zero: only the others are written."""
    plain: dict[str, Any] = {name: getattr(tally, name) for name in ("num_images", "num_truth", "void_pixels")}
    for name in _COUNTS:
        counts = getattr(tally, name).reshape(-1)
        places = counts.nonzero()[:, 0]
        plain[name] = [places.tolist(), counts[places].tolist()]
    return plain


def _tally_from_plain(plain: dict[str, Any], settings: LabelSettings) -> Tally:
    zero = Tally.zero(settings)
    counts: dict[str, Any] = {}
    for name in _COUNTS:
        counts[name] = getattr(zero, name).clone()
        places, values = plain.pop(name)
        counts[name].view(-1)[torch.tensor(places, dtype=torch.int64)] = torch.tensor(values, dtype=torch.int64)
    return Tally(**plain, **counts)
