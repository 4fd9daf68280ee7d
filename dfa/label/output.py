"""Label shards on disk, joined by key with the image shards that they label. In one folder, in commit order:

    plan.json                  which labels these are (`dfa.label.claim`); a folder without it is never written into
    shard-000000.tar           KEY.png (palette PNG, 0..C and 255; of more than 254 classes 16-bit grey, void 65535) and
                               KEY.json (labels, size, pixels by class, confidence);
                               where asked for KEY.soft.png (8-bit maps below each other, in the order of the JSON's
                               "classes") and KEY.confidence.png (8-bit); KEY.model.png, the model's own mask, where it
                               was compared with
    timings/shard-000000.json  processor and wall seconds
    shard-000000.json          commit marker: counts, rejects, quality of each sample, hash of what decides the content,
                               sha256 of both shards
    samples.parquet            a row a sample: confidence, share of 255, labelled classes without a pixel, agreement
    index.json                 last; without it the folder is unfinished

Shards have the names of the image shards, and their form with the mask in the image's place: `dfa.data.shards.read_shard`
and any WebDataset reader take them. Outside timings/ no file holds a time, and none but plan.json of a prediction a path:
the same work gives the same bytes.
"""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from dfa.data import storage
from dfa.data.offline import LABELS_KIND
from dfa.data.shards import FORMAT_VERSION, INDEX_NAME, SAMPLES_NAME, SampleRow
from dfa.data.writer import add_member, marker_address, write_json
from dfa.label.claim import UnwritableError
from dfa.label.counts import Counts
from dfa.label.scoring import Agreement, LabelSettings, Tally

MASK_EXTENSION, SOFT_EXTENSION, CONFIDENCE_EXTENSION = "png", "soft.png", "confidence.png"
TIMINGS_FOLDER = "timings"
_OWN_NAME = re.compile(r"shard-\d+\.(tar|json)")
_MATRICES = {
    "argmax": "argmax_CC",
    "mask": "mask_CC",
    "sweep": "sweep_TCC",
    "other": "other_PCC",
}  # as markers call them
_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("shard", pyarrow.string()),
        ("row", pyarrow.int32()),
        ("labels", pyarrow.list_(pyarrow.int32())),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("confidence", pyarrow.float32()),
        ("void_share", pyarrow.float32()),
        ("empty", pyarrow.list_(pyarrow.int32())),
        ("agreement_seed", pyarrow.float32()),
        ("agreement_model", pyarrow.float32()),
        ("agreement_seed_model", pyarrow.float32()),
    ]
)


@dataclass(frozen=True)
class LabelItem:
    """The unit of work: one image shard, or its first rows. hash covers all that decides the label shard's bytes."""

    shard: str
    image_sha256: str
    num_rows: int
    hash: str


@dataclass(frozen=True)
class Quality:
    """What is known of a sample's label without ground truth; rates in [0, 1].

    empty: image-level labels without a pixel in the mask. Others: see `dfa.label.scoring.Agreement`.
    """

    key: str
    row: int
    labels: tuple[int, ...]
    width: int
    height: int
    confidence: float
    void_share: float
    empty: tuple[int, ...]
    agreement_seed: float
    agreement_model: float | None
    agreement_seed_model: float | None


@dataclass(frozen=True)
class LabelRecord:
    """One sample: its members by extension, encoded, and its quality."""

    members: Mapping[str, bytes]
    quality: Quality


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
    soft: bool
    confidence: bool
    rejects: tuple[LabelReject, ...]
    tally: Tally
    samples: tuple[Quality, ...]


@dataclass(frozen=True)
class LabelReport:
    """A finished folder of labels."""

    root: str
    num_samples: int
    rejects: tuple[LabelReject, ...]
    tally: Tally


def committed(root: str, item: LabelItem, settings: LabelSettings) -> ShardReport | None:
    """The report of a label shard that is whole on disk, was made for this very item and has the maps that the settings ask
    for, else None."""
    marker, address = marker_address(root, item.shard), storage.join(root, item.shard)
    if not storage.exists(marker) or not storage.exists(address):
        return None
    try:
        document = storage.read_json(marker)
    except storage.StoreError:
        raise  # not read is not the same as not there
    except ValueError:
        return None
    same = document.get("hash") == item.hash and document.get("image_sha256") == item.image_sha256
    same = same and document["soft"] >= settings.soft and document["confidence"] >= settings.confidence
    if not same or document.get("size_bytes") != storage.size_bytes(address):
        return None
    tally = _tally_from_plain(document.pop("tally"), settings)
    rejects = tuple(LabelReject(**reject) for reject in document.pop("rejects"))
    samples = _qualities(document.pop("samples"))
    return ShardReport(**document, rejects=rejects, tally=tally, samples=samples)


