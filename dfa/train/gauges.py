"""A run's metrics at Ray's Prometheus endpoint: gauges of the worker of rank 0, scraped from the node that it runs on.

`dfa_train_images_per_s`, `dfa_val_miou`, `dfa_checkpoint_blocked_s`: dfa, the kind of line in metrics.jsonl, its key; each
with the tag `run`, the run folder's name. Ray puts `ray_` before all names of its applications. IoUs of single classes are
left to metrics.jsonl and TensorBoard.
"""

import math
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from dfa.data import storage

_CLASS_IOU = "iou_"


class Gauges:
    """Sets one gauge for each number that it is told, made when the number first comes."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": storage.base_name(run)}
        self._gauges: dict[str, Gauge] = {}

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Set the gauges of one line of metrics."""
        for key, value in {"step": step, **values}.items():
            name = f"dfa_{kind}_{key}"
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or not name.isidentifier() or not name.isascii() or key.startswith(_CLASS_IOU):
                continue
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, f"{key} of the newest {kind} line of a run", tag_keys=("run",))
            self._gauges[name].set(float(value), tags=self._tags)

    def close(self) -> None:
        """Nothing: gauges end with their process."""
