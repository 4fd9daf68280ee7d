import math

import numpy as np
import pytest
import torch

from dfa.core.affinity import symmetric_affinity
from dfa.core.rectify import (
    alignment_loss,
    dense_mask,
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


def visible_pairs(images=2, patches=8):
    """All pairs but those of the first image's last two patches, which are padding."""
    visible = torch.ones(images, patches, dtype=torch.bool)
    visible[0, patches - 2 :] = False
    return visible[:, :, None] & visible[:, None, :]


@pytest.mark.parametrize("rule", ["mean", "row_mean", "share", "alpha"])
def test_dense_pairs_exceed_the_threshold_of_their_rule_over_visible_pairs(rule):
    teacher, affinity, visible = symmetric(), 0.2 * symmetric(seed=1), visible_pairs()
    mask = dense_mask(teacher, affinity, visible, rule=rule, share=0.25)
    for b in range(2):
        places = [(i, j) for i in range(8) for j in range(8) if visible[b, i, j]]
        values = {place: float(teacher[b][place]) for place in places}
        for i in range(8):
            for j in range(8):
                if (i, j) not in values:
                    assert not mask[b, i, j]
                    continue
                if rule == "mean":
                    threshold = sum(values.values()) / len(values)
                elif rule == "row_mean":
                    row = [value for place, value in values.items() if place[0] == i]
                    threshold = sum(row) / len(row)
                elif rule == "share":
                    threshold = float(np.quantile(list(values.values()), 0.75))
                else:
                    differences = [abs(value - float(affinity[b][place])) for place, value in values.items()]
                    threshold = sum(differences) / len(differences)
                assert bool(mask[b, i, j]) == (values[i, j] > threshold)
        assert 0 < mask[b].float().mean() < 1


def test_rules_and_teachers_that_do_not_exist_are_refused():
    teacher, visible = symmetric(), visible_pairs()
    with pytest.raises(ValueError, match="rule must be mean, row_mean, share or alpha, got 'median'"):
        dense_mask(teacher, teacher, visible, rule="median", share=0.5)
    with pytest.raises(ValueError, match="share must lie between 0 and 1, got 1"):
        dense_mask(teacher, teacher, visible, rule="share", share=1)
    with pytest.raises(ValueError, match="teacher must be softmax, logit or sum, got 'raw'"):
        alignment_loss(teacher, teacher, visible, visible, teacher="raw", student="divergence")
    with pytest.raises(ValueError, match="student must be divergence, inside_mask or full_row, got 'mask'"):
        alignment_loss(teacher, teacher, visible, visible, teacher="softmax", student="mask")


def weight_of(relation, kind):
    """What S~ is proportional to."""
    return {"softmax": math.exp(relation), "logit": relation / (1 - relation), "sum": relation}[kind]


def slow_alignment(teacher, logit, mask, visible, kind, student):
    total = 0.0
    images, patches, _ = teacher.shape
    for b in range(images):
        for i in range(patches):
            inside = [j for j in range(patches) if mask[b, i, j]]
            row = [j for j in range(patches) if visible[b, i, j]]
            teacher_row = row if student == "full_row" else inside
            student_row = inside if student == "inside_mask" else row
            teacher_sum = sum(weight_of(float(teacher[b, i, j]), kind) for j in teacher_row)
            student_sum = sum(math.exp(logit[b, i, j]) for j in student_row)
            for j in inside:
                s = weight_of(float(teacher[b, i, j]), kind) / teacher_sum
                a = math.exp(logit[b, i, j]) / student_sum
                total += s * math.log(s / a)
    return total


STUDENTS = ["divergence", "inside_mask", "full_row"]


@pytest.mark.parametrize("kind", ["softmax", "logit", "sum"])
@pytest.mark.parametrize("student", STUDENTS)
def test_alignment_loss_equals_its_definition(student, kind):
    teacher, logit, visible = symmetric(), 3 * torch.randn(2, 8, 8), visible_pairs()
    mask = (teacher > 0.5) & visible
    mask[0, 3] = False
    total, count = alignment_loss(teacher, logit, mask, visible, teacher=kind, student=student)
    expected = slow_alignment(teacher.double(), logit.double(), mask, visible, kind, student)
    assert math.isclose(float(total), expected, rel_tol=1e-5)
    assert count == mask.sum() and count.dtype == torch.float32


@pytest.mark.parametrize("student", STUDENTS)
def test_alignment_gradient_matches_finite_differences_and_spares_the_teacher(student):
    teacher = symmetric(1, 4).double().requires_grad_()
    logit = torch.randn(1, 4, 4, requires_grad=True)
    mask, visible = teacher.detach() > 0.4, torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 1] = False
    total, _ = alignment_loss(teacher, logit, mask, visible, teacher="softmax", student=student)
    total.backward()
    assert teacher.grad is None

    def slow(change):
        changed = logit.detach().double() + change
        return slow_alignment(teacher.detach(), changed, mask, visible, "softmax", student)

    for i in range(4):
        for j in range(4):
            step = torch.zeros(1, 4, 4, dtype=torch.float64)
            step[0, i, j] = 1e-5
            assert math.isclose(float(logit.grad[0, i, j]), (slow(step) - slow(-step)) / 2e-5, abs_tol=1e-5)


