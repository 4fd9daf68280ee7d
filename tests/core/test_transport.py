import math
import warnings

import numpy
import ot
import pytest
import torch

from dfa.core.transport import class_marginal, sinkhorn_plan


def problem(*, images=4, patches=100, columns=9, low=0.0, high=1.0, seed=0):
    """Smooth score maps in [low, high], unequal marginals."""
    generator = torch.Generator().manual_seed(seed)
    side = int(patches**0.5)
    maps = torch.randn(images, columns, 4, 4, generator=generator)
    maps = torch.nn.functional.interpolate(maps, (side, side), mode="bicubic").flatten(2).transpose(1, 2)
    spread = maps.amax(1, keepdim=True) - maps.amin(1, keepdim=True)
    scores = low + (high - low) * (maps - maps.amin(1, keepdim=True)) / spread
    marginal = torch.softmax(torch.randn(images, columns, generator=generator), -1)
    return scores, marginal, torch.ones(images, columns, dtype=torch.bool)


def oracle(score, marginal, epsilon, *, method="sinkhorn"):
    score, marginal = score.double().numpy(), marginal.double().numpy()
    uniform = numpy.full(len(score), 1 / len(score))
    marginal = marginal / marginal.sum()
    plan = ot.sinkhorn(uniform, marginal, -score, epsilon, method=method, stopThr=1e-10, numItermax=100_000, warn=True)
    return torch.from_numpy(plan)


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.05])
def test_plan_equals_pot_in_float64(epsilon):
    scores, marginal, mask = problem()
    plan = sinkhorn_plan(scores, marginal, mask, epsilon=epsilon, max_iterations=200, tolerance=2e-6)
    assert plan.converged_B.all()
    for image in range(len(scores)):
        expected = oracle(scores[image], marginal[image], epsilon)
        # The peer's own 1e-5 as the issue asks; entries are about 1e-3, so this is a hundredth of an entry.
        torch.testing.assert_close(plan.plan_BNK[image].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-20.0, 20.0)])
@pytest.mark.parametrize("epsilon", [0.1, 0.02, 0.01])
def test_small_epsilon_and_wide_scores_neither_overflow_nor_stall(low, high, epsilon):
    scores, marginal, mask = problem(low=low, high=high, images=6, seed=1)
    plan = sinkhorn_plan(scores, marginal, mask, epsilon=epsilon, max_iterations=150, tolerance=1e-4)
    assert plan.plan_BNK.isfinite().all() and (plan.plan_BNK >= 0).all()
    assert plan.converged_B.all(), plan.error_B
    torch.testing.assert_close(plan.plan_BNK.sum(2), torch.full((6, 100), 0.01), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("low", "high", "epsilon"), [(0.0, 1.0, 0.01), (-20.0, 20.0, 0.2)])
def test_the_newton_branch_finds_pots_log_domain_plan(low, high, epsilon):
    scores, marginal, mask = problem(low=low, high=high, images=2, patches=49, columns=5)
    plan = sinkhorn_plan(scores, marginal, mask, epsilon=epsilon, max_iterations=200, tolerance=5e-6)
    assert plan.converged_B.all() and (plan.iterations_B > 5).all()
    for image in range(2):
        expected = oracle(scores[image], marginal[image], epsilon, method="sinkhorn_log")
        torch.testing.assert_close(plan.plan_BNK[image].double(), expected, atol=1e-5, rtol=0)


def test_both_solvers_agree_when_only_newton_is_allowed_the_time():
    scores, marginal, mask = problem(seed=3)
    scaled = sinkhorn_plan(scores, marginal, mask, epsilon=0.1, max_iterations=32, tolerance=1e-5)
    # Forty times the scores and epsilon is the same problem, but starts outside the scalings' comfortable range.
    again = sinkhorn_plan(40 * scores, marginal, mask, epsilon=4.0, max_iterations=200, tolerance=1e-5)
    torch.testing.assert_close(scaled.plan_BNK, again.plan_BNK, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("high", "epsilon"), [(1.0, 0.1), (20.0, 0.02)])
