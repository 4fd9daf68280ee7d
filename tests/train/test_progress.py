"""Every (epoch, sample) is consumed exactly once, whatever interrupts a run."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from dfa.data.reading import epoch_order, remaining_items, shard_offsets
from dfa.train.checkpoint import (
    CheckpointInfo,
    best_checkpoint,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_weights,
    prune,
    save_checkpoint,
)
from dfa.train.objective import EngineState
from dfa.train.progress import Ledger, Progress

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
    whole = pairs_left(Progress(20), total)
    assert len(whole) == total
    progress, consumed = Progress(20), []
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
    whole = pairs_left(Progress(20), 45)
    progress = Progress(20)
    progress.add(*zip(*whole[:27], strict=True))
    assert pairs_left(progress, 45) == whole[27:]


def test_a_longer_run_continues_a_finished_one() -> None:
    progress = Progress(20)
    progress.add(*zip(*pairs_left(Progress(20), 30), strict=True))
    assert pairs_left(progress, 30) == []
    rest = pairs_left(progress, 50)
    progress.add(*zip(*rest, strict=True))
    assert progress.num_consumed == 50


def test_consuming_a_sample_twice_is_an_error() -> None:
    progress = Progress(4)
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
    ledger = Ledger(Progress(10))
    ledger.note(torch.tensor([0, 0]), torch.tensor([3, 4]))
    ledger.note(torch.tensor([0]), torch.tensor([5]))
    cpu = torch.device("cpu")
    assert ledger.gather(cpu).num_consumed == 3
    assert ledger.gather(cpu).num_consumed == 3


def test_bitmaps_of_a_million_samples_stay_small() -> None:
    progress = Progress(1_000_000)
    progress.add([0, 1], [7, 9])
    assert sum(t.numel() * t.element_size() for t in progress.to_tensors().values()) < 2 * 125_000 + 100


def state(value: float) -> EngineState:
    tensor = {"w": torch.full((3,), value)}
    return EngineState(tensor, {"w": torch.full((3,), value / 2)}, {"w": torch.full((3,), value / 4)}, 5, 1.0)


def save(run: Path, step: int, miou: float | None = None, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    progress = Progress(20)
    progress.add([0] * step, range(step))
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
    prune(tmp_path, keep_last=2)
    assert [json.loads(Path(p, "state.json").read_text())["step"] for p in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert not (tmp_path / "checkpoints" / ".partial-dead").exists()
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert find_checkpoint(tmp_path, "best") == best == f"{tmp_path}/checkpoints/step-00000002"
    assert find_checkpoint(tmp_path, "latest").endswith("/step-00000005")
    assert find_checkpoint(tmp_path, "4").endswith("/step-00000004")
    with pytest.raises(ValueError, match="no checkpoint '3'; allowed are best, latest or one of"):
        find_checkpoint(tmp_path, "3")


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, 0.1)
    save(tmp_path, 3, 0.9)
    loaded = latest_checkpoint(tmp_path, class_names=("cat", "dog"))
    assert loaded is not None
    assert loaded.info.val_miou == 0.9
    assert len(list_checkpoints(tmp_path)) == 1
