"""Kills of the whole driver, and of a node, against one uninterrupted run: no byte differs, nothing is done twice."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dfa.label import factory
from dfa.label.output import TIMINGS_FOLDER
from dfa.label.work import LocalPool
from tests.label.colours import colour_pass, colour_plan, label_bytes, write_images

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
NUM_KILLS = 10
SEED = int(os.environ.get("DFA_TEST_SEED") or time.time_ns() % 10**6)  # other moments in each run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Forty shards of four images."""
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder, sizes=[(150, 130), (130, 150)] * 80, samples_per_shard=4)


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("labels") / "whole"
    factory.run(colour_plan(colour_pass(shards, output), batch_images=4), LocalPool())
    return label_bytes(output)


@pytest.fixture(scope="module")
def cluster():
    """A cluster that outlives its drivers, as on a real one: `ray start --head`."""
    # In a folder of its own: otherwise Ray would tell every later job of this machine to connect here.
    folder = tempfile.mkdtemp(prefix="ray")  # short: socket paths have a limit
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--num-cpus=2"]
    start += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    process = subprocess.Popen(
        [*start, f"--temp-dir={folder}"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    address = next(line.split("'")[1] for line in process.stdout if "--address=" in line).removeprefix("--address=")
    yield address
    os.killpg(process.pid, signal.SIGKILL)  # a polite stop drains the node for half a minute
    process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def _committed(output: Path) -> dict[str, int]:
    """Finished shards and when their bytes were written."""
    markers = [path.stem for path in output.glob("shard-*.json")]
    return {name: (output / f"{name}.tar").stat().st_mtime_ns for name in markers}


def test_ten_kills_of_the_driver_leave_the_bytes_of_an_uninterrupted_run(shards, uninterrupted, cluster, tmp_path):
    print(f"DFA_TEST_SEED={SEED} chooses these moments again")
    output, rng, killed_at = tmp_path / "labels", random.Random(SEED), []
    command = [sys.executable, "-m", "tests.label.colours", shards.root, str(output)]
    environment = os.environ | {"RAY_ADDRESS": cluster, "OMP_NUM_THREADS": "1"}
    for _ in range(NUM_KILLS):
        before = _committed(output)
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert driver.stdout.readline().strip() == "labelling"
        # At a random moment of starting or working, however slow the machine is.
        wanted = len(before) + rng.randint(0, 2)
        while driver.poll() is None and len(_committed(output)) < wanted:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        driver.kill()
        driver.wait()
        after = _committed(output)
        assert {name: after[name] for name in before} == before, "a finished shard was done again"
        killed_at.append(len(after))
    assert driver.returncode == -signal.SIGKILL, "there was work left at the last kill"
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, timeout=300)
    assert label_bytes(output) == uninterrupted
    assert len(list((output / TIMINGS_FOLDER).iterdir())) == 40
    assert len(set(killed_at)) > 3, f"DFA_TEST_SEED={SEED}: the kills came at {killed_at} finished shards"


def test_a_lost_node_costs_no_byte_and_no_sample(shards, uninterrupted, tmp_path):
    output = tmp_path / "labels"
    command = [sys.executable, "-m", "tests.label.losing_a_node", shards.root, str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[-2:] == ["160", ""]
    assert "done again" in done.stderr or "has changed" in done.stderr
    assert label_bytes(output) == uninterrupted
