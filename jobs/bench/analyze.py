"""jobs/analyze on pairs of VOC's size and number against reading the PNGs alone, and its memory against that of few pairs."""

import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.bench.labels import memory_bytes
from jobs.bench.measure import Result, versions
from jobs.bench.pictures import SIZES

DEFAULT_REPEATS = 3
_FEW, _MANY = 100, 1449  # VOC's validation images
_NU_MAX, _PER_PART = 32, 128


def analyze(repeats: int) -> Result:
    """1 449 pairs through Ray; PIL reading the same files in one process; and both in one process without Ray."""
    from dfa.train.loop import start_ray

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = write_pairs(folder, _MANY)
        start_ray()
        for warm in range(2):
            _run(folder, f"warm{warm}", _FEW)
        runs, read_ms, read_cpu_ms, alone_cpu_ms = list[_Run](), list[float](), list[float](), list[float]()
        for number in range(repeats):
            runs.append(_run(folder, f"run{number}", _MANY))
            wall_ms, cpu_ms = _timed_ms(lambda: _read(folder, _MANY))
            read_ms.append(wall_ms)
            read_cpu_ms.append(cpu_ms)
            alone_cpu_ms.append(_timed_ms(lambda: _in_one_process(folder, _MANY))[1])
        peaks = {count: _run(folder, f"memory{count}", count, watch_memory=True).peak_bytes for count in (_FEW, _MANY)}
    job_ms = [1000 * run.wall_s / _MANY for run in runs]
    work_ms = statistics.median(1000 * run.work_s / _MANY for run in runs)
    alone = statistics.median(read_cpu_ms) / statistics.median(alone_cpu_ms)
    few_mb, many_mb = peaks[_FEW] / 1e6, peaks[_MANY] / 1e6
    return Result(
        title="Spectral analysis of label pairs",
        unit="ms a pair",
        ours=statistics.median(job_ms),
        peer=statistics.median(read_ms),
        ours_range=(min(job_ms), max(job_ms)),
        peer_range=(min(read_ms), max(read_ms)),
        peer_name="PIL reads both PNGs, one process",
        versions=versions("torch", "ray", "numpy", "pillow"),
        lines=(
            f"{_MANY} pairs of PNG masks ({kind}), nu_max {_NU_MAX}, 21 classes, without boundary IoU; the whole call of jobs/analyze"
            f" on {os.cpu_count()} CPUs once Ray's workers run, page and plots left out; {repeats} repeats in turn.",
            "",
            f"Processor time, one thread: {statistics.median(read_cpu_ms):.2f} ms for PIL to read a pair,"
            f" {statistics.median(alone_cpu_ms):.2f} ms for reading and sums without Ray (ratio **{alone:.2f}**), {work_ms:.2f} ms in"
            " Ray's workers.",
            "",
            f"Memory of all processes (proportional shares, Ray's included): {many_mb:.0f} MB with {_MANY} pairs, {few_mb:.0f} MB with"
            f" {_FEW}: **{many_mb / few_mb:.2f}** times.",
        ),
        extra={
            "one_process_ratio": alone,
            "worker_cpu_ms": work_ms,
            "few_mb": few_mb,
            "many_mb": many_mb,
            "repeats": repeats,
            "wanted": 0.5,
        },
    )


@dataclass(frozen=True)
class _Run:
    """wall_s: of the call. work_s: processor seconds of its workers. peak_bytes: 0 where memory was not watched."""

    wall_s: float
    work_s: float
    peak_bytes: int


