"""The run folder's records: metrics as JSON lines, TensorBoard events, progress lines in the log."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dfa.data import storage

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


class Recorder:
    """Writes metrics of rank 0; the other ranks' recorders do nothing.

    Lines of steps after `first_step` (from before a crash, beyond the checkpoint that the run went back to) are
    removed, so the file tells one history.
    """

    def __init__(self, run: Path, *, rank: int, first_step: int) -> None:
        self._writer = None
        self._path = run / METRICS_NAME
        if rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_metrics(run) if line["step"] <= first_step]
            storage.write_atomic(str(self._path), lambda file: file.write("".join(map(_line, kept)).encode()))
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line {"kind", "step", ...values}; numbers also go to TensorBoard as kind/name."""
        if self._writer is None:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line({"kind": kind, "step": step, **values}))
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush the event files."""
        if self._writer is not None:
            self._writer.close()


def _line(values: Mapping[str, Any]) -> str:
    """Strict JSON: a number that JSON does not have (NaN, infinity) becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(clean) + "\n"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line that a crash cut off is left out."""
    path = run / METRICS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            logger.warning("%s: line %d is not JSON and is left out", path, number)
    return found


def duration(seconds: float) -> str:
    """Human-readable seconds.

    >>> duration(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
