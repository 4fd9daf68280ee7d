"""CAM seeds: patch-text similarity and learned affinities -> class maps on the patch grid (METHOD 1.14-1.17 and 1b)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from dfa.core.cam import (
    ScoringForm,
    class_scores,
    max_normalize,
    min_max,
    propagate,
    refine_elementwise,
    scoring_matrix,
    strongest_background,
)
from dfa.core.transport import MarginalKind, class_marginal, sinkhorn_plan
from dfa.label.pseudo import present_classes

Generator = Literal["similarity", "affinity", "elementwise", "transport"]
Columns = Literal["strongest", "prompts", "constant"]
Normalization = Literal["row", "column"]


@dataclass(frozen=True)
class SeedSettings:
    """How seeds are made.

    generator: `similarity` the scores S themselves; `affinity` A_la S; `elementwise` (A_la S)(A_ha S); `transport` the
        paper's FG CAM: entropic transport over the scoring matrix. The first three are its ablation.
    scale: factor on the cosines before the softmax over the present columns.
    propagation: how often A_la is applied to S.
    columns: the background's columns: a single one for the `strongest` prompt of each patch
        (`dfa.core.cam.strongest_background`), one for each of the `prompts`, or in the transport a single `constant` one.
    normalization: how a plan becomes maps. `row`: a patch's mass over the patch's whole mass, a posterior, so that the maps of an
        image compete with each other and with the background. `column`: the print (METHOD 1.17), over the column's maximum,
        which forgets how columns compare.
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
    normalization: Normalization = "column"

    def __post_init__(self) -> None:
        if self.normalization not in get_args(Normalization):
            raise ValueError(f"normalization must be one of {get_args(Normalization)}, got {self.normalization!r}")
        if self.generator not in get_args(Generator):
            raise ValueError(f"generator must be one of {get_args(Generator)}, got {self.generator!r}")
        if self.columns not in get_args(Columns):
            raise ValueError(f"columns must be one of {get_args(Columns)}, got {self.columns!r}")
        if self.propagation < 1:
            raise ValueError(f"propagation must be at least 1, got {self.propagation}")


@dataclass(frozen=True)
class Seeds:
    """cam_BNC: foreground CAM in [0, 1], 0 for absent classes. background_BN: the background's map, in [0, 1].

    A plan normalised by rows gives posteriors: all maps of a patch sum to 1. Everything else reaches 1 somewhere in each present
    class that has any mass, and the background's map is that of its strongest column.
    """

    cam_BNC: Tensor
    background_BN: Tensor


@dataclass(frozen=True)
class Affinities:
    """low_BNN, high_BNN: A_la and A_ha, doubly stochastic, for propagation. reliability_BN: the row mean of the sigmoid
    map P_inv, the paper's A_ha_bar; None where the form of the scoring matrix is `propagate`, which has no row term."""

    low_BNN: Tensor
    high_BNN: Tensor
    reliability_BN: Tensor | None


def column_mask(labels_BC: Tensor, num_columns: int) -> Tensor:
    """Which text columns take part: the classes of the image and every background prompt (METHOD 1.17): B x K bool."""
    return functional.pad(labels_BC, (0, num_columns - labels_BC.shape[1]), value=True)


@torch.no_grad()
def make_seeds(
    similarity_BNK: Tensor,
    labels_BC: Tensor,
    affinities: Affinities | Iterable[Affinities] | None,
    settings: SeedSettings,
) -> Seeds:
    """Seeds of a batch, without gradient, fp32.

    similarity_BNK: cosines of patches and texts, the C foreground classes first, at least one background prompt behind.
    affinities: of the batch, or of one group of neighbours after the other, each made when its turn comes, so that the maps of
        pairs need not all exist at once. Not needed for the generator `similarity`.

    The columns of an image are its own classes and the background's (METHOD 1.17). Texts of other classes are never computed with.

    Raises ValueError for cosines that are not finite, and for a text bank without background prompts.
    """
    num_columns, num_classes = similarity_BNK.shape[-1], labels_BC.shape[1]
    if num_columns <= num_classes:
        raise ValueError(
            f"{num_columns} text columns for {num_classes} classes leave none for the background: "
            "list background prompts in the class file"
        )
    class_BM = present_classes(labels_BC)
    column_BK, mask_BK = _columns(class_BM, num_classes, num_columns)
    similarity_BNK = similarity_BNK.gather(2, column_BK[:, None, :].expand(-1, similarity_BNK.shape[1], -1))
    bad_B = ~(similarity_BNK.masked_fill(~mask_BK[:, None, :], 0.0).isfinite().all((1, 2)))
    if bool(bad_B.any()):
        raise ValueError(f"image {int(bad_B.nonzero()[0])} of the batch: cosines of patches and texts must be finite")
    num_slots = class_BM.shape[1]
    score_BNK = class_scores(similarity_BNK, mask_BK, scale=settings.scale)
    if settings.columns == "strongest":
        background_BN1 = strongest_background(similarity_BNK, mask_BK, num_foreground=num_slots, scale=settings.scale)
        score_BNK = torch.cat([score_BNK[:, :, :num_slots], background_BN1], dim=2)
        mask_BK = mask_BK[:, : num_slots + 1]
    if settings.generator == "similarity":
        return _seeds(max_normalize(score_BNK), class_BM, num_classes)
    if affinities is None:
        raise ValueError(f"the generator {settings.generator!r} needs affinities")
    if settings.generator == "transport" and settings.columns == "constant":
        # The prompts have had their part, in the softmax.
        score_BNK, mask_BK = score_BNK[:, :, :num_slots], mask_BK[:, :num_slots]
    groups = [affinities] if isinstance(affinities, Affinities) else affinities
    refined = _refine_groups(score_BNK, mask_BK, num_slots, groups, settings)
    if settings.generator != "transport":
        return _seeds(max_normalize(refined.map_BNK), class_BM, num_classes)
    plan_BNK = _transport(refined, mask_BK, settings)
    if settings.normalization == "column":
        return _seeds(max_normalize(plan_BNK), class_BM, num_classes)
    share_BNK = plan_BNK / plan_BNK.sum(-1, keepdim=True)
    background_BN1 = share_BNK[:, :, num_slots:].sum(-1, keepdim=True)
    return _seeds(torch.cat([share_BNK[:, :, :num_slots], background_BN1], dim=2), class_BM, num_classes)


