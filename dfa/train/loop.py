"""A run on Ray Train: starts the workers, feeds them the stream, stops gracefully, continues where the last run ended.

Checkpoints are written by rank 0 into the run folder in our own atomic format (see `checkpoint`); Ray is told metrics
only. So the same command again continues whatever ended the last one, at any number of workers, and a finished run
returns at once.
"""

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, cast

import ray
import ray.data
import ray.exceptions
import ray.train
import ray.train.torch
import torch

from dfa.data import storage
from dfa.data.stream import Batch, ingest_options, iterate
from dfa.train.callbacks import Failures, GroupStarts, group_size
from dfa.train.checkpoint import Checkpoint, best_checkpoint, latest_checkpoint, list_checkpoints, read_info
from dfa.train.cluster import join_cluster
from dfa.train.gauges import Gauges
from dfa.train.history import read_attempts
from dfa.train.plan import LoopPlan, Resources, derive_readers, derive_resources
from dfa.train.progress import Progress
from dfa.train.record import Observer
from dfa.train.starts import note_start
from dfa.train.stop import StopFile
from dfa.train.worker import Trainer

logger = logging.getLogger(__name__)

_ENVIRONMENT = {
    "RAY_TRAIN_METRICS_ENABLED": "0",  # a Prometheus thread in every process
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # waits for room, not for processes; Ray plans with lost nodes for 20 s
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",  # of a group that lost a worker: its others wait for that one
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a finished worker is noticed this late (default 2 s)
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning inside workers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; silences a warning
    "RAY_DEDUP_LOGS": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # an error that ends the job is told once, not again by each task behind it
    "RAY_worker_niceness": "0",  # 15 by default: beside any other load the workers would starve while the driver waits
}


