import pytest
import torch
from torch.nn import functional as F

from dfa.core.analysis.cross_entropy import VOID
from dfa.core.analysis.gradients import (
    circular_convolution,
    convolution_gradient,
    cross_entropy_component,
    logit_gradient,
    module_gradient,
    softplus_gradient,
    spectral_gradient,
)
from dfa.core.spectrum import inverse_transform, transform
from tests.core.analysis.test_cross_entropy import scene, slow_spectrum

SIZES = [(5, 5), (4, 6), (7, 4)]
FREQUENCIES = [(0, 0), (1, 0), (-2, 1), (2, -2)]


def derivative(function, x, direction):
    """The derivative of a complex function along a real direction, by central differences in fp64."""
    step = 1e-6
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def slow_gradient(function, x):
    """dL/dx(nu_j) of a complex function of a real map: the derivatives by every pixel, then the inverse transform's sums."""
    by_pixel = torch.zeros(x.shape, dtype=torch.complex128)
    for p in range(x.shape[0]):
        for q in range(x.shape[1]):
            direction = torch.zeros_like(x)
            direction[p, q] = 1
            by_pixel[p, q] = derivative(function, x, direction)
    # F^-1 is F with the sign turned: conj(F(conj)).
    return slow_spectrum(by_pixel.real).conj() + 1j * slow_spectrum(by_pixel.imag).conj()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frequency", FREQUENCIES)
@pytest.mark.parametrize("void", [0.0, 0.3])
def test_the_exact_form_for_logits_equals_automatic_differentiation(size, frequency, void):
    logits, target = scene(size, void=void)
    logits.requires_grad_()
    component = cross_entropy_component(logits, target, frequency)
    found = logit_gradient(logits.detach(), target, frequency)
    torch.testing.assert_close(found, spectral_gradient(component, logits), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_a_spectral_gradient_equals_slow_differences_and_sums(size):
    logits, target = scene(size, images=1)

    def function(x):
        changed = torch.cat([x[None], logits[0, 1:]])[None]
        return cross_entropy_component(changed, target, (1, -2))[0]

    expected = slow_gradient(function, logits[0, 0])
    # Central differences of step 1e-6 in fp64 are good to about 1e-9.
    torch.testing.assert_close(logit_gradient(logits, target, (1, -2))[0, 0], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frequency", FREQUENCIES)
def test_a_small_convolution_with_softplus(size, frequency):
    generator = torch.Generator().manual_seed(0)
    x, kernel = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    z = circular_convolution(x, kernel)
    place = tuple(n % length for n, length in zip(frequency, size, strict=True))
    wrapped = sum(kernel[u, v] * x.roll((u, v), (0, 1)) for u in range(size[0]) for v in range(size[1]))
    torch.testing.assert_close(z, wrapped, atol=1e-12, rtol=0)
    # The form is exact for the second-order activation that it was derived from.
    quadratic = transform(0.6931471805599453 + z / 2 + z.square() / 8)[place]
    found = convolution_gradient(z.detach(), kernel, frequency)
    torch.testing.assert_close(found, spectral_gradient(quadratic, x), atol=1e-12, rtol=0)
    exact = spectral_gradient(transform(F.softplus(z))[place], x)
    torch.testing.assert_close(softplus_gradient(z.detach(), kernel, frequency), exact, atol=1e-12, rtol=0)


def test_the_approximation_improves_with_the_third_power_of_the_kernel():
    generator = torch.Generator().manual_seed(0)
    x, kernel = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    errors = []
    for size in (0.02, 0.01):
        z = circular_convolution(x, size * kernel)
        difference = convolution_gradient(z, size * kernel, (1, 2)) - softplus_gradient(z, size * kernel, (1, 2))
        errors.append(float(difference.abs().max()) / size)
    # sigmoid(z) = 1/2 + z/4 - z^3/48: relative to the kernel the error is of third order.
    assert 7 < errors[0] / errors[1] < 9


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 1)

    def forward(self, image):
        return self.second(self.first(image).relu_())


def test_the_gradient_of_any_module_equals_that_of_a_leaf_in_its_place():
    torch.manual_seed(0)
    network, image = Network().double(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    target = torch.randint(0, 3, (2, 6, 7))
    target[:, 0] = VOID

    def run():
        return cross_entropy_component(network(image), target, (2, -1))

    with torch.no_grad():  # the analysis of a frozen model in evaluation
        network.requires_grad_(False)
        found = module_gradient(network.first, run)
    leaf = network.first(image).detach().requires_grad_()
    component = cross_entropy_component(network.second(leaf.relu()), target, (2, -1))
    real = torch.autograd.grad(component.real.sum(), leaf, retain_graph=True)[0]
    imaginary = torch.autograd.grad(component.imag.sum(), leaf)[0]
    torch.testing.assert_close(found, inverse_transform(torch.complex(real, imaginary)), atol=1e-14, rtol=0)
    tokens = module_gradient(network.first, run, to_map=lambda output: output.flatten(2).mT.mT.unflatten(2, (6, 7)))
    torch.testing.assert_close(tokens, found)
    assert not network.first._forward_hooks


def test_impossible_gradients_are_refused():
    network, image = Network(), torch.randn(1, 3, 4, 4)
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must run once and return one tensor, got \[\]"):
        module_gradient(torch.nn.ReLU(), lambda: cross_entropy_component(network(image), target, (0, 0)))
    with pytest.raises(ValueError, match="must be complex"):
        module_gradient(network.first, lambda: network(image).sum())
    with pytest.raises(ValueError, match=r"frequency \(3, 0\) exceeds half of the size, 4 x 4"):
        cross_entropy_component(network(image), target, (3, 0))
