"""A run over toy shards in this process, without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dfa.data.shards import ShardIndex
from dfa.data.stream import Batch
from dfa.train.checkpoint import latest_checkpoint
from dfa.train.plan import LoopPlan
from dfa.train.progress import Progress
from dfa.train.stop import STOP_NAME
from dfa.train.worker import Trainer
from tests.train.toy import local_batches

CPU = torch.device("cpu")


def train(plan: LoopPlan, index: ShardIndex, batches: Any = None) -> dict[str, Any]:
    """Train from the newest checkpoint to the end of the plan, or of `batches`."""
    checkpoint = latest_checkpoint(Path(plan.run_folder), class_names=plan.class_names)
    progress = Progress(plan.shard_sizes) if checkpoint is None else checkpoint.progress
    trainer = Trainer(plan, device=CPU, checkpoint=checkpoint)
    return trainer.train(batches or local_batches(plan, index, progress), report=lambda _: None)


def stopping_after(batches: Iterator[Batch], run: Path, number: int) -> Iterator[Batch]:
    """The same batches; the run is asked to stop before the number-th, counted from 0."""
    for i, batch in enumerate(batches):
        if i == number:
            (run / STOP_NAME).touch()
        yield batch
