"""Multi-scale inference with horizontal flips, for images of any size (METHOD 1.22)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

Merge = Literal["logits", "probabilities", "max"]
InputKind = Literal["native", "square", "long_side"]
_CHANNEL_CHUNK = (
    32  # classes brought to pixel size at once: with a thousand classes a second full-size map would not fit
)


@dataclass(frozen=True)
class InputSize:
    """The size at which an image is seen at scale 1. native: its own. square: `pixels` along both sides. long_side: its own
    proportions with `pixels` along the longer side. Answers always have the image's own size.

    >>> InputSize("long_side", 512).of(375, 500)
    (384.0, 512.0)
    """

    kind: InputKind = "native"
    pixels: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("native", "square", "long_side"):
            raise ValueError(f"input size {self.kind!r} is not one of native, square, long_side")
        if self.kind != "native" and self.pixels < 1:
            raise ValueError(f"an input size {self.kind} needs pixels, given {self.pixels}")

    def of(self, height: int, width: int) -> tuple[float, float]:
        """(height, width) at scale 1."""
        if self.kind == "native":
            return float(height), float(width)
        if self.kind == "square":
            return float(self.pixels), float(self.pixels)
        factor = self.pixels / max(1, height, width)  # a picture whose header cannot be read has no size
        return height * factor, width * factor


NATIVE = InputSize()


@overload
def predict_logits(
    image: Tensor,
    *,
    scales: Sequence[float],
    flip: bool,
    forward: Callable[[Tensor], Tensor],
    multiple_of: int,
    merge: Merge,
    input_size: InputSize = ...,
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
    input_size: InputSize = ...,
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
    input_size: InputSize = NATIVE,
) -> Tensor | list[Tensor]:
    """Logits at the image's own size, B x (C + 1) x H x W in fp32: merged over scales, and over mirrored copies.

    image: B x 3 x H x W of one size, RGB, uint8 or float in 0..1; or several of these in a list, answered by a list.
    scales: factors of the image's size, or of `input_size`; each side is rounded to the nearest multiple of
        `multiple_of`, the patch, and is at least one patch.
    forward: images B x 3 x H' x W' in 0..1 -> logits on any grid; a mirrored copy shares the batch of its original.
    merge: logits: their mean (METHOD 1.22). probabilities: the logarithm of the mean softmax, hence logits again. max: the
        largest logit of each class at each pixel.

    Raises ValueError for no scale, a scale that is not positive, and an unknown merge.
    """
    options: dict[str, Any] = {"scales": scales, "flip": flip, "forward": forward, "input_size": input_size}
    options |= {"multiple_of": multiple_of, "merge": merge}
    if isinstance(image, Tensor):
        return predict_together([image], **options)[0]
    return [predict_together([one], **options)[0] for one in image]


def size_class(
    height: int, width: int, *, scales: Sequence[float], multiple_of: int, input_size: InputSize = NATIVE
) -> tuple[tuple[int, int], ...]:
    """The sizes at which an image is seen, one for each scale: images that agree in it can share every forward pass."""
    seen_height, seen_width = input_size.of(height, width)
    return tuple(
        (_nearest_multiple(seen_height * scale, multiple_of), _nearest_multiple(seen_width * scale, multiple_of))
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
    input_size: InputSize = NATIVE,
) -> list[Tensor]:
    """`predict_logits` of several sizes in the same forward passes: groups of B x 3 x H x W, one answer for each.

    Raises ValueError as `predict_logits`, and for groups of different size classes (see `size_class`).
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales {list(scales)} must be one or more positive factors")
    if merge not in ("logits", "probabilities", "max"):
        raise ValueError(f"merge {merge!r} is none of logits, probabilities and max")
    sizes = [(group.shape[-2], group.shape[-1]) for group in groups]
    classes = {size_class(*size, scales=scales, multiple_of=multiple_of, input_size=input_size) for size in sizes}
    if len(classes) != 1:
        raise ValueError(f"images of {sizes} do not share one size at the scales {list(scales)}")
    groups = [group if group.is_floating_point() else group.float() / 255 for group in groups]
    counts, merged, start = [len(group) for group in groups], list[Tensor](), -torch.inf if merge == "max" else 0.0
    for seen in classes.pop():
        resized = torch.cat([_resize(group, seen) for group in groups])
        logits = forward(torch.cat([resized, resized.flip(-1)]) if flip else resized).float()
        views = [logits[: len(resized)], logits[len(resized) :].flip(-1)] if flip else [logits]
        if not merged:
            sides = zip(counts, sizes, strict=True)
            merged = [logits.new_full((n, logits.shape[1], *size), start) for n, size in sides]
        share = 1 / (len(views) * len(scales))
        if merge == "logits":
            # Upsampling is linear: the mirrored pair is averaged on the small grid.
            views, share = [sum(views[1:], views[0]) * share], 1.0
        for view in views:
            for whole_BCHW, part in zip(merged, view.split(counts), strict=True):
                if merge == "probabilities":
                    size = (whole_BCHW.shape[-2], whole_BCHW.shape[-1])
                    upsampled = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
                    whole_BCHW.add_(upsampled.softmax(1), alpha=share)
                else:
                    _merge_upsampled(whole_BCHW, part, take_max=merge == "max")
    if merge != "probabilities":
        return merged
    return [each.clamp_min_(torch.finfo(torch.float32).tiny).log_() for each in merged]


def _nearest_multiple(length: float, multiple_of: int) -> int:
    return max(1, round(length / multiple_of)) * multiple_of


def _resize(image_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
    if size == tuple(image_B3HW.shape[-2:]):
        return image_B3HW
    return F.interpolate(image_B3HW, size=size, mode="bilinear", align_corners=False, antialias=True)


def _merge_upsampled(whole_BCHW: Tensor, logits_BChw: Tensor, *, take_max: bool) -> None:
    size = (whole_BCHW.shape[-2], whole_BCHW.shape[-1])
    parts = zip(whole_BCHW.split(_CHANNEL_CHUNK, 1), logits_BChw.split(_CHANNEL_CHUNK, 1), strict=True)
    for whole_part, logits_part in parts:
        upsampled = F.interpolate(logits_part, size=size, mode="bilinear", align_corners=False)
        if take_max:
            torch.maximum(whole_part, upsampled, out=whole_part)
        else:
            whole_part.add_(upsampled)
