"""WebDataset shards as a consumer sees them: the index, safe reading of one shard, verification.

On disk, in one folder (written by `dfa.data.writer`, commit order from top to bottom):

    plan.json            what was asked for; a folder without it is never written into
    shard-000000.tar     POSIX tar of KEY.jpg | KEY.png (original bytes), KEY.json (labels, size), perhaps KEY.mask.png
    shard-000000.json    commit marker of that shard: counts, sha256, class histogram, rejected samples
    samples.parquet      one row per sample: key, shard, row, labels, width, height, has_mask
    rejects.jsonl        one line per sample that was left out, with its reason
    index.json           last; without it the folder is unfinished

The mask has its own extension because an image may be a PNG itself. Any WebDataset reader takes the tar files as they
are. Class indices are 1..C; nothing is unpacked to disk.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet

from dfa.data import storage

FORMAT_VERSION = 1
INDEX_KIND = "dfa-shards"
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.parquet"
REJECTS_NAME = "rejects.jsonl"
IMAGE_EXTENSIONS = ("jpg", "png")
LABEL_EXTENSION = "json"
MASK_EXTENSION = "mask.png"

# A member larger than this is no photograph: a broken or hostile header must not make us allocate it.
_MAX_MEMBER_BYTES = 512 * 2**20
_MEMBER_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_.]+)")
# A POSIX tar ends with two zero blocks. tarfile stops silently at a damaged header or at the end of the file, so that
# without this check a shard cut between two members would just look shorter.
_END_OF_ARCHIVE = bytes(1024)


class BrokenShardError(ValueError):
    """A shard that cannot be read to its end; the message names the shard and the last good key."""


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in a shard, nothing decoded.

    Attributes:
        key: unique name, letters, digits, `_` and `-`.
        shard: file name of the shard.
        row: position in the shard, from 0.
        image: JPEG or PNG bytes.
        labels: ascending class indices 1..C.
        width, height: pixels, as stored.
        mask: PNG bytes of class indices, or None.
    """

    key: str
    shard: str
    row: int
    image: bytes
    labels: tuple[int, ...]
    width: int
    height: int
    mask: bytes | None


