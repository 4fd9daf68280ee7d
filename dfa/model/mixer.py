"""Token mixers: what exchanges information between the patches inside the decoder (METHOD 1.20, 4).

A block is called with tokens B x N x D and their grid (h, w), N = h * w, and returns tokens.
"""

from math import log2
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfa.core.spectrum import Band, low_pass

Mixer = Literal["attention", "spam", "hybrid"]
_BALANCES = (0.7, 0.8, 0.9)


def block_kinds(mixer: Mixer, depth: int) -> list[str]:
    """The kind of each of `depth` blocks. Our reading of hybrid: SPANet's in the first half, rounded up, attention after it.

    >>> block_kinds("hybrid", 3)
    ['spam', 'spam', 'attention']
    """
    if mixer not in ("attention", "spam", "hybrid"):
        raise ValueError(f"mixer must be attention, spam or hybrid, got {mixer!r}")
    num_spam = {"attention": 0, "spam": depth, "hybrid": (depth + 1) // 2}[mixer]
    return ["spam" if index < num_spam else "attention" for index in range(depth)]


class AttentionBlock(nn.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))` with GELU (Vaswani et al. 2017).

    width: D, a multiple of `heads`. mlp_ratio: hidden width of the MLP over D.
    """

    def __init__(self, width: int, *, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"decoder width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention knows no places: the grid is not read."""
        packed = self.query_key_value(self.norm_1(x_BND)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed_BAND = F.scaled_dot_product_attention(query, key, value)
        x_BND = x_BND + self.project(mixed_BAND.transpose(1, 2).flatten(2))
        return x_BND + self.mlp(self.norm_2(x_BND))

    def flops(self, grid: tuple[int, int]) -> int:
        """Floating-point operations for one image, two per multiply-add, without biases, norms and softmax."""
        cells, width = grid[0] * grid[1], self.project.in_features
        return cells * _linear_flops(self) + 4 * cells**2 * width


class SpectralMixer(nn.Module):
    """SPAM, spectral pooling aggregation modulation: `out = 1x1(u * context)` with `u = 1x1(x)` (SPANet; METHOD 4).

    The context: u through a depth-wise 1 x 7 and a 7 x 1 convolution, cut into three groups of channels; group i through the
    spectral pooling filter `(1 - l) x + (2 l - 1) lowpass_r(x)`, l = 0.7, 0.8, 0.9, which keeps the share l of the low band and
    1 - l of the rest; a 1x1 map of each to D channels, summed. Our readings, since only the supplement is public: the depth-wise
    convolutions pad with zeros, the first groups take the channels that three does not divide, and the sum has one bias.

    width: D. radius: r of the open disc in bins; 1 is the spatial mean.
    """

    balance_D: Tensor

    def __init__(self, width: int, *, radius: float) -> None:
        super().__init__()
        if width < len(_BALANCES):
            raise ValueError(f"the spectral mixer needs a width of at least {len(_BALANCES)}, got {width}")
        self.band = Band(radius, "disc")
        self.value = nn.Linear(width, width)
        self.along_rows = nn.Conv2d(width, width, (1, 7), padding=(0, 3), groups=width)
        self.along_columns = nn.Conv2d(width, width, (7, 1), padding=(3, 0), groups=width)
        # A 1x1 map of each group to D channels, summed: one map of all of them.
        self.context = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        groups = torch.arange(width).tensor_split(len(_BALANCES))
        balances = [torch.full((len(group),), balance) for group, balance in zip(groups, _BALANCES, strict=True)]
        self.register_buffer("balance_D", torch.cat(balances), persistent=False)

    def forward(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        value_BND = self.value(x_BND)
        local_BDhw = self.along_columns(self.along_rows(value_BND.mT.unflatten(2, grid)))
        low_BND = low_pass(local_BDhw, self.band).flatten(2).mT
        balance_D = self.balance_D
        filtered_BND = (1 - balance_D) * local_BDhw.flatten(2).mT + (2 * balance_D - 1) * low_BND
        return self.project(value_BND * self.context(filtered_BND.to(value_BND.dtype)))


class SpectralBlock(nn.Module):
    """SPANet's block: `x = s1 x + drop(SPAM(GN(x)))`, `x = s2 x + drop(MLP(GN(x)))` (METHOD 4).

    GN is a group norm of one group, over all patches and channels of an image; s1, s2 are learned per channel, from 1. Both branches
    end in zeros, so that the block starts as the identity. drop leaves out a branch of an image as a whole (stochastic depth).
    728 576 parameters at D = 256 and an MLP of 4 D.
    """

    def __init__(self, width: int, *, mlp_ratio: float, radius: float, drop: float) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be at least 0 and below 1, got {drop}")
        self.drop = drop
        self.norm_1, self.norm_2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.scale_1, self.scale_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.mixer = SpectralMixer(width, radius=radius)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for last in (self.mixer.project, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        x_BND = self.scale_1 * x_BND + self._dropped(self.mixer(self.norm_1(x_BND.mT).mT, grid))
        return self.scale_2 * x_BND + self._dropped(self.mlp(self.norm_2(x_BND.mT).mT))

    def flops(self, grid: tuple[int, int]) -> int:
        """As of `AttentionBlock`; a real transform of N cells counts 2.5 N log2 N, there and back for each channel."""
        cells, width = grid[0] * grid[1], len(self.scale_1)
        depth_wise = 2 * (self.mixer.along_rows.weight.numel() + self.mixer.along_columns.weight.numel())
        return cells * (_linear_flops(self) + depth_wise) + round(5 * cells * log2(cells)) * width

    def _dropped(self, branch_BND: Tensor) -> Tensor:
        if not self.drop or not self.training:
            return branch_BND
        kept_B11 = torch.rand(len(branch_BND), 1, 1, device=branch_BND.device) >= self.drop
        return branch_BND * kept_B11.to(branch_BND.dtype) / (1 - self.drop)


def _linear_flops(block: nn.Module) -> int:
    return sum(2 * each.weight.numel() for each in block.modules() if isinstance(each, nn.Linear))
