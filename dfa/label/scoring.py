"""One image's class scores -> mask, confidence and additive counts: what the label factory does with every image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dfa.core.metrics import confusion_matrix, threshold_confusion
from dfa.core.void import label_dtype, void_label
from dfa.data.transforms import LabelArray, UInt8Array
from dfa.label.counts import Counts
from dfa.label.crf import CrfSettings, dense_crf
from dfa.label.pseudo import PseudoSettings, background_score

FloatArray = npt.NDArray[np.float32]

MODEL_EXTENSION = "model.png"  # of the member that keeps `ImageScores.model_HW`


@dataclass(frozen=True)
class ImageScores:
    """Scores of the classes that an image may show.

    score_KHW: float32, >= 0, row 0 the background; need not be normalised.
    class_ids: the mask value of each row, ascending from 0.
    model_HW: the mask that the trained model alone would give, to compare with; or None.
    """

    score_KHW: FloatArray
    class_ids: tuple[int, ...]
    model_HW: LabelArray | None = None


@dataclass(frozen=True)
class LabelSettings:
    """How scores become masks.

    num_classes: C.
    crf: None leaves the CRF out.
    sharpness: exponent on the scores before they are normalised to the unary; 1 takes them as probabilities up to a
        factor (our reading of "CAM + CRF").
    min_confidence: pixels whose winner is less probable become void; 0 for none.
    thresholds: background thresholds to sweep over the foreground rows, ascending; () for none.
    other_crfs: settings whose masks are counted too, and not kept.
    soft, confidence: also keep the probabilities of all rows, and of the winners, as 8-bit maps.
    skip_unlabelled: an image without image-level labels is rejected, not labelled all-background.
    """

    num_classes: int
    crf: CrfSettings | None
    sharpness: float
    min_confidence: float
    thresholds: tuple[float, ...]
    soft: bool = False
    confidence: bool = False
    skip_unlabelled: bool = False
    other_crfs: tuple[CrfSettings, ...] = ()

    def __post_init__(self) -> None:
        if self.sharpness <= 0 or not 0 <= self.min_confidence < 1:
            raise ValueError(f"sharpness must be > 0 and min_confidence in [0, 1), got {self}")


@dataclass(frozen=True)
class Tally:
    """Integer counts of any number of images; they add up.

    pixels_C: int64, pixels of each class in the masks (background first), void_pixels beside them. num_truth: images
    with a ground truth, which alone enter the confusion matrices (rows truth, columns prediction): sweep the seed under
    each threshold, argmax the scores as they are, mask the mask before its void band, other the mask of each of
    `other_crfs`. `sweep_TCC`, `argmax_CC`, `mask_CC` and `other_PCC` are these as int64 tensors.
    """

    num_images: int
    num_truth: int
    void_pixels: int
    pixels_C: Tensor
    argmax: Counts
    mask: Counts
    sweep: Counts
    other: Counts

    @staticmethod
    def zero(settings: LabelSettings) -> "Tally":
        """The tally of no image."""
        size = settings.num_classes + 1
        square = Counts.zero(size, size)
        several = (Counts.zero(len(each), size, size) for each in (settings.thresholds, settings.other_crfs))
        return Tally(0, 0, 0, torch.zeros(size, dtype=torch.int64), square, square, *several)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, name) + getattr(other, name) for name in Tally.__dataclass_fields__))

    @property
    def argmax_CC(self) -> Tensor:
        return self.argmax.dense()

    @property
    def mask_CC(self) -> Tensor:
        return self.mask.dense()

    @property
    def sweep_TCC(self) -> Tensor:
        return self.sweep.dense()

    @property
    def other_PCC(self) -> Tensor:
        return self.other.dense()


@dataclass(frozen=True)
class Agreement:
    """Shares of pixels, in [0, 1], on which two masks of one image agree; None where there is no model's mask.

    seed: argmax of the scores and the CRF's mask before its void band. model: the model's mask and the CRF's.
    seed_model: argmax of the scores and the model's mask.
    """

    seed: float
    model: float | None
    seed_model: float | None


@dataclass(frozen=True)
class LabelledImage:
    """mask_HW: 0..C and void. confidence: mean probability of the winners. tally: of this image alone.

    soft_KHW, confidence_HW: probabilities * 255, where the settings ask for them.
    """

    mask_HW: LabelArray
    confidence: float
    tally: Tally
    agreement: Agreement
    soft_KHW: UInt8Array | None = None
    confidence_HW: UInt8Array | None = None


def seed_scores(
    score_BMHW: Tensor, class_BM: Tensor, prompt_BHW: Tensor | None, settings: PseudoSettings
) -> list[ImageScores]:
    """Seeds of the present classes with the background's score before them.

    Args:
        score_BMHW: CAM in [0, 1] at pixel size. class_BM: index 1..C of each slot, 0 where unused.
        prompt_BHW: the background prompts' map, for ``settings.background == "prompts"``.
        settings: `background`, `threshold` and `gamma` are read. With a constant background the argmax is the CAM above
            that threshold; as a unary, a class's probability is its score's share of the sum (our reading).
    """
    background_B1HW = background_score(score_BMHW, prompt_BHW, settings)
    found = []
    for score_MHW, class_M, background_1HW in zip(score_BMHW, class_BM, background_B1HW, strict=True):
        used_M = class_M > 0
        rows_KHW = torch.cat([background_1HW, score_MHW[used_M].clamp_min(0)]).float().cpu().numpy()
        found.append(ImageScores(rows_KHW, (0, *(int(index) for index in class_M[used_M]))))
    return found


def model_scores(
    logits_BCHW: Tensor, *, min_probability: float, labels: Sequence[tuple[int, ...]] | None = None
) -> list[ImageScores]:
    """Softmax of a model's logits, without the classes that matter nowhere in the image.

    Kept are the background, every class that exceeds `min_probability` somewhere, and every class that wins a pixel: the
    argmax is that of all classes, while the CRF's time follows what the image shows.

    labels: the image-level labels (1..C) of each image: the softmax is over the background and these alone, all kept.
    """
    found = []
    for number, logits_CHW in enumerate(logits_BCHW):
        if labels is not None:
            ids = (0, *labels[number])
            found.append(ImageScores(logits_CHW[list(ids)].float().softmax(0).cpu().numpy(), ids))
            continue
        probability_CHW = logits_CHW.float().softmax(0)
        keep_C = probability_CHW.amax((1, 2)) > min_probability
        keep_C[probability_CHW.argmax(0).unique()] = True
        keep_C[0] = True
        ids = tuple(int(index) for index in keep_C.nonzero()[:, 0])
        found.append(ImageScores(probability_CHW[keep_C].cpu().numpy(), ids))
    return found


def label_image(
    image_HW3: UInt8Array, scores: ImageScores, truth_HW: LabelArray | None, settings: LabelSettings
) -> LabelledImage:
    """Scores -> CRF -> mask, and what there is to count.

    Args:
        image_HW3: RGB. truth_HW: ground truth of 0..C and void, or None.

    Raises:
        ValueError: sizes that do not fit.
    """
    void = void_label(settings.num_classes)
    ids_K = np.asarray(scores.class_ids, label_dtype(settings.num_classes))
    argmax_HW = ids_K[scores.score_KHW.argmax(0)]  # ties go to the background, then to the lower class
    unary_KHW = scores.score_KHW if settings.sharpness == 1 else scores.score_KHW**settings.sharpness
    unary_KHW = unary_KHW / unary_KHW.sum(0).clip(1e-12)
    probability_KHW = unary_KHW if settings.crf is None else dense_crf(image_HW3, unary_KHW, settings.crf)
    mask_HW, best_HW = ids_K[probability_KHW.argmax(0)], probability_KHW.max(0)
    confusions = _confusions(scores, argmax_HW, mask_HW, truth_HW, settings)
    final_HW = np.where(best_HW < settings.min_confidence, ids_K.dtype.type(void), mask_HW)
    pixels = torch.from_numpy(np.bincount(final_HW.reshape(-1), minlength=void + 1))
    tally = Tally(
        1,
        int(truth_HW is not None),
        int(pixels[void]),
        pixels[: settings.num_classes + 1],
        *confusions,
        _other_confusions(image_HW3, unary_KHW, ids_K, truth_HW, settings),
    )
    return LabelledImage(
        final_HW,
        float(best_HW.mean()),
        tally,
        _agreement(argmax_HW, mask_HW, scores.model_HW),
        _eight_bits(probability_KHW) if settings.soft else None,
        _eight_bits(best_HW) if settings.confidence else None,
    )


def _eight_bits(probability: np.ndarray) -> UInt8Array:
    return np.rint(probability * 255).clip(0, 255).astype(np.uint8)


def _agreement(argmax_HW: LabelArray, mask_HW: LabelArray, model_HW: LabelArray | None) -> Agreement:
    seed = float((argmax_HW == mask_HW).mean())
    if model_HW is None:
        return Agreement(seed, None, None)
    return Agreement(seed, float((model_HW == mask_HW).mean()), float((model_HW == argmax_HW).mean()))


def _confusions(
    scores: ImageScores,
    argmax_HW: LabelArray,
    mask_HW: LabelArray,
    truth_HW: LabelArray | None,
    settings: LabelSettings,
) -> tuple[Counts, Counts, Counts]:
    if truth_HW is None:
        zero = Tally.zero(settings)
        return zero.argmax, zero.mask, zero.sweep
    truth, size = torch.from_numpy(truth_HW.astype(np.int64)), settings.num_classes + 1
    argmax, mask = (
        Counts.of(confusion_matrix(torch.from_numpy(label_HW.astype(np.int64)), truth, num_classes=size))
        for label_HW in (argmax_HW, mask_HW)
    )
    return argmax, mask, sweep_confusion(scores, truth_HW, settings.thresholds, num_classes=settings.num_classes)


def _other_confusions(
    image_HW3: UInt8Array,
    unary_KHW: FloatArray,
    ids_K: LabelArray,
    truth_HW: LabelArray | None,
    settings: LabelSettings,
) -> Counts:
    """Confusion of the masks of `other_crfs`, (P, C + 1, C + 1); without a ground truth no CRF is run for it."""
    size, found = settings.num_classes + 1, Tally.zero(settings).other
    if truth_HW is None:
        return found
    truth = torch.from_numpy(truth_HW.astype(np.int64))
    for place, crf in enumerate(settings.other_crfs):
        mask_HW = ids_K[dense_crf(image_HW3, unary_KHW, crf).argmax(0)]
        one = Counts.of(confusion_matrix(torch.from_numpy(mask_HW.astype(np.int64)), truth, num_classes=size))
        found += Counts(found.shape, one.place_E + place * size**2, one.value_E)
    return found


def sweep_confusion(
    scores: ImageScores, truth_HW: LabelArray, thresholds: Sequence[float], *, num_classes: int
) -> Counts:
    """`dfa.core.metrics.threshold_confusion` of the foreground rows: (thresholds, C + 1, C + 1), background first.

    Only the classes of the image or of its ground truth are counted with, so C costs nothing.
    """
    shape, void = (len(thresholds), num_classes + 1, num_classes + 1), void_label(num_classes)
    if not thresholds:
        return Counts.zero(*shape)
    in_truth = {int(index) for index in np.unique(truth_HW)} - {0, void}
    classes = sorted({*scores.class_ids[1:], *in_truth}) or [1]
    map_MHW = np.zeros((len(classes), *truth_HW.shape), np.float32)
    for row_HW, index in zip(scores.score_KHW[1:], scores.class_ids[1:], strict=True):
        map_MHW[classes.index(index)] = row_HW
    compact = np.zeros(void + 1, np.int64)
    compact[classes], compact[void] = range(1, len(classes) + 1), void_label(len(classes))
    compact_TKK = threshold_confusion(
        torch.from_numpy(map_MHW), torch.from_numpy(compact[truth_HW]), thresholds=thresholds
    )
    ids_K = np.array([0, *classes])
    threshold_N, row_N, column_N = (axis.numpy() for axis in compact_TKK.nonzero(as_tuple=True))
    place_E = np.ravel_multi_index((threshold_N, ids_K[row_N], ids_K[column_N]), shape)
    return Counts(shape, place_E, compact_TKK.numpy()[threshold_N, row_N, column_N])
