"""A folder of image files as virtual shards: the label factory takes them where they lie, without a copy.

    listing = list_images("photos", class_names=names, max_pixels=50_000_000)
    for entry, rows in listing.samples(limit=0):
        part = listing.only(entry.name)              # small: what travels to a worker
        assert part.fingerprint(entry.name) == entry.sha256
        for raw in part.read(entry.name, [row.row for row in rows]): ...

Images are sorted by their path below the folder and cut into shards of a fixed number, so that the same folder always
gives the same shards, and images added behind the last one leave the others as they are. What cannot be used (a dangling
link, a name that meets another in one key) is left out with its reason; a file that vanishes later breaks its shard alone.
"""

import errno
import hashlib
import io
import json
import logging
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from dfa.data.folder import image_names
from dfa.data.labels import strip_image_extension
from dfa.data.samples import Reject, sample_key
from dfa.data.shards import BrokenShardError, RawSample, SampleRow, ShardEntry
from dfa.data.transforms import header, upright

logger = logging.getLogger(__name__)

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
        plan_hash: of all relative paths and sizes in bytes, and of apply_exif.
        names: relative paths of the images of each shard, in row order.
        max_pixels: larger images are listed with no size; decoding rejects them.
        apply_exif: images are read as viewers turn them.
        rejects: images that were left out, and why.
        unread: pictures that are neither JPEG nor PNG, by suffix.
    """

    root: str
    class_names: tuple[str, ...]
    num_samples: int
    shards: tuple[ShardEntry, ...]
    plan_hash: str
    names: tuple[tuple[str, ...], ...]
    max_pixels: int
    apply_exif: bool
    rejects: tuple[Reject, ...]
    unread: Mapping[str, int]

    def only(self, shard: str) -> "ImageListing":
        """Return the listing of one shard alone, for the worker that reads it."""
        place = self._place(shard)
        entry = self.shards[place]
        own = {"num_samples": entry.num_samples, "shards": (entry,), "names": (self.names[place],)}
        return replace(self, **own, rejects=(), unread={})

    def paths(self) -> dict[str, str]:
        """Return key -> relative path of all images."""
        return {_key(name): name for names in self.names for name in names}

    def samples(self, limit: int) -> Iterator[tuple[ShardEntry, tuple[SampleRow, ...]]]:
        """Yield each shard with its rows; sizes come from the headers, one shard at a time.

        A row whose header cannot be read, or names too many pixels, has width and height 0. How many pictures a viewer
        would turn is told as a warning.

        Args:
            limit: rows in all; 0 for no limit.
        """
        left, num_turned = limit or self.num_samples, 0
        for entry, names in zip(self.shards, self.names, strict=True):
            if left <= 0:
                break
            heads = [self._head(os.path.join(self.root, name)) for name in names[:left]]
            num_turned += sum(turned for _, _, turned in heads)
            yield (
                entry,
                tuple(
                    SampleRow(_key(name), entry.name, row, (), width, height, has_mask=False)
                    for row, (name, (width, height, _)) in enumerate(zip(names, heads, strict=False))
                ),
            )
            left -= len(names)
        if num_turned:
            logger.warning(
                "%s: %d images carry an EXIF orientation; pixels and masks are %s",
                self.root,
                num_turned,
                "as viewers turn them" if self.apply_exif else "as stored (data.apply_exif=true: as viewers turn them)",
            )

    def read(self, shard: str, wanted: Collection[int]) -> Iterator[RawSample]:
        """Yield the files of the wanted rows of a shard, undecoded, in row order; labels are ().

        Raises:
            ValueError: a row that the shard does not have.
            BrokenShardError: a file that can no longer be read.
        """
        names = self.names[self._place(shard)]
        if wrong := [row for row in wanted if not 0 <= row < len(names)]:
            raise ValueError(f"{self.root}, {shard} has rows 0..{len(names) - 1}, wanted are {sorted(wrong)[:4]}")
        for row in sorted(set(wanted)):
            data = _read_bytes(os.path.join(self.root, names[row]))
            if self.apply_exif:
                data = self._upright(data)
            width, height, _ = self._header_or_zero(io.BytesIO(data))
            yield RawSample(_key(names[row]), shard, row, data, (), width, height, None)

    def fingerprint(self, shard: str) -> str:
        """Return what `sha256` of the shard would be now: it differs where a file was changed since the listing.

        Raises:
            BrokenShardError: a file is gone.
        """
        try:
            return _fingerprint([_stat(self.root, name) for name in self.names[self._place(shard)]])
        except OSError as error:
            raise _unreadable(str(error.filename), error) from error

    def _head(self, path: str) -> tuple[int, int, bool]:
        try:
            with open(path, "rb") as file:
                return self._header_or_zero(file)
        except OSError:  # gone since it was listed: the worker that shall read it says so
            return 0, 0, False

    def _header_or_zero(self, file: BinaryIO) -> tuple[int, int, bool]:
        try:
            return header(file, max_pixels=self.max_pixels, apply_exif=self.apply_exif)
        except ValueError:
            return 0, 0, False

    def _upright(self, data: bytes) -> bytes:
        try:
            return upright(data, max_pixels=self.max_pixels)
        except ValueError:  # decoding will say what it is
            return data

    def _place(self, shard: str) -> int:
        for place, entry in enumerate(self.shards):
            if entry.name == shard:
                return place
        raise ValueError(f"the listing of {self.root} has no {shard!r}")


@dataclass(frozen=True)
class _File:
    name: str
    size_bytes: int
    modified_ns: int


def list_images(
    root: str, *, class_names: tuple[str, ...], images_per_shard: int = 256, max_pixels: int, apply_exif: bool = False
) -> ImageListing:
    """List the JPEG and PNG files in a folder and all its sub-folders; hidden files and folders are none.

    Only names, sizes and times are looked at here, no file is opened.

    Args:
        root: folder.
        class_names: foreground classes of the masks to come.
        images_per_shard: images of one unit of work.
        max_pixels: largest width x height that will be decoded.
        apply_exif: read images as viewers turn them, and make masks for that; else as they are stored.

    Raises:
        ValueError: no such folder, or no usable image in it.
    """
    if not os.path.isdir(root):
        raise ValueError(f"no folder of images {root}")
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard must be at least 1, got {images_per_shard}")
    names, unread = image_names(root)
    files, rejects = _usable(root, names)
    if not files:
        raise ValueError(f"no usable image in {root}: {rejects[0].path}: {rejects[0].reason}")
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
        plan_hash=_digest([*(["apply_exif"] if apply_exif else []), *([file.name, file.size_bytes] for file in files)]),
        names=tuple(tuple(file.name for file in part) for part in parts),
        max_pixels=max_pixels,
        apply_exif=apply_exif,
        rejects=rejects,
        unread=unread,
    )


def _usable(root: str, names: list[str]) -> tuple[list[_File], tuple[Reject, ...]]:
    """The files that can be read, each with a key of its own; the others with the reason."""
    files, rejects, seen = list[_File](), list[Reject](), dict[str, str]()
    for name in names:
        try:
            key = _key(name)
        except UnicodeEncodeError:
            rejects.append(Reject("", repr(name), "its name is no UTF-8 text; rename it"))
            continue
        try:
            file = _stat(root, name)
        except OSError as error:
            rejects.append(Reject(key, name, f"cannot be read: {error.strerror}"))
            continue
        if (other := seen.setdefault(key, name)) != name:
            rejects.append(Reject(key, name, f"has the key of {other!r}, {key!r}; rename one of them"))
        else:
            files.append(file)
    return files, tuple(rejects)


def _stat(root: str, name: str) -> _File:
    path = os.path.join(root, name)
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no plain file", path)
    if not os.access(path, os.R_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
    return _File(name, found.st_size, found.st_mtime_ns)


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


def _unreadable(path: str, error: OSError) -> BrokenShardError:
    return BrokenShardError(f"{path} cannot be read: {error.strerror}; run again without it")
