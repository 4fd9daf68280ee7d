"""Train: `python -m jobs.train CONF key=value ...`. The same command again continues where it stopped."""

import json
import logging

from dfa import build
from dfa.config import Config, digest, to_dict
from dfa.data import storage
from dfa.train import loop
from jobs import Result, main

log = logging.getLogger("jobs.train")


def work(config: Config) -> Result:
    """Train to the end of the configuration's plan."""
    plan = build.loop_plan(config)
    _describe(config)
    result = loop.run(plan)
    return {"job": "train", "run": config.run, **result}


def _describe(config: Config) -> None:
    """Keep the resolved configuration and the versions beside what they made."""
    storage.make_folder(config.run)
    record = {"config": to_dict(config), "hash": digest(config), "versions": build.versions()}
    data = (json.dumps(record, indent=1) + "\n").encode()
    storage.write_atomic(storage.join(config.run, "run.json"), lambda file: file.write(data))


if __name__ == "__main__":
    main(__doc__, work)
