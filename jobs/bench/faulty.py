"""One training run on a simulated cluster whose workers are killed and whose nodes leave and join.

`python -m jobs.bench.faulty FOLDER SEED [EVENT,EVENT,...]` makes one in an empty folder and prints what became of it as one
JSON line.
"""

import dataclasses
import io
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from torch import Tensor, nn

from dfa.data import storage
from dfa.data.planning import plan_shards, write_plan
from dfa.data.reading import CropSettings
from dfa.data.samples import Sample
from dfa.data.shards import ShardIndex, read_samples
from dfa.data.stream import Batch, train_stream
from dfa.data.writer import finish, write_shard
from dfa.train import history, loop
from dfa.train.checkpoint import latest_checkpoint, list_checkpoints
from dfa.train.objective import LossPart, Objective, OptimizerSettings, ParameterGroup
from dfa.train.plan import LoopPlan, Readers
from dfa.train.progress import Progress

NUM_SAMPLES, NUM_EPOCHS, BATCH = 600, 3, 12
_SHARD, _CROP, _CLASSES = 50, 16, ("red", "green", "blue")
_STEP_S = 0.1  # a step takes at least so long, or the run would be over before it could be disturbed
_LATEST_S = 2.5  # a fault comes within so many seconds after the first step
_PATIENCE_S = 900.0
_NOTICE_S = 60.0  # of a node that will be taken away; it goes when the run has answered


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run. recovery_s: event -> from it to the first step of the next group of workers, of each."""

    seed: int
    kills: int
    node_events: int
    restarts: int
    num_workers: list[int]
    seconds: float
    recovery_s: dict[str, list[float]]
    verdict: dict[str, Any]
    exactly_once: bool


class Dominant(Objective):
    """Which colour dominates an image, by two convolutions. Leaves its process id, so that somebody may kill it."""

    def __init__(self, folder: str, step_s: float) -> None:
        super().__init__()
        self.num_classes = 1 + len(_CLASSES)
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, len(_CLASSES), 1)
        self._step_s = step_s
        Path(folder, str(os.getpid())).touch()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", tuple(self.parameters()), 1.0, 0.01)]

    def forward(self, batch: Batch) -> list[LossPart]:
        time.sleep(self._step_s)
        logits = self.head(torch.relu(self.body(batch.image_B3HW.float() / 255 - 0.5)))
        target = batch.labels_BC[:, :, None, None].expand_as(logits).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        return [LossPart("label", 1.0, (loss * batch.valid_BHW).sum(), batch.valid_BHW.sum().float())]

    def validate(self, batch: Batch) -> Tensor:
        raise NotImplementedError("these runs are not validated")


class Machines:
    """A head of one CPU and a second node of one CPU, all processes of this machine."""

    def __init__(self) -> None:
        loop.prepare_environment()
        self._folder = tempfile.mkdtemp(prefix="ray")  # of its own, and short: socket paths have a limit
        # A cluster leaves its address there, for every later job to join: of the machine, if it is not told otherwise.
        os.environ["RAY_TMPDIR"] = self._folder
        Path(self._folder, "ray").mkdir()
        port = _free_port()
        # Known before anything starts, so that no process looks for a cluster and finds somebody else's.
        os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
        head = {"num_cpus": 1, "gcs_server_port": port, "dashboard_port": _free_port(), "temp_dir": self._folder}
        # As cluster/ sets it: a dead node is noticed within 5 s; by default Ray plans with it for 15 to 20 s.
        os.environ["RAY_health_check_period_ms"] = "1000"  # noqa: SIM112 (the name Ray reads)
        # As `start_ray` will, but before the head starts: nodes that differ in it refuse each other's calls.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        self._cluster = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": True})
        loop.start_ray()
        self._nodes: list[Any] = []
        self.join()

    def join(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def leave(self) -> None:
        """Kill the second node and all on it."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def warn(self, seconds: float) -> None:
        """Tell Ray that the second node will be taken away, as a cloud's notice of preemption does."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        deadline_ms = int(1000 * (time.time() + seconds))
        gcs = ray._raylet.GcsClient(address=os.environ["RAY_ADDRESS"])  # type: ignore[attr-defined]
        accepted, message = gcs.drain_node(self._nodes[-1].node_id, reason, "simulated preemption", deadline_ms)
        if not accepted:
            raise RuntimeError(f"the node cannot be drained: {message}")

    def close(self, *, keep_logs: bool = False) -> None:
        ray.shutdown()
        self._cluster.shutdown()
        if keep_logs:
            logging.getLogger("jobs.bench").warning("the logs of this cluster are kept in %s", self._folder)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_shards(folder: Path) -> ShardIndex:
    """600 noisy images of 32 x 32 in twelve shards."""
    folder.mkdir(parents=True)
    samples = []
    for number in range(NUM_SAMPLES):
        rng, encoded = np.random.default_rng(number), io.BytesIO()
        pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
        pixels[..., number % 3] += 80
        Image.fromarray(pixels).save(encoded, "PNG")
        path = folder / f"image{number:04d}.png"
        path.write_bytes(encoded.getvalue())
        samples.append(Sample(path.stem, str(path), (1 + number % 3,)))
    root = str(folder / "shards")
    plan = plan_shards(samples, class_names=_CLASSES, seed=0, shuffle=True, samples_per_shard=_SHARD, max_pixels=10**6)
    write_plan(root, plan)
    for item in plan.items:
        write_shard(root, item)
    return finish(root, plan, max_reject_share=0.0)


def make_plan(folder: Path, index: ShardIndex, *, engine: Any, step_s: float = _STEP_S) -> LoopPlan:
    """Three epochs on one to two workers, a checkpoint every five steps."""
    pids, sizes = folder / "pids", tuple(shard.num_samples for shard in index.shards)
    total_steps = NUM_EPOCHS * NUM_SAMPLES // BATCH

    def make_objective(device: torch.device) -> Dominant:
        pids.mkdir(parents=True, exist_ok=True)
        return Dominant(str(pids), step_s).to(device)

    def make_dataset(progress: Progress, readers: Readers) -> Any:
        return train_stream(
            index,
            seed=0,
            num_samples=total_steps * BATCH,
            finished_epochs=progress.finished_epochs,
            open_epochs=progress.open_epochs,
            crop=CropSettings(size=_CROP, scale_range=(0.5, 2.0), flip_probability=0.5, max_pixels=10**6),
            with_masks=False,
            num_workers=readers.num_workers,
            read_cpus=readers.read_cpus,
            max_readers=readers.max_readers,
        )

    return LoopPlan(
        run_folder=str(folder / "run"),
        class_names=_CLASSES,
        model_description={"kind": "dominant"},
        shard_sizes=sizes,
        make_objective=make_objective,
        make_dataset=make_dataset,
        make_validation=None,
        total_steps=total_steps,
        global_batch=BATCH,
        micro_batch=BATCH // 2,
        warmup_steps=10,
        decay_power=1.0,
        # With the usual epsilon 1e-8 rounding decides where a gradient cancels, and runs could not be compared.
        optimizer=OptimizerSettings(learning_rate=1e-2, beta1=0.9, beta2=0.999, epsilon=1e-4, gradient_clip=1.0),
        engine=engine,
        precision="fp32",
        zero_stage=1,
        num_workers=2,
        min_workers=1,
        resize_interval_s=5.0,
        use_gpu=False,
        validate_every=0,
        checkpoint_every=5,
        max_failures=20,  # chance may strike before there is a checkpoint
        keep_last=2,
        log_every=10,
        seed=0,
        collective_timeout_s=20,
        keep_history=True,
    )


def random_events(seed: int, kills: int) -> list[str]:
    """Kills, and among them a node that leaves and later one that joins."""
    rng, events = random.Random(seed), ["kill"] * kills
    events.insert(rng.randint(1, kills - 1), "leave")
    events.insert(rng.randint(events.index("leave") + 1, kills), "join")
    return events


def disturbed_run(
    machines: Machines, folder: Path, index: ShardIndex, *, seed: int, events: list[str], engine: Any
) -> Outcome:
    """Train to the end while things happen at random moments.

    kill, hang: a worker gets SIGKILL, or SIGSTOP. leave: the second node is lost; drain: so it is, with notice. join:
    another comes.
    """
    rng, plan = random.Random(seed), make_plan(folder, index, engine=engine)
    outcome: dict[str, Any] = {}
    runner = threading.Thread(target=lambda: outcome.update(loop.run(plan)), daemon=True)
    started, struck_at, last = time.time(), time.time(), ""
    recovery_s: dict[str, list[float]] = {}
    runner.start()
    for event in [*events, ""]:
        first_step_at = _first_step_after(plan.run_folder, struck_at, runner)
        if last:
            recovery_s.setdefault(last, []).append(first_step_at - struck_at)
        if event == "":
            break
        time.sleep(rng.uniform(0.0, _LATEST_S))
        if event == "join":
            machines.join()  # struck_at stays: who trains goes on
            last = ""
            continue
        if event in ("leave", "drain"):  # while it trains
            _wait(lambda: history.read_attempts(plan.run_folder)[-1].num_workers == plan.num_workers, runner)
        if event == "drain":
            _drain(machines, plan, runner)
        struck_at, last = time.time(), event
        if event in ("kill", "hang"):
            _signal_one(folder / "pids", rng, signal.SIGKILL if event == "kill" else signal.SIGSTOP)
        else:
            machines.leave()
    runner.join()
    if "step" not in outcome:
        raise RuntimeError(f"the run of seed {seed} did not end well")
    verdict, attempts = _verify(plan, index), history.read_attempts(plan.run_folder)
    return Outcome(
        seed=seed,
        kills=events.count("kill"),
        node_events=len([event for event in events if event in ("leave", "join", "drain")]),
        restarts=len(attempts) - 1,
        num_workers=[attempt.num_workers for attempt in attempts],
        seconds=time.time() - started,
        recovery_s=recovery_s,
        verdict=dataclasses.asdict(verdict),
        exactly_once=verdict.exactly_once and verdict.num_epochs == NUM_EPOCHS,
    )


def _drain(machines: Machines, plan: LoopPlan, runner: threading.Thread) -> None:
    """Give notice, and wait for the checkpoint that answers it: at a step at which none is due."""
    machines.warn(_NOTICE_S)

    def answered() -> bool:
        names = [storage.base_name(folder) for folder in list_checkpoints(plan.run_folder)]
        return any(int(name.rpartition("-")[2]) % plan.checkpoint_every for name in names)

    _wait(answered, runner)


def _verify(plan: LoopPlan, index: ShardIndex) -> history.Verdict:
    checkpoint = latest_checkpoint(plan.run_folder, class_names=plan.class_names)
    assert checkpoint is not None
    return history.verify(
        history.read_rows(plan.run_folder, checkpoint.info.step),
        shard_sizes=plan.shard_sizes,
        keys=[sample.key for sample in read_samples(index)],
        seed=plan.seed,
        total_samples=plan.total_samples,
        samples_seen=checkpoint.info.samples_seen,
    )


def _first_step_after(run: str, moment: float, runner: threading.Thread) -> float:
    """When the first group of workers that started after `moment` had made a step."""

    def find() -> float | None:
        done = [a.first_step_at for a in history.read_attempts(run) if a.first_step_at and a.started_at > moment]
        return min(done) if done else None

    return _wait(find, runner)


def _signal_one(pids: Path, rng: random.Random, number: signal.Signals) -> None:
    def alive() -> list[int]:
        found = sorted(int(path.name) for path in pids.iterdir())
        return [pid for pid in found if Path(f"/proc/{pid}").exists()]

    os.kill(rng.choice(_wait(alive, None)), number)


def _wait(find: Callable[[], Any], runner: threading.Thread | None) -> Any:
    deadline = time.time() + _PATIENCE_S
    while not (found := find()):
        if time.time() > deadline or (runner is not None and not runner.is_alive()):
            raise RuntimeError("the run ended, or nothing happened for minutes, before all faults had come")
        time.sleep(0.02)
    return found


def main(folder: str, seed: str, events: str = "") -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    index, machines = make_shards(Path(folder) / "images"), Machines()
    chosen = events.split(",") if events else random_events(int(seed), 5)
    try:
        outcome = disturbed_run(machines, Path(folder), index, seed=int(seed), events=chosen, engine="torch")
    finally:
        machines.close()
    print(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main(*sys.argv[1:])
