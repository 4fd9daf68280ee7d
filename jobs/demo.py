"""The whole flow on a laptop: draws a world, shards it, trains, labels, evaluates and writes a report.

python -m jobs.demo                  again continues where it stopped
python -m jobs.demo --fresh          starts afresh
python -m jobs.demo --second-stage   also trains a second student from scratch on the labels of the first
python -m jobs.demo --supervised     also trains the same decoder on ground truth, the upper bound
python -m jobs.demo train.seed=1 run=runs/demo1
python -m jobs.demo --data photos    instead: a first look at your own images, one sub-folder for each class or a labels.csv
"""

import argparse
import copy
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from dfa.config import Config, load
from dfa.train.loop import start_ray
from dfa.world.folder import write_voc
from jobs import Result, evaluate, own, pseudo_label, report, run, shard, train
from jobs.submitted import absolute_paths

log = logging.getLogger("jobs.demo")
_MARKER = "demo.json"


class _PeakMemory:
    """The largest sum of proportional memory of this process and all that it started, Ray's included, in gigabytes."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak_gb, self._interval_s = 0.0, interval_s
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            me = psutil.Process()
            total = sum(self._share(each) for each in (me, *me.children(recursive=True)))
            self.peak_gb = max(self.peak_gb, total / 1e9)

    @staticmethod
    def _share(process: psutil.Process) -> int:
        try:
            return process.memory_full_info().pss
        except (psutil.Error, AttributeError):  # gone meanwhile, or a system without proportional sizes
            return 0


def work(config: Config, *, fresh: bool, second_stage: bool, supervised: bool) -> Result:
    """Run every stage; each continues by itself what an earlier run left."""
    folder = Path(config.run)
    _begin(folder, fresh=fresh)
    started = time.monotonic()
    with _PeakMemory() as memory:
        _stage("drawing the world", lambda: _draw(config, folder))
        start_ray()
        for split in ("train", "val"):
            _stage(f"writing the shards of {split}", lambda split=split: _shard(config, split))
        trained = _stage("training from image-level labels", lambda: train.work(config))
        if trained["interrupted"]:
            raise KeyboardInterrupt
        labelled = _stage("labelling the training images", lambda: pseudo_label.work(config))
        scores = _stage("evaluating", lambda: evaluate.work(config))
        second, bound = Result(), None
        if second_stage:
            second = _stage(
                "training a second student on the labels", lambda: _second_stage(config, labelled["labels"])
            )
        if supervised:
            bound = _stage("training on ground truth", lambda: _supervised(config))["val_miou"]
        seconds = time.monotonic() - started
        extra = {
            "seconds": seconds,
            "peak_gb": memory.peak_gb,
            "command": "python -m jobs.demo",
            "second_stage_miou": second.get("val_miou"),
            "supervised_miou": bound,
        }
        page = _stage("writing the report", lambda: report.work(config, extra))
    seconds = time.monotonic() - started
    log.info("the report is at %s", page["report"])
    return {
        "job": "demo",
        **{name: scores[name] for name in ("seed_miou", "mask_miou", "val_miou", "val_miou_no_crf")},
        "second_stage_miou": second.get("val_miou"),
        "second_stage_miou_no_crf": second.get("val_miou_no_crf"),
        "supervised_miou": bound,
        "seconds": round(seconds, 1),
        "peak_gb": round(memory.peak_gb, 2),
        "labels": labelled["labels"],
        "report": page["report"],
    }


def _stage(name: str, stage: Callable[[], Result]) -> Result:
    log.info("== %s", name)
    started = time.monotonic()
    result = stage()
    log.info("== %s took %.1f s", name, time.monotonic() - started)
    return result


def _begin(folder: Path, *, fresh: bool) -> None:
    if fresh and folder.exists():
        _remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()


def _remove(folder: Path) -> None:
    """Only what a demo made is deleted, never another folder that `run` was set to by mistake."""
    if not (folder / _MARKER).exists():
        raise ValueError(
            f"{folder} was not made by the demo ({_MARKER} is missing); it is left alone, choose another run="
        )
    shutil.rmtree(folder)


def _draw(config: Config, folder: Path) -> Result:
    world = config.world
    root = write_voc(folder / "world", seed=world.seed, num_train=world.num_train, num_val=world.num_val)
    config.data.root = str(root)
    config.shards.train, config.shards.val = str(folder / "shards/train"), str(folder / "shards/val")
    return {"root": str(root)}


def _shard(config: Config, split: str) -> Result:
    part = copy.deepcopy(config)
    part.data.split, part.data.output = split, getattr(config.shards, split)
    return shard.work(part)


def _second_stage(config: Config, labels: str) -> Result:
    part = copy.deepcopy(config)
    part.run, part.loss.supervision, part.shards.labels = f"{config.run}/second_stage", "labels", labels
    return _train_and_score(part)


def _supervised(config: Config) -> Result:
    part = copy.deepcopy(config)
    part.run, part.loss.supervision, part.shards.labels = f"{config.run}/supervised", "masks", ""
    return _train_and_score(part)


def _train_and_score(config: Config) -> Result:
    config.evaluate.parts = ["val"]
    if train.work(config)["interrupted"]:
        raise KeyboardInterrupt
    return evaluate.work(config)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", help="a name in conf/ or the path of a YAML file: demo, with --data own_quick")
    parser.add_argument("--data", metavar="FOLDER", help="your own images instead of a world")
    parser.add_argument("--images", type=int, default=20, help="how many of them to take (20)")
    parser.add_argument("--fresh", action="store_true", help="delete the run's folder first")
    parser.add_argument("--second-stage", action="store_true", help="also train a second student on the labels")
    parser.add_argument("--supervised", action="store_true", help="also measure the bound with ground-truth masks")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    choices = {name: getattr(arguments, name) for name in ("fresh", "second_stage", "supervised")}

    def start() -> Result:
        conf = arguments.conf or (own.CONF if arguments.data else "demo")
        config = absolute_paths(load(conf, arguments.overrides), kept=("run",))
        if not arguments.data:
            return work(config, **choices)
        if arguments.second_stage or arguments.supervised:
            raise ValueError(
                "--second-stage and --supervised are measured on the world; with --data there is no ground truth"
            )
        _begin(Path(config.run), fresh=arguments.fresh)
        return own.work(config, arguments.data, num_images=max(1, arguments.images))

    run(start)


if __name__ == "__main__":
    main()
