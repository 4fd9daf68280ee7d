"""Tiny CLIPs for the tests of this folder."""

import json

from dfa.clip import load_clip

WORDS = ["a", "photo", "of", "red", "dog", "cat", "tree"]


def write_model(folder, top=None, vision=None, vocabulary=True):
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16} | (vision or {}),
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    } | (top or {})
    if vocabulary:
        config["vocabulary"] = WORDS
    path = folder / "model.json"
    path.write_text(json.dumps(config))
    return str(path)


def load(path, checkpoint="random", precision="fp32", seed=3):
    return load_clip(path, checkpoint, device="cpu", precision=precision, seed=seed)
