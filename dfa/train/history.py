"""The committed history of a run: who trained which sample when, so that "each sample exactly once" can be checked.

    RUN/history/attempt-NNNN.json      a start of the workers: when, how many, from which step
                step-00000500.parquet  what every rank consumed since the checkpoint before that of step 500

The rows of a checkpoint are on disk before it becomes visible and name the step that they continue from. What a crash
takes back is therefore no longer reached from the last checkpoint, and is deleted at the next start. `verify` holds the
rows against the index and the specified order; it does not look at the progress that a checkpoint keeps.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from dfa.data import storage
from dfa.data.reading import epoch_order, shard_offsets
from dfa.train.plan import BatchShape
from dfa.train.progress import Row

FOLDER = "history"
_ATTEMPT, _STEP = "attempt-", "step-"
_PARENT = b"continues_from"
_SCHEMA = pyarrow.schema(
    [
        ("step", pyarrow.int64()),
        ("micro", pyarrow.int32()),
        ("rank", pyarrow.int32()),
        ("epoch", pyarrow.int64()),
        ("sample", pyarrow.int64()),
        ("key", pyarrow.string()),
        ("trained", pyarrow.bool_()),
        ("attempt", pyarrow.int32()),
    ]
)


@dataclass(frozen=True)
class Attempt:
    """One start of the workers. Times in seconds since 1970; first_step_at is None until its first step was made."""

    number: int
    started_at: float
    num_workers: int
    restored_step: int
    samples_seen: int
    micro_batch: int
    num_accumulation: int
    global_batch: int
    first_step_at: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What `verify` found. A run is exactly once where repeated, lost, unknown and out_of_order are all 0.

    num_samples: rows of the history. num_epochs: epochs that are complete. repeated: (epoch, sample) pairs beyond the
    first. lost: samples that the last checkpoint counts and the history does not have. unknown: rows whose sample, epoch
    or key is not of the run. out_of_order: rows that come, within one rank of one attempt, before a row that the
    specified order puts earlier; between ranks no order is promised. not_read: samples that were counted but could not
    be decoded.
    """

    num_samples: int
    num_epochs: int
    repeated: int
    lost: int
    unknown: int
    out_of_order: int
    not_read: int
    num_attempts: int

    @property
    def exactly_once(self) -> bool:
        return self.repeated == self.lost == self.unknown == self.out_of_order == 0


def begin_attempt(run: Path | str, shape: BatchShape, *, num_workers: int, step: int, samples_seen: int) -> Attempt:
    """Delete what lies beyond the restored step and write down a start of the workers; for rank 0."""
    folder = _folder(run)
    storage.make_folder(folder)
    names = storage.list_names(folder)
    for name in names:
        if name.startswith(_STEP) and _number(name) > step:
            storage.remove(storage.join(folder, name))
    number = 1 + max((_number(name) for name in names if name.startswith(_ATTEMPT)), default=0)
    attempt = Attempt(number, time.time(), num_workers, step, samples_seen, **asdict(shape))
    _write_attempt(folder, attempt)
    return attempt


def note_first_step(run: Path | str, attempt: Attempt) -> None:
    """Complete the record of an attempt with the time of its first step."""
    _write_attempt(_folder(run), replace(attempt, first_step_at=time.time()))


def _write_attempt(folder: str, attempt: Attempt) -> None:
    storage.write_json(storage.join(folder, f"{_ATTEMPT}{attempt.number:04d}.json"), asdict(attempt))


def read_attempts(run: Path | str) -> list[Attempt]:
    """All starts of a run's workers, in order."""
    names = [name for name in _names(run) if name.startswith(_ATTEMPT)]
    records = [storage.read_json(storage.join(_folder(run), name)) for name in names]
    return [Attempt(**{each.name: record[each.name] for each in fields(Attempt)}) for record in records]


