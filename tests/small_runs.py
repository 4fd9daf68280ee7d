"""Shards and checkpoints as the jobs make them, without training or Ray."""

from typing import Any

import torch
from torch import nn

from dfa import build
from dfa.config import Config
from dfa.data import planning, writer
from dfa.train.checkpoint import CheckpointInfo, save_checkpoint
from dfa.train.objective import EngineState


def write_shards(config: Config, root: str, split: str | None = None, **changes: Any) -> None:
    """Shards of `config.data` in `root`, of four samples each; `split` takes the place of data.split."""
    config.data.split = split or config.data.split
    settings = {"seed": 0, "shuffle": True, "samples_per_shard": 4, "max_pixels": 20_000, "max_reject_share": 0.0}
    settings |= changes
    max_reject_share = settings.pop("max_reject_share")
    plan = planning.plan_shards(build.source(config), class_names=build.class_set(config).names, **settings)
    planning.write_plan(root, plan)
    for item in plan.items:
        writer.write_shard(root, item)
    writer.finish(root, plan, max_reject_share=max_reject_share)


def untrained_checkpoint(
    config: Config,
    student: nn.Module | None = None,
    *,
    step: int = 1,
    samples_seen: int = 0,
    val_miou: float | None = None,
) -> None:
    """A checkpoint of the run, of `student` or of one as it is made."""
    student = student or build.segmenter(config, torch.device("cpu")).student
    weights = {f"student.{name}": value.contiguous() for name, value in student.state_dict().items()}
    info = CheckpointInfo(
        step, samples_seen, 0, val_miou, 0, 1.0, build.class_set(config).names, build.model_description(config)
    )
    save_checkpoint(config.run, EngineState(weights, {}, {}, 0, 1.0), {}, info)
