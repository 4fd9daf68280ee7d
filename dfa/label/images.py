"""What the label factory reads: image shards, or anything that gives samples shard by shard."""

import hashlib
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from dfa.data import storage
from dfa.data.listing import ImageListing
from dfa.data.shards import (
    BrokenShardError,
    RawSample,
    SampleRow,
    ShardEntry,
    ShardIndex,
    read_shard,
    samples_by_shard,
    sha256_of,
)


class ImagePart(Protocol):
    """The images of one shard: small and picklable, since it travels with every task."""

    @property
    def address(self) -> str:
        """Names it in messages."""
        ...

    def read(self, wanted: Collection[int]) -> Iterator[RawSample]:
        """The samples of these rows, in their order. Raises BrokenShardError where the shard itself is damaged."""
        ...

    def fingerprint(self) -> str:
        """The hash of what is there now. Raises OSError or ValueError where it is gone."""
        ...


class ImageSet(Protocol):
    """A data set as the factory sees it. `shards` names the label shards and says each one's fingerprint."""

    @property
    def root(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def plan_hash(self) -> str: ...
    @property
    def shards(self) -> Sequence[ShardEntry]: ...

    def samples(self, limit: int | None) -> Iterator[tuple[ShardEntry, tuple[SampleRow, ...]]]:
        """The rows of one shard after the other, the first `limit` samples in all."""
        ...

    def part(self, entry: ShardEntry) -> ImagePart: ...


@dataclass(frozen=True)
class ShardFile:
    """One image shard, which must have the sha256 of its index."""

    address: str
    sha256: str

    def read(self, wanted: Collection[int]) -> Iterator[RawSample]:
        if storage.is_local(self.address):
            return read_shard(self.address, wanted=wanted)
        return read_shard(self.address, wanted=wanted, file=io.BytesIO(_remote_bytes(self.address, self.sha256)))

    def fingerprint(self) -> str:
        # A remote shard's bytes were compared as each scorer fetched them; to fetch them once more would say no more.
        return sha256_of(self.address) if storage.is_local(self.address) else self.sha256


@lru_cache(maxsize=1)
def _remote_bytes(address: str, sha256: str) -> bytes:
    """A remote shard is fetched whole, once for all batches of it that a scorer sees in a row."""
    data = storage.read_bytes(address)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BrokenShardError(has_changed(address))
    return data


def has_changed(address: str) -> str:
    """What is said of images that are not those of their index."""
    return f"{address} has changed since it was indexed; write the index again (jobs/shard)"


def problem_of(part: ImagePart, sha256: str) -> str | None:
    """What is wrong with images that were read just now, None if they still are those of the index."""
    try:
        return None if part.fingerprint() == sha256 else has_changed(part.address)
    except (OSError, ValueError) as error:
        return f"{part.address} cannot be read: {error}"


@dataclass(frozen=True)
class _Indexed:
    """What an index and a listing say of themselves alike."""

    index: ShardIndex | ImageListing

    @property
    def root(self) -> str:
        return self.index.root

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.class_names

    @property
    def num_samples(self) -> int:
        return self.index.num_samples

    @property
    def plan_hash(self) -> str:
        return self.index.plan_hash

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        return self.index.shards


@dataclass(frozen=True)
class ShardImages(_Indexed):
    """The image shards of an index."""

    index: ShardIndex

    def samples(self, limit: int | None) -> Iterator[tuple[ShardEntry, tuple[SampleRow, ...]]]:
        return samples_by_shard(self.index, limit=limit)

    def part(self, entry: ShardEntry) -> ShardFile:
        return ShardFile(self.index.path(entry.name), entry.sha256)


@dataclass(frozen=True)
class ListedPart:
    """The image files of one virtual shard."""

    listing: ImageListing
    shard: str

    @property
    def address(self) -> str:
        return f"{self.listing.root} ({self.shard})"

    def read(self, wanted: Collection[int]) -> Iterator[RawSample]:
        return self.listing.read(self.shard, wanted)

    def fingerprint(self) -> str:
        return self.listing.fingerprint(self.shard)


@dataclass(frozen=True)
class ListedImages(_Indexed):
    """The images of a folder."""

    index: ImageListing

    def samples(self, limit: int | None) -> Iterator[tuple[ShardEntry, tuple[SampleRow, ...]]]:
        return self.index.samples(limit or 0)

    def part(self, entry: ShardEntry) -> ListedPart:
        return ListedPart(self.index.only(entry.name), entry.name)


SizeClass = Callable[[int, int], object]
"""(height, width) -> what images must have in common to share a forward pass."""


def batches_of(
    rows: Sequence[SampleRow], *, size_class: SizeClass, batch_images: int, batch_pixels: int
) -> Iterator[tuple[SampleRow, ...]]:
    """Rows of one shard in batches of one size class, in an order that depends on the rows alone.

    A batch holds at most `batch_images` images and `batch_pixels` pixels, and at least one image.
    """
    by_size: dict[object, list[SampleRow]] = {}
    for row in rows:
        by_size.setdefault(size_class(row.height, row.width), []).append(row)
    for group in by_size.values():
        # Equal sizes stand together: they are enlarged together.
        group.sort(key=lambda row: (row.height, row.width, row.row))
        largest = max(row.height * row.width for row in group)
        step = max(1, min(batch_images, batch_pixels // max(1, largest)))
        yield from (tuple(group[start : start + step]) for start in range(0, len(group), step))
