"""The label factory on Ray: image shards in, label shards out, each committed by itself.

    image shard -> batches of one size class -> scorer actors (model loaded once each) -> CRF tasks -> commit

A batch is a pure function of its image shard, so the same labels come out of one worker or fifty, at the first attempt
or after a kill: what was committed is skipped, the rest is done again to the same bytes. Work of an actor, a task or a
node that died is given out again. At most `window` pieces are between reading and encoding, so neither side floods
memory. The model comes as a closure: this module knows scores only.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from dfa.data.shards import BrokenShardError
from dfa.label.claim import Claim
from dfa.label.images import ImagePart, ImageSet, SizeClass, batches_of, problem_of
from dfa.label.output import LabelItem, LabelReport, commit, committed, finish, total_tally
from dfa.label.scoring import LabelSettings
from dfa.label.slots import Share, check_nodes, derive_slots, read_capacity, scorer_place
from dfa.label.work import Batch, Piece, PieceLabels, Scorer, finish_piece, keep_freed_memory, score_batch

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 5.0
_MAX_ATTEMPTS = 6  # of a batch whose actor, task or node died


@dataclass(frozen=True)
class LabelPass:
    """One data set to label.

    scorer: name among the plan's scorers.
    output: folder of the label shards.
    hash: of all that decides the labels besides the images and `settings`: model, checkpoint, scales, ...
    limit: label the first images only; 0 for all.
    origin: address of the images, where `output` must not be given to others; see `dfa.label.claim`.
    """

    name: str
    scorer: str
    images: ImageSet
    output: str
    settings: LabelSettings
    hash: str
    max_pixels: int
    size_class: SizeClass
    limit: int = 0
    origin: str = ""

    @property
    def claim(self) -> Claim:
        """What the folder shall hold."""
        return Claim(self.output, self.images.class_names, _settings_hash(self), self.images.plan_hash, self.origin)


@dataclass(frozen=True)
class FactoryPlan:
    """What to label, and with what.

    make_scorers is pickled and called once in each actor. A batch holds at most batch_images images of one size class and
    batch_pixels pixels (at least one image); its CRF tasks take crf_images each.
    """

    make_scorers: Callable[[], Mapping[str, Scorer]]
    passes: tuple[LabelPass, ...]
    share: Share
    batch_images: int
    batch_pixels: int
    crf_images: int


@dataclass(frozen=True)
class PassResult:
    """A finished pass; the numbers are of this call (0 where all was there).

    images_now: images that got a label, rejects not among them. seconds: from its first batch to its last commit. work_s:
    seconds of all workers by kind of work: read, cam, crf, encode.
    """

    report: LabelReport
    images_now: int
    seconds: float
    work_s: Mapping[str, float]


@dataclass
class _OpenShard:
    """A label shard in the making; pieces arrive in any order."""

    label_pass: LabelPass
    item: LabelItem
    part: ImagePart
    begin_s: float
    num_pieces: int
    pieces: dict[int, PieceLabels] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True)
class _Job:
    """One piece on its way: the number-th of its shard, the place-th of its batch."""

    shard: _OpenShard
    batch: Batch
    number: int
    place: int
    actor: int
    attempt: int


def run(plan: FactoryPlan) -> dict[str, PassResult]:
    """Label every pass and return its result by name. Ray must run. What was committed before is not done again.

    A shard that is missing, damaged or changed does not keep the others from being labelled; it is reported at the end.

    Raises:
        ValueError: image shards that cannot be used, a folder of other content, of another job or that cannot be written,
            a checkpoint that does not fit.
        RuntimeError: a batch lost its workers again and again.
    """
    items, todo = {each.name: _items(each) for each in plan.passes}, dict[str, dict[str, LabelItem]]()
    with ExitStack() as folders:
        for each in plan.passes:
            folders.enter_context(each.claim.held())
            missing = (item for item in items[each.name] if committed(each.output, item, each.settings) is None)
            todo[each.name] = {item.shard: item for item in missing}
            if todo[each.name]:
                each.claim.reopen()
        line = _Line(plan, todo)
        if any(todo.values()):
            line.run()
        return {each.name: _result(each, items[each.name], line) for each in plan.passes}


def _result(each: LabelPass, items: list[LabelItem], line: "_Line") -> PassResult:
    name = each.name
    report = finish(each.output, items, each.images.class_names, each.images.plan_hash, each.settings)
    now = line.num_labelled.get(name, 0), line.seconds.get(name, 0.0), line.work_s.get(name, {})
    return PassResult(report, *now)


def _settings_hash(label_pass: LabelPass) -> str:
    # Without the extra maps: shards that have them serve those who do not ask for them.
    settings = replace(label_pass.settings, soft=False, confidence=False)
    return hashlib.sha256(f"{label_pass.hash} {settings!r} {label_pass.max_pixels}".encode()).hexdigest()


def _items(label_pass: LabelPass) -> list[LabelItem]:
    """One item a shard, from the index alone: no rows are held for shards whose turn has not come."""
    common, left, found = _settings_hash(label_pass), label_pass.limit or label_pass.images.num_samples, []
    for entry in label_pass.images.shards:
        num_rows = min(entry.num_samples, left)
        if not num_rows:
            break
        left -= num_rows
        digest = hashlib.sha256(f"{common} {entry.name} {num_rows}".encode()).hexdigest()
        found.append(LabelItem(entry.name, entry.sha256, num_rows, digest))
    return found


class _Line:
    """The assembly line of one call: batches out, labels in, shards committed."""

    def __init__(self, plan: FactoryPlan, todo: Mapping[str, Mapping[str, LabelItem]]) -> None:
        self.plan, self.todo = plan, todo
        self.running: dict[Any, _Job] = {}  # by the reference of the piece's labels
        self.actors: dict[int, Any] = {}
        self.load: dict[int, int] = {}  # pieces that each actor has taken and that are not finished
        self.num_hired = 0
        self.problems: list[str] = []
        self.seconds: dict[str, float] = {}
        self.work_s: dict[str, dict[str, float]] = {}
        self.starts: dict[str, float] = {}
        self.num_labelled: dict[str, int] = {}
        self.num_done, self.num_images = 0, sum(item.num_rows for part in todo.values() for item in part.values())
        self.begin = self.told = time.monotonic()

    def run(self) -> None:
        """Label all, commit what can be, then raise for what could not."""
        self.start = read_capacity(self.plan.share, settle=True)
        self.slots = derive_slots(self.start.free, self.plan.share)
        check_nodes(self.slots, self.plan.share)
        num_shards = sum(map(len, self.todo.values()))
        logger.info("%d images in %d shards to label, %s", self.num_images, num_shards, self.slots)
        try:
            self._hire()
            for job in self._jobs():
                while len(self.running) >= self.slots.window(-(-self.plan.batch_images // self.plan.crf_images)):
                    self._collect()
                self._submit(job)
            while self.running:
                self._collect()
        finally:
            for actor in self.actors.values():
                ray.kill(actor)
        self._tell()
        if self.problems:
            shown = "; ".join(self.problems[:5]) + ("; ..." if len(self.problems) > 5 else "")
            raise ValueError(
                f"{len(self.problems)} of {num_shards} shards have no labels, the others are done: {shown}"
            )

    def _hire(self) -> None:
        """As many scorers as the slots hold and the images want."""
        slots, wanted = self.slots, max(1, -(-self.num_images // self.plan.batch_images))
        options: dict[str, Any] = {"num_cpus": slots.scorer_cpus, "num_gpus": slots.scorer_gpus}
        while len(self.actors) < min(slots.num_scorers, wanted):
            options["scheduling_strategy"] = scorer_place(self.plan.share, self.num_hired)
            threads = max(1, int(slots.scorer_cpus))
            actor = _ScorerActor.options(**options).remote(self.plan.make_scorers, threads, slots.scorer_gpus > 0)
            self.actors[self.num_hired], self.load[self.num_hired] = actor, 0
            self.num_hired += 1

    def _dismiss(self, number: int) -> None:
        if number in self.actors:
            ray.kill(self.actors.pop(number))
            del self.load[number]

    def _jobs(self) -> Iterator[_Job]:
        plan = self.plan
        for label_pass in plan.passes:
            todo, images = self.todo[label_pass.name], label_pass.images
            for entry, rows in images.samples(label_pass.limit or None) if todo else ():
                if entry.name not in todo:
                    continue
                part = images.part(entry)
                common = (images.class_names, label_pass.settings, label_pass.max_pixels, plan.crf_images)
                batches = [
                    Batch(part, each, *common)
                    for each in batches_of(
                        rows,
                        size_class=label_pass.size_class,
                        batch_images=plan.batch_images,
                        batch_pixels=plan.batch_pixels,
                    )
                ]
                now = time.monotonic()
                self.starts.setdefault(label_pass.name, now)
                num_pieces = sum(batch.num_pieces for batch in batches)
                shard = _OpenShard(label_pass, todo[entry.name], part, now, num_pieces)
                number = 0
                for batch in batches:
                    yield _Job(shard, batch, number, 0, -1, 1)
                    number += batch.num_pieces

    def _submit(self, job: _Job, only: int | None = None) -> None:
        """Score the job's batch and finish its pieces, or the one at place `only`."""
        if job.shard.failed:
            return
        actor, batch = min(self.load, key=lambda number: self.load[number]), job.batch
        score = self.actors[actor].score.options(num_returns=batch.num_pieces)
        scored = score.remote(job.shard.label_pass.scorer, batch)
        places = range(batch.num_pieces) if only is None else (only,)
        options: dict[str, Any] = {"num_cpus": self.slots.crf_cpus}
        if self.plan.share.crf_resource:
            options["resources"] = {self.plan.share.crf_resource: 0.001}
        for place in places:
            labels = _finish_piece.options(**options).remote(scored if batch.num_pieces == 1 else scored[place])
            number = job.number + (place if only is None else 0)
            self.running[labels] = _Job(job.shard, batch, number, place, actor, job.attempt)
            self.load[actor] += 1

    def _collect(self) -> None:
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=_PROGRESS_EVERY_S)
        for reference in ready:
            job = self.running.pop(reference)
            if job.actor in self.load:
                self.load[job.actor] -= 1
            self._receive(job, reference)
        if time.monotonic() - self.told >= _PROGRESS_EVERY_S:
            self._tell()
            self._adapt()

    def _receive(self, job: _Job, reference: Any) -> None:
        shard = job.shard
        try:
            labels: PieceLabels = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, BrokenShardError):
                self._fail(shard, str(error.cause))
                return
            if isinstance(error.cause, ValueError | FileNotFoundError):
                # The input is wrong, not Ray: its own message without the remote traceback.
                raise ValueError(str(error.cause)) from error
            if not isinstance(error.cause, RayError):
                raise
            self._again(job, error)
            return
        except RayError as error:
            self._again(job, error)
            return
        shard.pieces[job.number] = labels
        self.num_done += len(labels.records) + len(labels.rejects)
        if len(shard.pieces) == shard.num_pieces and not shard.failed:
            self._commit(shard)

    def _again(self, job: _Job, error: RayError) -> None:
        """A worker or node was lost: its piece is given out again, scored in the same batch, hence to the same bytes."""
        reason = _reason(error)
        if job.attempt == _MAX_ATTEMPTS:
            keys = [row.key for row in job.batch.rows]
            raise RuntimeError(
                f"the batch {keys[:4]} of {job.shard.part.address} lost its workers {_MAX_ATTEMPTS} times; smaller"
                f" label.batch_size, label.batch_pixels or label.crf_images need less memory. Last: {reason}"
            ) from error
        logger.warning("%s: a piece is done again after %s: %s", job.shard.item.shard, type(error).__name__, reason)
        if isinstance(error, RayActorError) or isinstance(getattr(error, "cause", None), RayActorError):
            self._dismiss(job.actor)
            self._hire()
        self._submit(_Job(job.shard, job.batch, job.number, job.place, -1, job.attempt + 1), only=job.place)

    def _fail(self, shard: _OpenShard, problem: str) -> None:
        if not shard.failed:
            logger.error("%s cannot be labelled: %s", shard.item.shard, problem)
            self.problems.append(problem)
        shard.failed = True
        shard.pieces.clear()

    def _commit(self, shard: _OpenShard) -> None:
        item, name = shard.item, shard.label_pass.name
        if problem := problem_of(shard.part, item.image_sha256):
            self._fail(shard, problem)
            return
        ordered = [shard.pieces[number] for number in range(shard.num_pieces)]
        rejects = [reject for piece in ordered for reject in piece.rejects]
        for reject in rejects:
            logger.warning("%s, key %s has no label: %s", item.shard, reject.key, reject.reason)
        records = [record for piece in ordered for record in piece.records]
        tally = total_tally([piece.tally for piece in ordered], shard.label_pass.settings)
        now, total = time.monotonic(), self.work_s.setdefault(name, {})
        timings: dict[str, float] = {}
        for piece in ordered:
            for kind, seconds in piece.seconds.items():
                timings[kind] = timings.get(kind, 0.0) + seconds
                total[kind] = total.get(kind, 0.0) + seconds
        timings = {f"{kind}_s": seconds for kind, seconds in timings.items()} | {"wall_s": now - shard.begin_s}
        shard.label_pass.claim.check()
        commit(shard.label_pass.output, item, shard.label_pass.settings, records, rejects, tally, timings)
        shard.pieces.clear()
        self.num_labelled[name] = self.num_labelled.get(name, 0) + len(records)
        self.seconds[name] = time.monotonic() - self.starts[name]

    def _adapt(self) -> None:
        """Nodes that joined or left: more scorers or fewer, another window."""
        slots = derive_slots(read_capacity(self.plan.share).grown_since(self.start), self.plan.share, at_least_one=True)
        if slots == self.slots:
            return
        logger.info("the cluster has changed: %s", slots)
        self.slots = slots
        # The last ones hired may wait for a node that is gone; what they were given comes back as an error, and is done again.
        for number in sorted(self.actors)[slots.num_scorers :]:
            self._dismiss(number)
        self._hire()

    def _tell(self) -> None:
        self.told = time.monotonic()
        rate = self.num_done / (self.told - self.begin)
        left = f", {rate:.1f} images/s, about {(self.num_images - self.num_done) / rate:.0f} s left" if rate else ""
        logger.info("%d of %d images labelled%s", self.num_done, self.num_images, left)


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
