"""Whole runs on Ray Train: two workers, an interruption, another number of workers, errors that reach the caller."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.cloudpickle

from dfa.data import storage
from dfa.data.reading import remaining_items, shard_offsets
from dfa.data.shards import ShardIndex
from dfa.data.storage import StoreError
from dfa.train.callbacks import Failures
from dfa.train.checkpoint import latest_checkpoint
from dfa.train.history import begin_attempt, note_first_step
from dfa.train.loop import _graceful, run
from dfa.train.objective import NonFiniteLossError
from dfa.train.record import read_metrics
from dfa.train.stop import StopFile
from tests.train import toy

ray.cloudpickle.register_pickle_by_value(toy)  # workers of an outside cluster cannot import tests


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return toy.write_toy_shards(tmp_path_factory.mktemp("shards") / "toy", num_samples=50, samples_per_shard=10)


def interrupt_when_training(run_folder: Path) -> None:
    """Send this process what Ctrl-C sends, once the run has logged a step."""
    deadline, metrics = time.time() + 300, run_folder / "metrics.jsonl"
    while time.time() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_continues_at_another_size_and_sees_each_sample_once(
    ray_session: None, index: ShardIndex, tmp_path: Path
) -> None:
    plan = toy.toy_plan(
        tmp_path, index, num_workers=2, total_steps=400, checkpoint_every=1000, validate_every=0, log_every=5
    )
    threading.Thread(target=interrupt_when_training, args=(tmp_path,), daemon=True).start()
    first = run(plan)
    assert first["interrupted"]
    assert first["world_size"] == 2
    assert 0 < first["step"] < 400
    stopped = latest_checkpoint(tmp_path, class_names=plan.class_names)
    assert stopped is not None
    assert stopped.progress.num_consumed == first["samples_seen"] == 4 * first["step"]

    plan = toy.toy_plan(
        tmp_path, index, num_workers=1, total_steps=first["step"] + 21, engine="torch", validate_every=0
    )
    second = run(plan)
    assert (second["world_size"], second["steps_made"], second["interrupted"]) == (1, 21, False)
    done = latest_checkpoint(tmp_path, class_names=plan.class_names)
    assert done is not None
    assert done.engine.num_updates == plan.total_steps
    # Progress refuses a pair that comes twice, so what remains to be shown is that the set is the specified one.
    assert consumed(done.progress) == specified(index, plan.total_samples)
    assert second["val_miou"] is not None
    assert [line["step"] for line in read_metrics(tmp_path)] == sorted(line["step"] for line in read_metrics(tmp_path))

    third = run(plan)  # complete: returns without starting anything
    assert third["steps_made"] == 0
    assert third["last_checkpoint"] == second["last_checkpoint"]


def consumed(progress: toy.Progress) -> set[tuple[int, int]]:
    found = {(e, n) for e in range(progress.finished_epochs) for n in range(progress.num_samples)}
    offsets = shard_offsets(progress.shard_sizes.tolist())
    for number, epoch in progress.open_epochs.items():
        for shard, size in enumerate(progress.shard_sizes.tolist()):
            rows = np.flatnonzero(epoch.is_consumed(shard, np.arange(size)))
            found |= {(number, int(offsets[shard] + row)) for row in rows}
    return found


def specified(index: ShardIndex, num_samples: int) -> set[tuple[int, int]]:
    sizes = [shard.num_samples for shard in index.shards]
    items = remaining_items(sizes, seed=0, num_samples=num_samples, finished_epochs=0, open_epochs={})
    return {(item.epoch, int(shard_offsets(sizes)[item.shard] + row)) for item in items for row in item.rows}


def test_a_stop_before_the_first_step_ends_at_once_and_one_after_it_waits_for_the_checkpoint(
    index: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder, shape = str(tmp_path), toy.toy_plan(tmp_path, index).batch_shape(2)

    def start_and_step() -> None:
        note_first_step(run_folder, begin_attempt(run_folder, shape, num_workers=2, step=0, samples_seen=0))

    def stop_soon() -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def train() -> str:
        start_and_step()
        while not StopFile(run_folder).asked():
            time.sleep(0.05)
        time.sleep(1.0)  # the checkpoint is written
        return "written"

    start_and_step()  # of an earlier job
    stop_soon()
    with pytest.raises(KeyboardInterrupt):
        _graceful(lambda: time.sleep(30), run_folder)
    assert "nothing was trained since this start" in caplog.text and not StopFile(run_folder).asked()
    stop_soon()
    assert _graceful(train, run_folder) == "written"


def test_failures_end_a_run_when_trying_again_cannot_help(index: ShardIndex, tmp_path: Path) -> None:
    failures = Failures(toy.toy_plan(tmp_path, index, max_failures=2))

    def fail(*errors: Exception) -> None:
        failures.after_exception(None, dict(enumerate(errors)))

    with pytest.raises(ValueError, match="on worker 1: the checkpoint has other classes"):
        fail(RuntimeError("connection reset"), ValueError("the checkpoint has other classes"))
    with pytest.raises(NonFiniteLossError, match="keys"):
        fail(NonFiniteLossError("parts of keys ['k1']"))
    lost = StoreError("s3://bucket is gone")  # a store that comes back is worth another try
    fail(lost)
    fail(lost)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)  # progress: the count begins anew
    fail(lost)
    fail(lost)
    with pytest.raises(RuntimeError, match=r"on worker 0: s3://bucket is gone \(failure 3 in a row\)"):
        fail(lost)


def test_a_store_that_is_down_does_not_end_a_run_before_its_failures_are_counted(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_PAUSE_S", 0.0)
    nobody = "s3://bucket/run?endpoint_override=127.0.0.1:1&scheme=http&access_key=a&secret_key=b"
    failures = Failures(replace(toy.toy_plan(Path("run"), index, max_failures=2), run_folder=nobody))
    lost = StoreError("s3://bucket/run cannot be used")
    for _ in range(2):
        failures.after_exception(None, {0: lost})
    with pytest.raises(RuntimeError, match=r"s3://bucket/run cannot be used \(failure 3 in a row\)"):
        failures.after_exception(None, {0: lost})


@pytest.mark.faults
def test_a_worker_error_reaches_the_caller_as_it_is(ray_session: None, index: ShardIndex, tmp_path: Path) -> None:
    plan = toy.toy_plan(tmp_path, index, precision="fp16", engine="torch")
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        run(plan)


@pytest.mark.faults
def test_a_store_that_fails_while_the_workers_start_is_asked_again(
    ray_session: None, index: ShardIndex, tmp_path: Path
) -> None:
    plan = toy.toy_plan(tmp_path / "run", index, engine="torch", make_validation=None)
    real, once = plan.make_dataset, tmp_path / "once"

    def make_dataset(*arguments: Any) -> Any:
        """In Ray Train's controller, which ends with an error of its own."""
        if not once.exists():
            once.touch()
            raise StoreError("s3://bucket cannot be used: connection reset")
        return real(*arguments)

    result = run(replace(plan, make_dataset=make_dataset))
    assert once.exists() and (result["step"], result["interrupted"]) == (12, False)
