"""From patch-text scores and affinities to class activation maps (METHOD 1.14, 1.17 and 1b).

Columns are ordered foreground classes first, then the background's; `column_mask_BK` is True for what takes part in an image:
its classes and the background (METHOD 1.17: with foreground alone an image of one class gives a CAM of 1 everywhere).
Masked columns are 0 in every result.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ScoringForm = Literal["row_term", "row_term_foreground", "propagate", "both"]


def class_scores(similarity_BNK: Tensor, column_mask_BK: Tensor, *, scale: float) -> Tensor:
    """Scores in [0, 1] from cosines: softmax of `scale * S` over the present columns, over its maximum per column (METHOD 1b).

    scale: 20 for the tiny model, exp(logit_scale) for real CLIP. Returns fp32 BNK; present columns reach 1 at their best patch.
    """
    logit_BNK = (scale * similarity_BNK.float()).masked_fill(~column_mask_BK[:, None, :], -torch.inf)
    return _over_peak(torch.log_softmax(logit_BNK, dim=-1), column_mask_BK)


def strongest_background(
    similarity_BNK: Tensor, column_mask_BK: Tensor, *, num_foreground: int, scale: float
) -> Tensor:
    """One score in [0, 1] for all background prompts, BN1: the probability that the strongest of them beats the strongest present
    class, `sigmoid(scale (max_b S - max_f S))`, over its maximum in the image (our reading, METHOD 1.15).

    similarity_BNK: cosines, the first num_foreground columns are classes. A prompt that is listed twice changes nothing here; it would
    change a sum of the prompts' shares.
    """
    logit_BNK = (scale * similarity_BNK.float()).masked_fill(~column_mask_BK[:, None, :], -torch.inf)
    # An image may show no class, and a batch none at all.
    best_BN = functional.pad(logit_BNK[:, :, :num_foreground], (0, 1), value=-torch.inf).amax(-1)
    log_score_BN1 = functional.logsigmoid(logit_BNK[:, :, num_foreground:].amax(-1) - best_BN)[:, :, None]
    return _over_peak(log_score_BN1, torch.ones_like(column_mask_BK[:, :1]))


def _over_peak(log_score_BNK: Tensor, column_mask_BK: Tensor) -> Tensor:
    """Each column over its maximum. As logarithms: a column that is never anywhere near the best would underflow to 0 / 0."""
    peak_B1K = log_score_BNK.amax(1, keepdim=True).masked_fill(~column_mask_BK[:, None, :], 0.0)
    return (log_score_BNK - peak_B1K).exp()


def min_max(map_BNK: Tensor, column_mask_BK: Tensor) -> Tensor:
    """Each column stretched to [0, 1] over the patches of its image; a constant column, and a masked one, becomes 0."""
    map_BNK = map_BNK.float()
    low_B1K, high_B1K = map_BNK.amin(1, keepdim=True), map_BNK.amax(1, keepdim=True)
    usable_B1K = column_mask_BK[:, None, :] & (high_B1K > low_B1K)
    return torch.where(usable_B1K, (map_BNK - low_B1K) / (high_B1K - low_B1K), 0.0)


def max_normalize(map_BNK: Tensor) -> Tensor:
    """`M_r[i,c] = T*[i,c] / max_i T*[i,c]` (METHOD 1.17), for entries >= 0; a column of zeros stays one.

    >>> max_normalize(torch.tensor([[[0.25, 0.0], [0.5, 0.0]]]))
    tensor([[[0.5000, 0.0000],
             [1.0000, 0.0000]]])
    """
    peak_B1K = map_BNK.amax(1, keepdim=True)
    return torch.where(peak_B1K > 0, map_BNK / peak_B1K, 0.0)


def propagate(affinity_BNN: Tensor, score_BNK: Tensor) -> Tensor:
    """`A S`, BNK, fp32. Multiplied as `(S^T A^T)^T`, for a few columns six times as fast on a processor."""
    return (score_BNK.float().mT @ affinity_BNN.float().mT).mT


def refine_elementwise(affinity_low_BNN: Tensor, score_BNK: Tensor, affinity_high_BNN: Tensor) -> Tensor:
    """The ablation's element-wise refinement `(A_la S) . (A_ha S)`, BNK (DFA's table, column E; METHOD 1)."""
    return propagate(affinity_low_BNN, score_BNK) * propagate(affinity_high_BNN, score_BNK)


def scoring_matrix(
    low_BNK: Tensor,
    score_BNK: Tensor,
    affinity_high_BNN: Tensor,
    column_mask_BK: Tensor,
    *,
    num_foreground: int,
    lambda_low: float,
    lambda_high: float,
    form: ScoringForm,
    row_term_BN: Tensor | None = None,
) -> Tensor:
    """The matrix `O` that transport maximises, BNK, fp32 (METHOD 1.14, DFA's FG CAM generation).

    `O = lambda_l m(A_la S) + lambda_h H`, m the min-max per column (our reading, 1b: a near-uniform A_la leaves tiny amplitudes and
    lambda_l would have no effect). low_BNK: `m(A_la S)`. score_BNK: `S`. affinity_high_BNN: rows are the patches that receive. H by
    `form`:

    - row_term: `A_ha_bar[i]` in every present column, as printed; the row marginal of a transport absorbs it;
    - row_term_foreground: the same in foreground columns only, which does move mass;
    - propagate: `m(A_ha S)`;  both: the last two added.

    row_term_BN: `A_ha_bar`; None takes the mean of each row of affinity_high. Our reading: give it the row mean of the sigmoid map
    P_inv, since the rows of a doubly stochastic A_ha all have the mean 1/N.
    """
    if form not in ("row_term", "row_term_foreground", "propagate", "both"):
        raise ValueError(f"form must be row_term, row_term_foreground, propagate or both, got {form!r}")
    scoring_BNK = lambda_low * low_BNK.float()
    if form in ("propagate", "both"):
        scoring_BNK = scoring_BNK + lambda_high * min_max(propagate(affinity_high_BNN, score_BNK), column_mask_BK)
    if form != "propagate":
        row_BN = affinity_high_BNN.float().mean(-1) if row_term_BN is None else row_term_BN.float()
        column_BK = column_mask_BK.clone()
        if form != "row_term":
            column_BK[:, num_foreground:] = False
        scoring_BNK = scoring_BNK + lambda_high * row_BN[:, :, None] * column_BK[:, None, :]
    return scoring_BNK
