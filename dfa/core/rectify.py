"""Decoder features as teachers of the affinities: alignment of the low one (LFAA), rectification of the high one (HFAR).

METHOD rows 1.7 to 1.12. Teachers and masks carry no gradient. Losses come as `(total, count)`, sums over valid elements, so that
several ranks can divide by the global count; an empty selection gives (0, 0) and a zero gradient.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dfa.core.void import VOID

DenseRule = Literal["mean", "row_mean", "share", "alpha"]
Teacher = Literal["softmax", "logit", "sum"]
Student = Literal["divergence", "inside_mask", "full_row"]
RectifiedPairs = Literal["all", "foreground"]
Agreement = Literal["both", "labels"]
Pair = tuple[Tensor, Tensor]

# A finite floor, not -inf: a row without a supported pair must not make NaN, not even times zero.
_FLOOR = torch.finfo(torch.float32).min / 2


@torch.no_grad()
def relations(features_BDN: Tensor, *, gain: float) -> Tensor:
    """`S = sigmoid(gain cos(i, j))` between tokens after their mean is taken off: S_BNN, fp32, exactly symmetric, detached.

    features_BDN: one band of the decoder's features (METHOD 1.7, DFA's `S_l = Sigmoid(F_ld^T F_ld)`). Our reading: raw dot products
    saturate the sigmoid and plain cosines have no contrast, hence the centring and the gain (5 in the prototype).
    """
    with torch.autocast(features_BDN.device.type, enabled=False):
        features_BDN = features_BDN.float()
        direction_BDN = functional.normalize(features_BDN - features_BDN.mean(-1, keepdim=True), dim=1)
        cosine_BNN = direction_BDN.mT @ direction_BDN
        # A product's two halves may be rounded differently, and masks built on them would then disagree about a pair.
        return torch.sigmoid((0.5 * gain) * (cosine_BNN + cosine_BNN.mT))


@torch.no_grad()
def dense_mask(
    teacher_BNN: Tensor, affinity_BNN: Tensor, visible_BNN: Tensor, *, rule: DenseRule, share: float
) -> Tensor:
    """`M_d = [S_l > alpha]`, the dense and confident relations that L_a transfers, bool BNN (METHOD 1.8; supplement eq. 1).

    teacher_BNN: S_l. affinity_BNN: A_s in [0, 1]. visible_BNN: pairs that count; the others are not selected, and no threshold
    is made of them. rule, what S_l must exceed:

    - mean: the mean of S_l in the image (our reading, the default): about half of the pairs;
    - row_mean: the mean of S_l in the pair's row;
    - share: the value that `share` of the image's pairs exceed;
    - alpha: the print, `alpha = sum_ij |S_l - A_s|`, as the mean per image: the printed sum is ~1e5 while S_l <= 1, so M_d would be
      empty. It knows nothing of which pairs are dense: it says how far A_s is from S_l, and falls as training brings them together.
    """
    teacher_BNN = teacher_BNN.float()
    if rule == "mean":
        alpha_B11 = _visible_mean(teacher_BNN, visible_BNN, (1, 2))
    elif rule == "row_mean":
        alpha_B11 = _visible_mean(teacher_BNN, visible_BNN, (2,))
    elif rule == "share":
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        # Image by image: torch takes quantiles of 16 million values at most.
        each = [torch.nanquantile(image_P, 1 - share) for image_P in _or_nan(teacher_BNN, visible_BNN)]
        alpha_B11 = torch.stack(each)[:, None, None]
    elif rule == "alpha":
        alpha_B11 = _visible_mean((teacher_BNN - affinity_BNN.float()).abs(), visible_BNN, (1, 2))
    else:
        raise ValueError(f"rule must be mean, row_mean, share or alpha, got {rule!r}")
    return visible_BNN & (teacher_BNN > alpha_B11)


def _or_nan(value_BNN: Tensor, visible_BNN: Tensor) -> Tensor:
    return value_BNN.masked_fill(~visible_BNN, torch.nan).flatten(1)


def _visible_mean(value_BNN: Tensor, visible_BNN: Tensor, axes: tuple[int, ...]) -> Tensor:
    count = visible_BNN.sum(axes, keepdim=True).clamp_min(1)
    return (value_BNN * visible_BNN).sum(axes, keepdim=True) / count


def alignment_loss(
    teacher_BNN: Tensor,
    logit_BNN: Tensor,
    mask_BNN: Tensor,
    visible_BNN: Tensor,
    *,
    teacher: Teacher,
    student: Student,
) -> Pair:
    """`L_a = 1/sum(M_d) sum M_d S~ log(S~ / A~)`, S~ and A~ distributions over a row's pairs (METHOD 1.9): total and sum(M_d).

    teacher_BNN: S_l. logit_BNN: the logits of the learned A_s (our reading: the doubly stochastic matrix has entries ~1/N and no
    gradient to speak of). mask_BNN: M_d. visible_BNN: pairs that count at all; M_d lies inside. Rows without a pair in M_d add
    nothing.

    teacher, how S_l becomes a distribution: `softmax` of S_l as printed, whose contrast is at most e; `logit`, the softmax of the
    sigmoid's argument; `sum`, S_l over its sum.

    student, over which pairs the two are distributions:

    - divergence (our reading, the default): S~ over M_d, A~ over the whole row, a Kullback-Leibler divergence whose target has the
      support M_d. Mass of A_s moves into the dense relations and leaves all others, which is what the paper asks for;
    - inside_mask: both over M_d. Nothing is asked of the pairs outside, and a softmax of S_l is nearly flat: so the map becomes flat
      on M_d;
    - full_row: both over the whole row and then masked, as printed; no divergence, may be negative.
    """
    if student not in ("divergence", "inside_mask", "full_row"):
        raise ValueError(f"student must be divergence, inside_mask or full_row, got {student!r}")
    with torch.autocast(logit_BNN.device.type, enabled=False):
        teacher_BNN, logit_BNN = teacher_BNN.detach().float(), logit_BNN.float()
        log_teacher_BNN = _log_distribution(teacher_BNN, visible_BNN if student == "full_row" else mask_BNN, teacher)
        support_BNN = mask_BNN if student == "inside_mask" else visible_BNN
        log_student_BNN = torch.log_softmax(logit_BNN.masked_fill(~support_BNN, _FLOOR), dim=-1)
        weight_BNN = log_teacher_BNN.exp() * mask_BNN
        total = (weight_BNN * (log_teacher_BNN - log_student_BNN)).sum()
    return total, mask_BNN.sum().float()


def _log_distribution(relation_BNN: Tensor, support_BNN: Tensor, kind: Teacher) -> Tensor:
    """Logarithms of S_l as a distribution over the supported pairs of each row."""
    if kind == "softmax":
        logit_BNN = relation_BNN
    elif kind == "logit":
        logit_BNN = torch.logit(relation_BNN, eps=1e-6)
    elif kind == "sum":
        logit_BNN = relation_BNN.clamp_min(1e-6).log()
    else:
        raise ValueError(f"teacher must be softmax, logit or sum, got {kind!r}")
    return torch.log_softmax(logit_BNN.masked_fill(~support_BNN, _FLOOR), dim=-1)


@torch.no_grad()
def reliable_masks(
    relations_BNN: Tensor,
    label_BN: Tensor,
    *,
    void: int = VOID,
    pairs: RectifiedPairs = "all",
    agreement: Agreement = "both",
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs on which features and pseudo-labels agree: positive_BNN, negative_BNN and known_BNN, bool (METHOD 1.10, DFA's HFAR).

    `M_+ = [S_h > mean(S_h) and Y_i = Y_j]`, `M_- = [S_h <= mean(S_h) and Y_i != Y_j]`. label_BN: pseudo-label per patch, void ignored.
    Pairs with an ignored label are in neither and not known. Our reading: the mean is per image and over its known pairs.

    pairs: `foreground` leaves out those of two background patches, which otherwise make up most of M_+. agreement: `labels` asks S_h
    nothing, so that every known pair is in one of the two masks and none is left to resolve.
    """
    if agreement not in ("both", "labels"):
        raise ValueError(f"agreement must be both or labels, got {agreement!r}")
    valid_BN = label_BN != void
    known_BNN = valid_BN[:, :, None] & valid_BN[:, None, :]
    if pairs == "foreground":
        known_BNN &= (label_BN > 0)[:, :, None] | (label_BN > 0)[:, None, :]
    elif pairs != "all":
        raise ValueError(f"pairs must be all or foreground, got {pairs!r}")
    same_BNN = label_BN[:, :, None] == label_BN[:, None, :]
    if agreement == "labels":
        return same_BNN & known_BNN, ~same_BNN & known_BNN, known_BNN
    num_known_B = known_BNN.sum((1, 2)).clamp_min(1)
    mean_B = (relations_BNN * known_BNN).sum((1, 2)) / num_known_B
    close_BNN = relations_BNN > mean_B[:, None, None]
    return close_BNN & same_BNN & known_BNN, ~close_BNN & ~same_BNN & known_BNN, known_BNN


