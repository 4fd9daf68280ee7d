import math

import pytest
import torch

from dfa.core.rectify import (
    alignment_loss,
    quality_mask,
    rectification_loss,
    relations,
    reliable_masks,
    resolve_unreliable,
)


def symmetric(images=2, patches=8, seed=0):
    values = torch.rand(images, patches, patches, generator=torch.Generator().manual_seed(seed))
    return 0.5 * (values + values.mT)


def test_relations_are_sigmoids_of_centred_cosines():
    features = torch.randn(2, 5, 7) + 3
    actual = relations(features.requires_grad_(), gain=5.0)
    for image in range(2):
        centred = features[image].detach().double() - features[image].detach().double().mean(1, keepdim=True)
        for i in range(7):
            for j in range(7):
                cosine = float(centred[:, i] @ centred[:, j] / centred[:, i].norm() / centred[:, j].norm())
                assert math.isclose(float(actual[image, i, j]), 1 / (1 + math.exp(-5 * cosine)), abs_tol=1e-6)
    assert torch.equal(actual, actual.mT)
    assert not actual.requires_grad


def test_relations_of_identical_tokens_are_undecided_not_nan():
    assert torch.equal(relations(torch.ones(1, 4, 3), gain=5.0), torch.full((1, 3, 3), 0.5))


def test_quality_value_is_the_mean_difference_per_image():
    teacher, affinity = symmetric(), 0.2 * symmetric(seed=1)
    affinity[1] = teacher[1] - 0.25
    mask, alpha = quality_mask(teacher, affinity)
    for image in range(2):
        differences = [
            abs(float(teacher[image, i, j]) - float(affinity[image, i, j])) for i in range(8) for j in range(8)
        ]
        expected = sum(differences) / 64
        assert math.isclose(float(alpha[image]), expected, abs_tol=1e-6)
        assert torch.equal(mask[image], teacher[image] > alpha[image])
    assert 0 < mask.float().mean() < 1


def slow_alignment(teacher, logit, mask, student):
    total = 0.0
    images, patches, _ = teacher.shape
    for b in range(images):
        for i in range(patches):
            inside = [j for j in range(patches) if mask[b, i, j]]
            support = inside if student == "inside_mask" else range(patches)
            teacher_sum = sum(math.exp(teacher[b, i, j]) for j in support)
            student_sum = sum(math.exp(logit[b, i, j]) for j in support)
            for j in inside:
                s = math.exp(teacher[b, i, j]) / teacher_sum
                a = math.exp(logit[b, i, j]) / student_sum
                total += s * math.log(s / a)
    return total


@pytest.mark.parametrize("student", ["inside_mask", "full_row"])
def test_alignment_loss_equals_its_definition(student):
    teacher, logit = symmetric(), 3 * torch.randn(2, 8, 8)
    mask = teacher > 0.5
    mask[0, 3] = False
    total, count = alignment_loss(teacher, logit, mask, student=student)
    expected = slow_alignment(teacher.double(), logit.double(), mask, student)
    assert math.isclose(float(total), expected, rel_tol=1e-5)
    assert count == mask.sum() and count.dtype == torch.float32


@pytest.mark.parametrize("student", ["inside_mask", "full_row"])
def test_alignment_gradient_matches_finite_differences_and_spares_the_teacher(student):
    teacher = symmetric(1, 4).double().requires_grad_()
    logit = torch.randn(1, 4, 4, requires_grad=True)
    mask = teacher.detach() > 0.4
    mask[0, 1] = False
    total, _ = alignment_loss(teacher, logit, mask, student=student)
    total.backward()
    assert teacher.grad is None
    for i in range(4):
        for j in range(4):
            step = torch.zeros(1, 4, 4, dtype=torch.float64)
            step[0, i, j] = 1e-5
            up = slow_alignment(teacher.detach(), logit.detach().double() + step, mask, student)
            down = slow_alignment(teacher.detach(), logit.detach().double() - step, mask, student)
            assert math.isclose(float(logit.grad[0, i, j]), (up - down) / 2e-5, abs_tol=1e-5)


