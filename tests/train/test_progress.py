"""Every (epoch, sample) is consumed exactly once, whatever interrupts a run."""

import errno
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfa.data import storage
from dfa.data.reading import epoch_order, remaining_items, shard_offsets
from dfa.data.stream import ReadReject
from dfa.train.checkpoint import (
    CheckpointInfo,
    CorruptCheckpointError,
    best_checkpoint,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_weights,
    prune,
    read_info,
    save_checkpoint,
)
from dfa.train.objective import EngineState
from dfa.train.progress import Ledger, Progress
from tests.train.toy import toy_batch

SIZES = (7, 5, 8)


def pairs_left(progress: Progress, num_samples: int) -> list[tuple[int, int]]:
    offsets = shard_offsets(SIZES)
    items = remaining_items(
        SIZES,
        seed=3,
        num_samples=num_samples,
        finished_epochs=progress.finished_epochs,
        open_epochs=progress.open_epochs,
    )
    return [(item.epoch, int(offsets[item.shard] + row)) for item in items for row in item.rows]


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    orders = []
    for epoch in range(3):
        items = list(epoch_order(SIZES, seed=0, epoch=epoch))
        numbers = [(item.shard, int(row)) for item in items for row in item.rows]
        assert sorted(numbers) == [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
        orders.append(numbers)
    assert orders[0] != orders[1] != orders[2]
    again = [(i.shard, int(r)) for i in epoch_order(SIZES, seed=0, epoch=1) for r in i.rows]
    assert again == orders[1]
    assert [(i.shard, int(r)) for i in epoch_order(SIZES, seed=1, epoch=1) for r in i.rows] != orders[1]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_interrupted_anywhere_consumes_each_pair_exactly_once(seed: int) -> None:
    total, rng = 53, np.random.default_rng(seed)
    whole = pairs_left(Progress(SIZES), total)
    assert len(whole) == total
    progress, consumed = Progress(SIZES), []
    while left := pairs_left(progress, total):
        # workers finish out of order: some of the next dozen samples, never all in a row
        window = left[:12]
        some = [window[i] for i in rng.permutation(len(window))[: rng.integers(1, len(window) + 1)]]
        progress.add(*zip(*some, strict=True))
        progress = Progress.from_tensors(progress.to_tensors())
        consumed += some
    assert sorted(consumed) == sorted(whole)
    assert progress.num_consumed == total
    assert progress.finished_epochs == 2
    assert set(progress.open_epochs) == {2}


def test_what_is_left_after_in_order_consumption_is_the_same_order_continued() -> None:
    whole = pairs_left(Progress(SIZES), 45)
    progress = Progress(SIZES)
    progress.add(*zip(*whole[:27], strict=True))
    assert pairs_left(progress, 45) == whole[27:]


def test_a_longer_run_continues_a_finished_one() -> None:
    progress = Progress(SIZES)
    progress.add(*zip(*pairs_left(Progress(SIZES), 30), strict=True))
    assert pairs_left(progress, 30) == []
    rest = pairs_left(progress, 50)
    progress.add(*zip(*rest, strict=True))
    assert progress.num_consumed == 50


def test_consuming_a_sample_twice_is_an_error() -> None:
    progress = Progress([3, 1])
    progress.add([0, 0], [1, 2])
    with pytest.raises(ValueError, match="sample 1 was consumed twice in epoch 0"):
        progress.add([0], [1])
    progress.add([0, 0], [0, 3])
    assert progress.finished_epochs == 1
    with pytest.raises(ValueError, match="twice in epoch 0"):
        progress.add([0], [0])
    with pytest.raises(ValueError, match="sample 4 is outside the data set of 4"):
        progress.add([1], [4])


def test_a_ledger_adds_its_notes_once() -> None:
    ledger = Ledger(Progress([10]), keep_rows=True)
    ledger.note(toy_batch(range(3, 5)), step=1, micro=0)
    unread = ReadReject(0, 6, "k6", "does not decode")
    ledger.note(replace(toy_batch(range(5, 6)), rejected=(unread,)), step=1, micro=1)
    cpu = torch.device("cpu")
    assert ledger.gather(cpu).num_consumed == 4
    assert ledger.gather(cpu).num_consumed == 4
    rows = ledger.gather_rows()
    assert [(row.micro, row.sample, row.key, row.trained) for row in rows] == [
        (0, 3, "k3", True),
        (0, 4, "k4", True),
        (1, 5, "k5", True),
        (1, 6, "k6", False),
    ]
    assert ledger.gather_rows() == []


def num_bytes(progress: Progress) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in progress.to_tensors().values())


def test_a_finished_shard_costs_one_bit_and_a_shard_under_way_one_a_sample() -> None:
    sizes = [1000] * 100_000  # 100 million samples
    progress = Progress(sizes)
    progress.add(np.zeros(50_300, int), np.arange(1_000_000, 1_050_300))
    assert progress.open_epochs[0].under_way.keys() == {1050}
    assert num_bytes(progress) < 100_000 / 8 + 1000 / 8 + 200
    assert (
        len(list(remaining_items(sizes[:2000], seed=0, num_samples=2_000_000, finished_epochs=0, open_epochs={})))
        == 2000
    )


def test_coco_in_any_order_takes_less_than_a_megabyte() -> None:
    progress = Progress([256] * 323 + [95])
    progress.add(np.zeros(40_000, int), np.random.default_rng(0).permutation(82_783)[:40_000])
    assert num_bytes(progress) < 20_000


