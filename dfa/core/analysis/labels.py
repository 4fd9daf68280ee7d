"""Pairs of label maps, prediction and ground truth, by frequency: what streams over a data set of PNGs (METHOD 3).

A hard prediction has no logits. Our reading: it stands for the distribution that gives its own class `1 - epsilon` and every other
class `epsilon / (C - 1)`; a void prediction gives each class the latter. Then `Yhat_c = a - d S_c` with `a = -log(epsilon / (C - 1))`,
`d = a + log(1 - epsilon)` and `S_c` the one-hot prediction, and

    L_ce(nu) = a sqrt(HW) delta(nu) sum_c conj(b(0, c)) - d sum_c conj(b(nu, c)) s(nu, c),

so that the products of one-hot spectra, summed over images, serve cross entropy and IoU alike, and epsilon is chosen at the end.
"""

from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from dfa.core.analysis.cross_entropy import VOID, CrossEntropySums
from dfa.core.analysis.overlap import Overlap, boundary_labels, boundary_width
from dfa.core.spectrum import joint_runs, run_products

_VALUES = VOID + 1


@dataclass(frozen=True)
class LabelSums:
    """Sums over any number of pairs of label maps; those of two parts of a data set add up with `+`.

    band_CK: `sum over |nx|, |ny| <= nu_max of conj(b(nu, c)) s(nu, c)` for nu_max = 0..K-1, fp64. truth_C, prediction_C,
    common_C: pixels of each class in the ground truth, in the prediction, in both; int64, void pixels of the truth left out.
    """

    band_CK: Tensor
    truth_C: Tensor
    prediction_C: Tensor
    common_C: Tensor
    num_images: int

    def __add__(self, other: "LabelSums") -> "LabelSums":
        if self.band_CK.shape != other.band_CK.shape:
            shapes = tuple(self.band_CK.shape), tuple(other.band_CK.shape)
            raise ValueError(f"sums over (classes, bands) = {shapes[0]} and {shapes[1]} do not add up")
        return LabelSums(
            self.band_CK + other.band_CK,
            self.truth_C + other.truth_C,
            self.prediction_C + other.prediction_C,
            self.common_C + other.common_C,
            self.num_images + other.num_images,
        )

    def overlap(self) -> Overlap:
        """Per class; its `iou` is the usual one of the split. Truncated sums see what the low band spreads into void."""
        return Overlap((self.truth_C + self.prediction_C).double(), self.common_C.double(), self.band_CK)

    def mean_iou(self) -> float:
        """Mean over the classes that occur in the ground truth, as `dfa.core.metrics.mean_iou`."""
        return float(self.overlap().iou()[self.truth_C > 0].mean())

    def truncated_mean_iou(self) -> Tensor:
        """The same for each band, nu_max = 0..K-1."""
        return self.overlap().truncated_iou()[self.truth_C > 0].mean(0)

    def epsilon(self) -> float:
        """The error rate over valid pixels by Laplace's rule, `(wrong + 1) / (valid + 2)`: about the epsilon of the least CE."""
        valid, common = int(self.truth_C.sum()), int(self.common_C.sum())
        return (valid - common + 1) / (valid + 2)

    def cross_entropy(self, epsilon: float | None = None) -> CrossEntropySums:
        """Truncated cross entropy of the predictions as this module reads them; None takes `epsilon()`.

        R_ce depends on it mildly: `R_ce = d (p1 - p2) / L_CE`, and an overconfident epsilon makes d and L_CE grow together.
        """
        epsilon = self.epsilon() if epsilon is None else epsilon
        num_classes, valid = len(self.truth_C), int(self.truth_C.sum())
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must be above 0 and below 1, got {epsilon}")
        if num_classes < 2:
            raise ValueError(f"cross entropy needs at least two classes, got {num_classes}")
        other = -log(epsilon / (num_classes - 1))
        gain = other + log(1 - epsilon)
        total = other * valid - gain * float(self.common_C.sum())
        return CrossEntropySums(other * valid - gain * self.band_CK.sum(0), total, valid, self.num_images)


def no_labels(*, num_classes: int, nu_max: int) -> LabelSums:
    """The sums of no image. num_classes: background included."""
    if not 1 <= num_classes <= VOID:
        raise ValueError(f"num_classes must be in [1, {VOID}], got {num_classes}")
    band_CK = torch.zeros(num_classes, nu_max + 1, dtype=torch.float64)
    none_C = torch.zeros(num_classes, dtype=torch.int64)
    return LabelSums(band_CK, none_C, none_C.clone(), none_C.clone(), num_images=0)


