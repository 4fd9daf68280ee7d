"""A whole run on Ray Train with shards and run folder in an object store, over a way that drops connections."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray.cloudpickle
import torch

from dfa.data import storage
from dfa.data.shards import load_index
from dfa.train.checkpoint import latest_checkpoint, list_checkpoints
from dfa.train.loop import run
from dfa.train.progress import Progress
from dfa.train.record import read_metrics
from dfa.train.starts import read_starts
from dfa.train.stop import StopFile
from dfa.train.worker import Trainer
from tests.data.object_store import DisturbedWay, address, object_store
from tests.train import toy

ray.cloudpickle.register_pickle_by_value(toy)  # workers of an outside cluster cannot import tests

SETTINGS = {"engine": "torch", "total_steps": 24, "checkpoint_every": 5, "validate_every": 0, "make_validation": None}


@pytest.fixture
def way(monkeypatch):
    with object_store() as port:
        way = DisturbedWay(port)
        yield way
        way.close()


def copy_folder(source: Path, target: str) -> None:
    for path in sorted(source.iterdir()):
        data = path.read_bytes()
        storage.write_atomic(storage.join(target, path.name), lambda file, data=data: file.write(data))


def stop_after(way: DisturbedWay, step: int, run_folder: str) -> None:
    """Cut connections in the middle of training, then ask for a stop once a checkpoint of STEP is being written."""
    deadline = time.time() + 300
    while time.time() < deadline and not any(f"step-{step:08d}/state.json" in line for line in way.requests):
        time.sleep(0.05)
    way.cuts, way.cut_after = 3, 50
    StopFile(run_folder).ask()


def killed_once(marker: Path, run_folder: str):
    """An objective whose process gets SIGKILL in the middle of its 8th step, once all that is written at step 5 is there;
    from then on it takes half a second a step.

    A stop file in a store is seen up to 2 s after it was written: 14 steps must take longer than that.
    """

    def make(device):
        class Killed(toy.ToyObjective):
            num_batches = 0

            def forward(self, batch):
                Killed.num_batches += 1
                if Killed.num_batches == 16 and not marker.exists():
                    written = storage.join(run_folder, "checkpoints/step-00000005/state.json")
                    records = storage.join(run_folder, "tensorboard")
                    deadline = time.time() + 60
                    while time.time() < deadline and not (storage.exists(written) and storage.list_names(records)):
                        time.sleep(0.1)
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if marker.exists():
                    time.sleep(0.25)
                return super().forward(batch)

        return Killed(3).to(device)

    return make


@pytest.mark.faults
def test_a_run_in_an_object_store_killed_stopped_and_resumed_over_a_broken_way_equals_a_local_one(
    ray_session, way, tmp_path
):
    index = toy.write_toy_shards(tmp_path / "toy", num_samples=40, samples_per_shard=10)
    local = toy.toy_plan(tmp_path / "local", index, **SETTINGS)
    Trainer(local, device=torch.device("cpu"), checkpoint=None).train(
        toy.local_batches(local, index, Progress([shard.num_samples for shard in index.shards])), report=lambda _: None
    )
    copy_folder(tmp_path / "toy", address(way.port, "shards"))
    remote_index = load_index(address(way.port, "shards"))
    folder = address(way.port, "run")
    killed = {"make_objective": killed_once(tmp_path / "killed", folder), "max_failures": 1}
    remote = toy.toy_plan(folder, remote_index, **SETTINGS, **killed)
    stopper = threading.Thread(target=stop_after, args=(way, 10, folder), daemon=True)
    stopper.start()
    first = run(remote)
    stopper.join()
    assert (tmp_path / "killed").exists()
    assert first["interrupted"] and 10 <= first["step"] < 24
    # What a writer that was killed and a disk that failed leave: half a checkpoint, and one with other bytes.
    half = storage.join(folder, "checkpoints/step-00000023")
    storage.write_atomic(storage.join(half, "model.safetensors"), lambda file: file.write(b"half"))
    newest = list_checkpoints(folder)[-1]
    storage.write_atomic(storage.join(newest, "model.safetensors"), lambda file: file.write(b"broken"))
    way.cuts = 2
    second = run(toy.toy_plan(folder, remote_index, **SETTINGS))
    assert (second["step"], second["samples_seen"], second["interrupted"]) == (24, 96, False)
    assert second["steps_made"] > 24 - first["step"]  # the damaged checkpoint's steps were made again
    assert way.cuts == 0
    mine, theirs = (latest_checkpoint(plan.run_folder, class_names=plan.class_names) for plan in (remote, local))
    for name, want in theirs.engine.weights.items():
        # Workers have other numbers of threads than this process. Another batch would move a weight by about 1e-3.
        torch.testing.assert_close(mine.engine.weights[name], want, rtol=0, atol=1e-6, msg=name)
    assert second["last_checkpoint"] == mine.folder == storage.join(folder, "checkpoints/step-00000024")
    assert storage.base_name(half) not in storage.list_names(storage.join(folder, "checkpoints"))
    steps = [line["step"] for line in read_metrics(folder) if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 24
    assert len(storage.list_names(storage.join(folder, "tensorboard"))) == 3  # one of each start
    starts = read_starts(folder, "workers")
    assert [each["step"] for each in starts[::2]] == [0, second["step"] - second["steps_made"]]
    assert starts[1]["step"] == 5
    assert read_metrics(folder)[-1]["kind"] == "checkpoint" and read_metrics(folder)[-2]["restarts"] == 2
    assert not storage.exists(storage.join(folder, "ray")) and not storage.exists(
        storage.join(folder, "stop-requested")
    )
