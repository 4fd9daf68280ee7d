"""Memory of CAMs, masks and training with a thousand classes against VOC's twenty."""

import json
import multiprocessing
import multiprocessing.connection
import resource
import tempfile
from pathlib import Path

from jobs.bench.measure import Result, versions

DEFAULT_REPEATS = 1
_FEW, _MANY = 20, 1000
_BACKGROUND, _BATCH, _SIZE = 50, 4, 320


def classes(repeats: int) -> Result:
    """Peak of a process that builds the text bank, makes the CAMs and the model's masks of one batch, and trains on it."""
    found = {count: [_in_a_process(count) for _ in range(repeats)] for count in (_FEW, _MANY)}
    few_mb, many_mb = ([each["peak_mb"] for each in found[count]] for count in (_FEW, _MANY))
    stages = ", ".join(f"{name} {value:.0f}" for name, value in found[_MANY][-1].items() if name != "peak_mb")
    return Result(
        title="Memory of a thousand classes",
        unit="MB",
        ours=max(many_mb),
        peer=max(few_mb),
        ours_range=(min(many_mb), max(many_mb)),
        peer_range=(min(few_mb), max(few_mb)),
        peer_name=f"{_FEW} classes",
        versions=versions("torch", "open_clip_torch"),
        lines=(
            f"Peak of one process with ViT-B/16 (random weights, fp32): text bank of {_MANY} classes (ours) or {_FEW} and"
            f" {_BACKGROUND} background prompts, then the CAMs (transport, with the mirrored copies) of {_BATCH} images of"
            f" {_SIZE} x {_SIZE} with two to five classes each, then the model's masks of them, then a training step"
            f" (forward and backward) on them. {repeats} run(s).",
            "",
            f"Peaks after each stage with {_MANY} classes, MB: {stages}.",
        ),
        extra={"stages_mb": found[_MANY][-1], "limit_mb": 4000, "repeats": repeats},
    )


def _in_a_process(num_classes: int) -> dict[str, float]:
    """A peak belongs to a process: each measurement has its own."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(num_classes, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError as error:
        raise RuntimeError(f"the process with {num_classes} classes ended without an answer") from error
    finally:
        process.join()


def _work(num_classes: int, sending: multiprocessing.connection.Connection) -> None:
    import torch

    from dfa.build.training import train_step
    from dfa.config import load
    from dfa.data.stream import Batch

    torch.set_num_threads(1)
    peaks: dict[str, float] = {}

    def note(stage: str) -> None:
        peaks[stage] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

    with tempfile.TemporaryDirectory() as folder:
        names = [f"thing {number}" for number in range(num_classes)]
        background = [f"stuff {number}" for number in range(_BACKGROUND)]
        classes = Path(folder) / "classes.yaml"
        classes.write_text(json.dumps({"names": names, "background": background, "templates": ["a clean origami {}."]}))
        given = ["clip.checkpoint=random", "train.use_gpu=false", "train.precision=fp32", f"data.classes={classes}"]
        step = train_step(load("voc_dfa", given), torch.device("cpu"))
    note("text bank")
    generator = torch.Generator().manual_seed(0)
    image_B3HW = torch.randint(0, 256, (_BATCH, 3, _SIZE, _SIZE), generator=generator, dtype=torch.uint8)
    labels_BC = torch.zeros(_BATCH, num_classes, dtype=torch.bool)
    for number, row in enumerate(labels_BC):
        row[torch.randperm(num_classes, generator=generator)[: 2 + number]] = True
    step.eval()
    step.segmenter.pixel_seeds(image_B3HW, labels_BC, scales=[1.0], flip=True)
    note("CAMs")
    step.segmenter.logits(image_B3HW, scales=[1.0], flip=True).argmax(1)
    note("masks")
    number_B = torch.arange(_BATCH)
    valid_BHW = torch.ones(_BATCH, _SIZE, _SIZE, dtype=torch.bool)
    parts = step.train()(Batch(image_B3HW, valid_BHW, labels_BC, None, tuple(map(str, number_B)), number_B, number_B))
    torch.stack([part.weight * part.total / part.count.clamp(min=1) for part in parts]).sum().backward()
    note("a training step")
    sending.send(peaks | {"peak_mb": max(peaks.values())})
