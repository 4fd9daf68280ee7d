"""The segmentation loss against a loop over pixels in float64."""

import math

import pytest
import torch

from dfa.model import losses
from dfa.model.losses import patch_segmentation_loss, segmentation_loss, upsample_logits


def slow_loss(logits, target):
    halves = {"background": [0.0, 0], "foreground": [0.0, 0]}
    for image in range(target.shape[0]):
        for row in range(target.shape[1]):
            for column in range(target.shape[2]):
                label = int(target[image, row, column])
                if label == 255:
                    continue
                values = [float(value) for value in logits[image, :, row, column]]
                half = halves["background" if label == 0 else "foreground"]
                half[0] += math.log(sum(math.exp(value) for value in values)) - values[label]
                half[1] += 1
    return halves["background"], halves["foreground"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_halves_equal_a_loop_over_pixels(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 4, 5, 3, generator=generator)).to(dtype)
    target = torch.randint(0, 4, (2, 5, 3), generator=generator, dtype=torch.uint8)
    target[0, :2] = 255
    for (total, count), (slow_total, slow_count) in zip(
        segmentation_loss(logits, target), slow_loss(logits, target), strict=True
    ):
        assert total.dtype == count.dtype == torch.float32 and total.ndim == count.ndim == 0
        assert total.item() == pytest.approx(slow_total, rel=1e-5) and count.item() == slow_count  # fp32 sums


def test_void_pixels_have_no_gradient():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.tensor([[[255, 0], [2, 255]]])
    (background, _), (foreground, _) = segmentation_loss(logits, target)
    (background + foreground).backward()
    assert (logits.grad[0, :, target[0] == 255] == 0).all() and (logits.grad[0, :, target[0] != 255] != 0).all()


@pytest.mark.parametrize("label, empty", [(255, (0, 1)), (0, (1,)), (1, (0,))])
def test_an_empty_half_is_zero_with_zero_gradient(label, empty):
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    pairs = segmentation_loss(logits, torch.full((1, 2, 2), label))
    for half in empty:
        total, count = pairs[half]
        assert total.item() == 0 and count.item() == 0
        (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
        assert (gradient == 0).all()


def test_logits_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 2\).*\(1, 4, 4\)"):
        segmentation_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4))


def test_upsampling_keeps_a_patch_centre_at_its_centre():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4).half()
    big = upsample_logits(ramp, (12, 12))
    assert big.dtype == torch.float32
    torch.testing.assert_close(big[0, 0, 1::3, 1::3], ramp[0, 0].float())
    torch.testing.assert_close(big[0, 0, 5, 2:10], torch.arange(8.0) / 3 + 1 / 3)


def test_taken_in_parts_the_loss_and_its_gradient_are_those_of_the_whole_batch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 3, 3, generator=generator)
    target = torch.randint(0, 4, (5, 9, 6), generator=generator)
    target[2], target[0, :2] = 255, 255  # one part has nothing to count

    def pairs(at_once, function):
        monkeypatch.setattr(losses, "PIXEL_LOGITS_AT_ONCE", at_once)
        leaf = logits.clone().requires_grad_()
        found = function(leaf)
        sum(total / count for total, count in found).backward()
        return [value.item() for pair in found for value in pair], leaf.grad

    whole, gradient = pairs(2**27, lambda x: segmentation_loss(upsample_logits(x, (9, 6)), target))
    for at_once in (2**27, 4 * 9 * 6 * 2, 1):  # the whole, two images, one
        parts, part_gradient = pairs(at_once, lambda x: patch_segmentation_loss(x, target))
        assert parts == pytest.approx(whole, rel=1e-6)
        torch.testing.assert_close(part_gradient, gradient)


@pytest.mark.long
def test_the_loss_of_a_thousand_classes_holds_the_pixels_of_one_image(monkeypatch):
    held = []
    monkeypatch.setattr(losses, "upsample_logits", lambda *given: held.append(upsample_logits(*given)) or held[-1])
    patch_segmentation_loss(torch.zeros(3, 1001, 4, 4), torch.zeros(3, 300, 300, dtype=torch.int64))
    assert [len(each) for each in held] == [1, 1, 1]
