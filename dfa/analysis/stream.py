"""Parts of a data set through Ray Data, each committed when it is done.

The driver writes the sums, a few kilobytes a part, so that workers need no place to write to; a part in flight holds one
pair of maps. A killed job does again the parts that were in flight, and no other.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from dfa.analysis.maps import PairPart
from dfa.analysis.sums import AnalysisSettings, PairSums, commit, committed, from_plain, sum_pairs, to_plain, total
from dfa.data.shards import BrokenShardError

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 5.0
_ROW_BYTES = 200_000  # sums of a part, for Ray's books


@dataclass(frozen=True)
class AnalysisRun:
    """pairs_now, seconds: of this call; 0 where all was there. work_s: processor seconds of the workers."""

    sums: PairSums
    pairs_now: int
    seconds: float
    work_s: float


def run(output: str, parts: Sequence[PairPart], settings: AnalysisSettings, *, cpus: float) -> AnalysisRun:
    """Sum what is not yet summed in OUTPUT, and return the sum of all. Ray must run, `sums.begin` have been called.

    cpus: that one task reserves.

    Raises:
        ValueError: shards that cannot be read (the other parts are done), or a folder that cannot be written.
    """
    digests = {part.name: part.digest(repr(settings)) for part in parts}
    todo = [part for part in parts if committed(output, part.name, digests[part.name]) is None]
    num_pairs, num_done, work_s, problems = sum(len(part.keys) for part in todo), 0, 0.0, list[str]()
    logger.info("%d pairs in %d of %d parts to analyse", num_pairs, len(todo), len(parts))
    start_s = told_s = time.monotonic()
    for done in _results(todo, settings, cpus) if todo else ():
        if done["problem"]:
            logger.error("%s cannot be analysed: %s", done["part"], done["problem"])
            problems.append(done["problem"])
            continue
        sums = from_plain(json.loads(done["sums"]))
        commit(output, done["part"], digests[done["part"]], sums)
        num_done += sums.labels.num_images + len(sums.rejects)
        work_s += done["seconds"]
        if time.monotonic() - told_s >= _PROGRESS_EVERY_S:
            told_s = time.monotonic()
            logger.info("%d of %d pairs, %.0f pairs/s", num_done, num_pairs, num_done / (told_s - start_s))
    if todo:
        logger.info("%d of %d pairs", num_done, num_pairs)
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ValueError(f"{len(problems)} of {len(todo)} parts cannot be analysed, the others are done: {shown}")
    seconds = time.monotonic() - start_s
    found = total(output, [(part.name, digests[part.name]) for part in parts], settings)
    return AnalysisRun(found, num_done, seconds if todo else 0.0, work_s)


def _results(parts: Sequence[PairPart], settings: AnalysisSettings, cpus: float) -> Iterator[dict[str, Any]]:
    """One row a part, as they are finished."""
    dataset = ray.data.read_datasource(_source(parts, settings), num_cpus=cpus, override_num_blocks=len(parts))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    yield from dataset.iter_rows()


def _source(parts: Sequence[PairPart], settings: AnalysisSettings) -> Datasource:
    """A read task a part. The class is local so that Ray's own processes get it by value, without torch."""

    class Pairs(Datasource):
        def get_name(self) -> str:
            return "Pairs"

        def estimate_inmemory_data_size(self) -> int:
            return _ROW_BYTES * len(parts)

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=1, size_bytes=_ROW_BYTES, input_files=None, exec_stats=None)
            return [ReadTask(partial(_block, part, settings), metadata) for part in parts]

    return Pairs()


def _block(part: PairPart, settings: AnalysisSettings) -> list[pyarrow.Table]:
    """What a task does: one row with the sums as JSON, or with what is wrong with its shard."""
    torch.set_num_threads(1)  # tasks share a machine by their CPUs
    start_s, sums, problem = time.process_time(), "", ""
    try:
        sums = json.dumps(to_plain(sum_pairs(part, settings)))
    except (BrokenShardError, OSError) as error:
        problem = str(error)
    row = {"part": part.name, "sums": sums, "problem": problem, "seconds": time.process_time() - start_s}
    return [pyarrow.Table.from_pylist([row])]
