import pytest
import torch
from torch import nn

from dfa.analysis.gradients import gradient_profiles
from dfa.core.analysis.gradients import cross_entropy_component, logit_gradient
from dfa.report.page import render
from dfa.report.spectral import gradient_report


class Model(nn.Module):
    """Logits as tokens, through two modules that leave them as they are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, tokens_BND):
        return self.second(self.first(tokens_BND))


def images(model, *, count, size=(9, 8)):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = torch.randn(1, 3, *size, generator=generator, dtype=torch.float64)
        mask = torch.randint(0, 3, (1, *size), generator=generator)
        mask[0, 0, 0] = 255
        tokens = logits.flatten(2).mT

        def component(frequency, tokens=tokens, mask=mask):
            return cross_entropy_component(model(tokens).mT.unflatten(2, size), mask, frequency)

        yield component, lambda x_BND: x_BND.mT.unflatten(2, size), logits, mask


def test_the_profile_is_the_closed_form_averaged_over_rings():
    model = Model()
    made = list(images(model, count=2))
    found = gradient_profiles([each[:2] for each in made], {"a": model.first, "b": model.second}, nu_max=3)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for _, _, logits, mask in made:
        for i in range(4):
            gradients = [logit_gradient(logits, mask, each).abs()[0].mean(0) for each in {(i, 0), (0, i)}]
            magnitude = sum(gradients) / len(gradients)
            for j in range(4):
                ring = [
                    float(magnitude[y, x]) for y in range(9) for x in range(8) if max(min(y, 9 - y), min(x, 8 - x)) == j
                ]
                expected[i, j] += sum(ring) / len(ring) / len(made)
    torch.testing.assert_close(found["a"], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found["b"], expected, atol=1e-12, rtol=0)


def test_what_has_no_profile_is_refused():
    model = Model()
    with pytest.raises(ValueError, match="at least one image"):
        gradient_profiles([], {"a": model.first}, nu_max=2)
    made = [each[:2] for each in images(model, count=1)]
    with pytest.raises(ValueError, match=r"nu_max 5 exceeds half of the shorter side of \(9, 8\)|frequency"):
        gradient_profiles(made, {"a": model.first}, nu_max=5)
    with pytest.raises(ValueError, match="the module must run once"):
        gradient_profiles(made, {"a": nn.Identity()}, nu_max=2)


def test_the_page_has_a_figure_a_module():
    profiles = {name: torch.rand(4, 4, dtype=torch.float64) for name in ("fused <feature>", "logits")}
    page = render(gradient_report(profiles, title="gradients", provenance={"images": "k1, k2"}))
    assert "k1, k2" in page
    assert page.count("<img") == 2 and "towards the frequencies of: fused &lt;feature&gt;" in page
