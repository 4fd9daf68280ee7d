import dataclasses

import numpy as np
import pytest
import torch

from dfa.core.void import VOID
from dfa.label.pseudo import (
    PseudoSettings,
    background_score,
    best_class,
    gather_present,
    label_scores,
    patch_labels,
    present_classes,
    pseudo_labels,
    to_grid,
    to_pixels,
)
from dfa.label.refine import RefineSettings, pixel_adaptive_refine

PLAIN = PseudoSettings(background="constant", threshold=0.4, gamma=1.0, band=None, refine=None)
REFINE = RefineSettings((1, 2), 2, 0.3, 0.3, 0.01)


def random_case(batch=3, classes=6, grid=(4, 5), size=(32, 40), seed=0):
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(
        batch, grid[0] * grid[1], classes + 2, generator=generator
    )  # two background columns follow the classes
    labels = torch.rand(batch, classes, generator=generator) > 0.5
    labels[0] = torch.tensor([False, True, False, False, True, False][:classes])
    image = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
    return cam, labels, image, grid


def slow_upsample(patches, size):
    """Bilinear with patch centres where the image has them, float64, pixel by pixel. patches (h, w)."""
    result = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            y = np.clip((row + 0.5) * patches.shape[0] / size[0] - 0.5, 0, patches.shape[0] - 1)
            x = np.clip((column + 0.5) * patches.shape[1] / size[1] - 0.5, 0, patches.shape[1] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, patches.shape[0] - 1), min(left + 1, patches.shape[1] - 1)
            fy, fx = y - top, x - left
            result[row, column] = (1 - fy) * ((1 - fx) * patches[top, left] + fx * patches[top, right]) + fy * (
                (1 - fx) * patches[bottom, left] + fx * patches[bottom, right]
            )
    return result


def slow_labels(cam, labels, size, grid, threshold):
    """All classes, one image and one pixel at a time; absent classes are skipped."""
    result = np.zeros((len(cam), *size), np.int64)
    for image in range(len(cam)):
        best = np.full(size, threshold)
        for column in np.flatnonzero(labels[image]):
            score = slow_upsample(cam[image, :, column].reshape(grid), size)
            result[image][score > best] = column + 1
            best = np.maximum(best, score)
    return result


def test_labels_equal_a_loop_over_all_classes_and_pixels():
    cam, labels, image, grid = random_case()
    mask = pseudo_labels(cam, labels, image, grid, PLAIN).mask_BHW
    slow = slow_labels(cam.double().numpy(), labels.numpy(), (32, 40), grid, 0.4)
    assert (mask.numpy() != slow).mean() < 1e-3  # fp32 against float64 at exact crossings only
    assert mask.dtype == torch.int64


def test_present_classes_are_listed_in_order_and_padded_with_zero():
    labels = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]])
    assert present_classes(labels).tolist() == [[1, 3, 4], [0, 0, 0], [2, 0, 0]]
    assert present_classes(labels[1:2]).shape == (1, 0)
    assert to_pixels(torch.zeros(1, 0, 2, 2), (4, 4)).shape == (1, 0, 4, 4)


def test_compact_columns_are_the_present_columns():
    cam, labels, _, _ = random_case()
    class_BM = present_classes(labels)
    compact = gather_present(cam, class_BM)
    for image in range(len(cam)):
        for slot, index in enumerate(class_BM[image].tolist()):
            expected = cam[image, :, index - 1] if index else torch.zeros(cam.shape[1])
            assert torch.equal(compact[image, :, slot], expected)


def test_only_present_classes_are_given():
    cam, labels, image, grid = random_case(seed=1)
    mask = pseudo_labels(cam, labels, image, grid, dataclasses.replace(PLAIN, refine=REFINE)).mask_BHW
    for one, present in zip(mask, labels, strict=True):
        assert set(one.unique().tolist()) <= {0, *(present.nonzero().flatten() + 1).tolist()}


def test_an_image_without_classes_is_all_background():
    cam, labels, image, grid = random_case()
    labels[1] = False
    assert not pseudo_labels(cam, labels, image, grid, PLAIN).mask_BHW[1].any()
    assert not pseudo_labels(cam, torch.zeros_like(labels), image, grid, PLAIN).mask_BHW.any()


def test_the_refined_scores_are_background_and_classes_refined_together():
    cam, labels, image, grid = random_case()
    settings = dataclasses.replace(PLAIN, background="power", gamma=2.0, refine=REFINE)
    result = pseudo_labels(cam, labels, image, grid, settings)
    foreground = cam[0, :, [1, 4]].T.reshape(1, 2, *grid)
    stacked = torch.cat([(1 - foreground.amax(dim=1, keepdim=True)) ** 2, foreground], dim=1)
    expected = pixel_adaptive_refine(image[:1], stacked, **dataclasses.asdict(REFINE))
    torch.testing.assert_close(result.score_BMHW[:1, :3], expected)
    choice = torch.tensor([0, 2, 5])[expected[0].argmax(dim=0)]
    assert torch.equal(result.mask_BHW[0], choice)


