import math

import pytest
import torch

from dfa.analysis.truncated import observe
from dfa.core.analysis.cost import estimated_drop, spearman
from dfa.core.analysis.cross_entropy import cross_entropy_spectrum
from dfa.core.analysis.truncation import resize_features
from dfa.core.metrics import confusion_matrix, mean_iou

GRIDS = [11, 3, 5, 7, 9]


def pairs(count=4, size=24):
    """Images whose three channels are logits of smooth scenes, and masks that mostly agree with them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        coarse = torch.randn(2, 3, 7, 7, generator=generator)
        logits = resize_features(coarse, (size, size)) * 3
        mask = logits.argmax(1)
        noise = torch.rand(mask.shape, generator=generator)
        mask = torch.where(noise < 0.05, torch.randint(0, 3, mask.shape, generator=generator), mask)
        yield logits, torch.where(noise > 0.97, 255, mask)


def forward(image, grid):
    """A model without weights: its features are its logits, truncated with a loss of their own."""
    if not grid:
        return image
    small = torch.nn.functional.adaptive_avg_pool2d(image, grid)
    return resize_features(small, (image.shape[2], image.shape[3]))


def test_every_number_is_that_of_its_definition():
    found = observe(pairs(), forward, grids=GRIDS, num_classes=3)
    logits, masks = (torch.cat(each) for each in zip(*pairs(), strict=True))
    assert found.num_images == 8
    assert math.isclose(found.miou, mean_iou(confusion_matrix(logits.argmax(1), masks, num_classes=3)))
    spectrum = cross_entropy_spectrum(logits.double(), masks).sum(0)
    ring = torch.fft.fftfreq(24, 1 / 24).abs().round()
    ring = torch.maximum(ring[:, None], ring[None, :])
    assert [each.grid for each in found.outcomes] == sorted(GRIDS)
    for each in found.outcomes:
        rate = abs(1 - spectrum[ring <= (each.grid - 1) // 2].sum().real / spectrum.sum().real)
        assert math.isclose(each.loss_rate, rate, abs_tol=1e-5)  # float32 transforms
        there = resize_features(resize_features(logits, (each.grid, each.grid)), (24, 24))
        outputs = mean_iou(confusion_matrix(there.argmax(1), masks, num_classes=3))
        features = mean_iou(confusion_matrix(forward(logits, each.grid).argmax(1), masks, num_classes=3))
        assert (each.outputs_miou, each.features_miou) == (outputs, features)
        assert math.isclose(each.features_drop, (found.miou - features) / found.miou, abs_tol=1e-12)
        assert math.isclose(each.foretold_drop, estimated_drop(each.loss_rate)) or each.loss_rate >= 0.2
    rates, drops = zip(*((each.loss_rate, each.features_drop) for each in found.outcomes), strict=True)
    assert found.spearman_features() == spearman(rates, drops)
    assert found.spearman_outputs() == spearman(rates, [each.outputs_drop for each in found.outcomes])
    assert found.spearman_features() > 0.8  # smooth scenes: the coarser the grid, the more is lost


def test_the_error_of_the_line_is_taken_where_it_holds():
    found = observe(pairs(), forward, grids=GRIDS, num_classes=3)
    inside = [each for each in found.outcomes if each.loss_rate < 0.2]
    assert 0 < len(inside) < len(found.outcomes)
    errors = [abs(0.6725 * each.loss_rate + 0.0022 - each.features_drop) for each in inside]
    assert math.isclose(found.mean_error(), sum(errors) / len(errors))


def test_too_few_grids_and_models_that_are_never_right_are_refused():
    for grids in ([5], [5, 5], [0, 5]):
        with pytest.raises(ValueError, match=r"at least two different grids of at least one cell, got"):
            observe(pairs(), forward, grids=grids, num_classes=3)
    wrong = [(logits.roll(1, 1), logits.argmax(1)) for logits, _ in pairs()]
    with pytest.raises(ValueError, match=r"mIoU over 8 images is 0.0"):
        observe(wrong, forward, grids=GRIDS, num_classes=3)