def test_masked_columns_carry_exactly_no_mass_and_their_content_is_ignored(high, epsilon):
    scores, _, mask = problem(columns=8, high=high)
    mask[0, 3:] = False
    mask[1, ::2] = False
    mask[2, 1:] = False
    marginal = class_marginal(scores, mask, kind="softmax_mean", temperature=0.5)
    junk = scores.masked_fill(~mask[:, None], torch.nan)
    plan = sinkhorn_plan(junk, marginal, mask, epsilon=epsilon, max_iterations=150, tolerance=1e-4)
    assert plan.converged_B.all()
    assert torch.equal(plan.plan_BNK.sum(1) > 0, mask)
    alone = sinkhorn_plan(
        scores[:1, :, :3], marginal[:1, :3], mask[:1, :3], epsilon=epsilon, max_iterations=150, tolerance=1e-4
    )
    torch.testing.assert_close(plan.plan_BNK[:1, :, :3], alone.plan_BNK, atol=1e-6, rtol=1e-3)
    assert plan.iterations_B[0] == alone.iterations_B[0]  # Masked columns do not make a problem harder either.
    # An image of one column has a single plan.
    torch.testing.assert_close(plan.plan_BNK[2, :, 0], torch.full((100,), 0.01))


def test_a_column_of_zero_marginal_receives_nothing():
    scores, marginal, mask = problem(images=1)
    marginal[0, 2] = 0
    marginal /= marginal.sum()
    plan = sinkhorn_plan(scores, marginal, mask, epsilon=0.1, max_iterations=100, tolerance=1e-5)
    assert plan.converged_B.all() and (plan.plan_BNK[0, :, 2] == 0).all()


def test_a_plan_does_not_depend_on_the_neighbours_in_the_batch():
    easy, easy_marginal, mask = problem(images=3)
    hard, hard_marginal, _ = problem(images=3, low=-20, high=20, seed=5)
    together = sinkhorn_plan(
        torch.cat([easy, hard]),
        torch.cat([easy_marginal, hard_marginal]),
        torch.cat([mask, mask]),
        epsilon=0.1,
        max_iterations=150,
        tolerance=1e-4,
    )
    for image in range(6):
        part = slice(image, image + 1)
        alone = sinkhorn_plan(
            torch.cat([easy, hard])[part],
            torch.cat([easy_marginal, hard_marginal])[part],
            mask[:1],
            epsilon=0.1,
            max_iterations=150,
            tolerance=1e-4,
        )
        assert together.iterations_B[image] == alone.iterations_B[0]
        # Same number of steps, so only the rounding of batched products is left (an unfrozen image would move by 1e-4).
        torch.testing.assert_close(together.plan_BNK[image], alone.plan_BNK[0], atol=1e-7, rtol=1e-4)


