"""One mode's measurement, and its section of the benchmark page."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

Way = TypeVar("Way")

TITLE = (
    "# Benchmarks\n\nWritten by `python -m jobs.bench MODE`, a section a mode. The ratio is the second row over the first: above 1"
    " ours is faster, or takes less.\n"
)


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


def interleave(
    ours: Callable[[], Any], peer: Callable[[], Any], *, repeats: int, per: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Milliseconds per unit of each repeat, ours and the peer in turn so that a busy machine hits both; one warm-up each.

    clock: `time.perf_counter`, or `time.process_time` where both sides compute on one thread of the processor and nothing else:
    the time they were given, whoever else was running.
    """
    times_ms = take_turns({"ours": ours, "peer": peer}, repeats=repeats, per=per, clock=clock)
    return times_ms["ours"], times_ms["peer"]


def take_turns(
    calls: Mapping[Way, Callable[[], Any]],
    *,
    repeats: int,
    per: int,
    clock: Callable[[], float],
    at_least_s: float = 0.0,
) -> dict[Way, list[float]]:
    """`interleave` of any number of calls; each is repeated within its turn until `at_least_s` have passed."""
    for call in calls.values():
        call()
    times_ms: dict[Way, list[float]] = {way: [] for way in calls}
    for _ in range(repeats):
        for way, call in calls.items():
            start_s, taken_s, count = clock(), 0.0, 0
            while not count or taken_s < at_least_s:
                call()
                count, taken_s = count + 1, clock() - start_s
            times_ms[way].append(1000 * taken_s / count / per)
    return times_ms


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
