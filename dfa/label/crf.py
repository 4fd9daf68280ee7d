"""The one door to pydensecrf: a fully connected CRF that snaps class probabilities to the image's edges."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from pydensecrf.densecrf import DenseCRF2D

from dfa.core.void import MAX_CLASSES, label_dtype

# The library counts with 32-bit integers; its bilateral lattice holds six vertices a pixel.
_MAX_CELLS = 2**31 - 1
_LATTICE_VERTICES = 6


@dataclass(frozen=True)
class CrfSettings:
    """A mean-field CRF with two Potts terms (METHOD 1.22).

    iterations: mean-field updates; 0 returns the clipped, normalised input.
    gaussian_sxy, gaussian_weight: smoothness; standard deviation in pixels.
    bilateral_sxy, bilateral_srgb, bilateral_weight: appearance; standard deviations in pixels and in grey levels
        (0..255).
    min_probability: probabilities are clipped from below before the logarithm, so a class is never impossible.
    """

    iterations: int
    gaussian_sxy: float
    gaussian_weight: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_weight: float
    min_probability: float = 1e-5

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"CRF iterations must be >= 0, got {self.iterations}")
        if min(self.gaussian_sxy, self.bilateral_sxy, self.bilateral_srgb) <= 0:
            raise ValueError(f"CRF standard deviations must be > 0, got {self}")
        if min(self.gaussian_weight, self.bilateral_weight) < 0:
            raise ValueError(f"CRF weights must be >= 0, got {self}")
        if not 0 < self.min_probability < 1:
            raise ValueError(f"CRF min_probability must be in (0, 1), got {self.min_probability}")


PRESETS = MappingProxyType(
    {
        "deeplab": CrfSettings(10, 1, 3, 67, 3, 4),
        "smooth": CrfSettings(10, 3, 3, 64, 5, 4),
        "wide": CrfSettings(10, 1, 1, 121, 5, 4),
    }
)
"""The published settings of METHOD 1.22 (the names are ours); "deeplab" is the default of this field and of DFA."""


def dense_crf(image_HW3: np.ndarray, probability_KHW: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """Refine class probabilities with a fully connected CRF.

    Mean field for ``E(x) = sum_i -log p_i(x_i) + sum_{i<j} [x_i != x_j] k(i, j)``,
    ``k = w_g exp(-|P_i-P_j|^2 / 2 s_g^2) + w_b exp(-|P_i-P_j|^2 / 2 s_xy^2 - |I_i-I_j|^2 / 2 s_rgb^2)``, each kernel
    symmetrically normalised: ``k(i,j) / sqrt(sum_l k(i,l) sum_l k(j,l))``. Source: Krähenbühl and Koltun, "Efficient
    Inference in Fully Connected CRFs", NIPS 2011, eqs. 1-4 and algorithm 1. The library sums over a permutohedral
    lattice, hence approximately, and keeps each pixel's message to itself. The time grows with K and the pixels: hand
    over the present classes and the background only.

    Args:
        image_HW3: uint8 RGB.
        probability_KHW: real, >= 0, finite; need not be normalised (it is, after clipping).
        settings: e.g. ``PRESETS["deeplab"]``.

    Returns:
        (K, H, W) float32 probabilities, new memory; all ones for K = 1.

    Raises:
        ValueError: types or sizes that do not fit, no class, an empty image, values that are negative or not finite,
            or an image beyond the library's 32-bit counts.
    """
    _check(image_HW3, probability_KHW)
    num_classes, height, width = probability_KHW.shape
    if num_classes == 1:
        return np.ones((1, height, width), np.float32)
    unary = np.maximum(probability_KHW, settings.min_probability, dtype=np.float32)
    unary /= unary.sum(axis=0)
    energy = -np.log(unary, out=unary)
    field = DenseCRF2D(width, height, num_classes)
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(num_classes, -1)))
    if settings.gaussian_weight:
        field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_weight)
    if settings.bilateral_weight:
        field.addPairwiseBilateral(
            sxy=settings.bilateral_sxy,
            srgb=settings.bilateral_srgb,
            rgbim=np.require(image_HW3, requirements=["C", "W"]),  # the library refuses read-only memory, as PIL's is
            compat=settings.bilateral_weight,
        )
    return np.array(field.inference(settings.iterations), np.float32).reshape(num_classes, height, width)


def crf_labels(
    image_HW3: np.ndarray, probability_KHW: np.ndarray, class_ids: Sequence[int], settings: CrfSettings
) -> np.ndarray:
    """The CRF's most probable class as a mask: (H, W) of ``class_ids``, uint8 or, where one is above 254, uint16.

    Args:
        probability_KHW: background and present classes only.
        class_ids: the mask value of each of the K rows, e.g. ``(0, 7, 15)``.

    Raises:
        ValueError: as :func:`dense_crf`, and class ids that are repeated, out of range or not K.
    """
    ids = np.asarray(class_ids, np.int64)
    if ids.shape != (len(probability_KHW),) or len(set(ids.tolist())) != len(ids):
        raise ValueError(f"expected {len(probability_KHW)} distinct class ids, one a row, got {list(class_ids)}")
    if ids.size and not 0 <= ids.min() <= ids.max() <= MAX_CLASSES:
        raise ValueError(f"class ids of a mask must be in 0..{MAX_CLASSES}, got {list(class_ids)}")
    return ids.astype(label_dtype(int(ids.max(initial=0))))[
        dense_crf(image_HW3, probability_KHW, settings).argmax(axis=0)
    ]


def _check(image_HW3: np.ndarray, probability_KHW: np.ndarray) -> None:
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
        raise ValueError(f"CRF image must be (H, W, 3) uint8, got {image_HW3.shape} {image_HW3.dtype}")
    if probability_KHW.ndim != 3 or probability_KHW.shape[1:] != image_HW3.shape[:2]:
        raise ValueError(
            f"CRF probabilities {probability_KHW.shape} (K, H, W) do not fit the image {image_HW3.shape} (H, W, 3)"
        )
    if 0 in probability_KHW.shape:
        raise ValueError(f"CRF needs at least one class and one pixel, got probabilities {probability_KHW.shape}")
    num_classes, height, width = probability_KHW.shape
    if height * width * max(num_classes, _LATTICE_VERTICES) > _MAX_CELLS:
        raise ValueError(
            f"CRF on {width} x {height} pixels and {num_classes} classes exceeds the library's 32-bit counts"
        )
    if not np.isfinite(probability_KHW).all() or probability_KHW.min() < 0:
        raise ValueError("CRF probabilities must be finite and >= 0")
