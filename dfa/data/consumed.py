"""Which samples of one epoch were consumed: one bit for each finished shard, one for each row of a shard under way.

An epoch is read shard by shard, so few shards are under way at a time: 100 million samples in 100 000 shards take
12.5 kB and the bits of those few. numpy alone, because reading processes load it.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]


class ConsumedEpoch:
    """Samples consumed of an epoch over shards of the sizes `shard_sizes`; bits are packed as `np.packbits` packs them."""

    def __init__(self, shard_sizes: Ints) -> None:
        self.shard_sizes = shard_sizes
        self.num_consumed = 0
        self.finished = np.zeros((len(shard_sizes) + 7) // 8, np.uint8)
        self.under_way: dict[int, Bits] = {}

    def is_finished(self, shard: int) -> bool:
        """Tell whether every row of a shard was consumed."""
        return bool(self.finished[shard >> 3] >> (7 - (shard & 7)) & 1)

    def is_consumed(self, shard: int, row_N: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Tell for each row of a shard whether it was consumed."""
        if self.is_finished(shard):
            return np.ones(len(row_N), bool)
        bits = self.under_way.get(shard)
        return np.zeros(len(row_N), bool) if bits is None else (bits[row_N >> 3] >> (7 - (row_N & 7)) & 1).astype(bool)

    def add(self, shard: int, row_N: Ints) -> int | None:
        """Mark rows of a shard; returns the first row that was consumed before (nothing is marked then), else None."""
        twice = self.is_consumed(shard, row_N)
        if twice.any():
            return int(row_N[twice][0])
        if len(np.unique(row_N)) != len(row_N):
            values, counts = np.unique(row_N, return_counts=True)
            return int(values[counts > 1][0])
        size = int(self.shard_sizes[shard])
        bits = self.under_way.setdefault(shard, np.zeros((size + 7) // 8, np.uint8))
        np.bitwise_or.at(bits, row_N >> 3, (128 >> (row_N & 7)).astype(np.uint8))
        self.num_consumed += len(row_N)
        if int(np.unpackbits(bits).sum()) == size:
            del self.under_way[shard]
            self.finished[shard >> 3] |= 128 >> (shard & 7)
        return None
