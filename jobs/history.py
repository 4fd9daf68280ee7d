"""Check a run's committed history, kept with train.history=true: `python -m jobs.history CONF key=value ...`.

Fails unless each sample was consumed exactly once per epoch and every rank kept the specified order.
"""

import dataclasses

from dfa import build
from dfa.config import Config
from dfa.data.shards import read_samples
from dfa.train import history
from dfa.train.checkpoint import find_checkpoint, read_info
from jobs import Result, main


def work(config: Config) -> Result:
    """Hold the history up to the newest checkpoint against the training shards."""
    plan, index = build.loop_plan(config), build.index(config, "train")
    info = read_info(find_checkpoint(config.run, "latest"))
    verdict = history.verify(
        history.read_rows(config.run, info.step),
        shard_sizes=plan.shard_sizes,
        keys=[sample.key for sample in read_samples(index)],
        seed=plan.seed,
        total_samples=plan.total_samples,
        samples_seen=info.samples_seen,
    )
    attempts = history.read_attempts(config.run)
    result = dataclasses.asdict(verdict) | {"restarts": len(attempts) - 1, "workers": [a.num_workers for a in attempts]}
    if not verdict.exactly_once:
        raise ValueError(f"{config.run} did not see every sample exactly once: {result}")
    return {"job": "history", "run": config.run, "step": info.step, **result}


if __name__ == "__main__":
    main(__doc__, work)
