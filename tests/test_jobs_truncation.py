"""correlate and gradients on an untrained run and a few scenes: no Ray, no training."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from dfa import build
from dfa.config import load
from dfa.core.metrics import confusion_matrix, mean_iou
from dfa.data.planning import plan_shards, write_plan
from dfa.data.stream import eval_batches
from dfa.data.writer import finish, write_shard
from dfa.train.checkpoint import CheckpointInfo, save_checkpoint
from dfa.train.objective import EngineState
from dfa.world.folder import write_voc
from jobs import correlate, gradients


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("truncation")
    world = write_voc(root / "world", seed=3, num_train=1, num_val=3)
    small = ["decoder.width=16", "decoder.depth=1", "correlate.grids=[3,7,11]", "evaluate.limit=2", "analyze.nu_max=2"]
    config = load("demo", [f"run={root}/run", f"shards.val={root}/val", f"data.root={world}", "data.split=val", *small])
    names = build.class_set(config).names
    plan = plan_shards(
        build.source(config), class_names=names, seed=0, shuffle=False, samples_per_shard=8, max_pixels=10**6
    )
    write_plan(config.shards.val, plan)
    for item in plan.items:
        write_shard(config.shards.val, item)
    finish(config.shards.val, plan, max_reject_share=0.0)
    student = build.segmenter(config, torch.device("cpu")).student
    with torch.no_grad():
        student.decoder.classify.bias[0] += 1.36  # some pixels are background then, and so right
    weights = {f"student.{name}": value.contiguous() for name, value in student.state_dict().items()}
    info = CheckpointInfo(1, 0, 0, None, 0, 1.0, names, build.model_description(config))
    save_checkpoint(Path(config.run), EngineState(weights, {}, {}, 0, 1.0), {}, info)
    return config


def test_features_are_truncated_as_a_model_with_that_grid_would(config):
    result = correlate.work(config)
    assert json.loads((Path(config.run) / "correlate.json").read_text()) == result
    assert result["num_images"] == 2 and [row["grid"] for row in result["grids"]] == [3, 7, 11]
    images = list(eval_batches(build.index(config, "val"), rank=0, world=1, batch_size=8, max_pixels=10**6, limit=2))
    for grid, found in [(0.0, result["miou"])] + [(row["grid"] / 14, row["features_miou"]) for row in result["grids"]]:
        segmenter = build.trained_segmenter(config, torch.device("cpu"), "latest")
        segmenter.student.decoder.grid_share = grid
        confusion = sum(
            confusion_matrix(
                segmenter.logits(each.image_B3HW, scales=[1.0], flip=False).argmax(1), each.mask_BHW, num_classes=11
            )
            for each in images
        )
        assert math.isclose(found, mean_iou(confusion), rel_tol=1e-9)
    # Untrained, but its pixels are logits of 14 x 14 patches: something changes with the grid.
    assert len({row["features_miou"] for row in result["grids"]}) > 1


@pytest.mark.parametrize(
    ("grids", "share", "message"),
    [
        ([3, 15], 0.0, r"correlate\.grids has 15 cells, and there are 14 patches along an image"),
        ([3, 9], 0.5, r"correlate\.grids has 9 cells, and decoder\.grid=0\.5 leaves 7 of 14 patches"),
        ([3, 3], 0.0, r"correlate\.grids is \[3, 3\], allowed are at least two different numbers of cells"),
        ([0, 3], 0.0, r"correlate\.grids is \[0, 3\], allowed are"),
    ],
)
def test_grids_that_cannot_be_compared_are_refused(config, grids, share, message):
    other = copy.deepcopy(config)
    other.correlate.grids, other.decoder.grid = grids, share
    with pytest.raises(ValueError, match=message):
        correlate.work(other)


def test_gradients_of_every_stage_are_written(config):
    result = gradients.work(config)
    numbers = json.loads((Path(config.run) / "gradients.json").read_text())
    assert result["nu_max"] == 2 and list(numbers["profiles"]) == ["block 1", "fused feature", "logits"]
    for profile in numbers["profiles"].values():
        assert len(profile) == 3 and all(len(row) == 3 and all(value > 0 for value in row) for row in profile)
    page = Path(result["page"]).read_text()
    assert "<img" in page and numbers["images"][0] in page and len(numbers["images"]) == 2
    assert numbers["checkpoint"].endswith("checkpoints/step-00000001")


@pytest.mark.long
def test_a_decoder_on_a_coarser_grid_has_gradients_up_to_its_own_and_the_change_is_told(config, caplog):
    other = copy.deepcopy(config)
    other.decoder.grid, other.analyze.nu_max = 0.5, 5
    assert gradients.work(other)["nu_max"] == 3  # of 7 cells
    assert "was trained with other settings: decoder.grid=0.0, now 0.5" in caplog.text
    other.decoder.grid = 0.05
    with pytest.raises(ValueError, match=r"decoder\.grid=0\.05 leaves a grid of 1 cells"):
        gradients.work(other)
