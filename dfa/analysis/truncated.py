"""A trained model on coarser grids, without training again: what R_ce foretells against what is lost (METHOD 3)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan, nan

import torch
from torch import Tensor

from dfa.core.analysis.cost import estimated_drop, spearman
from dfa.core.analysis.cross_entropy import cross_entropy_sums, no_cross_entropy
from dfa.core.analysis.truncation import resize_features
from dfa.core.metrics import confusion_matrix, mean_iou
from dfa.core.spectrum import bins_of

Forward = Callable[[Tensor, int], Tensor]
"""Images B x 3 x H x W and a grid -> logits B x (C + 1) x H x W of the model whose decoder works on a grid of so many cells
along the longer side; 0: on its own."""


@dataclass(frozen=True)
class GridOutcome:
    """One grid. loss_rate: R_ce of the whole model's logits at the grid's nu_max. features_miou: of the model with its decoder on
    the grid; outputs_miou: with its logits brought there and back, bilinearly. Drops are relative to the whole model's mIoU."""

    grid: int
    loss_rate: float
    features_miou: float
    outputs_miou: float
    features_drop: float
    outputs_drop: float

    @property
    def foretold_drop(self) -> float:
        """By the published line; NaN above its range."""
        return estimated_drop(self.loss_rate)


@dataclass(frozen=True)
class Observation:
    """miou: of the whole model. Outcomes by ascending grid."""

    miou: float
    num_images: int
    outcomes: tuple[GridOutcome, ...]

    def spearman_features(self) -> float:
        """Rank correlation over the grids of R_ce and the drop by truncated features."""
        return spearman([each.loss_rate for each in self.outcomes], [each.features_drop for each in self.outcomes])

    def spearman_outputs(self) -> float:
        """The same with truncated outputs."""
        return spearman([each.loss_rate for each in self.outcomes], [each.outputs_drop for each in self.outcomes])

    def mean_error(self) -> float:
        """Mean absolute difference of foretold and observed drop by truncated features, where the line holds; NaN where nowhere."""
        errors = [
            abs(each.foretold_drop - each.features_drop) for each in self.outcomes if not isnan(each.foretold_drop)
        ]
        return sum(errors) / len(errors) if errors else nan


@torch.no_grad()
def observe(
    batches: Iterable[tuple[Tensor, Tensor]], forward: Forward, *, grids: Sequence[int], num_classes: int
) -> Observation:
    """Run a model whole, with truncated features and with truncated outputs over (images, masks with 255).

    grids: cells along an axis, at least two different ones. num_classes: background included.

    Raises:
        ValueError: fewer than two grids, or a model that is never right.
    """
    grids = sorted(set(grids))
    if len(grids) < 2 or grids[0] < 1:
        raise ValueError(f"a correlation needs at least two different grids of at least one cell, got {grids}")
    sums = no_cross_entropy(max(map(bins_of, grids)))
    whole_CC = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    features_GCC, outputs_GCC = (torch.zeros(len(grids), num_classes, num_classes, dtype=torch.int64) for _ in range(2))
    for image_B3HW, mask_BHW in batches:
        logits_BCHW, size = forward(image_B3HW, 0), (mask_BHW.shape[1], mask_BHW.shape[2])
        sums = sums + cross_entropy_sums(logits_BCHW, mask_BHW, nu_max=len(sums.band_K) - 1)
        whole_CC += _confusion(logits_BCHW, mask_BHW)
        for number, grid in enumerate(grids):
            features_GCC[number] += _confusion(forward(image_B3HW, grid), mask_BHW)
            outputs = resize_features(resize_features(logits_BCHW, (grid, grid)), size)
            outputs_GCC[number] += _confusion(outputs, mask_BHW)
    miou, rate_K = mean_iou(whole_CC), sums.loss_rate()
    if not miou > 0:
        raise ValueError(f"the model's mIoU over {sums.num_images} images is {miou}: there is nothing to lose")
    outcomes = list[GridOutcome]()
    for number, grid in enumerate(grids):
        mious = mean_iou(features_GCC[number]), mean_iou(outputs_GCC[number])
        outcomes.append(GridOutcome(grid, float(rate_K[bins_of(grid)]), *mious, *(1 - each / miou for each in mious)))
    return Observation(miou, sums.num_images, tuple(outcomes))


def _confusion(logits_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
    return confusion_matrix(logits_BCHW.argmax(1), mask_BHW, num_classes=logits_BCHW.shape[1])
