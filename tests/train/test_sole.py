"""A run folder is held by one process, for as long as that lives."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dfa.train.sole import alone_in

HOLD = "import sys, time; from dfa.train.sole import alone_in\nwith alone_in(sys.argv[1]): print('held', flush=True); time.sleep(600)"


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_training_in_the_folder_is_refused_and_told_who_is_there(tmp_path, holder):
    with (
        pytest.raises(ValueError, match=rf"being trained by process {holder.pid} on \S+ since .*run="),
        alone_in(str(tmp_path), patience_s=0.0),
    ):
        raise AssertionError("two hold it")


def test_a_killed_holder_leaves_the_folder_free_and_is_waited_for(tmp_path, holder, caplog):
    threading.Timer(0.5, holder.kill).start()
    with alone_in(str(tmp_path), patience_s=30.0):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert f"held by process {holder.pid}" in caplog.text
    with alone_in(str(tmp_path), patience_s=0.0):
        pass


def test_nothing_is_held_at_a_remote_address():
    with alone_in("memory://bucket/run", patience_s=0.0), alone_in("memory://bucket/run", patience_s=0.0):
        pass
