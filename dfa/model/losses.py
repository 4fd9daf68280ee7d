"""Segmentation loss (METHOD 1.19). A loss is a pair (total, count), so that ranks can divide by the global count."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dfa.core.void import void_label

LossPair = tuple[Tensor, Tensor]

# Numbers of one batch of pixel logits, of which the loss takes three times the memory. VOC and COCO stay below: 16 crops of 320 x 320
# pixels and 80 classes are 2^27; with 1000 classes so is one.
PIXEL_LOGITS_AT_ONCE = 2**27


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


def patch_segmentation_loss(logits_BChw: Tensor, target_BHW: Tensor) -> tuple[LossPair, LossPair]:
    """`segmentation_loss` of logits on the patch grid, upsampled to the target.

    Where the pixel logits of the whole batch would be large (many classes), images are taken in parts, and what a part needs backwards
    is computed again there: memory is that of one part.
    """
    size = (target_BHW.shape[1], target_BHW.shape[2])
    images = max(1, PIXEL_LOGITS_AT_ONCE // (logits_BChw.shape[1] * size[0] * size[1]))

    def loss(part_BChw: Tensor, part_BHW: Tensor) -> tuple[LossPair, LossPair]:
        return segmentation_loss(upsample_logits(part_BChw, size), part_BHW)

    if len(target_BHW) <= images:
        return loss(logits_BChw, target_BHW)
    parts = zip(logits_BChw.split(images), target_BHW.split(images), strict=True)
    halves = zip(*(checkpoint(loss, *part, use_reentrant=False) for part in parts), strict=True)
    background, foreground = ([torch.stack(sums).sum(0) for sums in zip(*half, strict=True)] for half in halves)
    return (background[0], background[1]), (foreground[0], foreground[1])


def _masked_sum(loss_BHW: Tensor, mask_BHW: Tensor) -> LossPair:
    return torch.where(mask_BHW, loss_BHW, 0).sum(), mask_BHW.sum(dtype=torch.float32)
