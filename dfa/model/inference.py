"""Multi-scale inference with horizontal flips, for images of any size (METHOD 1.22)."""

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

Merge = Literal["logits", "probabilities"]
_CHANNEL_CHUNK = (
    32  # classes brought to pixel size at once: with a thousand classes a second full-size map would not fit
)


@overload
def predict_logits(
    image: Tensor,
    *,
    scales: Sequence[float],
    flip: bool,
    forward: Callable[[Tensor], Tensor],
    multiple_of: int,
    merge: Merge,
) -> Tensor: ...
@overload
def predict_logits(
    image: Sequence[Tensor],
    *,
    scales: Sequence[float],
    flip: bool,
    forward: Callable[[Tensor], Tensor],
    multiple_of: int,
    merge: Merge,
) -> list[Tensor]: ...
@torch.no_grad()
def predict_logits(
    image: Tensor | Sequence[Tensor],
    *,
    scales: Sequence[float],
    flip: bool,
    forward: Callable[[Tensor], Tensor],
    multiple_of: int,
    merge: Merge,
) -> Tensor | list[Tensor]:
    """Logits at the image's own size, B x (C + 1) x H x W in fp32: the mean over scales, and over mirrored copies.

    image: B x 3 x H x W of one size, RGB, uint8 or float in 0..1; or several of these in a list, answered by a list.
    scales: factors of the image's size; each side is rounded to the nearest multiple of `multiple_of`, the patch, and
        is at least one patch.
    forward: images B x 3 x H' x W' in 0..1 -> logits on any grid; a mirrored copy shares the batch of its original.
    merge: logits: their mean (METHOD 1.22). probabilities: the logarithm of the mean softmax, hence logits again.

    Raises ValueError for no scale, a scale that is not positive, and an unknown merge.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales {list(scales)} must be one or more positive factors")
    if merge not in ("logits", "probabilities"):
        raise ValueError(f"merge {merge!r} is neither logits nor probabilities")
    if isinstance(image, Tensor):
        return _predict(image, scales, flip, forward, multiple_of, merge)
    return [_predict(one, scales, flip, forward, multiple_of, merge) for one in image]


def _predict(
    image_B3HW: Tensor,
    scales: Sequence[float],
    flip: bool,
    forward: Callable[[Tensor], Tensor],
    multiple_of: int,
    merge: Merge,
) -> Tensor:
    num_images, size = len(image_B3HW), (image_B3HW.shape[-2], image_B3HW.shape[-1])
    image_B3HW = image_B3HW if image_B3HW.is_floating_point() else image_B3HW.float() / 255
    merged_BCHW: Tensor | None = None
    for scale in scales:
        resized = _resize(image_B3HW, scale, multiple_of)
        logits = forward(torch.cat([resized, resized.flip(-1)]) if flip else resized).float()
        views = [logits[:num_images], logits[num_images:].flip(-1)] if flip else [logits]
        if merged_BCHW is None:
            merged_BCHW = logits.new_zeros(num_images, logits.shape[1], *size)
        if merge == "logits":
            # Upsampling is linear: the mirrored pair is averaged on the small grid.
            _add_upsampled(merged_BCHW, sum(views[1:], views[0]) / (len(views) * len(scales)))
            continue
        for view in views:
            probability = F.interpolate(view, size=size, mode="bilinear", align_corners=False).softmax(1)
            merged_BCHW.add_(probability, alpha=1 / (len(views) * len(scales)))
    assert merged_BCHW is not None  # one scale at least
    return merged_BCHW if merge == "logits" else merged_BCHW.clamp_min_(torch.finfo(torch.float32).tiny).log_()


def _resize(image_B3HW: Tensor, scale: float, multiple_of: int) -> Tensor:
    height, width = (max(1, round(side * scale / multiple_of)) * multiple_of for side in image_B3HW.shape[-2:])
    if (height, width) == tuple(image_B3HW.shape[-2:]):
        return image_B3HW
    return F.interpolate(image_B3HW, size=(height, width), mode="bilinear", align_corners=False, antialias=True)


def _add_upsampled(sum_BCHW: Tensor, logits_BChw: Tensor) -> None:
    size = (sum_BCHW.shape[-2], sum_BCHW.shape[-1])
    parts = zip(sum_BCHW.split(_CHANNEL_CHUNK, 1), logits_BChw.split(_CHANNEL_CHUNK, 1), strict=True)
    for sum_part, logits_part in parts:
        sum_part.add_(F.interpolate(logits_part, size=size, mode="bilinear", align_corners=False))
