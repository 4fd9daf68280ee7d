import cmath

import pytest
import torch

from dfa.core.spectrum import band_mask, low_pass, split

GRIDS = [(20, 20), (7, 7), (6, 9), (5, 8), (1, 4), (21, 10)]


@pytest.mark.parametrize(("mu_as", "kept"), [("half_width", 17), ("side", 9), ("area", 13)])
def test_what_mu_measures_decides_the_bins_per_axis(mu_as, kept):
    mask = band_mask(20, 20, mu=0.4, mu_as=mu_as, device="cpu")
    assert mask[0].sum() == kept and mask.sum() == kept**2


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mu_as", ["half_width", "side", "area"])
@pytest.mark.parametrize("mu", [0.0, 0.1, 0.3, 0.4, 0.5])
def test_a_bin_and_its_negative_share_their_fate(grid, mu_as, mu):
    height, width = grid
    mask = band_mask(height, width, mu=mu, mu_as=mu_as, device="cpu")
    rows, columns = torch.arange(height), torch.arange(width)
    assert torch.equal(mask, mask[(-rows) % height][:, (-columns) % width])
    limit = {"half_width": mu, "side": mu / 2, "area": mu**0.5 / 2}[mu_as]
    frequencies = torch.fft.fftfreq(height).abs()[:, None].maximum(torch.fft.fftfreq(width).abs()[None])
    assert torch.equal(mask, frequencies <= limit + 1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (3, 6)])
def test_low_pass_equals_a_slow_complex_transform(grid):
    height, width = grid
    x = torch.randn(height, width, dtype=torch.float64)
    mask = band_mask(height, width, mu=0.3, mu_as="half_width", device="cpu")
    places = [(p, q) for p in range(height) for q in range(width)]
    expected = torch.zeros(height, width, dtype=torch.complex128)
    for k, m in places:
        if not mask[k, m]:
            continue
        bin_ = sum(x[p, q].item() * cmath.exp(-2j * cmath.pi * (k * p / height + m * q / width)) for p, q in places)
        for p, q in places:
            expected[p, q] += bin_ * cmath.exp(2j * cmath.pi * (k * p / height + m * q / width)) / (height * width)
    # Nothing imaginary was there to drop, and fp64 sums of 25 terms agree to 1e-12.
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(low_pass(x, mu=0.3, mu_as="half_width"), expected.real, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_bands_are_orthogonal_add_up_and_low_pass_is_a_projection(grid):
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    low, high = split(x, mu=0.25, mu_as="half_width")
    torch.testing.assert_close(low + high, x, atol=1e-14, rtol=0)
    torch.testing.assert_close(low_pass(low, mu=0.25, mu_as="half_width"), low, atol=1e-12, rtol=0)
    assert (low * high).sum((2, 3)).abs().max() < 1e-11
    full, nothing = split(x, mu=0.5, mu_as="half_width")
    torch.testing.assert_close(full, x, atol=1e-12, rtol=0)
    assert nothing.abs().max() < 1e-12


def test_mu_zero_keeps_the_mean_only():
    x = torch.randn(1, 2, 6, 7)
    low = low_pass(x, mu=0.0, mu_as="area")
    torch.testing.assert_close(low, x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-6, rtol=0)


def test_autocast_and_bf16_do_not_lower_the_transforms_precision():
    x = torch.randn(1, 2, 6, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = split(x, mu=0.2, mu_as="half_width")
    assert low.dtype == high.dtype == torch.float32
    torch.testing.assert_close(low, low_pass(x.float(), mu=0.2, mu_as="half_width"))


def test_masks_are_cached_and_usable_in_training_after_inference_mode():
    with torch.inference_mode():
        mask = band_mask(9, 11, mu=0.17, mu_as="side", device="cpu")
    assert band_mask(9, 11, mu=0.17, mu_as="side", device="cpu") is mask
    x = torch.randn(1, 1, 9, 11, requires_grad=True)
    low_pass(x, mu=0.17, mu_as="side").square().sum().backward()
    # The projection's gradient of the squared norm is twice the projection.
    torch.testing.assert_close(x.grad, 2 * low_pass(x.detach(), mu=0.17, mu_as="side"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mu", "mu_as"), [(0.6, "half_width"), (1.1, "side"), (1.1, "area"), (-0.1, "area"), (0.1, "disc")]
)
def test_impossible_bands_are_refused(mu, mu_as):
    with pytest.raises(ValueError, match="mu"):
        band_mask(4, 4, mu=mu, mu_as=mu_as, device="cpu")
