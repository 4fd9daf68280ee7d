"""Several frozen CLIPs as one: their similarities and attention maps averaged on one patch grid."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dfa.clip.encoder import Features, FrozenClip, Similarity


class ClipEnsemble:
    """What `FrozenClip` offers, of several of them.

    The first one leads: its patches make the grid, and its tokens alone go to the decoder, since the channels of separately trained
    towers have nothing in common. The others see each image resized (bilinear, antialiased) so that their own patches make the
    same grid, whatever their patch size: no map is interpolated. Their similarity and attention are averaged with the first one's.
    Our reading of an average of similarities: of the logits that the text softmax reads, so each cosine counts with its own CLIP's
    exp(logit_scale); `logit_scale` is the mean of these.

    Blocks of the others are those at the same depth: for block b = 1..n of the first one, ceil(b m / n) of m.
    """

    def __init__(self, members: Sequence[FrozenClip]) -> None:
        if len(members) < 2:
            raise ValueError(f"several CLIPs are at least two, got {len(members)}")
        self.members = tuple(members)
        first = self.members[0]
        self.device, self.dtype, self.patch_size = first.device, first.dtype, first.patch_size
        self.num_blocks, self.num_heads, self.width = first.num_blocks, first.num_heads, first.width
        self.embed_dim = sum(each.embed_dim for each in self.members)
        self._weights = [each.logit_scale / sum(one.logit_scale for one in self.members) for each in self.members]
        self.logit_scale = sum(each.logit_scale for each in self.members) / len(self.members)

    def text_bank(self, prompts: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
        """The banks of all members side by side, K x (E_1 + E_2 + ...), each row of each L2-normalised."""
        return torch.cat([each.text_bank(prompts, templates).to(self.device) for each in self.members], dim=1)

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
        """As `FrozenClip.encode`, head means only; block numbers are the first one's. Where neither similarity nor attention is asked
        for, the others do nothing.

        Raises ValueError as there, for a bank that `text_bank` did not make, and for keep_heads: heads of several CLIPs have no
        common order.
        """
        if keep_heads:
            raise ValueError("several CLIPs have their attention averaged: keep_heads needs one alone")
        banks = [None] * len(self.members) if text_bank_KE is None else self._banks(text_bank_KE)
        first = self.members[0]
        chosen = _indices(attention_blocks, first.num_blocks)
        features = first.encode(
            image_B3HW,
            banks[0],
            token_blocks=token_blocks,
            attention_blocks=chosen,
            similarity=similarity,
            surgery_blocks=surgery_blocks,
            renormalize_rows=renormalize_rows,
        )
        if text_bank_KE is None and not chosen:
            return features
        image = image_B3HW if image_B3HW.is_floating_point() else image_B3HW.float() / 255
        attention_BLNN = features.attention_BLNN.div_(len(self.members))
        cosines = [features.similarity_BNK * self._weights[0], features.class_similarity_BK * self._weights[0]]
        for member, bank_KE, weight in zip(self.members[1:], banks[1:], self._weights[1:], strict=True):
            blocks = [self._same_depth(index, member) for index in chosen]
            read = sorted(set(blocks))  # of a shallower tower one block may stand for two
            found = member.encode(
                _on_grid(image, features.grid, member.patch_size),
                bank_KE,
                token_blocks=(),
                attention_blocks=read,
                similarity=similarity,
                surgery_blocks=max(1, round(surgery_blocks * member.num_blocks / first.num_blocks)),
                renormalize_rows=renormalize_rows,
            )
            for slot, block in enumerate(blocks):
                each_BNN = found.attention_BLNN[:, read.index(block)]
                attention_BLNN[:, slot].add_(each_BNN, alpha=1 / len(self.members))
            for total, each in zip(cosines, (found.similarity_BNK, found.class_similarity_BK), strict=True):
                total.add_(each, alpha=weight)
        return replace(
            features, attention_BLNN=attention_BLNN, similarity_BNK=cosines[0], class_similarity_BK=cosines[1]
        )

    def _banks(self, text_bank_KE: Tensor) -> list[Tensor]:
        if text_bank_KE.ndim != 2 or text_bank_KE.shape[1] != self.embed_dim:
            raise ValueError(f"text bank of shape {tuple(text_bank_KE.shape)}, expected (columns, {self.embed_dim})")
        return list(text_bank_KE.split([each.embed_dim for each in self.members], dim=1))

    def _same_depth(self, index: int, member: FrozenClip) -> int:
        return -(-(index + 1) * member.num_blocks // self.num_blocks) - 1


def _indices(blocks: int | Sequence[int], num_blocks: int) -> list[int]:
    return list(range(num_blocks - blocks, num_blocks)) if isinstance(blocks, int) else list(blocks)


def _on_grid(image_B3HW: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    if size == tuple(image_B3HW.shape[-2:]):
        return image_B3HW
    return F.interpolate(image_B3HW, size=size, mode="bilinear", align_corners=False, antialias=True)
