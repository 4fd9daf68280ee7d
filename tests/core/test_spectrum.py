import cmath
import math
import re
from pathlib import Path

import pytest
import torch

from dfa.core.spectrum import (
    Band,
    band_mask,
    band_products,
    band_spectrum,
    bins_of,
    grid_of,
    highest_bin,
    inverse_transform,
    low_pass,
    split,
    transform,
)

ROOT = Path(__file__).parent.parent.parent
GRIDS = [(20, 20), (7, 7), (6, 9), (5, 8), (1, 4), (21, 10)]
BANDS = [
    *(Band(mu, kind) for mu in (0.0, 0.1, 0.3, 0.4, 0.5) for kind in ("half_width", "side", "area")),
    *(Band(nu_max, "bins") for nu_max in (0, 1, 3, 50)),
    *(Band(radius, "disc") for radius in (0.5, 1.0, 2.0, 2.5, 4.0)),
]


def frequencies(size):
    """Bins of an axis by numpy's rule: 0, 1, ..., -2, -1."""
    return [n if n < (size + 1) // 2 else n - size for n in range(size)]


def slow_transform(x, *, sign=-1):
    """The orthonormal transform of a map as four explicit loops."""
    height, width = x.shape
    places = [(p, q) for p in range(height) for q in range(width)]
    found = torch.zeros(height, width, dtype=torch.complex128)
    for k, m in places:
        phases = (
            cmath.exp(sign * 2j * cmath.pi * (k * p / height + m * q / width)) * x[p, q].item() for p, q in places
        )
        found[k, m] = sum(phases) / math.sqrt(height * width)
    return found


@pytest.mark.parametrize(
    ("band", "kept"),
    [(Band(0.4, "half_width"), 17), (Band(0.4, "side"), 9), (Band(0.4, "area"), 13), (Band(3, "bins"), 7)],
)
def test_what_a_band_measures_decides_the_bins_per_axis(band, kept):
    mask = band_mask(20, 20, band, device="cpu")
    assert mask[0].sum() == kept and mask.sum() == kept**2 and highest_bin(band, 20) == kept // 2


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_a_bin_and_its_negative_share_their_fate_and_every_bin_follows_the_definition(grid, band):
    height, width = grid
    mask = band_mask(height, width, band, device="cpu")
    rows, columns = torch.arange(height), torch.arange(width)
    assert torch.equal(mask, mask[(-rows) % height][:, (-columns) % width])
    for i, ny in enumerate(frequencies(height)):
        for j, nx in enumerate(frequencies(width)):
            if band.kind == "bins":
                inside = max(abs(ny), abs(nx)) <= band.value
            elif band.kind == "disc":
                inside = ny**2 + nx**2 < band.value**2
            else:
                limit = {"half_width": band.value, "side": band.value / 2, "area": band.value**0.5 / 2}[band.kind]
                inside = max(abs(ny) / height, abs(nx) / width) <= limit + 1e-6
            assert mask[i, j] == inside


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (3, 6)])
@pytest.mark.parametrize("band", [Band(0.3, "half_width"), Band(1, "bins"), Band(1.5, "disc")], ids=str)
def test_low_pass_equals_a_slow_transform_there_and_back(grid, band):
    x = torch.randn(*grid, dtype=torch.float64)
    expected = slow_transform(slow_transform(x) * band_mask(*grid, band, device="cpu"), sign=1)
    # Nothing imaginary was there to drop, and fp64 sums of 25 terms agree to 1e-12.
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(low_pass(x, band), expected.real, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (3, 6)])
def test_transforms_are_orthonormal_and_undo_each_other(grid):
    x = torch.randn(*grid, dtype=torch.float64)
    torch.testing.assert_close(transform(x), slow_transform(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(inverse_transform(transform(x)).real, x, atol=1e-14, rtol=0)
    torch.testing.assert_close(transform(x).abs().square().sum(), x.square().sum())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("nu_max", [0, 2, 4, 10, 13])
def test_band_products_equal_the_product_with_each_low_pass(grid, nu_max):
    x, y = torch.randn(2, 3, *grid, dtype=torch.float64)
    found = band_products(x, y, nu_max=nu_max)
    assert found.shape == (3, nu_max + 1) and found.dtype == torch.float64
    for k in range(nu_max + 1):
        expected = (low_pass(x, Band(k, "bins")) * y).sum((-2, -1))
        torch.testing.assert_close(found[:, k], expected, atol=1e-11, rtol=0)
    kept = band_spectrum(x, nu_max=nu_max)
    rows = [n for n, frequency in enumerate(frequencies(grid[0])) if abs(frequency) <= nu_max]
    expected = transform(x)[:, rows, : min(nu_max, grid[1] // 2) + 1]
    torch.testing.assert_close(kept, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_bands_are_orthogonal_add_up_and_low_pass_is_a_projection(grid):
    x, band = torch.randn(2, 3, *grid, dtype=torch.float64), Band(0.25, "half_width")
    low, high = split(x, band)
    torch.testing.assert_close(low + high, x, atol=1e-14, rtol=0)
    torch.testing.assert_close(low_pass(low, band), low, atol=1e-12, rtol=0)
    assert (low * high).sum((2, 3)).abs().max() < 1e-11
    full, nothing = split(x, Band(0.5, "half_width"))
    torch.testing.assert_close(full, x, atol=1e-12, rtol=0)
    assert nothing.abs().max() < 1e-12


@pytest.mark.parametrize("band", [Band(0.0, "area"), Band(0, "bins"), Band(1.0, "disc")], ids=str)
def test_the_narrowest_bands_keep_the_mean_only(band):
    x = torch.randn(1, 2, 6, 7)
    torch.testing.assert_close(low_pass(x, band), x.mean((2, 3), keepdim=True).expand_as(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 20, 513])
@pytest.mark.parametrize("nu_max", [0, 1, 3, 256])
def test_measures_of_one_band_convert_into_each_other(size, nu_max):
    assert bins_of(grid_of(nu_max)) == nu_max and grid_of(bins_of(size)) in (size, size - 1)
    if nu_max > size // 2:
        return
    by_mu, by_bins = Band(nu_max / size, "half_width"), Band(nu_max, "bins")
    assert highest_bin(by_mu, size) == highest_bin(by_bins, size) == nu_max
    assert highest_bin(Band(nu_max + 1.0, "disc"), size) == nu_max
    assert torch.equal(band_mask(size, 3, by_bins, device="cpu")[:, 0], band_mask(size, 3, by_mu, device="cpu")[:, 0])


def test_autocast_and_bf16_do_not_lower_the_transforms_precision():
    x, band = torch.randn(1, 2, 6, 6).bfloat16(), Band(0.2, "half_width")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = split(x, band)
        spectrum, products = transform(x), band_products(x, x, nu_max=2)
    assert low.dtype == high.dtype == torch.float32 and spectrum.dtype == torch.complex64
    torch.testing.assert_close(low, low_pass(x.float(), band))
    torch.testing.assert_close(spectrum, transform(x.float()))
    torch.testing.assert_close(products, band_products(x.float(), x.float(), nu_max=2))


def test_masks_are_cached_and_usable_in_training_after_inference_mode():
    band = Band(0.17, "side")
    with torch.inference_mode():
        mask = band_mask(9, 11, band, device="cpu")
    assert band_mask(9, 11, Band(0.17, "side"), device="cpu") is mask
    x = torch.randn(1, 1, 9, 11, requires_grad=True)
    low_pass(x, band).square().sum().backward()
    # The projection's gradient of the squared norm is twice the projection.
    torch.testing.assert_close(x.grad, 2 * low_pass(x.detach(), band), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0.6, "half_width", r"mu must be in \[0, 0.5\] as half_width, got 0.6"),
        (1.1, "side", r"mu must be in \[0, 1\] as side, got 1.1"),
        (-0.1, "area", r"mu must be in \[0, 1\] as area, got -0.1"),
        (2.5, "bins", "nu_max must be an integer of at least 0, got 2.5"),
        (0.0, "disc", "radius of a disc must be above 0, got 0.0"),
        (0.1, "ring", r"one of \['half_width', 'side', 'area', 'bins', 'disc'\], got 'ring'"),
    ],
)
def test_impossible_bands_are_refused(value, kind, message):
    with pytest.raises(ValueError, match=message):
        Band(value, kind)


def test_every_fourier_transform_is_taken_in_one_module():
    pattern = re.compile(r"(torch|np|numpy|scipy)\.fft|import fft|\b[ir]*fft[2n]?\(")
    users = [
        str(path.relative_to(ROOT))
        for folder in ("dfa", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert users == ["dfa/core/spectrum.py"]
