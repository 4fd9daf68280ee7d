"""Entropic optimal transport of patches to classes, batched over images that show different classes.

METHOD rows 1.15 and 1.16. Everything here runs in fp32, whatever precision surrounds it, and without gradient: the plan is a
pseudo-label, not a prediction.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MarginalKind = Literal["area", "softmax_mean", "softmax_sum", "uniform"]

# Plain scaling is the cheapest sweep by far, but it slows down as epsilon shrinks: what these sweeps leave goes to Newton.
_SCALING_SWEEPS = 32
# Columns step beyond the plain update. Its error modes have rates in [0, eta]; these become 1 - w + w eta, smaller while
# eta > .13, and at the eta ~ .4 of epsilon .1 a third of the sweeps is saved.
_RELAXATION = 1.3
# A converged plan is looked for every so many sweeps, since looking makes an accelerator wait.
_SWEEPS_PER_CHECK = 4
# Kernel entries below 1e-38 are lost in fp32. With this bound on the scalings what they could have carried is below 1e-14.
_SAFE_SCALING = 1e24
# Without a useful start Newton begins at an epsilon that the scores span this many times, and divides it by _ANNEALING
# whenever the misplaced mass is below _COARSE_ERROR.
_FIRST_SPAN = 8.0
_ANNEALING = 2.0
_COARSE_ERROR = 0.1
# Solvers stop at this share of the tolerance: sums over the finished plan are rounded differently from their own.
_MARGIN = 0.9
# Far below any weight that fp32 shares can form, far above fp64's rounding.
_RIDGE = 1e-12


@dataclass(frozen=True)
class Plan:
    """A transport plan and how far it was solved.

    plan_BNK: mass per patch and column; rows sum to 1/N; columns that are masked hold exactly zero.
    error_B: sum over the columns of |plan column sum - marginal|, measured on the plan itself.
    iterations_B: scaling sweeps plus Newton steps that the image took.  converged_B: error below the tolerance.
    """

    plan_BNK: Tensor
    error_B: Tensor
    iterations_B: Tensor
    converged_B: Tensor


def class_marginal(score_BNK: Tensor, column_mask_BK: Tensor, *, kind: MarginalKind, temperature: float) -> Tensor:
    """Share of the patches that each text column receives, `v` (METHOD 1.15, DFA's `v = softmax(x)`).

    score_BNK: patch-text scores. column_mask_BK: True where the column takes part in the image. Returns v_BK, fp32: rows
    sum to 1, masked columns are 0. kind:

    - area (our reading, the default): the mean over patches of `softmax_c(S[i,c] / temperature)`, the share of the image that the
      scores give to a column;
    - softmax_sum: the print, `x_c = sum_i S[i,c]`, which saturates with N patches;
    - softmax_mean: `x_c = mean_i S[i,c]`. Scores in [0, 1] give no column more than
      `e^(1/temperature) / (e^(1/temperature) + K - 1)` of the patches, 22.8 % for K = 26 and a temperature of .5;
    - uniform: ignores the scores.

    temperature: all softmaxes divide by it.

    >>> scores = torch.tensor([[[1.0, 0.0], [1.0, 0.5], [0.0, 0.5], [1.0, 0.0]]])
    >>> class_marginal(scores, torch.ones(1, 2, dtype=torch.bool), kind="area", temperature=0.1).round(decimals=3)
    tensor([[0.7500, 0.2500]])
    """
    _check_columns(score_BNK, column_mask_BK)
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    score_BNK = score_BNK.detach().float()
    if kind == "area":
        logit_BNK = (score_BNK / temperature).masked_fill(~column_mask_BK[:, None, :], -torch.inf)
        return torch.softmax(logit_BNK, dim=-1).mean(1)
    if kind == "softmax_mean":
        x_BK = score_BNK.mean(1)
    elif kind == "softmax_sum":
        x_BK = score_BNK.sum(1)
    elif kind == "uniform":
        x_BK = torch.zeros_like(score_BNK[:, 0])
    else:
        raise ValueError(f"kind must be area, softmax_mean, softmax_sum or uniform, got {kind!r}")
    return torch.softmax((x_BK / temperature).masked_fill(~column_mask_BK, -torch.inf), dim=-1)


@torch.no_grad()
def sinkhorn_plan(
    score_BNK: Tensor,
    marginal_BK: Tensor,
    column_mask_BK: Tensor,
    *,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
) -> Plan:
    """Solves `max_T <T, O> + epsilon H(T)` with `T 1 = 1/N` and `T^T 1 = v` for every image (METHOD 1.16; Cuturi 2013).

    score_BNK: `O`, any finite range. marginal_BK: `v`, rows sum to 1. column_mask_BK: columns that take part; the others carry
    no mass and whatever stands in them is ignored. epsilon in units of the score. tolerance bounds `Plan.error_B`.
    Warns (RuntimeWarning) when an image misses the tolerance within max_iterations.

    How: with row maxima absorbed, `exp((O - f)/epsilon)` lies in [0, 1] and plain scalings of it are matrix-vector products;
    the columns come first, the rows last, so that rows hold to rounding. An image whose scalings leave fp32's safe range or that
    has not converged after 32 sweeps continues with a damped Newton method on the K column potentials `g`,
    `T = softmax_c((O + g)/epsilon) / N`, which cannot overflow. Its Hessian is a graph Laplacian with weights
    `sum_i P_ij P_ik / N`, hence positive semi-definite by construction; the step `ln(1+d)/d`, d the spread of the Newton
    direction in epsilons, is the one that generalised self-concordance guarantees (Sun & Tran-Dinh 2019, log-sum-exp case).
    An image's plan does not depend on its neighbours in the batch: finished images are frozen.
    """
    column_mask_BK = column_mask_BK & (marginal_BK > 0)
    _check_problem(score_BNK, marginal_BK, column_mask_BK, epsilon, max_iterations, tolerance)
    with torch.autocast(score_BNK.device.type, enabled=False):
        marginal_BK = marginal_BK.float() * column_mask_BK
        marginal_BK = marginal_BK / marginal_BK.sum(1, keepdim=True)
        score_BKN = _columns_first(score_BNK, column_mask_BK)
        sweeps = min(max_iterations, _SCALING_SWEEPS)
        plan_BKN, potential_BK, iterations_B, done_B = _scale(score_BKN, marginal_BK, epsilon, sweeps, tolerance)
        rest = (~done_B).nonzero().squeeze(1)
        if len(rest) > 0:
            plan_BKN[rest], steps = _newton(
                _columns_first(score_BNK[rest], column_mask_BK[rest]),
                marginal_BK[rest],
                potential_BK[rest],
                epsilon,
                max_iterations - iterations_B[rest],
                tolerance,
            )
            iterations_B[rest] += steps
        error_B = (plan_BKN.sum(2) - marginal_BK).abs().sum(1)
        converged_B = error_B < tolerance
    if not bool(converged_B.all()):
        warnings.warn(
            f"optimal transport did not reach a marginal error of {tolerance} within {max_iterations} iterations at"
            f" epsilon {epsilon}; Plan.converged_B says for which images",
            RuntimeWarning,
            stacklevel=3,
        )
    return Plan(plan_BKN.transpose(1, 2), error_B, iterations_B, converged_B)


def _columns_first(score_BNK: Tensor, column_mask_BK: Tensor) -> Tensor:
    """A copy in fp32, columns before patches: sums, maxima and exponentials want the long axis contiguous. -inf where masked."""
    num_images, num_patches, num_columns = score_BNK.shape
    score_BKN = torch.empty(num_images, num_columns, num_patches, device=score_BNK.device)
    score_BKN.copy_(score_BNK.transpose(1, 2))
    # A sum is finite exactly when each term is, short of an overflow that nobody means; one pass, no copy.
    bad_BK = column_mask_BK & ~score_BKN.sum(2).isfinite()
    if bool(bad_BK.any()):
        image, column = bad_BK.nonzero()[0].tolist()
        raise ValueError(f"image {image} of the batch: scores must be finite, column {column} is not")
    if not bool(column_mask_BK.all()):
        score_BKN.masked_fill_(~column_mask_BK[:, :, None], -torch.inf)
    return score_BKN


def _scale(
    score_BKN: Tensor, marginal_BK: Tensor, epsilon: float, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaling sweeps: plan_BKN (in score_BKN's memory), column potentials (NaN: no start for Newton), sweeps taken, done."""
    num_images, _, num_patches = score_BKN.shape
    kernel_BKN = score_BKN.sub_(score_BKN.amax(1, keepdim=True)).div_(epsilon).exp_()
    # In units of 1/N, so that rows sum to 1. The operations below are tiny: their number is what costs.
    target_B1K = (num_patches * marginal_BK)[:, None, :]
    absent_B1K = target_B1K == 0
    some_absent = bool(absent_B1K.any())
    mass_B1K = kernel_BKN.sum(2)[:, None, :]
    column_B1K = row_B1N = mass_B1K
    iterations_B = torch.zeros(num_images, dtype=torch.long, device=score_BKN.device)
    done_B = safe_B = frozen_B = torch.zeros(num_images, dtype=torch.bool, device=score_BKN.device)
    error_B = mass_B1K[:, 0, 0]
    num_frozen = 0
    for sweep in range(1, sweeps + 1):
        next_B1K = target_B1K / mass_B1K
        if sweep > 1:
            next_B1K *= (next_B1K / column_B1K).pow_(_RELAXATION - 1)
        if some_absent:  # Neither target nor mass: 0 / 0 must stay out of the products.
            next_B1K.masked_fill_(absent_B1K, 0.0)
        column_B1K = torch.where(frozen_B[:, None, None], column_B1K, next_B1K) if num_frozen else next_B1K
        row_B1N = _sum_over_columns(kernel_BKN, column_B1K).reciprocal_()
        mass_B1K = _sum_over_patches(kernel_BKN, row_B1N)
        if sweep % _SWEEPS_PER_CHECK == 0 or sweep == sweeps:
            error_B = torch.addcmul(target_B1K, column_B1K, mass_B1K, value=-1)[:, 0].norm(p=1, dim=1) / num_patches
            safe_B = row_B1N[:, 0].amax(1) * column_B1K[:, 0].amax(1) < _SAFE_SCALING
            iterations_B = torch.where(frozen_B, iterations_B, sweep)
            done_B = (error_B < _MARGIN * tolerance) & safe_B
            frozen_B = frozen_B | done_B | ~safe_B
            num_frozen = int(frozen_B.sum())
            if num_frozen == num_images:
                break
    warm_B = safe_B & (error_B < _COARSE_ERROR)
    potential_BK = torch.where(warm_B[:, None], epsilon * column_B1K[:, 0].log(), torch.nan)
    plan_BKN = kernel_BKN.mul_(row_B1N).mul_(column_B1K.transpose(1, 2) / num_patches)
    return plan_BKN, potential_BK, iterations_B, done_B


def _newton(
    score_BKN: Tensor, marginal_BK: Tensor, potential_BK: Tensor, epsilon: float, limit_B: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Damped Newton ascent of the semi-dual in the column potentials, epsilon annealed where no safe start is known."""
    num_images, _, num_patches = score_BKN.shape
    present_BK = marginal_BK > 0
    cold_B = potential_BK.isnan().any(1)
    potential_BK = potential_BK.masked_fill(cold_B[:, None] | ~present_BK, 0.0)
    present_BK1 = present_BK[:, :, None]
    span_B = score_BKN.amax((1, 2)) - score_BKN.masked_fill(~present_BK1, torch.inf).amin((1, 2))
    level_B = torch.where(cold_B, (span_B / _FIRST_SPAN).clamp_min(epsilon), epsilon)
    iterations_B = torch.zeros(num_images, dtype=torch.long, device=score_BKN.device)
    for step in range(int(limit_B.max()) + 1):
        share_BKN = torch.softmax((score_BKN + potential_BK[:, :, None]) / level_B[:, None, None], dim=1)
        gap_BK = marginal_BK - share_BKN.mean(2)
        error_B = gap_BK.abs().sum(1)
        frozen_B = ((error_B < _MARGIN * tolerance) & (level_B <= epsilon)) | (step >= limit_B)
        if bool(frozen_B.all()):
            break
        direction_BK = _newton_direction(share_BKN, gap_BK, present_BK)
        spread_B = direction_BK.masked_fill(~present_BK, -torch.inf).amax(1) - direction_BK.masked_fill(
            ~present_BK, torch.inf
        ).amin(1)
        damping_B = torch.where(spread_B > 1e-6, spread_B.log1p() / spread_B, 1.0)
        moved_BK = potential_BK + (level_B * damping_B)[:, None] * direction_BK
        potential_BK = torch.where(frozen_B[:, None], potential_BK, moved_BK)
        settled_B = (error_B < _COARSE_ERROR) & ~frozen_B
        level_B = torch.where(settled_B, (level_B / _ANNEALING).clamp_min(epsilon), level_B)
        iterations_B += ~frozen_B
    # At the wanted epsilon also where the steps ran out above it.
    share_BKN = torch.softmax((score_BKN + potential_BK[:, :, None]) / epsilon, dim=1)
    return share_BKN / num_patches, iterations_B


def _newton_direction(share_BKN: Tensor, gap_BK: Tensor, present_BK: Tensor) -> Tensor:
    """Solves Laplacian x = gap, the Hessian in units of epsilon, in fp64 (K x K only)."""
    weight_BKK = torch.bmm(share_BKN, share_BKN.transpose(1, 2)).double() / share_BKN.shape[2]
    # A column's weight to itself would cancel below, and take the digits of small weights with it.
    weight_BKK.diagonal(dim1=1, dim2=2).zero_()
    # Constants are in the kernel of a Laplacian: the outer product of ones pins them, the ridge pins what fp32 cannot see.
    pin_BKK = (present_BK[:, :, None] & present_BK[:, None, :]).double() / present_BK.sum(1)[:, None, None]
    diagonal_BK = weight_BKK.sum(2) + _RIDGE + (~present_BK).double()
    system_BKK = torch.diag_embed(diagonal_BK) - weight_BKK + pin_BKK
    return torch.linalg.solve(system_BKK, gap_BK.double()).float()


def _sum_over_columns(kernel_BKN: Tensor, column_B1K: Tensor) -> Tensor:
    # Not through an accelerator's matrix units, which may round fp32 to 10 bits: marginals would be off by a thousandth.
    if kernel_BKN.is_cuda:
        return (kernel_BKN * column_B1K.transpose(1, 2)).sum(1, keepdim=True)
    return torch.bmm(column_B1K, kernel_BKN)


def _sum_over_patches(kernel_BKN: Tensor, row_B1N: Tensor) -> Tensor:
    if kernel_BKN.is_cuda:
        return (kernel_BKN * row_B1N).sum(2)[:, None, :]
    return torch.bmm(row_B1N, kernel_BKN.transpose(1, 2))


def _check_columns(score_BNK: Tensor, column_mask_BK: Tensor) -> None:
    if score_BNK.ndim != 3 or column_mask_BK.shape != (score_BNK.shape[0], score_BNK.shape[2]):
        raise ValueError(
            f"scores must be (B, N, K) and the column mask (B, K), got {tuple(score_BNK.shape)}"
            f" and {tuple(column_mask_BK.shape)}"
        )
    if column_mask_BK.dtype != torch.bool:
        raise ValueError(f"the column mask must be bool, got {column_mask_BK.dtype}")
    present_B = column_mask_BK.any(1)
    if not bool(present_B.all()):
        raise ValueError(
            f"image {int((~present_B).nonzero()[0])} of the batch has no column: at least one must take part"
        )


def _check_problem(
    score_BNK: Tensor,
    marginal_BK: Tensor,
    column_mask_BK: Tensor,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
) -> None:
    if epsilon <= 0 or tolerance <= 0 or max_iterations < 1:
        raise ValueError(
            "epsilon and tolerance must be above 0 and max_iterations at least 1,"
            f" got {epsilon}, {tolerance} and {max_iterations}"
        )
    if marginal_BK.shape != column_mask_BK.shape:
        raise ValueError(
            f"marginal must be {tuple(column_mask_BK.shape)} like the mask, got {tuple(marginal_BK.shape)}"
        )
    _check_columns(score_BNK, column_mask_BK)
    total_B = (marginal_BK.float() * column_mask_BK).sum(1)
    off_B = ~((total_B - 1).abs() < 1e-2)
    if bool(off_B.any()):
        image = int(off_B.nonzero()[0])
        raise ValueError(
            f"image {image} of the batch: the marginal must sum to 1 over the present columns, got {float(total_B[image])}"
        )
