"""Low and high band of feature maps on the patch grid (METHOD 1.6; DFA's LFAA and HFAR, FFR)."""

from functools import lru_cache
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

BandMeasure = Literal["half_width", "side", "area"]


def band_mask(height: int, width: int, *, mu: float, mu_as: BandMeasure, device: torch.device | str) -> Tensor:
    """Bins of the low band `B_mu`: the square `max(|fx|, |fy|) <= limit`, bool hw, in unshifted fftfreq order.

    Frequencies are in cycles per patch, so an axis spans [-1/2, 1/2]. Our reading, since neither paper says what the 0.4 of its
    "regional ratio" measures: `half_width` limit = mu (0.4 keeps 17 of 20 bins an axis), `side` the square's side is the share mu
    of the axis (limit = mu/2), `area` its area is the share mu of all bins (limit = sqrt(mu)/2).
    A bin and its negative are always kept or dropped together (the lone Nyquist bin of an even axis is its own negative), so the
    band of a real signal is real. Cached: do not write to the result.

    >>> band_mask(1, 4, mu=0.25, mu_as="half_width", device="cpu")
    tensor([[ True,  True, False,  True]])
    """
    return _cached_mask(height, width, mu, mu_as, str(device))


@lru_cache(maxsize=256)
def _cached_mask(height: int, width: int, mu: float, mu_as: str, device: str) -> Tensor:
    limits = {"half_width": mu, "side": mu / 2, "area": sqrt(max(mu, 0.0)) / 2}
    if mu_as not in limits:
        raise ValueError(f"mu_as must be one of {sorted(limits)}, got {mu_as!r}")
    limit = limits[mu_as]
    if not (mu >= 0 and limit <= 0.5):
        raise ValueError(f"mu must be in [0, {0.5 if mu_as == 'half_width' else 1}] as {mu_as}, got {mu}")
    if height < 1 or width < 1:
        raise ValueError(f"the grid must have at least one patch, got {height} x {width}")
    # A tensor made under inference mode could never again be part of a training step.
    with torch.inference_mode(False):
        rows, columns = (_inside(size, limit, device) for size in (height, width))
        return rows[:, None] & columns[None, :]


def _inside(size: int, limit: float, device: str) -> Tensor:
    index = torch.arange(size, device=device)
    # Integers against limit * size, with room for products such as 0.1 * 30 that miss an integer by rounding.
    return torch.minimum(index, size - index) <= limit * size + 1e-6


def low_pass(x_BDhw: Tensor, *, mu: float, mu_as: BandMeasure) -> Tensor:
    """`F^-1(B_mu . F(x))` over the last two axes, of the shape of x; fp32 at least, also under autocast (METHOD 1.6).

    >>> low_pass(torch.tensor([[[[1.0, -1.0, 1.0, -1.0]]]]), mu=0.0, mu_as="half_width").abs().max()
    tensor(0.)
    """
    height, width = x_BDhw.shape[-2:]
    mask_hw = band_mask(height, width, mu=mu, mu_as=mu_as, device=x_BDhw.device)
    with torch.autocast(x_BDhw.device.type, enabled=False):
        x_BDhw = x_BDhw if x_BDhw.dtype == torch.float64 else x_BDhw.float()
        spectrum = torch.fft.rfft2(x_BDhw) * mask_hw[:, : width // 2 + 1]
        return torch.fft.irfft2(spectrum, s=(height, width))


def split(x_BDhw: Tensor, *, mu: float, mu_as: BandMeasure) -> tuple[Tensor, Tensor]:
    """Low band and the rest, `F_ld` and `F_hd = F_d - F_ld`: they add up to x (METHOD 1.6)."""
    low_BDhw = low_pass(x_BDhw, mu=mu, mu_as=mu_as)
    return low_BDhw, x_BDhw.to(low_BDhw.dtype) - low_BDhw
