"""A folder of image files as virtual shards: the label factory takes them where they lie, without a copy.

    listing = list_images("photos", class_names=names, max_pixels=50_000_000)
    for entry, rows in listing.samples(limit=0):
        part = listing.only(entry.name)              # small: what travels to a worker
        assert part.fingerprint(entry.name) == entry.sha256
        for raw in part.read(entry.name, [row.row for row in rows]): ...

Images are sorted by their path below the folder and cut into shards of a fixed number, so that the same folder always
gives the same shards, and images added behind the last one leave the others as they are.
"""

import hashlib
import io
import json
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from dfa.data.folder import image_names
from dfa.data.labels import strip_image_extension
from dfa.data.samples import sample_key
from dfa.data.shards import RawSample, SampleRow, ShardEntry
from dfa.data.transforms import image_size

# No photograph is larger. What comes behind is not read, so that a file of any size cannot fill the memory.
_MAX_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ImageListing:
    """A folder of images in the place of a `dfa.data.shards.ShardIndex`.

    Attributes:
        root: the folder.
        class_names: the C foreground classes of the masks to come.
        num_samples: images.
        shards: virtual shards by the names that their label shards will have; sha256 is the fingerprint.
        plan_hash: of all relative paths and sizes in bytes.
        names: relative paths of the images of each shard, in row order.
        max_pixels: larger images are listed with no size; decoding rejects them.
    """

    root: str
    class_names: tuple[str, ...]
    num_samples: int
    shards: tuple[ShardEntry, ...]
    plan_hash: str
    names: tuple[tuple[str, ...], ...]
    max_pixels: int

    def only(self, shard: str) -> "ImageListing":
        """Return the listing of one shard alone, for the worker that reads it."""
        place = self._place(shard)
        entry = self.shards[place]
        return replace(self, num_samples=entry.num_samples, shards=(entry,), names=(self.names[place],))

    def samples(self, limit: int) -> Iterator[tuple[ShardEntry, tuple[SampleRow, ...]]]:
        """Yield each shard with its rows; sizes come from the headers, one shard at a time.

        A row whose header cannot be read, or names too many pixels, has width and height 0.

        Args:
            limit: rows in all; 0 for no limit.
        """
        left = limit or self.num_samples
        for entry, names in zip(self.shards, self.names, strict=True):
            if left <= 0:
                return
            yield entry, tuple(self._row(entry.name, row, name) for row, name in enumerate(names[:left]))
            left -= len(names)

    def read(self, shard: str, wanted: Collection[int]) -> Iterator[RawSample]:
        """Yield the files of the wanted rows of a shard, undecoded, in row order; labels are ().

        Raises:
            ValueError: a row that the shard does not have, or a file that cannot be read.
        """
        names = self.names[self._place(shard)]
        if wrong := [row for row in wanted if not 0 <= row < len(names)]:
            raise ValueError(f"{self.root}, {shard} has rows 0..{len(names) - 1}, wanted are {sorted(wrong)[:4]}")
        for row in sorted(set(wanted)):
            data = _read_bytes(os.path.join(self.root, names[row]))
            width, height = _size_or_zero(io.BytesIO(data), self.max_pixels)
            yield RawSample(_key(names[row]), shard, row, data, (), width, height, None)

    def fingerprint(self, shard: str) -> str:
        """Return what `sha256` of the shard would be now: it differs where a file was changed since the listing.

        Raises:
            ValueError: a file is gone.
        """
        return _fingerprint([_stat(self.root, name) for name in self.names[self._place(shard)]])

    def _place(self, shard: str) -> int:
        for place, entry in enumerate(self.shards):
            if entry.name == shard:
                return place
        raise ValueError(f"the listing of {self.root} has no {shard!r}")

    def _row(self, shard: str, row: int, name: str) -> SampleRow:
        path = os.path.join(self.root, name)
        try:
            with open(path, "rb") as file:
                width, height = _size_or_zero(file, self.max_pixels)
        except OSError as error:
            raise _unreadable(path, error) from error
        return SampleRow(_key(name), shard, row, (), width, height, has_mask=False)


@dataclass(frozen=True)
class _File:
    name: str
    size_bytes: int
    modified_ns: int


def list_images(
    root: str, *, class_names: tuple[str, ...], images_per_shard: int = 256, max_pixels: int
) -> ImageListing:
    """List the JPEG and PNG files in a folder and all its sub-folders; hidden files and folders are none.

    Only names, sizes and times are looked at here, no file is opened.

    Args:
        root: folder.
        class_names: foreground classes of the masks to come.
        images_per_shard: images of one unit of work.
        max_pixels: largest width x height that will be decoded.

    Raises:
        ValueError: no such folder, no image in it, an entry that is no plain file, or two images that meet in one key.
    """
    if not os.path.isdir(root):
        raise ValueError(f"no folder of images {root}")
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard must be at least 1, got {images_per_shard}")
    files = [_stat(root, name) for name in image_names(root)]
    _check_keys(root, files)
    parts = [files[first : first + images_per_shard] for first in range(0, len(files), images_per_shard)]
    histogram = (0,) * len(class_names)
    return ImageListing(
        root=root,
        class_names=class_names,
        num_samples=len(files),
        shards=tuple(
            ShardEntry(
                f"shard-{number:06d}.tar", len(part), sum(f.size_bytes for f in part), _fingerprint(part), histogram
            )
            for number, part in enumerate(parts)
        ),
        plan_hash=_digest([[file.name, file.size_bytes] for file in files]),
        names=tuple(tuple(file.name for file in part) for part in parts),
        max_pixels=max_pixels,
    )


def _stat(root: str, name: str) -> _File:
    path = os.path.join(root, name)
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no plain file")
    return _File(name, found.st_size, found.st_mtime_ns)


def _check_keys(root: str, files: list[_File]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(key := _key(file.name), file.name)
        if other != file.name:
            raise ValueError(f"{root}: {other!r} and {file.name!r} meet in one key, {key!r}; rename one of them")


def _key(name: str) -> str:
    return sample_key(strip_image_extension(name))


def _fingerprint(files: list[_File]) -> str:
    return _digest([[file.name, file.size_bytes, file.modified_ns] for file in files])


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be read: {error.strerror}")


def _size_or_zero(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    try:
        return image_size(file, max_pixels=max_pixels)
    except ValueError:
        return 0, 0
