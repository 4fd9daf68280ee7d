"""Mean intersection over union from one additive integer confusion matrix (METHOD section 5).

Confusion matrices are int64, rows the ground truth, columns the prediction, so those of batches, shards or ranks add up to that
of the split. Classes are 0 background, 1..C foreground; void in the ground truth (255, or 65535 where classes need that number) is
dropped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfa.core.void import MAX_CLASSES, void_label


def confusion_matrix(prediction: Tensor, target: Tensor, *, num_classes: int) -> Tensor:
    """Counts pixels: (num_classes, num_classes) int64. Both arguments are integer tensors of one shape, any number of axes.

    num_classes: background included. Raises ValueError where the ground truth is neither a class nor void, or where the
    prediction of a counted pixel is no class.

    >>> confusion_matrix(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 255]), num_classes=2)
    tensor([[1, 1],
            [0, 1]])
    """
    if not 1 <= num_classes <= MAX_CLASSES + 1:
        raise ValueError(f"num_classes must be in [1, {MAX_CLASSES + 1}], got {num_classes}")
    _check_same_shape(prediction, target)
    target_P, counted_P = _counted_target(target, num_classes)
    prediction_P = _integer(prediction, "prediction").reshape(-1)[counted_P]
    _check_range(prediction_P, num_classes, "prediction")
    pair_P = target_P * num_classes + prediction_P
    return torch.bincount(pair_P, minlength=num_classes**2).view(num_classes, num_classes)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Intersection over union per class, float64; NaN where a class is neither in the ground truth nor predicted.

    confusion: (..., classes, classes); leading axes, such as thresholds, are kept.
    """
    confusion = confusion.to(torch.int64)
    intersection = confusion.diagonal(dim1=-2, dim2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - intersection
    return intersection.double() / union.double()


def mean_iou(confusion: Tensor) -> float:
    """Mean of `iou_per_class` over the classes that occur in the ground truth, background included; NaN if there is none."""
    return float(_mean_over_occurring(confusion))


def threshold_confusion(score_BCHW: Tensor, target_BHW: Tensor, *, thresholds: Sequence[float]) -> Tensor:
    """Confusion matrices of a seed under every background threshold at once: (thresholds, C + 1, C + 1) int64, additive.

    score_BCHW: foreground maps, channel c-1 of class c (absent classes at 0); CHW with target HW works too. A pixel is its strongest
    class where that score is above the threshold, else background: the argmax beside a constant background map, whose ties go to
    background. thresholds: strictly ascending. One histogram over (truth, strongest class, thresholds passed) serves all of them.
    """
    if score_BCHW.ndim not in (3, 4) or score_BCHW.shape[-2:] != target_BHW.shape[-2:]:
        raise ValueError(
            f"scores must be (B, C, H, W) or (C, H, W) and the target of the same H and W,"
            f" got {tuple(score_BCHW.shape)} and {tuple(target_BHW.shape)}"
        )
    limits_T = torch.tensor(list(thresholds), dtype=torch.float64)
    if len(limits_T) == 0 or not bool((limits_T.diff() > 0).all()):
        raise ValueError(f"thresholds must be strictly ascending, got {list(thresholds)}")
    best_BHW, winner_BHW = score_BCHW.detach().max(dim=-3)
    _check_same_shape(best_BHW, target_BHW)
    if bool(best_BHW.isnan().any()):
        raise ValueError("scores must not be NaN")
    num_foreground, num_buckets = score_BCHW.shape[-3], len(limits_T) + 1
    target_P, counted_P = _counted_target(target_BHW, num_foreground + 1)
    winner_P, best_P = winner_BHW.reshape(-1)[counted_P], best_BHW.reshape(-1)[counted_P]
    # In the scores' own precision, or a score equal to a threshold such as .3 would count as above it.
    bucket_P = torch.searchsorted(limits_T.to(best_P.dtype).to(best_P.device), best_P)
    shape = (num_foreground + 1, num_foreground, num_buckets)
    index_P = (target_P * num_foreground + winner_P) * num_buckets + bucket_P
    counts = torch.bincount(index_P, minlength=shape[0] * shape[1] * shape[2]).view(shape)
    # Bucket b has passed the thresholds 0..b-1: foreground at threshold t are the buckets above t.
    passed = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    background = (counts.sum(-1, keepdim=True) - passed).sum(1, keepdim=True)
    return torch.cat([background, passed], dim=1).permute(2, 0, 1).contiguous()


def best_threshold(confusion_TCC: Tensor, *, thresholds: Sequence[float]) -> tuple[float, float]:
    """The threshold of the highest mIoU and that mIoU, from `threshold_confusion` summed over a split; the lowest on a tie."""
    if len(confusion_TCC) != len(thresholds):
        raise ValueError(f"{len(confusion_TCC)} confusion matrices for {len(thresholds)} thresholds")
    score_T = _mean_over_occurring(confusion_TCC)
    # Nothing in the ground truth: every entry is NaN, and so is the answer.
    best = int(score_T.nan_to_num(nan=-1.0).argmax())
    return float(thresholds[best]), float(score_T[best])


def _mean_over_occurring(confusion: Tensor) -> Tensor:
    occurs = confusion.sum(-1) > 0
    return torch.where(occurs, iou_per_class(confusion), 0.0).sum(-1) / occurs.sum(-1)


def _counted_target(target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    target_P = _integer(target, "target").reshape(-1)
    counted_P = target_P != void_label(num_classes - 1)
    target_P = target_P[counted_P]
    _check_range(target_P, num_classes, "target")
    return target_P, counted_P


def _integer(labels: Tensor, name: str) -> Tensor:
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"{name} must hold integer classes, got {labels.dtype}")
    return labels.long()


def _check_range(labels_P: Tensor, num_classes: int, name: str) -> None:
    if len(labels_P) == 0:
        return
    low, high = (int(value) for value in torch.aminmax(labels_P))
    if low < 0 or high >= num_classes:
        extra = f" or {void_label(num_classes - 1)}" if name == "target" else ""
        raise ValueError(f"{name} classes must be in [0, {num_classes - 1}]{extra}, got {low if low < 0 else high}")


def _check_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