def prepare_environment() -> None:
    """Settings that Ray's processes inherit, wherever the environment does not say otherwise."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start_ray(num_cpus: int | None = None) -> None:
    """Connect to the cluster that the environment names, else start one here. Does nothing when Ray runs already.

    ``num_cpus`` is for tests only: a cluster that exists refuses it. Errors as in `join_cluster`.
    """
    prepare_environment()
    if ray.is_initialized():
        return
    handler = signal.getsignal(signal.SIGTERM)
    # with the dashboard: without it Ray Train warns every second, and its process runs all the same
    join_cluster(num_cpus)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place, which aborts


def run(plan: LoopPlan) -> dict[str, Any]:
    """Train to the end of the plan, from the newest whole checkpoint in the run folder if there is one.

    The first SIGINT or SIGTERM stops every rank after its step, writes a checkpoint and returns with ``interrupted``
    True; the second ends at once (the last checkpoint stays). Handlers are set only when called from the main thread.

    Returns:
        Numbers of the run: step, samples_seen, num_rejected, val_miou, best_val_miou, interrupted, world_size,
            samples_left_in_epoch, images_per_s, data_wait, checkpoint_share (of the time, waiting for checkpoints and
            reports), seconds, start_s (from the call to a ready model), best_checkpoint and
            last_checkpoint (folders).

    Raises:
        ValueError: the plan does not fit the cluster, or the checkpoint does not fit the plan.
        NonFiniteLossError: the loss or the gradient is not finite.
        RuntimeError: the workers failed too often; the message is the first error of the last failure.
    """
    begin = time.time()
    plan = replace(plan, run_folder=storage.absolute(plan.run_folder))
    folder = plan.run_folder
    storage.make_folder(folder)
    StopFile(folder).withdraw()
    checkpoint = latest_checkpoint(folder, class_names=plan.class_names)
    if checkpoint is not None and checkpoint.info.samples_seen >= plan.total_samples:
        logger.info("the run in %s is complete (%d samples)", folder, checkpoint.info.samples_seen)
        return _finished(folder, checkpoint)
    start_ray()
    total = ray.cluster_resources()
    resources = derive_resources(plan, num_cpus=total.get("CPU", 0.0), num_gpus=total.get("GPU", 0.0))
    logger.info("training with %s", resources)
    note_start(folder, "cluster", {"num_nodes": sum(node["Alive"] for node in ray.nodes()), "resources": total})
    result = _fit(plan, resources)
    result["start_s"] = result.pop("ready_at") - begin
    return result | _folders(folder)


def _fit(plan: LoopPlan, resources: Resources) -> dict[str, Any]:
    with _ray_folder(plan.run_folder) as ray_folder, _timeouts(plan):
        return _graceful(lambda: _fit_patiently(ray_folder, plan, resources), plan.run_folder)


@contextmanager
def _timeouts(plan: LoopPlan) -> Iterator[None]:
    """Of Ray Train's own barriers and health checks, where the environment says nothing: it takes them from there alone, and
    the next run of this process may want others."""
    wanted = {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": plan.collective_timeout_s,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": max(60, plan.collective_timeout_s),
    }
    ours = {name: str(value) for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _fit_patiently(ray_folder: str, plan: LoopPlan, resources: Resources) -> dict[str, Any]:
    """Again where Ray Train gave up on what may pass: it does not start workers anew that are lost while they start, nor
    after an error of a store in its own process."""
    for number in range(1, plan.max_failures + 1):
        try:
            return _fit_once(ray_folder, plan, resources, number)
        except (ray.exceptions.RayError, OSError) as error:
            if StopFile(plan.run_folder).asked():
                raise
            logger.warning(
                "the workers could not be started, once more (%d of %d): %s", number, plan.max_failures, error
            )
    return _fit_once(ray_folder, plan, resources, plan.max_failures + 1)


@contextmanager
def _ray_folder(run: str) -> Iterator[str]:
    """Where Ray Train keeps its own notes: RUN/ray, or a temporary folder where the run is remote.

    Ray asks for storage that all nodes share, because workers put checkpoints there. Ours get none, they report metrics
    only, so the controller alone writes here, and Ray keeps that on the machine that calls `run`. What survives a crash
    are our checkpoints; these notes need not.
    """
    if storage.is_local(run):
        yield storage.local_path(storage.join(run, "ray"))
        return
    with tempfile.TemporaryDirectory(prefix="dfa-ray-train-") as folder:
        yield folder


def _fit_once(ray_folder: str, plan: LoopPlan, resources: Resources, number: int) -> dict[str, Any]:
    gpus = {"GPU": resources.worker_gpus} if plan.use_gpu else {}
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"plan": plan},
        datasets={"train": _dataset_maker(plan, resources)},
        dataset_config=ray.train.DataConfig(execution_options=ingest_options(window_bytes=plan.window_bytes)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(plan.min_workers, plan.num_workers) if plan.min_workers else plan.num_workers,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": resources.worker_cpus} | gpus,
            elastic_resize_monitor_interval_s=plan.resize_interval_s,
        ),
        torch_config=_TorchConfig(backend="nccl" if plan.use_gpu else "gloo", timeout_s=plan.collective_timeout_s),
        run_config=ray.train.RunConfig(
            storage_path=ray_folder,
            name=f"start-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{number}",
            failure_config=ray.train.FailureConfig(max_failures=-1),  # `Failures` decides
            callbacks=[Failures(plan), GroupStarts()],  # type: ignore[list-item]
        ),
    )
    try:
        return cast(dict[str, Any], trainer.fit().return_value)
    except ray.train.ControllerError as error:
        raise error.controller_failure from error


class _TorchConfig(ray.train.torch.TorchConfig):
    """Ray's set-up of torch.distributed; besides, workers note their first SIGTERM, which stands for "you will end soon"."""

    @property
    def backend_cls(self) -> Any:
        class Backend(super().backend_cls):
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(_note_first_sigterm)
                super().on_start(worker_group, backend_config)

            def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
                """Nothing: the processes end right after, and one that waits for a lost one would be waited for."""

        return Backend


_sigterm, _trained = threading.Event(), threading.Event()


def _note_first_sigterm() -> None:
    """Runs on the main thread of every worker process, which is not the one that trains."""
    usual = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        if not _trained.is_set():  # or it is Ray's own, which ends every worker so
            logger.warning("SIGTERM: a checkpoint follows this step (again: end at once)")
        signal.signal(signal.SIGTERM, usual)
        _sigterm.set()

    signal.signal(signal.SIGTERM, handle)


def _warned() -> bool:
    """Tell once that this process got SIGTERM."""
    if not _sigterm.is_set():
        return False
    _sigterm.clear()
    return True


