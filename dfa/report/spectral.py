"""The page of a spectral analysis: which frequencies carry the loss, what a grid keeps, what it costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dfa.report import figures
from dfa.report.figures import Panel
from dfa.report.page import Report, Table

_SUMMARY = (
    "Predictions and ground truth, split by spatial frequency. A band of nu_max holds all frequencies of at most nu_max cycles"
    " along either axis of an image, and a grid of 2 nu_max + 1 cells just resolves it. R_ce is the share of the cross entropy"
    " that the band misses; the less, the less a model or an annotation on that grid loses. Foretold drops follow the line that"
    " the paper fitted to its own models: measure yours before you rely on them. Pixels that are void in the ground truth count"
    " nowhere, but what is predicted there takes part in every truncated band."
)

_GRADIENTS = (
    "How strongly the cross entropy at one spatial frequency depends on the features at each frequency. Where a curve is highest at"
    " its own frequency, that frequency of the prediction is made by the same frequency of the features, and truncating"
    " features above a band costs what the loss has there."
)


def spectral_report(found: Mapping[str, Any], *, title: str, provenance: Mapping[str, str]) -> Report:
    """The report of `dfa.analysis.summary.summarise`."""
    scores = {"mIoU": _percent(found["miou"]), "R_ce at the highest band": 100 * found["curve"]["loss_rate"][-1]}
    if found["boundary_miou"] is not None:
        scores["boundary mIoU"] = _percent(found["boundary_miou"])
    if found["recommended_grid"] is not None:
        scores["recommended grid"] = found["recommended_grid"]
    return Report(
        title=title,
        scores=scores,
        notes={
            "mIoU": f"percent, over {found['num_pairs']} pairs{_left_out(found['num_rejects'])}",
            "R_ce at the highest band": f"percent, nu_max {found['curve']['nu_max'][-1]}",
            "recommended grid": f"cells an axis: {found['rule']}",
        },
        tables=(_grids(found), *map(_costs, found["feature_truncation"]), _classes(found["per_class"])),
        figures=_curves(found),
        provenance=provenance,
        summary=_SUMMARY,
    )


def gradient_report(profiles: Mapping[str, Tensor], *, title: str, provenance: Mapping[str, str]) -> Report:
    """Curves of `dfa.analysis.gradients.gradient_profiles`: one figure a module, one curve a frequency of the loss."""
    panels = []
    for name, profile_KK in profiles.items():
        curves = {
            f"loss at {ring}": _points(range(len(row)), (row / max(row.max(), 1e-300)).tolist())
            for ring, row in enumerate(profile_KK)
        }
        png = figures.learning_curves(
            curves,
            title=name,
            x_label="max(|ny|, |nx|) of the features",
            y_label="|gradient|, of its largest",
            log=True,
        )
        panels.append(Panel(f"Gradient of each frequency of the loss towards the frequencies of: {name}.", png))
    return Report(title=title, figures=tuple(panels), provenance=provenance, summary=_GRADIENTS)


def _curves(found: Mapping[str, Any]) -> tuple[Panel, ...]:
    curve = found["curve"]
    bins = curve["nu_max"]
    rate = figures.learning_curves(
        {"R_ce": _points(bins[1:], curve["loss_rate"][1:])},
        title="Relative loss rate of the cross entropy",
        x_label="nu_max, cycles per image",
        y_label="R_ce",
        log=True,
    )
    share = figures.learning_curves(
        {"|share|": _points(bins, [abs(value) for value in curve["cross_entropy_share"]])},
        title="Cross entropy by frequency",
        x_label="max(|ny|, |nx|), cycles per image",
        y_label="share of the whole",
        log=True,
    )
    named = {"IoU": "truncated_iou", "boundary IoU": "truncated_boundary_iou"}
    low = figures.learning_curves(
        {name: _points(bins, _percents(curve[key])) for name, key in named.items() if key in curve},
        title="Truncated IoU",
        x_label="nu_max, cycles per image",
        y_label="mean IoU of the band, %",
    )
    fpi = figures.learning_curves(
        {
            each["model"]: [(row["grid"], row["fpi"] / 1e9) for row in each["rows"] if row["fpi"] is not None]
            for each in found["feature_truncation"]
        },
        title="Cost of a point of mIoU",
        x_label="grid, cells along an axis",
        y_label="GFLOPs / % mIoU",
    )
    return (
        Panel("What the band up to nu_max misses of the cross entropy.", rate),
        Panel("The cross entropy on each ring of frequencies; signs are dropped.", share),
        Panel("IoU when only the band is compared.", low),
        Panel("FPI of feature truncation with the foretold mIoU: the least is the best bargain.", fpi),
    )


def _grids(found: Mapping[str, Any]) -> Table:
    with_boundary = found["boundary_miou"] is not None
    columns = ("grid", "nu_max", "R_ce, %", "foretold drop of mIoU, %", "foretold mIoU, %", "truncated mIoU, %")
    names = ["loss_rate", "estimated_drop", "estimated_miou", "truncated_iou"]
    if with_boundary:
        columns, names = (*columns, "truncated boundary mIoU, %"), [*names, "truncated_boundary_iou"]
    rows = tuple((row["grid"], row["nu_max"], *(_percent(row[name]) for name in names)) for row in found["grids"])
    return Table("Grids", columns, rows, bar_column=2)


def _costs(each: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            row["grid"],
            _digits(row["decoder_flops"] / 1e9),
            _digits(row["flops"] / 1e9),
            _percent(row["estimated_miou"]),
            "–" if row["fpi"] is None else _digits(row["fpi"] / 1e9),
        )
        for row in each["rows"]
    )
    best = "" if each["best_grid"] is None else f", least FPI on {each['best_grid']} cells"
    title = f"Feature truncation: {each['model']}{best}"
    return Table(title, ("grid", "decoder, GFLOPs", "with encoder, GFLOPs", "mIoU, %", "FPI, GFLOPs / %"), rows)


def _classes(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = tuple((row["class"], _percent(row["iou"]), _percent(row["truncated_iou"])) for row in rows)
    return Table("IoU of each class, %", ("class", "IoU", "IoU of the highest band"), cells, bar_column=1, folded=True)


def _points(x: Sequence[float], y: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(a, float("nan") if b is None else b) for a, b in zip(x, y, strict=True)]


def _percents(values: Sequence[float | None]) -> list[float | None]:
    return [_percent(value) for value in values]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _digits(value: float) -> str:
    """Four of them: the small decoder's operations are a thousandth of the large one's."""
    return f"{value:.4g}"


def _left_out(num_rejects: int) -> str:
    return f"; {num_rejects} could not be used, see rejects.jsonl" if num_rejects else ""
