"""Texts of a small CLIP to token ids, word by word."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor


class WordTokenizer:
    """Word-level tokenizer of a small CLIP: text -> token ids.

    Ids: 0 padding, 1 unknown word, 2.. the vocabulary in order, then start and end. The end has the largest id, because
    open_clip reads the text embedding at the position of the largest id.
    """

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        self.id_of = {word: index for index, word in enumerate(vocabulary, start=2)}
        bad = sorted({word for word in vocabulary if re.fullmatch(r"[a-z]+", word) is None})
        if bad or len(self.id_of) != len(vocabulary):
            raise ValueError(f"vocabulary needs distinct words of the letters a-z; given {bad or 'duplicate words'}")
        self.context_length = context_length
        self.vocab_size = len(vocabulary) + 4
        self.start, self.end = self.vocab_size - 2, self.vocab_size - 1

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Token ids (number of texts, context length) int64; a text that is too long is cut and keeps its end token."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            words = [self.id_of.get(word, 1) for word in re.findall(r"[a-z]+", text.lower())][: length - 2]
            row[: len(words) + 2] = torch.tensor([self.start, *words, self.end])
        return ids
