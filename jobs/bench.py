"""`python -m jobs.bench MODE`: ours against a peer on the same work, interleaved, medians and spread.

Text goes to standard error, one JSON line to standard output: `mode`, `ours`, `peer`, `ratio` (above 1: ours is faster) and what
the mode adds. The mode's section of cluster/BENCHMARKS.md is written anew; other sections stay as they are.
A mode is one function in MODES; each imports what it needs, after the number of threads is set.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "cluster" / "BENCHMARKS.md"
TITLE = "# Benchmarks\n\nWritten by `python -m jobs.bench MODE`, a section a mode. A ratio above 1 means that ours is faster.\n"


@dataclass(frozen=True)
class Result:
    """What a mode measured. ours, peer: medians in `unit`, less is better. lines: what the section says besides."""

    title: str
    unit: str
    ours: float
    peer: float
    ours_range: tuple[float, float]
    peer_range: tuple[float, float]
    peer_name: str
    versions: dict[str, str]
    lines: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.peer / self.ours


def transport(repeats: int) -> Result:
    """Batched transport of 32 images, 400 patches, 27 columns against a loop over POT's plain `ot.sinkhorn`."""
    import ot
    import torch

    from dfa.core.transport import sinkhorn_plan

    torch.set_num_threads(1)
    num_images, num_patches, num_columns, epsilon, tolerance = 32, 400, 27, 0.1, 1e-4
    generator = torch.Generator().manual_seed(0)
    # Smooth maps stretched to [0, 1], as scoring matrices are, and unequal marginals.
    maps = torch.randn(num_images, num_columns, 5, 5, generator=generator)
    maps = torch.nn.functional.interpolate(maps, (20, 20), mode="bicubic").flatten(2).transpose(1, 2)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    scores_BNK = ((maps - low) / (high - low)).contiguous()
    marginal_BK = torch.softmax(0.5 * torch.randn(num_images, num_columns, generator=generator), -1)
    mask_BK = torch.ones(num_images, num_columns, dtype=torch.bool)
    # The peer gets its arrays ready-made, in the same precision (in its usual float64 it is a little slower).
    costs, marginals = (-scores_BNK).numpy(), marginal_BK.numpy()
    uniform = torch.full((num_patches,), 1 / num_patches).numpy()

    def run_ours() -> Any:
        return sinkhorn_plan(
            scores_BNK, marginal_BK, mask_BK, epsilon=epsilon, max_iterations=100, tolerance=tolerance
        ).plan_BNK

    def run_peer() -> Any:
        return [
            ot.sinkhorn(uniform, marginals[image], costs[image], epsilon, stopThr=tolerance)
            for image in range(num_images)
        ]

    peer_plan_BNK = torch.stack([torch.from_numpy(plan) for plan in run_peer()])
    errors = {}
    for name, plan_BNK in (("ours", run_ours()), ("peer", peer_plan_BNK)):
        # POT stops on the norm of the column error; ours stops on its sum, which is never smaller.
        column_error = float((plan_BNK.sum(1) - marginal_BK).norm(dim=1).max())
        row_error = float((plan_BNK.sum(2) - 1 / num_patches).norm(dim=1).max())
        errors[name] = max(column_error, row_error)
        if errors[name] > tolerance:
            raise ValueError(
                f"{name} stopped at a marginal error of {errors[name]}, the benchmark asks for {tolerance}"
            )
    ours_ms, peer_ms = interleave(run_ours, run_peer, repeats=repeats, per=num_images, clock=time.process_time)
    return Result(
        title="Entropic transport",
        unit="ms an image",
        ours=statistics.median(ours_ms),
        peer=statistics.median(peer_ms),
        ours_range=(min(ours_ms), max(ours_ms)),
        peer_range=(min(peer_ms), max(peer_ms)),
        peer_name="loop over `ot.sinkhorn`",
        versions=versions("torch", "POT", "numpy"),
        lines=(
            f"{num_images} images x {num_patches} patches x {num_columns} columns, epsilon {epsilon}, fp32, one thread,"
            f" {repeats} interleaved repeats, processor time. Both stop at a marginal error of {tolerance} (reached: ours"
            f" {errors['ours']:.1e}, peer {errors['peer']:.1e}, norm of the worst image).",
        ),
        extra={"marginal_error": errors, "repeats": repeats},
    )


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
    from dfa.data.samples import Sample
    from dfa.data.stream import CropSettings, iterate, train_stream
    from dfa.data.writer import finish, plan_shards, write_plan, write_shard
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
        multiple_of=1,
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


MODES: dict[str, Callable[[int], Result]] = {"step": step, "transport": transport}
_ONE_THREAD = {"transport"}


def interleave(
    ours: Callable[[], Any], peer: Callable[[], Any], *, repeats: int, per: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Milliseconds per unit of each repeat, ours and the peer in turn so that a busy machine hits both; one warm-up each.

    clock: `time.perf_counter`, or `time.process_time` where both sides compute on one thread of the processor and nothing else:
    the time they were given, whoever else was running.
    """
    for call in (ours, peer):
        call()
    ours_ms, peer_ms = [], []
    for _ in range(repeats):
        for call, times_ms in ((ours, ours_ms), (peer, peer_ms)):
            start_s = clock()
            call()
            times_ms.append(1000 * (clock() - start_s) / per)
    return ours_ms, peer_ms


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def hardware() -> str:
    """Processor model and cores; no host name."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def section_text(result: Result) -> str:
    """One mode's part of the benchmark page."""
    rows = (("ours", result.ours, result.ours_range), (result.peer_name, result.peer, result.peer_range))
    table = [f"| {name} | {value:.3g} | {low:.3g} to {high:.3g} |" for name, value, (low, high) in rows]
    used = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return "\n".join(
        [
            f"## {result.title}",
            "",
            *result.lines,
            "",
            f"| | median, {result.unit} | range |",
            "|---|---|---|",
            *table,
            "",
            f"Ratio **{result.ratio:.2f}**. {hardware()}; {used}.",
        ]
    )


def write_section(path: Path, name: str, text: str) -> None:
    """Puts text between the page's `<!-- bench:name -->` marks, or at its end if it has none; the rest stays byte for byte."""
    opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    page = path.read_text() if path.exists() else TITLE
    if page.count(opening) != page.count(closing) or page.count(opening) > 1:
        raise ValueError(f"{path.name}: the marks {opening} and {closing} must stand there once each or not at all")
    section = f"{opening}\n{text}\n{closing}"
    if opening in page:
        before, rest = page.split(opening)
        if closing not in rest:
            raise ValueError(f"{path.name}: {closing} stands before {opening}")
        page = before + section + rest.split(closing)[1]
    else:
        page = f"{page.rstrip()}\n\n{section}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Ours against a peer on the same work.")
    parser.add_argument("mode", choices=sorted(MODES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--page", type=Path, default=BENCHMARKS, help="the page whose section is written anew")
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {chosen.repeats}")
    # Read when numpy and torch are first imported, which is why modes import them and this module does not.
    if chosen.mode in _ONE_THREAD:
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = "1"
    result = MODES[chosen.mode](chosen.repeats)
    text = section_text(result)
    write_section(chosen.page, chosen.mode, text)
    print(text, file=sys.stderr)
    record = {
        "mode": chosen.mode,
        "ours": result.ours,
        "peer": result.peer,
        "ratio": result.ratio,
        "unit": result.unit,
        "ours_range": result.ours_range,
        "peer_range": result.peer_range,
        "hardware": hardware(),
        "versions": result.versions,
    }
    print(json.dumps(record | result.extra))


if __name__ == "__main__":
    main()
