"""Paths that mean the same on every node, and what `ray job submit` makes of relative ones.

A submitted job runs in a copy of the submitter's working directory, on one node, and Ray deletes the copy after the job.
So what a job writes, and the run that it reads its model from, must be absolute or an address (s3://...); small files
that travel with the working directory (class lists, label files) may be relative.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfa.config import Config

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it, by this name, in the entry points of submitted jobs alone
_CODE = Path(__file__).resolve().parents[1]
_WRITTEN = ("run", "data.output", "label.output", "predict.output", "analyze.output", "blocks.output")
_READ = (
    "data.root",
    "data.label_file",
    "data.annotations",
    "shards.train",
    "shards.val",
    "shards.test",
    "shards.labels",
    "predict.input",
    "analyze.prediction",
    "analyze.truth",
    "blocks.input",
)


def is_submitted() -> bool:
    """Whether this process is the entry point of a job that `ray job submit` started."""
    return bool(json.loads(os.environ.get(JOB_VARIABLE) or "{}").get("metadata", {}).get("job_submission_id"))


def absolute_paths(config: Config, *, kept: Sequence[str]) -> Config:
    """The configuration, changed in place: relative paths made absolute, so that workers elsewhere read them alike.

    kept: fields that the job writes to or continues from.

    Raises:
        ValueError: one of them is relative in a submitted job: it would be lost with the working directory.
    """
    for name in (*_WRITTEN, *_READ):
        section, key = _field(config, name)
        value = getattr(section, key)
        if not value or _is_absolute(value):
            continue
        if name in kept:
            refuse_lost(name, value)
        setattr(section, key, str(Path(value).absolute()))
    return config


def refuse_lost(name: str, value: str | Path) -> None:
    """What a submitted job writes to `value`, which `name` gave, must outlive the copy that the job runs in.

    Raises:
        ValueError: this job was submitted, and `value` is relative or lies in the copy, as defaults beside the code do.
    """
    inside = "://" not in str(value) and Path(value).is_relative_to(_CODE)
    if is_submitted() and (inside or not _is_absolute(str(value))):
        raise ValueError(
            f"{name}={value} {'lies beside the code' if inside else 'is relative'}, and this job was submitted: its working"
            " directory is a copy that Ray deletes after the job; give an absolute path that all nodes share, or an address"
            " such as s3://bucket/folder"
        )


def _is_absolute(value: str) -> bool:
    return "://" in value or Path(value).is_absolute()


def _field(config: Config, name: str) -> tuple[Any, str]:
    section, _, key = name.rpartition(".")
    return (getattr(config, section) if section else config), key
