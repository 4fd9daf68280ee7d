"""CAM seeds: patch-text similarity and learned affinities -> class maps on the patch grid (METHOD 1.14-1.17 and 1b)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from dfa.core.cam import ScoringForm, class_scores, max_normalize, min_max, refine_elementwise, scoring_matrix
from dfa.core.transport import MarginalKind, class_marginal, sinkhorn_plan

Generator = Literal["similarity", "affinity", "elementwise", "transport"]
Columns = Literal["prompts", "constant"]


@dataclass(frozen=True)
class SeedSettings:
    """How seeds are made.

    generator: `similarity` the scores S themselves; `affinity` A_la S; `elementwise` (A_la S)(A_ha S); `transport` the
        paper's FG CAM: entropic transport over the scoring matrix. The first three are its ablation.
    scale: factor on the cosines before the softmax over the present columns.
    propagation: how often A_la is applied to S.
    columns: the background's columns in the transport: one for each background prompt, or a single `constant` one.
    Others: see `dfa.core.cam.scoring_matrix`, `dfa.core.transport.class_marginal` and `sinkhorn_plan`.
    """

    generator: Generator
    scale: float
    propagation: int
    lambda_low: float
    lambda_high: float
    form: ScoringForm
    columns: Columns
    constant: float
    marginal: MarginalKind
    marginal_temperature: float
    epsilon: float
    max_iterations: int
    tolerance: float

    def __post_init__(self) -> None:
        if self.generator not in get_args(Generator):
            raise ValueError(f"generator must be one of {get_args(Generator)}, got {self.generator!r}")
        if self.columns not in get_args(Columns):
            raise ValueError(f"columns must be one of {get_args(Columns)}, got {self.columns!r}")
        if self.propagation < 1:
            raise ValueError(f"propagation must be at least 1, got {self.propagation}")


@dataclass(frozen=True)
class Seeds:
    """cam_BNC: foreground CAM in [0, 1], each present class reaching 1 somewhere, 0 for absent classes.
    background_BN: the strongest background column, in [0, 1]."""

    cam_BNC: Tensor
    background_BN: Tensor


@dataclass(frozen=True)
class Affinities:
    """low_BNN, high_BNN: A_la and A_ha, doubly stochastic, for propagation. reliability_BN: the row mean of the sigmoid
    map P_inv, the paper's A_ha_bar."""

    low_BNN: Tensor
    high_BNN: Tensor
    reliability_BN: Tensor


def column_mask(labels_BC: Tensor, num_columns: int) -> Tensor:
    """Which text columns take part: the classes of the image and every background prompt (METHOD 1.17): B x K bool."""
    return functional.pad(labels_BC, (0, num_columns - labels_BC.shape[1]), value=True)


@torch.no_grad()
def make_seeds(
    similarity_BNK: Tensor, labels_BC: Tensor, affinities: Affinities | None, settings: SeedSettings
) -> Seeds:
    """Seeds of a batch, without gradient, fp32.

    similarity_BNK: cosines of patches and texts, the C foreground classes first, at least one background prompt behind.
    affinities: not needed for the generator `similarity`.
    """
    num_foreground = labels_BC.shape[1]
    if similarity_BNK.shape[-1] <= num_foreground:
        raise ValueError(
            f"{similarity_BNK.shape[-1]} text columns for {num_foreground} classes leave none for the background: "
            "list background prompts in the class file"
        )
    mask_BK = column_mask(labels_BC, similarity_BNK.shape[-1])
    score_BNK = class_scores(similarity_BNK, mask_BK, scale=settings.scale)
    if settings.generator == "similarity":
        return _seeds(score_BNK, num_foreground)
    if affinities is None:
        raise ValueError(f"the generator {settings.generator!r} needs affinities")
    for _ in range(settings.propagation - 1):
        score_BNK = affinities.low_BNN @ score_BNK
    if settings.generator == "affinity":
        return _seeds(min_max(affinities.low_BNN @ score_BNK, mask_BK), num_foreground)
    if settings.generator == "elementwise":
        return _seeds(refine_elementwise(affinities.low_BNN, score_BNK, affinities.high_BNN), num_foreground)
    return _transport(score_BNK, mask_BK, num_foreground, affinities, settings)


def _transport(
    score_BNK: Tensor, mask_BK: Tensor, num_foreground: int, affinities: Affinities, settings: SeedSettings
) -> Seeds:
    scoring_BNK = scoring_matrix(
        affinities.low_BNN,
        score_BNK,
        affinities.high_BNN,
        mask_BK,
        num_foreground=num_foreground,
        lambda_low=settings.lambda_low,
        lambda_high=settings.lambda_high,
        form=settings.form,
        row_term_BN=affinities.reliability_BN,
    )
    if settings.columns == "constant":
        scoring_BNK = functional.pad(scoring_BNK[:, :, :num_foreground], (0, 1), value=settings.constant)
        score_BNK = functional.pad(score_BNK[:, :, :num_foreground], (0, 1), value=settings.constant)
        mask_BK = functional.pad(mask_BK[:, :num_foreground], (0, 1), value=True)
    marginal_BK = class_marginal(score_BNK, mask_BK, kind=settings.marginal, temperature=settings.marginal_temperature)
    plan = sinkhorn_plan(
        scoring_BNK,
        marginal_BK,
        mask_BK,
        epsilon=settings.epsilon,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
    )
    return _seeds(plan.plan_BNK, num_foreground)


def _seeds(map_BNK: Tensor, num_foreground: int) -> Seeds:
    cam_BNK = max_normalize(map_BNK)
    return Seeds(cam_BNK[:, :, :num_foreground], cam_BNK[:, :, num_foreground:].amax(-1))
