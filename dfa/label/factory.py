"""The label factory on Ray: image shards in, label shards out, each committed by itself.

    image shard -> chunks of images of one size -> scorer actors (model loaded once each) -> CRF tasks -> commit

A chunk is a pure function of its image shard, so the same labels come out of one worker or fifty, at the first attempt
or after a kill: what was committed is skipped, the rest is done again to the same bytes. At most `window` chunks are
between reading and encoding, so neither side floods memory. The model comes as a closure: this module knows scores only.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from dfa.data import storage
from dfa.data.classes import voc_palette
from dfa.data.samples import check_mask_values
from dfa.data.shards import RawSample, SampleRow, ShardIndex, read_samples, read_shard, sha256_of
from dfa.data.transforms import decode_mask, decode_rgb, encode_mask
from dfa.label.output import (
    LabelItem,
    LabelRecord,
    LabelReject,
    LabelReport,
    claim,
    commit,
    committed,
    finish,
    label_json,
)
from dfa.label.scoring import ImageScores, LabelSettings, Tally, UInt8Array, label_image

logger = logging.getLogger(__name__)

_SCORER_SHARE = 0.25  # of a CPU slot; the CRF's tasks reserve the rest, so that one CPU is enough for both
_PROGRESS_EVERY_S = 5.0
_SETTLE_S = 5.0  # what a finished training held comes free within this time


class Scorer(Protocol):
    """Images of one size and their labels (1..C, ascending) -> scores, one for each image; the same at every call."""

    def __call__(self, image_B3HW: Tensor, labels: Sequence[tuple[int, ...]]) -> list[ImageScores]: ...


@dataclass(frozen=True)
class LabelPass:
    """One shard set to label.

    scorer: name among the plan's scorers.
    output: folder of the label shards.
    hash: of all that decides the labels besides the images and `settings`: model, checkpoint, scales, ...
    limit: label the first images only; 0 for all.
    """

    name: str
    scorer: str
    index: ShardIndex
    output: str
    settings: LabelSettings
    hash: str
    max_pixels: int
    limit: int = 0


@dataclass(frozen=True)
class FactoryPlan:
    """What to label, and with what.

    make_scorers is pickled and called once in each actor. A chunk holds at most batch_images images of one size and
    batch_pixels pixels (at least one image).
    """

    make_scorers: Callable[[], Mapping[str, Scorer]]
    passes: tuple[LabelPass, ...]
    use_gpu: bool
    batch_images: int
    batch_pixels: int


@dataclass(frozen=True)
class Slots:
    """How the factory divides what the cluster has free; see `derive_slots`."""

    num_scorers: int
    scorer_cpus: float
    scorer_gpus: float
    crf_cpus: float
    window: int


@dataclass(frozen=True)
class PassResult:
    """A finished pass; images_now and seconds are of this call (0 where all was there)."""

    report: LabelReport
    images_now: int
    seconds: float


@dataclass(frozen=True)
class _Chunk:
    """What one actor call and one CRF task take."""

    path: str
    rows: tuple[SampleRow, ...]
    max_pixels: int
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class _Decoded:
    sample: SampleRow
    image_HW3: UInt8Array
    truth_HW: UInt8Array | None


@dataclass(frozen=True)
class _Scored:
    """A chunk between its two halves: one entry of `scores` for each of `images`."""

    images: tuple[_Decoded, ...]
    scores: tuple[ImageScores, ...]
    rejects: tuple[LabelReject, ...]


@dataclass(frozen=True)
class _ChunkLabels:
    records: tuple[LabelRecord, ...]
    rejects: tuple[LabelReject, ...]
    tally: Tally


@dataclass
class _OpenShard:
    """A label shard in the making; chunks arrive in any order."""

    label_pass: LabelPass
    item: LabelItem
    num_chunks: int
    chunks: dict[int, _ChunkLabels] = field(default_factory=dict)


def derive_slots(*, num_cpus: float, num_gpus: float, use_gpu: bool) -> Slots:
    """Divide free CPUs and GPUs between scorers and CRF tasks.

    One slot a whole CPU (one smaller slot where less than a CPU is free); each slot runs a CRF task and, without GPUs,
    a scorer; with GPUs there is a scorer for each GPU. Both fit beside each other, so neither waits forever.

    Raises:
        ValueError: nothing is free.
    """
    if num_cpus < 0.1 or (use_gpu and num_gpus < 1):
        raise ValueError(
            f"labelling needs a free CPU{' and a GPU' if use_gpu else ''};"
            f" Ray has {num_cpus:g} CPUs and {num_gpus:g} GPUs free"
        )
    slots = max(1, int(num_cpus))
    cpus = min(1.0, num_cpus / slots)
    num_scorers = int(num_gpus) if use_gpu else slots
    # Where GPUs outnumber the CPUs, scorers still take no more than their share.
    scorer_cpus = int(1000 * _SCORER_SHARE * cpus * min(1.0, slots / num_scorers)) / 1000
    crf_cpus = int(1000 * (1 - _SCORER_SHARE) * cpus) / 1000
    return Slots(num_scorers, scorer_cpus, 1.0 if use_gpu else 0.0, crf_cpus, window=2 * (num_scorers + slots))


def run(plan: FactoryPlan) -> dict[str, PassResult]:
    """Label every pass and return its result by name. Ray must run. What was committed before is not done again.

    Raises:
        ValueError: an image shard that is missing, damaged or changed, a folder of other content, a checkpoint that
            does not fit.
    """
    work: list[tuple[LabelPass, LabelItem]] = []
    items: dict[str, list[LabelItem]] = {}
    for each in plan.passes:
        items[each.name] = _items(each)
        claim(each.output, class_names=each.index.class_names, hash=_settings_hash(each))
        work += [(each, item) for item in items[each.name] if committed(each.output, item, each.settings) is None]
    seconds = _Line(plan, _slots(plan), work).run() if work else {}
    results = {}
    for each in plan.passes:
        report = finish(each.output, items[each.name], each.index, each.settings)
        images_now = sum(len(item.rows) for label_pass, item in work if label_pass is each)
        results[each.name] = PassResult(report, images_now, seconds.get(each.name, 0.0))
    return results


def _settings_hash(label_pass: LabelPass) -> str:
    return hashlib.sha256(f"{label_pass.hash} {label_pass.settings!r} {label_pass.max_pixels}".encode()).hexdigest()


def _items(label_pass: LabelPass) -> list[LabelItem]:
    index, common = label_pass.index, _settings_hash(label_pass)
    samples = read_samples(index)[: label_pass.limit or None]
    rows: dict[str, list[SampleRow]] = {}
    for sample in samples:
        rows.setdefault(sample.shard, []).append(sample)
    entries = {entry.name: entry for entry in index.shards}
    found = []
    for shard, part in rows.items():
        digest = hashlib.sha256(f"{common} {shard} {len(part)}".encode()).hexdigest()
        found.append(LabelItem(shard, index.path(shard), entries[shard].sha256, tuple(part), digest))
    return found


def _slots(plan: FactoryPlan) -> Slots:
    total, deadline = ray.cluster_resources(), time.monotonic() + _SETTLE_S
    while (free := ray.available_resources()).get("CPU", 0.0) < total.get("CPU", 0.0) and time.monotonic() < deadline:
        time.sleep(0.1)
    return derive_slots(num_cpus=free.get("CPU", 0.0), num_gpus=free.get("GPU", 0.0), use_gpu=plan.use_gpu)


def chunks_of(rows: Sequence[SampleRow], *, batch_images: int, batch_pixels: int) -> Iterator[tuple[SampleRow, ...]]:
    """Rows of one shard in chunks of one size, in an order that depends on the rows alone."""
    by_size: dict[tuple[int, int], list[SampleRow]] = {}
    for row in rows:
        by_size.setdefault((row.height, row.width), []).append(row)
    for (height, width), group in by_size.items():
        step = max(1, min(batch_images, batch_pixels // (height * width)))
        yield from (tuple(group[start : start + step]) for start in range(0, len(group), step))


class _Line:
    """The assembly line of one call: chunks out, labels in, shards committed."""

    def __init__(self, plan: FactoryPlan, slots: Slots, work: Sequence[tuple[LabelPass, LabelItem]]) -> None:
        self.plan, self.slots, self.work = plan, slots, work
        self.running: dict[Any, tuple[_OpenShard, int, int]] = {}  # result -> shard, chunk, actor
        self.seconds: dict[str, float] = {}
        self.starts: dict[str, float] = {}
        self.num_done, self.num_images = 0, sum(len(item.rows) for _, item in work)
        self.begin = self.told = time.monotonic()

    def run(self) -> dict[str, float]:
        """Returns the seconds from each pass's first chunk to its last commit."""
        num_scorers = min(self.slots.num_scorers, -(-self.num_images // self.plan.batch_images))
        logger.info("%d images in %d shards to label, %s", self.num_images, len(self.work), self.slots)
        options = {
            "num_cpus": self.slots.scorer_cpus,
            "num_gpus": self.slots.scorer_gpus,
            "max_restarts": 3,
            "max_task_retries": 3,
            "scheduling_strategy": "SPREAD",
        }
        actors: list[Any] = [_ScorerActor.options(**options).remote(self.plan.make_scorers) for _ in range(num_scorers)]
        try:
            self._feed(actors)
        except RayTaskError as error:
            # The input is wrong, not Ray: its own message without the remote traceback.
            if isinstance(error.cause, ValueError | FileNotFoundError):
                raise ValueError(str(error.cause)) from error
            raise
        finally:
            for actor in actors:
                ray.kill(actor)
        return self.seconds

    def _feed(self, actors: Sequence[Any]) -> None:
        finish_chunk = _finish_chunk.options(num_cpus=self.slots.crf_cpus)
        load = [0] * len(actors)
        for shard, number, chunk in self._chunks():
            while len(self.running) >= self.slots.window:
                self._collect(load)
            actor = load.index(min(load))
            load[actor] += 1
            scored = actors[actor].score.remote(shard.label_pass.scorer, chunk)
            labels = finish_chunk.remote(scored, chunk.class_names, shard.label_pass.settings)
            self.running[labels] = (shard, number, actor)
        while self.running:
            self._collect(load)

    def _chunks(self) -> Iterator[tuple[_OpenShard, int, _Chunk]]:
        for label_pass, item in self.work:
            _check_image_shard(item)
            self.starts.setdefault(label_pass.name, time.monotonic())
            parts = list(chunks_of(item.rows, batch_images=self.plan.batch_images, batch_pixels=self.plan.batch_pixels))
            shard = _OpenShard(label_pass, item, len(parts))
            for number, rows in enumerate(parts):
                yield (
                    shard,
                    number,
                    _Chunk(item.image_path, rows, label_pass.max_pixels, label_pass.index.class_names),
                )

    def _collect(self, load: list[int]) -> None:
        ready, _ = ray.wait(list(self.running), num_returns=1)
        shard, number, actor = self.running.pop(ready[0])
        load[actor] -= 1
        labels: _ChunkLabels = ray.get(ready[0])
        shard.chunks[number] = labels
        self.num_done += len(labels.records) + len(labels.rejects)
        if len(shard.chunks) == shard.num_chunks:
            self._commit(shard)
        if time.monotonic() - self.told >= _PROGRESS_EVERY_S:
            self._tell(shard.label_pass.name)

    def _commit(self, shard: _OpenShard) -> None:
        ordered = [shard.chunks[number] for number in range(shard.num_chunks)]
        rejects = [reject for chunk in ordered for reject in chunk.rejects]
        for reject in rejects:
            logger.warning("%s, key %s has no label: %s", shard.item.shard, reject.key, reject.reason)
        records = [record for chunk in ordered for record in chunk.records]
        tally = reduce(add, (chunk.tally for chunk in ordered))
        commit(shard.label_pass.output, shard.item, records, rejects, tally)
        shard.chunks.clear()
        name = shard.label_pass.name
        self.seconds[name] = time.monotonic() - self.starts[name]

    def _tell(self, name: str) -> None:
        self.told = time.monotonic()
        rate = self.num_done / (self.told - self.begin)
        left = (self.num_images - self.num_done) / rate if rate else float("inf")
        logger.info(
            "%s: %d of %d images, %.1f images/s, about %.0f s left", name, self.num_done, self.num_images, rate, left
        )


def _check_image_shard(item: LabelItem) -> None:
    if not storage.exists(item.image_path):
        raise ValueError(f"{item.image_path} is missing, though its index lists it")
    if sha256_of(item.image_path) != item.image_sha256:
        raise ValueError(f"{item.image_path} has changed since its index was written; run jobs/shard again")


@ray.remote
class _ScorerActor:
    """Holds the model, decodes and scores chunks."""

    def __init__(self, make_scorers: Callable[[], Mapping[str, Scorer]]) -> None:
        # One thread on any machine: more would compete with the CRF's tasks, and sums would depend on their number.
        torch.set_num_threads(1)
        self._make_scorers = make_scorers
        self._scorers: Mapping[str, Scorer] = {}

    def score(self, scorer: str, chunk: _Chunk) -> _Scored:
        # Built here and not at the start, so that what is wrong with it reaches the driver as it is.
        self._scorers = self._scorers or self._make_scorers()
        images, rejects = _read(chunk)
        if not images:
            return _Scored((), (), tuple(rejects))
        image_BHW3 = torch.from_numpy(np.stack([one.image_HW3 for one in images]))
        with torch.inference_mode():
            scores = self._scorers[scorer](image_BHW3.permute(0, 3, 1, 2), [one.sample.labels for one in images])
        return _Scored(tuple(images), tuple(scores), tuple(rejects))


def _read(chunk: _Chunk) -> tuple[list[_Decoded], list[LabelReject]]:
    images, rejects = [], []
    wanted = {sample.row: sample for sample in chunk.rows}
    for raw in read_shard(chunk.path, wanted=wanted.keys()):
        try:
            images.append(_Decoded(wanted[raw.row], *_decode(raw, chunk)))
        except ValueError as error:
            rejects.append(LabelReject(raw.key, str(error)))
    return images, rejects


def _decode(raw: RawSample, chunk: _Chunk) -> tuple[UInt8Array, UInt8Array | None]:
    """Image and ground truth of a sample; a ValueError says why it cannot be labelled."""
    image_HW3 = decode_rgb(raw.image, max_pixels=chunk.max_pixels)
    if image_HW3.shape[:2] != (raw.height, raw.width):
        raise ValueError(
            f"image is {image_HW3.shape[1]} x {image_HW3.shape[0]}, its label says {raw.width} x {raw.height}"
        )
    if raw.labels and raw.labels[-1] > len(chunk.class_names):
        raise ValueError(f"label {raw.labels[-1]} of a data set with {len(chunk.class_names)} classes")
    if raw.mask is None:
        return image_HW3, None
    truth_HW = decode_mask(raw.mask, max_pixels=chunk.max_pixels)
    if truth_HW.shape != image_HW3.shape[:2]:
        raise ValueError(f"mask {truth_HW.shape} and image {image_HW3.shape[:2]} differ in size (height, width)")
    check_mask_values(truth_HW, num_classes=len(chunk.class_names), where="mask")
    return image_HW3, truth_HW


@ray.remote(max_retries=3)
def _finish_chunk(scored: _Scored, class_names: tuple[str, ...], settings: LabelSettings) -> _ChunkLabels:
    """CRF, encoding and counting of a chunk."""
    torch.set_num_threads(1)
    palette, tally, records = voc_palette(), Tally.zero(settings), []
    for one, scores in zip(scored.images, scored.scores, strict=True):
        labelled = label_image(one.image_HW3, scores, one.truth_HW, settings)
        tally = tally + labelled.tally
        note = label_json(one.sample, class_names, labelled.mask_HW, labelled.confidence)
        records.append(LabelRecord(one.sample.row, one.sample.key, encode_mask(labelled.mask_HW, palette), note))
    return _ChunkLabels(tuple(records), scored.rejects, tally)
