"""A real cluster that outlives its drivers: `ray start --head` on the loopback, with a token, and more nodes at will.

Jobs come and go through the command line and the HTTP interface, as a user's do.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_HEAD_ATTEMPTS = 3
_LIMIT_S = 300.0  # a busy machine starts a job slowly; idle ones need seconds


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = _LIMIT_S) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(0.1)
    return found


class StandingCluster:
    """Head and nodes are processes of their own; `dfa` is not on their path, so jobs must bring it."""

    def __init__(self, *, num_cpus: int) -> None:
        # In a folder of its own: otherwise Ray would tell every later job of this machine to connect here.
        self.folder = Path(tempfile.mkdtemp(prefix="dfa"))  # short: socket paths have a limit
        self.token_file = self.folder / "token"
        self.token_file.write_text(secrets.token_hex(32))
        self._headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        self.nodes: list[subprocess.Popen[str]] = []
        for attempt in reversed(range(_HEAD_ATTEMPTS)):
            try:
                self._start_head(num_cpus)
                return
            except RuntimeError:  # on a busy machine Ray gives up waiting for its own processes
                if not attempt:
                    raise

    def _start_head(self, num_cpus: int) -> None:
        port, self.dashboard = free_port(), f"http://127.0.0.1:{free_port()}"
        self.address = f"127.0.0.1:{port}"
        head = ["--head", f"--port={port}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        head += ["--include-dashboard=true", f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder}"]
        self.head = self.add_node(*head, f"--num-cpus={num_cpus}")
        wait_for(self._is_up, "the dashboard of the head")

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Of nodes and of the submitter. A change to None removes a variable."""
        kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file), "OMP_NUM_THREADS": "1"}
        own["RAY_worker_niceness"] = (
            "0"  # 15 by default: beside any other load of this machine the workers would starve
        )
        return {k: v for k, v in (kept | own | changes).items() if v is not None}

    def add_node(self, *options: str) -> subprocess.Popen[str]:
        ports = [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
        ports += [f"--dashboard-agent-grpc-port={free_port()}", f"--runtime-env-agent-port={free_port()}"]
        command = [*RAY, "start", "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block", *ports, *options]
        log = open(self.folder / f"node-{len(self.nodes)}.log", "w")  # noqa: SIM115  the process keeps it
        node = subprocess.Popen(
            command, env=self.environment(), cwd=self.folder, stdout=log, stderr=log, text=True, start_new_session=True
        )
        self.nodes.append(node)
        return node

    def kill_node(self, node: subprocess.Popen[str]) -> None:
        os.killpg(node.pid, signal.SIGKILL)  # as a machine that goes away; a polite stop drains it for half a minute
        node.wait(timeout=60)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                self.kill_node(node)
        # Entry points that still run are killed by Ray within a second, and write until then.
        wait_for(lambda: not shutil.rmtree(self.folder, ignore_errors=True) and not self.folder.exists(), "the end", 20)

    def num_alive(self) -> int:
        """Nodes that the head counts."""
        found = self._get("/api/v0/nodes").json()["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in found)

    def submit(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        # Beside other clusters of this machine: Ray Train's helpers would look for their own in the wrong one.
        env_vars = {**runtime_env.get("env_vars", {}), "RAY_ADDRESS": self.address}
        runtime_env = {**runtime_env, "env_vars": env_vars}
        body = {"entrypoint": f"{sys.executable} -m {entrypoint}", "runtime_env": runtime_env}
        answer = requests.post(f"{self.dashboard}/api/jobs/", json=body, headers=self._headers, timeout=60)
        answer.raise_for_status()
        return answer.json()["submission_id"]

    def job(self, name: str) -> dict[str, Any]:
        return self._get(f"/api/jobs/{name}").json()

    def jobs(self) -> list[dict[str, Any]]:
        return self._get("/api/jobs/").json()

    def log(self, name: str) -> str:
        return self._get(f"/api/jobs/{name}/logs").json()["logs"]

    def stop_job(self, name: str) -> None:
        url = f"{self.dashboard}/api/jobs/{name}/stop"
        requests.post(url, headers=self._headers, timeout=60).raise_for_status()

    def finished(self, name: str) -> str:
        """Waits for the end of a job; its status."""
        ends = ("SUCCEEDED", "FAILED", "STOPPED")
        return wait_for(lambda: (found := self.job(name)["status"]) in ends and found, f"the end of {name}")

    def result(self, name: str) -> dict[str, Any]:
        """The JSON line with which a job ended."""
        return result_of(self.log(name))

    def _get(self, path: str) -> requests.Response:
        answer = requests.get(f"{self.dashboard}{path}", headers=self._headers, timeout=60)
        answer.raise_for_status()
        return answer

    def _is_up(self) -> bool:
        if self.head.poll() is not None:
            raise RuntimeError((self.folder / f"node-{len(self.nodes) - 1}.log").read_text())
        try:
            return requests.get(f"{self.dashboard}/api/version", headers=self._headers, timeout=5).ok
        except requests.ConnectionError:
            return False


def result_of(text: str) -> dict[str, Any]:
    """The last line of a job's output that is a JSON object."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    assert lines, text
    return json.loads(lines[-1])
