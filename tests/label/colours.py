"""A labelling job that needs no model: a class's score is its colour channel.

As a program, the job that fault tests kill: `python -m tests.label.colours SHARDS OUTPUT` labels on the cluster that
RAY_ADDRESS names and prints a line when labelling starts.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfa.data.classes import voc_palette
from dfa.data.planning import plan_shards, write_plan
from dfa.data.samples import MaskFile, Sample
from dfa.data.shards import load_index
from dfa.data.transforms import encode_mask
from dfa.data.writer import finish, write_shard
from dfa.label import factory
from dfa.label.crf import PRESETS
from dfa.label.images import ShardImages
from dfa.label.scoring import ImageScores, LabelSettings
from dfa.label.slots import Share

CLASSES = ("red", "green", "blue")
SETTINGS = LabelSettings(3, PRESETS["deeplab"], 1.0, 0.0, (0.2, 0.5))


def colour_scores(images, labels):
    """The colour channels of the image-level labels, above a constant background."""
    found = []
    for image, present in zip(images, labels, strict=True):
        channels = [image[index - 1 : index].float() / 255 for index in present]
        background = torch.full((1, *image.shape[1:]), 0.5)
        found.append(ImageScores(torch.cat([background, *channels]).numpy(), (0, *present)))
    return found


def make_scorers():
    return {"colour": colour_scores}


def write_images(folder: Path, *, sizes, samples_per_shard, root=None):
    """Image shards of one image for each (height, width), with ground truth; the fifth image has no label."""
    rng, samples = np.random.default_rng(0), []
    for number, (height, width) in enumerate(sizes):
        image, mask = folder / f"i{number}.png", folder / f"m{number}.png"
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(image)
        mask.write_bytes(encode_mask(rng.choice(np.array([0, 1, 3, 255], np.uint8), (height, width)), voc_palette()))
        labels = () if number == 4 else (1, 3) if number % 2 else (2,)
        samples.append(Sample(f"k{number}", str(image), labels, MaskFile(str(mask))))
    plan = plan_shards(
        samples, class_names=CLASSES, seed=0, shuffle=False, samples_per_shard=samples_per_shard, max_pixels=10**6
    )
    root = root or str(folder / "shards")
    write_plan(root, plan)
    for item in plan.items:
        write_shard(root, item)
    return finish(root, plan, max_reject_share=0)


def colour_pass(index, output, *, limit=0, hash="one", settings=SETTINGS):
    # Heights and widths in steps of 8: neighbours in size share a batch.
    return factory.LabelPass(
        "colours",
        "colour",
        ShardImages(index),
        str(output),
        settings,
        hash,
        10**6,
        lambda height, width: (height // 8, width // 8),
        limit,
    )


def colour_plan(label_pass, *, make=make_scorers, share=None, batch_images=16, batch_pixels=10**6, crf_images=2):
    return factory.FactoryPlan(make, (label_pass,), share or Share(), batch_images, batch_pixels, crf_images)


def label_bytes(folder):
    """Everything in a label folder but the timings, by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def main(shards: str, output: str) -> None:
    from dfa.train.loop import start_ray

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    start_ray()
    print("labelling", flush=True)
    factory.run(colour_plan(colour_pass(load_index(shards), output), batch_images=4))
    print("finished", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
