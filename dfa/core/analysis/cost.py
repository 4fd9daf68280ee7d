"""What a grid costs in operations and in mIoU, and which one to take (METHOD 3; spectral analysis, 3.2).

Operations are floating-point ones, two per multiply-add; biases, norms and resizing are left out.
"""

from collections.abc import Mapping, Sequence
from math import nan

import torch

DROP_SLOPE, DROP_OFFSET, DROP_LIMIT = 0.6725, 0.0022, 0.2
"""The published line from R_ce to the relative drop of mIoU, and up to which R_ce it was fitted (figure 5b)."""


def deeplab_decoder_macs(num_classes: int) -> int:
    """Multiply-adds per cell of DeepLabv3+'s decoder: 256 low-level channels to 48, 304 to 256 and 256 to 256 by 3 x 3, then classes.

    Chen et al. 2018; with 7 classes and a grid of 129 x 129 this makes the 43.4 GFLOPs of the spectral analysis, appendix A.1.
    """
    return 256 * 48 + 9 * 304 * 256 + 9 * 256 * 256 + 256 * num_classes


def deeplab_decoder_parameters(num_classes: int) -> int:
    """Its weights: three batch norms of two numbers a channel, one bias at the end. 1.305 million with 7 classes."""
    return deeplab_decoder_macs(num_classes) + 2 * (48 + 256 + 256) + num_classes


def deeplab_decoder_flops(grid: int, *, num_classes: int) -> int:
    """On a grid of `grid` x `grid` cells.

    >>> round(deeplab_decoder_flops(129, num_classes=7) / 1e9, 2)
    43.41
    """
    return 2 * grid**2 * deeplab_decoder_macs(num_classes)


def vit_flops(num_patches: int, *, patch_size: int, width: int, layers: int, mlp_ratio: float) -> float:
    """A ViT's tower on one image: patch embedding, then each block's four projections, its two products of attention over
    patches and class token, and its MLP.

    >>> round(vit_flops(196, patch_size=16, width=768, layers=12, mlp_ratio=4.0) / 1e9, 1)
    35.1
    """
    tokens = num_patches + 1
    block = tokens * width**2 * (4 + 2 * mlp_ratio) + 2 * tokens**2 * width
    return 2 * (num_patches * 3 * patch_size**2 * width + layers * block)


def truncated_flops(encoder: float, decoder: float, *, grid: int, full_grid: int) -> float:
    """`encoder + decoder (grid / full_grid)^2`: what the paper's table 2 counts for convolutional decoders."""
    return encoder + decoder * (grid / full_grid) ** 2


def estimated_drop(loss_rate: float) -> float:
    """The relative drop of mIoU that R_ce foretells, `0.6725 R + 0.0022`; NaN from R = 0.2 on, where no line was fitted."""
    return DROP_SLOPE * loss_rate + DROP_OFFSET if loss_rate < DROP_LIMIT else nan


def flops_per_iou(flops: float, miou: float) -> float:
    """FPI: floating-point operations per point of mIoU (3.2); the lower the better."""
    if not miou > 0:
        raise ValueError(f"FPI needs a mIoU above 0, got {miou}")
    return flops / miou


def best_grid(flops: Mapping[int, float], miou: Mapping[int, float]) -> int:
    """The LRG of the least FPI; the larger one on a tie. Both map the same grids to FLOPs and to mIoU, measured or foretold."""
    if not flops or flops.keys() != miou.keys():
        raise ValueError(f"FLOPs of the grids {sorted(flops)} and mIoU of {sorted(miou)} do not fit together")
    return min(sorted(flops, reverse=True), key=lambda grid: flops_per_iou(flops[grid], miou[grid]))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation: Pearson's of the ranks, ties with their mean rank; NaN where either is constant.

    Raises:
        ValueError: lengths that differ, or fewer than two points.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"a rank correlation needs two equally long lists of at least two numbers, got {len(x)} and {len(y)}"
        )
    ranks_2P = torch.stack([_ranks(each) for each in (x, y)])
    centred_2P = ranks_2P - ranks_2P.mean(1, keepdim=True)
    spread = float(centred_2P.square().sum(1).prod().sqrt())
    return float(centred_2P.prod(0).sum()) / spread if spread else nan


def _ranks(values: Sequence[float]) -> torch.Tensor:
    value_P = torch.tensor(values, dtype=torch.float64)
    below_P, equal_P = (compare(value_P[None, :], value_P[:, None]).sum(1) for compare in (torch.lt, torch.eq))
    return below_P.double() + (equal_P.double() + 1) / 2


def recommended_grid(loss_rates: Mapping[int, float], *, max_drop: float) -> int | None:
    """The smallest LRG that costs at most `max_drop` of the mIoU, foretold by `estimated_drop`; None where none does.

    loss_rates: R_ce of each LRG considered. R_ce is not monotone, so every larger grid must pass as well.
    """
    chosen = None
    for grid in sorted(loss_rates, reverse=True):
        if not estimated_drop(loss_rates[grid]) <= max_drop:
            break
        chosen = grid
    return chosen
