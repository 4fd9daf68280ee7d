"""Texts to the rows of a text bank."""

from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

_TEXT_CHUNK = 256  # texts encoded at once: bounds memory for a thousand classes with many templates


def embed_columns(
    clip: Any,
    tokenizer: Callable[..., Tensor],
    prompts: Sequence[Sequence[str]],
    templates: Sequence[str],
    *,
    device: torch.device,
) -> Tensor:
    """One row a column of prompts: the normalised mean over its prompts x templates of normalised embeddings, K x E, fp32.

    Raises ValueError for a column without prompts and for a template without exactly one {}.
    """
    bad = [template for template in templates if template.count("{}") != 1]
    if bad or not templates:
        raise ValueError(f"templates need exactly one {{}} each, given {bad or 'no template'}")
    empty = [column for column, texts in enumerate(prompts) if not texts]
    if empty:
        raise ValueError(f"text columns {empty} have no prompt")
    texts = [template.replace("{}", text) for column in prompts for text in column for template in templates]
    columns = [index for index, column in enumerate(prompts) for _ in range(len(column) * len(templates))]
    sum_KE: Tensor | None = None
    for first in range(0, len(texts), _TEXT_CHUNK):
        embedding_TE = embed_texts(clip, tokenizer(texts[first : first + _TEXT_CHUNK]).to(device))
        index = torch.tensor(columns[first : first + _TEXT_CHUNK], device=device)
        if sum_KE is None:
            sum_KE = embedding_TE.new_zeros(len(prompts), embedding_TE.shape[1])
        sum_KE.index_add_(0, index, embedding_TE)
    if sum_KE is None:
        raise ValueError("a text bank needs at least one column of prompts")
    return F.normalize(sum_KE, dim=-1)


def embed_texts(clip: Any, ids_TS: Tensor) -> Tensor:
    """Normalised embeddings of token ids, T x E, fp32.

    OpenAI's text tower is causal and read at the end token, the largest id: what stands behind the last end of the batch cannot
    reach it. Prompts are some ten tokens of a context of 77, so the rest is cut off where the tower is that one.
    """
    is_plain: bool = type(clip) is open_clip.CLIP and clip.text_pool_type == "argmax" and clip.attn_mask is not None
    if not is_plain or not isinstance(clip.text_projection, Tensor):
        return F.normalize(clip.encode_text(ids_TS).float(), dim=-1)
    tower: Any = clip
    end_T = ids_TS.argmax(dim=-1)
    length = int(end_T.max()) + 1
    x_TSD = tower.token_embedding(ids_TS[:, :length]) + tower.positional_embedding[:length]
    x_TSD = tower.transformer(x_TSD, attn_mask=tower.attn_mask[:length, :length])
    read_TD = tower.ln_final(x_TSD[torch.arange(len(ids_TS), device=ids_TS.device), end_T])
    return F.normalize((read_TD @ tower.text_projection).float(), dim=-1)
