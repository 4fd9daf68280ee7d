"""What one runs: `python -m jobs.NAME CONF key=value ...`, locally or through `ray job submit`.

Every job logs to standard error and ends with one JSON line of its results on standard output.
"""

import argparse
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from dfa.config import Config, load
from jobs.submitted import absolute_paths

Result = dict[str, Any]


INTERRUPTED = 130  # exit code of a job that was stopped, as of a shell's command


def main(
    description: str | None,
    work: Callable[[Config], Result],
    argv: list[str] | None = None,
    *,
    kept: Sequence[str] = ("run", "label.output", "predict.output"),
) -> None:
    """Parse `CONF key=value ...`, do the work, print its result as the last line.

    Bad input ends with the message alone and exit code 1; an interrupt with 130, a training's after its checkpoint and
    its result. Relative paths become absolute; in a submitted job those of `kept` are refused (see `submitted`).
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("conf", help="a name in conf/ or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="differences from the file")
    arguments = parser.parse_args(argv)
    run(lambda: work(absolute_paths(load(arguments.conf, arguments.overrides), kept=kept)))


def run(work: Callable[[], Result]) -> None:
    """Log to standard error, run, print the result as one JSON line; errors of the input without a traceback."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = work()
    except (ValueError, FileNotFoundError) as error:
        logging.getLogger("jobs").debug("traceback", exc_info=True)
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    _leave_ray()
    print(json.dumps(result), flush=True)
    if result.get("interrupted"):
        raise SystemExit(INTERRUPTED)


def _leave_ray() -> None:
    """Ray hands on what its workers print until it is left; the result comes after that."""
    ray = sys.modules.get("ray")  # a job without Ray need not import it
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """A polite stop (`ray job stop`, a scheduler) ends like Ctrl-C."""
    raise KeyboardInterrupt


def percent(share: float) -> float | None:
    """A score in [0, 1] as percent with two decimals; None, which JSON knows, for NaN."""
    return None if math.isnan(share) else round(100 * share, 2)
