"""DeepSpeed, imported quietly and without what is never used: every start of a worker waits for it."""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

_DEEPSPEED_LOGGER = "DeepSpeed"


def import_deepspeed(device: torch.device) -> Any:
    """Import deepspeed quietly; on a CPU without its shared-memory kernel, which takes a minute to compile."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet(), _without_mlflow():
        import deepspeed
        import deepspeed.ops

        _import_muon_uncompiled()
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """DeepSpeed's autotuner, which we do not use, imports MLflow where it is installed: 3 CPU seconds of every
    worker's start."""
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules["mlflow"]


def _import_muon_uncompiled() -> None:
    """DeepSpeed imports its Muon optimizer, which we do not use, to ask whether ours is one, and that decorates functions
    with torch.compile, which imports all of inductor: 3 CPU seconds of every worker's start."""
    try:
        from deepspeed.runtime import compiler

        real = compiler.compile
        compiler.compile = lambda: compiler.dummy_decorator
    except (ImportError, AttributeError):  # a version that does it differently is only slower
        return
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:
        pass
    finally:
        compiler.compile = real


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what DeepSpeed announces on standard output below a warning: its configuration, for example.

    A filter, not a level: the import sets the level itself, and the user's level must be what it was afterwards.
    """
    logger = logging.getLogger(_DEEPSPEED_LOGGER)
    logger.addFilter(_is_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
