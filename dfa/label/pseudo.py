"""From class activation maps on the patch grid to pixel labels, touching only the classes that each image contains."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dfa.core.void import void_label
from dfa.label.refine import RefineSettings, refine_with


@dataclass(frozen=True)
class PseudoSettings:
    """How CAMs become labels (METHOD 1.18).

    background: where the background score comes from.
        "constant": the number ``threshold`` everywhere.
        "power": ``(1 - max over present classes of the CAM) ** gamma``.
        "prompts": the map handed in, e.g. `dfa.label.seed.Seeds.background_BN`.
    threshold: the constant background score.
    gamma: the exponent of "power"; greater means less background.
    band: None, or (low, high) with low <= 0 <= high: pixels whose best class beats the background by more than ``low``
        and less than ``high`` become VOID. With a constant background of 0.45, (-0.1, 0.1) is the field's pair of
        thresholds 0.35 / 0.55.
    refine: pixel-adaptive refinement of the scores, or None for plain bilinear upsampling.
    void: the label of undecided and padded pixels; must not be a class index. None: that of so many classes.
    """

    background: Literal["constant", "power", "prompts"]
    threshold: float
    gamma: float
    band: tuple[float, float] | None
    refine: RefineSettings | None
    void: int | None = None

    def __post_init__(self) -> None:
        if self.background not in ("constant", "power", "prompts"):
            raise ValueError(f"background must be constant, power or prompts, got {self.background!r}")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be > 0, got {self.gamma}")
        if self.band is not None and not self.band[0] <= 0 <= self.band[1]:
            raise ValueError(
                f"band must be (low, high) with low <= 0 <= high around the background score, got {self.band}"
            )


@dataclass(frozen=True)
class PseudoLabels:
    """Labels of a batch, with the scores they came from.

    M = the largest number of foreground classes present in one image of the batch.

    mask_BHW: int64 pixel labels, 0 background, class indices, or void.
    patch_Bhw: the same at patch resolution, read at each patch's centre pixel (nearest).
    score_BMHW: float32 scores of the background (slot 0) and of the present classes; shape (B, 1 + M, H, W), -1 in
        unused slots.
    class_BM: int64 class index (1..C) of slots 1..M, 0 where unused.
    """

    mask_BHW: Tensor
    patch_Bhw: Tensor
    score_BMHW: Tensor
    class_BM: Tensor


def present_classes(labels_BC: Tensor) -> Tensor:
    """The class indices (1..C, ascending) that each image contains, padded with 0: (B, M) int64, M the largest count.

    ``labels_BC`` is the multi-hot image-level label over foreground classes (column c - 1 is class c).
    """
    count_B = labels_BC.sum(dim=1)
    num_slots = int(count_B.max()) if len(labels_BC) else 0
    # A stable sort brings the present columns to the front in ascending order.
    order = torch.sort(labels_BC.logical_not().to(torch.uint8), dim=1, stable=True).indices[:, :num_slots] + 1
    used = torch.arange(num_slots, device=labels_BC.device) < count_B[:, None]
    return order.where(used, 0)


def gather_present(cam_BNC: Tensor, class_BM: Tensor) -> Tensor:
    """The present foreground columns of a CAM: (B, N, C or more) -> (B, N, M); zeros in unused slots."""
    index = (class_BM - 1).clamp(min=0)[:, None, :].expand(-1, cam_BNC.shape[1], -1)
    return cam_BNC.gather(2, index).where((class_BM > 0)[:, None, :], 0)


def to_grid(map_BNM: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches in rows to maps: (B, N, M) -> (B, M, h, w). Raises ValueError unless N = h * w."""
    height, width = grid
    if map_BNM.shape[1] != height * width:
        raise ValueError(f"{map_BNM.shape[1]} patches do not fill a grid of {height} x {width}")
    return map_BNM.transpose(1, 2).unflatten(2, (height, width))


