"""Runs that are disturbed at random moments, one for each seed, on one simulated cluster; what was repeated or lost.

Each takes minutes: their outcomes are kept in runs/bench_faults, and a seed that this code has been through is not run again.
"""

import hashlib
import json
import logging
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.bench.measure import Result, versions

DEFAULT_REPEATS = 20
_KILLS = 5
_FOLDER = Path("runs/bench_faults").absolute()
_LIMITS_S = {"kill": 25.0, "leave": 45.0}


def faults(repeats: int) -> Result:
    """Seeds 0 .. repeats - 1; the cluster stays up between them."""
    from jobs.bench.faulty import NUM_EPOCHS, NUM_SAMPLES, Machines, disturbed_run, make_shards, random_events

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    kept = {seed: _kept(seed) for seed in range(repeats)}
    if missing := [seed for seed, run in kept.items() if run is None]:
        with tempfile.TemporaryDirectory() as folder:
            index, machines, late = make_shards(Path(folder) / "images"), Machines(), False
            try:
                for seed in missing:
                    outcome = disturbed_run(
                        machines,
                        Path(folder) / f"run{seed}",
                        index,
                        seed=seed,
                        events=random_events(seed, _KILLS),
                        engine="auto",
                    )
                    kept[seed] = _keep(seed, asdict(outcome) | {"load": os.getloadavg()[1]})
                    late = late or any(max(outcome.recovery_s[event]) > limit for event, limit in _LIMITS_S.items())
            finally:
                machines.close(keep_logs=late)
    runs = [run for run in kept.values() if run is not None]
    loads = [run["load"] for run in runs]
    kills, losses = ([s for run in runs for s in run["recovery_s"][event]] for event in ("kill", "leave"))
    within = [sum(s <= _LIMITS_S[event] for s in found) for event, found in (("kill", kills), ("leave", losses))]
    return Result(
        title="Faults",
        unit="s from a killed worker to the next step",
        ours=statistics.median(kills),
        peer=statistics.median(losses),
        ours_range=(min(kills), max(kills)),
        peer_range=(min(losses), max(losses)),
        peer_name="the same from a lost node",
        versions=versions("torch", "ray", "deepspeed"),
        lines=(
            f"{NUM_EPOCHS} epochs over {NUM_SAMPLES} samples on one to two workers, simulated nodes of one CPU on this machine; in each"
            f" run {_KILLS} workers are killed (SIGKILL), the second node is killed and another joins, at random moments. Repeated and"
            " lost: samples of the committed history against the specified epochs; order: of each rank against the specified one."
            " The model is two convolutions; steps take 0.1 s, a checkpoint comes every five of them, lost nodes are noticed after 5 s"
            " (RAY_health_check_period_ms=1000), room for more workers is looked for every 5 s.",
            "",
            f"Of {len(kills)} kills {within[0]} were back within {_LIMITS_S['kill']:g} s, of {len(losses)} lost nodes {within[1]} within"
            f" {_LIMITS_S['leave']:g} s. Load average over the last five minutes of a run: {min(loads):.1f} to {max(loads):.1f} (about 3"
            " where nothing else runs).",
            "",
            *_table(runs),
        ),
        extra={"runs": runs, "exactly_once": all(run["exactly_once"] for run in runs)},
    )


def _file(seed: int) -> Path:
    return _FOLDER / f"seed-{seed}.json"


def _kept(seed: int) -> dict[str, Any] | None:
    """The outcome of an earlier run of this seed by this code."""
    record = json.loads(_file(seed).read_text()) if _file(seed).is_file() else {}
    return record["outcome"] if record.get("code") == _code() else None


def _keep(seed: int, outcome: dict[str, Any]) -> dict[str, Any]:
    _FOLDER.mkdir(parents=True, exist_ok=True)
    _file(seed).write_text(json.dumps({"code": _code(), "outcome": outcome}))
    logging.getLogger("jobs.bench").info("%s", outcome)
    return outcome


def _code() -> str:
    """A hash of what such a run runs."""
    root = Path(__file__).parents[2]
    files = [*root.glob("dfa/data/*.py"), *root.glob("dfa/train/*.py"), root / "jobs" / "bench" / "faulty.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def _table(runs: list[Any]) -> list[str]:
    lines = [
        "| seed | kills | node events | restarts | workers | seconds | samples | repeated | lost | out of order | back after a kill,"
        " median / max s | after the node's loss, s |",
        "|" + "---|" * 12,
    ]
    for run in runs:
        kill_s, verdict = run["recovery_s"]["kill"], run["verdict"]
        lines.append(
            f"| {run['seed']} | {run['kills']} | {run['node_events']} | {run['restarts']} | {'-'.join(map(str, run['num_workers']))} |"
            f" {run['seconds']:.0f} | {verdict['num_samples']} | {verdict['repeated']} | {verdict['lost']} | {verdict['out_of_order']} |"
            f" {statistics.median(kill_s):.1f} / {max(kill_s):.1f} | {max(run['recovery_s']['leave']):.1f} |"
        )
    return lines
