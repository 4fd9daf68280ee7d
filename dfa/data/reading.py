"""What the read tasks of the stream do: the order of an epoch, and one shard read, decoded and cropped into blocks.

Neither torch nor Ray is imported here: every reading process loads this module, and torch alone would cost each of them
seconds and 200 MB.

What is trained is a pure function of numbers: `epoch_order(shard_sizes, seed, epoch)` orders an epoch,
`remaining_items` cuts the first `num_samples` of the epochs in a row and takes out what was consumed already, and each
crop is keyed by (seed, epoch, key). A sample's global number is its row in the whole index (shards in index order).
Offline pseudo-labels are the one thing beside: they are those that lie there when a shard is read.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfa.core.void import label_dtype, void_label
from dfa.data import storage
from dfa.data.consumed import ConsumedEpoch
from dfa.data.offline import OfflineLabels
from dfa.data.samples import check_mask_values
from dfa.data.shards import BrokenShardError, RawSample, read_shard
from dfa.data.transforms import Augmented, LabelArray, augment, decode_mask, decode_picture, sample_rng

logger = logging.getLogger(__name__)

Block = Any
Columns = dict[str, npt.NDArray[Any]]
T = TypeVar("T")

BLOCK_BYTES = 8 * 2**20
FILLER = "filler"
RETRY_PAUSES_S = (0.5, 2.0, 8.0)
"""Before a shard, of images or of labels, is read again whose disk or store failed."""


@dataclass(frozen=True)
class CropSettings:
    """The training crop of METHOD 1.21. `max_pixels` refuses oversized pictures before they are decoded; `long_side`: as in
    `augment`."""

    size: int
    scale_range: tuple[float, float]
    flip_probability: float
    max_pixels: int
    long_side: int = 0


@dataclass(frozen=True)
class Item:
    """Rows of one shard in one epoch. They are computed where they are read: a run of 100 million samples is planned as
    100 000 items an epoch, not as a list of its samples.

    num_samples: of the shard. stop: the first so many of the shard's order belong to the run. num_rows: those of them
    that are left. consumed: bits of rows that were consumed before (as in `ConsumedEpoch`), None for none.
    """

    epoch: int
    shard: int
    seed: int
    num_samples: int
    stop: int
    num_rows: int
    consumed: npt.NDArray[np.uint8] | None = None

    @property
    def rows(self) -> npt.NDArray[np.int32]:
        """Row numbers in the order in which they are trained."""
        rng = np.random.default_rng((self.seed, self.epoch, 1 + self.shard))
        rows = rng.permutation(self.num_samples).astype(np.int32)[: self.stop]
        return rows if self.consumed is None else rows[(self.consumed[rows >> 3] >> (7 - (rows & 7)) & 1) == 0]


def epoch_order(shard_sizes: Sequence[int], *, seed: int, epoch: int) -> Iterator[Item]:
    """Order of one epoch, a pure function of its arguments: shards shuffled, rows shuffled inside each.

    Shards hold samples in random order already, so any stretch of this order is a random sample of the data set.

    Args:
        shard_sizes: number of samples of each shard, in index order.
    """
    for shard in np.random.default_rng((seed, epoch)).permutation(len(shard_sizes)).tolist():
        size = int(shard_sizes[shard])
        yield Item(epoch, shard, seed, size, size, size)


def shard_offsets(shard_sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Global number of the first sample of each shard."""
    return np.concatenate([[0], np.cumsum(shard_sizes)[:-1]]).astype(np.int64)


