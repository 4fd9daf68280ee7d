"""Checkpoints in an object store: complete or not there, whatever happens to the writer, the way or the files."""

import logging
import uuid

import pytest
import torch

from dfa.data import storage
from dfa.train.checkpoint import (
    CheckpointInfo,
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
from dfa.train.progress import Progress
from tests.data.object_store import DisturbedWay, address, object_store

NAMES = ("cat", "dog")
FILES = ["model.safetensors", "optimizer.safetensors", "progress.safetensors", "state.json"]


@pytest.fixture(scope="module")
def port():
    with object_store() as port:
        yield port


@pytest.fixture
def way(port, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_PAUSE_S", 0.0)
    way = DisturbedWay(port)
    yield way
    way.close()


@pytest.fixture
def run(way):
    """A remote run folder that is not there yet."""
    return address(way.port, uuid.uuid4().hex)


def save(run, step, miou=None, size=3):
    weights, moment1, moment2 = ({"w": torch.full((size,), step / part)} for part in (1, 2, 4))
    progress = Progress([20])
    progress.add([0] * step, range(step))
    info = CheckpointInfo(step, step, 0, miou, 5, 1.0, NAMES, {"kind": "toy"})
    return save_checkpoint(run, EngineState(weights, moment1, moment2, 5, 1.0), progress.to_tensors(), info)


def steps(run):
    return [int(storage.base_name(folder).removeprefix("step-")) for folder in list_checkpoints(run)]


def test_a_store_holds_the_same_files_as_a_folder(run, tmp_path):
    assert latest_checkpoint(run, class_names=NAMES) is None and list_checkpoints(run) == []
    remote, local = save(run, 3, 0.25), save(tmp_path, 3, 0.25)
    for folder in (remote, local):
        assert storage.list_names(folder) == FILES
    for name in FILES:
        assert storage.read_bytes(storage.join(remote, name)) == storage.read_bytes(storage.join(local, name))
    found = latest_checkpoint(run, class_names=NAMES)
    assert (found.folder, found.info.val_miou, found.progress.num_consumed) == (remote, 0.25, 3)
    assert torch.equal(found.engine.moment2["w"], torch.full((3,), 0.75))
    assert load_weights(remote, class_names=NAMES)[1] == read_info(remote)


def test_the_state_is_put_last_and_taken_first(run, way):
    folder = storage.base_name(save(run, 3))
    puts = [line.split("?")[0].rsplit("/")[-1] for line in way.requests if line.startswith(("PUT", "POST"))]
    puts = [name for name in puts if name in FILES]
    assert list(dict.fromkeys(puts)) == FILES and puts[-1] == "state.json"
    way.requests.clear()
    save(run, 4)
    prune(run, keep_last=1, newest=4)
    first = next(line for line in way.requests if line.startswith(("DELETE", "POST")) and folder in line)
    assert first.startswith("DELETE") and "state.json" in first
    assert steps(run) == [4]


@pytest.mark.parametrize("name", FILES)
def test_a_writer_that_fails_at_any_file_leaves_no_checkpoint_and_the_next_cleans_up(run, way, name, caplog):
    save(run, 3)
    way.refuse, way.refusals = f"step-00000006/{name}?uploads".encode(), 10**6
    with pytest.raises(OSError, match=r"cannot be used"):
        save(run, 6)
    way.refusals = 0
    assert steps(run) == [3]
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run, class_names=NAMES).info.step == 3
    assert "step-00000006 is passed over" in caplog.text
    save(run, 7)
    prune(run, keep_last=2, newest=7)
    assert storage.list_names(storage.join(run, "checkpoints")) == ["step-00000003", "step-00000007"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_in_a_store_sends_a_run_to_the_checkpoint_before(run, name, damage, caplog):
    save(run, 3)
    file = storage.join(save(run, 6), name)
    data = bytearray(storage.read_bytes(file))
    if damage == "remove":
        storage.remove(file)
    else:
        spot = data.index(b'"step": 6') + 8 if name == "state.json" else len(data) - 1
        data[spot] = ord("7") if name == "state.json" else data[spot] ^ 1
        content = bytes(data if damage == "flip" else data[: len(data) // 2])
        storage.write_atomic(file, lambda stream: stream.write(content))
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run, class_names=NAMES).info.step == 3
    assert "step-00000006 is passed over" in caplog.text and name in caplog.text


def test_connections_that_drop_while_it_is_written_and_read_do_no_harm(run, way):
    way.cuts, way.cut_after = 3, 100
    save(run, 5, size=300_000)
    way.cuts, way.cut_after = 1, 600_000  # in the middle of the weights
    found = latest_checkpoint(run, class_names=NAMES)
    assert way.cuts == 0
    assert torch.equal(found.engine.weights["w"], torch.full((300_000,), 5.0))


def test_a_store_that_does_not_answer_is_no_damage(run, way):
    save(run, 3)
    save(run, 6)
    way.refuse, way.refusals = b"GET /bucket/", 10**6
    with pytest.raises(storage.StoreError, match="cannot be used"):
        latest_checkpoint(run, class_names=NAMES)  # not step 3, and not a run from the start


def test_the_best_and_the_last_survive_pruning_in_a_store(run):
    for step, miou in ((1, 0.2), (2, 0.5), (3, None), (4, 0.4), (5, None)):
        save(run, step, miou)
    prune(run, keep_last=2, newest=5)
    assert steps(run) == [2, 4, 5]
    assert find_checkpoint(run, "best") == best_checkpoint(run)
    assert read_info(find_checkpoint(run, "best")).step == 2
    assert read_info(find_checkpoint(run, "latest")).step == 5
    assert read_info(find_checkpoint(run, "4")).step == 4
    with pytest.raises(ValueError, match="no checkpoint '3'; allowed are best, latest or one of"):
        find_checkpoint(run, "3")


def test_saving_a_step_again_in_a_store_replaces_it(run):
    save(run, 3, 0.1)
    save(run, 3, 0.9)
    assert latest_checkpoint(run, class_names=NAMES).info.val_miou == 0.9 and steps(run) == [3]


def test_a_store_that_only_moves_files_works_too():
    run = f"memory://{uuid.uuid4().hex}"
    for step in (1, 2, 3):
        save(run, step)
    prune(run, keep_last=1, newest=3)
    assert steps(run) == [3] and latest_checkpoint(run, class_names=NAMES).info.step == 3
