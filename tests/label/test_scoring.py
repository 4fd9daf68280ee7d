"""What the factory does with one image, against slow loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dfa.label.crf import PRESETS, crf_labels
from dfa.label.pseudo import PseudoSettings
from dfa.label.scoring import (
    ImageScores,
    LabelSettings,
    Tally,
    label_image,
    model_scores,
    seed_scores,
    sweep_confusion,
)

THRESHOLDS = (0.1, 0.3, 0.5, 0.9)
SETTINGS = LabelSettings(6, PRESETS["deeplab"], 1.0, 0.0, THRESHOLDS)


def _scores(seed=0, ids=(0, 2, 5), size=(9, 11)):
    score_KHW = np.random.default_rng(seed).random((len(ids), *size), np.float32)
    score_KHW[0] = 0.4
    return ImageScores(score_KHW, ids)


def _truth(seed=1, size=(9, 11)):
    return np.random.default_rng(seed).choice(np.array([0, 2, 3, 5, 255], np.uint8), size)


def _slow_sweep(scores, truth_HW, thresholds, num_classes):
    confusion = np.zeros((len(thresholds), num_classes + 1, num_classes + 1), np.int64)
    for number, threshold in enumerate(thresholds):
        for y, x in np.ndindex(truth_HW.shape):
            if truth_HW[y, x] == 255:
                continue
            best, label = np.float32(threshold), 0
            for row, index in zip(scores.score_KHW[1:], scores.class_ids[1:], strict=True):
                if row[y, x] > best:
                    best, label = row[y, x], index
            confusion[number, truth_HW[y, x], label] += 1
    return confusion


def test_the_sweep_equals_a_loop_over_pixels_and_thresholds():
    scores, truth_HW = _scores(), _truth()
    scores.score_KHW[1, :3] = 0.3  # a score equal to a threshold is background
    fast = sweep_confusion(scores, truth_HW, THRESHOLDS, num_classes=6)
    np.testing.assert_array_equal(fast.dense().numpy(), _slow_sweep(scores, truth_HW, THRESHOLDS, 6))


def test_an_image_without_classes_is_all_background_in_sweep_and_mask():
    scores, truth_HW = ImageScores(np.full((1, 9, 11), 0.4, np.float32), (0,)), _truth()
    image = np.zeros((9, 11, 3), np.uint8)
    labelled = label_image(image, scores, truth_HW, SETTINGS)
    assert not labelled.mask_HW.any()
    assert labelled.confidence == 1
    assert labelled.tally.sweep_TCC[:, :, 1:].sum() == 0
    assert labelled.tally.sweep_TCC[0].sum() == (truth_HW != 255).sum()


def test_the_mask_is_the_dense_crf_on_the_scores():
    image = np.random.default_rng(3).integers(0, 256, (9, 11, 3), np.uint8)
    scores, truth_HW = _scores(), _truth()
    labelled = label_image(image, scores, truth_HW, SETTINGS)
    expected = crf_labels(image, scores.score_KHW, scores.class_ids, PRESETS["deeplab"])
    np.testing.assert_array_equal(labelled.mask_HW, expected)
    argmax = np.array(scores.class_ids)[scores.score_KHW.argmax(0)]
    for confusion, prediction in ((labelled.tally.mask_CC, expected), (labelled.tally.argmax_CC, argmax)):
        slow = np.zeros((7, 7), np.int64)
        for want, got in zip(truth_HW.ravel(), prediction.ravel(), strict=True):
            if want != 255:
                slow[want, got] += 1
        np.testing.assert_array_equal(confusion.numpy(), slow)


def test_sharpness_moves_the_unary_and_not_the_argmax():
    scores = _scores()
    soft, sharp = (LabelSettings(6, None, sharpness, 0.0, ()) for sharpness in (1.0, 4.0))
    image = np.zeros((9, 11, 3), np.uint8)
    first, second = (label_image(image, scores, None, settings) for settings in (soft, sharp))
    np.testing.assert_array_equal(first.mask_HW, second.mask_HW)
    assert second.confidence > first.confidence


def test_uncertain_pixels_become_void_and_still_count_in_the_confusion():
    score_KHW = np.array([[[0.5, 0.1]], [[0.5, 0.9]]], np.float32)
    settings = LabelSettings(6, None, 1.0, 0.8, ())
    labelled = label_image(
        np.zeros((1, 2, 3), np.uint8), ImageScores(score_KHW, (0, 4)), np.array([[4, 4]], np.uint8), settings
    )
    assert labelled.mask_HW.tolist() == [[255, 4]]
    assert labelled.tally.void_pixels == 1
    assert labelled.tally.pixels_C.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert labelled.tally.mask_CC[4].tolist() == [1, 0, 0, 0, 1, 0, 0]


def test_tallies_add_up():
    image = np.zeros((9, 11, 3), np.uint8)
    parts = [label_image(image, _scores(seed), _truth(seed), SETTINGS).tally for seed in (1, 2)]
    total = Tally.zero(SETTINGS) + parts[0] + parts[1]
    assert (total.num_images, total.num_truth) == (2, 2)
    assert torch.equal(total.sweep_TCC, parts[0].sweep_TCC + parts[1].sweep_TCC)
    assert not Tally.zero(SETTINGS).mask_CC.any()  # adding made new memory


@pytest.mark.parametrize("background", ["constant", "power", "prompts"])
def test_seed_scores_put_the_background_before_the_present_classes(background):
    score_BMHW = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    class_BM, prompt_BHW = torch.tensor([[2, 5], [3, 0]]), torch.full((2, 3, 4), 0.2)
    score_BMHW[1, 1] = 0
    settings = PseudoSettings(background, 0.35, 2.0, None, None)
    first, second = seed_scores(score_BMHW, class_BM, prompt_BHW, settings)
    assert (first.class_ids, second.class_ids) == ((0, 2, 5), (0, 3))
    np.testing.assert_array_equal(first.score_KHW[1:], score_BMHW[0].numpy())
    expected = {
        "constant": torch.full((3, 4), 0.35),
        "power": (1 - score_BMHW[1, 0]) ** 2,
        "prompts": prompt_BHW[1],
    }
    np.testing.assert_allclose(second.score_KHW[0], expected[background].numpy(), rtol=1e-6)


def test_model_scores_keep_the_argmax_of_all_classes():
    logits = torch.randn(1, 9, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -20
    for min_probability, dropped in ((0.01, {3}), (0.99, {3})):
        (kept,) = model_scores(logits, min_probability=min_probability)
        assert dropped.isdisjoint(kept.class_ids)
        argmax = np.array(kept.class_ids)[kept.score_KHW.argmax(0)]
        np.testing.assert_array_equal(argmax, logits[0].argmax(0).numpy())
    assert kept.class_ids[0] == 0
    assert (
        len(model_scores(logits - 100 * (torch.arange(9) > 1)[None, :, None, None], min_probability=0.01)[0].class_ids)
        == 2
    )


def test_masks_of_other_crfs_are_counted_as_if_each_had_been_the_only_one():
    image = np.random.default_rng(3).integers(0, 256, (9, 11, 3), np.uint8)
    scores, truth_HW = _scores(), _truth()
    both = replace(SETTINGS, other_crfs=(PRESETS["wide"], PRESETS["smooth"]))
    labelled = label_image(image, scores, truth_HW, both)
    alone = [label_image(image, scores, truth_HW, replace(SETTINGS, crf=crf)) for crf in both.other_crfs]
    for found_CC, each in zip(labelled.tally.other_PCC, alone, strict=True):
        assert torch.equal(found_CC, each.tally.mask_CC)
    assert not torch.equal(alone[0].tally.mask_CC, alone[1].tally.mask_CC)  # or the order would not show
    np.testing.assert_array_equal(labelled.mask_HW, label_image(image, scores, truth_HW, SETTINGS).mask_HW)
    assert (labelled.tally + labelled.tally).other_PCC.sum() == 2 * labelled.tally.other_PCC.sum() > 0
    assert label_image(image, scores, None, both).tally.other_PCC.sum() == 0
