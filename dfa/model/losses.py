"""Segmentation loss (METHOD 1.19). A loss is a pair (total, count), so that ranks can divide by the global count."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfa.core.void import void_label

LossPair = tuple[Tensor, Tensor]


def upsample_logits(logits_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to `size` pixels, corners not aligned (a logit sits at its patch centre), in fp32: B x C x H x W."""
    return F.interpolate(logits_BChw.float(), size=size, mode="bilinear", align_corners=False)


def segmentation_loss(logits_BCHW: Tensor, target_BHW: Tensor) -> tuple[LossPair, LossPair]:
    """Cross entropy over background pixels and over foreground pixels, apart: ((total, count), (total, count)).

    L_seg is half the one's mean plus half the other's (METHOD 1.19), so that background does not drown the classes.
    logits: C + 1 classes, class 0 the background. target: 0..C, or `dfa.core.void`'s label of C classes
    for pixels that count nowhere. An empty half
    is (0, 0), with zero gradient. Computed in fp32.

    Raises ValueError when logits and target differ in size: upsample the logits first.
    """
    if logits_BCHW.ndim != 4 or logits_BCHW.shape[:1] + logits_BCHW.shape[2:] != target_BHW.shape:
        raise ValueError(f"logits of shape {tuple(logits_BCHW.shape)} do not fit a target {tuple(target_BHW.shape)}")
    void = void_label(logits_BCHW.shape[1] - 1)
    with torch.autocast(logits_BCHW.device.type, enabled=False):
        loss_BHW = F.cross_entropy(logits_BCHW.float(), target_BHW.long(), ignore_index=void, reduction="none")
    is_background = target_BHW == 0
    is_foreground = ~is_background & (target_BHW != void)
    return _masked_sum(loss_BHW, is_background), _masked_sum(loss_BHW, is_foreground)


def _masked_sum(loss_BHW: Tensor, mask_BHW: Tensor) -> LossPair:
    return torch.where(mask_BHW, loss_BHW, 0).sum(), mask_BHW.sum(dtype=torch.float32)