def _columns(class_BM: Tensor, num_classes: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """The text columns of each image, its classes (padded with any column) before the background's, and which of them count."""
    background = torch.arange(num_classes, num_columns, device=class_BM.device).expand(len(class_BM), -1)
    mask_BK = functional.pad(class_BM > 0, (0, background.shape[1]), value=True)
    return torch.cat([(class_BM - 1).clamp(min=0), background], dim=1), mask_BK


@dataclass(frozen=True)
class _Refined:
    """score_BNK: scores after all but the last propagation. low_BNK: `m(A_la S)`. map_BNK: what the generator makes of them."""

    score_BNK: Tensor
    low_BNK: Tensor
    map_BNK: Tensor


def _refine_groups(
    score_BNK: Tensor, mask_BK: Tensor, num_foreground: int, groups: Iterable[Affinities], settings: SeedSettings
) -> _Refined:
    """Group after group."""
    parts, done = list[_Refined](), 0
    for group in groups:
        rows = slice(done, done + len(group.low_BNN))
        parts.append(_refine(score_BNK[rows], mask_BK[rows], num_foreground, group, settings))
        done = rows.stop
    if done != len(score_BNK):
        raise ValueError(f"affinities of {done} images for the similarity of {len(score_BNK)}")
    return _Refined(
        *(torch.cat(each) for each in zip(*((p.score_BNK, p.low_BNK, p.map_BNK) for p in parts), strict=True))
    )


def _refine(
    score_BNK: Tensor, mask_BK: Tensor, num_foreground: int, affinities: Affinities, settings: SeedSettings
) -> _Refined:
    for _ in range(settings.propagation - 1):
        score_BNK = propagate(affinities.low_BNN, score_BNK)
    if settings.generator == "elementwise":
        map_BNK = refine_elementwise(affinities.low_BNN, score_BNK, affinities.high_BNN)
        return _Refined(score_BNK, map_BNK, map_BNK)
    low_BNK = min_max(propagate(affinities.low_BNN, score_BNK), mask_BK)
    if settings.generator == "affinity":
        return _Refined(score_BNK, low_BNK, low_BNK)
    if settings.form != "propagate" and affinities.reliability_BN is None:
        raise ValueError(f"the form {settings.form!r} needs the affinities' reliability_BN, got None")
    map_BNK = scoring_matrix(
        low_BNK,
        score_BNK,
        affinities.high_BNN,
        mask_BK,
        num_foreground=num_foreground,
        lambda_low=settings.lambda_low,
        lambda_high=settings.lambda_high,
        form=settings.form,
        row_term_BN=affinities.reliability_BN,
    )
    return _Refined(score_BNK, low_BNK, map_BNK)


def _transport(refined: _Refined, mask_BK: Tensor, settings: SeedSettings) -> Tensor:
    scoring_BNK = refined.map_BNK
    # Area is what A_la makes of S; the other kinds are of S itself, as printed.
    counted_BNK = refined.low_BNK if settings.marginal == "area" else refined.score_BNK
    if settings.columns == "constant":
        scoring_BNK, counted_BNK = (
            functional.pad(each, (0, 1), value=settings.constant) for each in (scoring_BNK, counted_BNK)
        )
        mask_BK = functional.pad(mask_BK, (0, 1), value=True)
    marginal_BK = class_marginal(
        counted_BNK, mask_BK, kind=settings.marginal, temperature=settings.marginal_temperature
    )
    return sinkhorn_plan(
        scoring_BNK,
        marginal_BK,
        mask_BK,
        epsilon=settings.epsilon,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
    ).plan_BNK


def _seeds(cam_BNK: Tensor, class_BM: Tensor, num_classes: int) -> Seeds:
    """The slots of class_BM back to their columns; the unused ones fall on a column that is cut off."""
    num_slots = class_BM.shape[1]
    cam_BNC = cam_BNK.new_zeros(*cam_BNK.shape[:2], num_classes + 1)
    index_BNM = class_BM[:, None, :].expand(-1, cam_BNK.shape[1], -1)
    cam_BNC.scatter_(2, index_BNM, cam_BNK[:, :, :num_slots])
    return Seeds(cam_BNC[:, :, 1:], cam_BNK[:, :, num_slots:].amax(-1))
