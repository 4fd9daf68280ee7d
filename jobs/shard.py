"""Write WebDataset shards of a labelled data set: `python -m jobs.shard CONF data.root=... data.output=FOLDER`.

One Ray task a shard. Killed and started again it writes what is missing, to the same bytes.
"""

import logging
from collections.abc import Iterable
from typing import Any

import ray

from dfa import build
from dfa.config import Config
from dfa.data import planning, writer
from dfa.data.samples import Reject, Sample
from dfa.train.loop import start_ray
from jobs import Result, main

log = logging.getLogger("jobs.shard")
_TASKS_AHEAD = 4  # per CPU: enough to keep every core busy, few enough that the driver holds few plans


@ray.remote(max_retries=3)
def _write(root: str, item: planning.PlanItem) -> writer.ShardReport:
    return writer.write_shard(root, item)


def work(config: Config, samples: Iterable[Sample | Reject] | None = None) -> Result:
    """Plan, write what is pending in parallel, and finish with the index. samples: instead of all of data.root."""
    root, data = config.data.output, config.data
    if not root:
        raise ValueError("data.output is empty: give the folder of the shards to write")
    classes = build.source_classes(config)
    plan = planning.plan_shards(
        build.source(config) if samples is None else samples,
        class_names=classes.names,
        seed=config.train.seed,
        shuffle=data.shuffle,
        samples_per_shard=data.samples_per_shard,
        max_pixels=data.max_pixels,
        apply_exif=data.apply_exif,
    )
    planning.write_plan(root, plan)
    if found := build.write_classes(config, classes):
        log.info("%d classes in %s: look through its background and prompts before training", len(classes.names), found)
    pending = list(writer.pending(root, plan))
    log.info("%d samples in %d shards, %d shards to write", plan.num_samples, len(plan.items), len(pending))
    if pending:
        _write_all(root, pending)
    index = writer.finish(root, plan, max_reject_share=data.max_reject_share)
    return {
        "job": "shard",
        "shards": root,
        "num_shards": len(index.shards),
        "num_samples": index.num_samples,
        "num_rejects": index.num_rejects,
        "written_now": len(pending),
        "images_per_class": dict(zip(classes.names, index.class_histogram, strict=True)),
    }


def _write_all(root: str, pending: list[planning.PlanItem]) -> None:
    start_ray()
    window = _TASKS_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: list[Any] = []
    done = 0
    queue = iter(pending)
    while True:
        while len(running) < window and (item := next(queue, None)) is not None:
            running.append(_write.remote(root, item))
        if not running:
            return
        ready, running = ray.wait(running, num_returns=1)
        for report in ray.get(ready):
            done += 1
            log.info("%s: %d samples, %d of %d shards", report.shard, report.num_samples, done, len(pending))


if __name__ == "__main__":
    main(__doc__, work, kept=("data.output",))
