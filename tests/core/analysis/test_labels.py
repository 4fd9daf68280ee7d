import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from dfa.core.analysis.cross_entropy import VOID, cross_entropy_sums, one_hot
from dfa.core.analysis.labels import boundary_sums, label_sums, no_labels
from dfa.core.analysis.overlap import Overlap, boundary_pixels, boundary_width
from dfa.core.metrics import confusion_matrix, iou_per_class, mean_iou
from dfa.core.spectrum import Band, band_products, joint_runs, low_pass, run_products

SIZES = [(12, 12), (15, 9), (8, 21), (9, 1), (1, 6)]


def blobs(size, *, classes=5, seed=0):
    """Label maps of a few blocks, with void: uint8 prediction and truth that mostly agree."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (4, 4), generator=generator)
    rows, columns = (torch.arange(n) * 4 // n for n in size)
    truth = coarse[rows[:, None], columns]
    prediction = torch.where(torch.rand(size, generator=generator) < 0.8, truth, torch.randint(0, classes, size))
    truth = torch.where(torch.rand(size, generator=generator) < 0.1, VOID, truth)
    return prediction.to(torch.uint8), truth.to(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nu_max", [0, 2, 4, 11])
def test_the_products_of_runs_equal_those_of_the_masks(size, nu_max):
    prediction, truth = blobs(size)
    labels = [4, 0, 2]
    runs = joint_runs(truth, prediction)
    found = run_products(runs, labels, size=size, nu_max=nu_max, dtype=torch.float64)
    masks = [torch.stack([(each == label).double() for label in (4, 0, 2)]) for each in (truth, prediction)]
    torch.testing.assert_close(found, band_products(*masks, nu_max=nu_max), atol=1e-11, rtol=0)
    # float32 sums of at most 168 terms of size 1.
    single = run_products(runs, labels, size=size, nu_max=nu_max, dtype=torch.float32)
    torch.testing.assert_close(single, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_runs_are_where_neither_map_changes(size):
    prediction, truth = blobs(size)
    runs, expected = joint_runs(truth, prediction), []
    for row, pixels in enumerate(zip(truth.tolist(), prediction.tolist(), strict=True)):
        column = 0
        for labels, group in itertools.groupby(zip(*pixels, strict=True)):
            length = len(list(group))
            expected.append((row, column, column + length, *labels))
            column += length
    found = np.stack([runs.row_R, runs.start_R, runs.stop_R, *runs.label_NR], axis=1)
    assert found.tolist() == [list(each) for each in expected]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_a_hard_prediction_is_the_distribution_that_the_module_says(size, epsilon):
    prediction, truth = blobs(size)
    sums = label_sums(prediction, truth, num_classes=5, nu_max=11, dtype=torch.float64)
    likely = one_hot(prediction[None], num_classes=5, dtype=torch.float64)
    logits = torch.log(likely * (1 - epsilon) + (1 - likely) * epsilon / 4)
    expected = cross_entropy_sums(logits, truth[None], nu_max=11)
    found = sums.cross_entropy(epsilon)
    torch.testing.assert_close(found.band_K, expected.band_K, atol=1e-10, rtol=0)
    assert math.isclose(found.total, expected.total, rel_tol=1e-12)
    assert (found.num_pixels, found.num_images) == (expected.num_pixels, 1)


def test_the_default_epsilon_is_close_to_the_least_cross_entropy():
    sums = sum(
        (label_sums(*blobs((40, 40), seed=s), num_classes=5, nu_max=3) for s in range(5)),
        no_labels(num_classes=5, nu_max=3),
    )
    least = min(sums.cross_entropy(step / 1000).total for step in range(1, 1000))
    assert abs(sums.cross_entropy().total / least - 1) < 1e-4  # the scan steps by 0.001
    assert sums.cross_entropy(sums.epsilon() / 10).total > least * 1.1


@pytest.mark.parametrize("size", SIZES)
def test_the_overlap_is_that_of_the_masks_and_its_iou_the_usual_one(size):
    prediction, truth = blobs(size)
    sums = label_sums(prediction, truth, num_classes=5, nu_max=4, dtype=torch.float64)
    confusion = confusion_matrix(prediction, truth, num_classes=5)
    torch.testing.assert_close(sums.overlap().iou(), iou_per_class(confusion), equal_nan=True)
    assert math.isclose(sums.mean_iou(), mean_iou(confusion), rel_tol=1e-12)
    masks, truths = (one_hot(each[None], num_classes=5, dtype=torch.float64)[0] for each in (prediction, truth))
    for k in range(5):
        low = (low_pass(truths, Band(k, "bins")) * masks).sum((1, 2))
        torch.testing.assert_close(sums.band_CK[:, k], low, atol=1e-10, rtol=0)
    both = (masks * (truth != VOID)).sum((1, 2)) + truths.sum((1, 2))
    expected = 1 / (both[:, None] / sums.band_CK - 1)
    found = sums.overlap().truncated_iou()
    assert torch.allclose(found, expected, atol=1e-10, equal_nan=True)
    occurs = truths.sum((1, 2)) > 0
    torch.testing.assert_close(sums.truncated_mean_iou(), found[occurs].mean(0))


def test_a_void_prediction_is_wrong_for_every_class():
    prediction, truth = blobs((12, 12))
    prediction[:4] = VOID
    sums = label_sums(prediction, truth, num_classes=5, nu_max=6, dtype=torch.float64)
    valid = truth != VOID
    assert sums.common_C.sum() == ((prediction == truth) & valid).sum()
    assert sums.prediction_C.sum() == (valid & (prediction != VOID)).sum()
    expected = -math.log(0.1 / 4) * int((valid & (prediction != truth)).sum())
    expected -= math.log(0.9) * int((valid & (prediction == truth)).sum())
    assert math.isclose(sums.cross_entropy(0.1).total, expected, rel_tol=1e-12)


def test_sums_of_images_add_up_whatever_their_sizes():
    parts = [label_sums(*blobs(size, seed=s), num_classes=5, nu_max=6) for s, size in enumerate(SIZES)]
    together = sum(parts, no_labels(num_classes=5, nu_max=6))
    assert together.num_images == len(SIZES)
    for name in ("band_CK", "truth_C", "prediction_C", "common_C"):
        torch.testing.assert_close(getattr(together, name), sum(getattr(part, name) for part in parts))
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(5, 8\) do not add up"):
        together + no_labels(num_classes=5, nu_max=7)


@pytest.mark.parametrize("size", [(12, 12), (30, 17), (5, 40)])
@pytest.mark.parametrize("distance", [1, 2, 5])
def test_the_boundary_is_what_erosion_takes_off_every_class(size, distance):
    _, truth = blobs(size)
    found = boundary_pixels(truth, distance=distance)
    for label in truth.unique().tolist():
        mask = (truth == label).numpy()
        inner = binary_erosion(mask, torch.ones(3, 3).numpy(), iterations=distance, border_value=0)
        assert (found.numpy()[mask] == ~inner[mask]).all()


def test_boundary_iou_equals_its_definition_and_ignores_void():
    # Large blocks, so that something is left inside the boundaries.
    prediction, truth = (each.repeat_interleave(9, 0).repeat_interleave(9, 1) for each in blobs((8, 8), seed=3))
    prediction[2:40, 5:30] = 1
    sums = boundary_sums(prediction, truth, num_classes=5, nu_max=40, dtype=torch.float64)
    distance = boundary_width(72, 72)
    assert distance == round(0.02 * 72 * 2**0.5) == 2
    for label in range(5):
        masks = [((each == label) & (truth != VOID)).numpy() for each in (prediction, truth)]
        edges = [m & ~binary_erosion(m, torch.ones(3, 3).numpy(), iterations=distance) for m in masks]
        union = (edges[0] | edges[1]).sum()
        expected = (edges[0] & edges[1]).sum() / union if union else math.nan
        assert math.isclose(sums.overlap().iou()[label], expected, rel_tol=1e-12) or (not union)
    # 40 cycles resolve everything: the truncated form is the whole.
    torch.testing.assert_close(sums.overlap().truncated_iou()[:, -1], sums.overlap().iou(), equal_nan=True)
    perfect = boundary_sums(torch.where(truth == VOID, 3, truth), truth, num_classes=5, nu_max=3)
    assert perfect.mean_iou() == 1
    assert (
        boundary_sums(prediction, truth, num_classes=5, nu_max=3).mean_iou()
        < label_sums(prediction, truth, num_classes=5, nu_max=3).mean_iou()
    )


def soft_overlap(mask, truth, *, nu_max):
    areas = (mask.double() + truth.double()).sum((-2, -1)), (mask.double() * truth.double()).sum((-2, -1))
    return Overlap(*areas, band_products(truth, mask, nu_max=nu_max))


def test_soft_masks_have_the_same_iou_in_space_and_in_frequency():
    generator = torch.Generator().manual_seed(0)
    mask, truth = torch.rand(2, 3, 9, 10, generator=generator, dtype=torch.float64)
    overlap = soft_overlap(mask, truth, nu_max=5)
    both, common = (mask + truth).sum((1, 2)), (mask * truth).sum((1, 2))
    torch.testing.assert_close(overlap.iou(), 1 / (both / common - 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(overlap.truncated_iou()[:, -1], overlap.iou(), atol=1e-12, rtol=0)
    drop = (overlap.iou()[:, None] - overlap.truncated_iou()) / overlap.iou()[:, None]
    torch.testing.assert_close(overlap.relative_drop(), drop, atol=1e-12, rtol=0)
    added = overlap + soft_overlap(truth, truth, nu_max=5)
    torch.testing.assert_close(added.both, both + 2 * truth.sum((1, 2)))
    nothing = soft_overlap(torch.zeros(4, 4), torch.zeros(4, 4), nu_max=1)
    assert math.isnan(nothing.iou()) and soft_overlap(torch.eye(4), 1 - torch.eye(4), nu_max=1).iou() == 0


def test_impossible_pairs_are_refused():
    prediction, truth = blobs((8, 8))
    options = {"num_classes": 5, "nu_max": 2}
    with pytest.raises(ValueError, match="must be maps of one size"):
        label_sums(prediction[:4], truth, **options)
    with pytest.raises(ValueError, match=r"must be uint8, got torch.int64"):
        label_sums(prediction.long(), truth, **options)
    with pytest.raises(ValueError, match=r"truth classes must be in \[0, 3\] or 255, got 4"):
        label_sums(prediction.clamp_max(3), truth.masked_fill(truth == 0, 4), num_classes=4, nu_max=2)
    with pytest.raises(ValueError, match=r"prediction classes must be in \[0, 4\] or 255, got 7"):
        label_sums(prediction.clamp_min(7), truth, **options)
    for epsilon in (0.0, 1.0):
        with pytest.raises(ValueError, match="epsilon must be above 0 and below 1"):
            label_sums(prediction, truth, **options).cross_entropy(epsilon)
