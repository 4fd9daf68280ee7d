"""The label factory: image shards in, label shards out, each committed by itself.

    image shard -> batches of one size class -> scorers (model loaded once each) -> CRF -> commit

A pool does the work: on Ray with actors for the scorers and tasks for the CRF (`dfa.label.slots`), or in this process.
A batch is a pure function of its image shard, so the same labels come out of one worker or fifty, at the first attempt
or after a kill: what was committed is skipped, the rest is done again to the same bytes. Work of a worker or a
node that died is given out again. At most `window` pieces are between reading and encoding, so neither side floods
memory. The model comes as a closure: this module knows scores only.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from dfa.data.shards import BrokenShardError
from dfa.label.claim import Claim
from dfa.label.images import ImagePart, ImageSet, SizeClass, batches_of, problem_of
from dfa.label.output import LabelItem, LabelReport, commit, committed, finish, total_tally
from dfa.label.scoring import LabelSettings
from dfa.label.slots import RayPool, Share
from dfa.label.work import Batch, LostWorkerError, PieceLabels, Pool, Scorer

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 5.0
_MAX_ATTEMPTS = 6  # of a batch whose worker or node died


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

    make_scorers is pickled and called once in each worker that scores. share: what to take of the cluster. A batch holds at
    most batch_images images of one size class and batch_pixels pixels (at least one image); its CRF tasks take crf_images
    each.
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
    attempt: int


def run(plan: FactoryPlan, pool: Pool | None = None) -> dict[str, PassResult]:
    """Label every pass and return its result by name. What was committed before is not done again.

    pool: who works; None: the plan's share of Ray, which must run.

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
        line = _Line(plan, todo, pool or RayPool(plan.share))
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

    def __init__(self, plan: FactoryPlan, todo: Mapping[str, Mapping[str, LabelItem]], pool: Pool) -> None:
        self.plan, self.todo, self.pool = plan, todo, pool
        self.running: dict[Hashable, _Job] = {}  # by the ticket of the piece
        self.problems: list[str] = []
        self.seconds: dict[str, float] = {}
        self.work_s: dict[str, dict[str, float]] = {}
        self.starts: dict[str, float] = {}
        self.num_labelled: dict[str, int] = {}
        self.num_done, self.num_images = 0, sum(item.num_rows for part in todo.values() for item in part.values())
        self.begin = self.told = time.monotonic()

    def run(self) -> None:
        """Label all, commit what can be, then raise for what could not."""
        plan, num_shards = self.plan, sum(map(len, self.todo.values()))
        try:
            workers = self.pool.start(plan.make_scorers, -(-self.num_images // plan.batch_images))
            logger.info("%d images in %d shards to label, %s", self.num_images, num_shards, workers)
            for job in self._jobs():
                while len(self.running) >= self.pool.window(-(-plan.batch_images // plan.crf_images)):
                    self._collect()
                self._submit(job)
            while self.running:
                self._collect()
        finally:
            self.pool.stop()
        self._tell()
        if self.problems:
            shown = "; ".join(self.problems[:5]) + ("; ..." if len(self.problems) > 5 else "")
            raise ValueError(
                f"{len(self.problems)} of {num_shards} shards have no labels, the others are done: {shown}"
            )

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
                    yield _Job(shard, batch, number, 0, 1)
                    number += batch.num_pieces

    def _submit(self, job: _Job, only: int | None = None) -> None:
        """Score the job's batch and finish its pieces, or the one at place `only`."""
        if job.shard.failed:
            return
        places = range(job.batch.num_pieces) if only is None else (only,)
        tickets = self.pool.submit(job.shard.label_pass.scorer, job.batch, places)
        for ticket, place in zip(tickets, places, strict=True):
            number = job.number + (place if only is None else 0)
            self.running[ticket] = replace(job, number=number, place=place)

    def _collect(self) -> None:
        for ticket in self.pool.finished(self.running, _PROGRESS_EVERY_S):
            self._receive(self.running.pop(ticket), ticket)
        if time.monotonic() - self.told >= _PROGRESS_EVERY_S:
            self._tell()
            self.pool.adapt()

    def _receive(self, job: _Job, ticket: Hashable) -> None:
        shard = job.shard
        try:
            labels = self.pool.labels(ticket)
        except BrokenShardError as error:
            self._fail(shard, str(error))
            return
        except LostWorkerError as error:
            self._again(job, error)
            return
        shard.pieces[job.number] = labels
        self.num_done += len(labels.records) + len(labels.rejects)
        if len(shard.pieces) == shard.num_pieces and not shard.failed:
            self._commit(shard)

    def _again(self, job: _Job, error: LostWorkerError) -> None:
        """A worker or node was lost: its piece is given out again, scored in the same batch, hence to the same bytes."""
        if job.attempt == _MAX_ATTEMPTS:
            keys = [row.key for row in job.batch.rows]
            raise RuntimeError(
                f"the batch {keys[:4]} of {job.shard.part.address} lost its workers {_MAX_ATTEMPTS} times; smaller"
                f" label.batch_size, label.batch_pixels or label.crf_images need less memory. Last: {error.reason}"
            ) from error
        logger.warning("%s: a piece is done again after %s", job.shard.item.shard, error)
        self._submit(replace(job, attempt=job.attempt + 1), only=job.place)

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

    def _tell(self) -> None:
        self.told = time.monotonic()
        rate = self.num_done / (self.told - self.begin)
        left = f", {rate:.1f} images/s, about {(self.num_images - self.num_done) / rate:.0f} s left" if rate else ""
        logger.info("%d of %d images labelled%s", self.num_done, self.num_images, left)
