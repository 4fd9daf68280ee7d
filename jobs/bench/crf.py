"""Dense CRF on the classes of an image against all classes, and two workers against one."""

import multiprocessing
import statistics
import time
from typing import Any

import numpy as np

from jobs.bench.measure import Result, interleave, versions
from jobs.bench.pictures import kind, pictures

DEFAULT_REPEATS = 3
_IMAGES = 6
_PRESENT = 2  # classes of an image: VOC has 1.5 in the mean, COCO 2.9
_ROUNDS = 3  # of all pictures through the workers, so that the end, with one worker idle, hardly counts


def crf(repeats: int) -> Result:
    """Two present classes and the background against VOC's 21 and COCO's 81, and Ray tasks on two CPUs against one."""
    import ray

    from dfa.label.crf import PRESETS, dense_crf
    from dfa.train.loop import start_ray

    settings = PRESETS["deeplab"]
    work = [(picture_HW3, _scores(picture_HW3, number)) for number, picture_HW3 in enumerate(pictures(_IMAGES))]
    times: dict[int, tuple[list[float], list[float]]] = {}
    agreement = {}
    for num_classes in (21, 81):

        def present() -> list[np.ndarray]:
            return [dense_crf(picture, scores, settings) for picture, scores in work]

        def everything(num_classes: int = num_classes) -> list[np.ndarray]:
            return [dense_crf(picture, _spread(scores, num_classes), settings) for picture, scores in work]

        pairs = zip(present(), everything(), strict=True)
        agreement[num_classes] = min(float((a.argmax(0) == b.argmax(0)).mean()) for a, b in pairs)
        # The whole of COCO takes seconds an image: one repeat less than asked is enough there.
        rounds = repeats if num_classes == 21 else max(1, repeats - 2)
        times[num_classes] = interleave(present, everything, repeats=rounds, per=_IMAGES, clock=time.process_time)
    start_ray()

    task = ray.remote(_labels)
    stored = [(ray.put(picture), ray.put(scores)) for picture, scores in work]

    def workers(num_workers: int) -> float:
        share = task.options(num_cpus=2 / num_workers)
        ray.get([share.remote(*stored[0]) for _ in range(2 * num_workers)])  # the processes are there
        start_s = time.perf_counter()
        ray.get([share.remote(*each) for each in stored * _ROUNDS])
        return time.perf_counter() - start_s

    pairs_s = [(workers(2), workers(1)) for _ in range(repeats)]
    ray.shutdown()
    bare_s = [(_bare(work, 2), _bare(work, 1)) for _ in range(repeats)]
    ratio = {size: statistics.median(peer) / statistics.median(ours) for size, (ours, peer) in times.items()}
    scaling, ceiling = (
        statistics.median(one for _, one in each) / statistics.median(two for two, _ in each)
        for each in (pairs_s, bare_s)
    )
    ours_ms, peer_ms = times[21]
    extra: dict[str, Any] = {
        "ratio_81": ratio[81],
        "two_workers": scaling,
        "two_bare_processes": ceiling,
        "agreement": agreement,
        "repeats": repeats,
    }
    return Result(
        title="Dense CRF",
        unit="ms an image",
        ours=statistics.median(ours_ms),
        peer=statistics.median(peer_ms),
        ours_range=(min(ours_ms), max(ours_ms)),
        peer_range=(min(peer_ms), max(peer_ms)),
        peer_name="pydensecrf with all 21 classes",
        versions=versions("pydensecrf2", "numpy", "ray"),
        lines=(
            f"{_IMAGES} pictures of about 500 x 375 ({kind()}), {_PRESENT} classes and the background, preset deeplab (10 iterations),"
            f" one thread, {repeats} interleaved repeats, processor time.",
            "",
            f"Against all 81 classes of COCO: ratio **{ratio[81]:.2f}** ({statistics.median(times[81][1]):.0f} ms). The argmax agrees"
            f" on {100 * agreement[21]:.3f} % (21) and {100 * agreement[81]:.3f} % (81) of the pixels of the worst picture.",
            "",
            f"Ray tasks on two CPUs against one, wall time of {_ROUNDS * _IMAGES} pictures: **{scaling:.2f}** times as fast (two bare"
            f" processes without Ray against one: {ceiling:.2f}, what the machine allows).",
        ),
        extra=extra,
    )


def _bare(work: list[tuple[np.ndarray, np.ndarray]], num_processes: int) -> float:
    """Seconds of the same tasks without Ray: whoever is free takes the next."""
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        pool.starmap(_labels, work[:1] * 2 * num_processes, chunksize=1)
        start_s = time.perf_counter()
        pool.starmap(_labels, work * _ROUNDS, chunksize=1)
        return time.perf_counter() - start_s


def _labels(picture_HW3: np.ndarray, scores_KHW: np.ndarray) -> np.ndarray:
    """What a task of the factory computes, with its setting of the allocator."""
    from dfa.label.crf import PRESETS, dense_crf
    from dfa.label.work import keep_freed_memory

    keep_freed_memory()
    return dense_crf(picture_HW3, scores_KHW, PRESETS["deeplab"]).argmax(0).astype(np.uint8)


def _scores(picture_HW3: np.ndarray, number: int) -> np.ndarray:
    """Smooth maps such as a CAM gives: a constant background and a bump for each class."""
    height, width = picture_HW3.shape[:2]
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    rows = [np.full((height, width), 0.4, np.float32)]
    for _ in range(_PRESENT):
        top, left, reach = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width, rng.uniform(40, 120)
        rows.append(np.exp(-((y - top) ** 2 + (x - left) ** 2) / (2 * reach**2)).astype(np.float32))
    return np.stack(rows)


def _spread(scores_KHW: np.ndarray, num_classes: int) -> np.ndarray:
    full = np.zeros((num_classes, *scores_KHW.shape[1:]), np.float32)
    full[: len(scores_KHW)] = scores_KHW
    return full
