"""Frozen CLIP: patch tokens and attention of each block, text bank, and the similarity between patches and texts."""

from dfa.clip.blocks import value_embedding
from dfa.clip.encoder import Features, FrozenClip, Similarity
from dfa.clip.ensemble import ClipEnsemble
from dfa.clip.models import CLIP_MEAN, CLIP_STD, PRECISIONS, build_clip, load_clip, patch_size_of, read_model_json
from dfa.clip.tokenizer import WordTokenizer

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "PRECISIONS",
    "ClipEnsemble",
    "Features",
    "FrozenClip",
    "Similarity",
    "WordTokenizer",
    "build_clip",
    "load_clip",
    "patch_size_of",
    "read_model_json",
    "value_embedding",
]