def test_the_result_is_fp32_and_the_same_under_autocast_and_from_bf16():
    scores, marginal, mask = problem()
    scores = scores.bfloat16()
    expected = sinkhorn_plan(scores.float(), marginal, mask, epsilon=0.1, max_iterations=100, tolerance=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = sinkhorn_plan(scores, marginal, mask, epsilon=0.1, max_iterations=100, tolerance=1e-5)
    assert plan.plan_BNK.dtype == torch.float32
    assert torch.equal(plan.plan_BNK, expected.plan_BNK)


def test_not_converging_warns_and_is_recorded_per_image():
    scores, marginal, mask = problem(images=2)
    scores[1] = 0.5  # A constant score is solved by the first sweep.
    with pytest.warns(RuntimeWarning, match="did not reach a marginal error of 1e-06 within 2 iterations"):
        plan = sinkhorn_plan(scores, marginal, mask, epsilon=0.05, max_iterations=2, tolerance=1e-6)
    assert plan.converged_B.tolist() == [False, True]
    assert plan.iterations_B.tolist() == [2, 2]
    actual = (plan.plan_BNK.sum(1) - marginal).abs().sum(1)
    torch.testing.assert_close(plan.error_B, actual, atol=1e-6, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn_plan(scores, marginal, mask, epsilon=0.05, max_iterations=100, tolerance=1e-4)


def test_adding_a_term_per_patch_changes_nothing():
    """METHOD 1.14: a row term is absorbed by the row marginal."""
    scores, marginal, mask = problem()
    row = torch.rand(4, 100, 1)
    settings = {"epsilon": 0.1, "max_iterations": 200, "tolerance": 1e-5}
    plain = sinkhorn_plan(scores, marginal, mask, **settings)
    shifted = sinkhorn_plan(scores + row, marginal, mask, **settings)
    torch.testing.assert_close(plain.plan_BNK, shifted.plan_BNK, atol=1e-7, rtol=1e-4)


def test_class_marginal_kinds_against_their_definitions():
    similarity = torch.randn(2, 50, 4)
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    for kind, x in (
        ("softmax_mean", similarity.mean(1)),
        ("softmax_sum", similarity.sum(1)),
        ("uniform", 0 * similarity[:, 0]),
    ):
        marginal = class_marginal(similarity, mask, kind=kind, temperature=0.7)
        for image in range(2):
            present = mask[image]
            weight = torch.exp(x[image, present].double() / 0.7)
            torch.testing.assert_close(marginal[image, present].double(), weight / weight.sum(), atol=1e-6, rtol=1e-5)
        assert marginal[0, 2] == 0


def test_the_area_marginal_is_each_column_s_mean_share_of_the_patches():
    scores = torch.rand(2, 50, 4)
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    marginal = class_marginal(scores, mask, kind="area", temperature=0.1)
    for image in range(2):
        columns = [c for c in range(4) if mask[image, c]]
        expected = dict.fromkeys(range(4), 0.0)
        for i in range(50):
            weights = {c: math.exp(float(scores[image, i, c]) / 0.1) for c in columns}
            for c in columns:
                expected[c] += weights[c] / sum(weights.values()) / 50
        for c in range(4):
            assert math.isclose(float(marginal[image, c]), expected[c], abs_tol=1e-6)


def test_a_class_that_fills_its_image_may_have_most_of_the_mass():
    """A softmax of means gives one class at most e^2 / (e^2 + 25) of an image with 25 background prompts at temperature .5."""
    scores, mask = torch.zeros(1, 100, 26), torch.ones(1, 26, dtype=torch.bool)
    scores[0, :80, 0] = 1
    scores[0, 80:, 1:] = 1
    assert class_marginal(scores, mask, kind="area", temperature=0.1)[0, 0] > 0.79
    assert class_marginal(scores, mask, kind="softmax_mean", temperature=0.5)[0, 0] < 0.23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "epsilon and tolerance must be above 0"),
        ({"max_iterations": 0}, "max_iterations at least 1"),
        ({"score": torch.nan}, "image 1 of the batch: scores must be finite"),
        ({"marginal": 0.5}, "must sum to 1"),
        ({"mask": False}, "image 1 of the batch has no column"),
    ],
)
def test_impossible_problems_are_refused_by_name(change, message):
    scores, marginal, mask = problem(images=2)
    if "score" in change:
        scores[1, 0, 0] = change["score"]
    if "marginal" in change:
        marginal = marginal * change["marginal"]
    if "mask" in change:
        mask[1] = False
    settings = {"epsilon": 0.1, "max_iterations": 10, "tolerance": 1e-4} | {
        key: value for key, value in change.items() if key in ("epsilon", "max_iterations")
    }
    with pytest.raises(ValueError, match=message):
        sinkhorn_plan(scores, marginal, mask, **settings)