def test_background_kinds():
    foreground = torch.tensor([[[[0.2, 0.9]], [[0.5, 0.1]]]])
    prompt = torch.tensor([[[0.3, 0.7]]])

    def score(**change):
        return background_score(foreground, prompt, dataclasses.replace(PLAIN, **change)).flatten().tolist()

    assert score(background="constant", threshold=0.25) == [0.25, 0.25]
    assert score(background="power", gamma=3.0) == pytest.approx([0.5**3, 0.1**3])
    assert score(background="prompts") == pytest.approx([0.3, 0.7])


def test_the_prompts_map_decides_where_it_beats_the_classes():
    cam, labels, image, grid = random_case()
    settings = dataclasses.replace(PLAIN, background="prompts")
    low = pseudo_labels(cam, labels, image, grid, settings, prompt_BN=torch.zeros(3, 20)).mask_BHW
    high = pseudo_labels(cam, labels, image, grid, settings, prompt_BN=torch.full((3, 20), 2.0)).mask_BHW
    assert (low[labels.any(dim=1)] > 0).all() and not high.any()
    with pytest.raises(ValueError, match="prompts"):
        pseudo_labels(cam, labels, image, grid, settings)


def test_the_band_is_void_and_never_changes_a_decided_pixel():
    cam, labels, image, grid = random_case()
    sharp = pseudo_labels(cam, labels, image, grid, PLAIN)
    banded = pseudo_labels(cam, labels, image, grid, dataclasses.replace(PLAIN, band=(-0.1, 0.15))).mask_BHW
    best = sharp.score_BMHW[:, 1:].amax(dim=1)
    between = (best - 0.4 > -0.1) & (best - 0.4 < 0.15)
    assert 0 < between.float().mean() < 1
    assert torch.equal(banded == VOID, between)
    assert torch.equal(banded[~between], sharp.mask_BHW[~between])


def test_padding_is_void_at_pixels_and_patches():
    cam, labels, image, grid = random_case()
    valid = torch.ones(3, 32, 40, dtype=torch.bool)
    valid[:, 16:] = False
    result = pseudo_labels(cam, labels, image, grid, PLAIN, valid_BHW=valid)
    assert torch.equal(result.mask_BHW == VOID, ~valid)
    assert (result.patch_Bhw[:, 2:] == VOID).all() and (result.patch_Bhw[:, :2] != VOID).all()


def test_patch_labels_read_the_centre_pixel():
    mask = torch.arange(12 * 15).reshape(1, 12, 15)
    expected = [[int((r + 0.5) * 4) * 15 + int((c + 0.5) * 3) for c in range(5)] for r in range(3)]
    assert patch_labels(mask, (3, 5))[0].tolist() == expected


def test_thresholding_the_best_class_is_the_constant_background_label():
    cam, labels, image, grid = random_case(seed=2)
    class_BM = present_classes(labels)
    score, index = best_class(to_pixels(to_grid(gather_present(cam, class_BM), grid), (32, 40)), class_BM)
    for threshold in (0.02, 0.4, 0.8):
        settings = dataclasses.replace(PLAIN, threshold=threshold)
        assert torch.equal(
            index.where(score > threshold, 0), pseudo_labels(cam, labels, image, grid, settings).mask_BHW
        )


def test_ties_go_to_the_background_then_to_the_lower_class():
    scores = torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1)
    assert label_scores(scores, torch.tensor([[3, 7]]), band=None, valid_BHW=None, void=VOID).item() == 0
    scores[0, 0] = 0.4
    assert label_scores(scores, torch.tensor([[3, 7]]), band=None, valid_BHW=None, void=VOID).item() == 3


def test_a_thousand_classes_need_another_void_label_and_give_the_same_masks():
    cam, labels, image, grid = random_case()
    wide_cam, wide_labels = torch.rand(3, 20, 1000), torch.zeros(3, 1000, dtype=torch.bool)
    wide_cam[..., 900:906], wide_labels[:, 900:906] = cam[..., :6], labels
    with pytest.raises(ValueError, match="void"):
        pseudo_labels(wide_cam, wide_labels, image, grid, dataclasses.replace(PLAIN, void=VOID))
    narrow = pseudo_labels(cam, labels, image, grid, dataclasses.replace(PLAIN, band=(-0.1, 0.1)))
    wide = pseudo_labels(wide_cam, wide_labels, image, grid, dataclasses.replace(PLAIN, band=(-0.1, 0.1)))
    assert wide.score_BMHW.shape == narrow.score_BMHW.shape
    expected = narrow.mask_BHW.where(narrow.mask_BHW == 0, narrow.mask_BHW + 900)
    assert (narrow.mask_BHW == VOID).any()
    assert torch.equal(wide.mask_BHW, expected.masked_fill(narrow.mask_BHW == VOID, 65535))


def test_inputs_that_do_not_fit_are_refused():
    cam, labels, image, grid = random_case()
    with pytest.raises(ValueError, match="grid of 4 x 4"):
        pseudo_labels(cam, labels, image, (4, 4), PLAIN)
    with pytest.raises(ValueError, match="does not fit labels"):
        pseudo_labels(cam[..., :5], labels, image, grid, PLAIN)
    with pytest.raises(ValueError, match="band"):
        dataclasses.replace(PLAIN, band=(0.3, 0.5))
