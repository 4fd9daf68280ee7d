"""Train: `python -m jobs.train CONF key=value ...`. The same command again continues where it stopped."""

import json
import logging
from typing import Any

from dfa import build
from dfa.config import Config, digest, to_dict
from dfa.data import storage
from dfa.data.lock import alone_in
from dfa.train import loop
from dfa.train.checkpoint import list_checkpoints
from dfa.train.starts import RUN_NAME, differences, note_start
from jobs import Result, main

log = logging.getLogger("jobs.train")
_SHOWN = 8
_PATIENCE_S = 60.0  # a run that was asked to stop may still be writing its last checkpoint


def work(config: Config) -> Result:
    """Train to the end of the configuration's plan."""
    storage.make_folder(config.run)
    busy = f"something else trains in {config.run}; give this training another folder (run=...), or end the other one first"
    with alone_in(config.run, busy=busy, patience_s=_PATIENCE_S):
        return _train(config)


def _train(config: Config) -> Result:
    plan = build.loop_plan(config)
    _describe(config)
    if config.loss.supervision == "pseudo" and not build.class_set(config).background:
        log.warning(
            "the class list (data.classes=%s) has no background texts: every pixel must be one of its classes to CLIP; add some"
            " under `background`, as in conf/classes_coco.yaml",
            config.data.classes,
        )
    build.check_clip(config)
    result = loop.run(plan)
    return {"job": "train", "run": config.run, **result}


def _describe(config: Config) -> None:
    """Keep beside the results what makes them: RUN/run.json is the newest start, RUN/starts.jsonl tells all of them.

    Raises:
        ValueError: the run has checkpoints, and they count the samples of other shards.
    """
    storage.make_folder(config.run)
    record = {
        "config": to_dict(config),
        "hash": digest(config),
        "data": {"train": build.index(config, "train").plan_hash},
        "versions": build.versions(),
        "code": build.code(),
        "machine": build.machine(),
    }
    changed = _changed(config, record)
    note_start(config.run, "job", {"hash": record["hash"], "changed": changed} | record["code"] | record["machine"])
    data = (json.dumps(record, indent=1) + "\n").encode()
    storage.write_atomic(storage.join(config.run, RUN_NAME), lambda file: file.write(data))


def _changed(config: Config, record: dict[str, Any]) -> dict[str, list[Any]]:
    """What is not as at the start before: dotted names, with the value then and now."""
    address = storage.join(config.run, RUN_NAME)
    if not storage.exists(address):
        return {}
    before = storage.read_json(address)
    then, now = before.get("data"), record["data"]
    if then not in (None, now) and list_checkpoints(config.run):
        raise ValueError(
            f"{config.run} was trained on other shards than shards.train={config.shards.train}: their plan is"
            f" {now['train'][:12]}, that of the run {then['train'][:12]}; use another run folder"
        )
    compared = ("config", "versions", "code")
    changed = differences({k: before.get(k, {}) for k in compared}, {k: record[k] for k in compared})
    if changed:
        shown = ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in list(changed.items())[:_SHOWN])
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        log.warning("this start differs from the one before in %s%s", shown, more)
    return changed


if __name__ == "__main__":
    main(__doc__, work)
