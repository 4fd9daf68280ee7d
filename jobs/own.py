"""A first look at one's own images in minutes, what `python -m jobs.demo --data FOLDER` does: few images, few steps.

Shards a few images of each class, trains on them from their labels alone, and writes their masks.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator

import torch

from dfa import build
from dfa.config import Config
from dfa.data.samples import Reject, Sample
from dfa.train.loop import start_ray
from jobs import Result, pseudo_label, shard, train

log = logging.getLogger("jobs.own")
TABLE_NAME = "labels.csv"
CONF = "own_quick"


def work(config: Config, folder: str, *, num_images: int) -> Result:
    """Every stage; each continues by itself what an earlier call left.

    Args:
        config: of conf/own_quick.yaml, as a rule.
        folder: images in one sub-folder for each class, or anywhere in it beside a labels.csv.
        num_images: how many are taken, evenly over the classes.
    """
    data, root = config.data, os.path.abspath(folder)
    data.root, data.output = root, f"{config.run}/shards"
    config.shards.train, config.shards.val = data.output, ""
    if not data.label_file and os.path.isfile(table := os.path.join(root, TABLE_NAME)):
        data.label_file = table
    build.source_classes(config)
    build.encoder(config, torch.device("cpu"))  # first: without weights all else would be in vain
    _tell(config, num_images)
    start_ray()
    sharded = shard.work(config, few(build.source(config), num_images))
    trained = train.work(config)
    if trained["interrupted"]:
        raise KeyboardInterrupt
    config.label.png = True
    labelled = pseudo_label.work(config)
    log.info("masks as PNGs: %s", labelled["png_folder"])
    log.info("every key can be changed; all images: conf/own.yaml says how")
    return {
        "job": "demo",
        "images_per_class": sharded["images_per_class"],
        "num_rejects": sharded["num_rejects"],
        "classes": f"{data.output}/{build.CLASSES_NAME}",
        "masks": labelled["png_folder"],
        "quality": labelled.get("quality"),
        "steps": trained["step"],
    }


def _tell(config: Config, num_images: int) -> None:
    log.info(
        "a first look: at most %d images, %d steps of %d crops of %d pixels, %s (%s), %s; none of this is the full recipe",
        num_images,
        config.train.steps,
        config.train.batch_size,
        config.crop.size,
        config.clip.model,
        config.clip.checkpoint,
        "GPU" if config.train.use_gpu else "CPU",
    )


def few(samples: Iterable[Sample | Reject], number: int) -> Iterator[Sample | Reject]:
    """At most so many samples, in turn from each class (of an image's first label), always the same; rejects as they come."""
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        if isinstance(sample, Reject):
            yield sample
        else:
            by_class.setdefault(min(sample.labels, default=0), []).append(sample)
    ranked = []
    for found in by_class.values():
        found.sort(key=lambda sample: hashlib.blake2b(sample.key.encode()).digest())
        ranked += [(turn, sample.key, sample) for turn, sample in enumerate(found)]
    yield from (sample for _, _, sample in sorted(ranked, key=lambda entry: entry[:2])[:number])
