import pytest
import torch

from dfa.core.ffr import feature_rectification_loss, prototypes, select_tokens
from dfa.core.spectrum import Band, low_pass

GRID = (6, 5)
OPTIONS = {"confidence": 0.6, "fallback_share": 0.1}


def scene(seed=0):
    """Two images: the first with the classes 2 and 5, the second with class 1 and an unused slot."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 8, 30, generator=generator)
    cam = torch.rand(2, 30, 2, generator=generator)
    visible = torch.ones(2, 30, dtype=torch.bool)
    visible[1, 20:] = False
    return features, cam, torch.tensor([[2, 5], [1, 0]]), visible


def low_band(features):
    return low_pass(features.unflatten(2, GRID), Band(0.2, "half_width")).flatten(2)


def slow_prototype(features, cam, visible, confidence):
    """One class of one image, token after token in fp64."""
    tokens = [t for t in range(30) if visible[t]]
    chosen = [t for t in tokens if cam[t] > confidence]
    if not chosen:
        chosen = sorted(tokens, key=lambda t: -cam[t])[: -(-len(tokens) // 10)]
    mean = sum(cam[t].double() * features[:, t].double() for t in chosen)
    return mean / mean.norm()


@pytest.mark.parametrize("confidence", [0.6, 1.0])
def test_a_prototype_is_the_weighted_mean_of_confident_tokens_or_of_the_best_tenth(confidence):
    features, cam, classes, visible = scene()
    cam[0, :, 1] *= 0.5  # never confident, beside a class that is
    found = prototypes(features, cam, classes, visible, confidence=confidence, fallback_share=0.1)
    for image, slot in ((0, 0), (0, 1), (1, 0)):
        expected = slow_prototype(features[image], cam[image, :, slot], visible[image], confidence)
        torch.testing.assert_close(found[image, slot].double(), expected, atol=1e-6, rtol=0)
    assert found[1, 1].abs().sum() == 0  # nothing is in this slot


def test_tokens_are_selected_where_the_two_cosines_part():
    features, cam, classes, visible = scene()
    low, found = low_band(features), prototypes(features, cam, classes, visible, **OPTIONS)
    selected = select_tokens(features, low, found, visible, deviations=1.0)
    for image, slot in ((0, 0), (0, 1), (1, 0)):
        tokens = [t for t in range(30) if visible[image, t]]
        gaps = []
        for t in tokens:
            cosines = [
                torch.cosine_similarity(x[image, :, t].double(), found[image, slot].double(), dim=0)
                for x in (features, low)
            ]
            gaps.append(abs(float(cosines[0] - cosines[1])))
        gaps = torch.tensor(gaps, dtype=torch.float64)
        limit = gaps.mean() + gaps.std(correction=0)
        expected = [t for t, gap in zip(tokens, gaps, strict=True) if gap > limit]
        assert selected[image, slot].nonzero()[:, 0].tolist() == expected and expected
    assert not selected[1, 1].any()


def test_the_gradient_reaches_selected_tokens_only_and_never_through_the_low_band():
    features, cam, classes, visible = scene()
    features.requires_grad_()
    low = low_band(features)
    low.retain_grad()
    found = prototypes(features, cam, classes, visible, **OPTIONS)
    selected = select_tokens(features, low, found, visible, deviations=1.0)
    total, count = feature_rectification_loss(features, low, selected)
    total.backward()
    touched = features.grad.abs().sum(1) > 0
    assert torch.equal(touched, selected.any(1)) and touched.any() and not touched.all()
    assert low.grad is None and count == touched.sum()
    assert not found.requires_grad
    # What arrives is the cosine's own gradient, with the low band a constant.
    leaf = features.detach().clone().requires_grad_()
    cosine = torch.cosine_similarity(leaf, low.detach(), dim=1)
    (1 - cosine)[selected.any(1)].sum().backward()
    torch.testing.assert_close(features.grad, leaf.grad)


def test_a_token_that_two_classes_select_counts_once():
    features, *_ = scene()
    low = low_band(features)
    one = torch.zeros(2, 2, 30, dtype=torch.bool)
    one[0, 0, [3, 7]] = True
    both = one.clone()
    both[0, 1, [7, 9]] = True
    distance = 1 - torch.cosine_similarity(features, low, dim=1)[0]
    total, count = feature_rectification_loss(features, low, both)
    torch.testing.assert_close(total, distance[[3, 7, 9]].sum())
    assert count == 3 and feature_rectification_loss(features, low, one)[1] == 2


def test_nothing_selected_is_zero_and_finite_with_its_gradient():
    features, _, _, visible = scene()
    features.requires_grad_()
    constant = torch.ones(2, 8, 30)
    cases = [
        (features, torch.zeros(2, 0, 30, dtype=torch.bool)),  # a batch of images without classes
        (features, torch.zeros(2, 2, 30, dtype=torch.bool)),
        (
            torch.zeros_like(features, requires_grad=True),
            select_tokens(constant, constant, torch.ones(2, 1, 8), visible, deviations=1.0),
        ),
    ]
    for leaf, selected in cases:
        total, count = feature_rectification_loss(leaf, low_band(leaf), selected)
        (gradient,) = torch.autograd.grad(total, leaf)
        assert total == 0 and count == 0 and gradient.abs().sum() == 0


def test_a_class_whose_cam_is_empty_and_an_image_that_is_all_padding_select_nothing():
    features, cam, classes, visible = scene()
    cam[0, :, 1] = 0
    visible[1] = False
    found = prototypes(features, cam, classes, visible, **OPTIONS)
    selected = select_tokens(features, low_band(features), found, visible, deviations=1.0)
    assert found.isfinite().all() and found[0, 1].abs().sum() == 0 and found[1].abs().sum() == 0
    assert selected[0, 0].any() and not selected[0, 1].any() and not selected[1].any()


def test_autocast_does_not_lower_the_precision():
    features, cam, classes, visible = scene()
    low = low_band(features)
    expected = prototypes(features, cam, classes, visible, **OPTIONS)
    chosen = select_tokens(features, low, expected, visible, deviations=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prototypes(features, cam, classes, visible, **OPTIONS)
        selected = select_tokens(features, low, found, visible, deviations=1.0)
        total, _ = feature_rectification_loss(features.bfloat16(), low, selected)
    assert torch.equal(found, expected) and torch.equal(selected, chosen) and total.dtype == torch.float32


def test_an_impossible_share_is_refused():
    with pytest.raises(ValueError, match="fallback_share must be above 0 and at most 1, got 0"):
        prototypes(*scene(), confidence=0.5, fallback_share=0)
