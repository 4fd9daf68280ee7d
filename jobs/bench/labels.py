"""The label factory on real-size pictures: what it costs beyond CAM and CRF, how idle it leaves the CPUs, its memory."""

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
_IMAGES, _MEMORY_IMAGES = 500, (100, 1000)


@dataclass(frozen=True)
class _Run:
    """wall_s: of the call. cam_s, crf_s, rest_s: processor seconds over all workers (rest: reading and encoding)."""

    wall_s: float
    cam_s: float
    crf_s: float
    rest_s: float
    idle: float
    peak_bytes: int

    @property
    def compute_s(self) -> float:
        return self.cam_s + self.crf_s

    def overhead(self, num_cpus: int) -> float:
        """What the CPUs were there for beyond CAM and CRF, as a share of these."""
        return num_cpus * self.wall_s / self.compute_s - 1


def labels(repeats: int) -> Result:
    """500 pictures through CAM (tiny CLIP) and CRF, then 100 and 1000 for the memory."""
    from dfa.train.loop import start_ray

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    num_cpus = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        start_ray()
        _run(Path(folder) / "warm", 8)
        runs = [_run(Path(folder) / f"run{number}", _IMAGES) for number in range(repeats)]
        memory = {count: _run(Path(folder) / f"memory{count}", count).peak_bytes for count in _MEMORY_IMAGES}
    overheads = [run.overhead(num_cpus) for run in runs]
    per_image_ms = [1000 * num_cpus * run.wall_s / _IMAGES for run in runs]
    compute_ms = [1000 * run.compute_s / _IMAGES for run in runs]
    few, many = (memory[count] / 1e6 for count in _MEMORY_IMAGES)
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
            f"Overhead (CPU time that was there, beyond CAM and CRF): **{100 * statistics.median(overheads):.1f} %**. CPU ms an"
            f" image: {shown}; {_IMAGES / one.wall_s:.2f} images/s. CPUs idle: **{100 * one.idle:.1f} %** of the time.",
            "",
            f"Peak memory of all processes (proportional shares): {few:.0f} MB with {_MEMORY_IMAGES[0]} pictures, {many:.0f} MB with"
            f" {_MEMORY_IMAGES[1]}.",
        ),
        extra={
            "overhead": statistics.median(overheads),
            "idle": one.idle,
            "peak_mb": {str(count): value / 1e6 for count, value in memory.items()},
            "repeats": repeats,
        },
    )


def _run(folder: Path, count: int) -> _Run:
    """One call of the factory with an untrained student."""
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
            peaks.append(_memory_bytes(psutil.Process()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, start_s = psutil.cpu_times(), time.perf_counter()
    done = factory.run(plan)[label_pass.name]
    wall_s, after = time.perf_counter() - start_s, psutil.cpu_times()
    stop.set()
    watcher.join()
    idle = (after.idle - before.idle) / (wall_s * (os.cpu_count() or 1))
    work_s = dict(done.work_s)
    cam_s, crf_s = work_s.pop("cam"), work_s.pop("crf")
    return _Run(wall_s, cam_s, crf_s, sum(work_s.values()), idle, max(peaks))


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


def _memory_bytes(root: Any) -> int:
    """Proportional memory of a process and all below it."""
    import psutil

    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, AttributeError):  # gone meanwhile
            continue
    return total