def _qualities(columns: dict[str, list[Any]]) -> tuple[Quality, ...]:
    rows: Any = zip(*columns.values(), strict=True)
    plain: Iterator[dict[str, Any]] = (dict(zip(columns, row, strict=True)) for row in rows)
    return tuple(Quality(**{**row, "labels": tuple(row["labels"]), "empty": tuple(row["empty"])}) for row in plain)


def commit(
    root: str,
    item: LabelItem,
    settings: LabelSettings,
    records: Sequence[LabelRecord],
    rejects: Sequence[LabelReject],
    tally: Tally,
    timings: Mapping[str, float],
) -> None:
    """Write one label shard, its timings and then its marker, each under a temporary name; members in the rows' order.

    Raises:
        UnwritableError: full disk, no permission, a store that is gone.
    """
    address = storage.join(root, item.shard)
    ordered = sorted(records, key=lambda record: record.quality.row)
    data = io.BytesIO()
    _write_tar(data, ordered)
    content = data.getbuffer()
    report = ShardReport(
        shard=item.shard,
        num_samples=len(ordered),
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        image_sha256=item.image_sha256,
        hash=item.hash,
        soft=settings.soft,
        confidence=settings.confidence,
        rejects=tuple(rejects),
        tally=tally,
        samples=(),
    )
    document: dict[str, Any] = {name: getattr(report, name) for name in ShardReport.__dataclass_fields__}
    qualities = [asdict(record.quality) for record in ordered]
    columns = {name: [each[name] for each in qualities] for name in Quality.__dataclass_fields__}
    document |= {"rejects": [asdict(each) for each in rejects], "tally": _tally_to_plain(tally), "samples": columns}
    with _writing(
        f"label shard {address}",
        "shards that were written before stay as they are, and the same command goes on from them",
    ):
        storage.write_atomic(address, lambda file: file.write(content))
        folder = storage.join(root, TIMINGS_FOLDER)
        storage.make_folder(folder)
        write_json(marker_address(folder, item.shard), {name: round(value, 4) for name, value in timings.items()})
        write_json(marker_address(root, item.shard), document)


@contextmanager
def _writing(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{what} cannot be written: {error}; {hint}") from error


def _write_tar(file: BinaryIO, records: Sequence[LabelRecord]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            for extension, data in record.members.items():
                add_member(tar, f"{record.quality.key}.{extension}", data)


def finish(
    root: str, items: Sequence[LabelItem], class_names: Sequence[str], image_plan_hash: str, settings: LabelSettings
) -> LabelReport:
    """Write samples.parquet and index.json from the commit markers alone, one marker at a time.

    Shards of our own naming that the index does not list are deleted: those of other images, that were labelled here
    before. Where all is as it should be nothing is written.

    Raises:
        ValueError: shards are missing, or the folder cannot be written.
    """
    totals = _Totals(settings)
    address = storage.join(root, INDEX_NAME)
    if storage.exists(address):
        for _ in _reports(root, items, settings, totals):
            pass
        found = storage.read_json(address)
        if found == totals.index(class_names, image_plan_hash) and not _left_over(root, items):
            return LabelReport(root, found["num_samples"], tuple(totals.rejects), totals.tally)
        totals = _Totals(settings)
    with _writing(f"{root}: the index of the labels", "the label shards stay, and the same command writes it"):
        reports = _reports(root, items, settings, totals)
        storage.write_atomic(storage.join(root, SAMPLES_NAME), lambda file: _write_samples(file, reports))
        for name in _left_over(root, items):
            storage.remove(storage.join(root, name))
        document = totals.index(class_names, image_plan_hash)
        write_json(address, document)
    return LabelReport(root, document["num_samples"], tuple(totals.rejects), totals.tally)


class _Totals:
    """What the index says of all label shards together."""

    def __init__(self, settings: LabelSettings) -> None:
        self.tally, self.rejects, self.shards = Tally.zero(settings), list[LabelReject](), list[dict[str, Any]]()

    def add(self, report: ShardReport) -> None:
        keep = ("num_samples", "size_bytes", "sha256", "image_sha256")
        self.tally = self.tally + report.tally
        self.rejects.extend(report.rejects)
        self.shards.append({"name": report.shard} | {name: getattr(report, name) for name in keep})

    def index(self, class_names: Sequence[str], image_plan_hash: str) -> dict[str, Any]:
        return {
            "kind": LABELS_KIND,
            "format": FORMAT_VERSION,
            "class_names": list(class_names),
            "image_plan_hash": image_plan_hash,
            "num_samples": sum(shard["num_samples"] for shard in self.shards),
            "num_rejects": len(self.rejects),
            "reject_reasons": dict(sorted(Counter(reject.reason for reject in self.rejects).items())),
            "pixels": self.tally.pixels_C.tolist(),
            "void_pixels": self.tally.void_pixels,
            "shards": self.shards,
        }


def _reports(root: str, items: Sequence[LabelItem], settings: LabelSettings, totals: _Totals) -> Iterator[ShardReport]:
    for item in items:
        report = committed(root, item, settings)
        if report is None:
            raise ValueError(f"{root}: label shard {item.shard} is not written")
        totals.add(report)
        yield report


def _left_over(root: str, items: Sequence[LabelItem]) -> list[str]:
    """Names of what killed attempts and other images left here; nothing that is not named as we name.

    What is half written may be another job's where no lock keeps it out (`claim`), so that it stays there.
    """
    wanted = {name for item in items for name in (item.shard, marker_address("", item.shard))}
    there = storage.list_names(root)
    found = [name for name in there if _OWN_NAME.fullmatch(name)]
    if storage.is_local(root):
        found += [name for name in there if name.endswith(storage.PARTIAL_SUFFIX)]
    if TIMINGS_FOLDER in there:
        names = storage.list_names(storage.join(root, TIMINGS_FOLDER))
        found += [f"{TIMINGS_FOLDER}/{name}" for name in names if _OWN_NAME.fullmatch(name)]
    return [name for name in found if name.rsplit("/", 1)[-1] not in wanted]


def _write_samples(file: BinaryIO, reports: Iterator[ShardReport]) -> None:
    with pyarrow.parquet.ParquetWriter(file, _SCHEMA) as writer:
        for report in reports:
            if report.samples:
                rows = [{"shard": report.shard, **asdict(sample)} for sample in report.samples]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=_SCHEMA))


