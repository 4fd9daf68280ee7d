"""What Ray Train's controller tells us about the workers, and what we tell it. All of this runs in its process."""

import logging
import threading
import time
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from dfa.train.checkpoint import list_checkpoints
from dfa.train.objective import NonFiniteLossError
from dfa.train.plan import LoopPlan

logger = logging.getLogger(__name__)

_COORDINATOR = "AutoscalingCoordinator"  # Ray's name for who divides the cluster, and for its namespace
_LOOKOUT_S, _LOOK_EVERY_S = 10.0, 1.0  # an attempt that finds no room ends before that
_RAY_LOOKS_AGAIN_S = 1.1  # Ray Train plans with the answer that it got before if that is not a second old


class Failures(ray.train.UserCallback):
    """Ends a run, in Ray Train's controller, when trying again cannot help: an error that the same input gives again, or
    too many failures in a row without a checkpoint between them."""

    def __init__(self, plan: LoopPlan) -> None:
        self._run, self._max = plan.run_folder, plan.max_failures
        self._newest, self._count = "", 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray calls this before it plans the next group of workers; what it raises ends the run."""
        if _look_at_nodes():
            time.sleep(_RAY_LOOKS_AGAIN_S)
        causes = {rank: getattr(error, "cause", None) or error for rank, error in sorted(worker_exceptions.items())}
        for rank, cause in causes.items():
            if isinstance(cause, NonFiniteLossError):
                raise NonFiniteLossError(str(cause))
            if isinstance(cause, ValueError) and not isinstance(cause, OSError):  # a store that failed is both
                raise ValueError(f"training failed on worker {rank}: {str(cause).strip()}")
        if any(getattr(getattr(cause, "health_check_failure", None), "preempted", False) for cause in causes.values()):
            return
        try:
            newest = "".join(list_checkpoints(self._run)[-1:])
        except OSError:  # the store that failed the workers fails here too
            newest = self._newest
        self._count = 1 if newest != self._newest else self._count + 1
        self._newest = newest
        rank, first = next(iter(causes.items()))
        if self._count > self._max:
            raise RuntimeError(
                f"training failed on worker {rank}: {str(first).strip()} (failure {self._count} in a row)"
            )
        logger.warning("worker %d failed, the workers start again: %s", rank, str(first).strip().splitlines()[-1])


_group_size: dict[str, int] = {}


class GroupStarts(WorkerGroupCallback):
    """At each attempt to start a group of workers: notes its size, and has Ray look for lost nodes, which it notices a while
    after their workers are missed. An attempt that counts on a lost node costs the wait for it."""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Ray calls this before it waits for room for the workers."""
        _group_size["now"] = worker_group_context.num_workers
        threading.Thread(target=_look_for_lost_nodes, name="lost-nodes", daemon=True).start()


def _look_for_lost_nodes() -> None:
    """Beside one attempt: each second."""
    end = time.monotonic() + _LOOKOUT_S
    while _look_at_nodes() and time.monotonic() < end:
        time.sleep(_LOOK_EVERY_S)


def _look_at_nodes() -> bool:
    """Let Ray plan with the nodes that are there now: the view that it keeps of them is up to 20 s old. A run of fixed size has
    none, and needs none: False."""
    if not ray.is_initialized():  # asking would start it
        return False
    try:
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    except ValueError:
        return False
    coordinator.get_reserved_resources.remote("", recompute=True)
    return True


def group_size() -> int | None:
    """Workers of the newest start; None before the first."""
    return _group_size.get("now")
