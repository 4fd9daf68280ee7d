"""Folders of labels written by hand, with the standard library and PIL alone: what the label factory promises to write."""

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dfa.data.planning import plan_shards, write_plan
from dfa.data.samples import MaskFile, Sample
from dfa.data.shards import ShardIndex, read_samples
from dfa.data.writer import finish, write_shard


def png(mask_HW: np.ndarray) -> bytes:
    """A grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask_HW.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_labels(root: Path, index: ShardIndex, masks: Mapping[str, bytes], **changes: Any) -> str:
    """A finished folder of labels; samples without an entry in `masks` count as rejected."""
    root.mkdir(parents=True)
    (root / "plan.json").write_text(json.dumps({"kind": "dfa-label-plan", "class_names": list(index.class_names)}))
    samples = read_samples(index)
    for shard in index.shards:
        with tarfile.open(root / shard.name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in (sample for sample in samples if sample.shard == shard.name and sample.key in masks):
                note = {"labels": list(sample.labels), "width": sample.width, "height": sample.height}
                _add(tar, f"{sample.key}.png", masks[sample.key])
                _add(tar, f"{sample.key}.soft.png", b"never looked at")
                _add(tar, f"{sample.key}.json", json.dumps(note).encode())
    document = {
        "kind": "dfa-labels",
        "format": 1,
        "class_names": list(index.class_names),
        "image_plan_hash": index.plan_hash,
        "shards": [{"name": shard.name, "image_sha256": shard.sha256} for shard in index.shards],
    }
    (root / "index.json").write_text(json.dumps({**document, **changes}))
    return str(root)


def make_current(root: Path, folder: str) -> None:
    """What following does when a generation is finished."""
    document = {"kind": "dfa-label-generations", "folder": folder}
    (root / "current.partial").write_text(json.dumps(document))
    os.replace(root / "current.partial", root / "current.json")


def write_block_shards(root: Path, *, num_samples: int, samples_per_shard: int, side: int = 6) -> ShardIndex:
    """Images of `side` x `side` blocks of 4 pixels, whose grey value is 60 times the class 0..3 that the mask has there."""
    source = root.parent / f"{root.name}-source"
    source.mkdir(parents=True)
    samples = []
    for i in range(num_samples):
        mask = np.random.default_rng(i).integers(0, 4, (side, side)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        image, truth = source / f"b{i:04d}.png", source / f"b{i:04d}-mask.png"
        Image.fromarray((60 * mask)[:, :, None].repeat(3, 2)).save(image)
        Image.fromarray(mask).save(truth)
        samples.append(Sample(f"b{i:04d}", str(image), (1, 2, 3), MaskFile(str(truth))))
    plan = plan_shards(
        samples,
        class_names=("cat", "dog", "owl"),
        seed=0,
        shuffle=True,
        samples_per_shard=samples_per_shard,
        max_pixels=10**6,
    )
    write_plan(str(root), plan)
    for item in plan.items:
        write_shard(str(root), item)
    return finish(str(root), plan, max_reject_share=0.0)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
