"""A training step against encoder and decoder alone."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.measure import Result, interleave, versions

DEFAULT_REPEATS = 5


def step(repeats: int) -> Result:
    """A training step at ViT-B/16 size, 320 px, 4 images: the whole of it against encoder forward + decoder step alone."""
    import tempfile

    import torch

    from dfa import build
    from dfa.config import load
    from dfa.data.stream import Batch
    from dfa.label.pseudo import pseudo_labels
    from dfa.label.seed import make_seeds

    torch.set_num_threads(os.cpu_count() or 1)
    config = load("voc_dfa", ["clip.checkpoint=random", "train.use_gpu=false"])
    objective = build.train_step(config, torch.device("cpu"))
    segmenter, student, settings = objective.segmenter, objective.student, objective.settings
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    size, num_images = config.crop.size, 4
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(num_images, 3, 20, 20, generator=generator), size, mode="bicubic"
    )
    labels_BC = torch.zeros(num_images, 20, dtype=torch.bool)
    labels_BC[torch.arange(num_images), torch.arange(num_images)] = labels_BC[0, 10] = labels_BC[1, 11] = True
    batch = Batch(
        (smooth.clamp(0, 1) * 255).to(torch.uint8),
        torch.ones(num_images, size, size, dtype=torch.bool),
        labels_BC,
        torch.randint(0, 21, (num_images, size, size), generator=generator).to(torch.uint8),
        tuple("abcd"),
        torch.zeros(num_images),
        torch.arange(num_images),
    )
    parts: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start_s = time.perf_counter()
        value = call(*arguments)
        parts.setdefault(name, []).append(1000 * (time.perf_counter() - start_s))
        return value

    def update(losses: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.stack([part.weight * part.total / part.count.clamp_min(1) for part in losses]).sum().backward()
        optimizer.step()

    def whole() -> None:
        update(objective(batch))

    supervised = build.train_step(
        load("voc_dfa", ["clip.checkpoint=random", "train.use_gpu=false", "loss.supervision=masks"]),
        torch.device("cpu"),
    )
    bare_optimizer = torch.optim.AdamW(supervised.student.decoder.parameters(), lr=1e-4)

    def bare() -> None:
        bare_optimizer.zero_grad(set_to_none=True)
        losses = supervised(batch)
        torch.stack([part.weight * part.total / part.count.clamp_min(1) for part in losses]).sum().backward()
        bare_optimizer.step()

    whole_ms, bare_ms = interleave(whole, bare, repeats=repeats, per=1, clock=time.perf_counter)
    for _ in range(repeats):
        features = timed("encoder", segmenter.encode, batch.image_B3HW)
        timed("decoder forward", student.decoder, features.tokens_BLND, features.grid)
        pair = timed("pair logits", student.pair_logits, features.tokens_BLND, features.attention_BLNN)
        affinities = timed("affinities", segmenter.affinities, *pair)
        scores = (features.similarity_BNK, labels_BC, affinities, segmenter.seed)
        seeds = timed("scores and transport", make_seeds, *scores)
        refined = (seeds.cam_BNC, labels_BC, batch.image_B3HW, features.grid, settings.pseudo)
        labels = timed("pseudo-labels with refinement", pseudo_labels, *refined)
        outputs = student(features.tokens_BLND, features.attention_BLNN, features.grid)
        label_BN = labels.patch_Bhw.flatten(1)
        visible_BN = torch.ones_like(label_BN, dtype=torch.bool)
        losses = timed("alignment and rectification", objective.affinity_parts, outputs, label_BN, visible_BN)
        timed("their backward pass", update, losses)
    median = {name: statistics.median(values) for name, values in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        data_wait = _data_wait(config, Path(folder), whole)
    overhead = statistics.median(whole_ms) / statistics.median(bare_ms) - 1
    lines = (
        f"ViT-B/16 (random weights), {size} px, {num_images} images, fp32, {torch.get_num_threads()} threads, {repeats} interleaved"
        " repeats. Peer: the same encoder pass, decoder and AdamW with a mask given, so the difference is our own mathematics"
        f" (affinities, transport, refinement, losses): **{100 * overhead:.0f} %** on top.",
        "",
        "Parts alone, median ms: " + ", ".join(f"{name} {value:.0f}" for name, value in median.items()) + ".",
        "",
        f"Share of the step spent waiting for Ray Data (500 x 375 JPEGs): {100 * data_wait:.1f} %.",
    )
    return Result(
        title="Training step",
        unit="ms",
        ours=statistics.median(whole_ms),
        peer=statistics.median(bare_ms),
        ours_range=(min(whole_ms), max(whole_ms)),
        peer_range=(min(bare_ms), max(bare_ms)),
        peer_name="encoder and decoder alone",
        versions=versions("torch", "ray", "open_clip_torch"),
        lines=lines,
        extra={"overhead": overhead, "data_wait": data_wait, "parts_ms": median, "repeats": repeats},
    )


def _data_wait(config: Any, folder: Path, compute: Callable[[], None]) -> float:
    """Share of a few steps that the loop waits for the stream, which reads real-size JPEGs beside it."""
    import io

    import numpy as np
    import ray
    from PIL import Image

    from dfa import build
    from dfa.data.planning import plan_shards, write_plan
    from dfa.data.samples import Sample
    from dfa.data.stream import CropSettings, iterate, train_stream
    from dfa.data.writer import finish, write_shard
    from dfa.train.loop import start_ray

    rng, samples = np.random.default_rng(0), []
    for number in range(32):
        pixels = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        encoded = io.BytesIO()
        pixels.save(encoded, "JPEG")
        path = folder / f"{number}.jpg"
        path.write_bytes(encoded.getvalue())
        samples.append(Sample(f"image{number}", str(path), (1 + number % 20,)))
    root, names = str(folder / "shards"), build.class_set(config).names
    plan = plan_shards(samples, class_names=names, seed=0, shuffle=True, samples_per_shard=16, max_pixels=10**7)
    write_plan(root, plan)
    for item in plan.items:
        write_shard(root, item)
    crop = CropSettings(config.crop.size, (config.crop.scale_min, config.crop.scale_max), config.crop.flip, 10**7)
    start_ray()
    stream = train_stream(
        finish(root, plan, max_reject_share=0.0),
        seed=0,
        num_samples=48,
        finished_epochs=0,
        open_epochs={},
        crop=crop,
        with_masks=False,
        num_workers=1,
        read_cpus=0.25,
        max_readers=2,
    )
    waited_s, start_s = 0.0, 0.0
    batches = iterate(stream, batch_size=4, prefetch=2)
    next(batches)  # the start of the stream is no step
    start_s = time.perf_counter()
    while True:
        asked_s = time.perf_counter()
        batch = next(batches, None)
        waited_s += time.perf_counter() - asked_s
        if batch is None:
            break
        compute()
    total_s = time.perf_counter() - start_s
    ray.shutdown()
    return waited_s / total_s
