"""The frequency toolbox: bands of feature and label maps, and every Fourier transform of the project.

DFA's bands (METHOD 1.6), FFR's (2), the spectral analysis (3) and SPANet's mixer (4) share it. Transforms are over the last
two axes, orthonormal, and in fp32 at least, also under autocast; fp64 stays fp64. Frequencies are integer bins `n`, cycles
over the whole map, in unshifted fftfreq order; `n / size` is in cycles per pixel (or patch), so an axis spans [-1/2, 1/2].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, pi, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BandMeasure = Literal["half_width", "side", "area"]
BandKind = Literal["half_width", "side", "area", "bins", "disc"]

_LARGEST_MU = {"half_width": 0.5, "side": 1.0, "area": 1.0}
# Room for products such as 0.1 * 30 that miss an integer by rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Band:
    """A low band, centred on frequency zero.

    kind and value:
        "half_width", "side", "area": the square `max(|fx|, |fy|) <= limit` in cycles per pixel. Our reading, since neither paper
            says what the mu = 0.4 of its "regional ratio" measures: half_width limit = mu (0.4 keeps 17 of 20 bins an axis),
            side the square's side is the share mu of the axis (limit = mu/2), area its area is the share mu of all bins
            (limit = sqrt(mu)/2). On a grid that is not square, so is the band in bins.
        "bins": the square `max(|nx|, |ny|) <= nu_max` in bins, an integer (METHOD 3); grid size LRG = 2 nu_max + 1.
        "disc": the open disc `nx^2 + ny^2 < r^2` in bins (METHOD 4); r = 1 is the mean alone.

    A bin and its negative are always kept or dropped together (the lone Nyquist bin of an even axis is its own negative), so
    the band of a real map is real.
    """

    value: float
    kind: BandKind

    def __post_init__(self) -> None:
        value, kind = self.value, self.kind
        if kind in _LARGEST_MU:
            if not 0 <= value <= _LARGEST_MU[kind]:
                raise ValueError(f"mu must be in [0, {_LARGEST_MU[kind]:g}] as {kind}, got {value}")
        elif kind == "bins":
            if value < 0 or value != int(value):
                raise ValueError(f"nu_max must be an integer of at least 0, got {value}")
        elif kind == "disc":
            if not value > 0:
                raise ValueError(f"the radius of a disc must be above 0, got {value}")
        else:
            raise ValueError(f"the kind of a band must be one of {[*_LARGEST_MU, 'bins', 'disc']}, got {kind!r}")


def band_mask(height: int, width: int, band: Band, *, device: torch.device | str) -> Tensor:
    """Bins of the band `B_mu` on a grid of height x width: bool hw. Cached per size, band and device: do not write to it.

    >>> band_mask(1, 4, Band(0.25, "half_width"), device="cpu")
    tensor([[ True,  True, False,  True]])
    """
    if height < 1 or width < 1:
        raise ValueError(f"the grid must have at least one cell, got {height} x {width}")
    return _cached_mask(height, width, band, str(device))


@lru_cache(maxsize=256)
def _cached_mask(height: int, width: int, band: Band, device: str) -> Tensor:
    # A tensor made under inference mode could never again be part of a training step.
    with torch.inference_mode(False):
        row_h, column_w = distance_from_zero(height, device=device), distance_from_zero(width, device=device)
        if band.kind == "disc":
            return row_h[:, None] ** 2 + column_w[None, :] ** 2 < band.value**2
        rows, columns = row_h <= highest_bin(band, height), column_w <= highest_bin(band, width)
        return rows[:, None] & columns[None, :]


def distance_from_zero(size: int, *, device: torch.device | str) -> Tensor:
    """|n| of each bin of an axis: 0, 1, 2, ..., 2, 1."""
    index = torch.arange(size, device=device)
    return torch.minimum(index, size - index)


def highest_bin(band: Band, size: int) -> int:
    """nu_max of a band on an axis of `size` cells: the largest |n| kept there, at most size // 2.

    >>> highest_bin(Band(0.4, "half_width"), 20), highest_bin(Band(1.0, "disc"), 20)
    (8, 0)
    """
    mu = band.value
    limits = {"half_width": mu, "side": mu / 2, "area": sqrt(mu) / 2}
    if band.kind in limits:
        return int(limits[band.kind] * size + _ROUNDING)
    return min(size // 2, int(mu) if band.kind == "bins" else ceil(mu) - 1)


def grid_of(nu_max: int) -> int:
    """LRG: cells along a grid that just resolves nu_max cycles, `2 nu_max + 1` (spectral analysis, 3.1).

    >>> [grid_of(nu_max) for nu_max in (256, 64, 32, 8)]
    [513, 129, 65, 17]
    """
    return 2 * nu_max + 1


def bins_of(grid: int) -> int:
    """nu_max of a grid of so many cells along an axis: `grid_of` undone; an even grid has room for one bin less than half.

    >>> bins_of(513), bins_of(20)
    (256, 9)
    """
    if grid < 1:
        raise ValueError(f"a grid has at least one cell an axis, got {grid}")
    return (grid - 1) // 2


def transform(x_BHW: Tensor) -> Tensor:
    """`F(x) = 1/sqrt(HW) sum_t x(t) exp(-2 pi i (ny ty/H + nx tx/W))` over the last two axes: complex, of the shape of x."""
    with torch.autocast(x_BHW.device.type, enabled=False):
        return torch.fft.fft2(_at_least_single(x_BHW), norm="ortho")


def inverse_transform(x_BHW: Tensor) -> Tensor:
    """`F^-1`, the orthonormal inverse of `transform`: complex, of the shape of x, whose last two axes are frequencies."""
    with torch.autocast(x_BHW.device.type, enabled=False):
        return torch.fft.ifft2(_at_least_single(x_BHW), norm="ortho")


def low_pass(x_BDhw: Tensor, band: Band) -> Tensor:
    """`F^-1(B . F(x))` of real maps over the last two axes, of the shape of x (METHOD 1.6).

    >>> low_pass(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), Band(0.0, "half_width")).abs().max()
    tensor(0.)
    """
    height, width = x_BDhw.shape[-2:]
    mask_hw = band_mask(height, width, band, device=x_BDhw.device)
    with torch.autocast(x_BDhw.device.type, enabled=False):
        spectrum = torch.fft.rfft2(_at_least_single(x_BDhw)) * mask_hw[:, : width // 2 + 1]
        return torch.fft.irfft2(spectrum, s=(height, width))


def split(x_BDhw: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Low band and the rest, `F_ld` and `F_hd = F_d - F_ld`: they add up to x (METHOD 1.6)."""
    low_BDhw = low_pass(x_BDhw, band)
    return low_BDhw, x_BDhw.to(low_BDhw.dtype) - low_BDhw


