"""Tiny finished label folders and image shards, written without the modules that are tested on them."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from dfa.data import planning, writer
from dfa.data.classes import voc_palette
from dfa.data.samples import Sample
from dfa.data.shards import ShardIndex, sha256_of
from dfa.data.transforms import encode_mask

NAMES = ("cat", "dog", "hot dog")
_FLOATS = ("confidence", "void_share", "agreement_seed", "agreement_model", "agreement_seed_model")
SCHEMA = pyarrow.schema(
    [("key", pyarrow.string()), ("shard", pyarrow.string()), ("row", pyarrow.int32())]
    + [("labels", pyarrow.list_(pyarrow.int32())), ("width", pyarrow.int32()), ("height", pyarrow.int32())]
    + [("empty", pyarrow.list_(pyarrow.int32()))]
    + [(name, pyarrow.float32()) for name in _FLOATS]
)


@dataclass(frozen=True)
class Label:
    """One sample of a label folder."""

    key: str
    mask_HW: np.ndarray
    labels: tuple[int, ...]
    confidence: float = 0.5
    agreement_seed: float = 0.75
    agreement_model: float | None = None
    agreement_seed_model: float | None = None
    row: int = 0
    members: tuple[tuple[str, bytes], ...] = ()

    def row_of_table(self, shard: str) -> dict:
        names = ("key", "row", "labels", "confidence", "agreement_seed", "agreement_model", "agreement_seed_model")
        return {name: getattr(self, name) for name in names} | {
            "shard": shard,
            "height": self.mask_HW.shape[0],
            "width": self.mask_HW.shape[1],
            "void_share": float((self.mask_HW == 255).mean()),
            "empty": [label for label in self.labels if not (self.mask_HW == label).any()],
        }


def grey_png(array_HW: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array_HW).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def blocks() -> np.ndarray:
    """A mask of classes 1 and 3 and a void pixel."""
    mask = np.zeros((8, 11), np.uint8)
    mask[2:5, 3:9], mask[4:7, 0:4], mask[0, 10] = 1, 3, 255
    return mask


def write_labels(root: Path, shards: Sequence[Sequence[Label]], names: Sequence[str] = NAMES, plan: str = "p") -> str:
    """Write a finished label folder; return its address."""
    root.mkdir(parents=True)
    rows, entries, pixels = [], [], np.zeros(256, np.int64)
    for number, labels in enumerate(shards):
        shard, members = f"shard-{number:06d}.tar", []
        for label in labels:
            height, width = label.mask_HW.shape
            facts = {"key": label.key, "labels": label.labels, "width": width, "height": height}
            members.append((f"{label.key}.png", encode_mask(label.mask_HW, voc_palette())))
            members.append((f"{label.key}.json", json.dumps(facts).encode()))
            members += [(f"{label.key}.{extension}", data) for extension, data in label.members]
            rows.append(label.row_of_table(shard))
            pixels += np.bincount(label.mask_HW.reshape(-1), minlength=256)
        write_tar(root / shard, members)
        entries.append({"name": shard, "num_samples": len(labels), "sha256": sha256_of(str(root / shard))})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), root / "samples.parquet")
    index = {
        "kind": "dfa-labels",
        "format": 1,
        "class_names": list(names),
        "image_plan_hash": plan,
        "num_samples": len(rows),
        "num_rejects": 2,
        "reject_reasons": {"no label": 2},
        "pixels": pixels[: len(names) + 1].tolist(),
        "void_pixels": int(pixels[255]),
        "shards": entries,
    }
    (root / "index.json").write_text(json.dumps(index))
    return str(root)


def indexed_anew(root: Path) -> None:
    """Have index.json know the shards as they are now."""
    index = json.loads((root / "index.json").read_text())
    for entry in index["shards"]:
        entry["sha256"] = sha256_of(str(root / entry["name"]))
    (root / "index.json").write_text(json.dumps(index))


def write_images(root: Path, samples: Sequence[Sample], *, names: Sequence[str], per_shard: int) -> ShardIndex:
    """Write image shards of the samples in their order."""
    settings = {"seed": 0, "shuffle": False, "samples_per_shard": per_shard, "max_pixels": 10**7}
    plan = planning.plan_shards(samples, class_names=tuple(names), **settings)
    planning.write_plan(str(root), plan)
    for item in plan.items:
        writer.write_shard(str(root), item)
    return writer.finish(str(root), plan, max_reject_share=0.0)
