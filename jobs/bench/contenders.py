"""One loader over the same pictures: `python -m jobs.bench.contenders NAME FOLDER`, a process of its own for each.

Every loader decodes and crops with our own functions, in two processes beside the one that takes the batches, so that
what differs is the machinery alone. Prints one JSON line: images, seconds to the first batch and to the last.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfa.data.transforms import augment, decode_picture, sample_rng

SIZE, SCALES, FLIP = 320, (0.5, 2.0), 0.5  # METHOD 1.21
BATCH, PROCESSES = 16, 2
MAX_PIXELS = 10**7
FOLDER_JPEG, FOLDER_SHARDS, FOLDER_MDS = "jpeg", "shards", "mds"
Row = tuple[np.ndarray, np.ndarray, str]


def sample(key: str, jpeg: bytes) -> Row:
    """Decode and crop as training does: (3, S, S) uint8, (S, S) bool, key."""
    crop = augment(
        decode_picture(jpeg, max_pixels=MAX_PIXELS),
        None,
        size=SIZE,
        scale_range=SCALES,
        flip_probability=FLIP,
        rng=sample_rng(0, 0, key),
    )
    return np.ascontiguousarray(crop.image.transpose(2, 0, 1)), crop.valid, key


def ours(folder: Path) -> Iterator[int]:
    """The training stream on Ray Data."""
    from dfa.data.shards import load_index
    from dfa.data.stream import CropSettings, ingest_options, iterate, train_stream

    index = load_index(str(folder / FOLDER_SHARDS))
    stream = train_stream(
        index,
        seed=0,
        num_samples=index.num_samples,
        finished_epochs=0,
        open_epochs={},
        crop=CropSettings(SIZE, SCALES, FLIP, MAX_PIXELS),
        with_masks=False,
        num_workers=1,
        read_cpus=0.5,
        max_readers=PROCESSES,
    )
    stream.context.execution_options = ingest_options(window_bytes=256 * 2**20)
    for batch in iterate(stream, batch_size=BATCH, prefetch=2):
        yield len(batch)


def webdataset(folder: Path) -> Iterator[int]:
    """webdataset.WebLoader over the same shards."""
    from webdataset.compat import WebDataset, WebLoader

    shards = sorted(str(path) for path in (folder / FOLDER_SHARDS).glob("*.tar"))
    rows = WebDataset(shards, shardshuffle=False).map(_from_tar).batched(BATCH, collation_fn=_stack)
    return _count(WebLoader(rows, batch_size=None, num_workers=PROCESSES))


def torch_files(folder: Path) -> Iterator[int]:
    """torch's DataLoader over single files, shuffled."""
    import torch.utils.data

    files = sorted((folder / FOLDER_JPEG).iterdir())

    class Files(torch.utils.data.Dataset[Row]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int) -> Row:
            return sample(files[number].stem, files[number].read_bytes())

    return _count(torch.utils.data.DataLoader(Files(), BATCH, shuffle=True, num_workers=PROCESSES, collate_fn=_stack))


def mosaic(folder: Path) -> Iterator[int]:
    """mosaicml-streaming over shards of its own form, shuffled."""
    import streaming  # type: ignore[import-not-found]
    import torch.utils.data

    streaming.base.util.clean_stale_shared_memory()
    root = folder / FOLDER_MDS
    if not root.exists():
        with streaming.MDSWriter(out=str(root), columns={"key": "str", "jpeg": "bytes"}) as out:
            for path in sorted((folder / FOLDER_JPEG).iterdir()):
                out.write({"key": path.stem, "jpeg": path.read_bytes()})

    class Rows(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Row:
            row = super().__getitem__(at)
            return sample(row["key"], row["jpeg"])

    rows = Rows(local=str(root), shuffle=True, batch_size=BATCH)
    return _count(torch.utils.data.DataLoader(rows, BATCH, num_workers=PROCESSES, collate_fn=_stack))


def _from_tar(row: dict[str, Any]) -> Row:
    return sample(row["__key__"], row["jpg"])


def _stack(rows: list[Row]) -> tuple[Any, Any, list[str]]:
    import torch

    images, valid, keys = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(valid)), list(keys)


def _count(batches: Iterable[Any]) -> Iterator[int]:
    for images, _, _ in batches:
        yield len(images)


CONTENDERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "ours": ours,
    "webdataset": webdataset,
    "torch": torch_files,
    "streaming": mosaic,
}


def main(name: str, folder: Path) -> None:
    """Run one loader to its end, twice; the second time counts, with files and processes warm."""
    import torch

    torch.set_num_threads(1)
    if name == "ours":
        from dfa.train.loop import start_ray

        start_ray()
    for _ in range(2):
        start_s, first_s, images = time.perf_counter(), None, 0
        for count in CONTENDERS[name](folder):
            first_s = time.perf_counter() - start_s if first_s is None else first_s
            images += count
        record = {"images": images, "first_s": first_s, "total_s": time.perf_counter() - start_s}
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
