"""Spectral gradients: how one frequency of a loss, or of an output, depends on each frequency of a feature (METHOD 3).

Spectral analysis, theorem 2 and lemmas 5-6. A spectral gradient is taken towards `x(nu_j)`, the orthonormal spectrum of a real
map X: `SpG(nu_i, nu_j) = dL(nu_i) / dx(nu_j) = F^-1(dRe L / dX + i dIm L / dX)(nu_j)`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfa.core.analysis.cross_entropy import VOID, cross_entropy_spectrum, one_hot
from dfa.core.spectrum import inverse_transform, transform


def cross_entropy_component(logits_BCHW: Tensor, target_BHW: Tensor, frequency: tuple[int, int]) -> Tensor:
    """`L_ce(nu_i)` at one frequency: complex B, differentiable. frequency: (ny, nx) in bins, negative ones too."""
    return cross_entropy_spectrum(logits_BCHW, target_BHW)[(slice(None), *_place(frequency, target_BHW))]


def spectral_gradient(component: Tensor, feature_BDHW: Tensor) -> Tensor:
    """`F^-1(dRe L/dX + i dIm L/dX)` of any real map X in the graph of a complex L: complex, of the shape of X.

    component: `L_ce(nu_i)` or a bin of any output's spectrum; several values (images) are summed, which mixes nothing as long as
    each depends on its own image. feature: its last two axes are space. The graph is kept.
    """
    return inverse_transform(_gradient(component, feature_BDHW, lambda gradient: gradient))


def module_gradient(
    module: nn.Module, run: Callable[[], Tensor], *, to_map: Callable[[Tensor], Tensor] = lambda output: output
) -> Tensor:
    """The spectral gradient of a loss towards the output of any module of a torch model (the paper's ASPP features).

    run: calls the model, with the module somewhere inside, and returns the complex `L(nu_i)`.
    to_map: brings the module's output to (..., H, W), for tokens say `lambda x_BND: x_BND.mT.unflatten(2, grid)`; it must only
        move elements.

    Raises:
        ValueError: the module did not run, ran more than once, or does not return one tensor.
    """
    outputs = list[Any]()

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        kept = output if not isinstance(output, Tensor) or output.requires_grad else output.detach().requires_grad_()
        outputs.append(kept)
        # What follows may work in place, on a copy.
        return kept.clone() if isinstance(kept, Tensor) else kept

    handle = module.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            component = run()
            if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
                kinds = [type(output).__name__ for output in outputs]
                raise ValueError(f"the module must run once and return one tensor, got {kinds}")
            return inverse_transform(_gradient(component, outputs[0], to_map))
    finally:
        handle.remove()


def _gradient(component: Tensor, feature: Tensor, to_map: Callable[[Tensor], Tensor]) -> Tensor:
    """`dRe L/dX + i dIm L/dX`."""
    if not component.is_complex():
        raise ValueError(f"the component must be complex, as L_ce(nu) is, got {component.dtype}")
    parts = (
        _at_least_single(to_map(torch.autograd.grad(part.sum(), feature, retain_graph=True)[0]))
        for part in (component.real, component.imag)
    )
    return torch.complex(*parts)


def logit_gradient(logits_BCHW: Tensor, target_BHW: Tensor, frequency: tuple[int, int]) -> Tensor:
    """`dL_ce(nu_i)/dy(nu_j, c) = v(-nu_i) s(nu_i - nu_j, c) / sqrt(HW) - delta_ij b(-nu_i, c)`: complex B x C x H x W.

    The exact discrete form of eq. 51-53, without the paper's sum over all of space: s is the spectrum of the softmax, b that of the
    annotation and v that of the valid pixels, `sum_c b`, a delta at zero where nothing is void. Axes H, W are nu_j.
    """
    height, width = target_BHW.shape[-2:]
    probability_BCHW = torch.softmax(_at_least_single(logits_BCHW), dim=1)
    truth_BCHW = one_hot(target_BHW, num_classes=logits_BCHW.shape[1], dtype=probability_BCHW.dtype)
    place = _place(frequency, target_BHW)
    valid_B = transform((target_BHW != VOID).to(probability_BCHW.dtype))[(slice(None), *place)].conj()
    shifted_BCHW = _shifted(transform(probability_BCHW), frequency)
    gradient_BCHW = valid_B[:, None, None, None] * shifted_BCHW / (height * width) ** 0.5
    at = (slice(None), slice(None), *place)
    gradient_BCHW[at] -= transform(truth_BCHW)[at].conj()
    return gradient_BCHW


def circular_convolution(x_HW: Tensor, kernel_HW: Tensor) -> Tensor:
    """`Z = K * X`, wrapped around: `Z(t) = sum_u K(u) X(t - u)`. kernel: of the size of x, centred on [0, 0]."""
    return inverse_transform(_unnormalised(kernel_HW) * transform(x_HW)).real


def convolution_gradient(z_HW: Tensor, kernel_HW: Tensor, frequency: tuple[int, int]) -> Tensor:
    """`dy(nu_i)/dx(nu_j) = k_j (delta_ij / 2 + z(nu_i - nu_j) / (4 sqrt(HW)))`: complex HW, axes nu_j (lemma 5, eq. 48).

    For `Y = softplus(Z)`, `Z = K * X` (`circular_convolution`), to second order in Z, softplus(Z) = log 2 + Z/2 + Z^2/8: small Z.
    k: the kernel's transform without normalisation. The paper drops the second term too (eq. 49).
    """
    height, width = z_HW.shape[-2:]
    around = _shifted(transform(z_HW), frequency) / (4 * (height * width) ** 0.5)
    around[_place(frequency, z_HW)] += 0.5
    return _unnormalised(kernel_HW) * around


def softplus_gradient(z_HW: Tensor, kernel_HW: Tensor, frequency: tuple[int, int]) -> Tensor:
    """The same without approximation, `k_j g(nu_i - nu_j) / sqrt(HW)`, g the spectrum of `sigmoid(Z)`: what eq. 48 approaches."""
    height, width = z_HW.shape[-2:]
    slope = _shifted(transform(torch.sigmoid(z_HW)), frequency) / (height * width) ** 0.5
    return _unnormalised(kernel_HW) * slope


def _unnormalised(kernel_HW: Tensor) -> Tensor:
    height, width = kernel_HW.shape[-2:]
    return transform(kernel_HW) * (height * width) ** 0.5


def _shifted(spectrum_HW: Tensor, frequency: tuple[int, int]) -> Tensor:
    """`x(nu_i - nu_j)` on axes nu_j."""
    reversed_HW = torch.roll(spectrum_HW.flip((-2, -1)), (1, 1), dims=(-2, -1))  # x(-nu_j)
    return torch.roll(reversed_HW, frequency, dims=(-2, -1))


def _place(frequency: tuple[int, int], map_HW: Tensor) -> tuple[int, int]:
    height, width = map_HW.shape[-2:]
    for bins, size in zip(frequency, (height, width), strict=True):
        if abs(bins) > size // 2:
            raise ValueError(f"frequency {frequency} exceeds half of the size, {height} x {width}")
    return frequency[0] % height, frequency[1] % width


def _at_least_single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
