"""Memory of the label factory: a thousand pictures against a hundred."""

import tempfile
from pathlib import Path

from jobs.bench.labels import run_factory
from jobs.bench.measure import Result, versions
from jobs.bench.pictures import kind

DEFAULT_REPEATS = 1
_FEW, _MANY = 100, 1000


def labels_memory(repeats: int) -> Result:
    """Peak memory of one call of the factory with few pictures, then with many."""
    from dfa.train.loop import start_ray

    with tempfile.TemporaryDirectory() as folder:
        start_ray()
        run_factory(Path(folder) / "warm", 8)
        peaks = {
            count: [
                run_factory(Path(folder) / f"{count}-{each}", count, watch_memory=True).peak_bytes / 1e6
                for each in range(repeats)
            ]
            for count in (_FEW, _MANY)
        }
    return memory_result(peaks[_FEW], peaks[_MANY], repeats)


def memory_result(few_mb: list[float], many_mb: list[float], repeats: int) -> Result:
    """The section: ours is the memory of many pictures, the peer that of few."""
    few, many = max(few_mb), max(many_mb)
    return Result(
        title="Memory of the label factory",
        unit="MB",
        ours=many,
        peer=few,
        ours_range=(min(many_mb), many),
        peer_range=(min(few_mb), few),
        peer_name=f"{_FEW} pictures",
        versions=versions("torch", "ray", "pydensecrf2"),
        lines=(
            f"Peak of all processes of a call (proportional shares, Ray's included): {_MANY} pictures (ours) against {_FEW}, of"
            f" about 500 x 375 ({kind()}), as in the mode labels, {repeats} run(s).",
        ),
        extra={"repeats": repeats},
    )
