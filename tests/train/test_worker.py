"""The loop of one process, without Ray: what it trains, writes, refuses, and that stopping changes nothing."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dfa.data import storage
from dfa.data.shards import ShardIndex, load_index
from dfa.data.stream import Batch, ReadReject
from dfa.train.checkpoint import latest_checkpoint, list_checkpoints
from dfa.train.objective import LossPart, NonFiniteLossError
from dfa.train.plan import LoopPlan, derive_readers, derive_resources
from dfa.train.progress import Progress
from dfa.train.record import read_metrics
from dfa.train.stop import STOP_NAME
from dfa.train.worker import Trainer
from tests.train.local_run import CPU, stopping_after, train
from tests.train.toy import ToyObjective, local_batches, toy_plan

NODES = [(1,), (2,), (1, 1, 1), (4,), (3, 1), (16, 16), (64,)]
TOO_SMALL = ((1,), 4, 0)  # CPUs of the nodes, workers, fewest workers
PLACES = [each for each in itertools.product(NODES, (1, 2, 4), (0, 1)) if each != TOO_SMALL]


def weights(plan: LoopPlan) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(Path(plan.run_folder), class_names=plan.class_names)
    assert checkpoint is not None
    return checkpoint.engine.weights


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, index: ShardIndex, engine: str) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    made = list[ToyObjective]()

    def make_objective(_: torch.device) -> ToyObjective:
        made.append(ToyObjective(3, dropout=0.3))
        return made[-1]

    settings: dict[str, Any] = {"engine": engine, "make_objective": make_objective}
    whole = toy_plan(tmp_path / "whole", index, **settings)
    result = train(whole, index)
    assert (result["step"], result["samples_seen"], result["interrupted"]) == (12, 48, False)
    parts = toy_plan(tmp_path / "parts", index, **settings)
    run = tmp_path / "parts"
    for number in (3, 11):
        checkpoint = latest_checkpoint(run, class_names=parts.class_names)
        progress = Progress(parts.shard_sizes) if checkpoint is None else checkpoint.progress
        stopped = train(parts, index, stopping_after(local_batches(parts, index, progress), run, number))
        assert stopped["interrupted"]
        (run / STOP_NAME).unlink()
    assert train(parts, index)["step"] == 12
    assert made[0].begun == [step for each in made[1:] for step in each.begun] == list(range(12))
    for name, want in weights(whole).items():
        assert torch.equal(weights(parts)[name], want), name
    same = [
        [line["loss"] for line in read_metrics(tmp_path / n) if line["kind"] == "train"][-1] for n in ("whole", "parts")
    ]
    assert same[0] == same[1]


def test_a_crash_goes_back_to_the_checkpoint_and_ends_equal(tmp_path: Path, index: ShardIndex) -> None:
    whole, crashed = (toy_plan(tmp_path / name, index, engine="torch") for name in ("whole", "crashed"))
    train(whole, index)

    def crashing() -> Iterator[Batch]:
        for i, batch in enumerate(local_batches(crashed, index, Progress(crashed.shard_sizes))):
            if i == 15:
                raise OSError("power cut")
            yield batch

    with pytest.raises(OSError, match="power cut"):
        train(crashed, index, crashing())
    folder = Path(crashed.run_folder)
    assert read_metrics(folder)[-1]["step"] == 6
    train(crashed, index)
    for name, want in weights(whole).items():
        assert torch.equal(weights(crashed)[name], want), name
    steps = [line["step"] for line in read_metrics(folder) if line["kind"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_the_run_folder_tells_the_run(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path, index, engine="torch")
    result = train(plan, index)
    lines = read_metrics(tmp_path)
    assert {line["kind"] for line in lines} == {"train", "val", "checkpoint"}
    assert [line["step"] for line in lines if line["kind"] == "val"] == [6, 12]
    assert lines[0].keys() >= {
        "loss",
        "label",
        "size",
        "images_per_s",
        "data_wait",
        "grad_norm",
        "samples_seen",
        "epoch",
    }
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert result["best_val_miou"] >= result["val_miou"] >= 0
    assert len(list_checkpoints(tmp_path)) <= plan.keep_last + 1


def test_a_notice_is_answered_by_a_checkpoint_on_disk_before_a_validation(tmp_path: Path, index: ShardIndex) -> None:
    """`report` is where Ray may end a worker. A validation is due at the same step, and comes at the next."""
    plan = toy_plan(tmp_path, index, engine="torch", checkpoint_every=100, validate_every=3)
    notices, reported = iter([False] * 5 + [True] * 2), []
    trainer = Trainer(plan, device=CPU, checkpoint=None, warned=lambda: next(notices, False))
    batches = local_batches(plan, index, Progress(plan.shard_sizes))

    def report(metrics: dict[str, Any]) -> None:
        names = [Path(folder).name for folder in list_checkpoints(tmp_path)]
        reported.append((metrics["step"], f"step-{metrics['step']:08d}" in names))

    trainer.train(batches, report=report)
    assert reported[0] == (3, True)
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "val"] == [6, 9, 12]


def test_old_checkpoints_that_cannot_be_deleted_do_not_end_a_run(
    tmp_path: Path, index: ShardIndex, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(storage, "remove_tree", refuse)
    result = train(toy_plan(tmp_path, index, engine="torch", keep_last=1), index)
    assert result["step"] == 12
    assert "old checkpoints were not deleted: [Errno 13] Permission denied" in caplog.text


@pytest.mark.long
def test_workers_that_see_different_checkpoints_do_not_train_on(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path / "run", index, engine="torch")
    train(plan, index)
    with pytest.raises(mp.ProcessRaisedException, match=r"different checkpoints \(steps \[12, 0\], by rank\)"):
        mp.spawn(_one_rank_of_two, (str(tmp_path), index.root), nprocs=2)


def _one_rank_of_two(rank: int, folder: str, shards: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    plan = toy_plan(Path(folder) / "run", load_index(shards), engine="torch", num_workers=2)
    checkpoint = latest_checkpoint(plan.run_folder, class_names=plan.class_names)
    Trainer(plan, device=CPU, checkpoint=None if rank else checkpoint)  # rank 1's machine has not mounted the folder


class Poisoned(ToyObjective):
    def forward(self, batch: Batch) -> list[LossPart]:
        parts = super().forward(batch)
        if "k0004" in batch.keys:
            parts[0] = replace(parts[0], total=parts[0].total * float("nan"))
        return parts


def test_a_nan_loss_stops_before_the_update_and_names_the_batch(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path, index, engine="torch", checkpoint_every=1, make_objective=lambda _: Poisoned(3))
    with pytest.raises(NonFiniteLossError, match=r"parts \['label'\] of keys \[.*'k0004'"):
        train(plan, index)
    assert all(torch.isfinite(w).all() for w in weights(plan).values())


def test_a_short_stream_is_an_error(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path, index, engine="torch")
    batches = local_batches(plan, index, Progress(plan.shard_sizes))
    with pytest.raises(RuntimeError, match="the stream ended after 8 of 48 samples"):
        train(plan, index, iter([next(batches) for _ in range(4)]))


def test_a_run_may_begin_with_samples_that_cannot_be_read(tmp_path: Path, index: ShardIndex) -> None:
    """As a rank that gets filler alone, when a run goes on just before its end."""
    plan = toy_plan(tmp_path, index, engine="torch")
    first, *rest = list(local_batches(plan, index, Progress(plan.shard_sizes)))
    pairs = zip(first.epoch_B.tolist(), first.sample_B.tolist(), first.keys, strict=True)
    unread = replace(
        first,
        keys=(),
        rejected=tuple(ReadReject(epoch, sample, key, "does not decode") for epoch, sample, key in pairs),
        **{name: getattr(first, name)[:0] for name in ("image_B3HW", "valid_BHW", "labels_BC", "epoch_B", "sample_B")},
    )
    result = train(plan, index, iter([unread, *rest]))
    assert (result["samples_seen"], result["num_rejected"]) == (48, len(first))


def test_another_model_or_data_set_is_refused(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path, index, engine="torch")
    train(plan, index)
    with pytest.raises(ValueError, match="another model \\(kind: saved 'toy', now 'large'\\)"):
        train(replace(plan, model_description={"kind": "large"}), index)
    with pytest.raises(ValueError, match="counts 20 samples an epoch in 3 shards, the data set has 21 in 3"):
        train(replace(plan, shard_sizes=(7, 7, 7)), index)


def test_plans_that_do_not_fit_are_refused_with_the_numbers(tmp_path: Path, index: ShardIndex) -> None:
    plan = toy_plan(tmp_path, index)
    with pytest.raises(ValueError, match="global_batch 4 is not a multiple of 3 workers"):
        replace(plan, num_workers=3)
    with pytest.raises(ValueError, match="min_workers must be 0 to num_workers 2, got 3"):
        replace(plan, num_workers=2, min_workers=3)
    with pytest.raises(ValueError, match=r"2 workers with a GPU each, the cluster has 1 GPUs"):
        derive_resources(replace(plan, num_workers=2, use_gpu=True), num_cpus=8, num_gpus=1)
    with pytest.raises(ValueError, match=r"8 workers do not fit on 2 CPUs .* use at most 5 workers"):
        derive_resources(replace(plan, num_workers=8, global_batch=16), num_cpus=2, num_gpus=0)


def test_workers_that_would_leave_no_room_for_readers_are_refused(tmp_path: Path, index: ShardIndex) -> None:
    nodes, workers, min_workers = TOO_SMALL
    plan = replace(toy_plan(tmp_path, index), num_workers=workers, min_workers=min_workers)
    with pytest.raises(ValueError, match=r"4 workers do not fit on 1 CPUs .* use at most 2 workers"):
        derive_resources(plan, num_cpus=sum(nodes), num_gpus=0)


@pytest.mark.parametrize(("node_cpus", "workers", "min_workers"), PLACES)
def test_a_reader_finds_room_wherever_the_workers_lie(
    tmp_path: Path, index: ShardIndex, node_cpus: tuple[int, ...], workers: int, min_workers: int
) -> None:
    plan = replace(toy_plan(tmp_path, index), num_workers=workers, min_workers=min_workers)
    total = sum(node_cpus)
    resources = derive_resources(plan, num_cpus=total, num_gpus=0)
    readers = derive_readers(plan, resources, node_cpus)
    room = [int(cpus // resources.worker_cpus) for cpus in node_cpus]
    for placed in itertools.product(*(range(n + 1) for n in (min(n, workers) for n in room))):
        if sum(placed) <= workers:
            left = [cpus - n * resources.worker_cpus for cpus, n in zip(node_cpus, placed, strict=True)]
            assert max(left) >= readers.read_cpus
            dealt = sum(int(cpus) for cpus in left)  # by Ray: whole CPUs of a node, as dealt out to its data sets
            assert readers.read_cpus == 0 or dealt >= min(2, readers.max_readers) * readers.read_cpus


@pytest.mark.parametrize("global_batch", [4, 16, 17])
def test_any_number_of_workers_makes_the_same_global_batch_or_the_next_above(
    tmp_path: Path, index: ShardIndex, global_batch: int
) -> None:
    plan = replace(
        toy_plan(tmp_path, index), global_batch=global_batch, micro_batch=4, min_workers=1, num_workers=global_batch
    )
    for workers in range(1, 20):
        shape = plan.batch_shape(workers)
        assert shape.micro_batch * shape.num_accumulation * workers == shape.global_batch
        assert shape.micro_batch <= 4
        assert global_batch <= shape.global_batch < global_batch + workers
        if global_batch % workers == 0:
            assert shape.global_batch == global_batch
