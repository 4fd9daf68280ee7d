"""Intersection over union by frequency (METHOD 3; spectral analysis, eq. 23-29), and boundaries (eq. 33)."""

from dataclasses import dataclass
from math import hypot

import torch
from torch import Tensor

from dfa.core.analysis.cross_entropy import VOID

_BOUNDARY_SHARE = 0.02


@dataclass(frozen=True)
class Overlap:
    """What IoU is made of, per class and whatever leading axes; sums over images add up before the ratios are taken.

    both: `c = sqrt(HW) (s(0) + b(0))`, the two areas together. common: `p1 = sum over nu of s(nu) conj(b(nu))`, the common
    area. band_K: `p2(nu_max)`, the same sum over `|nx|, |ny| <= nu_max`, nu_max = 0..K-1 on the last axis. All fp64.
    """

    both: Tensor
    common: Tensor
    band_K: Tensor

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.both + other.both, self.common + other.common, self.band_K + other.band_K)

    def iou(self) -> Tensor:
        """`IoU = 1 / (c / p1 - 1)` (eq. 25), exact for soft masks in [0, 1] too; NaN where neither mask has area."""
        return _iou(self.both, self.common)

    def truncated_iou(self) -> Tensor:
        """`IoU(nu_max) = 1 / (c / p2 - 1)` on the last axis (eq. 27)."""
        return _iou(self.both[..., None], self.band_K)

    def relative_drop(self) -> Tensor:
        """`(IoU - IoU(nu_max)) / IoU = c / (c - p2) (p1 - p2) / p1` on the last axis (eq. 29)."""
        both, common = self.both[..., None], self.common[..., None]
        return both / (both - self.band_K) * (common - self.band_K) / common


def _iou(both: Tensor, common: Tensor) -> Tensor:
    # The same as 1 / (c / p - 1), and 0 instead of a division where nothing is in common.
    return common / (both - common)


def boundary_width(height: int, width: int) -> int:
    """d: 2 % of the diagonal, rounded, at least one pixel (Cheng et al. 2021).

    >>> boundary_width(375, 500)
    12
    """
    return max(1, round(_BOUNDARY_SHARE * hypot(height, width)))


def boundary_pixels(label_HW: Tensor, *, distance: int) -> Tensor:
    """Pixels within `distance` of another label or of the image's edge: bool HW, for all classes of a map at once.

    Per class the pixels that `distance` erosions by a 3 x 3 square take off (Cheng et al. 2021, eq. 1), the image's outside
    being no part of any mask. Void (255) is a label like any other. Cost does not depend on the distance.
    """
    if distance < 1:
        raise ValueError(f"the distance must be at least 1 pixel, got {distance}")
    height, width = label_HW.shape
    down_HW = torch.zeros(height, width, dtype=torch.int32, device=label_HW.device)
    right_HW = down_HW.clone()
    down_HW[:-1] = label_HW[1:] != label_HW[:-1]
    right_HW[:, :-1] = label_HW[:, 1:] != label_HW[:, :-1]
    # A window is of one label where no two neighbours inside it differ; its last row and column have none below, to the right.
    different_HW = _window_sums(down_HW, distance, below=distance - 1, right=distance)
    different_HW += _window_sums(right_HW, distance, below=distance, right=distance - 1)
    near_HW = different_HW > 0
    edge_HW = torch.ones_like(near_HW)
    edge_HW[distance : height - distance, distance : width - distance] = False
    return near_HW | edge_HW


def _window_sums(x_HW: Tensor, distance: int, *, below: int, right: int) -> Tensor:
    """Sums over rows y - distance .. y + below and columns x - distance .. x + right, clipped at the ends."""
    for axis, after in ((0, below), (1, right)):
        size = x_HW.shape[axis]
        place = torch.arange(size, device=x_HW.device)
        running_HW = x_HW.cumsum(axis, dtype=torch.int32)
        running_HW = torch.cat([torch.zeros_like(running_HW.narrow(axis, 0, 1)), running_HW], dim=axis)
        stop, start = (place + after + 1).clamp_max(size), (place - distance).clamp_min(0)
        x_HW = running_HW.index_select(axis, stop) - running_HW.index_select(axis, start)
    return x_HW


def boundary_labels(label_HW: Tensor, *, distance: int) -> Tensor:
    """The map with 255 everywhere but in its boundary region: `B cap B_d` of every class (eq. 33)."""
    return label_HW.masked_fill(~boundary_pixels(label_HW, distance=distance), VOID)
