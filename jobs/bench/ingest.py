"""The training stream against the loaders that others use, on the same pictures and transforms."""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jobs.bench.contenders import BATCH, CONTENDERS, FOLDER_JPEG, FOLDER_SHARDS, PROCESSES, SIZE
from jobs.bench.measure import Result, versions
from jobs.bench.pictures import kind, pictures

DEFAULT_REPEATS = 3
_IMAGES, _DISTINCT, _PER_SHARD = 5_000, 500, 250
PYTHON_WITH_STREAMING = "DFA_BENCH_STREAMING_PYTHON"
_SHOWN = {
    "ours": "ours, Ray Data",
    "webdataset": "webdataset.WebLoader",
    "torch": "torch DataLoader over files",
    "streaming": "mosaicml-streaming",
}

log = logging.getLogger(__name__)


def ingest(repeats: int) -> Result:
    """Images a second of each loader: two processes decode and crop, one takes batches and does nothing with them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        for number in range(repeats):
            for name, kept in runs.items():
                if python := _interpreter(name):
                    kept.append(_run(python, name, Path(folder)))
                    log.info("%s, repeat %d: %.1f s", name, number + 1, kept[-1]["total_s"])
    rates = {
        name: sorted(record["images"] / record["total_s"] for record in kept) for name, kept in runs.items() if kept
    }
    first_s = {name: statistics.median(record["first_s"] for record in kept) for name, kept in runs.items() if kept}
    milliseconds = {name: [1000 / rate for rate in kept] for name, kept in rates.items()}
    median = {name: statistics.median(kept) for name, kept in rates.items()}
    table = ", ".join(
        f"{_SHOWN[name]} {rate:.0f} ({median['ours'] / rate:.2f}, {first_s[name]:.1f} s)"
        for name, rate in median.items()
        if name != "ours"
    )
    return Result(
        title="Training stream",
        unit="ms an image",
        ours=statistics.median(milliseconds["ours"]),
        peer=statistics.median(milliseconds["webdataset"]),
        ours_range=(min(milliseconds["ours"]), max(milliseconds["ours"])),
        peer_range=(min(milliseconds["webdataset"]), max(milliseconds["webdataset"])),
        peer_name=_SHOWN["webdataset"],
        versions=versions("ray", "webdataset", "torch", "pillow"),
        lines=(
            f"{_IMAGES} samples ({_DISTINCT} different pictures of about 500 x 375, {kind()}) in shards of {_PER_SHARD}, cropped to"
            f" {SIZE}, batches of {BATCH}, {PROCESSES} reading processes and one that takes the batches, {repeats} interleaved"
            " repeats in fresh processes, second pass over the data, start of the pass included. Decoding and cropping are"
            " the same functions everywhere.",
            "",
            f"Images a second: ours {median['ours']:.0f} (first batch after {first_s['ours']:.1f} s); {table}: in brackets ours as a"
            " multiple of it, and its first batch.",
        ),
        extra={
            "images_per_s": median,
            "first_batch_s": first_s,
            "not_measured": sorted(set(CONTENDERS) - set(median)),
            "repeats": repeats,
        },
    )


def _interpreter(name: str) -> str | None:
    """mosaicml-streaming asks for older packages than ours: it runs where the environment variable says, if it does."""
    return os.environ.get(PYTHON_WITH_STREAMING) if name == "streaming" else sys.executable


def _run(python: str, name: str, folder: Path) -> dict[str, float]:
    here = str(Path(__file__).resolve().parents[2])
    command = [python, "-m", "jobs.bench.contenders", name, str(folder)]
    done = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _write(folder: Path) -> None:
    """The pictures as files, each under several names, and as our shards."""
    import io

    from PIL import Image

    from dfa.data.planning import plan_shards, write_plan
    from dfa.data.samples import Sample
    from dfa.data.writer import finish, write_shard

    (folder / FOLDER_JPEG).mkdir()
    samples: list[Any] = []
    for number, picture_HW3 in enumerate(pictures(_DISTINCT)):
        encoded = io.BytesIO()
        Image.fromarray(picture_HW3).save(encoded, "JPEG", quality=90)
        for copy in range(_IMAGES // _DISTINCT):
            path = folder / FOLDER_JPEG / f"picture{number:04d}-{copy}.jpg"
            path.write_bytes(encoded.getvalue())
            samples.append(Sample(path.stem, str(path), (1,)))
    root = str(folder / FOLDER_SHARDS)
    names = tuple(f"class{number}" for number in range(20))
    plan = plan_shards(samples, class_names=names, seed=0, shuffle=True, samples_per_shard=_PER_SHARD, max_pixels=10**7)
    write_plan(root, plan)
    for item in plan.items:
        write_shard(root, item)
    finish(root, plan, max_reject_share=0.0)
