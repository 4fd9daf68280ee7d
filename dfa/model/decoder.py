"""The student's decoder: a light transformer on frozen tokens (METHOD 1.20)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfa.model.mixer import AttentionBlock


class Decoder(nn.Module):
    """Tokens of several encoder blocks -> fused feature F_d and class logits on the patch grid.

    Each block's tokens go through an MLP to `width`; concatenated, a 1x1 map to `width` gives F_d; then channel
    dropout, `depth` transformer blocks and a 1x1 map to C + 1 (METHOD 1.20).

    Our reading: the MLP is Linear, ReLU, Linear, one per encoder block, and no norm comes before the classifier. With
    the tokens of eleven ViT-B/16 blocks (all but the last, whose patches CLIP's own loss never sees) and C = 20 that
    makes 5 985 045 parameters, the published "about 6.0 M"; twelve make 6.3 M. There is no positional embedding: frozen
    tokens carry the encoder's, and so any grid will do.

    num_blocks: L. token_width: D of the encoder. num_classes: C, foreground. normalize_tokens: bring each token to zero
    mean and unit variance first, without parameters (residual streams grow from block to block, most in few channels).
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        token_width: int,
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        normalize_tokens: bool,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"the decoder needs tokens of at least one encoder block, got {num_blocks}")
        self.num_blocks, self.token_width, self.normalize_tokens = num_blocks, token_width, normalize_tokens
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Linear(token_width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(num_blocks)
        )
        self.fuse = nn.Linear(num_blocks * width, width)
        self.dropout = nn.Dropout1d(dropout)
        self.blocks = nn.ModuleList(AttentionBlock(width, heads=heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.classify = nn.Linear(width, num_classes + 1)

    def forward(self, tokens_BLND: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(F_d B x D x h x w, before the dropout; logits B x (C + 1) x h x w). Tokens may be of any float type."""
        self._require_shape(tokens_BLND, grid)
        tokens_BLND = tokens_BLND.to(self.fuse.weight.dtype)
        if self.normalize_tokens:
            tokens_BLND = F.layer_norm(tokens_BLND, (self.token_width,))
        reduced = [mlp(tokens_BND) for mlp, tokens_BND in zip(self.reduce, tokens_BLND.unbind(1), strict=True)]
        fused_BDN = self.fuse(torch.cat(reduced, dim=-1)).mT
        x_BND = self.dropout(fused_BDN).mT
        for block in self.blocks:
            x_BND = block(x_BND)
        return fused_BDN.unflatten(2, grid), self.classify(x_BND).mT.unflatten(2, grid)

    def _require_shape(self, tokens_BLND: Tensor, grid: tuple[int, int]) -> None:
        expected = (self.num_blocks, grid[0] * grid[1], self.token_width)
        if tokens_BLND.ndim != 4 or tuple(tokens_BLND.shape[1:]) != expected:
            raise ValueError(
                f"tokens of shape {tuple(tokens_BLND.shape)}, expected (images, blocks, patches, width) = (any, "
                f"{', '.join(map(str, expected))}) on a grid of {grid[0]} x {grid[1]}"
            )
