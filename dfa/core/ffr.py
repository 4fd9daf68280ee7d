"""Frequency feature rectification, FFR (METHOD 2): tokens whose high band has come away from their class are pulled to their low band.

Only the supplement is public; all of this is our reading of it. Prototypes, bands and selections carry no gradient: the loss
reaches F_d at the selected tokens and nowhere else, and never through the low band. As in `rectify`, the loss is
`(total, count)`, and nothing selected gives (0, 0).
"""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def prototypes(
    features_BDN: Tensor,
    cam_BNM: Tensor,
    class_BM: Tensor,
    visible_BN: Tensor,
    *,
    confidence: float,
    fallback_share: float,
) -> Tensor:
    """One direction per present class: the CAM-weighted mean of F_d over confident tokens, of length 1: P_BMD, fp32, detached.

    features_BDN: F_d. cam_BNM: CAM in [0, 1] of the classes of each slot. class_BM: their index, 0 where a slot is unused: its
    prototype is 0, and so is that of a class whose CAM is 0 everywhere. visible_BN: False on padding, which is never used.
    confidence: tokens with a CAM above it are confident. fallback_share: where there is none, the tokens with the highest CAM,
    this share of the visible ones (the top tenth), at least one.
    """
    if not 0 < fallback_share <= 1:
        raise ValueError(f"fallback_share must be above 0 and at most 1, got {fallback_share}")
    with torch.autocast(features_BDN.device.type, enabled=False):
        used_BNM = visible_BN[:, :, None] & (class_BM > 0)[:, None, :]
        cam_BNM = cam_BNM.float().where(used_BNM, 0.0)
        confident_BNM = cam_BNM > confidence
        rank_BNM = cam_BNM.masked_fill(~used_BNM, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        limit_B = (fallback_share * visible_BN.sum(1)).ceil()
        best_BNM = (rank_BNM < limit_B[:, None, None]) & used_BNM
        chosen_BNM = torch.where(confident_BNM.any(1, keepdim=True), confident_BNM, best_BNM)
        sum_BDM = features_BDN.float() @ (cam_BNM * chosen_BNM)
        return functional.normalize(sum_BDM, dim=1).mT


@torch.no_grad()
def select_tokens(
    features_BDN: Tensor, low_BDN: Tensor, prototype_BMD: Tensor, visible_BN: Tensor, *, deviations: float
) -> Tensor:
    """Tokens whose band matters to a class: `|a_c - l_c| > mean + deviations * std` of the image: bool BMN, detached.

    `a_c(t) = cos(F_d(t), P_c)`, `l_c(t) = cos(F_l(t), P_c)`: where the two differ, it is the high band that makes the token near to
    its class or far from it. Mean and (population) deviation are over the visible tokens of the image, per class; deviations is 1
    in METHOD 2. low_BDN: F_l, of the whole map. A prototype of zero selects nothing.
    """
    with torch.autocast(features_BDN.device.type, enabled=False):
        direction_BDN, low_direction_BDN = (
            functional.normalize(each.float(), dim=1) for each in (features_BDN, low_BDN)
        )
        prototype_BMD = prototype_BMD.float()
        gap_BMN = (prototype_BMD @ direction_BDN - prototype_BMD @ low_direction_BDN).abs()
        weight_B1N = visible_BN[:, None, :].float()
        count_B11 = weight_B1N.sum(-1, keepdim=True).clamp_min(1)
        mean_BM1 = (gap_BMN * weight_B1N).sum(-1, keepdim=True) / count_B11
        variance_BM1 = ((gap_BMN - mean_BM1).square() * weight_B1N).sum(-1, keepdim=True) / count_B11
        return (gap_BMN > mean_BM1 + deviations * variance_BM1.sqrt()) & visible_BN[:, None, :]


def feature_rectification_loss(features_BDN: Tensor, low_BDN: Tensor, selected_BMN: Tensor) -> tuple[Tensor, Tensor]:
    """`L_r = mean over selected (1 - cos(F_d(t), stop_gradient(F_l(t))))`: total and count, scalars, fp32.

    A token that several classes of its image select counts once: it has one low band to go to.
    """
    with torch.autocast(features_BDN.device.type, enabled=False):
        selected_BN = selected_BMN.any(1)
        distance_BN = 1 - functional.cosine_similarity(features_BDN.float(), low_BDN.detach().float(), dim=1)
        return torch.where(selected_BN, distance_BN, 0.0).sum(), selected_BN.sum().float()
