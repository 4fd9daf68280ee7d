"""What a run must remember of its samples: bytes, seconds and memory for 10^5 and 10^8 samples, half an epoch consumed."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs.bench.measure import Result, versions

DEFAULT_REPEATS = 3
_PER_SHARD, _UNDER_WAY = 1000, 4
_COUNTS = (82_783, 100_000, 100_000_000)  # the first: COCO's train2014


def state(repeats: int) -> Result:
    """Each size in a process of its own, so that its memory is its own."""
    measured = {count: [_measured(count) for _ in range(repeats)] for count in _COUNTS}
    table = [
        "| samples | state, bytes | save, ms | load, ms | what is left, ms | more memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for count, runs in measured.items():
        best = {name: sorted(run[name] for run in runs)[len(runs) // 2] for name in runs[0]}
        times = " | ".join(f"{1000 * best[name]:.3g}" for name in ("save_s", "load_s", "left_s"))
        table.append(f"| {count:,} | {best['state_bytes']:,.0f} | {times} | {best['more_bytes'] / 1e6:.3g} |")
    small, large = (measured[count] for count in (_COUNTS[1], _COUNTS[2]))
    ours, peer = (
        [run["left_s"] * 1e9 / count for run in runs] for runs, count in ((large, _COUNTS[2]), (small, _COUNTS[1]))
    )
    return Result(
        title="State of a run",
        unit="ns a sample to find what is left",
        ours=sorted(ours)[len(ours) // 2],
        peer=sorted(peer)[len(peer) // 2],
        ours_range=(min(ours), max(ours)),
        peer_range=(min(peer), max(peer)),
        peer_name="100 000 samples",
        versions=versions("numpy", "torch", "safetensors"),
        lines=(
            f"Half of an epoch in shards of {_PER_SHARD} consumed, {_UNDER_WAY} shards under way, {repeats} run(s); ours is 100"
            " million samples. What is left: the items of the rest of this epoch, as the start of the workers plans them.",
            "",
            *table,
            "",
            f"On paper, an open epoch of N samples: one bit a shard, N / {8 * _PER_SHARD} bytes, and one bit a sample of the shards"
            f" under way, {_PER_SHARD // 8} bytes each; at most two epochs are open. 100 million: 12 500 + {_UNDER_WAY} x 125 bytes"
            " and names. In any order at all (every shard under way) one bit a sample: 10 kB for COCO, 12.5 MB for 100 million.",
        ),
        extra={str(count): runs[0] for count, runs in measured.items()},
    )


def _measured(count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "jobs.bench.state", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(count: int) -> None:
    """Measure one size in this process."""
    import numpy as np
    import psutil
    import safetensors.torch

    from dfa.data.reading import epoch_order, remaining_items, shard_offsets
    from dfa.train.progress import Progress

    sizes = [_PER_SHARD] * (count // _PER_SHARD) + ([count % _PER_SHARD] if count % _PER_SHARD else [])
    before = psutil.Process().memory_info().rss
    progress, offsets = Progress(sizes), shard_offsets(sizes)
    order = list(epoch_order(sizes, seed=0, epoch=0))
    half = len(order) // 2
    for number, item in enumerate(order[: half + _UNDER_WAY]):
        rows = item.rows if number < half else item.rows[: item.num_samples // 2]
        progress.add(np.zeros(len(rows), int), offsets[item.shard] + rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "progress.safetensors"
        start = time.perf_counter()
        path.write_bytes(safetensors.torch.save(progress.to_tensors()))
        saved = time.perf_counter()
        again = Progress.from_tensors(safetensors.torch.load(path.read_bytes()))
        loaded = time.perf_counter()
        state_bytes = path.stat().st_size
    left = list(remaining_items(sizes, seed=0, num_samples=count, finished_epochs=0, open_epochs=again.open_epochs))
    done = time.perf_counter()
    if sum(item.num_rows for item in left) != count - progress.num_consumed:
        raise RuntimeError("what is left and what was consumed do not make an epoch")
    print(
        json.dumps(
            {
                "state_bytes": state_bytes,
                "save_s": saved - start,
                "load_s": loaded - saved,
                "left_s": done - loaded,
                "more_bytes": psutil.Process().memory_info().rss - before,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
