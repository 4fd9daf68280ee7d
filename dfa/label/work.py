"""What the factory's workers do with a batch: read and score it, then CRF, encoding and counting of its images.

Plain functions of their arguments: the same batch gives the same bytes on any worker and at any attempt. A `Pool` runs
them: `LocalPool` in this process, `dfa.label.slots.RayPool` on all that a Ray cluster has free.
"""

import ctypes
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dfa.clip.encoder import TooLargeError
from dfa.data.classes import voc_palette
from dfa.data.samples import check_mask_values
from dfa.data.shards import BrokenShardError, RawSample, SampleRow
from dfa.data.transforms import LabelArray, UInt8Array, decode_mask, decode_rgb, encode_grey, encode_mask
from dfa.label.images import ImagePart
from dfa.label.output import (
    CONFIDENCE_EXTENSION,
    MASK_EXTENSION,
    SOFT_EXTENSION,
    LabelRecord,
    LabelReject,
    describe,
    judge,
    total_tally,
)
from dfa.label.scoring import MODEL_EXTENSION, ImageScores, LabelSettings, Tally, label_image

NO_LABEL = "no image-level label"
"""How the reason starts for which `LabelSettings.skip_unlabelled` leaves an image out."""


_KEPT_BYTES = 512 * 2**20
_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Scorer(Protocol):
    """Images of one size class (3 x H x W uint8 each) and their labels (1..C, ascending) -> scores, one for each image;
    the same at every call."""

    def __call__(self, images: Sequence[Tensor], labels: Sequence[tuple[int, ...]]) -> list[ImageScores]: ...


