"""`python -m jobs.bench MODE`: ours against a peer on the same work, interleaved, medians and spread.

Text goes to standard error, one JSON line to standard output: `mode`, `ours`, `peer`, `ratio` (above 1: ours is faster) and what
the mode adds. The mode's section of cluster/BENCHMARKS.md is written anew; other sections stay as they are.
A mode is one function in a module of its own name, imported after the number of threads is set.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.bench.measure import hardware, section_text, write_section
from jobs.size import PAGE
from jobs.submitted import refuse_lost

BENCHMARKS = PAGE
MODES = (
    "analyze",
    "cam",
    "classes",
    "crf",
    "faults",
    "features",
    "ingest",
    "labels",
    "labels_memory",
    "mixer",
    "state",
    "step",
    "transport",
)
_ONE_THREAD = set(MODES) - {"ingest", "step"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Ours against a peer on the same work.")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--repeats", type=int, help="how often; each mode has its own default")
    parser.add_argument("--page", type=Path, default=BENCHMARKS, help="the page whose section is written anew")
    chosen = parser.parse_args(arguments)
    if chosen.repeats is not None and chosen.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {chosen.repeats}")
    try:
        refuse_lost("--page", chosen.page)
    except ValueError as error:
        parser.error(str(error))
    # Read when numpy and torch are first imported, which is why modes import them and this module does not.
    if chosen.mode in _ONE_THREAD:
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = "1"
    mode = importlib.import_module(f"jobs.bench.{chosen.mode}")
    result = getattr(mode, chosen.mode)(chosen.repeats or mode.DEFAULT_REPEATS)
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
