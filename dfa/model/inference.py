"""Multi-scale inference with horizontal flips, for images of any size (METHOD 1.22)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Merge = Literal["logits", "max"]
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
    """Logits of images at their own size, in fp32: merged over scales, and over mirrored copies.

    groups: B x 3 x H x W of one size each, RGB, uint8 or float in 0..1. They share the forward passes; each has its answer,
        B x (C + 1) x H x W.
    scales: factors of the image's size, or of `input_size`; each side is rounded to the nearest multiple of
        `multiple_of`, the patch, and is at least one patch.
    forward: images B x 3 x H' x W' in 0..1 -> logits on any grid; a mirrored copy shares the batch of its original.
    merge: logits: their mean (METHOD 1.22). max: the largest logit of each class at each pixel.

    Raises ValueError for no scale, a scale that is not positive, an unknown merge, and groups of different size classes (see
    `size_class`).
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales {list(scales)} must be one or more positive factors")
    if merge not in ("logits", "max"):
        raise ValueError(f"merge {merge!r} is neither logits nor max")
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
        if merge == "logits":
            # Upsampling is linear: the mirrored pair is averaged on the small grid.
            views = [sum(views[1:], views[0]) * (1 / (len(views) * len(scales)))]
        for view in views:
            for whole_BCHW, part in zip(merged, view.split(counts), strict=True):
                _merge_upsampled(whole_BCHW, part, take_max=merge == "max")
    return merged


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