def band_spectrum(x_BHW: Tensor, *, nu_max: int) -> Tensor:
    """The bins `|ny| <= nu_max, 0 <= nx <= nu_max` of real maps, orthonormal: complex B x (rows) x (columns).

    Rows in fftfreq order. What is left out on the left half-plane is the conjugate of what is there. Costs one pass along the
    rows and one along the kept columns alone, so a narrow band takes about half the time of the whole transform.
    """
    with torch.autocast(x_BHW.device.type, enabled=False):
        rows = torch.fft.rfft(_at_least_single(x_BHW), norm="ortho")[..., : nu_max + 1]
        return _low_rows(torch.fft.fft(rows, dim=-2, norm="ortho"), nu_max)


@dataclass(frozen=True)
class Runs:
    """Stretches of a row along which two label maps do not change, in reading order, one entry a run. Arrays of numpy, whose
    operations on so few numbers cost a third of torch's.

    row_R, start_R, stop_R: int64, the row and the columns start <= column < stop. label_NR: uint8, the labels of both maps, 2 x R.
    """

    row_R: np.ndarray
    start_R: np.ndarray
    stop_R: np.ndarray
    label_NR: np.ndarray


def joint_runs(x_HW: Tensor, y_HW: Tensor) -> Runs:
    """The runs of two uint8 maps of one size. A row of a label map changes a few times: what follows works on runs alone."""
    width, x_P, y_P = x_HW.shape[1], x_HW.cpu().numpy().reshape(-1), y_HW.cpu().numpy().reshape(-1)
    is_last_P = np.empty(x_P.shape, bool)  # the last pixel of a run
    np.not_equal(x_P[1:], x_P[:-1], out=is_last_P[:-1])
    is_last_P[:-1] |= y_P[1:] != y_P[:-1]
    is_last_P[width - 1 :: width] = True
    last_R = np.flatnonzero(is_last_P)
    row_R = last_R // width
    stop_R = last_R - row_R * width + 1
    return Runs(row_R, stop_R - np.diff(last_R, prepend=-1), stop_R, np.stack([x_P[last_R], y_P[last_R]]))


