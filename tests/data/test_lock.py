"""A folder is held by one process, for as long as that lives."""

import subprocess
import sys
import threading

import pytest

from dfa.data.lock import alone_in

HOLD = (
    "import sys, time; from dfa.data.lock import alone_in\n"
    "with alone_in(sys.argv[1], busy=''): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_who_comes_second_is_refused(tmp_path, holder):
    with pytest.raises(ValueError, match="somebody trains here"), alone_in(str(tmp_path), busy="somebody trains here"):
        raise AssertionError("two hold it")


def test_a_killed_holder_leaves_the_folder_free_and_is_waited_for(tmp_path, holder, caplog):
    threading.Timer(0.5, holder.kill).start()
    with alone_in(str(tmp_path), busy="", patience_s=30.0):
        assert "is in use; waiting" in caplog.text
    with alone_in(str(tmp_path), busy=""):
        pass


def test_nothing_is_held_at_a_remote_address():
    with alone_in("memory://bucket/run", busy=""), alone_in("memory://bucket/run", busy=""):
        pass
