"""Token mixers: what exchanges information between the patches inside the decoder (METHOD 1.20)."""

import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x_BND: Tensor) -> Tensor:
        packed = self.query_key_value(self.norm_1(x_BND)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed_BAND = F.scaled_dot_product_attention(query, key, value)
        x_BND = x_BND + self.project(mixed_BAND.transpose(1, 2).flatten(2))
        return x_BND + self.mlp(self.norm_2(x_BND))
