"""Frozen CLIP: patch tokens and attention of each block, text bank, and the similarity between patches and texts."""

from dfa.clip.blocks import value_embedding
from dfa.clip.encoder import Features, FrozenClip, Similarity
from dfa.clip.ensemble import ClipEnsemble
from dfa.clip.models import (
    CLIP_MEAN,
    CLIP_STD,
    PRECISIONS,
    VisionSize,
    build_clip,
    load_clip,
    patch_size_of,
    read_model_json,
    vision_size_of,
)
from dfa.clip.tokenizer import WordTokenizer

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "PRECISIONS",
    "ClipEnsemble",
    "Features",
    "FrozenClip",
    "Similarity",
    "VisionSize",
    "WordTokenizer",
    "build_clip",
    "load_clip",
    "patch_size_of",
    "read_model_json",
    "value_embedding",
    "vision_size_of",
]
