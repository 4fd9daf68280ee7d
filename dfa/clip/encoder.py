"""Frozen CLIP: patch tokens and attention of each block, and the similarity between patches and texts.

METHOD 1.1 (frozen encoder), 1.2 (attention without the class token) and the paragraph on the patch-text similarity. The
vision tower is walked block by block here, because one pass must give tokens, attention and a second residual path. No
gradient ever flows: `FrozenClip` is a plain object, so that assigning it inside an nn.Module registers no parameter.

What did not pay on a processor (ViT-B/16, 320 px, fp32, against the pass as it is): torch.compile of a block's layers (0.98 of
the speed, and half a minute at the start), hence an option that is off; and channels-last images (0.99), left out, since a ViT has a single
convolution, which reads each pixel once. On a GPU neither was measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import psutil
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from dfa.clip.blocks import (
    attend,
    attend_and_keep,
    feed_forward,
    project,
    query_key_value,
    self_attend,
    value_embedding,
)
from dfa.clip.text import embed_columns

Similarity = Literal["raw", "value", "surgery"]
_CACHED_GRIDS = 32  # positional embeddings kept: images of many sizes must not fill the memory
_SURE_BYTES = 2**30  # maps that nobody need ask for


class TooLargeError(ValueError):
    """Images of so many patches that their attention maps do not fit."""


@dataclass(frozen=True)
class Features:
    """What one frozen pass gives. Shapes in the legend of `dfa.core`; the class token is removed everywhere.

    tokens_BLND: residual stream after each chosen block, in the encoder's precision.
    attention_BLNN: softmax attention of each chosen block, fp32; L counts blocks, or blocks x heads (block-major) where
        the heads were kept. L is 0 where none was asked for.
    similarity_BNK, class_similarity_BK: cosine of patches, and of the class embedding, with the text bank, fp32; K is
        0 without a bank.
    grid: (h, w) in patches, N = h * w, row-major.
    second_BMNE: tokens of a second encoder on the same grid, or None; whoever holds one puts them in.
    """

    tokens_BLND: Tensor
    attention_BLNN: Tensor
    similarity_BNK: Tensor
    class_similarity_BK: Tensor
    grid: tuple[int, int]
    second_BMNE: Tensor | None = None


class SecondEncoder(Protocol):
    """What stands beside CLIP, see `dfa.clip.second`."""

    def tokens(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens B x M x N x E of the images' patches on a grid (h, w), N = h * w."""
        ...