def test_the_divergence_vanishes_only_where_the_student_has_the_teacher_s_row_inside_the_mask():
    teacher, visible = symmetric(), torch.ones(2, 8, 8, dtype=torch.bool)
    mask = teacher > 0.4
    settings = {"teacher": "softmax", "student": "divergence"}
    total, _ = alignment_loss(teacher, teacher.masked_fill(~mask, -50.0) + 7.0, mask, visible, **settings)
    assert abs(total) < 1e-5
    assert alignment_loss(teacher, teacher, mask, visible, **settings)[0] > 1  # mass lies outside
    for seed in range(5):
        logit = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert alignment_loss(teacher, logit, mask, visible, **settings)[0] > 0


def affinity_after_training(student, rule):
    """Share of an affinity's mass on the same object, before and after 300 steps of L_a towards relations that know the objects.

    60 patches of 3 objects; the un-learned affinity and the relations both prefer the own object, with noise.
    """
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(60) % 3
    same = (owner[:, None] == owner[None, :])[None]
    noise = torch.randn(2, 1, 60, 60, generator=generator)
    noise = 0.5 * (noise + noise.mT)
    teacher = torch.sigmoid(torch.where(same, 2.0, -1.0) + 0.5 * noise[0])
    logit = (torch.where(same, 1.0, 0.0) + noise[1]).requires_grad_()
    visible, optimizer = torch.ones_like(same), torch.optim.Adam([logit], lr=0.05)

    def share():
        affinity = symmetric_affinity(logit.detach().clamp(-5, 5).exp(), rounds=3)
        return float(affinity[same].sum() / affinity.sum())

    before = share()
    for _ in range(300):
        mask = dense_mask(teacher, logit.detach().sigmoid(), visible, rule=rule, share=0.5)
        total, count = alignment_loss(teacher, logit, mask, visible, teacher="softmax", student=student)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return before, share()


def test_alignment_moves_an_affinity_onto_the_object_and_the_old_reading_off_it():
    before, after = affinity_after_training("divergence", "mean")
    assert 0.5 < before < 0.65 and after > 0.95
    before, after = affinity_after_training("inside_mask", "alpha")
    assert after < before - 0.05


def test_losses_of_an_empty_selection_are_zero_with_zero_gradient():
    nothing, visible = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    logit = torch.randn(1, 4, 4, requires_grad=True)
    pairs = [
        alignment_loss(symmetric(1, 4), logit, nothing, visible, teacher="softmax", student=student)
        for student in STUDENTS
    ]
    pairs += rectification_loss(logit.sigmoid(), nothing, nothing)
    for total, count in pairs:
        assert total == 0 and count == 0
    sum(total for total, _ in pairs).backward()
    assert torch.equal(logit.grad, torch.zeros(1, 4, 4))


@pytest.mark.parametrize("pairs", ["all", "foreground"])
def test_reliable_masks_follow_the_definition_and_skip_ignored_labels(pairs):
    values = symmetric(3, 10)
    label = torch.randint(0, 3, (3, 10))
    label[1, ::3] = 255
    label[2] = 255
    positive, negative, known = reliable_masks(values, label, pairs=pairs)
    for b in range(3):
        places = [(i, j) for i in range(10) for j in range(10) if label[b, i] != 255 and label[b, j] != 255]
        if pairs == "foreground":
            places = [(i, j) for i, j in places if label[b, i] > 0 or label[b, j] > 0]
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
