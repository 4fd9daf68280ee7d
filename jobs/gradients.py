"""Spectral gradients of a run's decoder: `python -m jobs.gradients CONF run=RUN evaluate.limit=8`.

How strongly each frequency of the cross entropy depends on each frequency of the fused feature, of each decoder block's output
and of the logits, over the first validation images (8 where evaluate.limit is 0), one by one. RUN/gradients.json and
gradients.html; row i, column j of a profile: ring i of the loss, ring j of the features.
"""

import logging
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from dfa import build
from dfa.analysis.gradients import Component, gradient_profiles
from dfa.clip import Features
from dfa.config import Config
from dfa.core.analysis.gradients import cross_entropy_component
from dfa.core.analysis.truncation import resize_features
from dfa.data import storage
from dfa.data.shards import ShardIndex
from dfa.data.stream import eval_batches
from dfa.model.segmenter import Segmenter
from dfa.report.page import write_page
from dfa.report.spectral import gradient_report
from dfa.train.checkpoint import find_checkpoint
from jobs import Result, main

log = logging.getLogger("jobs.gradients")
NUMBERS_NAME, PAGE_NAME = "gradients.json", "gradients.html"
_IMAGES = 8


def work(config: Config) -> Result:
    """Profiles of the checkpoint that label.checkpoint names."""
    index = build.index(config, "val")
    segmenter = build.trained_segmenter(config, build.device(config), config.label.checkpoint)
    patches = config.crop.size // segmenter.patch_size
    working = min(segmenter.student.decoder.working_grid((patches, patches)))
    nu_max = min(config.analyze.nu_max, working // 2)
    if nu_max < 1:
        raise ValueError(
            f"decoder.grid={config.decoder.grid:g} leaves a grid of {working} cells to the decoder on crops of {patches}"
            " patches: gradients by frequency need at least 2"
        )
    used = list[str]()
    images = _images(segmenter, index, config.evaluate.limit or _IMAGES, config.data.max_pixels, nu_max, used)
    profiles = gradient_profiles(images, _modules(segmenter), nu_max=nu_max)
    result: Result = {
        "job": "gradients",
        "run": config.run,
        "checkpoint": find_checkpoint(config.run, config.label.checkpoint),
        "images": used,
        "nu_max": nu_max,
        "profiles": {name: each.tolist() for name, each in profiles.items()},
        "strongest_ring": {name: each.argmax(1).tolist() for name, each in profiles.items()},
    }
    storage.write_json(storage.join(config.run, NUMBERS_NAME), result)
    provenance = {"checkpoint": result["checkpoint"], "images": f"{len(used)} of {index.root}: {', '.join(used[:8])}"}
    report = gradient_report(profiles, title=f"{config.name}: gradients", provenance=provenance)
    page = write_page(report, storage.join(config.run, PAGE_NAME))
    return {key: value for key, value in result.items() if key != "profiles"} | {"page": page}


def _modules(segmenter: Segmenter) -> dict[str, nn.Module]:
    decoder = segmenter.student.decoder
    blocks = {f"block {number}": block for number, block in enumerate(decoder.blocks, 1)}
    return {"fused feature": decoder.fuse, **blocks, "logits": decoder.classify}


def _images(
    segmenter: Segmenter, index: ShardIndex, limit: int, max_pixels: int, nu_max: int, used: list[str]
) -> Iterator[tuple[Component, Callable[[Tensor], Tensor]]]:
    """Image by image: its encoder's tokens, once, and the loss at pixel size of what the decoder makes of them. Keys go to `used`."""
    decoder = segmenter.student.decoder
    for batch in eval_batches(index, rank=0, world=1, batch_size=1, max_pixels=max_pixels, limit=limit):
        patch, device = segmenter.patch_size, segmenter.clip.device
        height, width = (size // patch * patch for size in batch.image_B3HW.shape[-2:])
        if nu_max > min(decoder.working_grid((height // patch, width // patch))) // 2:
            log.warning("%s is left out: its patch grid has no room for %d cycles", batch.keys[0], nu_max)
            continue
        used.append(batch.keys[0])
        assert batch.mask_BHW is not None  # eval_batches refuses samples without
        features = segmenter.encode(
            batch.image_B3HW[..., :height, :width].to(device), with_similarity=False, with_attention=False
        )
        mask_BHW = batch.mask_BHW[..., :height, :width].to(device)

        def component(frequency: tuple[int, int], features: Features = features, mask_BHW: Tensor = mask_BHW) -> Tensor:
            logits = segmenter.student.segment(features.tokens_BLND, features.grid)
            return cross_entropy_component(
                resize_features(logits, (mask_BHW.shape[1], mask_BHW.shape[2])), mask_BHW, frequency
            )

        grids = {grid[0] * grid[1]: grid for grid in (features.grid, decoder.working_grid(features.grid))}
        yield component, lambda x_BND, grids=grids: x_BND.mT.unflatten(2, grids[x_BND.shape[1]])
        log.info("%s: done", batch.keys[0])


if __name__ == "__main__":
    main(__doc__, work)
