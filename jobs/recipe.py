"""A published recipe on its data set, from the folder to the scores: `python -m jobs.recipe voc_dfa ROOT [section.key=value ...]`.

Looks at ROOT as jobs.check does, writes the shards of its splits into data.output (`shards` where none is given), trains, and
scores what the paper scores, pseudo-labels with the background that was best for the seeds. Again it continues where it stopped; a
split whose shards are complete is not looked at again.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dfa.config import Config, load
from dfa.data import storage
from dfa.data.shards import INDEX_NAME
from jobs import Result, check, evaluate, run, shard, train
from jobs.submitted import absolute_paths

log = logging.getLogger("jobs.recipe")
# mIoU as the papers report it (the heads of the files in conf/ name the tables).
_PAPER: Mapping[str, Mapping[str, float]] = {
    "voc_dfa": {"seed_miou": 79.1, "mask_miou": 80.8, "val_miou": 79.3},
    "coco_dfa": {"val_miou": 51.5},
    "voc_ffr": {"val_miou": 74.8},
}
_SPLITS = {"voc": ("voc_train_aug", "voc_train", "voc_val"), "coco": ("coco_train", "coco_val")}
_KEPT = ("run", "data.output")
_SHARDS = "shards"


def work(conf: str, root: str, overrides: Sequence[str]) -> Result:
    """Every stage; each continues by itself what an earlier call left.

    Raises:
        ValueError: a recipe of no known data set, something that is needed is missing or wrong in ROOT.
    """
    given = [f"data.output={_SHARDS}", *overrides]
    config = _config(conf, given)
    kind, folder = config.data.source, config.data.output
    if kind not in _SPLITS:
        raise ValueError(f"{conf} is no recipe of VOC or COCO: its data.source is {kind}")
    shards = {name: storage.join(folder, name) for name in _SPLITS[kind]}
    if missing := {name: address for name, address in shards.items() if not _there(address)}:
        _shard(conf, root, overrides, kind, missing)
    learned = next(name for name in _SPLITS[kind] if _there(shards[name]))
    if learned == "voc_train":
        log.warning(
            "without the list train_aug.txt this trains on VOC's own train images, an eighth of the published ones"
        )
    given = [*overrides, f"shards.train={shards[learned]}", f"shards.val={shards[f'{kind}_val']}"]
    trained = train.work(_config(conf, given))
    if trained["interrupted"]:
        raise KeyboardInterrupt
    scores = _score(conf, given, shards.get("voc_train", ""))
    _tell(conf, scores, config.evaluate.limit)
    return {
        "job": "recipe",
        "run": trained["run"],
        "step": trained["step"],
        **scores,
        "paper": dict(_PAPER.get(conf, {})),
    }


def _config(conf: str, overrides: Sequence[str]) -> Config:
    return absolute_paths(load(conf, overrides), kept=_KEPT)


def _there(address: str) -> bool:
    return storage.exists(storage.join(address, INDEX_NAME))


def _shard(conf: str, root: str, overrides: Sequence[str], kind: str, wanted: Mapping[str, str]) -> None:
    """wanted: split -> address of its shards."""
    found = check.look(root)
    if found.num_problems:
        raise ValueError(f"{root}: {found.num_problems} of the findings above must be mended first")
    if kind != found.kind:
        raise ValueError(f"{conf} is a recipe of {kind}, {root} holds {found.kind}")
    for _, *given, output in found.commands:
        split = storage.base_name(output)
        if split in wanted:
            log.info("== shards of %s", split)
            shard.work(_config(conf, [*overrides, *given, f"data.output={wanted[split]}"]))


def _score(conf: str, given: Sequence[str], masked: str) -> Result:
    """The rows of the paper's table; masked: the shards whose exact masks score seeds and pseudo-labels, where there are any."""
    scores: Result = {}
    if masked and _there(masked):
        on_train = [*given, f"shards.train={masked}"]
        seed = evaluate.work(_config(conf, [*on_train, "evaluate.parts=[seed]", "evaluate.name=seed"]))
        best = seed["seed_threshold"]
        mask = [*on_train, "evaluate.parts=[mask]", "evaluate.name=mask", f"label.threshold={best}"]
        scores |= _taken(seed, "seed_miou", "seed_threshold") | _taken(evaluate.work(_config(conf, mask)), "mask_miou")
    val = evaluate.work(_config(conf, [*given, "evaluate.parts=[val]"]))
    return scores | _taken(val, "val_miou", "val_miou_no_crf")


def _taken(result: Result, *names: str) -> dict[str, Any]:
    return {name: result[name] for name in names}


def _tell(conf: str, scores: Result, limit: int) -> None:
    if limit:
        log.warning(
            "evaluate.limit: these are scores of the first %d images alone, not to be compared with the paper's", limit
        )
    log.info("%-18s%10s%10s", "mIoU, %", "here", "paper")
    for name, value in scores.items():
        if name.endswith("_miou") or name.endswith("no_crf"):
            paper = _PAPER.get(conf, {}).get(name)
            log.info("%-18s%10s%10s", name, "-" if value is None else value, "" if paper is None else paper)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf", help="a name in conf/ (voc_dfa, coco_dfa, voc_ffr, ...) or the path of a YAML file")
    parser.add_argument("root", help="the VOC devkit, or the folder with COCO's images and annotations")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="differences from the file")
    arguments = parser.parse_args()
    run(lambda: work(arguments.conf, arguments.root, arguments.overrides))


if __name__ == "__main__":
    main()
