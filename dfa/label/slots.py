"""How the label factory divides what a Ray cluster has free between scorers and CRF tasks, and the pool that works there."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray._private.state import available_resources_per_node  # the public call knows sums over all nodes only
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dfa.data.shards import BrokenShardError
from dfa.label.work import (
    Batch,
    LostWorkerError,
    Piece,
    PieceLabels,
    Scorer,
    finish_piece,
    keep_freed_memory,
    score_batch,
)

logger = logging.getLogger(__name__)

_SCORER_CPUS = 0.25  # of a CPU slot; the CRF's tasks reserve the rest, so that one CPU is enough for both
_SETTLE_S = 5.0  # what a finished training held comes free within this time


class NothingFreeError(ValueError):
    """What labelling asks for is not free on the cluster now."""


@dataclass(frozen=True)
class Share:
    """What the user wants of the cluster; 0 and "" leave it to the factory.

    num_scorers: actors that hold the model. scorer_cpus, scorer_gpus: what each reserves; 0.25 GPU lets four share one.
    crf_cpus: what a CRF task reserves. crf_resource: custom Ray resource of the nodes that CRF tasks may run on.
    """

    use_gpu: bool = False
    num_scorers: int = 0
    scorer_cpus: float = 0.0
    scorer_gpus: float = 1.0
    crf_cpus: float = 0.0
    crf_resource: str = ""


@dataclass(frozen=True)
class Free:
    """CPUs and GPUs of the nodes for scorers, and CPUs of the nodes for the CRF alone (0 where they are the same)."""

    cpus: float
    gpus: float
    crf_cpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """What the cluster has, and what of it was free when this was read."""

    total: Free
    free: Free

    def grown_since(self, start: "Capacity") -> Free:
        """What was free at the start, and what nodes have brought or taken since. (What is free now says less: our own
        tasks hold most of it.)"""
        names = Free.__dataclass_fields__
        change = {name: getattr(self.total, name) - getattr(start.total, name) for name in names}
        return Free(**{name: max(0.0, getattr(start.free, name) + change[name]) for name in names})


@dataclass(frozen=True)
class Slots:
    """The division; see `derive_slots`. num_crf: CRF tasks that run at a time."""

    num_scorers: int
    scorer_cpus: float
    scorer_gpus: float
    num_crf: int
    crf_cpus: float

    def window(self, pieces_per_batch: int) -> int:
        """Pieces that may be between reading and encoding: a batch for each scorer (a second one waits where a GPU must
        not), and two pieces for each CRF task. This bounds memory and keeps all busy."""
        return self.num_scorers * pieces_per_batch * (2 if self.scorer_gpus else 1) + 2 * self.num_crf


def read_capacity(share: Share, *, settle: bool = False) -> Capacity:
    """What Ray's nodes have. settle: wait a little for what a job before this one still holds."""
    deadline = time.monotonic() + (_SETTLE_S if settle else 0.0)
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        if free.get("CPU", 0.0) >= total.get("CPU", 0.0) or time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    everything = Free(total.get("CPU", 0.0), total.get("GPU", 0.0))
    unused = Free(free.get("CPU", 0.0), free.get("GPU", 0.0))
    if share.crf_resource:
        marked, free_by_node = _nodes(share)[1], available_resources_per_node()
        all_cpus = sum(node["Resources"].get("CPU", 0.0) for node in marked)
        free_cpus = sum(free_by_node.get(node["NodeID"], {}).get("CPU", 0.0) for node in marked)
        everything, unused = _apart(everything, all_cpus), _apart(unused, free_cpus)
    return Capacity(everything, unused)


def _apart(cluster: Free, crf_cpus: float) -> Free:
    return replace(cluster, cpus=max(0.0, cluster.cpus - crf_cpus), crf_cpus=crf_cpus)


def _nodes(share: Share) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The nodes that are there for scorers and those for the CRF, which are the same without `share.crf_resource`."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    if not share.crf_resource:
        return alive, alive
    marked = [node for node in alive if share.crf_resource in node["Resources"]]
    return [node for node in alive if share.crf_resource not in node["Resources"]], marked


def scorer_place(share: Share, number: int) -> Any:
    """Ray's scheduling strategy of the `number`-th scorer: spread, but never on a node that is for the CRF alone."""
    if not share.crf_resource:
        return "SPREAD"
    name = "GPU" if share.use_gpu else "CPU"
    nodes = sorted(node["NodeID"] for node in _nodes(share)[0] if node["Resources"].get(name, 0.0) > 0)
    if not nodes:
        raise ValueError(f"label.crf_resource={share.crf_resource!r}: every node with a {name} is for the CRF alone")
    return NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=False)


