"""Pictures of real size for the benchmarks: cut from real photographs where DFA_SAMPLE_DATA names some, else drawn."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dfa.data.planning import plan_shards, write_plan
from dfa.data.samples import Sample
from dfa.data.shards import ShardIndex
from dfa.data.writer import finish, write_shard

SIZES = ((375, 500), (500, 375), (333, 500))  # height, width: VOC's most frequent ones


def pictures(count: int) -> Iterator[np.ndarray]:
    """`count` different RGB pictures of `SIZES` in turn."""
    photographs = photograph_paths()
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        if photographs:
            picture = Image.open(photographs[number % len(photographs)]).convert("RGB")
            scale = max(height / picture.height, width / picture.width) * rng.uniform(1.0, 1.4)
            picture = picture.resize((round(picture.width * scale) + 1, round(picture.height * scale) + 1))
            top = int(rng.integers(0, picture.height - height + 1))
            left = int(rng.integers(0, picture.width - width + 1))
            yield np.asarray(picture.crop((left, top, left + width, top + height)))
            continue
        small = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        yield np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def photograph_paths() -> list[Path]:
    """Real photographs, sorted; none without the environment variable."""
    address = os.environ.get("DFA_SAMPLE_DATA")
    return sorted(Path(address).rglob("*.jpg")) if address else []


def kind() -> str:
    """What the pictures are, for the page."""
    return "cut from VOC and COCO photographs" if photograph_paths() else "smooth drawn ones"


def write_shards(folder: Path, count: int, class_names: tuple[str, ...], *, num_labels: int) -> ShardIndex:
    """Image shards of `count` pictures that carry `num_labels` classes each."""
    samples = []
    for number, picture_HW3 in enumerate(pictures(count)):
        encoded = io.BytesIO()
        Image.fromarray(picture_HW3).save(encoded, "JPEG", quality=90)
        path = folder / f"picture{number:06d}.jpg"
        path.write_bytes(encoded.getvalue())
        labels = sorted({1 + (number + step) % len(class_names) for step in range(num_labels)})
        samples.append(Sample(path.stem, str(path), tuple(labels)))
    root = str(folder / "shards")
    plan = plan_shards(samples, class_names=class_names, seed=0, shuffle=True, samples_per_shard=50, max_pixels=10**7)
    write_plan(root, plan)
    for item in plan.items:
        write_shard(root, item)
    return finish(root, plan, max_reject_share=0.0)
