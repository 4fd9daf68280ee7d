"""What a training run is told: numbers, and closures that build its parts inside the worker processes."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfa.data.stream import Batch
from dfa.train.engine import EngineKind, Precision
from dfa.train.objective import Objective, OptimizerSettings
from dfa.train.progress import Progress
from dfa.train.record import Observer

logger = logging.getLogger(__name__)

_MIN_WORKER_CPUS = 0.2


@dataclass(frozen=True)
class Resources:
    """What one run takes from the cluster, see `derive_resources`."""

    num_workers: int
    worker_cpus: float
    worker_gpus: float
    threads: int
    """torch threads of each worker."""
    read_cpus: float
    max_readers: int


@dataclass(frozen=True)
class LoopPlan:
    """A run. The closures are sent to the workers, so they must be picklable by cloudpickle and carry no tensors."""

    run_folder: str
    class_names: tuple[str, ...]
    model_description: Mapping[str, Any]
    """JSON-able; written into checkpoints, and a checkpoint with another description is refused."""
    num_samples: int
    """Samples of one epoch."""
    make_objective: Callable[[torch.device], Objective]
    make_dataset: Callable[[Progress, Resources], Any]
    """Ray dataset of what is left after `Progress`; runs in Ray Train's controller at every start of the workers."""
    make_validation: Callable[[int, int], Iterable[Batch]] | None
    """(rank, number of ranks) -> this rank's validation batches; None: no validation."""
    total_steps: int
    global_batch: int
    micro_batch: int
    warmup_steps: int
    decay_power: float
    optimizer: OptimizerSettings
    engine: EngineKind
    precision: Precision
    zero_stage: int
    num_workers: int
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
    max_failures: int = 0
    collective_timeout_s: int = 600
    make_observers: Callable[[], Sequence[Observer]] = tuple
    """Called by rank 0 at every start of the workers: who else is told each line of metrics."""

    def __post_init__(self) -> None:
        for name in (
            "total_steps",
            "global_batch",
            "micro_batch",
            "num_workers",
            "checkpoint_every",
            "keep_last",
            "log_every",
            "num_samples",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.accumulation(self.num_workers)

    @property
    def total_samples(self) -> int:
        """Samples that the whole run consumes."""
        return self.total_steps * self.global_batch

    def accumulation(self, num_workers: int) -> int:
        """Micro-batches per step and worker, so that the global batch is the same for every number of workers."""
        one_pass = self.micro_batch * num_workers
        if self.global_batch % one_pass:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of "
                f"micro_batch {self.micro_batch} x {num_workers} workers = {one_pass}"
            )
        return self.global_batch // one_pass


def derive_resources(plan: LoopPlan, *, num_cpus: float, num_gpus: float) -> Resources:
    """Share a cluster between workers and readers.

    Without GPUs, the workers reserve half of the CPUs (at most one each), so that read tasks, a quarter CPU each,
    always find room: two workers with a whole CPU each on two CPUs would leave none, and Ray waits for ever without an
    error. With GPUs a worker reserves one CPU where there are enough. Reservations are book-keeping only: torch threads
    are set to all CPUs / workers.

    Raises:
        ValueError: more workers than GPUs, or less than a fifth of a CPU for a worker.
    """
    workers = plan.num_workers
    if plan.use_gpu and workers > num_gpus:
        raise ValueError(f"the run asks for {workers} workers with a GPU each, the cluster has {num_gpus:g} GPUs")
    worker_cpus = min(1.0, num_cpus / 2 / workers)
    if worker_cpus < _MIN_WORKER_CPUS:
        raise ValueError(
            f"{workers} workers do not fit on {num_cpus:g} CPUs "
            f"(each needs {_MIN_WORKER_CPUS} of one half of them); "
            f"use at most {max(1, int(num_cpus / 2 / _MIN_WORKER_CPUS))} workers"
        )
    left = num_cpus - worker_cpus * workers
    read_cpus = min(1.0, left / 4)
    return Resources(
        num_workers=workers,
        worker_cpus=worker_cpus,
        worker_gpus=1.0 if plan.use_gpu else 0.0,
        threads=max(1, int(num_cpus // workers)),
        read_cpus=read_cpus,
        max_readers=max(1, int(left if num_cpus > 2 else 2)),
    )