def check_nodes(slots: Slots, share: Share) -> None:
    """Raise a ValueError where a scorer or a CRF task asks for more CPUs than any one node has: Ray would wait for ever."""
    wanted = ("label.scorer_cpus", slots.scorer_cpus), ("label.crf_cpus", slots.crf_cpus)
    for (field, cpus), nodes in zip(wanted, _nodes(share), strict=True):
        largest = max((node["Resources"].get("CPU", 0.0) for node in nodes), default=0.0)
        if cpus > largest:
            raise ValueError(f"{field} is {cpus:g}, the largest node for it has {largest:g} CPUs")


def derive_slots(free: Free, share: Share, *, at_least_one: bool = False) -> Slots:
    """Divide free CPUs and GPUs between scorers and CRF tasks.

    By itself: one slot a whole CPU (one smaller slot where less than a CPU is free); each slot runs a CRF task and,
    without GPUs, a scorer; with GPUs there are as many scorers as GPUs hold. Both fit beside each other, so neither waits
    for ever. With `share.crf_resource`, scorers have their nodes for themselves and CRF tasks theirs.

    at_least_one: never fail; what is there may come back.

    Raises:
        NothingFreeError: nothing is free, or what is asked for does not fit.
    """
    nothing = free.cpus < 0.1 or (share.use_gpu and free.gpus < share.scorer_gpus)
    if share.crf_resource and free.crf_cpus < max(0.1, share.crf_cpus):
        nothing = True
    if nothing and not at_least_one:
        raise NothingFreeError(
            f"labelling needs a free CPU{f' and {share.scorer_gpus:g} of a GPU' if share.use_gpu else ''}"
            f"{f' and a node with the resource {share.crf_resource!r}' if share.crf_resource else ''};"
            f" Ray has {free.cpus:g} CPUs and {free.gpus:g} GPUs free"
            f"{f', {free.crf_cpus:g} CPUs on such nodes' if share.crf_resource else ''}"
            f"{'; without a GPU set train.use_gpu=false' if share.use_gpu else ''}"
        )
    slots = max(1, int(free.cpus))
    cpus = min(1.0, free.cpus / slots) if free.cpus >= 0.1 else 1.0
    num_scorers = share.num_scorers or max(1, int(free.gpus / share.scorer_gpus + 1e-9) if share.use_gpu else slots)
    # Where GPUs outnumber the CPUs, scorers still take no more than their share.
    scorer_cpus = share.scorer_cpus or _floor(_SCORER_CPUS * cpus * min(1.0, slots / num_scorers))
    if share.crf_resource:
        crf_cpus = share.crf_cpus or min(1.0, free.crf_cpus or 1.0)
        num_crf = max(1, int(free.crf_cpus / crf_cpus))
    else:
        left = free.cpus - num_scorers * scorer_cpus
        crf_cpus = share.crf_cpus or _floor(min(left / slots, (1 - _SCORER_CPUS) * cpus))
        if not at_least_one and (crf_cpus <= 0 or left + 1e-9 < crf_cpus):
            raise NothingFreeError(
                f"label.scorers={num_scorers} x label.scorer_cpus={scorer_cpus:g} and a CRF task of"
                f" label.crf_cpus={max(0.0, crf_cpus):g} do not fit on the {free.cpus:g} CPUs that are free"
            )
        crf_cpus = crf_cpus if crf_cpus > 0 else _floor((1 - _SCORER_CPUS) * cpus)
        num_crf = max(1, int(left / crf_cpus + 1e-9))
    gpus = share.scorer_gpus if share.use_gpu else 0.0
    return Slots(num_scorers, scorer_cpus, gpus, num_crf, crf_cpus)


def _floor(cpus: float) -> float:
    """Ray counts CPUs in thousandths at best."""
    return int(1000 * cpus) / 1000


