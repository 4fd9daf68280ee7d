import cmath
import math

import pytest
import torch
import torch.nn.functional as F

from dfa.core.analysis.cross_entropy import (
    VOID,
    cross_entropy_spectrum,
    cross_entropy_sums,
    mean_magnitude,
    no_cross_entropy,
    one_hot,
)
from dfa.core.spectrum import Band, low_pass

SIZES = [(5, 5), (4, 6), (7, 4)]


def scene(size, *, classes=4, images=2, void=0.15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, *size, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes - 1, (images, *size), generator=generator)  # the last class never occurs
    target[torch.rand(images, *size, generator=generator) < void] = VOID
    return logits, target


def slow_spectrum(x):
    height, width = x.shape
    found = torch.zeros(height, width, dtype=torch.complex128)
    for k in range(height):
        for m in range(width):
            for p in range(height):
                for q in range(width):
                    found[k, m] += x[p, q].item() * cmath.exp(-2j * cmath.pi * (k * p / height + m * q / width))
    return found / math.sqrt(height * width)


def slow_ce_spectrum(logits, target):
    """L_ce(nu) of one image, every sum written out."""
    found = torch.zeros(target.shape, dtype=torch.complex128)
    for label in range(len(logits)):
        truth, surprise = torch.zeros(target.shape, dtype=torch.float64), torch.zeros(target.shape, dtype=torch.float64)
        for p in range(target.shape[0]):
            for q in range(target.shape[1]):
                truth[p, q] = float(target[p, q] == label)
                surprise[p, q] = math.log(sum(math.exp(z) for z in logits[:, p, q])) - logits[label, p, q]
        found += slow_spectrum(truth).conj() * slow_spectrum(surprise)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_spectrum_equals_explicit_sums(size):
    logits, target = scene(size)
    found = cross_entropy_spectrum(logits, target)
    for image in range(2):
        torch.testing.assert_close(found[image], slow_ce_spectrum(logits[image], target[image]), atol=1e-11, rtol=0)


@pytest.mark.parametrize("size", [*SIZES, (33, 32), (21, 40)])
@pytest.mark.parametrize("void", [0.0, 0.3])
def test_all_frequencies_add_up_to_the_cross_entropy_of_valid_pixels(size, void):
    logits, target = scene(size, void=void)
    expected = F.cross_entropy(logits, target, ignore_index=VOID, reduction="none").sum((1, 2))
    total = cross_entropy_spectrum(logits, target).sum((1, 2))
    # Theorem 1, relative to sums of some thousand: fp64 rounding.
    torch.testing.assert_close(total.real, expected, atol=0, rtol=1e-12)
    assert (total.imag / expected).abs().max() < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_the_spectrum_is_hermitian_and_blind_to_a_number_added_to_all_logits_of_a_pixel(size):
    logits, target = scene(size)
    found = cross_entropy_spectrum(logits, target)
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    mirrored = found[:, (-rows) % size[0]][:, :, (-columns) % size[1]]
    torch.testing.assert_close(mirrored, found.conj(), atol=1e-11, rtol=0)
    offset = 5 * torch.randn(2, 1, *size, dtype=torch.float64)
    torch.testing.assert_close(cross_entropy_spectrum(logits + offset, target), found, atol=1e-11, rtol=0)


@pytest.mark.parametrize("size", [*SIZES, (12, 9)])
@pytest.mark.parametrize("nu_max", [0, 1, 3, 9])
def test_truncated_cross_entropy_is_the_product_with_the_low_passed_annotation(size, nu_max):
    logits, target = scene(size)
    sums = cross_entropy_sums(logits, target, nu_max=nu_max)
    spectrum = cross_entropy_spectrum(logits, target)
    truth, surprise = one_hot(target, num_classes=4, dtype=torch.float64), -logits.log_softmax(1)
    for k in range(nu_max + 1):
        expected = (low_pass(truth, Band(k, "bins")) * surprise).sum()
        torch.testing.assert_close(sums.band_K[k], expected, atol=1e-10, rtol=0)
        rows, columns = (torch.minimum(torch.arange(n), n - torch.arange(n)) <= k for n in size)
        inside = spectrum[:, rows[:, None] & columns[None]].sum()
        torch.testing.assert_close(sums.band_K[k], inside.real, atol=1e-10, rtol=0)
    valid = target != VOID
    assert sums.num_pixels == valid.sum() and sums.num_images == 2
    assert math.isclose(sums.total, F.cross_entropy(logits, target, ignore_index=VOID, reduction="sum"), rel_tol=1e-12)


def test_the_loss_rate_averages_spectra_before_its_one_ratio_and_mixes_sizes():
    parts = [scene(size, images=1, seed=seed) for seed, size in enumerate([(8, 9), (15, 6), (6, 6)])]
    sums = [cross_entropy_sums(*part, nu_max=7) for part in parts]
    together = sum(sums, no_cross_entropy(7))
    bands, totals = torch.stack([part.band_K for part in sums]).sum(0), sum(part.total for part in sums)
    torch.testing.assert_close(together.loss_rate(), (1 - bands / totals).abs(), atol=1e-14, rtol=0)
    mean_of_ratios = torch.stack([part.loss_rate() for part in sums]).mean(0)
    assert (together.loss_rate() - mean_of_ratios).abs().max() > 1e-3
    assert together.num_images == 3
    # 7 cycles resolve every axis of the three but 15: there is nothing left to lose on the others.
    assert max(sums[2].loss_rate()[3:]) < 1e-12 and max(together.loss_rate()[7:]) < 1e-12


def test_half_precision_logits_are_read_in_fp32():
    logits, target = scene((8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_entropy_spectrum(logits.bfloat16(), target)
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found, cross_entropy_spectrum(logits.bfloat16().float(), target))


def test_magnitudes_are_averaged_over_rings():
    maps = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    magnitudes = torch.stack([slow_spectrum(each).abs() for each in maps.flatten(0, 1)]).mean(0)
    for k, found in enumerate(mean_magnitude(maps, nu_max=3)):
        ring = [magnitudes[p, q] for p in range(7) for q in range(8) if max(min(p, 7 - p), min(q, 8 - q)) == k]
        assert math.isclose(found, sum(ring) / len(ring), rel_tol=1e-12)
    with pytest.raises(ValueError, match="nu_max 4 exceeds half of the shorter side of 7 x 8"):
        mean_magnitude(maps, nu_max=4)


def test_impossible_inputs_are_refused():
    logits, target = scene((4, 4))
    with pytest.raises(ValueError, match="do not fit a target"):
        cross_entropy_spectrum(logits, target[:1])
    for call in (cross_entropy_spectrum, lambda *pair: cross_entropy_sums(*pair, nu_max=2)):
        with pytest.raises(ValueError, match=r"target classes must be in \[0, 3\] or 255, got"):
            call(logits, target + 3)
    with pytest.raises(ValueError, match="sums of 3 and of 4 bands"):
        no_cross_entropy(2) + no_cross_entropy(3)
    with pytest.raises(ValueError, match="no valid pixel"):
        cross_entropy_sums(logits, torch.full((2, 4, 4), VOID), nu_max=2).loss_rate()