class FrozenClip:
    """An open_clip model with a ViT tower, in eval mode and without gradients."""

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[..., Tensor],
        *,
        dtype: torch.dtype,
        mean: Sequence[float],
        std: Sequence[float],
        compiled: bool = False,
    ) -> None:
        """compiled: torch.compile the layers that every block repeats, once for all blocks and image sizes."""
        self.clip: Any = clip.eval().requires_grad_(False)
        self.visual: Any = self.clip.visual
        _require_plain_vit(self.visual)
        self.visual.to(dtype)
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.device: torch.device = self.visual.proj.device
        self.patch_size: tuple[int, int] = tuple(self.visual.patch_size)
        self.num_blocks = len(self.visual.transformer.resblocks)
        self.num_heads: int = self.visual.transformer.resblocks[0].attn.num_heads
        self.width, self.embed_dim = (int(size) for size in self.visual.proj.shape)
        self.logit_scale = float(self.clip.logit_scale.exp())
        self._mean_3 = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std_3 = torch.tensor(std, device=self.device).view(3, 1, 1)
        self._query_key_value, self._feed_forward = query_key_value, feed_forward
        if compiled:
            self._query_key_value = torch.compile(query_key_value, dynamic=True)
            self._feed_forward = torch.compile(feed_forward, dynamic=True)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._banks: dict[tuple, Tensor] = {}

    @torch.no_grad()
    def text_bank(self, prompts: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
        """Text embeddings, one row a column of prompts: K x E, fp32, L2-normalised, computed once for equal content.

        A row is the normalised mean over its prompts x templates of normalised embeddings: their order is irrelevant.
        Raises ValueError for a column without prompts and for a template without exactly one {}.
        """
        key = (tuple(map(tuple, prompts)), tuple(templates))
        if key not in self._banks:
            self._banks[key] = embed_columns(self.clip, self.tokenizer, *key, device=self.device)
        return self._banks[key]

    @torch.no_grad()
    def encode(
        self,
        image_B3HW: Tensor,
        text_bank_KE: Tensor | None,
        *,
        token_blocks: int | Sequence[int],
        attention_blocks: int | Sequence[int],
        similarity: Similarity,
        surgery_blocks: int,
        keep_heads: bool = False,
        renormalize_rows: bool = False,
    ) -> Features:
        """One frozen pass over images of one size, any multiple of the patch size.

        image_B3HW: RGB, uint8, or float in 0..1; normalised here.
        token_blocks, attention_blocks: 0-based block indices, ascending, or the number of last blocks (0 for none).
            They differ because the decoder reads every block, the affinity the last ones (METHOD 1.20, 1.2).
        similarity: the patch embedding compared with the texts. raw: the final tokens. value: `value_embedding`.
            surgery: a second residual path leaves the first where the last `surgery_blocks` blocks begin; each of them
            adds `self_attend` of the original path's q, k, v (class token among the keys), projected, and no MLP
            (CLIP Surgery, Li et al. 2023, with the three self-attentions of METHOD). Patches are read from the second
            path, the class embedding always from the original one.
        renormalize_rows: attention rows sum to 1 again after the class token's column has gone.

        Raises ValueError for a size that is not a multiple of the patch and for blocks that do not exist, TooLargeError for more
        patches than memory has room for maps of them.
        """
        grid = self._grid(image_B3HW)
        token_at = self._block_slots(token_blocks, "token_blocks")
        attention_at = self._block_slots(attention_blocks, "attention_blocks")
        if similarity not in ("raw", "value", "surgery"):
            raise ValueError(f"similarity {similarity!r} is not one of raw, value, surgery")
        if similarity == "surgery" and not 1 <= surgery_blocks <= self.num_blocks:
            raise ValueError(f"surgery_blocks {surgery_blocks} must lie in 1..{self.num_blocks}, the encoder's blocks")
        with torch.autocast(self.device.type, enabled=False):
            return self._walk(
                self._embed(image_B3HW, grid),
                grid,
                text_bank_KE,
                token_at=token_at,
                attention_at=attention_at,
                similarity=similarity,
                first_second=self.num_blocks - surgery_blocks if similarity == "surgery" else self.num_blocks,
                heads=self.num_heads if keep_heads else 1,
                renormalize_rows=renormalize_rows,
            )

    def _walk(
        self,
        x_BTD: Tensor,
        grid: tuple[int, int],
        bank_KE: Tensor | None,
        *,
        token_at: dict[int, int],
        attention_at: dict[int, int],
        similarity: Similarity,
        first_second: int,
        heads: int,
        renormalize_rows: bool,
    ) -> Features:
        """The residual stream through every block; `first_second` is the block where the second path begins."""
        batch, num_patches, last = len(x_BTD), grid[0] * grid[1], self.num_blocks - 1
        _check_room(batch, len(attention_at) * heads, grid, self.device)
        tokens_BLND = torch.empty(batch, len(token_at), num_patches, self.width, dtype=self.dtype, device=self.device)
        attention_BLNN = torch.empty(batch, len(attention_at) * heads, num_patches, num_patches, device=self.device)
        # In the last block only the class token is carried on where nobody reads the patches, and without texts there is
        # nothing to do behind the last block that is read at all.
        reads_last = last in token_at or (similarity == "raw" and bank_KE is not None)
        end = last if bank_KE is not None else max([-1, *token_at, *attention_at])
        entering_BTD = second_BTD = x_BTD
        for index, block in enumerate(self.visual.transformer.resblocks[: end + 1]):
            entering_BTD = x_BTD
            query, key, value = self._query_key_value(block, x_BTD)
            if index >= first_second and bank_KE is not None:
                start_BTD = x_BTD if index == first_second else second_BTD
                second_BTD = start_BTD + project(block, self_attend(query, key, value))
            num_rows = 1 if index == last and not reads_last else x_BTD.shape[1]
            if index in attention_at:
                slot = attention_at[index] * heads
                kept_BXNN = attention_BLNN[:, slot : slot + heads]
                mixed_BATd = attend_and_keep(
                    query, key, value, kept_BXNN, renormalize_rows=renormalize_rows, num_rows=num_rows
                )
            else:
                mixed_BATd = attend(query, key, value, num_rows=num_rows)
            x_BTD = x_BTD[:, :num_rows] + project(block, mixed_BATd)
            x_BTD = x_BTD + self._feed_forward(block, x_BTD)
            if index in token_at:
                tokens_BLND[:, token_at[index]] = x_BTD[:, 1:]
        if bank_KE is None:
            empty = attention_BLNN.new_empty
            return Features(tokens_BLND, attention_BLNN, empty(batch, num_patches, 0), empty(batch, 0), grid)
        source_BTD = {"raw": x_BTD, "value": entering_BTD, "surgery": second_BTD}[similarity]
        cosines = self._cosines(source_BTD[:, 1:], x_BTD[:, 0], bank_KE, similarity)
        return Features(tokens_BLND, attention_BLNN, *cosines, grid)

    def _cosines(
        self, source_BND: Tensor, class_BD: Tensor, bank_KE: Tensor, similarity: Similarity
    ) -> tuple[Tensor, Tensor]:
        """Patch cosines B x N x K and class cosines B x K, fp32."""
        if bank_KE.ndim != 2 or bank_KE.shape[1] != self.embed_dim:
            raise ValueError(f"text bank of shape {tuple(bank_KE.shape)}, expected (columns, {self.embed_dim})")
        if similarity == "value":
            patch_BNE = value_embedding(self.visual, source_BND)
        else:
            patch_BNE = self.visual.ln_post(source_BND) @ self.visual.proj
        class_BE = self.visual.ln_post(class_BD) @ self.visual.proj
        bank_EK = F.normalize(bank_KE.to(self.device, torch.float32), dim=-1).T
        return F.normalize(patch_BNE.float(), dim=-1) @ bank_EK, F.normalize(class_BE.float(), dim=-1) @ bank_EK

    def _grid(self, image_B3HW: Tensor) -> tuple[int, int]:
        if image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(image_B3HW.shape)}, expected (batch, 3, height, width)")
        (height, width), (patch_height, patch_width) = image_B3HW.shape[2:], self.patch_size
        if not height or not width or height % patch_height or width % patch_width:
            raise ValueError(
                f"image of {height} x {width} pixels is not a multiple of the patch, {patch_height} x {patch_width}"
            )
        return height // patch_height, width // patch_width

    def _block_slots(self, blocks: int | Sequence[int], name: str) -> dict[int, int]:
        """Block index -> place in the output."""
        chosen = list(range(self.num_blocks - blocks, self.num_blocks)) if isinstance(blocks, int) else list(blocks)
        if chosen != sorted(set(chosen)) or any(not 0 <= index < self.num_blocks for index in chosen):
            raise ValueError(f"{name} {blocks}: this encoder has {self.num_blocks} blocks, and indices must ascend")
        return {index: slot for slot, index in enumerate(chosen)}

    def _embed(self, image_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        image = image_B3HW.to(self.device, non_blocking=True)
        scale = self._std_3 * (1.0 if image.is_floating_point() else 255.0)
        normalized = (image.float() / scale - self._mean_3 / self._std_3).to(self.dtype)
        patch_BND = self.visual.conv1(normalized).flatten(2).transpose(1, 2)
        class_B1D = self.visual.class_embedding.expand(len(image), 1, -1)
        return self.visual.ln_pre(torch.cat([class_B1D, patch_BND], dim=1) + self._position(grid))

    def _position(self, grid: tuple[int, int]) -> Tensor:
        """Positional embedding (1 + h*w) x D of a grid: bicubic, corners not aligned; untouched at the native grid."""
        native: Tensor = self.visual.positional_embedding
        if grid == tuple(self.visual.grid_size):
            return native
        if grid not in self._positions:
            if len(self._positions) >= _CACHED_GRIDS:
                self._positions.pop(next(iter(self._positions)))
            map_1Dhw = native[1:].float().T.reshape(1, self.width, *self.visual.grid_size)
            resized = F.interpolate(map_1Dhw, size=grid, mode="bicubic", align_corners=False)
            self._positions[grid] = torch.cat([native[:1], resized[0].flatten(1).T.to(native.dtype)])
        return self._positions[grid]


def _require_plain_vit(visual: Any) -> None:
    """ValueError for vision towers whose blocks are not read here."""
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"vision tower {type(visual).__name__} is not supported: open_clip's own ViT is needed (no timm, no ResNet)"
        )
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise ValueError("vision towers that pool by attention or average are not supported: a class token is needed")
    kinds = {type(block.attn).__name__ for block in visual.transformer.resblocks}
    if kinds != {"MultiheadAttention"}:
        raise ValueError(f"attention {sorted(kinds)} is not supported: plain multi-head attention is needed")


def _check_room(batch: int, num_maps: int, grid: tuple[int, int], device: torch.device) -> None:
    """Maps grow with the fourth power of an image's side: tell before the system ends the process for them."""
    num_bytes = 4 * batch * num_maps * (grid[0] * grid[1]) ** 2
    if num_bytes <= _SURE_BYTES:
        return
    if device.type == "cuda":  # what torch keeps for itself is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = psutil.virtual_memory().available
    if num_bytes > free:
        raise TooLargeError(
            f"{batch} image(s) of {grid[0]} x {grid[1]} patches: {num_maps} attention maps each are"
            f" {num_bytes / 2**30:.0f} GiB, of {free / 2**30:.0f} free; let images be seen smaller"
            " (evaluate.input=long_side, in training a smaller crop.size)"
        )
