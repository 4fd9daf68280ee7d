"""Multi-scale inference with horizontal flips, for images of any size (METHOD 1.22)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

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
    options: dict[str, Any] = {"scales": scales, "flip": flip, "forward": forward}
    options |= {"multiple_of": multiple_of, "merge": merge}
    if isinstance(image, Tensor):
        return predict_together([image], **options)[0]
    return [predict_together([one], **options)[0] for one in image]


def size_class(height: int, width: int, *, scales: Sequence[float], multiple_of: int) -> tuple[tuple[int, int], ...]:
    """The sizes at which an image is seen, one for each scale: images that agree in it can share every forward pass."""
    return tuple(
        (_nearest_multiple(height * scale, multiple_of), _nearest_multiple(width * scale, multiple_of))
        for scale in scales
    )


@torch.no_grad()
def predict_together(
    groups: Sequence[Tensor],
    *,
    scales: Sequence[float],
    flip: bool,
    forward: Callable[[Tensor], Tensor],
    multiple_of: int,
    merge: Merge,
) -> list[Tensor]:
    """`predict_logits` of several sizes in the same forward passes: groups of B x 3 x H x W, one answer for each.

    Raises ValueError as `predict_logits`, and for groups of different size classes (see `size_class`).
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales {list(scales)} must be one or more positive factors")
    if merge not in ("logits", "probabilities"):
        raise ValueError(f"merge {merge!r} is neither logits nor probabilities")
    sizes = [(group.shape[-2], group.shape[-1]) for group in groups]
    if len({size_class(*size, scales=scales, multiple_of=multiple_of) for size in sizes}) != 1:
        raise ValueError(f"images of {sizes} do not share one size at the scales {list(scales)}")
    groups = [group if group.is_floating_point() else group.float() / 255 for group in groups]
    counts, merged = [len(group) for group in groups], list[Tensor]()
    for scale in scales:
        resized = torch.cat([_resize(group, scale, multiple_of) for group in groups])
        logits = forward(torch.cat([resized, resized.flip(-1)]) if flip else resized).float()
        views = [logits[: len(resized)], logits[len(resized) :].flip(-1)] if flip else [logits]
        if not merged:
            merged = [logits.new_zeros(n, logits.shape[1], *size) for n, size in zip(counts, sizes, strict=True)]
        share = 1 / (len(views) * len(scales))
        if merge == "logits":
            # Upsampling is linear: the mirrored pair is averaged on the small grid.
            for sum_BCHW, part in zip(merged, (sum(views[1:], views[0]) * share).split(counts), strict=True):
                _add_upsampled(sum_BCHW, part)
            continue
        for view in views:
            for sum_BCHW, part, size in zip(merged, view.split(counts), sizes, strict=True):
                whole = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
                sum_BCHW.add_(whole.softmax(1), alpha=share)
    if merge == "logits":
        return merged
    return [each.clamp_min_(torch.finfo(torch.float32).tiny).log_() for each in merged]


def _nearest_multiple(length: float, multiple_of: int) -> int:
    return max(1, round(length / multiple_of)) * multiple_of


def _resize(image_B3HW: Tensor, scale: float, multiple_of: int) -> Tensor:
    size = tuple(_nearest_multiple(side * scale, multiple_of) for side in image_B3HW.shape[-2:])
    if size == tuple(image_B3HW.shape[-2:]):
        return image_B3HW
    return F.interpolate(image_B3HW, size=size, mode="bilinear", align_corners=False, antialias=True)


def _add_upsampled(sum_BCHW: Tensor, logits_BChw: Tensor) -> None:
    size = (sum_BCHW.shape[-2], sum_BCHW.shape[-1])
    parts = zip(sum_BCHW.split(_CHANNEL_CHUNK, 1), logits_BChw.split(_CHANNEL_CHUNK, 1), strict=True)
    for sum_part, logits_part in parts:
        sum_part.add_(F.interpolate(logits_part, size=size, mode="bilinear", align_corners=False))
