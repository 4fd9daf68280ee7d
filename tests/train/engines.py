"""An engine of the toy objective, and a few steps of it on any number of ranks."""

import torch

from dfa.train.engine import Engine, make_engine
from dfa.train.objective import global_loss, learning_rate_factor, world
from tests.train.toy import SETTINGS, ToyObjective, toy_batch

CPU = torch.device("cpu")
GLOBAL_BATCH = 8


def build(kind: str, *, stage: int = 1, precision: str = "fp32", accumulation: int = 1) -> Engine:
    """An engine on the processor whose weights are those of seed 0."""
    torch.manual_seed(0)
    objective = ToyObjective(3)
    micro = GLOBAL_BATCH // world()[1] // accumulation
    return make_engine(
        objective,
        SETTINGS,
        kind=kind,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        zero_stage=stage,
        micro_batch=micro,
        num_accumulation=accumulation,
        device=CPU,
    )


def train(engine: Engine, steps: range) -> list[float]:
    """Make the steps; returns the gradient's norm of each."""
    rank, num_ranks = world()
    norms = []
    for step in steps:
        engine.set_learning_rate(learning_rate_factor(step, total=100, warmup=3, power=1.0))
        share = GLOBAL_BATCH // num_ranks // engine.num_accumulation
        for micro in range(engine.num_accumulation):
            first = step * GLOBAL_BATCH + (micro * num_ranks + rank) * share
            batch = toy_batch(range(first, first + share))
            engine.backward(global_loss(engine.forward(batch), batch).local)
        norms.append(engine.step())
    return norms
