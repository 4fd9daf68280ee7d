"""cluster/slurm.sh as Slurm would run it, on two nodes of this machine: stand-ins for `srun` and `scontrol` alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.standing_cluster import ROOT, wait_for

STAND_INS = {
    "srun": """n=1
while [[ "$1" == --* ]]; do [[ "$1" != --ntasks=* ]] || n=${1#--ntasks=}; shift; done
for ((i = 0; i < n; i++)); do "$@" & done
trap 'kill $(jobs -p) 2>/dev/null' TERM
wait
""",
    "scontrol": """case "$1" in show) echo node-a; echo node-b ;; *) echo "$@" >> "$CALLS" ;; esac
""",
}
JOB = """import json, os, pathlib, time, ray, jobs
from dfa.train.loop import start_ray

def work():
    start_ray()
    address = ray.remote(lambda: os.environ.get("RAY_ADDRESS"))
    known = ray.get(address.remote()) == os.environ["RAY_ADDRESS"]
    found = {"nodes": len(ray.nodes()), "mode": os.environ["RAY_AUTH_MODE"], "workers_know_the_address": known}
    pathlib.Path(os.environ["FOUND"] + ".part").write_text(json.dumps(found))
    os.rename(os.environ["FOUND"] + ".part", os.environ["FOUND"])
    time.sleep(600)
    return found

jobs.run(work)
"""


@pytest.mark.clusters
def test_the_script_starts_all_nodes_and_a_signal_puts_it_back_into_the_queue(tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "sleeping_job.py").write_text(JOB)
    found, calls, log = tmp_path / "found.json", tmp_path / "calls", tmp_path / "log"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{tmp_path}", "FOUND": str(found)}
    own |= {"DFA_ENVIRONMENT": str(Path(sys.executable).parent.parent), "CALLS": str(calls), "SLURM_CPUS_PER_TASK": "1"}
    own |= {"RAY_worker_niceness": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | slurm | own
    with log.open("a") as file:
        script = subprocess.Popen(
            ["bash", str(ROOT / "cluster/slurm.sh"), "sleeping_job"],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_for(lambda: found.exists() or script.poll() is not None, "the job on both nodes")
        assert found.exists(), log.read_text()
        expected = {"nodes": 2, "mode": "token", "workers_know_the_address": True}
        assert json.loads(found.read_text()) == expected, log.read_text()
        script.send_signal(signal.SIGTERM)  # as --signal=B:TERM@120
        assert script.wait(timeout=120) == 130, log.read_text()
        assert calls.read_text().split() == ["requeue", str(os.getpid())]
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
        time.sleep(0.1)


def test_the_script_says_how_it_is_used():
    done = subprocess.run(["bash", str(ROOT / "cluster/slurm.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.split()[0]) == (2, "usage:")