def write_pairs(folder: Path, count: int) -> str:
    """FOLDER/truth and FOLDER/prediction: masks of SIZES and predictions a few pixels off; returns what they are."""
    masks = _photograph_masks()
    rng = np.random.default_rng(0)
    for name in ("truth", "prediction"):
        (folder / name).mkdir()
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        if masks:
            source = Image.open(masks[number % len(masks)])
            truth = np.asarray(source.resize((width, height), Image.Resampling.NEAREST))
            truth = truth[:, ::-1] if number // len(masks) % 2 else truth
        else:
            truth = _drawn(rng, height, width)
        down, right = rng.integers(-4, 5, 2)
        found = np.roll(truth, (down, right), (0, 1))
        coarse = Image.fromarray(np.where(found == 255, 0, found).astype(np.uint8))
        # As a model's output: no finer than a grid of four pixels.
        coarse = coarse.resize((width // 4, height // 4), Image.Resampling.NEAREST)
        _save(Image.fromarray(np.ascontiguousarray(truth)), folder / "truth" / f"{number:06d}.png")
        _save(coarse.resize((width, height), Image.Resampling.NEAREST), folder / "prediction" / f"{number:06d}.png")
    return "VOC's, resized" if masks else "drawn ellipses"


def _photograph_masks() -> list[Path]:
    address = os.environ.get("DFA_SAMPLE_DATA")
    return sorted(Path(address).glob("voc_mini/**/SegmentationClassAug/*.png")) if address else []


def _drawn(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One to three wobbly ellipses of a class each, with a void rim, on background."""
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(rng.integers(1, 4)):
        y, x = rng.uniform(0.2, 0.8, 2) * (height, width)
        angle = np.arctan2(rows - y, columns - x)
        wobble = 1 + 0.15 * np.sin(rng.integers(3, 12) * angle + rng.uniform(0, 6))
        distance = np.hypot((rows - y) / rng.uniform(0.1, 0.4) / height, (columns - x) / rng.uniform(0.1, 0.4) / width)
        mask[distance < wobble] = 255
        mask[distance < 0.95 * wobble] = rng.integers(1, 21)
    return mask


def _save(image: Image.Image, path: Path) -> None:
    from dfa.data.classes import voc_palette

    image = image.convert("L")
    image.putpalette(voc_palette().reshape(-1).tolist())
    image.save(path)


def _settings() -> Any:
    from dfa.analysis.maps import MapLimits
    from dfa.analysis.sums import AnalysisSettings

    return AnalysisSettings(MapLimits(21, 10**7), _NU_MAX, boundary=False)


def _parts(folder: Path, count: int) -> list[Any]:
    from dfa.analysis.maps import find_maps, join_pairs

    sides = [find_maps(str(folder / name), field=name, num_classes=21) for name in ("prediction", "truth")]
    chosen = list[Any]()
    per_part = min(_PER_PART, count // 2)  # few pairs keep two workers busy too
    for part in join_pairs(*sides, pairs_per_part=per_part):
        chosen.append(part)
        if per_part * len(chosen) >= count:
            break
    return chosen


def _run(folder: Path, output: str, count: int, *, watch_memory: bool = False) -> _Run:
    """One call: listing, joining, Ray, commits, adding up."""
    import psutil

    from dfa.analysis import stream, sums

    stop, peaks = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.2):
            with contextlib.suppress(psutil.Error):
                peaks.append(memory_bytes(psutil.Process()))

    watcher = threading.Thread(target=watch)
    if watch_memory:
        watcher.start()
    start_s = time.perf_counter()
    target = str(folder / output)
    sums.begin(target, {})
    done = stream.run(target, _parts(folder, count), _settings(), cpus=1.0)
    wall_s = time.perf_counter() - start_s
    stop.set()
    if watch_memory:
        watcher.join()
    return _Run(wall_s, done.work_s, max(peaks))


def _in_one_process(folder: Path, count: int) -> None:
    from dfa.analysis.sums import sum_pairs

    for part in _parts(folder, count):
        sum_pairs(part, _settings())


def _read(folder: Path, count: int) -> None:
    for number in range(count):
        for name in ("truth", "prediction"):
            np.asarray(Image.open(folder / name / f"{number:06d}.png"))


def _timed_ms(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor milliseconds a pair."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    call()
    return tuple(
        1000 * seconds / _MANY for seconds in (time.perf_counter() - start_s, time.process_time() - start_cpu_s)
    )  # type: ignore[return-value]