def write_rows(run: Path | str, rows: Sequence[Row], *, step: int, continues_from: int, attempt: int) -> None:
    """Write what was consumed up to `step` since the checkpoint of `continues_from`; to be called before step's own."""
    columns = {each.name: [getattr(row, each.name) for row in rows] for each in fields(Row)}
    schema = _SCHEMA.with_metadata({_PARENT: str(continues_from).encode()})
    storage.make_folder(_folder(run))
    table = pyarrow.table(columns | {"attempt": [attempt] * len(rows)}, schema=schema)
    address = storage.join(_folder(run), f"{_STEP}{step:08d}.parquet")
    storage.write_atomic(address, lambda file: pyarrow.parquet.write_table(table, file, compression="zstd"))


def read_rows(run: Path | str, last_step: int) -> pyarrow.Table:
    """The rows that led to the checkpoint of `last_step`, from the run's beginning on.

    Raises:
        ValueError: a file is missing: the run did not keep its history from the beginning.
    """
    tables, step = [], last_step
    while step > 0:
        address = storage.join(_folder(run), f"{_STEP}{step:08d}.parquet")
        if not storage.exists(address):
            raise ValueError(
                f"{address} is missing: the run did not keep its history up to step {step} (train.history)"
            )
        with storage.open_read(address) as file:
            table = pyarrow.parquet.read_table(cast(Any, file))
        tables.append(table)
        step = int(table.schema.metadata[_PARENT])
    return pyarrow.concat_tables(
        [table.replace_schema_metadata() for table in reversed(tables)] or [_SCHEMA.empty_table()]
    )


def verify(
    rows: pyarrow.Table,
    *,
    shard_sizes: Sequence[int],
    keys: Sequence[str],
    seed: int,
    total_samples: int,
    samples_seen: int,
) -> Verdict:
    """Hold a committed history against what the run should have seen.

    Args:
        keys: of every sample, in index order.
        total_samples: of the whole run; the first so many of the specified order are its own.
        samples_seen: what the last checkpoint counts; total_samples where the run is complete.
    """
    per_epoch = sum(shard_sizes)
    epoch, sample = rows["epoch"].to_numpy(), rows["sample"].to_numpy()
    known = (sample >= 0) & (sample < per_epoch) & (epoch >= 0)
    named = np.array(keys, object)[np.where(known, sample, 0)] == rows["key"].to_numpy(zero_copy_only=False)
    position = np.full(len(epoch), -1, np.int64)
    for number in np.unique(epoch[known]).tolist():
        here = known & (epoch == number)
        position[here] = number * per_epoch + _positions(shard_sizes, seed=seed, epoch=number)[sample[here]]
    distinct = np.unique(position[known])
    return Verdict(
        num_samples=len(epoch),
        num_epochs=int((np.bincount(distinct // per_epoch) == per_epoch).sum()),
        repeated=int(known.sum()) - len(distinct),
        lost=samples_seen - len(distinct),
        unknown=int((~known | ~named | (position >= total_samples)).sum()),
        out_of_order=_out_of_order(position, rows),
        not_read=int((~rows["trained"].to_numpy(zero_copy_only=False)).sum()),
        num_attempts=len(np.unique(rows["attempt"].to_numpy())),
    )


def _positions(shard_sizes: Sequence[int], *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Place of each sample in the specified order of its epoch."""
    offsets = shard_offsets(shard_sizes)
    order = np.concatenate(
        [offsets[item.shard] + item.rows for item in epoch_order(shard_sizes, seed=seed, epoch=epoch)]
    )
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places


def _out_of_order(position: npt.NDArray[np.int64], rows: pyarrow.Table) -> int:
    """Trained rows whose predecessor on the same rank of the same attempt has a later place."""
    trained = np.flatnonzero(rows["trained"].to_numpy(zero_copy_only=False))
    attempt, rank = (rows[name].to_numpy()[trained] for name in ("attempt", "rank"))
    order = np.lexsort((trained, rank, attempt))  # the rows of a rank lie in the order in which it took them
    same = (np.diff(attempt[order]) == 0) & (np.diff(rank[order]) == 0)
    return int((same & (np.diff(position[trained][order]) < 0)).sum())


def _folder(run: Path | str) -> str:
    return storage.join(str(run), FOLDER)


def _names(run: Path | str) -> list[str]:
    folder = _folder(run)
    return storage.list_names(folder) if storage.exists(folder) else []


def _number(name: str) -> int:
    return int(name.partition("-")[2].partition(".")[0])
