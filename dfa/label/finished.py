"""A finished folder of labels, read: its index, its table, its samples.

Reads the folder alone (its layout is in `dfa.label.output`), shard by shard, so that memory does not grow with the data
set.
"""

import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet

from dfa.data import storage
from dfa.data.offline import LABELS_KIND
from dfa.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    SAMPLES_NAME,
    BrokenShardError,
    RawSample,
    read_shard,
    sha256_of,
)
from dfa.label.output import Quality

_ROWS_AT_ONCE = 4096
_OPTIONAL_SHARES = ("agreement_model", "agreement_seed_model")
_SHARES = ("confidence", "void_share", "agreement_seed", *_OPTIONAL_SHARES)
#: A member larger than this is no mask of a photograph: a hostile header must not make us allocate it.
_MAX_MEMBER_BYTES = 512 * 2**20
MAX_MAP_PIXELS = 100_000_000


@dataclass(frozen=True)
class LabelRow(Quality):
    """One row of a label folder's samples.parquet: a sample's quality, and the shard (of images and of labels) it is in."""

    shard: str


def read_label_index(root: str) -> dict[str, Any]:
    """Return index.json of a finished folder of labels.

    Raises:
        ValueError: no folder, labels that are not finished, or something else.
    """
    address = storage.join(root, INDEX_NAME)
    if not storage.exists(address):
        raise ValueError(f"{root} has no {INDEX_NAME}: no finished folder of labels; run jobs/pseudo_label (again)")
    document = storage.read_json(address)
    if not isinstance(document, dict) or document.get("kind") != LABELS_KIND:
        raise ValueError(f"{address} is no index of dfa labels")
    if document.get("format") != FORMAT_VERSION:
        raise ValueError(f"{address} has format {document.get('format')}; this version reads format {FORMAT_VERSION}")
    return document


def read_label_rows(root: str) -> Iterator[LabelRow]:
    """Yield the rows of samples.parquet in shard and row order, a few thousand in memory at a time.

    Raises:
        ValueError: a row whose shares are not in 0..1.
    """
    address = storage.join(root, SAMPLES_NAME)
    with storage.open_read(address) as file, pyarrow.parquet.ParquetFile(file) as table:
        columns = list(LabelRow.__dataclass_fields__)
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            yield from (_label_row(row, address) for row in batch.to_pylist())


def _label_row(row: dict[str, Any], address: str) -> LabelRow:
    row |= {"labels": tuple(row["labels"]), "empty": tuple(row["empty"])}
    for name in _SHARES:
        if row[name] is None and name in _OPTIONAL_SHARES:
            continue
        if row[name] is None or not 0 <= row[name] <= 1:
            raise ValueError(f"{address}, key {row['key']!r}: {name} is {row[name]}; allowed: 0..1")
        row[name] = round(row[name], 6)  # the digits that were written, without those of float32
    return LabelRow(**row)


def samples_of(root: str, index: dict[str, Any]) -> Iterator[tuple[LabelRow, RawSample]]:
    """Yield the rows of samples.parquet beside what the shards hold; `image` of the latter is the mask's PNG."""
    rows = read_label_rows(root)
    for shard in index["shards"]:
        address = storage.join(root, shard["name"])
        if sha256_of(address) != shard["sha256"]:
            raise ValueError(
                f"label shard {address} is not as it was written (its SHA-256 is not that of {INDEX_NAME}); delete it, and"
                " the command that wrote it makes it again"
            )
        for sample in read_shard(address) if shard["num_samples"] else ():
            row = next(rows, None)
            if row is None or (row.key, row.shard) != (sample.key, shard["name"]):
                listed = "no more" if row is None else f"key {row.key!r} of {row.shard}"
                raise ValueError(f"{address} holds key {sample.key!r} where {SAMPLES_NAME} lists {listed}")
            yield row, sample
    if (row := next(rows, None)) is not None:
        raise ValueError(f"{root}: {SAMPLES_NAME} lists key {row.key!r} of {row.shard}, which the shards do not hold")


def read_members(address: str, names: Collection[str]) -> dict[str, bytes]:
    """Return those of the named members that a shard holds; the others are skipped, nothing is unpacked to disk.

    Raises:
        BrokenShardError: a damaged tar, or a member that is no plain file of a sensible size.
    """
    found: dict[str, bytes] = {}
    with storage.open_read(address) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.name in names:
                        found[member.name] = _member_bytes(tar, member, address)
                    if len(found) == len(names):
                        break
        except tarfile.TarError as error:
            raise BrokenShardError(f"{address} cannot be read: {error}") from error
    return found


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, address: str) -> bytes:
    file = tar.extractfile(member) if member.isreg() and member.size <= _MAX_MEMBER_BYTES else None
    data = None if file is None else file.read()
    if data is None or len(data) != member.size:
        raise BrokenShardError(f"{address}: member {member.name!r} of {member.size} bytes is no whole plain file")
    return data
