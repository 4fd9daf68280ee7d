"""The history tells an exact run from one that repeats, loses, mistakes or shuffles samples, without looking at progress."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfa.data.reading import epoch_order, shard_offsets
from dfa.data.shards import ShardIndex, read_samples
from dfa.data.stream import Batch
from dfa.train import history
from dfa.train.checkpoint import latest_checkpoint, list_checkpoints
from dfa.train.plan import LoopPlan
from dfa.train.progress import Progress, Row
from dfa.train.worker import Trainer
from tests.train.toy import local_batches, toy_plan

SIZES = (7, 5, 8)
KEYS = [f"k{sample}" for sample in range(20)]


def specified(num_rows: int) -> list[Row]:
    """The first rows of the specified order, four to a step, on two ranks in turn."""
    offsets, rows = shard_offsets(SIZES), []
    for epoch in range(-(-num_rows // 20)):
        for item in epoch_order(SIZES, seed=3, epoch=epoch):
            for row in item.rows.tolist():
                sample, number = int(offsets[item.shard]) + row, len(rows)
                rows.append(Row(1 + number // 4, 0, number % 2, epoch, sample, KEYS[sample], True))
    return rows[:num_rows]


def verdict(tmp_path: Path, rows: list[Row], *, total: int = 48, seen: int | None = None) -> history.Verdict:
    history.write_rows(tmp_path, sorted(rows, key=lambda row: row.rank), step=12, continues_from=0, attempt=1)
    table = history.read_rows(tmp_path, 12)
    return history.verify(
        table, shard_sizes=SIZES, keys=KEYS, seed=3, total_samples=total, samples_seen=total if seen is None else seen
    )


def test_a_run_as_specified_is_exactly_once(tmp_path: Path) -> None:
    found = verdict(tmp_path, specified(48))
    assert found.exactly_once
    assert (found.num_samples, found.num_epochs) == (48, 2)


@pytest.mark.parametrize(
    ("damage", "counts"),
    [
        (lambda rows: [*rows, rows[5]], {"repeated": 1}),
        (lambda rows: rows[:5] + rows[6:], {"lost": 1}),
        (lambda rows: [replace(rows[0], key="k99"), *rows[1:]], {"unknown": 1}),
        (lambda rows: [replace(rows[0], epoch=7), *rows[1:]], {"unknown": 1}),
        (lambda rows: [replace(rows[0], sample=20), *rows[1:]], {"unknown": 1, "lost": 1}),
        (
            lambda rows: [*rows[:5], *rows[6:], replace(rows[5], sample=rows[4].sample, key=rows[4].key)],
            {"repeated": 1, "lost": 1},
        ),
    ],
)
def test_damage_is_counted(tmp_path: Path, damage: Any, counts: dict[str, int]) -> None:
    found = verdict(tmp_path, damage(specified(48)))
    assert not found.exactly_once
    for name, count in counts.items():
        assert getattr(found, name) == count, name


def test_two_rows_of_a_rank_in_the_wrong_order_are_found(tmp_path: Path) -> None:
    rows = specified(48)
    rows[4], rows[6] = rows[6], rows[4]  # both of rank 0
    assert verdict(tmp_path, rows).out_of_order > 0
    rows = specified(48)
    rows[4], rows[5] = rows[5], rows[4]  # between ranks no order is promised
    assert verdict(tmp_path, rows).exactly_once


def train(plan: LoopPlan, index: ShardIndex, fail_after: int | None = None) -> None:
    checkpoint = latest_checkpoint(Path(plan.run_folder), class_names=plan.class_names)
    progress = Progress(plan.shard_sizes) if checkpoint is None else checkpoint.progress

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(local_batches(plan, index, progress)):
            if number == fail_after:
                while number and not (Path(plan.run_folder) / "checkpoints" / "step-00000006").exists():
                    time.sleep(0.01)  # it is written in the background
                raise OSError("power cut")
            yield batch

    trainer = Trainer(plan, device=torch.device("cpu"), checkpoint=checkpoint)
    trainer.train(batches(), report=lambda _: None)


def test_what_a_crash_took_back_is_not_in_the_history(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path, index, engine="torch", checkpoint_every=2, keep_history=True, make_validation=None)
    with pytest.raises(OSError, match="power cut"):
        train(plan, index, fail_after=15)  # in step 8
    newest = Path(list_checkpoints(tmp_path)[-1])
    assert newest.name == "step-00000006"
    (newest / "state.json").write_text("torn")  # so the restart goes back to step 4, and step 6 is done again
    with pytest.raises(OSError, match="power cut"):
        train(plan, index, fail_after=0)
    names = sorted(path.name for path in (tmp_path / "history").glob("step-*"))
    assert names == ["step-00000002.parquet", "step-00000004.parquet"]
    train(plan, index)
    attempts = history.read_attempts(tmp_path)
    assert [(a.number, a.restored_step, a.samples_seen, a.num_workers) for a in attempts] == [
        (1, 0, 0, 1),
        (2, 4, 16, 1),
        (3, 4, 16, 1),
    ]
    assert [a.first_step_at is not None and a.first_step_at > a.started_at for a in attempts] == [True, False, True]
    found = history.verify(
        history.read_rows(tmp_path, 12),
        shard_sizes=plan.shard_sizes,
        keys=[sample.key for sample in read_samples(index)],
        seed=plan.seed,
        total_samples=48,
        samples_seen=48,
    )
    assert found.exactly_once
    assert (found.num_samples, found.num_epochs, found.num_attempts) == (48, 2, 2)


def test_a_history_without_its_beginning_is_refused(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path, index, engine="torch", make_validation=None)
    train(plan, index)
    train(replace(plan, keep_history=True, total_steps=14), index)
    with pytest.raises(ValueError, match=r"step-00000012.parquet is missing: .* up to step 12"):
        history.read_rows(tmp_path, 14)
