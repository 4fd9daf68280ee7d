"""One block of a vision tower, taken apart: what the frozen pass needs between its layers."""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

_QUICK = 1.702  # QuickGELU(x) = x sigmoid(1.702 x)


def value_embedding(visual: VisionTransformer, residual_BTD: Tensor) -> Tensor:
    """Patch embeddings of the last block's value path: B x T x D entering the last block -> B x T x E, differentiable.

    MaskCLIP (Zhou et al. 2022): attention replaced by the identity, out_proj(v(ln_1(x))). Our reading: neither the
    residual nor the MLP of the last block (both blur what a patch says of itself); then ln_post and proj.
    """
    block = visual.transformer.resblocks[-1]
    _, _, value_BATd = query_key_value(block, residual_BTD)
    return visual.ln_post(project(block, value_BATd)) @ visual.proj


def query_key_value(block: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each B x A x T x d, of a block's normalised input."""
    batch, num_tokens, width = x_BTD.shape
    attention: nn.MultiheadAttention = block.attn
    packed = F.linear(block.ln_1(x_BTD), attention.in_proj_weight, attention.in_proj_bias)
    split = packed.view(batch, num_tokens, 3, attention.num_heads, width // attention.num_heads).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def project(block: Any, mixed_BATd: Tensor) -> Tensor:
    """Heads joined, through the attention's output projection (and layer scale): B x T x D."""
    return block.ls_1(block.attn.out_proj(mixed_BATd.transpose(1, 2).flatten(2)))


def feed_forward(block: Any, x_BTD: Tensor) -> Tensor:
    """The MLP's share of the residual stream, normalised input to layer scale: B x T x D.

    QuickGELU is silu(1.702 x) / 1.702: both factors go into the matrix products around it, and one pass over the widest tensor of
    the tower stays of three.
    """
    mlp, normed_BTD = block.mlp, block.ln_2(x_BTD)
    if not isinstance(mlp.gelu, QuickGELU):
        return block.ls_2(mlp(normed_BTD))
    rows_RD = normed_BTD.flatten(0, 1)
    wide_RF = torch.addmm(mlp.c_fc.bias, rows_RD, mlp.c_fc.weight.T, beta=_QUICK, alpha=_QUICK)
    out_RD = torch.addmm(mlp.c_proj.bias, F.silu(wide_RF, inplace=True), mlp.c_proj.weight.T, alpha=1 / _QUICK)
    return block.ls_2(out_RD.view_as(x_BTD))


def attend(query: Tensor, key: Tensor, value: Tensor, *, num_rows: int) -> Tensor:
    """Plain attention of the first `num_rows` tokens to all: no T x T map is held on fused kernels."""
    return F.scaled_dot_product_attention(query[:, :, :num_rows], key, value)


def attend_and_keep(
    query: Tensor, key: Tensor, value: Tensor, kept_BXNN: Tensor, *, renormalize_rows: bool, num_rows: int
) -> Tensor:
    """`attend`; the map of all tokens without the class token goes to `kept_BXNN` (X = 1: head mean, else every head).

    On a processor image after image: the maps of many together leave its cache, at 32 images of 441 patches for twice the time.
    """
    if query.device.type == "cpu" and len(query) > 1:
        parts = zip(query.split(1), key.split(1), value.split(1), kept_BXNN.split(1), strict=True)
        kept = [attend_and_keep(*part, renormalize_rows=renormalize_rows, num_rows=num_rows) for part in parts]
        return torch.cat(kept)
    weight_BATT = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)
    patches_BANN = weight_BATT[:, :, 1:, 1:]
    if kept_BXNN.shape[1] == 1:
        torch.mean(patches_BANN, 1, keepdim=True, dtype=torch.float32, out=kept_BXNN)
    else:
        kept_BXNN.copy_(patches_BANN)
    if renormalize_rows:
        kept_BXNN.div_(kept_BXNN.sum(-1, keepdim=True))
    return weight_BATT[:, :, :num_rows] @ value


def self_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """mean(softmax(qq'/s), softmax(kk'/s), softmax(vv'/s)) v with s = sqrt d; no T x T map is held on fused kernels."""
    mixed = F.scaled_dot_product_attention(query, query, value)
    mixed = mixed + F.scaled_dot_product_attention(key, key, value)
    return (mixed + F.scaled_dot_product_attention(value, value, value)) / 3
