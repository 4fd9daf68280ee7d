"""Low-resolution grids: truncated features and block-wise annotation (METHOD 3; spectral analysis, 3.2 and 3.3)."""

import torch
from torch import Tensor
from torch.nn import functional


def resize_features(x_BDhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Features or logits on another grid: bilinear, corners not aligned, no antialiasing, as the paper truncates (3.2)."""
    if tuple(x_BDhw.shape[-2:]) == tuple(size):
        return x_BDhw
    return functional.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=False)


def block_annotation(label_BHW: Tensor, *, grid: int) -> Tensor:
    """Block-wise annotation: labels to `grid` x `grid` blocks and back, both by nearest neighbour (3.3).

    A block takes the label at its centre, 255 included; a pixel takes that of its block. grid: the LRG, `2 nu_max + 1`; on an
    axis of at most so many pixels nothing changes (513 at nu_max = 256).

    >>> block_annotation(torch.tensor([[[0, 1, 2, 3, 4, 5]]]), grid=2)
    tensor([[[1, 1, 1, 4, 4, 4]]])
    """
    if grid < 1:
        raise ValueError(f"the grid must have at least one block an axis, got {grid}")
    rows, columns = (_block_centre(size, grid, label_BHW.device) for size in label_BHW.shape[-2:])
    return label_BHW[..., rows[:, None], columns]


def _block_centre(size: int, grid: int, device: torch.device) -> Tensor:
    """For each pixel of an axis the pixel at the centre of its block, in integers, so that nothing is rounded."""
    if grid >= size:
        return torch.arange(size, device=device)
    block = torch.div((2 * torch.arange(size, device=device) + 1) * grid, 2 * size, rounding_mode="floor")
    return torch.div((2 * block + 1) * size, 2 * grid, rounding_mode="floor")
