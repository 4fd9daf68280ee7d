"""The run folder's records: metrics as JSON lines, TensorBoard events, progress lines in the log."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from dfa.data import storage
from dfa.train.starts import note_start

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class Observer(Protocol):
    """Someone else who is told each line of metrics."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Take one line; quickly, training waits."""
        ...

    def close(self) -> None:
        """Finish; training has ended."""
        ...


class Recorder:
    """Writes metrics of rank 0 into the run folder RUN; the other ranks' recorders do nothing.

    Lines of steps after `first_step` (from before a crash, beyond the checkpoint that the run went back to) are
    removed, so the file tells one history.

    On a disk a line is appended as it comes. Object stores cannot append, and TensorBoard's writer knows no address with a
    query: for a remote run the lines and the event file grow in a temporary folder of this machine, and `sync` puts them
    whole under RUN. With a `sync` before each checkpoint nothing is lost that would be kept: a crashed run goes back to a
    checkpoint, and its lines beyond are removed anyway. 30 000 steps with the default settings are less than 1 MB.
    """

    restarts: int = 0
    """How often the workers of this run have begun before; 0 on other ranks than the first."""

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        rank: int,
        first_step: int,
        world_size: int = 1,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._run, self._writer, self._scratch, self._observers = os.fspath(run), None, None, tuple(observers)
        if rank != 0:
            return
        storage.make_folder(storage.join(self._run, EVENTS_FOLDER))
        if not storage.is_local(self._run):
            self._scratch = tempfile.TemporaryDirectory(prefix="dfa-metrics-")
        self._folder = Path(self._scratch.name if self._scratch else storage.local_path(self._run))
        self.restarts = note_start(self._run, "workers", {"step": first_step, "world_size": world_size})
        kept = "".join(_line(line) for line in read_metrics(self._run) if line["step"] <= first_step).encode()
        storage.write_atomic(str(self._folder / METRICS_NAME), lambda file: file.write(kept))
        self._writer = SummaryWriter(str(self._folder / EVENTS_FOLDER), purge_step=first_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line {"kind", "step", ...values}; numbers also go to TensorBoard as kind/name."""
        if self._writer is None:
            return
        with open(self._folder / METRICS_NAME, "a", encoding="utf-8") as file:
            file.write(_line({"kind": kind, "step": step, **values}))
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        for observer in self._observers:
            observer.write(kind, step, values)

    def sync(self) -> None:
        """Put what was written so far into a remote run folder; call it before each checkpoint, from any thread."""
        if self._writer is None or self._scratch is None:
            return
        self._writer.flush()
        self._upload()

    def _upload(self) -> None:
        for path in (self._folder / METRICS_NAME, *sorted((self._folder / EVENTS_FOLDER).iterdir())):
            data, name = path.read_bytes(), path.relative_to(self._folder).as_posix()
            storage.write_atomic(storage.join(self._run, name), lambda file, data=data: file.write(data))

    def close(self) -> None:
        """Finish the event file and the observers, and what `sync` does."""
        if self._writer is None:
            return
        for observer in self._observers:
            observer.close()
        self._writer.close()
        if self._scratch is not None:
            self._upload()
            self._scratch.cleanup()
        self._writer = None


def _line(values: Mapping[str, Any]) -> str:
    """Strict JSON: a number that JSON does not have (NaN, infinity) becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(clean) + "\n"


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a run; a last line that a crash cut off is left out."""
    path = storage.join(os.fspath(run), METRICS_NAME)
    lines = storage.read_bytes(path).decode().splitlines() if storage.exists(path) else []
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


class Meter:
    """Sums of step times and of what steps report, since the last `take` and since the start."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._now, self._all = [0.0, 0.0, 0, 0], [0.0, 0.0, 0, 0]

    def add(self, step_s: float, wait_s: float, num_images: int, values: dict[str, float]) -> None:
        for sums in (self._now, self._all):
            for i, value in enumerate((step_s, wait_s, num_images, 1)):
                sums[i] += value
        for name, value in values.items():
            self._parts[name] = self._parts.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        step_s, wait_s, images, steps = self._now
        values = {name: value / steps for name, value in self._parts.items()}
        self._parts, self._now = {}, [0.0, 0.0, 0, 0]
        return values | {"images_per_s": images / step_s, "step_s": step_s / steps, "data_wait": wait_s / step_s}

    def whole(self) -> dict[str, float]:
        """Rates since the start (first step included)."""
        step_s, wait_s, images, _ = self._all
        return {"images_per_s": images / max(step_s, 1e-9), "data_wait": wait_s / max(step_s, 1e-9)}
