"""Numbers of an analysis from its sums: one ratio over the whole data set each, never a mean over images (METHOD 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch

from dfa.analysis.sums import PairSums
from dfa.core.analysis.cost import DROP_LIMIT, best_grid, estimated_drop, flops_per_iou, recommended_grid
from dfa.core.analysis.labels import LabelSums
from dfa.core.spectrum import bins_of, grid_of


@dataclass(frozen=True)
class TruncationCosts:
    """Operations of a model, for one image, whose decoder works on one grid or another.

    decoder: by grid (cells along an axis), full_grid among them: where the decoder works without truncation.
    """

    name: str
    encoder: float
    decoder: Mapping[int, float]
    full_grid: int


def summarise(
    sums: PairSums,
    *,
    class_names: Sequence[str],
    grids: Sequence[int],
    max_drop: float,
    epsilon: float | None,
    costs: Sequence[TruncationCosts],
) -> dict[str, Any]:
    """All numbers, ready for JSON; None where a number does not exist.

    class_names: background first. grids: for the tables, cells along an axis. max_drop: of mIoU, relative, that the recommended
    grid may cost as the published line foretells it. epsilon: see `dfa.core.analysis.labels`, None for its own.

    Raises:
        ValueError: no valid pixel was seen.
    """
    cross_entropy = sums.cross_entropy(epsilon)
    rate_K, num_pixels = cross_entropy.loss_rate(), cross_entropy.num_pixels
    nu_max = len(rate_K) - 1
    is_logits = sums.logits.num_images > 0
    used = sums.labels.epsilon() if epsilon is None else epsilon
    ring_K = torch.diff(cross_entropy.band_K, prepend=cross_entropy.band_K.new_zeros(1)) / cross_entropy.total
    truncated = {"iou": sums.labels.truncated_mean_iou()}
    if sums.boundary is not None:
        truncated["boundary_iou"] = sums.boundary.truncated_mean_iou()
    rates = {grid_of(bins): float(rate_K[bins]) for bins in range(1, nu_max + 1)}
    miou = sums.labels.mean_iou()
    return {
        "num_pairs": sums.labels.num_images,
        "num_rejects": len(sums.rejects),
        "predictions": "logits" if is_logits else "label maps",
        "epsilon": None if is_logits else used,
        "num_pixels": num_pixels,
        "miou": miou,
        "boundary_miou": None if sums.boundary is None else _number(sums.boundary.mean_iou()),
        "cross_entropy": cross_entropy.total / num_pixels,
        "curve": {
            "nu_max": list(range(nu_max + 1)),
            "grid": [grid_of(bins) for bins in range(nu_max + 1)],
            "cross_entropy_share": ring_K.tolist(),
            "truncated_cross_entropy": (cross_entropy.band_K / num_pixels).tolist(),
            "loss_rate": rate_K.tolist(),
            **{f"truncated_{name}": [_number(value) for value in curve.tolist()] for name, curve in truncated.items()},
        },
        "grids": [_grid_row(grid, rates, truncated, miou) for grid in sorted(grids, reverse=True) if grid in rates],
        "recommended_grid": recommended_grid(rates, max_drop=max_drop),
        "rule": (
            f"the smallest grid from which on up to {grid_of(nu_max)} cells R_ce foretells a relative drop of mIoU of at most"
            f" {max_drop:g} (0.6725 R + 0.0022 below R = {DROP_LIMIT:g})"
        ),
        "feature_truncation": [_truncation(each, rates, miou) for each in costs],
        "per_class": _per_class(sums.labels, class_names),
    }


def _grid_row(
    grid: int, rates: Mapping[int, float], truncated: Mapping[str, torch.Tensor], miou: float
) -> dict[str, Any]:
    bins, drop = bins_of(grid), estimated_drop(rates[grid])
    row = {"grid": grid, "nu_max": bins, "loss_rate": rates[grid], "estimated_drop": _number(drop)}
    row["estimated_miou"] = _number(miou * (1 - drop))
    return row | {f"truncated_{name}": _number(float(curve[bins])) for name, curve in truncated.items()}


def _truncation(costs: TruncationCosts, rates: Mapping[int, float], miou: float) -> dict[str, Any]:
    """mIoU of the full grid is the measured one; of smaller ones it is foretold, relative to that."""
    rows, flops, foretold = list[dict[str, Any]](), dict[int, float](), dict[int, float]()
    for grid in sorted(costs.decoder, reverse=True):
        drop = 0.0 if grid == costs.full_grid else estimated_drop(rates[grid]) if grid in rates else float("nan")
        total = costs.encoder + costs.decoder[grid]
        row: dict[str, Any] = {"grid": grid, "decoder_flops": costs.decoder[grid], "flops": total}
        if isnan(drop) or not miou > 0:
            rows.append(row | {"estimated_miou": None, "fpi": None})
            continue
        flops[grid], foretold[grid] = total, miou * (1 - drop)
        rows.append(row | {"estimated_miou": foretold[grid], "fpi": flops_per_iou(total, 100 * foretold[grid])})
    best = best_grid(flops, foretold) if flops else None
    return {
        "model": costs.name,
        "encoder_flops": costs.encoder,
        "full_grid": costs.full_grid,
        "rows": rows,
        "best_grid": best,
    }


def _per_class(labels: LabelSums, class_names: Sequence[str]) -> list[dict[str, Any]]:
    overlap = labels.overlap()
    iou_C, low_C = overlap.iou(), overlap.truncated_iou()[:, -1]
    return [
        {
            "class": name,
            "iou": _number(float(iou)) if pixels else None,
            "truncated_iou": _number(float(low)) if pixels else None,
            "truth_pixels": pixels,
        }
        for name, iou, low, pixels in zip(class_names, iou_C, low_C, labels.truth_C.tolist(), strict=True)
    ]


def _number(value: float) -> float | None:
    return None if isnan(value) else value
