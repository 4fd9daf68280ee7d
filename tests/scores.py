"""Scores of label shards by torchmetrics, from the PNGs alone."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix

from dfa.data.shards import read_shard


def as_long(png: bytes) -> torch.Tensor:
    """The pixels of a PNG as they are."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png))).astype(np.int64))


def mean_iou(confusion: torch.Tensor) -> float:
    """In percent, over the classes of the ground truth (rows)."""
    confusion = confusion.double()
    occurs, hit = confusion.sum(1) > 0, confusion.diagonal()
    return float(100 * (hit / (confusion.sum(0) + confusion.sum(1) - hit))[occurs].mean())


def miou_of_files(labels: Path | str, images: Path | str, num_classes: int, void: int = 255) -> float:
    """Of the masks in the shards of `labels` against the ground truth in the shards of `images`, with the background among
    `num_classes`. Images whose shard or key `labels` does not hold do not count."""
    metric, found = MulticlassConfusionMatrix(num_classes, ignore_index=void), 0
    for shard in sorted(Path(labels).glob("*.tar")):
        truths = {one.key: one.mask for one in read_shard(f"{images}/{shard.name}")}
        for one in read_shard(str(shard)):
            metric.update(as_long(one.image), as_long(truths[one.key]))
            found += 1
    assert found, f"no labels in {labels}"
    return mean_iou(metric.compute())