def test_progress_of_one_bit_a_sample_is_still_read() -> None:
    """The form of the first checkpoints."""
    bits = np.zeros(20, bool)
    bits[[3, 7, 8, 19]] = True
    old = {
        "finished_epochs": torch.tensor([2]),
        "num_samples": torch.tensor([20]),
        "epoch-2": torch.tensor(np.packbits(bits)),
    }
    progress = Progress.from_tensors(old).over(SIZES)
    assert progress.num_consumed == 44
    left = {sample for epoch, sample in pairs_left(progress, 60) if epoch == 2}
    assert left == set(range(20)) - {3, 7, 8, 19}
    again = Progress.from_tensors(progress.to_tensors())
    assert pairs_left(again, 80) == pairs_left(progress, 80)
    with pytest.raises(ValueError, match="counts 20 samples an epoch in 3 shards, the data set has 20 in 2"):
        progress.over((10, 10))


def state(value: float) -> EngineState:
    tensor = {"w": torch.full((3,), value)}
    return EngineState(tensor, {"w": torch.full((3,), value / 2)}, {"w": torch.full((3,), value / 4)}, 5, 1.0)


def save(run: Path, step: int, miou: float | None = None, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    progress = Progress([20])
    progress.add([0] * step, np.arange(step))
    info = CheckpointInfo(step, step, 0, miou, 5, 1.0, names, {"kind": "toy"})
    return Path(save_checkpoint(run, state(float(step)), progress.to_tensors(), info))


def test_a_checkpoint_returns_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 3, 0.25)
    loaded = latest_checkpoint(tmp_path, class_names=("cat", "dog"))
    assert loaded is not None
    assert torch.equal(loaded.engine.weights["w"], torch.full((3,), 3.0))
    assert torch.equal(loaded.engine.moment2["w"], torch.full((3,), 0.75))
    assert (loaded.info.step, loaded.info.val_miou, loaded.info.model) == (3, 0.25, {"kind": "toy"})
    assert loaded.progress.num_consumed == 3
    assert {p.suffix for p in Path(loaded.folder).iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, 3)
    file = save(tmp_path, 6) / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        spot = data.index(b'"step": 6') + 8 if name == "state.json" else len(data) - 1
        data[spot] = ord("7") if name == "state.json" else data[spot] ^ 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        loaded = latest_checkpoint(tmp_path, class_names=("cat", "dog"))
    assert loaded is not None
    assert loaded.info.step == 3
    assert "step-00000006 is passed over" in caplog.text
    assert name in caplog.text


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    with pytest.raises(ValueError, match=r"2 foreground classes \(cat, dog\).*this run has 3 \(cat, dog, owl\)"):
        latest_checkpoint(tmp_path, class_names=("cat", "dog", "owl"))
    with pytest.raises(ValueError, match="class 2 'dog', this run calls it 'owl'"):
        load_weights(folder, class_names=("cat", "owl"))
    assert load_weights(folder, class_names=None)[1].class_names == ("cat", "dog")


def test_the_best_and_the_last_survive_pruning(tmp_path: Path) -> None:
    for step, miou in ((1, 0.2), (2, 0.5), (3, None), (4, 0.4), (5, None)):
        save(tmp_path, step, miou)
    (tmp_path / "checkpoints" / ".partial-dead").mkdir()
    prune(tmp_path, keep_last=2, newest=5)
    assert [json.loads(Path(p, "state.json").read_text())["step"] for p in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert not (tmp_path / "checkpoints" / ".partial-dead").exists()
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert find_checkpoint(tmp_path, "best") == best == f"{tmp_path}/checkpoints/step-00000002"
    assert find_checkpoint(tmp_path, "latest").endswith("/step-00000005")
    assert find_checkpoint(tmp_path, "4").endswith("/step-00000004")
    with pytest.raises(ValueError, match="no checkpoint '3'; allowed are best, latest or one of"):
        find_checkpoint(tmp_path, "3")


def test_damaged_checkpoints_that_were_passed_over_are_not_kept_in_the_place_of_whole_ones(tmp_path: Path) -> None:
    for step, miou in ((10, 0.2), (15, 0.9), (17, None)):
        save(tmp_path, step, miou)
    for step in (15, 17):
        file = tmp_path / f"checkpoints/step-{step:08d}/model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    continued = latest_checkpoint(tmp_path, class_names=("cat", "dog"))
    assert continued is not None and continued.info.step == 10
    save(tmp_path, 12)
    prune(tmp_path, keep_last=1, newest=12)
    steps = [read_info(folder).step for folder in list_checkpoints(tmp_path)]
    assert steps == [10, 12]  # the best of the whole ones, and the newest


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (3, 6):
        (Path(save(tmp_path, step)) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"none of the 2 checkpoints.*step-00000006.*damaged.*delete them"):
        latest_checkpoint(tmp_path, class_names=("cat", "dog"))


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    real = storage.write_atomic

    def full_disk(address: str, write: Any) -> None:
        if address.endswith("optimizer.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(address, write)

    monkeypatch.setattr(storage, "write_atomic", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, 0.1)
    save(tmp_path, 3, 0.9)
    loaded = latest_checkpoint(tmp_path, class_names=("cat", "dog"))
    assert loaded is not None
    assert loaded.info.val_miou == 0.9
    assert len(list_checkpoints(tmp_path)) == 1
