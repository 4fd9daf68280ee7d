"""What the read tasks of the stream do: the order of an epoch, and one shard read, decoded and cropped into blocks.

Neither torch nor Ray is imported here: every reading process loads this module, and torch alone would cost each of them
seconds and 200 MB.

What is trained is a pure function of numbers: `epoch_order(shard_sizes, seed, epoch)` orders an epoch,
`remaining_items` cuts the first `num_samples` of the epochs in a row and takes out what was consumed already, and each
crop is keyed by (seed, epoch, key). A sample's global number is its row in the whole index (shards in index order).
Offline pseudo-labels are the one thing beside: they are those that lie there when a shard is read.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dfa.data.offline import OfflineLabels
from dfa.data.samples import check_mask_values
from dfa.data.shards import RawSample, read_shard
from dfa.data.transforms import VOID, UInt8Array, augment, decode_mask, decode_rgb, sample_rng

logger = logging.getLogger(__name__)

Block = Any
Columns = dict[str, npt.NDArray[Any]]

BLOCK_BYTES = 8 * 2**20
FILLER = "filler"


@dataclass(frozen=True)
class CropSettings:
    """The training crop of METHOD 1.21. `max_pixels` refuses oversized pictures before they are decoded."""

    size: int
    scale_range: tuple[float, float]
    flip_probability: float
    max_pixels: int


@dataclass(frozen=True)
class Item:
    """Rows of one shard in one epoch, in the order in which they are trained."""

    epoch: int
    shard: int
    rows: npt.NDArray[np.int32]


def epoch_order(shard_sizes: Sequence[int], *, seed: int, epoch: int) -> Iterator[Item]:
    """Order of one epoch, a pure function of its arguments: shards shuffled, rows shuffled inside each.

    Shards hold samples in random order already, so any stretch of this order is a random sample of the data set.

    Args:
        shard_sizes: number of samples of each shard, in index order.
    """
    for shard in np.random.default_rng((seed, epoch)).permutation(len(shard_sizes)):
        rows = np.random.default_rng((seed, epoch, 1 + int(shard))).permutation(shard_sizes[shard])
        yield Item(epoch, int(shard), rows.astype(np.int32))


def shard_offsets(shard_sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Global number of the first sample of each shard."""
    return np.concatenate([[0], np.cumsum(shard_sizes)[:-1]]).astype(np.int64)


def remaining_items(
    shard_sizes: Sequence[int],
    *,
    seed: int,
    num_samples: int,
    finished_epochs: int,
    open_epochs: Mapping[int, npt.NDArray[np.bool_]],
) -> Iterator[Item]:
    """What is left of a run over the first `num_samples` of the epochs in a row.

    Args:
        num_samples: length of the whole run; the last epoch may be partial.
        finished_epochs: epochs 0..finished_epochs - 1 were consumed completely.
        open_epochs: epoch -> (samples,) True where the sample of that global number was consumed.
    """
    per_epoch = int(sum(shard_sizes))
    if per_epoch == 0:
        raise ValueError("the index holds no samples, there is nothing to stream")
    offsets = shard_offsets(shard_sizes)
    for epoch in range(finished_epochs, -(-num_samples // per_epoch)):
        quota, consumed = min(per_epoch, num_samples - epoch * per_epoch), open_epochs.get(epoch)
        for item in epoch_order(shard_sizes, seed=seed, epoch=epoch):
            rows, quota = item.rows[:quota], quota - min(quota, len(item.rows))
            rows = rows if consumed is None else rows[~consumed[offsets[item.shard] + rows]]
            if len(rows):
                yield replace(item, rows=rows)


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
        return self.crop.size**2 * (4 + self._has_mask) + self.num_classes + 64

    @property
    def _has_mask(self) -> bool:
        return self.with_masks or self.labels is not None

    def blocks(self, item: Item, to_block: Callable[[Columns], Block]) -> Iterator[Block]:
        """Read the shard once, then decode in the item's order, one bounded block at a time."""
        raws = {raw.row: raw for raw in read_shard(self.path, wanted=set(item.rows.tolist()))}
        labels = self._labels({raw.key for raw in raws.values()})
        step = max(1, BLOCK_BYTES // self.row_bytes)
        for start in range(0, len(item.rows), step):
            part = [raws.pop(int(row)) for row in item.rows[start : start + step]]
            yield to_block(_stack([self._row(item.epoch, raw, labels.pop(raw.key, None)) for raw in part]))

    def filler(self, num_rows: int, to_block: Callable[[Columns], Block]) -> Iterator[Block]:
        """Rows that stand for no sample, so that every worker gets equally many."""
        yield to_block(_stack([self._blank(0, -1, "", FILLER)] * num_rows))

    def _labels(self, keys: set[str]) -> dict[str, bytes]:
        """Resolved anew for every item, so that a running training sees refreshed labels."""
        return {} if self.labels is None else self.labels.masks(self.path.rsplit("/", 1)[-1], keys)

    def _row(self, epoch: int, raw: RawSample, label: bytes | None) -> dict[str, Any]:
        sample = self.offset + raw.row
        try:
            return self._decode(epoch, sample, raw, label)
        except ValueError as error:
            logger.warning("sample %s of %s is left out: %s", raw.key, self.path, error)
            return self._blank(epoch, sample, raw.key, str(error) or "unreadable")

    def _decode(self, epoch: int, sample: int, raw: RawSample, label: bytes | None) -> dict[str, Any]:
        row = self._blank(epoch, sample, raw.key, "")
        if raw.labels and raw.labels[-1] > self.num_classes:
            raise ValueError(f"label {raw.labels[-1]} of a data set with {self.num_classes} classes")
        if self.with_masks and raw.mask is None:
            raise ValueError("masks were asked for and the sample has none")
        image, mask = decode_rgb(raw.image, max_pixels=self.crop.max_pixels), None
        if (data := raw.mask if self.with_masks else label) is not None:
            mask = decode_mask(data, max_pixels=self.crop.max_pixels)
        if label is not None and mask is not None:
            _check_label(mask, image, self.num_classes)
            row["given"] = np.True_
        crop = augment(
            image,
            mask,
            size=self.crop.size,
            scale_range=self.crop.scale_range,
            flip_probability=self.crop.flip_probability,
            rng=sample_rng(self.seed, epoch, raw.key),
        )
        row["image"], row["valid"] = crop.image.transpose(2, 0, 1), crop.valid
        row["labels"][[c - 1 for c in raw.labels]] = True
        if crop.mask is not None:
            row["mask"] = crop.mask
        return row

    def _blank(self, epoch: int, sample: int, key: str, reject: str) -> dict[str, Any]:
        size = self.crop.size
        row = {
            "image": np.zeros((3, size, size), np.uint8),
            "valid": np.zeros((size, size), bool),
            "labels": np.zeros(self.num_classes, bool),
        }
        row |= {"mask": np.full((size, size), VOID, np.uint8)} if self._has_mask else {}
        row |= {"given": np.False_} if self.labels is not None else {}
        return row | {"epoch": np.int64(epoch), "sample": np.int64(sample), "key": key, "reject": reject}


def _stack(rows: Sequence[Mapping[str, Any]]) -> Columns:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _check_label(label_HW: UInt8Array, image_HW3: UInt8Array, num_classes: int) -> None:
    if label_HW.shape != image_HW3.shape[:2]:
        raise ValueError(f"pseudo-label is {label_HW.shape}, image is {image_HW3.shape[:2]} (height, width)")
    check_mask_values(label_HW, num_classes=num_classes, where="pseudo-label")
