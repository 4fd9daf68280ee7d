"""The label factory on real-size pictures: what it costs beyond CAM and CRF, and how idle it leaves the CPUs."""

import logging
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bench.measure import Result, versions
from jobs.bench.pictures import kind, write_shards

DEFAULT_REPEATS = 1
_IMAGES = 500


@dataclass(frozen=True)
class FactoryRun:
    """wall_s: of the call. own_s: processor seconds of this process and all below it, Ray's included. cam_s, crf_s, rest_s:
    processor seconds of the workers by kind (rest: reading and encoding). idle: share of the CPUs' time that nobody used.
    peak_bytes: 0 where memory was not watched."""

    wall_s: float
    own_s: float
    cam_s: float
    crf_s: float
    rest_s: float
    idle: float
    peak_bytes: int

    @property
    def compute_s(self) -> float:
        return self.cam_s + self.crf_s

    def cpu_s(self, num_cpus: int) -> float:
        """What the call took of the CPUs, or left unused; the work of others on this machine is not counted."""
        return self.own_s + self.idle * num_cpus * self.wall_s

    def overhead(self, num_cpus: int) -> float:
        """That beyond CAM and CRF, as a share of these."""
        return self.cpu_s(num_cpus) / self.compute_s - 1


def labels(repeats: int) -> Result:
    """500 pictures through CAM (tiny CLIP) and CRF."""
    from dfa.train.loop import start_ray

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    num_cpus = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        start_ray()
        run_factory(Path(folder) / "warm", 8)
        runs = [run_factory(Path(folder) / f"run{number}", _IMAGES) for number in range(repeats)]
    overheads = [run.overhead(num_cpus) for run in runs]
    per_image_ms = [1000 * run.cpu_s(num_cpus) / _IMAGES for run in runs]
    compute_ms = [1000 * run.compute_s / _IMAGES for run in runs]
    one = runs[overheads.index(statistics.median_low(overheads))]
    parts = {"CAM": one.cam_s, "CRF": one.crf_s, "reading and encoding": one.rest_s}
    shown = ", ".join(f"{name} {1000 * seconds / _IMAGES:.0f}" for name, seconds in parts.items())
    return Result(
        title="Label factory",
        unit="CPU ms an image",
        ours=statistics.median(per_image_ms),
        peer=statistics.median(compute_ms),
        ours_range=(min(per_image_ms), max(per_image_ms)),
        peer_range=(min(compute_ms), max(compute_ms)),
        peer_name="CAM and CRF alone, summed over workers",
        versions=versions("torch", "ray", "pydensecrf2"),
        lines=(
            f"{_IMAGES} pictures of about 500 x 375 ({kind()}) in shards of 50, two classes each; CAM of the tiny CLIP at half size,"
            f" mirrored; CRF preset deeplab; {num_cpus} CPUs; {repeats} run(s), start of the actors included.",
            "",
            f"Overhead (CPU time of all processes, and idle, beyond CAM and CRF): **{100 * statistics.median(overheads):.1f} %**. CPU ms an"
            f" image: {shown}; {_IMAGES / one.wall_s:.2f} images/s. CPUs idle: **{100 * one.idle:.1f} %** of the time.",
        ),
        extra={
            "overhead": statistics.median(overheads),
            "idle": one.idle,
            "repeats": repeats,
        },
    )


def run_factory(folder: Path, count: int, *, watch_memory: bool = False) -> FactoryRun:
    """One call of the factory with an untrained student. Watching the memory of its processes takes a tenth of a core."""
    import psutil

    from dfa import build
    from dfa.label import factory

    folder.mkdir()
    config = _configuration(folder, count)
    label_pass = build.label_pass(config, "train")
    plan = build.factory_plan(config, [label_pass])
    stop, peaks = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(1.0):
            peaks.append(memory_bytes(psutil.Process()))

    watcher = threading.Thread(target=watch)
    if watch_memory:
        watcher.start()
    before, own_s, start_s = psutil.cpu_times(), _processor_s(psutil.Process()), time.perf_counter()
    done = factory.run(plan)[label_pass.name]
    wall_s, after = time.perf_counter() - start_s, psutil.cpu_times()
    own_s = _processor_s(psutil.Process()) - own_s
    stop.set()
    if watch_memory:
        watcher.join()
    idle = (after.idle - before.idle) / (wall_s * (os.cpu_count() or 1))
    work_s = dict(done.work_s)
    cam_s, crf_s = work_s.pop("cam"), work_s.pop("crf")
    return FactoryRun(wall_s, own_s, cam_s, crf_s, sum(work_s.values()), idle, max(peaks))


def _configuration(folder: Path, count: int) -> Any:
    import torch

    from dfa import build
    from dfa.config import load
    from dfa.train.checkpoint import CheckpointInfo, save_checkpoint
    from dfa.train.objective import EngineState

    # Half size: 8-pixel patches of a photograph are as many as 16-pixel patches of the whole one, as ViT-B/16 has.
    settings = ["evaluate.cam_scales=[0.5]", "evaluate.flip=true", "label.batch_pixels=3000000", "label.worst=0"]
    config = load("demo", [f"run={folder}/run", f"shards.train={folder}/shards", *settings])
    names = build.class_set(config).names
    write_shards(folder, count, names, num_labels=2)
    student = build.segmenter(config, torch.device("cpu")).student
    weights = {f"student.{name}": value.contiguous() for name, value in student.state_dict().items()}
    info = CheckpointInfo(1, 0, 0, None, 0, 1.0, names, build.model_description(config))
    save_checkpoint(Path(config.run), EngineState(weights, {}, {}, 0, 1.0), {}, info)
    return config


def _processor_s(root: Any) -> float:
    """Processor seconds so far of a process and all below it."""
    import psutil

    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # gone meanwhile
            continue
        total += times.user + times.system
    return total


def memory_bytes(root: Any) -> int:
    """Proportional memory of a process and all below it."""
    import psutil

    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, AttributeError):  # gone meanwhile
            continue
    return total
