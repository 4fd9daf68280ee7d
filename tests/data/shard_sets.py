"""Small image sets, and their shards in one call."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from dfa.data import storage
from dfa.data.planning import write_plan
from dfa.data.sources import MaskFile
from dfa.data.writer import finish, pending, write_shard

SETTINGS = {
    "class_names": ("cat", "dog"),
    "seed": 0,
    "shuffle": True,
    "samples_per_shard": 4,
    "max_pixels": 100_000,
}


def save_image(path, mode="RGB", size=(40, 30), seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)
    return str(path)


def save_mask(path, size=(40, 30)):
    Image.fromarray(np.tile(np.array([0, 1, 2, 255], np.uint8), (size[1], size[0] // 4))).save(path)
    return MaskFile(str(path))


def shard_all(root, plan, max_reject_share=0.0):
    write_plan(str(root), plan)
    for item in pending(str(root), plan):
        write_shard(str(root), item)
    return finish(str(root), plan, max_reject_share=max_reject_share)


def contents(root):
    return {path.name: path.read_bytes() for path in sorted(Path(root).iterdir())}


def hashes_are_true(index):
    """Whether every shard has the size and the SHA-256 that the index tells."""
    data = [storage.read_bytes(index.path(shard.name)) for shard in index.shards]
    told = [(shard.size_bytes, shard.sha256) for shard in index.shards]
    return told == [(len(content), hashlib.sha256(content).hexdigest()) for content in data]
