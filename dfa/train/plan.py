"""What a training run is told: numbers, and closures that build its parts inside the worker processes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfa.data.stream import Batch
from dfa.train.engine import EngineKind, Precision
from dfa.train.objective import Objective, OptimizerSettings
from dfa.train.progress import Progress
from dfa.train.record import Observer

_MIN_WORKER_CPUS = 0.2
_ELASTIC_WORKER_CPUS = 0.75  # of a whole CPU: on every node something is left for reading
_STEP = 16  # reservations are sixteenths, whose sums are exact: Ray counts how often one fits


@dataclass(frozen=True)
class Resources:
    """What one worker of a run reserves, see `derive_resources`."""

    worker_cpus: float
    worker_gpus: float


@dataclass(frozen=True)
class Readers:
    """What read tasks may take beside the workers, see `derive_readers`."""

    num_workers: int
    """Workers that the stream is dealt to."""
    read_cpus: float
    max_readers: int


@dataclass(frozen=True)
class BatchShape:
    """How workers share a global batch: each makes `num_accumulation` micro-batches of `micro_batch` for one step."""

    micro_batch: int
    num_accumulation: int
    global_batch: int


@dataclass(frozen=True)
class LoopPlan:
    """A run. The closures are sent to the workers, so they must be picklable by cloudpickle and carry no tensors."""

    run_folder: str
    class_names: tuple[str, ...]
    model_description: Mapping[str, Any]
    """JSON-able; written into checkpoints, and a checkpoint with another description is refused."""
    shard_sizes: tuple[int, ...]
    """Samples of each shard, in index order; together they are one epoch."""
    make_objective: Callable[[torch.device], Objective]
    make_dataset: Callable[[Progress, Readers], Any]
    """Ray dataset of what is left after `Progress`; runs in Ray Train's controller at every start of the workers."""
    make_validation: Callable[[int, int], Iterable[Batch]] | None
    """(rank, number of ranks) -> this rank's validation batches; None: no validation."""
    total_steps: int
    global_batch: int
    micro_batch: int
    """The largest that a worker takes in one forward pass."""
    warmup_steps: int
    decay_power: float
    optimizer: OptimizerSettings
    engine: EngineKind
    precision: Precision
    zero_stage: int
    num_workers: int
    """As many as there are; with `min_workers` as many as fit, up to so many."""
    use_gpu: bool
    validate_every: int
    """Steps between validations; 0: only at the end."""
    checkpoint_every: int
    keep_last: int
    log_every: int
    seed: int
    prefetch: int = 2
    window_bytes: int = 256 * 2**20
    """Decoded pixels that Ray may hold ahead of the workers."""
    min_workers: int = 0
    """The least to train with; 0: always `num_workers`."""
    resize_interval_s: float = 60.0
    """How often to look for room for more workers."""
    worker_cpus: float = 0.0
    """CPUs that a worker reserves; 0: `derive_resources` says."""
    max_failures: int = 3
    """Failures in a row without a new checkpoint between them that are recovered from."""
    collective_timeout_s: int = 600
    make_observers: Callable[[], Sequence[Observer]] = tuple
    """Called by rank 0 at every start of the workers: who else is told each line of metrics."""
    average_decay: float = 0.0
    """Of the moving average of the weights; 0: none is kept."""
    keep_history: bool = False
    """Write down who consumed which sample when, see `dfa.train.history`."""

    def __post_init__(self) -> None:
        for name in (
            "total_steps",
            "global_batch",
            "micro_batch",
            "num_workers",
            "checkpoint_every",
            "keep_last",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.min_workers <= self.num_workers:
            raise ValueError(f"min_workers must be 0 to num_workers {self.num_workers}, got {self.min_workers}")
        if not self.min_workers and self.global_batch % self.num_workers:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of {self.num_workers} workers")

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.shard_sizes)

    @property
    def total_samples(self) -> int:
        """Samples that the whole run consumes."""
        return self.total_steps * self.global_batch

    def batch_shape(self, num_workers: int) -> BatchShape:
        """The same global batch on any number of workers: as few micro-batches as `micro_batch` allows.

        Where the workers do not divide it, the nearest above: workers get equally many samples.
        """
        share = -(-self.global_batch // num_workers)
        accumulation = -(-share // self.micro_batch)
        while share % accumulation:
            accumulation += 1
        return BatchShape(share // accumulation, accumulation, share * num_workers)


def derive_resources(plan: LoopPlan, *, num_cpus: float, num_gpus: float) -> Resources:
    """What each worker reserves on a cluster; fixed while the run lasts.

    Without GPUs the workers of a fixed number reserve half of the CPUs (at most one each), so that read tasks always
    find room: two workers with a whole CPU each on two CPUs would leave none, and Ray waits for ever without an error.
    Of an elastic run each reserves three quarters of a CPU, whatever there is now: more nodes, more workers. With GPUs a
    worker reserves one, and one CPU where there are enough. Reservations are book-keeping only: torch threads are set
    to the CPUs of a node / workers on it.

    Raises:
        ValueError: more workers than GPUs, or less than a fifth of a CPU for a worker.
    """
    workers = plan.num_workers
    if plan.use_gpu and not plan.min_workers and workers > num_gpus:
        raise ValueError(f"the run asks for {workers} workers with a GPU each, the cluster has {num_gpus:g} GPUs")
    gpus = 1.0 if plan.use_gpu else 0.0
    if plan.worker_cpus:
        return Resources(plan.worker_cpus, gpus)
    if plan.min_workers:
        most = min(1.0, num_cpus / 2 / num_gpus) if plan.use_gpu and num_gpus else _ELASTIC_WORKER_CPUS
        return Resources(max(1 / _STEP, _sixteenths(most)), gpus)
    worker_cpus = min(1.0, num_cpus / 2 / workers)
    if worker_cpus < _MIN_WORKER_CPUS:
        raise ValueError(
            f"{workers} workers do not fit on {num_cpus:g} CPUs "
            f"(each needs {_MIN_WORKER_CPUS} of one half of them); "
            f"use at most {max(1, int(num_cpus / 2 / _MIN_WORKER_CPUS))} workers"
        )
    return Resources(max(3 / _STEP, _sixteenths(worker_cpus)), gpus)


def derive_readers(
    plan: LoopPlan, resources: Resources, node_cpus: Sequence[float], num_workers: int | None = None
) -> Readers:
    """What read tasks may take of the nodes that are there now, wherever the workers came to lie.

    The workers leave at least L CPUs on n nodes, so one node has L / n; a read task reserves a quarter of that. Ray deals
    out what a node has left in whole CPUs alone (2.60): where that may be none on every node, read tasks reserve nothing.
    Otherwise one at a time would run, or, where nothing at all is left, none, and the run would wait for ever.
    """
    fit = [int(cpus // resources.worker_cpus) for cpus in node_cpus]
    left = sum(node_cpus) - min(plan.num_workers, sum(fit)) * resources.worker_cpus
    most = [min(plan.num_workers, workers) * resources.worker_cpus for workers in fit]
    whole = sum(int(cpus - taken) for cpus, taken in zip(node_cpus, most, strict=True))
    read_cpus = _sixteenths(min(1.0, left / max(1, len(node_cpus)) / 4)) if whole else 0.0
    return Readers(
        plan.num_workers if num_workers is None else num_workers,
        read_cpus,
        max(1, int(left if sum(node_cpus) > 2 else 2)),
    )


def _sixteenths(value: float) -> float:
    return math.floor(value * _STEP) / _STEP
