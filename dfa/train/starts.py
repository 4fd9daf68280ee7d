"""The starts of a run: RUN/starts.jsonl, one line for each time a job begins and each time its workers begin.

    {"time": "2026-05-01T09:30:00+00:00", "kind": "job", ...}        configuration, what differs from the start before, versions
    {"time": ..., "kind": "cluster", ...}                            what Ray has
    {"time": ..., "kind": "workers", "step": 500, "world_size": 2}   after a crash or a resize there are several for one job

The file is small and is written whole each time, so that it works in an object store.
"""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dfa.data import storage

RUN_NAME = "run.json"  # the newest start: configuration, versions, machine
STARTS_NAME = "starts.jsonl"


def read_starts(run: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of the file, all or those of one kind; none where there is no file."""
    address = storage.join(os.fspath(run), STARTS_NAME)
    if not storage.exists(address):
        return []
    lines = [json.loads(line) for line in storage.read_bytes(address).decode().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def note_start(run: str | os.PathLike[str], kind: str, facts: Mapping[str, Any]) -> int:
    """Add a line to the file of a run folder that is there; returns how many of the kind came before."""
    before = read_starts(run)
    lines = [*before, {"time": datetime.now(UTC).isoformat(timespec="seconds"), "kind": kind, **facts}]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    storage.write_atomic(storage.join(os.fspath(run), STARTS_NAME), lambda file: file.write(data))
    return sum(line["kind"] == kind for line in before)


def differences(old: Any, new: Any, name: str = "") -> dict[str, list[Any]]:
    """Dotted names of what differs between two nested mappings, with both values; None stands for what is not there.

    >>> differences({"train": {"steps": 5, "seed": 0}}, {"train": {"steps": 9, "seed": 0}})
    {'train.steps': [5, 9]}
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, list[Any]] = {}
        for key in sorted({*old, *new}):
            found |= differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return {} if old == new else {name: [old, new]}