def _dataset_maker(plan: LoopPlan, resources: Resources) -> Callable[[], Any]:
    def make() -> Any:
        """Runs in Ray Train's controller at every start of the workers: the stream of what is left."""
        checkpoint = latest_checkpoint(plan.run_folder, class_names=plan.class_names)
        progress = Progress(plan.shard_sizes) if checkpoint is None else checkpoint.progress.over(plan.shard_sizes)
        cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        return plan.make_dataset(progress, derive_readers(plan, resources, cpus, group_size()))

    return make


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs."""
    plan: LoopPlan = config["plan"]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("dfa").setLevel(logging.INFO)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # one line per rank and report otherwise
    num_workers = ray.train.get_context().get_world_size()
    torch.set_num_threads(_num_threads())
    checkpoint = latest_checkpoint(plan.run_folder, class_names=plan.class_names)
    shard = cast(ray.data.DataIterator, ray.train.get_dataset_shard("train"))
    batches = _started(iterate(shard, batch_size=plan.batch_shape(num_workers).micro_batch, prefetch=plan.prefetch))
    observers: Sequence[Observer] = ()
    if ray.train.get_context().get_world_rank() == 0:
        observers = (Gauges(plan.run_folder), *plan.make_observers())
    trainer = Trainer(
        plan,
        device=ray.train.torch.get_device(),
        checkpoint=checkpoint,
        observers=observers,
        warned=_warned,
        machine_leaves=lambda: ray.train.get_preemption_info() is not None,
    )
    logger.info("model and optimizer are ready, waiting for the first batch")
    ready = time.time()
    result = trainer.train(batches, report=lambda metrics: ray.train.report(metrics))
    _trained.set()
    torch.distributed.destroy_process_group()
    return result | {"ready_at": ready}


def _num_threads() -> int:
    """CPUs of this node for each worker on it."""
    here = ray.get_runtime_context().get_node_id()
    cpus = sum(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, int(cpus // ray.train.get_context().get_local_world_size()))


def _started(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the first is fetched in a thread from now on, so that the stream starts while the model is
    built."""
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, batches, None)
    pool.shutdown(wait=False)

    def all_of_them() -> Iterator[Batch]:
        batch = first.result()
        if batch is not None:
            yield batch
            yield from batches

    return all_of_them()


def _graceful(fit: Callable[[], Any], folder: str) -> Any:
    """Run ``fit`` in a thread, so that signals reach us and not Ray's handler, which aborts without a checkpoint."""
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["value"] = fit()
        except BaseException as error:  # handed to the caller's thread below
            outcome["error"] = error

    thread = threading.Thread(target=target, name="ray-train-fit", daemon=True)
    with _stop_on_signal(folder):
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _has_stepped(run: str, num_earlier: int) -> bool:
    """Whether the newest workers have made a step; the first `num_earlier` starts were of earlier calls."""
    try:
        attempts = read_attempts(run)[num_earlier:]
    except OSError:  # a store that is down does not tell
        return True
    return bool(attempts) and attempts[-1].first_step_at is not None


@contextmanager
def _stop_on_signal(folder: str) -> Iterator[None]:
    """First signal: ask the workers to stop, through a file in the run folder. Second signal: KeyboardInterrupt; so is the first
    one before the workers that are there have made a step: there is nothing to keep, and to start them may take longer than
    whoever stops a job waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    stop, num_earlier = StopFile(folder), len(read_attempts(folder))

    def handle(number: int, _: FrameType | None) -> None:
        if stop.asked():
            raise KeyboardInterrupt
        if not _has_stepped(folder, num_earlier):
            logger.warning("%s: nothing was trained since this start, which ends at once", signal.Signals(number).name)
            raise KeyboardInterrupt
        logger.warning(
            "%s: stopping after this step and writing a checkpoint (again: stop at once)", signal.Signals(number).name
        )
        stop.ask()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.withdraw()


def _folders(folder: str) -> dict[str, Any]:
    newest = list_checkpoints(folder)[-1]
    return {"last_checkpoint": newest, "best_checkpoint": best_checkpoint(folder) or newest}


def _finished(folder: str, checkpoint: Checkpoint) -> dict[str, Any]:
    info, best = checkpoint.info, best_checkpoint(folder)
    return {
        "step": info.step,
        "steps_made": 0,
        "samples_seen": info.samples_seen,
        "num_rejected": info.num_rejected,
        "val_miou": info.val_miou,
        "best_val_miou": None if best is None else read_info(best).val_miou,
        "interrupted": False,
        "seconds": 0.0,
    } | _folders(folder)