def to_pixels(map_BMhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling in fp32, patch centres where the image has them (align_corners=False): (B, M, H, W)."""
    if map_BMhw.shape[1] == 0:
        return map_BMhw.new_zeros(len(map_BMhw), 0, *size, dtype=torch.float32)
    return functional.interpolate(map_BMhw.float(), size=size, mode="bilinear", align_corners=False)


def patch_labels(mask_BHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels at patch resolution: each patch takes the pixel at its centre (nearest), never a mixture. (B, h, w)."""
    rows, columns = (
        ((torch.arange(count, device=mask_BHW.device) + 0.5) * (length / count)).long()
        for count, length in zip(grid, mask_BHW.shape[1:], strict=True)
    )
    return mask_BHW[:, rows[:, None], columns]


def background_score(foreground_BMhw: Tensor, prompt_Bhw: Tensor | None, settings: PseudoSettings) -> Tensor:
    """The background's score map, (B, 1, h, w), from the present classes' CAM in [0, 1] or from the prompts' map."""
    if settings.background == "prompts":
        if prompt_Bhw is None:
            raise ValueError('background "prompts" needs the background prompts\' map, got None')
        return prompt_Bhw.unsqueeze(1).to(foreground_BMhw)
    empty = foreground_BMhw.new_zeros(len(foreground_BMhw), 1, *foreground_BMhw.shape[2:])
    if settings.background == "constant":
        return empty + settings.threshold
    best = torch.cat([empty, foreground_BMhw], dim=1).amax(dim=1, keepdim=True)
    return (1 - best).clamp(min=0) ** settings.gamma


def label_scores(
    score_BMHW: Tensor, class_BM: Tensor, *, band: tuple[float, float] | None, valid_BHW: Tensor | None, void: int
) -> Tensor:
    """Argmax over background (slot 0) and the used slots -> class indices, with the band and the padding as ``void``.

    A tie goes to the background, then to the lower class index.
    """
    foreground, chosen = best_class(score_BMHW[:, 1:], class_BM)
    margin = foreground - score_BMHW[:, 0]
    mask = chosen.where(margin > 0, 0)
    if band is not None:
        mask = mask.masked_fill((margin > band[0]) & (margin < band[1]), void)
    return mask if valid_BHW is None else mask.masked_fill(~valid_BHW, void)


def best_class(foreground_BMHW: Tensor, class_BM: Tensor) -> tuple[Tensor, Tensor]:
    """The best present class of every pixel: (score (B, H, W), class index (B, H, W)).

    What a background-threshold sweep needs: the seed at threshold t is ``class where score > t else 0``. An image
    without classes has score -inf and class 0.
    """
    nothing = foreground_BMHW.new_full((len(foreground_BMHW), 1, *foreground_BMHW.shape[2:]), -torch.inf)
    unused = (class_BM == 0)[:, :, None, None]
    score, slot = torch.cat([nothing, foreground_BMHW.masked_fill(unused, -torch.inf)], dim=1).max(dim=1)
    ids = functional.pad(class_BM, (1, 0))
    return score, ids.gather(1, slot.flatten(1)).view_as(slot)


def pseudo_labels(
    cam_BNC: Tensor,
    labels_BC: Tensor,
    image_B3HW: Tensor,
    grid: tuple[int, int],
    settings: PseudoSettings,
    *,
    prompt_BN: Tensor | None = None,
    valid_BHW: Tensor | None = None,
) -> PseudoLabels:
    """CAM -> present columns -> background score -> refine to pixels -> argmax -> labels (METHOD 1.18).

    Only the present classes are upsampled and refined, so the number of classes of the data set costs nothing.
    Image-level
    labels restrict the answer: a class that the image does not contain is never given.

    Our reading: the background score is made on the patch grid and refined together with the classes (the refinement
    is a weighted mean, so a constant stays that constant).

    Args:
        cam_BNC: CAM in [0, 1]; the first C columns are the foreground classes, further columns are ignored.
        labels_BC: bool multi-hot image-level labels.
        image_B3HW: uint8, or floating point in [0, 1]; its size is the size of the labels.
        grid: (h, w) with N = h * w.
        prompt_BN: the background's map, for ``background="prompts"``.
        valid_BHW: False on padding, which becomes void.

    Returns:
        PseudoLabels, without gradient.

    Raises:
        ValueError: shapes that do not fit, or more classes than ``settings.void`` leaves room for.
    """
    num_classes = labels_BC.shape[1]
    if cam_BNC.ndim != 3 or cam_BNC.shape[0] != len(labels_BC) or cam_BNC.shape[2] < num_classes:
        raise ValueError(
            f"CAM (B,N,>=C) does not fit labels (B,C): {tuple(cam_BNC.shape)} against {tuple(labels_BC.shape)}"
        )
    void = void_label(num_classes) if settings.void is None else settings.void
    if 0 <= void <= num_classes:
        raise ValueError(f"void label {void} is a class index of this set of {num_classes} classes; choose another")
    size = (image_B3HW.shape[2], image_B3HW.shape[3])
    with torch.no_grad():
        class_BM = present_classes(labels_BC)
        foreground = to_grid(gather_present(cam_BNC.float(), class_BM), grid)
        prompt = None if prompt_BN is None else to_grid(prompt_BN.float().unsqueeze(2), grid).squeeze(1)
        scores = torch.cat([background_score(foreground, prompt, settings), foreground], dim=1)
        refine = settings.refine
        scores = to_pixels(scores, size) if refine is None else refine_with(image_B3HW, scores, refine)
        unused = functional.pad(class_BM == 0, (1, 0))
        scores = scores.masked_fill(unused[:, :, None, None], -1)
        mask = label_scores(scores, class_BM, band=settings.band, valid_BHW=valid_BHW, void=void)
    return PseudoLabels(mask, patch_labels(mask, grid), scores, class_BM)
