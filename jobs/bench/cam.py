"""CAMs of many images at once against one view at a time, the way of the field's scripts."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jobs.bench.measure import Result, take_turns, versions

if TYPE_CHECKING:
    from torch import Tensor

    from dfa.model.segmenter import Segmenter

DEFAULT_REPEATS = 5
SCALES = (1.0, 1.2, 1.5)
_IMAGES = 16
_SMALL_BATCH = 4


def cam(repeats: int) -> Result:
    """Transport CAMs at pixel size with the tiny CLIP, mirrored, at three scales and at one."""
    import torch

    from dfa import build
    from dfa.config import load
    from dfa.world.scenes import draw

    torch.set_num_threads(1)
    config = load("demo")
    segmenter = build.segmenter(config, torch.device("cpu"))
    scenes = [draw(0, number) for number in range(_IMAGES)]
    image_B3HW = torch.stack([torch.from_numpy(scene.image_HW3.copy()).permute(2, 0, 1) for scene in scenes])
    labels_BC = torch.zeros(_IMAGES, len(build.class_set(config).names), dtype=torch.bool)
    for row, scene in zip(labels_BC, scenes, strict=True):
        row[[number - 1 for number in scene.labels]] = True
    size = config.label.batch_size
    many, single = f"batches of {size}", "one image at a time"
    few, views = f"batches of {_SMALL_BATCH}", "one view at a time"
    lines, timed = list[str](), dict[tuple[float, ...], dict[str, list[float]]]()
    extra: dict[str, Any] = {"repeats": repeats}
    with torch.inference_mode():
        for scales in (SCALES, SCALES[:1]):
            ways: dict[str, Callable[[], list[Tensor]]] = {
                many: lambda scales=scales: _batched(segmenter, image_B3HW, labels_BC, scales, size),
                few: lambda scales=scales: _batched(segmenter, image_B3HW, labels_BC, scales, _SMALL_BATCH),
                single: lambda scales=scales: _batched(segmenter, image_B3HW, labels_BC, scales, 1),
                views: lambda scales=scales: _view_by_view(segmenter, image_B3HW, labels_BC, scales),
            }
            difference = _largest_difference(ways)
            timed[scales] = take_turns(ways, repeats=repeats, per=_IMAGES, clock=time.process_time)
            medians = {way: statistics.median(times_ms) for way, times_ms in timed[scales].items()}
            text = ", ".join(f"{way} {milliseconds:.3g}" for way, milliseconds in medians.items())
            lines.append(
                f"Scales {', '.join(map(str, scales))}, ms an image: {text}. Their maps differ by {difference:.0e} at most."
            )
            extra[f"scales {scales}"] = medians | {"difference": difference}
        share = _share_of_products(lambda: _batched(segmenter, image_B3HW, labels_BC, SCALES, size))
    ours, peer = timed[SCALES][many], timed[SCALES][views]
    bound = statistics.median(peer) / (share * statistics.median(ours))
    lines.append(
        f"Matrix products, attention among them, are {100 * share:.0f} % of our time, and no batch does fewer: were all the rest free,"
        f" the ratio would be {bound:.2f}."
    )
    extra |= {"share_of_products": share, "bound": bound}
    return Result(
        title="CAMs in batches",
        unit="ms an image",
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        ours_range=(min(ours), max(ours)),
        peer_range=(min(peer), max(peer)),
        peer_name=views,
        versions=versions("torch"),
        lines=(
            f"Transport CAMs of {_IMAGES} scenes of the demo world at pixel size, mirrored, tiny CLIP, fp32, processor time of one"
            f" thread, {repeats} interleaved repeats. Ours: {many}, the factory's. The peer: every scale and mirrored copy of every"
            " image in a forward pass of its own, by the same functions, averaged at pixel size.",
            *lines,
        ),
        extra=extra,
    )


def _batched(
    segmenter: "Segmenter", image_B3HW: "Tensor", labels_BC: "Tensor", scales: Sequence[float], size: int
) -> "list[Tensor]":
    """Of each image its classes' maps, then the background's: (1 + its classes) x H x W."""
    found = []
    for images, labels in zip(image_B3HW.split(size), labels_BC.split(size), strict=True):
        seeds = segmenter.pixel_seeds(images, labels, scales=scales, flip=True)
        rows = zip(seeds.score_BMHW, seeds.class_BM, seeds.background_BHW, strict=True)
        found += [_with_background(score[classes > 0], background) for score, classes, background in rows]
    return found


def _view_by_view(
    segmenter: "Segmenter", image_B3HW: "Tensor", labels_BC: "Tensor", scales: Sequence[float]
) -> "list[Tensor]":
    """The same as _batched gives."""
    found = []
    for image_13HW, labels_1C in zip(image_B3HW.split(1), labels_BC.split(1), strict=True):
        maps = []
        for scale in scales:
            for mirrored in (False, True):
                view = image_13HW.flip(-1) if mirrored else image_13HW
                seeds = segmenter.pixel_seeds(view, labels_1C, scales=[scale], flip=False)
                map_KHW = _with_background(seeds.score_BMHW[0], seeds.background_BHW[0])
                maps.append(map_KHW.flip(-1) if mirrored else map_KHW)
        found.append(sum(maps[1:], maps[0]) / len(maps))
    return found


def _share_of_products(call: "Callable[[], list[Tensor]]") -> float:
    """Of the time of all operators."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    products = (
        "aten::addmm",
        "aten::baddbmm",
        "aten::bmm",
        "aten::mm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    )
    own_us = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(own_us.get(name, 0.0) for name in products) / sum(own_us.values())


def _with_background(score_MHW: "Tensor", background_HW: "Tensor") -> "Tensor":
    import torch

    return torch.cat([score_MHW, background_HW[None]])


def _largest_difference(ways: "dict[str, Callable[[], list[Tensor]]]") -> float:
    first, *others = [way() for way in ways.values()]
    return max(float((a - b).abs().max()) for other in others for a, b in zip(first, other, strict=True))
