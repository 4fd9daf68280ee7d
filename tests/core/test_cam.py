import math

import pytest
import torch

from dfa.core.cam import (
    class_scores,
    max_normalize,
    min_max,
    propagate,
    refine_elementwise,
    scoring_matrix,
    strongest_background,
)
from dfa.core.transport import class_marginal, sinkhorn_plan

MASK = torch.tensor([[True, False, True, True, True], [True, True, True, False, True]])
NUM_FOREGROUND = 3


def inputs(patches=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(2, patches, 5, generator=generator)
    low, high = (torch.rand(2, patches, patches, generator=generator) for _ in range(2))
    return low / low.sum(-1, keepdim=True), score, high / high.sum(-1, keepdim=True)


def slow_min_max(matrix):
    """(A S) per column in float64, stretched to [0, 1]."""
    matrix = matrix.double()
    return (matrix - matrix.amin(0)) / (matrix.amax(0) - matrix.amin(0))


def test_class_scores_are_softmax_over_present_columns_over_their_maximum():
    similarity = 0.5 * torch.randn(2, 9, 5)
    actual = class_scores(similarity, MASK, scale=20.0)
    for image in range(2):
        columns = [c for c in range(5) if MASK[image, c]]
        share = [[0.0] * 5 for _ in range(9)]
        for i in range(9):
            weights = {c: math.exp(20 * float(similarity[image, i, c])) for c in columns}
            for c in columns:
                share[i][c] = weights[c] / sum(weights.values())
        for c in range(5):
            peak = max(share[i][c] for i in range(9))
            for i in range(9):
                expected = share[i][c] / peak if c in columns else 0.0
                assert math.isclose(float(actual[image, i, c]), expected, abs_tol=1e-5)


def test_the_strongest_background_is_the_chance_of_its_best_prompt_against_the_best_present_class():
    similarity = 0.2 * torch.randn(2, 9, 5)
    actual = strongest_background(similarity, MASK, num_foreground=NUM_FOREGROUND, scale=20.0)
    for image in range(2):
        chances = []
        for i in range(9):
            best, rest = (
                max(float(similarity[image, i, c]) for c in columns if MASK[image, c]) for columns in (range(3), (3, 4))
            )
            chances.append(1 / (1 + math.exp(20 * (best - rest))))
        for i in range(9):
            assert math.isclose(float(actual[image, i, 0]), chances[i] / max(chances), abs_tol=1e-5)


@pytest.mark.parametrize("num_foreground", [0, 3])
def test_without_classes_all_is_background(num_foreground):
    similarity, mask = torch.randn(1, 9, 5), torch.ones(1, 5, dtype=torch.bool)
    mask[:, :num_foreground] = False
    score = strongest_background(similarity, mask, num_foreground=num_foreground, scale=20.0)
    assert torch.equal(score, torch.ones(1, 9, 1))


def test_listing_a_background_prompt_twice_changes_nothing():
    similarity = 0.2 * torch.randn(2, 9, 5)
    once = strongest_background(similarity, MASK, num_foreground=NUM_FOREGROUND, scale=20.0)
    twice = torch.cat([similarity, similarity[:, :, 3:]], dim=2)
    mask = torch.cat([MASK, MASK[:, 3:]], dim=1)
    assert torch.equal(strongest_background(twice, mask, num_foreground=NUM_FOREGROUND, scale=20.0), once)


def test_a_column_far_below_all_others_still_reaches_one():
    similarity = torch.zeros(1, 4, 2)
    similarity[..., 1] = -torch.tensor([2.0, 2.5, 3.0, 2.1])
    scores = class_scores(similarity, torch.ones(1, 2, dtype=torch.bool), scale=100.0)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[0, 0], torch.ones(2))


def test_min_max_and_max_normalize_keep_masked_and_constant_columns_at_zero():
    _, score, _ = inputs()
    score[0, :, 2] = 0.7
    stretched = min_max(score, MASK)
    assert (stretched[0, :, 1] == 0).all() and (stretched[0, :, 2] == 0).all()
    torch.testing.assert_close(stretched[1, :, 0].double(), slow_min_max(score[1, :, 0]), atol=1e-6, rtol=0)
    cam = max_normalize(score * MASK[:, None])
    assert (cam[0, :, 1] == 0).all() and cam.isfinite().all()
    assert torch.equal(cam.amax(1), MASK.float())


@pytest.mark.parametrize("form", ["row_term", "row_term_foreground", "propagate", "both"])
@pytest.mark.parametrize("given", [False, True])
def test_scoring_matrix_forms_equal_their_definition(form, given):
    low, score, high = inputs()
    row = torch.rand(2, 9) if given else None
    actual = scoring_matrix(
        min_max(propagate(low, score), MASK),
        score,
        high,
        MASK,
        num_foreground=NUM_FOREGROUND,
        lambda_low=0.9,
        lambda_high=0.3,
        form=form,
        row_term_BN=row,
    )
    for image in range(2):
        for c in range(5):
            if not MASK[image, c]:
                assert (actual[image, :, c] == 0).all()
                continue
            expected = 0.9 * slow_min_max(low[image].double() @ score[image, :, c].double())
            if form in ("propagate", "both"):
                expected = expected + 0.3 * slow_min_max(high[image].double() @ score[image, :, c].double())
            if form == "row_term" or (form != "propagate" and c < NUM_FOREGROUND):
                term = row[image] if given else high[image].mean(-1)
                expected = expected + 0.3 * term.double()
            torch.testing.assert_close(actual[image, :, c].double(), expected, atol=1e-5, rtol=0)


def test_transport_absorbs_the_row_term_but_not_the_foreground_row_term():
    """METHOD 1.14: a term of the patch alone changes nothing; on foreground columns only it does."""
    low, score, high = inputs(patches=25)
    row = torch.rand(2, 25)
    plans = {}
    for form, strength in (("row_term", 0.0), ("row_term", 2.0), ("row_term_foreground", 2.0)):
        matrix = scoring_matrix(
            min_max(propagate(low, score), MASK),
            score,
            high,
            MASK,
            num_foreground=NUM_FOREGROUND,
            lambda_low=1.0,
            lambda_high=strength,
            form=form,
            row_term_BN=row,
        )
        marginal = class_marginal(score, MASK, kind="softmax_mean", temperature=1.0)
        plan = sinkhorn_plan(matrix, marginal, MASK, epsilon=0.1, max_iterations=200, tolerance=1e-5)
        plans[form, strength] = max_normalize(plan.plan_BNK)
    torch.testing.assert_close(plans["row_term", 0.0], plans["row_term", 2.0], atol=1e-3, rtol=0)
    assert (plans["row_term", 0.0] - plans["row_term_foreground", 2.0]).abs().max() > 0.1


def test_elementwise_refinement_is_the_product_of_both_propagations():
    low, score, high = inputs()
    expected = torch.einsum("bij,bjc->bic", low, score) * torch.einsum("bij,bjc->bic", high, score)
    torch.testing.assert_close(refine_elementwise(low, score, high), expected)


def test_a_misspelt_form_is_refused():
    _, score, high = inputs()
    with pytest.raises(ValueError, match="form must be"):
        scoring_matrix(score, score, high, MASK, num_foreground=3, lambda_low=1.0, lambda_high=0.1, form="row")
