"""What labels should be, without the product: pydensecrf as its own documentation uses it, NumPy, and loops."""

from collections.abc import Iterable, Sequence

import numpy as np
from pydensecrf.densecrf import DenseCRF2D

VOID = 255


def library_crf(image_HW3: np.ndarray, probability_KHW: np.ndarray, settings) -> np.ndarray:
    """Probabilities by pydensecrf alone. settings: an object with the numbers of the CRF."""
    num_classes, height, width = probability_KHW.shape
    if num_classes == 1:
        return np.ones((1, height, width), np.float32)
    field = DenseCRF2D(width, height, num_classes)
    probability = np.clip(probability_KHW, settings.min_probability, None).astype(np.float32)
    energy = -np.log(probability / probability.sum(0))
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(num_classes, -1)))
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=image_HW3.copy(),
        compat=settings.bilateral_weight,
    )
    return np.array(field.inference(settings.iterations)).reshape(probability.shape)


def refined(image_HW3: np.ndarray, score_KHW: np.ndarray, settings) -> np.ndarray:
    """The CRF's probabilities of scores, which count by their share of the sum."""
    return library_crf(image_HW3, score_KHW / score_KHW.sum(0), settings)


def mask_of(probability_KHW: np.ndarray, class_ids: Sequence[int], min_confidence: float = 0.0) -> np.ndarray:
    """The most probable class of each pixel, void where it is less probable than `min_confidence`."""
    mask_HW = np.array(class_ids, np.uint8)[probability_KHW.argmax(0)]
    return np.where(probability_KHW.max(0) < min_confidence, np.uint8(VOID), mask_HW)


def confusion(pairs: Iterable[tuple[np.ndarray, np.ndarray]], num_classes: int, void: int = VOID) -> np.ndarray:
    """Pixels by truth (rows) and prediction (columns) of pairs (truth, prediction), pixel after pixel."""
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for truth_HW, mask_HW in pairs:
        for truth, found in zip(truth_HW.ravel().tolist(), mask_HW.ravel().tolist(), strict=True):
            if truth != void:
                counts[truth, found] += 1
    return counts