@torch.no_grad()
def label_sums(
    prediction_HW: Tensor, truth_HW: Tensor, *, num_classes: int, nu_max: int, dtype: torch.dtype = torch.float32
) -> LabelSums:
    """The sums of one pair, uint8 maps of one size: 0 background, 1..C classes, 255 void in either.

    Only classes that both maps hold have spectra, made from runs of equal pixels (`run_products`). dtype: of the transforms;
    float32 holds R_ce to about 1e-6.

    Raises:
        ValueError: maps of two sizes or another type, or a value that is neither a class nor 255.
    """
    _check_pair(prediction_HW, truth_HW)
    return _sums_of(prediction_HW, truth_HW, num_classes=num_classes, nu_max=nu_max, dtype=dtype, counts_in_void=False)


@torch.no_grad()
def boundary_sums(
    prediction_HW: Tensor, truth_HW: Tensor, *, num_classes: int, nu_max: int, dtype: torch.dtype = torch.float32
) -> LabelSums:
    """`label_sums` of the boundary regions: its `overlap()` gives boundary IoU and its truncated form (eq. 33, 37).

    d is 2 % of the diagonal (`boundary_width`). Our reading of void: the prediction is void where the truth is before its
    boundary is found, so that a prediction that is right on every valid pixel scores 1.
    """
    _check_pair(prediction_HW, truth_HW)
    distance = boundary_width(*truth_HW.shape)
    prediction_HW = prediction_HW.masked_fill(truth_HW == VOID, VOID)
    prediction_HW, truth_HW = (boundary_labels(each, distance=distance) for each in (prediction_HW, truth_HW))
    return _sums_of(prediction_HW, truth_HW, num_classes=num_classes, nu_max=nu_max, dtype=dtype, counts_in_void=True)


def _sums_of(
    prediction_HW: Tensor, truth_HW: Tensor, *, num_classes: int, nu_max: int, dtype: torch.dtype, counts_in_void: bool
) -> LabelSums:
    runs, size = joint_runs(truth_HW, prediction_HW), (truth_HW.shape[0], truth_HW.shape[1])
    (label_R, found_R), length_R = runs.label_NR, (runs.stop_R - runs.start_R).astype(np.float64)
    truth_V, prediction_V, common_V, in_void_V = (
        np.bincount(labels_R, weights=pixels_R, minlength=_VALUES).astype(np.int64)
        for labels_R, pixels_R in (
            (label_R, length_R),
            (found_R, length_R),
            (label_R, length_R * (label_R == found_R)),
            (found_R, length_R * (label_R == VOID)),
        )
    )
    _check_values(truth_V, num_classes, "truth")
    _check_values(prediction_V, num_classes, "prediction")
    shared = np.flatnonzero((truth_V > 0) & (prediction_V > 0))
    shared = shared[shared < num_classes].tolist()
    band_CK = torch.zeros(num_classes, nu_max + 1, dtype=torch.float64)
    if shared:
        band_CK[shared] = run_products(runs, shared, size=size, nu_max=nu_max, dtype=dtype)
    counted_V = prediction_V if counts_in_void else prediction_V - in_void_V
    counts = (torch.from_numpy(each[:num_classes].copy()) for each in (truth_V, counted_V, common_V))
    return LabelSums(band_CK, *counts, num_images=1)


def _check_values(counts_V: np.ndarray, num_classes: int, name: str) -> None:
    if counts_V[num_classes:VOID].any():
        found = num_classes + int(np.flatnonzero(counts_V[num_classes:VOID])[0])
        raise ValueError(f"{name} classes must be in [0, {num_classes - 1}] or {VOID}, got {found}")


def _check_pair(prediction_HW: Tensor, truth_HW: Tensor) -> None:
    if prediction_HW.shape != truth_HW.shape or truth_HW.ndim != 2:
        shapes = tuple(prediction_HW.shape), tuple(truth_HW.shape)
        raise ValueError(f"prediction {shapes[0]} and truth {shapes[1]} must be maps of one size, (H, W)")
    if prediction_HW.dtype != torch.uint8 or truth_HW.dtype != torch.uint8:
        raise ValueError(f"label maps must be uint8, got {prediction_HW.dtype} and {truth_HW.dtype}")
