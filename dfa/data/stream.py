"""From shards to batches: the training stream on Ray Data, and the plain reader for validation.

One stream covers all epochs of a run. Its items are (epoch, shard, rows); the only operator turns an item into decoded,
augmented blocks of fixed shape (see `reading`), so Ray schedules, bounds memory and splits between workers while a
shard is still read once, sequentially.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import ray.data
import torch
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from torch import Tensor

from dfa.data.consumed import ConsumedEpoch
from dfa.data.offline import OfflineLabels
from dfa.data.reading import BLOCK_BYTES, FILLER, CropSettings, Item, Reader, read_rows, remaining_items, shard_offsets
from dfa.data.shards import RawSample, ShardIndex
from dfa.data.transforms import decode_mask, decode_rgb

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ReadReject:
    """A sample that could not be decoded while training: counted as consumed, never trained."""

    epoch: int
    sample: int
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Images of one step. B may be smaller than the micro-batch (rejected samples, end of the stream), even 0.

    Attributes:
        image_B3HW: uint8 RGB.
        valid_BHW: bool, False on padding.
        labels_BC: bool, image-level labels; column c - 1 is class c.
        mask_BHW: class indices, void on padding too, or None where neither masks nor labels were asked for. uint8 with 255
            for void; of more than 254 classes int32 with 65535 (torch computes little with uint16).
        keys: sample keys, length B.
        epoch_B: int64.
        sample_B: int64, global number of the sample in the index.
        rejected: samples that came with this batch and could not be read.
        given_B: bool, True where mask_BHW is an offline pseudo-label, False where there is none yet and mask_BHW is void
            everywhere; None where mask_BHW is ground truth or None.
    """

    image_B3HW: Tensor
    valid_BHW: Tensor
    labels_BC: Tensor
    mask_BHW: Tensor | None
    keys: tuple[str, ...]
    epoch_B: Tensor
    sample_B: Tensor
    rejected: tuple[ReadReject, ...] = ()
    given_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its pixels and labels on `device` (the book-keeping stays on the CPU)."""
        move = functools.partial(Tensor.to, device=device, non_blocking=True)
        mask = None if self.mask_BHW is None else move(self.mask_BHW)
        return replace(
            self,
            image_B3HW=move(self.image_B3HW),
            valid_BHW=move(self.valid_BHW),
            labels_BC=move(self.labels_BC),
            mask_BHW=mask,
        )


def _source(tasks: Sequence[tuple[Reader, Item | int]]) -> Datasource:
    """Read tasks in order: one for each item, and one for the filler.

    The class is local on purpose: Ray's coordinating and reading processes then get it by value, without importing this
    module and with it torch, which would cost each of them seconds of start-up and 450 MB.
    """

    def num_rows(work: Item | int) -> int:
        return work if isinstance(work, int) else work.num_rows

    def read_task(reader: Reader, work: Item | int) -> ReadTask:
        metadata = BlockMetadata(
            num_rows=num_rows(work),
            size_bytes=num_rows(work) * reader.row_bytes,
            input_files=(reader.path,),
            exec_stats=None,
        )
        read = reader.filler if isinstance(work, int) else reader.item_blocks
        return ReadTask(functools.partial(read, work, BlockAccessor.batch_to_arrow_block), metadata)  # type: ignore[arg-type]

    class ShardStream(Datasource):
        def get_name(self) -> str:
            return "ShardStream"

        def estimate_inmemory_data_size(self) -> int:
            return sum(reader.row_bytes * num_rows(work) for reader, work in tasks)

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [read_task(reader, work) for reader, work in tasks]

    return ShardStream()


def train_stream(
    index: ShardIndex,
    *,
    seed: int,
    num_samples: int,
    finished_epochs: int,
    open_epochs: Mapping[int, ConsumedEpoch],
    crop: CropSettings,
    with_masks: bool,
    num_workers: int,
    read_cpus: float,
    max_readers: int,
    labels: str | None = None,
) -> ray.data.Dataset:
    """The rest of a run as one Ray dataset (see the module's docstring), to be read with `iterate`.

    Filler rows bring the length to a multiple of `num_workers`, because Ray drops what does not divide evenly (and not the
    last rows: it splits the last blocks out of order); `iterate` removes them. A sample that does not decode stays in
    the stream as a rejected row, so that counting stays exact.

    Args:
        num_samples: length of the whole run, counted from its very beginning.
        finished_epochs, open_epochs: what was consumed, see `remaining_items`.
        with_masks: read ground-truth masks (only for training on ground truth, by name).
        read_cpus: CPUs that one read task reserves; what workers leave, or reading waits for ever and the run hangs.
        max_readers: read tasks at a time. Each holds one shard's encoded bytes and one block of pixels.
        labels: address of offline pseudo-labels (see `dfa.data.offline`), which become `mask_BHW`; looked up anew for
            every shard that is read, so refreshed ones come as late as Ray reads ahead (`ingest_options`).

    Raises:
        ValueError: with_masks and labels together; while reading, labels that are not of these shards.
        BrokenShardError (while reading): a shard that cannot be read; it is named.
    """
    offsets = shard_offsets([s.num_samples for s in index.shards])
    offline = None if labels is None else OfflineLabels(labels, index.class_names, index.plan_hash)

    def reader(shard: int) -> Reader:
        path = index.path(index.shards[shard].name)
        return Reader(path, int(offsets[shard]), len(index.class_names), seed, crop, with_masks, offline)

    items = remaining_items(
        [s.num_samples for s in index.shards],
        seed=seed,
        num_samples=num_samples,
        finished_epochs=finished_epochs,
        open_epochs=open_epochs,
    )
    tasks: list[tuple[Reader, Item | int]] = [(reader(item.shard), item) for item in items]
    num_rows = sum(work.num_rows for _, work in tasks if isinstance(work, Item))
    if -num_rows % num_workers or not tasks:
        tasks.append((reader(0), -num_rows % num_workers or num_workers))
    dataset = ray.data.read_datasource(
        _source(tasks), num_cpus=read_cpus, concurrency=max_readers, override_num_blocks=len(tasks)
    )
    dataset.context.target_max_block_size = BLOCK_BYTES * 2  # our blocks pass as they are
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


def ingest_options(*, window_bytes: int) -> ray.data.ExecutionOptions:
    """How Ray executes the stream: in order (two runs see the same batches) and with at most `window_bytes` of decoded
    pixels ahead.

    Without the bound Ray fills half of its object store, gigabytes, because back-pressure only counts bytes.
    """
    options = ray.data.ExecutionOptions(preserve_order=True)
    options.resource_limits = options.resource_limits.copy(object_store_memory=float(window_bytes))
    return options


def iterate(shard: ray.data.DataIterator | ray.data.Dataset, *, batch_size: int, prefetch: int) -> Iterator[Batch]:
    """Batches of one worker's part of `train_stream`. `prefetch` batches are fetched and concatenated ahead."""
    for columns in shard.iter_batches(
        batch_size=batch_size, batch_format="numpy", prefetch_batches=prefetch, drop_last=False
    ):
        yield to_batch(cast(Mapping[str, Array], columns))


def to_batch(columns: Mapping[str, Array]) -> Batch:
    """Columns of the stream as a batch; rejected rows and filler are taken out of the tensors.

    Columns that are writable belong to the batch from then on: its tensors may share their memory.
    """
    reject = columns["reject"]
    good = np.flatnonzero(reject == "")
    bad = np.flatnonzero((reject != "") & (reject != FILLER))

    def kept(name: str) -> Array:
        """Indexing copies. With nothing to take out only what Ray gives read-only is copied: tensors are writable."""
        column = columns[name]
        return column[good] if len(good) < len(reject) else np.require(column, requirements=["C", "W"])

    image = torch.from_numpy(kept("image"))
    return Batch(
        image_B3HW=image,
        valid_BHW=_valid(kept("window"), *image.shape[2:]),
        labels_BC=torch.from_numpy(kept("labels")),
        mask_BHW=_mask_tensor(kept("mask")) if "mask" in columns else None,
        keys=tuple(str(key) for key in columns["key"][good]),
        epoch_B=torch.from_numpy(kept("epoch")),
        sample_B=torch.from_numpy(kept("sample")),
        rejected=tuple(
            ReadReject(int(columns["epoch"][i]), int(columns["sample"][i]), str(columns["key"][i]), str(reject[i]))
            for i in bad
        ),
        given_B=torch.from_numpy(kept("given")) if "given" in columns else None,
    )


def _valid(window_B4: Array, height: int, width: int) -> Tensor:
    """True inside each crop's window, (B, H, W)."""
    valid_BHW = np.zeros((len(window_B4), height, width), bool)
    for valid_HW, (top, bottom, left, right) in zip(valid_BHW, window_B4.tolist(), strict=True):
        valid_HW[top:bottom, left:right] = True
    return torch.from_numpy(valid_BHW)


def _mask_tensor(mask_BHW: Array) -> Tensor:
    return torch.from_numpy(mask_BHW if mask_BHW.dtype == np.uint8 else mask_BHW.astype(np.int32))


def eval_batches(
    index: ShardIndex, *, rank: int, world: int, batch_size: int, max_pixels: int, limit: int | None = None
) -> Iterator[Batch]:
    """Whole images with their masks at their own size, every `world`-th sample of the index from `rank` on, without
    Ray.

    Neighbours of equal size share a batch of at most `batch_size`. `limit` takes the first samples of the index only.
    What does not decode is left out with a warning.

    Raises:
        ValueError: a sample has no mask.
        BrokenShardError: a shard that cannot be read; it is named.
    """
    pending: list[tuple[RawSample, int, Array, Array]] = []
    for raw, sample in _rank_rows(index, rank=rank, world=world, limit=limit):
        if raw.mask is None:
            raise ValueError(f"{raw.shard}, key {raw.key!r}: evaluation needs masks and this sample has none")
        try:
            image, mask = decode_rgb(raw.image, max_pixels=max_pixels), decode_mask(raw.mask, max_pixels=max_pixels)
        except ValueError as error:
            logger.warning("sample %s of %s is left out of the evaluation: %s", raw.key, raw.shard, error)
            continue
        if pending and (len(pending) == batch_size or pending[0][2].shape != image.shape):
            yield _eval_batch(pending, len(index.class_names))
            pending = []
        pending.append((raw, sample, image, mask))
    if pending:
        yield _eval_batch(pending, len(index.class_names))


def _rank_rows(index: ShardIndex, *, rank: int, world: int, limit: int | None) -> Iterator[tuple[RawSample, int]]:
    stop = index.num_samples if limit is None else min(limit, index.num_samples)
    for shard, offset in zip(index.shards, shard_offsets([s.num_samples for s in index.shards]).tolist(), strict=True):
        first = offset + (rank - offset) % world
        wanted = range(first - offset, min(shard.num_samples, stop - offset), world)
        if len(wanted):
            yield from ((raw, offset + raw.row) for raw in read_rows(index.path(shard.name), wanted))


def _eval_batch(pending: Sequence[tuple[RawSample, int, Array, Array]], num_classes: int) -> Batch:
    labels = np.zeros((len(pending), num_classes), bool)
    for row, (raw, _, _, _) in zip(labels, pending, strict=True):
        row[[c - 1 for c in raw.labels]] = True
    image = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for _, _, image, _ in pending]))
    return Batch(
        image_B3HW=image,
        valid_BHW=torch.ones((len(pending), *image.shape[2:]), dtype=torch.bool),
        labels_BC=torch.from_numpy(labels),
        mask_BHW=_mask_tensor(np.stack([mask for _, _, _, mask in pending])),
        keys=tuple(raw.key for raw, _, _, _ in pending),
        epoch_B=torch.zeros(len(pending), dtype=torch.int64),
        sample_B=torch.tensor([sample for _, sample, _, _ in pending], dtype=torch.int64),
    )
