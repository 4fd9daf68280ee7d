"""Which frequencies of a model's features each frequency of the loss reaches (METHOD 3; spectral analysis, theorem 2)."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dfa.core.analysis.cross_entropy import ring_means
from dfa.core.analysis.gradients import module_gradient

Component = Callable[[tuple[int, int]], Tensor]
"""(ny, nx) -> the complex `L_ce(ny, nx)` of some images, with the modules in its graph."""


def gradient_profiles(
    images: Iterable[tuple[Component, Callable[[Tensor], Tensor]]], modules: Mapping[str, nn.Module], *, nu_max: int
) -> dict[str, Tensor]:
    """For each module P, fp64 (nu_max + 1) x (nu_max + 1): `P[i, j]` is `|dL_ce(nu_i) / dx(nu_j)|` averaged over `nu_i = (i, 0)` and
    `(0, i)`, the features' channels, the ring `max(|ny|, |nx|) = j` and all images.

    The paper finds it largest at j = i, and at 0: a frequency of the loss is made by the same frequency of the features.

    images: for each the component, and what brings a module's output to (..., h, w) (see `module_gradient`). nu_max: at most half
    of the shorter side of the maps.

    Raises:
        ValueError: no image, or as `module_gradient`.
    """
    sums = {name: torch.zeros(nu_max + 1, nu_max + 1, dtype=torch.float64) for name in modules}
    count = 0
    for component, to_map in images:
        count += 1
        for name, module in modules.items():
            for bins in range(nu_max + 1):
                found = [_means(module, component, each, to_map, nu_max) for each in _directions(bins)]
                sums[name][bins] += torch.stack(found).mean(0)
    if not count:
        raise ValueError("a profile of gradients needs at least one image")
    return {name: each / count for name, each in sums.items()}


def _directions(bins: int) -> Iterator[tuple[int, int]]:
    yield bins, 0
    if bins:
        yield 0, bins


def _means(
    module: nn.Module,
    component: Component,
    frequency: tuple[int, int],
    to_map: Callable[[Tensor], Tensor],
    nu_max: int,
) -> Tensor:
    gradient_BDhw = module_gradient(module, lambda: component(frequency), to_map=to_map)
    if nu_max > min(gradient_BDhw.shape[-2:]) // 2:
        raise ValueError(f"nu_max {nu_max} exceeds half of the shorter side of {tuple(gradient_BDhw.shape[-2:])}")
    return ring_means(gradient_BDhw, nu_max=nu_max)