def describe(
    sample: SampleRow, class_names: Sequence[str], class_ids: Sequence[int], mask_HW: np.ndarray, confidence: float
) -> bytes:
    """KEY.json: the image-level labels, the mask's size, its pixels per class, the classes that took part (background
    first) and the mean confidence."""
    pixels = np.bincount(mask_HW.reshape(-1))
    document = {
        "key": sample.key,
        "labels": list(sample.labels),
        "names": [class_names[index - 1] for index in sample.labels],
        "width": int(mask_HW.shape[1]),
        "height": int(mask_HW.shape[0]),
        "pixels": {str(index): int(pixels[index]) for index in np.flatnonzero(pixels)},
        "classes": list(class_ids),
        "confidence": round(confidence, 4),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def judge(sample: SampleRow, mask_HW: np.ndarray, confidence: float, agreement: Agreement) -> Quality:
    """The quality of one label."""
    void = np.iinfo(mask_HW.dtype).max
    pixels = np.bincount(mask_HW.reshape(-1), minlength=void + 1)
    return Quality(
        key=sample.key,
        row=sample.row,
        labels=sample.labels,
        width=int(mask_HW.shape[1]),
        height=int(mask_HW.shape[0]),
        confidence=round(confidence, 6),
        void_share=round(float(pixels[void] / mask_HW.size), 6),
        empty=tuple(index for index in sample.labels if not pixels[index]),
        agreement_seed=round(agreement.seed, 6),
        agreement_model=None if agreement.model is None else round(agreement.model, 6),
        agreement_seed_model=None if agreement.seed_model is None else round(agreement.seed_model, 6),
    )


def total_tally(tallies: Sequence[Tally], settings: LabelSettings) -> Tally:
    """The sum of any number of tallies."""
    return reduce(add, tallies, Tally.zero(settings))


def _tally_to_plain(tally: Tally) -> dict[str, Any]:
    """Counts of many classes are mostly zero: only the others are written."""
    plain: dict[str, Any] = {name: getattr(tally, name) for name in ("num_images", "num_truth", "void_pixels")}
    counts = {"pixels_C": Counts.of(tally.pixels_C)} | {_MATRICES[name]: getattr(tally, name) for name in _MATRICES}
    return plain | {name: [each.place_E.tolist(), each.value_E.tolist()] for name, each in counts.items()}


def _tally_from_plain(plain: dict[str, Any], settings: LabelSettings) -> Tally:
    zero = Tally.zero(settings)

    def counts(name: str, shape: tuple[int, ...]) -> Counts:
        return Counts(shape, *(np.array(numbers, np.int64) for numbers in plain.pop(name)))

    pixels_C = counts("pixels_C", tuple(zero.pixels_C.shape)).dense()
    matrices: dict[str, Any] = {name: counts(_MATRICES[name], getattr(zero, name).shape) for name in _MATRICES}
    return Tally(**plain, pixels_C=pixels_C, **matrices)
