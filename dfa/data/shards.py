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
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow
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
SAMPLES_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("shard", pyarrow.string()),
        ("row", pyarrow.int32()),
        ("labels", pyarrow.list_(pyarrow.int16())),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("has_mask", pyarrow.bool_()),
    ]
)

# A member larger than this is no photograph: a broken or hostile header must not make us allocate it.
_MAX_MEMBER_BYTES = 512 * 2**20
_MEMBER_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_.]+)")
# A POSIX tar ends with two zero blocks. tarfile stops silently at a damaged header or at the end of the file, so that
# without this check a shard cut between two members would just look shorter.
_END_OF_ARCHIVE = bytes(1024)
_ROWS_AT_A_TIME = 1024


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
    """Return every row of samples.parquet, in shard and row order; `samples_by_shard` holds one shard's at a time."""
    return tuple(row for _, rows in samples_by_shard(index, limit=None) for row in rows)


def samples_by_shard(index: ShardIndex, *, limit: int | None) -> Iterator[tuple[ShardEntry, tuple[SampleRow, ...]]]:
    """Read samples.parquet shard by shard; memory holds the rows of one shard, however long the file is.

    Args:
        index: the shards, in whose order the file lies.
        limit: only the first so many samples: the last shard's rows may be cut, shards after it do not come. None: all.

    Raises:
        ValueError: the file's number of rows, their shards or their order differ from the index; a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit={limit} must be at least 0, or None for all samples")
    address = storage.join(index.root, SAMPLES_NAME)
    with storage.open_read(address) as opened, _open_parquet(opened, address) as file:
        if file.metadata.num_rows != index.num_samples:
            raise ValueError(f"{address} has {file.metadata.num_rows} rows, {INDEX_NAME} says {index.num_samples}")
        left = index.num_samples if limit is None else min(limit, index.num_samples)
        found = _sample_rows(file)
        for shard in index.shards:
            if left <= 0:
                return
            rows = tuple(islice(found, shard.num_samples))
            _check_rows(address, shard, rows)
            yield shard, rows[:left]
            left -= len(rows)


def _open_parquet(opened: BinaryIO, address: str) -> pyarrow.parquet.ParquetFile:
    try:
        file = pyarrow.parquet.ParquetFile(opened)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{address} is no parquet file: {error}") from error
    if missing := set(SAMPLES_SCHEMA.names) - set(file.schema_arrow.names):
        raise ValueError(f"{address} has no columns {sorted(missing)}; it holds {file.schema_arrow.names}")
    return file


def _sample_rows(file: pyarrow.parquet.ParquetFile) -> Iterator[SampleRow]:
    for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=SAMPLES_SCHEMA.names):
        columns = [batch.column(name).to_pylist() for name in SAMPLES_SCHEMA.names]
        for key, shard, row, labels, width, height, has_mask in zip(*columns, strict=True):
            yield SampleRow(key, shard, row, tuple(labels), width, height, has_mask)


def _check_rows(address: str, shard: ShardEntry, rows: tuple[SampleRow, ...]) -> None:
    if len(rows) != shard.num_samples:
        raise ValueError(f"{address} ends after {len(rows)} of the {shard.num_samples} samples of {shard.name}")
    for position, row in enumerate(rows):
        if (row.shard, row.row) != (shard.name, position):
            raise ValueError(
                f"{address}: key {row.key!r} is row {row.row} of {row.shard}, {INDEX_NAME} has row {position} of "
                f"{shard.name} ({shard.num_samples} samples) here"
            )


def sha256_of(address: str) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with storage.open_read(address) as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


def read_shard(
    path: str, *, wanted: Collection[int | str] | None = None, file: BinaryIO | None = None
) -> Iterator[RawSample]:
    """Read the samples of one shard in order, straight from the tar.

    Args:
        path: address of a .tar file.
        wanted: row numbers or keys to return; the bytes of the others are skipped, not read. None: all.
        file: the content, where a caller holds it already; read from its start and left open. `path` is then its name.

    Raises:
        FileNotFoundError, StoreError: the shard cannot be opened.
        BrokenShardError: truncated or damaged tar or a lost connection (after the good samples were yielded), unsafe or
            foreign members, or wanted rows that the shard does not have.
    """
    remaining = None if wanted is None else set(wanted)
    last_key: str | None = None
    with storage.open_read(path) if file is None else nullcontext(file) as opened:
        try:
            opened.seek(0)
            with tarfile.open(fileobj=opened, mode="r:") as tar:
                for row, (key, members) in enumerate(_group(tar, opened, path)):
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
        shard=storage.base_name(path),
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
