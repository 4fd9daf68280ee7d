"""How good pseudo-labels are, without ground truth: statistics, and doubtful samples for a person to look at.

Reads a finished folder of labels (its layout is in `dfa.label.output`) in one pass over samples.parquet; only the few
samples that are shown are opened. The same folder gives the same bytes.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from dfa.data import storage
from dfa.data.shards import RawSample, ShardIndex, read_shard
from dfa.data.transforms import decode_mask, decode_rgb
from dfa.label.finished import LabelRow, read_label_index, read_label_rows, read_members
from dfa.label.output import CONFIDENCE_EXTENSION, MASK_EXTENSION, UnwritableError
from dfa.label.scoring import MODEL_EXTENSION
from dfa.report.figures import Example, present_legend, sample_panels
from dfa.report.page import Link, Picture, Report, Table, render

Doubt = Literal["agreement", "confidence"]
PAGE_NAME, NUMBERS_NAME = "quality.html", "quality.json"
_THUMBNAIL_WIDTH, _THUMBNAIL_HEIGHT, _THUMBNAIL_QUALITY = 280, 360, 80
_SHOWN = (MASK_EXTENSION, CONFIDENCE_EXTENSION, MODEL_EXTENSION)
_MEANS = ("agreement_seed", "agreement_model", "agreement_seed_model", "confidence")
_REASONS = {"agreement": "least agreement", "confidence": "least confident"}
_SUMMARY = (
    "Nothing here was compared with ground truth. Where CAM, CRF and model disagree, one of them is wrong: the samples with"
    " the least agreement come first, then those with the least confidence, which the CRF itself claims and which says"
    " little by itself. Bright is uncertain, pale is void. A class with many empty labels is one that the labels name and"
    " the masks miss."
)


@dataclass(frozen=True)
class ClassQuality:
    """One class. Shares are 0..1; None where no image carries the class.

    num_images: images labelled with it. num_empty: those of them in whose mask it has no pixel; empty_rate: their
    share. pixel_share: of all pixels, void ones included. confidence: mean confidence of the images that carry it.
    """

    name: str
    num_images: int
    num_empty: int
    empty_rate: float | None
    pixel_share: float
    confidence: float | None


@dataclass(frozen=True)
class LabelQuality:
    """A folder of labels. Shares are 0..1; None where there is nothing to take a mean of.

    void_share, background_share: of all pixels. empty_rate: of all labels of all images. confidence and the agreements
    (see `dfa.label.finished.LabelRow`) are means over images, whatever their size; those with the model over the images
    that it looked at.
    """

    num_images: int
    num_rejects: int
    reject_reasons: dict[str, int]
    void_share: float
    background_share: float
    empty_rate: float | None
    confidence: float | None
    agreement_seed: float | None
    agreement_model: float | None
    agreement_seed_model: float | None
    classes: tuple[ClassQuality, ...]


@dataclass
class _Sums:
    """Running sums over the rows of samples.parquet."""

    num_images: int = 0
    labelled: Counter[int] = field(default_factory=Counter)
    empty: Counter[int] = field(default_factory=Counter)
    class_confidence: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    total: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    known: Counter[str] = field(default_factory=Counter)

    def add(self, row: LabelRow) -> None:
        self.num_images += 1
        self.labelled.update(row.labels)
        self.empty.update(row.empty)
        for label in row.labels:
            self.class_confidence[label] += row.confidence
        for name in _MEANS:
            if (value := getattr(row, name)) is not None:
                self.total[name] += value
                self.known[name] += 1


def worst_samples(root: str, *, count: int, by: Doubt) -> list[LabelRow]:
    """Return the `count` samples with the least confidence or agreement, the worst first, ties by key.

    agreement: of the unary with the trained model where that looked too, else with the CRF.
    """

    def order(row: LabelRow) -> tuple[float, str]:
        if by == "confidence":
            return row.confidence, row.key
        return row.agreement_seed if row.agreement_seed_model is None else row.agreement_seed_model, row.key

    return heapq.nsmallest(count, read_label_rows(root), key=order)


def _doubtful(root: str, count: int) -> dict[str, tuple[LabelRow, Doubt]]:
    """Key -> sample and why it is shown: half of them by agreement, the rest by confidence, none twice."""
    found: dict[str, tuple[LabelRow, Doubt]] = {}
    parts: tuple[tuple[Doubt, int], ...] = (("agreement", (count + 1) // 2), ("confidence", count))
    for by, wanted in parts:
        for row in worst_samples(root, count=count, by=by):
            if len(found) < wanted:
                found.setdefault(row.key, (row, by))
    return found


def class_statistics(root: str) -> LabelQuality:
    """Summarise samples.parquet and index.json of a finished folder of labels, in one pass.

    Raises:
        ValueError: labels beyond the classes, or rows that are not the index's number of samples.
    """
    index, sums = read_label_index(root), _Sums()
    names = index["class_names"]
    for row in read_label_rows(root):
        if wrong := [label for label in row.labels + row.empty if not 1 <= label <= len(names)]:
            raise ValueError(f"{root}: key {row.key!r} has labels {wrong}; the classes are 1..{len(names)}")
        sums.add(row)
    if sums.num_images != index["num_samples"]:
        raise ValueError(f"{root}: samples.parquet has {sums.num_images} rows, the index says {index['num_samples']}")
    pixels, void = index["pixels"], index["void_pixels"]
    num_pixels = max(sum(pixels) + void, 1)
    return LabelQuality(
        num_images=sums.num_images,
        num_rejects=index["num_rejects"],
        reject_reasons=dict(index["reject_reasons"]),
        void_share=void / num_pixels,
        background_share=pixels[0] / num_pixels,
        empty_rate=_mean(sums.empty.total(), sums.labelled.total()),
        **{name: _mean(sums.total[name], sums.known[name]) for name in _MEANS},
        classes=tuple(
            ClassQuality(
                name=name,
                num_images=sums.labelled[label],
                num_empty=sums.empty[label],
                empty_rate=_mean(sums.empty[label], sums.labelled[label]),
                pixel_share=pixels[label] / num_pixels,
                confidence=_mean(sums.class_confidence[label], sums.labelled[label]),
            )
            for label, name in enumerate(names, start=1)
        ),
    )


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def write_quality(
    root: str,
    image_index: ShardIndex,
    folder: str,
    *,
    count: int,
    title: str,
    unary: str = "CAM",
    facts: Mapping[str, str] | None = None,
) -> str:
    """Write FOLDER/quality.json (all numbers) and FOLDER/quality.html (one self-contained page); return its address.

    Args:
        root: the finished folder of labels.
        image_index: the image shards that they label.
        folder: where to write; made if it is not there.
        count: how many doubtful samples to show: half with the least agreement, half with the least confidence.
        title: the page's.
        unary: what the CRF started from, as the page calls it.
        facts: what made the labels, name -> text; no date and no place, if the same labels shall give the same bytes.

    Raises:
        ValueError: labels of other image shards, a sample whose image and mask do not belong together, or a folder
            that cannot be written.
    """
    index, facts = read_label_index(root), dict(facts or {})
    if index["image_plan_hash"] != image_index.plan_hash:
        raise ValueError(f"{root} labels other image shards than those at {image_index.root}")
    statistics, doubtful = class_statistics(root), _doubtful(root, count)
    names, worst = index["class_names"], [row for row, _ in doubtful.values()]
    rows = [_row_numbers(row, names) | {"reason": _REASONS[by]} for row, by in doubtful.values()]
    numbers = {"kind": "dfa-label-quality", "facts": facts, **asdict(statistics), "worst": rows}
    report = Report(
        title=title,
        scores=_scores(statistics, unary),
        notes=_notes(unary),
        summary=_SUMMARY,
        tables=_tables(statistics),
        contents=_contents(doubtful, names, unary),
        pictures=_pictures(root, image_index, worst),
        pictures_title="Doubtful samples",
        provenance={
            **facts,
            "classes": f"{len(names)}: {', '.join(names)}",
            "labels": f"{statistics.num_images} images, {statistics.num_rejects} left out",
            "image shards": f"plan {image_index.plan_hash}",
        },
    )
    page, address = render(report).encode(), storage.join(folder, PAGE_NAME)
    try:
        storage.make_folder(folder)
        storage.write_json(storage.join(folder, NUMBERS_NAME), numbers)
        storage.write_atomic(address, lambda file: file.write(page))
    except OSError as error:
        raise UnwritableError(f"the quality of labels cannot be written to {folder}: {error}") from error
    return address


def _row_numbers(row: LabelRow, names: Sequence[str]) -> dict[str, Any]:
    named = {"labels": [names[label - 1] for label in row.labels], "empty": [names[label - 1] for label in row.empty]}
    return asdict(row) | named


def _notes(unary: str) -> dict[str, str]:
    """The cards of the page, in order, and what each says."""
    return {
        f"{unary} and CRF agree, %": f"pixels where the {unary} alone says what the CRF says, mean over images",
        "trained model and CRF agree, %": "pixels where the trained model alone says what the CRF says, mean over images",
        f"{unary} and trained model agree, %": f"pixels where the {unary} alone says what the model says, mean over images",
        "empty labels, %": "labels of an image that got no pixel",
        "void, %": "pixels that are void: too uncertain",
        "confidence, %": "probability that the CRF gives the winning class, mean over pixels and images",
    }


def _scores(statistics: LabelQuality, unary: str) -> Mapping[str, float | None]:
    """What is known; without a model to compare with its agreements are left out."""
    shares = (
        statistics.agreement_seed,
        statistics.agreement_model,
        statistics.agreement_seed_model,
        statistics.empty_rate,
        statistics.void_share,
        statistics.confidence,
    )
    known = {label: share for label, share in zip(_notes(unary), shares, strict=True) if share is not None}
    return {label: _percent(share) for label, share in known.items()}


def _contents(doubtful: Mapping[str, tuple[LabelRow, Doubt]], names: Sequence[str], unary: str) -> Table | None:
    """The samples of the page in its order, each linked to its pictures and named with its place in the shards."""
    if not doubtful:
        return None
    columns = ("sample", "why", f"{unary} and CRF, %", "model and CRF, %", f"{unary} and model, %", "confidence, %")
    rows = []
    for row, by in doubtful.values():
        shares = (row.agreement_seed, row.agreement_model, row.agreement_seed_model, row.confidence)
        labels = ", ".join(names[label - 1] for label in row.labels)
        cells = (Link(row.key, _anchor(row)), _REASONS[by], *map(_percent, shares), _percent(row.void_share))
        rows.append((*cells, labels, f"{row.shard}, row {row.row}"))
    return Table("Doubtful samples", (*columns, "void, %", "labels", "where"), tuple(rows))


def _anchor(row: LabelRow) -> str:
    return f"sample-{row.key}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _tables(statistics: LabelQuality) -> tuple[Table, ...]:
    """The classes, those that the masks miss most often first; and why images were left out."""
    rows = [
        (
            each.name,
            each.num_images,
            each.num_empty,
            *map(_percent, (each.empty_rate, each.pixel_share, each.confidence)),
        )
        for each in sorted(statistics.classes, key=lambda each: -(each.empty_rate or 0))
    ]
    columns = ("class", "images", "empty", "empty, %", "pixels, %", "confidence, %")
    tables = [Table("Classes", columns, tuple(rows), bar_column=3)]
    if statistics.reject_reasons:
        reasons = tuple(statistics.reject_reasons.items())
        tables.append(Table("Images that were left out", ("reason", "images"), reasons, folded=True))
    return tuple(tables)


def _pictures(root: str, image_index: ShardIndex, worst: Sequence[LabelRow]) -> tuple[Picture, ...]:
    """Each shard is opened once, whatever the order of the samples."""
    by_key: dict[str, Picture] = {}
    for shard, rows in groupby(sorted(worst, key=lambda row: row.shard), key=lambda row: row.shard):
        by_key |= _shard_pictures(root, image_index, shard, {row.key: row for row in rows})
    return tuple(by_key[row.key] for row in worst)


def _shard_pictures(
    root: str, image_index: ShardIndex, shard: str, rows: Mapping[str, LabelRow]
) -> Iterable[tuple[str, Picture]]:
    labels = storage.join(root, shard)
    members = read_members(labels, {f"{key}.{end}" for key in rows for end in _SHOWN})
    for raw in read_shard(image_index.path(shard), wanted={row.row for row in rows.values()}):
        if raw.key not in rows or f"{raw.key}.{MASK_EXTENSION}" not in members:
            raise ValueError(
                f"row {raw.row} of {image_index.path(shard)} is {raw.key!r}, which {labels} does not label"
            )
        yield raw.key, _picture(rows[raw.key], raw, members, image_index.class_names)


def _picture(row: LabelRow, raw: RawSample, members: Mapping[str, bytes], names: Sequence[str]) -> Picture:
    limit = row.width * row.height
    try:
        image_HW3 = decode_rgb(raw.image, max_pixels=limit)
        mask_HW = decode_mask(members[f"{row.key}.{MASK_EXTENSION}"], max_pixels=limit)
        confidence = members.get(f"{row.key}.{CONFIDENCE_EXTENSION}")
        uncertainty_HW = None
        if confidence is not None:
            uncertainty_HW = 1 - decode_mask(confidence, max_pixels=limit).astype(np.float32) / 255
        model = members.get(f"{row.key}.{MODEL_EXTENSION}")
        model_HW = None if model is None else decode_mask(model, max_pixels=limit)
        example = Example(image_HW3, pseudo_HW=mask_HW, prediction_HW=model_HW, uncertainty_HW=uncertainty_HW)
        # A picture that is much higher than wide gets fewer pixels across instead of a page of its own.
        width = max(1, min(_THUMBNAIL_WIDTH, _THUMBNAIL_HEIGHT * row.width // row.height))
        panels = sample_panels(example, width=width, quality=_THUMBNAIL_QUALITY)
        return Picture(_caption(row, names), panels, present_legend(example, names), _anchor(row))
    except ValueError as error:
        raise ValueError(f"{row.shard}, key {row.key!r} cannot be shown: {error}") from error


def _caption(row: LabelRow, names: Sequence[str]) -> str:
    labels = ", ".join(names[label - 1] for label in row.labels) or "no label"
    empty = ", ".join(names[label - 1] for label in row.empty)
    shares = f"CRF agrees {100 * row.agreement_seed:.1f} %"
    if row.agreement_seed_model is not None:
        shares += f", model {100 * row.agreement_seed_model:.1f} %"
    caption = f"{row.key} · {shares} · confidence {100 * row.confidence:.1f} % · {labels}"
    return caption + (f" · empty: {empty}" if empty else "")
