"""Cross entropy by frequency (METHOD 3; spectral analysis, theorem 1 and eq. 9-10)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dfa.core.spectrum import band_products, distance_from_zero, transform

VOID = 255


def one_hot(target_BHW: Tensor, *, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The annotation `B(t, c)`: B x C x H x W, zeros in every class where the target is 255.

    Raises:
        ValueError: a label that is neither a class nor 255.
    """
    target_BHW = target_BHW.long()
    bad = (target_BHW != VOID) & ((target_BHW < 0) | (target_BHW >= num_classes))
    if bool(bad.any()):
        found = int(target_BHW[bad][0])
        raise ValueError(f"target classes must be in [0, {num_classes - 1}] or {VOID}, got {found}")
    target_BHW = target_BHW.where(target_BHW != VOID, num_classes)
    return functional.one_hot(target_BHW, num_classes + 1)[..., :-1].movedim(-1, -3).to(dtype)


def cross_entropy_spectrum(logits_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
    """`L_ce(nu) = sum_c conj(b(nu, c)) yhat(nu, c)`, `Yhat = -log softmax(Y)`: complex B x H x W (theorem 1).

    Its sum over all frequencies is the summed cross entropy over the valid pixels of each image. `L_ce(-nu)` is its
    conjugate, and a number added to all logits of a pixel changes nothing. Differentiable. Orthonormal transforms, fp32 at
    least. Our reading of void: `B` is zero there, `Yhat` is what the model says.

    logits_BCHW: C classes, at the size of the target. target_BHW: 0..C-1, or 255 for void.
    """
    _check_sizes(logits_BCHW, target_BHW)
    surprise_BCHW = -torch.log_softmax(_at_least_single(logits_BCHW), dim=1)
    truth_BCHW = one_hot(target_BHW, num_classes=logits_BCHW.shape[1], dtype=surprise_BCHW.dtype)
    return (transform(truth_BCHW).conj() * transform(surprise_BCHW)).sum(1)


@dataclass(frozen=True)
class CrossEntropySums:
    """Truncated cross entropy of any number of images; the sums of two parts of a data set add up with `+`.

    band_K: `Lhat_ce(nu_max) = sum over |nx|, |ny| <= nu_max of L_ce(nu)` for nu_max = 0..K-1, summed over images, fp64
    (eq. 9). total: the cross entropy itself, summed over valid pixels. num_pixels: valid ones.

    Images of several sizes may be mixed: bins are cycles per image. The paper crops all to 513 x 513.
    """

    band_K: Tensor
    total: float
    num_pixels: int
    num_images: int

    def __add__(self, other: "CrossEntropySums") -> "CrossEntropySums":
        if self.band_K.shape != other.band_K.shape:
            raise ValueError(f"sums of {len(self.band_K)} and of {len(other.band_K)} bands do not add up")
        return CrossEntropySums(
            self.band_K + other.band_K,
            self.total + other.total,
            self.num_pixels + other.num_pixels,
            self.num_images + other.num_images,
        )

    def loss_rate(self) -> Tensor:
        """`R_ce(nu_max) = |1 - Lhat_ce(nu_max) / L_CE|` for nu_max = 0..K-1: fp64 (eq. 10).

        Over a data set: L_ce is averaged first, then one ratio. Neither monotone nor bounded by 1.
        """
        if not self.num_pixels:
            raise ValueError("no valid pixel was seen, there is no cross entropy to compare with")
        return (1 - self.band_K / self.total).abs()


def no_cross_entropy(nu_max: int) -> CrossEntropySums:
    """The sums of no image, for the bands 0..nu_max."""
    return CrossEntropySums(torch.zeros(nu_max + 1, dtype=torch.float64), 0.0, 0, 0)


@torch.no_grad()
def cross_entropy_sums(logits_BCHW: Tensor, target_BHW: Tensor, *, nu_max: int) -> CrossEntropySums:
    """The sums of a batch for the bands 0..nu_max. Only the classes of each image's annotation are transformed.

    logits_BCHW, target_BHW: as in `cross_entropy_spectrum`.
    """
    _check_sizes(logits_BCHW, target_BHW)
    sums = no_cross_entropy(nu_max)
    for logits_CHW, target_HW in zip(_at_least_single(logits_BCHW), target_BHW, strict=True):
        sums = sums + _of_one(logits_CHW, target_HW, nu_max)
    return sums


def _of_one(logits_CHW: Tensor, target_HW: Tensor, nu_max: int) -> CrossEntropySums:
    present = [label for label in target_HW.unique().tolist() if label != VOID]
    if present and not 0 <= present[0] <= present[-1] < len(logits_CHW):
        raise ValueError(f"target classes must be in [0, {len(logits_CHW) - 1}] or {VOID}, got {present}")
    partition_HW = torch.logsumexp(logits_CHW, dim=0)
    band_K, total, num_pixels = torch.zeros(nu_max + 1, dtype=torch.float64, device=logits_CHW.device), 0.0, 0
    for label in present:
        truth_HW, surprise_HW = target_HW == label, partition_HW - logits_CHW[label]
        band_K += band_products(truth_HW.to(surprise_HW.dtype), surprise_HW, nu_max=nu_max)
        total += float(surprise_HW[truth_HW].sum(dtype=torch.float64))
        num_pixels += int(truth_HW.sum())
    return CrossEntropySums(band_K.cpu(), total, num_pixels, 1)


def mean_magnitude(maps_BCHW: Tensor, *, nu_max: int) -> Tensor:
    """`|x(nu)|` averaged over images, classes and the frequencies of each ring `max(|nx|, |ny|) = k`, k = 0..nu_max: fp64.

    The profiles |b(nu)| and |yhat(nu)| of the paper's figure 1, which it divides by their maximum. nu_max at most half of the
    shorter side.
    """
    height, width = maps_BCHW.shape[-2:]
    if nu_max > min(height, width) // 2:
        raise ValueError(f"nu_max {nu_max} exceeds half of the shorter side of {height} x {width}")
    return ring_means(transform(maps_BCHW), nu_max=nu_max)


def ring_means(spectrum_BHW: Tensor, *, nu_max: int) -> Tensor:
    """`|x(nu)|` of spectra in fftfreq order, averaged over leading axes and each ring `max(|nx|, |ny|) = k`, k = 0..nu_max: fp64."""
    height, width = spectrum_BHW.shape[-2:]
    magnitude_HW = spectrum_BHW.abs().double().reshape(-1, height, width).mean(0)
    distances = (distance_from_zero(size, device=magnitude_HW.device) for size in (height, width))
    ring_P = torch.maximum(*torch.meshgrid(*distances, indexing="ij")).flatten()
    sums, counts = torch.bincount(ring_P, weights=magnitude_HW.flatten()), torch.bincount(ring_P)
    return (sums / counts)[: nu_max + 1].cpu()


def _check_sizes(logits_BCHW: Tensor, target_BHW: Tensor) -> None:
    if logits_BCHW.ndim != 4 or logits_BCHW.shape[:1] + logits_BCHW.shape[2:] != target_BHW.shape:
        raise ValueError(f"logits of shape {tuple(logits_BCHW.shape)} do not fit a target {tuple(target_BHW.shape)}")


def _at_least_single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