def test_alignment_inside_the_mask_is_a_divergence_that_vanishes_at_the_teacher():
    teacher = symmetric()
    mask = teacher > 0.4
    total, _ = alignment_loss(teacher, teacher + 7.0, mask, student="inside_mask")
    assert abs(total) < 1e-5
    for seed in range(5):
        logit = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert alignment_loss(teacher, logit, mask, student="inside_mask")[0] > 0


def test_losses_of_an_empty_selection_are_zero_with_zero_gradient():
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    logit = torch.randn(1, 4, 4, requires_grad=True)
    pairs = [
        alignment_loss(symmetric(1, 4), logit, nothing, student=student) for student in ("inside_mask", "full_row")
    ]
    pairs += rectification_loss(logit.sigmoid(), nothing, nothing)
    for total, count in pairs:
        assert total == 0 and count == 0
    sum(total for total, _ in pairs).backward()
    assert torch.equal(logit.grad, torch.zeros(1, 4, 4))


def test_reliable_masks_follow_the_definition_and_skip_ignored_labels():
    values = symmetric(3, 10)
    label = torch.randint(0, 3, (3, 10))
    label[1, ::3] = 255
    label[2] = 255
    positive, negative, known = reliable_masks(values, label)
    for b in range(3):
        places = [(i, j) for i in range(10) for j in range(10) if label[b, i] != 255 and label[b, j] != 255]
        mean = sum(float(values[b, i, j]) for i, j in places) / max(len(places), 1)
        for i in range(10):
            for j in range(10):
                is_known = (i, j) in places
                close, same = float(values[b, i, j]) > mean, bool(label[b, i] == label[b, j])
                assert bool(known[b, i, j]) == is_known
                assert bool(positive[b, i, j]) == (is_known and close and same)
                assert bool(negative[b, i, j]) == (is_known and not close and not same)


@pytest.mark.parametrize("radius", [0, 1, 3, 9, 40])
def test_the_vote_of_neighbours_equals_the_printed_double_sum(radius):
    patches = 14
    values, label = symmetric(2, patches, seed=radius), torch.randint(0, 3, (2, patches))
    label[1, 4:6] = 255
    positive, negative, known = reliable_masks(values, label)
    new_positive, new_negative = resolve_unreliable(positive, negative, known, radius=radius)
    votes_differ = 0
    for b in range(2):
        for p in range(patches):
            for q in range(patches):
                if not known[b, p, q]:
                    assert not new_positive[b, p, q] and not new_negative[b, p, q]
                    continue
                if positive[b, p, q] or negative[b, p, q]:
                    assert new_positive[b, p, q] == positive[b, p, q] and new_negative[b, p, q] == negative[b, p, q]
                    continue
                counts = []
                for mask in (positive[b], negative[b]):
                    near_q = range(max(q - radius, 0), min(q + radius, patches - 1) + 1)
                    near_p = range(max(p - radius, 0), min(p + radius, patches - 1) + 1)
                    counts.append(sum(int(mask[u, p]) for u in near_q) + sum(int(mask[q, v]) for v in near_p))
                assert bool(new_positive[b, p, q]) == (counts[0] > counts[1])
                assert bool(new_negative[b, p, q]) == (counts[0] <= counts[1])
                votes_differ += counts[0] != counts[1]
    assert radius == 0 or votes_differ > 0
    assert torch.equal(new_positive | new_negative, known)
    with pytest.raises(ValueError, match="radius"):
        resolve_unreliable(positive, negative, known, radius=-1)


def test_rectification_loss_pulls_positives_up_and_negatives_down():
    probability = symmetric().requires_grad_()
    positive, negative = symmetric(seed=2) > 0.6, symmetric(seed=2) < 0.3
    (up, num_up), (down, num_down) = rectification_loss(probability, positive, negative)
    expected_up = sum(1 - float(probability.detach()[tuple(place)]) for place in positive.nonzero())
    expected_down = sum(float(probability.detach()[tuple(place)]) for place in negative.nonzero())
    assert math.isclose(up.item(), expected_up, rel_tol=1e-5) and num_up == positive.sum()
    assert math.isclose(down.item(), expected_down, rel_tol=1e-5) and num_down == negative.sum()
    (up + down).backward()
    assert torch.equal(probability.grad, negative.float() - positive.float())