class RayPool:
    """Scorer actors, with the model loaded once in each, and CRF tasks, on what Ray has free. Ray must run.

    A worker that dies is replaced; nodes that join or leave change how many there are.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._running: dict[Any, int] = {}  # the actor of each piece, by the reference of the piece's labels
        self._actors: dict[int, Any] = {}
        self._load: dict[int, int] = {}  # pieces that each actor has taken and that are not finished
        self._num_hired = 0

    def start(self, make_scorers: Callable[[], Mapping[str, Scorer]], num_batches: int) -> str:
        self._make_scorers, self._num_batches = make_scorers, num_batches
        self._start = read_capacity(self._share, settle=True)
        self._slots = derive_slots(self._start.free, self._share)
        check_nodes(self._slots, self._share)
        self._hire()
        return str(self._slots)

    def window(self, pieces_per_batch: int) -> int:
        return self._slots.window(pieces_per_batch)

    def _hire(self) -> None:
        """As many scorers as the slots hold and the batches want."""
        slots = self._slots
        options: dict[str, Any] = {"num_cpus": slots.scorer_cpus, "num_gpus": slots.scorer_gpus}
        while len(self._actors) < min(slots.num_scorers, max(1, self._num_batches)):
            options["scheduling_strategy"] = scorer_place(self._share, self._num_hired)
            threads = max(1, int(slots.scorer_cpus))
            actor = _ScorerActor.options(**options).remote(self._make_scorers, threads, slots.scorer_gpus > 0)
            self._actors[self._num_hired], self._load[self._num_hired] = actor, 0
            self._num_hired += 1

    def _dismiss(self, number: int) -> None:
        if number in self._actors:
            ray.kill(self._actors.pop(number))
            del self._load[number]

    def submit(self, scorer: str, batch: Batch, places: Sequence[int]) -> list[Any]:
        number = min(self._load, key=lambda each: self._load[each])
        scored = self._actors[number].score.options(num_returns=batch.num_pieces).remote(scorer, batch)
        options: dict[str, Any] = {"num_cpus": self._slots.crf_cpus}
        if self._share.crf_resource:
            options["resources"] = {self._share.crf_resource: 0.001}
        given = [
            _finish_piece.options(**options).remote(scored if batch.num_pieces == 1 else scored[place])
            for place in places
        ]
        self._running |= dict.fromkeys(given, number)
        self._load[number] += len(given)
        return given

    def finished(self, tickets: Iterable[Any], wait_s: float) -> list[Any]:
        ready, _ = ray.wait(list(tickets), num_returns=1, timeout=wait_s)
        return ready

    def labels(self, ticket: Any) -> PieceLabels:
        number = self._running.pop(ticket)
        if number in self._load:
            self._load[number] -= 1
        try:
            return ray.get(ticket)
        except RayTaskError as error:
            if isinstance(error.cause, BrokenShardError):
                raise BrokenShardError(str(error.cause)) from error
            if isinstance(error.cause, ValueError | FileNotFoundError):
                # The input is wrong, not Ray: its own message without the remote traceback.
                raise ValueError(str(error.cause)) from error
            if not isinstance(error.cause, RayError):
                raise
            raise self._lost(number, error) from error
        except RayError as error:
            raise self._lost(number, error) from error

    def _lost(self, number: int, error: RayError) -> LostWorkerError:
        """Replace the actor, if it was the actor that died."""
        if isinstance(error, RayActorError) or isinstance(getattr(error, "cause", None), RayActorError):
            self._dismiss(number)
            self._hire()
        return LostWorkerError(type(error).__name__, _reason(error))

    def adapt(self) -> None:
        """Nodes that joined or left: more scorers or fewer, another window."""
        grown = read_capacity(self._share).grown_since(self._start)
        slots = derive_slots(grown, self._share, at_least_one=True)
        if slots == self._slots:
            return
        logger.info("the cluster has changed: %s", slots)
        self._slots = slots
        # The last ones hired may wait for a node that is gone; what they were given comes back as an error, and is done again.
        for number in sorted(self._actors)[slots.num_scorers :]:
            self._dismiss(number)
        self._hire()

    def stop(self) -> None:
        for number in list(self._actors):
            self._dismiss(number)


def _reason(error: RayError) -> str:
    """What happened to a worker, in one line: the first of the innermost error that is not Ray's heading of it."""
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, RayError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip() and not line.startswith("ray::")]
    return lines[0] if lines else type(cause).__name__


@ray.remote
class _ScorerActor:
    """Holds the model, decodes and scores batches."""

    def __init__(self, make_scorers: Callable[[], Mapping[str, Scorer]], threads: int, on_gpu: bool) -> None:
        # One thread on any machine: more would compete with the CRF's tasks, and sums would depend on their number.
        torch.set_num_threads(1)
        self._make_scorers, self._scorers = make_scorers, dict[str, Scorer]()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._clock = time.perf_counter if on_gpu else time.thread_time

    def score(self, scorer: str, batch: Batch) -> list[Piece] | Piece:
        # Built here and not at the start, so that what is wrong with it reaches the driver as it is.
        if not self._scorers:
            self._scorers = dict(self._make_scorers())
        pieces = score_batch(batch, self._scorers[scorer], self._pool, self._clock)
        return pieces[0] if len(pieces) == 1 else pieces


@ray.remote(max_retries=3)
def _finish_piece(piece: Piece) -> PieceLabels:
    torch.set_num_threads(1)
    keep_freed_memory()
    return finish_piece(piece)