@dataclass(frozen=True)
class Batch:
    """What a scorer takes at once. crf_images: how many of its images go to one CRF task."""

    part: ImagePart
    rows: tuple[SampleRow, ...]
    class_names: tuple[str, ...]
    settings: LabelSettings
    max_pixels: int
    crf_images: int

    @property
    def num_pieces(self) -> int:
        return -(-len(self.rows) // self.crf_images)


@dataclass(frozen=True)
class Decoded:
    """One image, and its ground truth where the shard holds one."""

    sample: SampleRow
    image_HW3: UInt8Array
    truth_HW: LabelArray | None


@dataclass(frozen=True)
class Piece:
    """A part of a scored batch: one entry of `scores` for each of `images`. seconds: spent on the whole batch so far,
    in its first piece alone."""

    images: tuple[Decoded, ...]
    scores: tuple[ImageScores, ...]
    rejects: tuple[LabelReject, ...]
    class_names: tuple[str, ...]
    settings: LabelSettings
    seconds: dict[str, float]


@dataclass(frozen=True)
class PieceLabels:
    """The labels of a piece. seconds: processor seconds by kind of work."""

    records: tuple[LabelRecord, ...]
    rejects: tuple[LabelReject, ...]
    tally: Tally
    seconds: dict[str, float]


class LostWorkerError(RuntimeError):
    """The worker or the node of a piece died: whoever gave the piece out may give it out again. reason: in one line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.reason = reason


class Pool(Protocol):
    """Who works for the factory. A ticket stands for a piece that was given out."""

    def start(self, make_scorers: Callable[[], Mapping[str, Scorer]], num_batches: int) -> str:
        """Get ready for about so many batches; returns who works, for the log."""
        ...

    def window(self, pieces_per_batch: int) -> int:
        """How many pieces may be out at a time."""
        ...

    def submit(self, scorer: str, batch: Batch, places: Sequence[int]) -> Sequence[Hashable]:
        """Give out the pieces at `places` of a batch; one ticket for each."""
        ...

    def finished(self, tickets: Iterable[Hashable], wait_s: float) -> Sequence[Hashable]:
        """One of the tickets that is done, or none within `wait_s`."""
        ...

    def labels(self, ticket: Hashable) -> PieceLabels:
        """What became of a ticket that is done.

        Raises:
            BrokenShardError, ValueError: the input is wrong.
            LostWorkerError: the piece is lost, not the input.
        """
        ...

    def adapt(self) -> None:
        """Look at what has changed since: workers may have come or gone. The factory calls this every few seconds."""
        ...

    def stop(self) -> None:
        """Let all workers go."""
        ...


class LocalPool:
    """One worker, this process: a piece is done when it is asked for. The bytes are those of any other pool."""

    def __init__(self) -> None:
        self._scorers: Mapping[str, Scorer] = {}
        self._make_scorers: Callable[[], Mapping[str, Scorer]] = dict
        self._waiting: dict[int, tuple[str, Batch, int]] = {}
        self._scored: tuple[Batch | None, list[Piece]] = None, []
        self._num_tickets = 0

    def start(self, make_scorers: Callable[[], Mapping[str, Scorer]], num_batches: int) -> str:
        self._make_scorers, self._scorers = make_scorers, {}
        return "in this process"

    def window(self, pieces_per_batch: int) -> int:
        return pieces_per_batch

    def submit(self, scorer: str, batch: Batch, places: Sequence[int]) -> list[int]:
        tickets = list(range(self._num_tickets, self._num_tickets + len(places)))
        self._num_tickets += len(places)
        self._waiting |= {ticket: (scorer, batch, place) for ticket, place in zip(tickets, places, strict=True)}
        return tickets

    def finished(self, tickets: Iterable[Any], wait_s: float) -> list[int]:
        return [min(tickets)]

    def labels(self, ticket: Any) -> PieceLabels:
        scorer, batch, place = self._waiting.pop(ticket)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as every worker: sums depend on the number of threads
        try:
            if self._scored[0] is not batch:
                self._scorers = self._scorers or dict(self._make_scorers())
                self._scored = batch, score_batch(batch, self._scorers[scorer])
            return finish_piece(self._scored[1][place])
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        finally:
            torch.set_num_threads(threads)

    def adapt(self) -> None:
        """Nothing: this process stays as it is."""

    def stop(self) -> None:
        self._waiting.clear()
        self._scored, self._scorers = (None, []), {}


@dataclass
class Stopwatch:
    """Seconds by kind of work, of the calling thread on the processor: what it took, whoever else wanted the processor."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, kind: str, clock: Callable[[], float] = time.thread_time) -> Iterator[None]:
        start_s = clock()
        try:
            yield
        finally:
            self.add(kind, clock() - start_s)

    def add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds


def score_batch(
    batch: Batch,
    scorer: Scorer,
    pool: ThreadPoolExecutor | None = None,
    clock: Callable[[], float] = time.thread_time,
) -> list[Piece]:
    """Read, decode and score a batch: always `batch.num_pieces` pieces, empty ones where images were rejected.

    pool: decodes; None: the calling thread does. clock: for the scoring; on an accelerator the wall's.
    """
    watch = Stopwatch()
    with watch.on("read"):
        images, rejects = _read(batch, pool, watch)
    scores: list[ImageScores] = []
    if images:
        with watch.on("cam", clock), torch.inference_mode():
            try:
                scores = _score(images, scorer)
            except TooLargeError:
                images, scores, too_large = _score_alone(images, scorer)
                rejects += too_large
    step, pieces = batch.crf_images, []
    for number in range(batch.num_pieces):
        part = slice(number * step, (number + 1) * step)
        common = (batch.class_names, batch.settings, watch.seconds if number == 0 else {})
        pieces.append(Piece(tuple(images[part]), tuple(scores[part]), tuple(rejects) if number == 0 else (), *common))
    return pieces


def _score(images: Sequence[Decoded], scorer: Scorer) -> list[ImageScores]:
    pixels = [torch.from_numpy(one.image_HW3).permute(2, 0, 1) for one in images]
    return scorer(pixels, [one.sample.labels for one in images])


def _score_alone(
    images: Sequence[Decoded], scorer: Scorer
) -> tuple[list[Decoded], list[ImageScores], list[LabelReject]]:
    """One by one, after a batch was too large: those that can be scored, and the others with the reason."""
    kept, scores, rejects = list[Decoded](), list[ImageScores](), list[LabelReject]()
    for one in images:
        try:
            scores += _score([one], scorer)
            kept.append(one)
        except TooLargeError as error:
            rejects.append(LabelReject(one.sample.key, str(error)))
    return kept, scores, rejects


def _read(batch: Batch, pool: ThreadPoolExecutor | None, watch: Stopwatch) -> tuple[list[Decoded], list[LabelReject]]:
    images, rejects = [], []
    samples = {sample.row: sample for sample in batch.rows}
    try:
        raws = {raw.row: raw for raw in batch.part.read(samples.keys())}
    except OSError as error:
        raise BrokenShardError(f"{batch.part.address} cannot be read: {error}") from error
    ordered = [(sample, raws[sample.row]) for sample in batch.rows]  # equal sizes stand together

    def decode(pair: tuple[SampleRow, RawSample]) -> tuple[Decoded | LabelReject, float]:
        start_s = time.thread_time()
        try:
            result: Decoded | LabelReject = _decode(*pair, batch)
        except ValueError as error:
            result = LabelReject(pair[0].key, str(error))
        return result, time.thread_time() - start_s

    for result, seconds in pool.map(decode, ordered) if pool else map(decode, ordered):
        if pool:
            watch.add("read", seconds)
        (images if isinstance(result, Decoded) else rejects).append(result)
    return images, rejects


def _decode(sample: SampleRow, raw: RawSample, batch: Batch) -> Decoded:
    """Image and ground truth of a sample; a ValueError says why it cannot be labelled."""
    if batch.settings.skip_unlabelled and not raw.labels:
        raise ValueError(f"{NO_LABEL} (label.unlabelled=background labels such images as all background)")
    if raw.labels != sample.labels:
        raise ValueError(f"labels {raw.labels} in the shard, {sample.labels} in the index's table")
    if raw.labels and raw.labels[-1] > len(batch.class_names):
        raise ValueError(f"label {raw.labels[-1]} of a data set with {len(batch.class_names)} classes")
    image_HW3 = decode_rgb(raw.image, max_pixels=batch.max_pixels)
    if image_HW3.shape[:2] != (raw.height, raw.width):
        raise ValueError(
            f"image is {image_HW3.shape[1]} x {image_HW3.shape[0]}, its label says {raw.width} x {raw.height}"
        )
    if raw.mask is None:
        return Decoded(sample, image_HW3, None)
    truth_HW = decode_mask(raw.mask, max_pixels=batch.max_pixels)
    if truth_HW.shape != image_HW3.shape[:2]:
        raise ValueError(f"mask {truth_HW.shape} and image {image_HW3.shape[:2]} differ in size (height, width)")
    check_mask_values(truth_HW, num_classes=len(batch.class_names), where="mask")
    return Decoded(sample, image_HW3, truth_HW)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to half a gigabyte, instead of giving it back to the system: the CRF asks
    for the same large blocks again and again (15 % less of its processor time). Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MALLOPT_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_MALLOPT_TRIM_THRESHOLD, _KEPT_BYTES)


