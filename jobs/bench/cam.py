"""CAMs of many images at once against one image at a time."""

import statistics
import time

from jobs.bench.measure import Result, interleave, versions

DEFAULT_REPEATS = 5


def cam(repeats: int) -> Result:
    """The scorer of the label factory at the tiny CLIP, three scales and mirrored, in batches of 16 and of one."""
    import torch

    from dfa import build
    from dfa.build.labelling import seed_images
    from dfa.config import load
    from dfa.world.scenes import draw

    torch.set_num_threads(1)
    config = load("demo", ["evaluate.cam_scales=[1.0,1.2,1.5]"])
    segmenter = build.segmenter(config, torch.device("cpu"))
    scenes = [draw(0, number) for number in range(32)]
    images = [torch.from_numpy(scene.image_HW3.copy()).permute(2, 0, 1) for scene in scenes]
    labels = [scene.labels for scene in scenes]
    size = config.label.batch_size

    def in_batches() -> list[float]:
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        return [
            float(each.score_KHW.sum())
            for part in parts
            for each in seed_images(segmenter, config, images[part], labels[part])
        ]

    def one_by_one() -> list[float]:
        return [
            float(each.score_KHW.sum())
            for image, present in zip(images, labels, strict=True)
            for each in seed_images(segmenter, config, [image], [present])
        ]

    with torch.inference_mode():
        difference = max(abs(a - b) / b for a, b in zip(in_batches(), one_by_one(), strict=True))
        ours_ms, peer_ms = interleave(in_batches, one_by_one, repeats=repeats, per=len(images), clock=time.perf_counter)
    return Result(
        title="CAMs in batches",
        unit="ms an image",
        ours=statistics.median(ours_ms),
        peer=statistics.median(peer_ms),
        ours_range=(min(ours_ms), max(ours_ms)),
        peer_range=(min(peer_ms), max(peer_ms)),
        peer_name="one image at a time",
        versions=versions("torch"),
        lines=(
            f"Transport CAMs of {len(images)} scenes of the demo world, scales 1.0, 1.2, 1.5 and mirrored, tiny CLIP, batches of"
            f" {size}, fp32, one thread, {repeats} interleaved repeats. The sums of the maps differ by {difference:.1e} at most.",
        ),
        extra={"repeats": repeats, "difference": difference},
    )
