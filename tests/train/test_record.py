"""What a run leaves beside its checkpoints: one history of metrics, on a disk and in an object store, and each start."""

import json
import time
import uuid
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfa.data import storage
from dfa.train.record import Recorder, read_metrics
from dfa.train.starts import differences, note_start, read_starts
from tests.data.object_store import address, object_store


@pytest.fixture(scope="module")
def port():
    with object_store() as port:
        yield port


@pytest.fixture(params=["disk", "s3", "memory"])
def run(request, tmp_path):
    if request.param == "s3":
        return address(request.getfixturevalue("port"), uuid.uuid4().hex)
    return str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}"


def scalars(run, name, folder: Path):
    """(step, value) of one curve as TensorBoard reads the run's event files."""
    folder.mkdir()
    for each in storage.list_names(storage.join(run, "tensorboard")):
        (folder / each).write_bytes(storage.read_bytes(storage.join(run, f"tensorboard/{each}")))
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_metrics_tell_one_history_after_a_crash_and_a_roll_back(run, tmp_path):
    first = Recorder(run, rank=0, first_step=0)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": 1.0 / step, "name": "x", "bad": float("nan")})
        if step == 2:
            first.sync()  # before the checkpoint of step 2
    # The crash: no close, and what came after the checkpoint is lost or is removed.
    time.sleep(1.1)  # event files are ordered by the second in which they were begun
    second = Recorder(run, rank=0, first_step=2)
    assert second.restarts == 1
    for step in (3, 4):
        second.write("train", step, {"loss": 10.0 * step})
    second.close()
    lines = read_metrics(run)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 30.0), (4, 40.0)]
    assert lines[0] == {"kind": "train", "step": 1, "loss": 1.0, "name": "x", "bad": None}
    curve = scalars(run, "train/loss", tmp_path / "events")
    assert curve[-2:] == [(3, 30.0), (4, 40.0)] and [step for step, _ in curve].count(3) == 1


def test_a_store_has_all_lines_up_to_the_last_sync_without_a_close(port):
    run = address(port, uuid.uuid4().hex)
    recorder = Recorder(run, rank=0, first_step=0)
    for step in range(1, 400):
        recorder.write("train", step, {"loss": float(step)})
        if step == 300:
            recorder.sync()
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 301))
    recorder.close()
    assert len(read_metrics(run)) == 399


def test_other_ranks_write_nothing(tmp_path):
    class Never:
        def write(self, kind, step, values):
            raise AssertionError

        def close(self):
            raise AssertionError

    recorder = Recorder(tmp_path / "run", rank=1, first_step=0, observers=[Never()])
    recorder.write("train", 1, {"loss": 1.0})
    recorder.sync()
    recorder.close()
    assert not (tmp_path / "run").exists()


def test_an_observer_is_told_each_line_and_closed_once(tmp_path):
    class Listener:
        def __init__(self):
            self.lines, self.closed = [], 0

        def write(self, kind, step, values):
            self.lines.append((kind, step, dict(values)))

        def close(self):
            self.closed += 1

    listener = Listener()
    recorder = Recorder(tmp_path, rank=0, first_step=0, observers=[listener])
    recorder.write("val", 5, {"miou": 0.5})
    for _ in range(2):
        recorder.close()
    assert listener.lines == [("val", 5, {"miou": 0.5})] and listener.closed == 1


def test_each_start_is_a_line_and_starts_of_a_kind_are_counted(run):
    storage.make_folder(run)
    assert read_starts(run) == []
    assert [note_start(run, kind, {"step": 0}) for kind in ("job", "workers", "workers", "job")] == [0, 0, 1, 1]
    lines = read_starts(run)
    assert [line["kind"] for line in lines] == ["job", "workers", "workers", "job"]
    assert len(read_starts(run, "workers")) == 2
    assert all(json.loads(json.dumps(line)) == line and line["time"].endswith("+00:00") for line in lines)


def test_differences_of_nested_mappings_are_named_with_both_values():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": 5}
    new = {"a": {"b": 2, "c": [1, 2]}, "d": {"x": 1}, "f": False}
    assert differences(old, new) == {"a.b": [1, 2], "d": [None, {"x": 1}], "e": [5, None], "f": [None, False]}
    assert differences(old, old) == {}