def remaining_items(
    shard_sizes: Sequence[int],
    *,
    seed: int,
    num_samples: int,
    finished_epochs: int,
    open_epochs: Mapping[int, ConsumedEpoch],
) -> Iterator[Item]:
    """What is left of a run over the first `num_samples` of the epochs in a row. Finished shards are not looked at again.

    Args:
        num_samples: length of the whole run; the last epoch may be partial.
        finished_epochs: epochs 0..finished_epochs - 1 were consumed completely.
        open_epochs: epoch -> what of it was consumed.
    """
    per_epoch = int(sum(shard_sizes))
    if per_epoch == 0:
        raise ValueError("the index holds no samples, there is nothing to stream")
    for epoch in range(finished_epochs, -(-num_samples // per_epoch)):
        quota, consumed = min(per_epoch, num_samples - epoch * per_epoch), open_epochs.get(epoch)
        for item in epoch_order(shard_sizes, seed=seed, epoch=epoch):
            stop, quota = min(quota, item.num_samples), max(0, quota - item.num_samples)
            left = _left(replace(item, stop=stop, num_rows=stop) if stop < item.num_samples else item, consumed)
            if left is not None:
                yield left


def _left(item: Item, consumed: ConsumedEpoch | None) -> Item | None:
    if consumed is None or (item.shard not in consumed.under_way and not consumed.is_finished(item.shard)):
        return item if item.stop else None
    if consumed.is_finished(item.shard):
        return None
    item = replace(item, consumed=consumed.under_way[item.shard])
    item = replace(item, num_rows=len(item.rows))
    return item if item.num_rows else None


@dataclass(frozen=True)
class Reader:
    """Turns items of one shard into blocks. Small, because every read task carries one.

    with_masks: rows carry the ground truth. labels: rows carry the offline pseudo-label of their key, and in `given`
    whether there is one; a row without is void everywhere.
    """

    path: str
    offset: int
    num_classes: int
    seed: int
    crop: CropSettings
    with_masks: bool
    labels: OfflineLabels | None = None

    def __post_init__(self) -> None:
        if self.with_masks and self.labels is not None:
            raise ValueError(f"ground truth and the labels of {self.labels.root} cannot both be the mask of a sample")

    @property
    def row_bytes(self) -> int:
        mask_bytes = np.dtype(label_dtype(self.num_classes)).itemsize if self._has_mask else 0
        return self.crop.size**2 * (3 + mask_bytes) + self.num_classes + 80

    @property
    def _has_mask(self) -> bool:
        return self.with_masks or self.labels is not None

    def item_blocks(self, item: Item, to_block: Callable[[Columns], Block]) -> Iterator[Block]:
        """The rows of an item that are left, in its order."""
        yield from self.blocks(item.epoch, item.rows, to_block)

    def blocks(self, epoch: int, rows: npt.NDArray[np.int32], to_block: Callable[[Columns], Block]) -> Iterator[Block]:
        """Read the shard once, then decode these rows in this order, one bounded block at a time."""
        raws = {raw.row: raw for raw in read_rows(self.path, rows.tolist())}
        labels = self._labels({raw.key for raw in raws.values()})
        step = max(1, BLOCK_BYTES // self.row_bytes)
        for start in range(0, len(rows), step):
            part = [raws.pop(int(row)) for row in rows[start : start + step]]
            yield to_block(_stack([self._row(epoch, raw, labels.pop(raw.key, None)) for raw in part]))

    def filler(self, num_rows: int, to_block: Callable[[Columns], Block]) -> Iterator[Block]:
        """Rows that stand for no sample, so that every worker gets equally many."""
        yield to_block(_stack([self._record(0, -1, "", reject=FILLER)] * num_rows))

    def _labels(self, keys: set[str]) -> dict[str, bytes]:
        """Resolved anew for every item, so that a running training sees refreshed labels."""
        if (labels := self.labels) is None:
            return {}
        shard = storage.base_name(self.path)
        return dict(_patiently(f"label shard {shard} of {labels.root}", lambda: labels.masks(shard, keys).items()))

    def _row(self, epoch: int, raw: RawSample, label: bytes | None) -> dict[str, Any]:
        sample = self.offset + raw.row
        try:
            return self._decode(epoch, sample, raw, label)
        except ValueError as error:
            logger.warning("sample %s of %s is left out: %s", raw.key, self.path, error)
            return self._record(epoch, sample, raw.key, reject=str(error) or "unreadable")

    def _decode(self, epoch: int, sample: int, raw: RawSample, label: bytes | None) -> dict[str, Any]:
        if raw.labels and raw.labels[-1] > self.num_classes:
            raise ValueError(f"label {raw.labels[-1]} of a data set with {self.num_classes} classes")
        if self.with_masks and raw.mask is None:
            raise ValueError("masks were asked for and the sample has none")
        image, mask = decode_picture(raw.image, max_pixels=self.crop.max_pixels), None
        if (data := raw.mask if self.with_masks else label) is not None:
            mask = decode_mask(data, max_pixels=self.crop.max_pixels)
        if label is not None and mask is not None:
            _check_label(mask, image, self.num_classes)
        crop = augment(
            image,
            mask,
            size=self.crop.size,
            scale_range=self.crop.scale_range,
            flip_probability=self.crop.flip_probability,
            rng=sample_rng(self.seed, epoch, raw.key),
            long_side=self.crop.long_side,
        )
        return self._record(epoch, sample, raw.key, crop=crop, classes=raw.labels)

    def _record(
        self,
        epoch: int,
        sample: int,
        key: str,
        *,
        crop: Augmented | None = None,
        classes: Sequence[int] = (),
        reject: str = "",
    ) -> dict[str, Any]:
        """One row. `window` is the part of the crop that shows the picture (see `Augmented`): a map of it would be as large
        as a label. Without a crop all is blank: it stands for a sample that cannot be read, or for none.
        """
        size, mask = self.crop.size, None if crop is None else crop.mask
        labels = np.zeros(self.num_classes, bool)
        labels[[c - 1 for c in classes]] = True
        row = {
            "image": np.zeros((3, size, size), np.uint8) if crop is None else crop.image.transpose(2, 0, 1),
            "window": np.array((0, 0, 0, 0) if crop is None else crop.window, np.int32),
            "labels": labels,
        }
        if self._has_mask:
            void = void_label(self.num_classes)
            row["mask"] = np.full((size, size), void, label_dtype(self.num_classes)) if mask is None else mask
        row |= {"given": np.bool_(mask is not None)} if self.labels is not None else {}
        return row | {"epoch": np.int64(epoch), "sample": np.int64(sample), "key": key, "reject": reject}


def read_rows(path: str, rows: Collection[int]) -> Iterator[RawSample]:
    """`read_shard`, patient: where a disk or store fails, the rows that did not come yet are asked for again.

    Raises:
        BrokenShardError: damage, at once; a failure that stays, after the last of the pauses.
    """
    left = set(rows)

    def rest() -> Iterator[RawSample]:
        for raw in read_shard(path, wanted=left):
            left.remove(raw.row)
            yield raw

    return _patiently(path, rest)


def _patiently(what: str, read: Callable[[], Iterable[T]]) -> Iterator[T]:
    """What `read` gives. A disk or store that fails is asked again, with longer pauses; damage is not.

    `read` gives in each call what it did not give before it failed.
    """
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            yield from read()
            return
        except (OSError, BrokenShardError) as error:
            if not _is_transient(error):
                raise
            if pause_s is None:
                raise BrokenShardError(f"{what}: given up after {1 + len(RETRY_PAUSES_S)} reads: {error}") from error
            logger.warning("%s is read again in %.1f s: %s", what, pause_s, error)
        time.sleep(pause_s)


def _is_transient(error: BaseException | None) -> bool:
    """Tell a failure of the disk, store or network from a shard that is absent or damaged, or a wrong address."""
    if isinstance(error, BrokenShardError | storage.StoreError):
        return _is_transient(error.__cause__)
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def _stack(rows: Sequence[Mapping[str, Any]]) -> Columns:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _check_label(label_HW: LabelArray, image: Image.Image, num_classes: int) -> None:
    if label_HW.shape != (image.height, image.width):
        raise ValueError(f"pseudo-label is {label_HW.shape}, image is {(image.height, image.width)} (height, width)")
    check_mask_values(label_HW, num_classes=num_classes, where="pseudo-label")
