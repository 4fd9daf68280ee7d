"""Does R_ce foretell what coarser grids cost? `python -m jobs.correlate CONF run=RUN correlate.grids=[3,5,7,9,11]`.

Runs the model of a checkpoint over the validation shards, one scale, no CRF: whole, with its decoder on each grid (features
truncated, nothing trained again), and with its logits brought to each grid and back. RUN/correlate.json holds R_ce, foretold
and observed drop of each grid, and Spearman's rank correlations.
"""

import dataclasses
import logging
from collections.abc import Iterator
from math import isnan
from typing import Any

from torch import Tensor

from dfa import build
from dfa.analysis.truncated import Forward, GridOutcome, observe
from dfa.config import Config
from dfa.data import storage
from dfa.data.stream import eval_batches
from dfa.model.segmenter import Segmenter
from jobs import Result, main

log = logging.getLogger("jobs.correlate")
RESULT_NAME = "correlate.json"
_BATCH = 8


def work(config: Config) -> Result:
    """Observe the run's model on each grid."""
    grids = config.correlate.grids
    if len(set(grids)) < 2 or min(grids) < 1:
        raise ValueError(
            f"correlate.grids is {list(grids)}, allowed are at least two different numbers of cells from 1 on"
        )
    device, index = build.device(config), build.index(config, "val")
    segmenter = build.trained_segmenter(config, device, config.label.checkpoint)
    limit = config.evaluate.limit or None

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for batch in eval_batches(
            index, rank=0, world=1, batch_size=_BATCH, max_pixels=config.data.max_pixels, limit=limit
        ):
            assert batch.mask_BHW is not None  # eval_batches refuses samples without
            yield batch.image_B3HW.to(device), batch.mask_BHW.to(device)
            done += len(batch)
            log.info("%d of %d images", done, limit or index.num_samples)

    found = observe(batches(), _on_grids(segmenter), grids=grids, num_classes=len(index.class_names) + 1)
    result: Result = {
        "job": "correlate",
        "run": config.run,
        "num_images": found.num_images,
        "miou": found.miou,
        "spearman_features": _number(found.spearman_features()),
        "spearman_outputs": _number(found.spearman_outputs()),
        "mean_error_of_the_foretold_drop": _number(found.mean_error()),
        "grids": [_row(each) for each in found.outcomes],
    }
    storage.write_json(storage.join(config.run, RESULT_NAME), result)
    return result


def _on_grids(segmenter: Segmenter) -> Forward:
    decoder, patch = segmenter.student.decoder, segmenter.patch_size
    own = decoder.grid_share

    def forward(image_B3HW: Tensor, grid: int) -> Tensor:
        patches = max(1, round(max(image_B3HW.shape[-2:]) / patch))
        if grid > max(decoder.working_grid((patches, patches))):
            limit = (
                f"decoder.grid={own:g} leaves {decoder.working_grid((patches, patches))[0]} of" if own else "there are"
            )
            raise ValueError(f"correlate.grids has {grid} cells, and {limit} {patches} patches along an image")
        decoder.grid_share = grid / patches if grid else own
        try:
            return segmenter.logits(image_B3HW, scales=[1.0], flip=False)
        finally:
            decoder.grid_share = own

    return forward


def _row(outcome: GridOutcome) -> dict[str, Any]:
    return dataclasses.asdict(outcome) | {"foretold_drop": _number(outcome.foretold_drop)}


def _number(value: float) -> float | None:
    return None if isnan(value) else value


if __name__ == "__main__":
    main(__doc__, work)