@torch.no_grad()
def resolve_unreliable(
    positive_BNN: Tensor, negative_BNN: Tensor, known_BNN: Tensor, *, radius: int
) -> tuple[Tensor, Tensor]:
    """Lets the neighbours of both patches vote on pairs in neither mask: the new positive, negative (METHOD 1.11; supp. eq. 4-5).

    `N[p,q] = sum_{u=q-r..q+r} M[u,p] + sum_{v=p-r..p+r} M[q,v]`, u and v along the flattened token index, clipped at its ends;
    `N_+ > N_-` makes the pair positive, anything else, ties too, negative. Pairs that are not known stay in neither mask.
    Masks must be symmetric: then `R = box_{2r+1}(M)` along the last axis and `N = R + R^T`, and since only `N_+ - N_-` matters one
    running sum over `M_+ - M_-` does. radius: 9 in the paper, whose grid is 20 x 20; the window of 19 is about one row of it, so
    scale it with the grid.
    """
    if radius < 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    num_patches = positive_BNN.shape[-1]
    vote_BNN = positive_BNN.to(torch.int32) - negative_BNN.to(torch.int32)
    running_BNN = functional.pad(vote_BNN.cumsum(-1, dtype=torch.int32), (1, 0))
    index_N = torch.arange(num_patches, device=vote_BNN.device)
    last_N = (index_N + radius + 1).clamp_max(num_patches)
    first_N = (index_N - radius).clamp_min(0)
    box_BNN = running_BNN.index_select(-1, last_N) - running_BNN.index_select(-1, first_N)
    won_BNN = box_BNN + box_BNN.mT > 0
    open_BNN = known_BNN & ~positive_BNN & ~negative_BNN
    return positive_BNN | (open_BNN & won_BNN), negative_BNN | (open_BNN & ~won_BNN)


def rectification_loss(probability_BNN: Tensor, positive_BNN: Tensor, negative_BNN: Tensor) -> tuple[Pair, Pair]:
    """`L_r = sum M_+ (1 - A_inv) / sum M_+  +  sum M_- A_inv / sum M_-`: both as (total, count) (METHOD 1.12).

    probability_BNN: the sigmoid map `P_inv` of the learned inverse affinity (our reading: a doubly stochastic entry cannot near 1).
    """
    probability_BNN = probability_BNN.float()
    positive = torch.where(positive_BNN, 1 - probability_BNN, 0.0).sum(), positive_BNN.sum().float()
    negative = torch.where(negative_BNN, probability_BNN, 0.0).sum(), negative_BNN.sum().float()
    return positive, negative