def finish_piece(piece: Piece) -> PieceLabels:
    """CRF, encoding and counting."""
    watch, settings = Stopwatch(dict(piece.seconds)), piece.settings
    palette, tallies, records, rejects = voc_palette(), [], [], list(piece.rejects)
    for one, scores in zip(piece.images, piece.scores, strict=True):
        try:
            with watch.on("crf"):
                labelled = label_image(one.image_HW3, scores, one.truth_HW, settings)
        except ValueError as error:  # beyond what the CRF can count: this picture's own trouble
            rejects.append(LabelReject(one.sample.key, str(error)))
            continue
        with watch.on("encode"):
            members = {
                MASK_EXTENSION: encode_mask(labelled.mask_HW, palette),
                "json": describe(
                    one.sample, piece.class_names, scores.class_ids, labelled.mask_HW, labelled.confidence
                ),
            }
            if labelled.soft_KHW is not None:
                members[SOFT_EXTENSION] = encode_grey(np.concatenate(labelled.soft_KHW))
            if labelled.confidence_HW is not None:
                members[CONFIDENCE_EXTENSION] = encode_grey(labelled.confidence_HW)
            if scores.model_HW is not None:
                members[MODEL_EXTENSION] = encode_mask(scores.model_HW, palette)
            quality = judge(one.sample, labelled.mask_HW, labelled.confidence, labelled.agreement)
        tallies.append(labelled.tally)
        records.append(LabelRecord(members, quality))
    return PieceLabels(tuple(records), tuple(rejects), total_tally(tallies, settings), watch.seconds)
