import math

import pytest
import torch
from torchmetrics import JaccardIndex

from dfa.core.metrics import best_threshold, confusion_matrix, iou_per_class, mean_iou, threshold_confusion


def labels(*shape, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, classes, shape, generator=generator)
    target = torch.where(torch.rand(shape, generator=generator) < 0.6, prediction, torch.randint(0, classes, shape))
    target[torch.rand(shape, generator=generator) < 0.1] = 255
    return prediction, target


def test_confusion_equals_a_slow_count_and_drops_255():
    prediction, target = labels(2, 6, 7)
    expected = [[0] * 5 for _ in range(5)]
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != 255:
            expected[t][p] += 1
    actual = confusion_matrix(prediction.to(torch.uint8), target.to(torch.uint8), num_classes=5)
    assert actual.tolist() == expected and actual.dtype == torch.int64
    assert actual.sum() == (target != 255).sum() < target.numel()


def test_mean_iou_equals_torchmetrics():
    prediction, target = labels(4, 30, 30)
    peer = JaccardIndex(task="multiclass", num_classes=5, ignore_index=255, average="none")
    confusion = confusion_matrix(prediction, target, num_classes=5)
    torch.testing.assert_close(iou_per_class(confusion).float(), peer(prediction, target), atol=1e-6, rtol=0)
    assert math.isclose(mean_iou(confusion), float(peer(prediction, target).mean()), abs_tol=1e-6)


def test_the_mean_is_over_classes_of_the_ground_truth_in_the_split_not_over_images():
    first = confusion_matrix(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0]), num_classes=4)
    second = confusion_matrix(torch.tensor([0, 3]), torch.tensor([1, 1]), num_classes=4)
    confusion = first + second
    # Class 0: 2 of 4; class 1: 1 of 4; class 2 nowhere; class 3 predicted only, which hurts class 1 but is not averaged.
    assert iou_per_class(confusion).tolist()[:2] == [0.5, 0.25]
    assert math.isnan(iou_per_class(confusion)[2]) and iou_per_class(confusion)[3] == 0
    assert mean_iou(confusion) == 0.375
    assert mean_iou(confusion) != (mean_iou(first) + mean_iou(second)) / 2


def test_batches_add_up_to_the_split():
    prediction, target = labels(6, 9, 9)
    parts = [confusion_matrix(p, t, num_classes=5) for p, t in zip(prediction, target, strict=True)]
    assert torch.equal(sum(parts), confusion_matrix(prediction, target, num_classes=5))


def test_nothing_in_the_ground_truth_is_nan_not_zero():
    empty = confusion_matrix(torch.zeros(3, dtype=torch.long), torch.full((3,), 255), num_classes=3)
    assert empty.sum() == 0 and math.isnan(mean_iou(empty))


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([0, 3], [0, 1], r"prediction classes must be in \[0, 2\], got 3"),
        ([0, -1], [0, 1], r"prediction classes must be in \[0, 2\], got -1"),
        ([0, 255], [0, 1], r"prediction classes must be in \[0, 2\], got 255"),
        ([0, 1], [0, 3], r"target classes must be in \[0, 2\] or 255, got 3"),
        ([0, 1], [0, -1], r"target classes must be in \[0, 2\] or 255, got -1"),
        ([0, 1, 1], [0, 1], "differ in shape"),
        ([0.0, 1.0], [0, 1], "prediction must hold integer classes"),
    ],
)
def test_labels_out_of_range_are_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(target), num_classes=3)


def test_a_void_pixel_may_hold_any_prediction():
    assert confusion_matrix(torch.tensor([255, 1]), torch.tensor([255, 1]), num_classes=2).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sweep_equals_one_argmax_per_threshold(dtype):
    _, target = labels(3, 12, 13)
    score = torch.rand(3, 4, 12, 13, dtype=dtype)
    score[0, 2] = 0
    thresholds = [0.02, 0.3, 0.5, 0.75, 0.99]
    score[1, :, 0] = 0.3  # Exactly on a threshold: a tie, which the background wins.
    score[2, 0, 1], score[2, 1:, 1] = 0.5, 0.2
    sweep = threshold_confusion(score, target, thresholds=thresholds)
    for index, threshold in enumerate(thresholds):
        stacked = torch.cat([torch.full_like(score[:, :1], threshold), score], 1)
        assert torch.equal(sweep[index], confusion_matrix(stacked.argmax(1), target, num_classes=5)), threshold
    parts = [threshold_confusion(s, t, thresholds=thresholds) for s, t in zip(score, target, strict=True)]
    assert torch.equal(sum(parts), sweep)


def test_best_threshold_is_the_argmax_of_the_mean_iou():
    _, target = labels(3, 12, 13)
    score = torch.rand(3, 4, 12, 13)
    score.scatter_(1, (target.clamp(1, 4) - 1)[:, None], 0.9)
    score = torch.where((target == 0)[:, None], score * 0.4, score)
    thresholds = [step / 20 for step in range(20)]
    sweep = threshold_confusion(score, target, thresholds=thresholds)
    scores = [mean_iou(confusion) for confusion in sweep]
    threshold, best = best_threshold(sweep, thresholds=thresholds)
    assert best == max(scores) and scores[thresholds.index(threshold)] == best
    assert 0.2 < threshold < 0.9
    with pytest.raises(ValueError, match="20 confusion matrices for 2 thresholds"):
        best_threshold(sweep, thresholds=[0.1, 0.2])


def test_impossible_sweeps_are_refused():
    score, target = torch.rand(2, 4, 4), torch.zeros(4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="strictly ascending"):
        threshold_confusion(score, target, thresholds=[0.2, 0.2])
    with pytest.raises(ValueError, match="same H and W"):
        threshold_confusion(score, target[:3], thresholds=[0.2])
    with pytest.raises(ValueError, match="NaN"):
        threshold_confusion(score * torch.nan, target, thresholds=[0.2])
    with pytest.raises(ValueError, match=r"target classes must be in \[0, 2\]"):
        threshold_confusion(score, target + 3, thresholds=[0.2])
