"""The student's decoder: a few token-mixing blocks on frozen tokens (METHOD 1.20, 4)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfa.core.analysis.truncation import resize_features
from dfa.model.mixer import AttentionBlock, Mixer, SpectralBlock, block_kinds


class Decoder(nn.Module):
    """Tokens of several encoder blocks -> fused feature F_d and class logits on the patch grid.

    Each block's tokens go through an MLP to `width`; concatenated, a 1x1 map to `width` gives F_d; then channel
    dropout, `depth` blocks and a 1x1 map to C + 1 (METHOD 1.20).

    Our reading: the MLP is Linear, ReLU, Linear, one per encoder block, and no norm comes before the classifier. With
    the tokens of eleven ViT-B/16 blocks (all but the last, whose patches CLIP's own loss never sees) and C = 20 that
    makes 5 985 045 parameters, the published "about 6.0 M"; twelve make 6.3 M. There is no positional embedding: frozen
    tokens carry the encoder's, and so any grid will do.

    num_blocks: L. token_width: D of the encoder. num_classes: C, foreground. normalize_tokens: bring each token to zero
    mean and unit variance first, without parameters (residual streams grow from block to block, most in few channels).
    mixer, radius, drop: the kind of the blocks and what SPANet's take (METHOD 4). grid_share: feature truncation (METHOD 3): the
    blocks and the classifier work on a grid of this share of the patch grid's sides, F_d brought there bilinearly and the
    logits back; 0 switches it off. Our reading: F_d itself stays on the patch grid, where DFA compares it with affinities.
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
        mixer: Mixer = "attention",
        radius: float = 2.0,
        drop: float = 0.0,
        grid_share: float = 0.0,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"the decoder needs tokens of at least one encoder block, got {num_blocks}")
        if not 0 <= grid_share <= 1:
            raise ValueError(f"the decoder's grid is a share of the patch grid's sides, from 0 to 1, got {grid_share}")
        self.num_blocks, self.token_width, self.normalize_tokens = num_blocks, token_width, normalize_tokens
        self.grid_share = grid_share
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Linear(token_width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(num_blocks)
        )
        self.fuse = nn.Linear(num_blocks * width, width)
        self.dropout = nn.Dropout1d(dropout)
        self.blocks = nn.ModuleList(
            AttentionBlock(width, heads=heads, mlp_ratio=mlp_ratio)
            if kind == "attention"
            else SpectralBlock(width, mlp_ratio=mlp_ratio, radius=radius, drop=drop)
            for kind in block_kinds(mixer, depth)
        )
        self.classify = nn.Linear(width, num_classes + 1)

    def forward(self, tokens_BLND: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(F_d B x D x h x w, before the dropout; logits B x (C + 1) x h x w). Tokens may be of any float type."""
        fused_BDhw = self.fused(tokens_BLND, grid)
        return fused_BDhw, self.decode(fused_BDhw)

    def fused(self, tokens_BLND: Tensor, grid: tuple[int, int]) -> Tensor:
        """F_d alone, B x D x h x w."""
        self._require_shape(tokens_BLND, grid)
        tokens_BLND = tokens_BLND.to(self.fuse.weight.dtype)
        if self.normalize_tokens:
            tokens_BLND = F.layer_norm(tokens_BLND, (self.token_width,))
        reduced = [mlp(tokens_BND) for mlp, tokens_BND in zip(self.reduce, tokens_BLND.unbind(1), strict=True)]
        return self.fuse(torch.cat(reduced, dim=-1)).mT.unflatten(2, grid)

    def decode(self, fused_BDhw: Tensor, blocks: Iterable[nn.Module] | None = None) -> Tensor:
        """Logits B x (C + 1) x h x w of F_d, or of one band of it; blocks: others than the decoder's own."""
        grid = (fused_BDhw.shape[2], fused_BDhw.shape[3])
        working = self.working_grid(grid)
        x_BDhw = self.dropout(fused_BDhw.flatten(2)).unflatten(2, grid)
        x_BND = resize_features(x_BDhw, working).flatten(2).mT
        for block in self.blocks if blocks is None else blocks:
            x_BND = block(x_BND, working)
        return resize_features(self.classify(x_BND).mT.unflatten(2, working), grid)

    def working_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid of the blocks and the classifier on a patch grid (h, w): the LRG where features are truncated."""
        if not self.grid_share:
            return grid
        return max(1, round(self.grid_share * grid[0])), max(1, round(self.grid_share * grid[1]))

    def flops(self, grid: tuple[int, int]) -> int:
        """Floating-point operations for one image on a patch grid, two per multiply-add, without biases, norms and resizing."""
        working = self.working_grid(grid)
        linear = [each for each in self.reduce.modules() if isinstance(each, nn.Linear)]
        fused = sum(2 * each.weight.numel() for each in [*linear, self.fuse]) * grid[0] * grid[1]
        classified = 2 * self.classify.weight.numel() * working[0] * working[1]
        blocks = sum(
            block.flops(working) for block in self.blocks if isinstance(block, (AttentionBlock, SpectralBlock))
        )
        return fused + blocks + classified

    def _require_shape(self, tokens_BLND: Tensor, grid: tuple[int, int]) -> None:
        expected = (self.num_blocks, grid[0] * grid[1], self.token_width)
        if tokens_BLND.ndim != 4 or tuple(tokens_BLND.shape[1:]) != expected:
            raise ValueError(
                f"tokens of shape {tuple(tokens_BLND.shape)}, expected (images, blocks, patches, width) = (any, "
                f"{', '.join(map(str, expected))}) on a grid of {grid[0]} x {grid[1]}"
            )