@dataclass(frozen=True)
class SampleRow:
    """One row of samples.parquet."""

    key: str
    shard: str
    row: int
    labels: tuple[int, ...]
    width: int
    height: int
    has_mask: bool


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the index. `class_histogram[c - 1]` counts the samples that carry class c."""

    name: str
    num_samples: int
    size_bytes: int
    sha256: str
    class_histogram: tuple[int, ...]


@dataclass(frozen=True)
class ShardIndex:
    """A finished folder of shards."""

    root: str
    class_names: tuple[str, ...]
    num_samples: int
    num_rejects: int
    shards: tuple[ShardEntry, ...]
    plan_hash: str

    def path(self, name: str) -> str:
        """Return the address of the shard called `name`."""
        return storage.join(self.root, name)

    @property
    def class_histogram(self) -> tuple[int, ...]:
        """Samples per class over all shards; element c - 1 is class c."""
        return tuple(sum(column) for column in zip(*(shard.class_histogram for shard in self.shards), strict=True))


def load_index(root: str) -> ShardIndex:
    """Read the index of a finished folder.

    Raises:
        ValueError: no such folder, sharding unfinished, or an index of another format.
    """
    address = storage.join(root, INDEX_NAME)
    if not storage.exists(root):
        raise ValueError(f"no shard folder {root}; run jobs/shard first")
    if not storage.exists(address):
        names = storage.list_names(root)
        raise ValueError(
            f"{root} has no {INDEX_NAME} (it holds {len(names)} entries): sharding was not finished; run the job again"
        )
    document = storage.read_json(address)
    if not isinstance(document, dict) or document.get("kind") != INDEX_KIND:
        raise ValueError(f"{address} is no index of dfa shards")
    if document.get("format") != FORMAT_VERSION:
        raise ValueError(f"{address} has format {document.get('format')}; this version reads format {FORMAT_VERSION}")
    shards = tuple(
        ShardEntry(s["name"], s["num_samples"], s["size_bytes"], s["sha256"], tuple(s["class_histogram"]))
        for s in document["shards"]
    )
    return ShardIndex(
        root=root,
        class_names=tuple(document["class_names"]),
        num_samples=document["num_samples"],
        num_rejects=document["num_rejects"],
        shards=shards,
        plan_hash=document["plan_hash"],
    )


def read_samples(index: ShardIndex) -> tuple[SampleRow, ...]:
    """Return every row of samples.parquet, in shard and row order."""
    address = storage.join(index.root, SAMPLES_NAME)
    with storage.open_read(address) as file:
        table = pyarrow.parquet.read_table(file)
    rows = tuple(SampleRow(**{**row, "labels": tuple(row["labels"])}) for row in table.to_pylist())
    if len(rows) != index.num_samples:
        raise ValueError(f"{address} has {len(rows)} rows, {INDEX_NAME} says {index.num_samples}")
    return rows


def sha256_of(address: str) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with storage.open_read(address) as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


def verify(root: str) -> tuple[str, ...]:
    """Compare every shard with the index; return one line for each that is missing or changed, none if all is well."""
    index = load_index(root)
    problems = []
    for shard in index.shards:
        address = index.path(shard.name)
        if not storage.exists(address):
            problems.append(f"{shard.name}: missing")
        elif storage.size_bytes(address) != shard.size_bytes:
            problems.append(f"{shard.name}: {storage.size_bytes(address)} bytes, index says {shard.size_bytes}")
        elif sha256_of(address) != shard.sha256:
            problems.append(f"{shard.name}: content differs from the sha256 in the index")
    return tuple(problems)


def read_shard(path: str, *, wanted: Collection[int | str] | None = None) -> Iterator[RawSample]:
    """Read the samples of one shard in order, straight from the tar.

    Args:
        path: address of a .tar file.
        wanted: row numbers or keys to return; the bytes of the others are skipped, not read. None: all.

    Raises:
        BrokenShardError: truncated or damaged tar (after the good samples were yielded), unsafe or foreign members, or
            wanted rows that the shard does not have.
    """
    remaining = None if wanted is None else set(wanted)
    last_key: str | None = None
    with storage.open_read(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for row, (key, members) in enumerate(_group(tar, file, path)):
                    if remaining is None or row in remaining or key in remaining:
                        yield _raw_sample(tar, path, row, key, members)
                        if remaining is not None:
                            remaining -= {row, key}
                    last_key = key
                    if remaining is not None and not remaining:
                        return
        except (tarfile.TarError, EOFError, OSError) as error:
            raise BrokenShardError(f"{path} cannot be read after {_after(last_key)}: {error}") from error
    if remaining:
        raise BrokenShardError(f"{path} has no {sorted(map(str, remaining))}; its last sample is {_after(last_key)}")


def _after(last_key: str | None) -> str:
    return f"key {last_key!r}" if last_key is not None else "the start (no good sample)"


def _group(tar: tarfile.TarFile, file: BinaryIO, path: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Group consecutive members by key, up to the first dot; names are validated before anything is read."""
    key, members = None, {}
    for member in tar:
        match = _MEMBER_NAME.fullmatch(member.name)
        if match is None or not member.isreg():
            raise BrokenShardError(
                f"{path}: member {member.name!r} is not a plain file KEY.EXTENSION (letters, digits, _ and - in KEY)"
            )
        if member.size > _MAX_MEMBER_BYTES:
            raise BrokenShardError(f"{path}: member {member.name!r} claims {member.size} bytes")
        if key is not None and match[1] != key:
            yield key, members
            members = {}
        key = match[1]
        if match[2] in members:
            raise BrokenShardError(f"{path}: member {member.name!r} occurs twice")
        members[match[2]] = member
    file.seek(tar.offset)
    if file.read(len(_END_OF_ARCHIVE)) != _END_OF_ARCHIVE:
        # Before the last sample goes out: its mask may be what is missing.
        raise tarfile.ReadError("truncated or damaged, no end-of-archive blocks")
    if key is not None:
        yield key, members


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"member {member.name!r} has {len(data)} of {member.size} bytes")
    return data


def _raw_sample(tar: tarfile.TarFile, path: str, row: int, key: str, members: dict[str, tarfile.TarInfo]) -> RawSample:
    where = f"{path}, key {key!r}"
    images = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(images) != 1 or LABEL_EXTENSION not in members:
        raise BrokenShardError(
            f"{where}: needed are one of {IMAGE_EXTENSIONS} and {LABEL_EXTENSION!r}, found {sorted(members)}"
        )
    label = _parse_label(_member_bytes(tar, members[LABEL_EXTENSION]), where)
    mask = members.get(MASK_EXTENSION)
    return RawSample(
        key=key,
        shard=path.rsplit("/", 1)[-1],
        row=row,
        image=_member_bytes(tar, members[images[0]]),
        labels=tuple(label["labels"]),
        width=label["width"],
        height=label["height"],
        mask=None if mask is None else _member_bytes(tar, mask),
    )


def _parse_label(data: bytes, where: str) -> dict[str, Any]:
    try:
        label = json.loads(data)
    except ValueError as error:
        raise BrokenShardError(f"{where}: label is not valid JSON: {error}") from error
    if not _is_label(label):
        raise BrokenShardError(f"{where}: needed are positive integers width, height and a list labels, got {label!r}")
    return label


def _is_label(label: Any) -> bool:
    if not isinstance(label, dict) or not isinstance(label.get("labels"), list):
        return False
    return all(
        type(number) is int and number > 0 for number in (label.get("width"), label.get("height"), *label["labels"])
    )