def run_products(
    runs: Runs, labels: Sequence[int], *, size: tuple[int, int], nu_max: int, dtype: torch.dtype
) -> Tensor:
    """`band_products` of the masks of some labels in two label maps of `size` pixels, without the masks: fp64,
    labels x (nu_max + 1).

    runs: of the two maps. dtype: float32 or float64, of the transforms. On the processor.

    A run adds `E(stop) - E(start)` to the transform of its row, `E(x) = sum over t < x of exp(-2 pi i n t / W)`. The columns
    follow as one matrix product with cosines and sines. With r the row transforms and C, S these sums over rows,
    `b(+-ny) = (C Re r +- S Im r) + i (C Im r -+ S Re r)`, so that the products of both signs of ny add up to twice those of
    the four parts.
    """
    (height, width), count = size, len(labels)
    columns, rows = min(nu_max, width // 2) + 1, min(nu_max, height // 2) + 1
    edge_E, first_B = _bags(runs, np.array(labels, np.uint8), height, width)
    rows_BQ = functional.embedding_bag(edge_E, _edge_table(width, columns - 1, dtype), first_B, mode="sum")
    rows_NSHQ = rows_BQ.view(2, count, height, 2 * columns)
    parts = _wave_table(height, rows - 1, dtype) @ rows_NSHQ  # 2 x S x (C, S: 2 rows) x (Re, Im: 2 columns)
    products = (parts[0] * parts[1]).double().view(count, 2, rows, 2, columns)
    products = (products[:, 0] + products[:, 1]).sum(2)
    products[:, _twice(height, rows)] *= 2
    products[:, :, _twice(width, columns)] *= 2
    return _square_sums(functional.pad(products, (0, nu_max + 1 - columns, 0, nu_max + 1 - rows)))


def _bags(runs: Runs, label_S: np.ndarray, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Places in `_edge_table` that each row of each mask of both maps adds up, and where each row's begin."""
    found_M = np.flatnonzero(runs.label_NR[:, None] == label_S[:, None])  # map, label, run: in the rows' order
    mask_M = found_M // len(runs.row_R)
    run_M = found_M - mask_M * len(runs.row_R)
    edge_ME = np.empty((len(run_M), 2), np.int64)
    edge_ME[:, 0] = runs.stop_R[run_M]
    edge_ME[:, 1] = runs.start_R[run_M] + (width + 1)
    num_rows = 2 * len(label_S) * height
    first_B = np.zeros(num_rows, np.int64)
    np.cumsum(np.bincount(mask_M * height + runs.row_R[run_M], minlength=num_rows)[:-1], out=first_B[1:])
    return torch.from_numpy(edge_ME.reshape(-1)), torch.from_numpy(2 * first_B)


def _twice(size: int, kept: int) -> slice:
    """The bins 0..kept - 1 of an axis that stand for their negatives too: all but zero and an even axis's Nyquist bin."""
    return slice(1, kept - 1 if size % 2 == 0 and kept == size // 2 + 1 else kept)


@lru_cache(maxsize=128)
def _edge_table(width: int, nu_max: int, dtype: torch.dtype) -> Tensor:
    """E(x), x = 0..width, for the bins 0..nu_max, with the transform's 1/sqrt(width): real parts, then
    imaginary ones. -E(x) at width + 1 + x."""
    with torch.inference_mode(False):
        phase_XQ = _phases(width, nu_max)
        sums_XQ = torch.cat([phase_XQ.new_zeros(1, nu_max + 1), phase_XQ.cumsum(0)])
        table_XQ = torch.cat([sums_XQ.real, sums_XQ.imag], dim=1)
        return torch.cat([table_XQ, -table_XQ]).to(dtype)


@lru_cache(maxsize=128)
def _wave_table(height: int, nu_max: int, dtype: torch.dtype) -> Tensor:
    """Cosines, then sines, of the bins 0..nu_max at all rows, with the transform's 1/sqrt(height): 2 (nu_max + 1) x height."""
    with torch.inference_mode(False):
        phase_QX = _phases(height, nu_max).T
        return torch.cat([phase_QX.real, -phase_QX.imag]).to(dtype).contiguous()


def _phases(size: int, nu_max: int) -> Tensor:
    """`exp(-2 pi i n x / size) / sqrt(size)`: complex fp64, places x times bins n."""
    bins_Q = torch.arange(nu_max + 1, dtype=torch.float64)
    place_X = torch.arange(size, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    return torch.polar(one, -2 * pi / size * (place_X[:, None] * bins_Q % size)) / sqrt(size)


def _low_rows(spectrum_BRQ: Tensor, nu_max: int) -> Tensor:
    height = spectrum_BRQ.shape[-2]
    if 2 * nu_max + 1 >= height:
        return spectrum_BRQ
    return torch.cat([spectrum_BRQ[..., : nu_max + 1, :], spectrum_BRQ[..., height - nu_max :, :]], dim=-2)


def band_products(x_BHW: Tensor, y_BHW: Tensor, *, nu_max: int) -> Tensor:
    """`sum over |nx|, |ny| <= k of Re conj(x(nu)) y(nu)` for k = 0..nu_max: fp64, B x (nu_max + 1).

    x_BHW, y_BHW: real maps of one shape, any leading axes. Equals `<low_pass(x), y>` of every square band, in one pass: the
    products are folded to `(|ny|, |nx|)` and summed along both axes. The last entry is `<x, y>` where nu_max reaches half of
    the longer side (Parseval).
    """
    size = (x_BHW.shape[-2], x_BHW.shape[-1])
    return square_products(*(band_spectrum(each, nu_max=nu_max) for each in (x_BHW, y_BHW)), size=size, nu_max=nu_max)


def square_products(x_BRQ: Tensor, y_BRQ: Tensor, *, size: tuple[int, int], nu_max: int) -> Tensor:
    """`band_products` from the half-planes that `band_spectrum` gave for maps of `size` pixels."""
    (height, width), num_columns = size, x_BRQ.shape[-1]
    half_BRQ = (x_BRQ.real * y_BRQ.real + x_BRQ.imag * y_BRQ.imag).double()
    half_BRQ[..., _twice(width, num_columns)] *= 2
    highest = min(nu_max, height // 2)
    negative = half_BRQ[..., highest + 1 :, :].flip(-2)
    folded = half_BRQ.new_zeros(*half_BRQ.shape[:-2], nu_max + 1, nu_max + 1)
    folded[..., : highest + 1, :num_columns] = half_BRQ[..., : highest + 1, :]
    folded[..., 1 : negative.shape[-2] + 1, :num_columns] += negative
    return _square_sums(folded)


def _square_sums(folded: Tensor) -> Tensor:
    """Sums over `|ny|, |nx| <= k` for each k, of values at (|ny|, |nx|)."""
    return folded.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)


def _at_least_single(x: Tensor) -> Tensor:
    kept = (torch.float64, torch.complex64, torch.complex128)
    return x if x.dtype in kept else x.float()
