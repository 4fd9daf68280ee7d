"""Pixel-adaptive refinement: let a class map follow the image's edges, cheaply enough for every training step."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Least local standard deviation, as a share of the colour range: below what one grey level among 32 neighbours makes
# (7e-4), so it only guards the division where a neighbourhood is flat.
_MIN_STD = 1e-4
# torch runs an elementwise operation on fewer than 32768 elements in the calling thread.
_SERIAL_ELEMENTS = 32_000


@dataclass(frozen=True)
class RefineSettings:
    """The arguments of :func:`pixel_adaptive_refine`, checked. Published: (1,2,4,8,12,24), 15, 0.3, 0.3, 0.01, stride
    1."""

    dilations: tuple[int, ...]
    iterations: int
    colour_scale: float
    position_scale: float
    position_weight: float
    stride: int = 1

    def __post_init__(self) -> None:
        if not self.dilations or min(self.dilations) < 1 or len(set(self.dilations)) != len(self.dilations):
            raise ValueError(f"refinement dilations must be distinct and at least 1, got {self.dilations}")
        if self.iterations < 0 or self.stride < 1:
            raise ValueError(
                f"refinement needs iterations >= 0 and stride >= 1, got {self.iterations} and {self.stride}"
            )
        if self.colour_scale <= 0 or self.position_scale <= 0 or self.position_weight < 0:
            raise ValueError(f"refinement needs scales > 0 and position_weight >= 0, got {self}")

    def offsets(self) -> list[tuple[int, int]]:
        """(dy, dx) of the ``8 * len(dilations)`` neighbours, in pixels of the working resolution."""
        ring = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        return [(dy * dilation, dx * dilation) for dilation in self.dilations for dy, dx in ring]


def pixel_adaptive_refine(
    image_B3HW: Tensor,
    map_BKHW: Tensor,
    *,
    dilations: tuple[int, ...],
    iterations: int,
    colour_scale: float,
    position_scale: float,
    position_weight: float,
    stride: int = 1,
) -> Tensor:
    """Average each class map over the neighbours that look alike, ``iterations`` times.

    With ``N(i)`` the 3x3 rings around pixel ``i`` at every dilation (``8 * len(dilations)`` neighbours, centre
    excluded), ``I`` the colours and ``P`` the positions:

        kappa_rgb[i,j] = - (|I_i - I_j| / (w1 sigma_rgb[i]))^2      kappa_pos[i,j] = - (|P_i - P_j| / (w2 sigma_pos))^2
        kappa[i,j]     = softmax_j kappa_rgb[i,j] + w3 softmax_j kappa_pos[i,j]                j in N(i)
        M_t[i,c]       = sum_j kappa[i,j] M_{t-1}[j,c]                                         t = 1 .. T

    Source: Ru et al., "Learning Affinity from Attention", CVPR 2022, pixel-adaptive refinement (w1 = w2 = 0.3, w3 =
    0.01, dilations 1 2 4 8 12 24 there); METHOD 1.18. ``kappa`` is computed once for all channels and iterations.

    Our reading: ``sigma`` is the population standard deviation over ``N(i)``, per colour channel, and the squared
    ratios are averaged over the channels; ``kappa`` is divided by ``1 + w3`` so that its rows sum to one (a constant
    map stays constant and values keep their range; the argmax is as printed). Neighbours beyond the border repeat the
    border pixel (replication), with the position term of the place where they would be.

    Args:
        image_B3HW: uint8, or floating point in [0, 1].
        map_BKHW: class maps of any spatial size, brought to the working resolution (bilinear up, averaged down).
        dilations: distances of the neighbours, in pixels of the working resolution.
        iterations: T; 0 resizes only.
        colour_scale, position_scale, position_weight: w1, w2, w3.
        stride: work on ``ceil(H / stride) x ceil(W / stride)`` pixels; the cost falls with its square. The affinity
            takes ``32 * len(dilations) * B`` bytes for each of these pixels.

    Returns:
        (B, K, H, W) float32 without gradient, computed in fp32 also under autocast.

    Raises:
        ValueError: shapes that do not fit, or settings out of range.
    """
    settings = RefineSettings(dilations, iterations, colour_scale, position_scale, position_weight, stride)
    if image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3 or map_BKHW.ndim != 4 or len(map_BKHW) != len(image_B3HW):
        raise ValueError(
            f"expected image (B,3,H,W) and map (B,K,h,w), got {tuple(image_B3HW.shape)}, {tuple(map_BKHW.shape)}"
        )
    height, width = image_B3HW.shape[2:]
    size = (-(-height // stride), -(-width // stride))
    with torch.no_grad(), torch.autocast(image_B3HW.device.type, enabled=False):
        image = image_B3HW.float() / 255 if image_B3HW.dtype == torch.uint8 else image_B3HW.float()
        image, refined = _resize(image, size), _resize(map_BKHW.float(), size)
        if iterations and refined.numel():
            refined = _propagate(_affinity(image, settings), refined, settings)
        return _resize(refined, (height, width))


def refine_with(image_B3HW: Tensor, map_BKHW: Tensor, settings: RefineSettings) -> Tensor:
    """:func:`pixel_adaptive_refine` with its arguments in one record."""
    return pixel_adaptive_refine(image_B3HW, map_BKHW, **asdict(settings))


def _resize(map_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
    if map_BKHW.shape[2:] == size:
        return map_BKHW
    if map_BKHW.shape[1] == 0:
        return map_BKHW.new_zeros(*map_BKHW.shape[:2], *size)
    if map_BKHW.shape[2] > size[0]:
        return functional.interpolate(map_BKHW, size=size, mode="area")
    return functional.interpolate(map_BKHW, size=size, mode="bilinear", align_corners=False)


def _bands(map_BKHW: Tensor) -> list[slice]:
    """Row ranges to work on, one after the other; all rows at once on an accelerator.

    On a CPU each operation stays below the size at which torch starts threads: there are hundreds of small ones, and where
    processes share the cores, a barrier after each took a hundred times as long as the work.
    """
    num_images, num_channels, height, width = map_BKHW.shape
    on_cpu = map_BKHW.device.type == "cpu"
    rows = max(1, _SERIAL_ELEMENTS // (num_images * num_channels * width)) if on_cpu else height
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _pad(map_BKHW: Tensor, margin: int) -> Tensor:
    return functional.pad(map_BKHW, (margin,) * 4, mode="replicate")


def _shifted(padded: Tensor, offset: tuple[int, int], margin: int, rows: slice) -> Tensor:
    """The view of a map padded by ``margin`` that holds, for every pixel i of ``rows``, its neighbour ``i + offset``."""
    top, left = margin + offset[0], margin + offset[1]
    return padded[..., top + rows.start : top + rows.stop, left : left + padded.shape[-1] - 2 * margin]


def _affinity(image_B3HW: Tensor, settings: RefineSettings) -> Tensor:
    """kappa, neighbour-major: (neighbours, B, 1, H, W), non-negative, summing to one over the neighbours."""
    offsets, margin = settings.offsets(), max(settings.dilations)
    padded = _pad(image_B3HW, margin)
    height, width = image_B3HW.shape[2:]
    kappa = image_B3HW.new_empty(len(offsets), len(image_B3HW), 1, height, width)
    bands = _bands(image_B3HW)
    for rows in bands:
        neighbours = [_shifted(padded, offset, margin, rows) for offset in offsets]
        _colour_logits(kappa[..., rows, :], image_B3HW[..., rows, :], neighbours, settings)
    kappa.exp_()  # all at once: torch starts threads for an exponential of any size
    for rows in bands:
        _normalise(kappa[..., rows, :], settings)
    return kappa


def _colour_logits(out: Tensor, centre_B3HW: Tensor, neighbours: list[Tensor], settings: RefineSettings) -> None:
    """kappa_rgb less its greatest value over the neighbours, so that its exponential cannot vanish everywhere."""
    # Moments of the differences, not of the colours: exact zeros on flat areas, no cancellation of large means.
    total, squares = torch.zeros_like(centre_B3HW), torch.zeros_like(centre_B3HW)
    for neighbour in neighbours:
        difference = neighbour - centre_B3HW
        total += difference
        squares.addcmul_(difference, difference)
    variance = (squares / len(neighbours) - (total / len(neighbours)) ** 2).clamp_min_(_MIN_STD**2)
    inverse = (1 / (settings.colour_scale * 3**0.5)) * variance.rsqrt_()
    for ratio, neighbour in zip(out, neighbours, strict=True):
        difference = (neighbour - centre_B3HW).mul_(inverse)
        torch.sum(difference.square_(), dim=1, keepdim=True, out=ratio)
    least = out[0].clone()
    for ratio in out[1:]:
        torch.minimum(least, ratio, out=least)
    for ratio in out:
        torch.sub(least, ratio, out=ratio)


def _normalise(kappa: Tensor, settings: RefineSettings) -> None:
    """Exponentials to weights, in place: the colours' softmax and the position term, summing to one together."""
    normaliser = torch.zeros_like(kappa[0])
    for weight in kappa:
        normaliser += weight
    normaliser.mul_(1 + settings.position_weight).reciprocal_()
    share = settings.position_weight / (1 + settings.position_weight)
    for weight, position in zip(kappa, _position_softmax(settings).tolist(), strict=True):
        weight.mul_(normaliser).add_(share * position)


def _position_softmax(settings: RefineSettings) -> Tensor:
    """softmax of kappa_pos over the neighbours: the same at every pixel. (neighbours,) float64."""
    distance = torch.tensor(settings.offsets(), dtype=torch.float64).norm(dim=1)
    std = distance.std(correction=0)
    return torch.softmax(-((distance / (settings.position_scale * std)) ** 2), dim=0)


def _propagate(kappa: Tensor, map_BKHW: Tensor, settings: RefineSettings) -> Tensor:
    """M_T from M_0 with a fixed affinity (neighbours, B, 1, H, W)."""
    offsets, margin = settings.offsets(), max(settings.dilations)
    bands = _bands(map_BKHW)
    for _ in range(settings.iterations):
        padded, result = _pad(map_BKHW, margin), torch.zeros_like(map_BKHW)
        for rows in bands:
            band = result[..., rows, :]
            for weight, offset in zip(kappa[..., rows, :], offsets, strict=True):
                band.addcmul_(weight, _shifted(padded, offset, margin, rows))
        map_BKHW = result
    return map_BKHW
