"""Exact VOC mIoU of a run: `python -m jobs.evaluate CONF evaluate.parts=[seed,mask,val]`.

seed: CAM on the training shards, best background threshold of a sweep. mask: CAM and dense CRF there. val: the model on
the validation shards, several scales and mirrored, with and without CRF, and with every CRF of evaluate.crf_presets. test: the
same on shards.test, which need no ground truth: nothing is scored, the masks become the archive that VOC's server takes. How
images are seen is evaluate.input, scales, flip and merge. What pseudo_label or an earlier run has labelled is not done again;
evaluate.name=NAME keeps the masks and the result of other settings apart, in RUN/evaluate/NAME and RUN/evaluate/NAME.json.
"""

import json
import logging
import re

import torch
from torch import Tensor

from dfa import build
from dfa.config import Config
from dfa.core.metrics import best_threshold, iou_per_class, mean_iou
from dfa.data import storage
from dfa.label import factory
from dfa.label.factory import LabelPass
from dfa.label.scoring import Tally
from dfa.label.submission import export_submission
from dfa.label.work import Pool
from dfa.train.loop import start_ray
from jobs import Result, main, percent

log = logging.getLogger("jobs.evaluate")
PARTS = ("seed", "mask", "val", "test")
RESULT_NAME = "evaluate.json"


def work(config: Config, pool: Pool | None = None) -> Result:
    """Label what is missing, score, and keep the result in RUN/evaluate.json, or RUN/evaluate/NAME.json.

    pool: who labels; None: all that Ray has free.
    """
    passes = _passes(config)
    plan = build.factory_plan(config, tuple(passes.values()))
    if pool is None:
        start_ray()
    done = factory.run(plan, pool)
    result: Result = {"job": "evaluate", "run": config.run, "checkpoint": build.checkpoint(config)}
    tables: dict[str, Tensor] = {}
    for split, label_pass in passes.items():
        tally = done[label_pass.name].report.tally
        if split == "test":
            result |= _submission(label_pass, config.evaluate.competition)
            continue
        scores, confusions = _score(split, tally, label_pass, config)
        result |= scores | {f"{split}_images": tally.num_truth}
        tables |= confusions
    result["seconds"] = round(sum(done[each.name].seconds for each in passes.values()), 2)
    if tables:
        result["per_class"] = _per_class(("background", *build.class_set(config).names), tables)
        _show(result["per_class"], tables)
    _keep(result, config)
    return result


def _keep(result: Result, config: Config) -> None:
    name = config.evaluate.name
    if name:
        storage.make_folder(storage.join(config.run, "evaluate"))
    address = storage.join(config.run, f"evaluate/{name}.json" if name else RESULT_NAME)
    data = (json.dumps(result, indent=1) + "\n").encode()
    storage.write_atomic(address, lambda file: file.write(data))


def _passes(config: Config) -> dict[str, LabelPass]:
    """The passes that the parts need: CAM once for seed and mask."""
    parts, limit, name = config.evaluate.parts, config.evaluate.limit, config.evaluate.name
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"evaluate.parts is {parts}, allowed are one or more of {list(PARTS)}")
    if name and not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"evaluate.name is {name!r}, allowed are letters, digits and any of _ . - behind the first")
    passes: dict[str, LabelPass] = {}
    if {"seed", "mask"} & set(parts):
        output = _output(config, "train")
        passes["train"] = build.seed_pass(config, "train", with_crf="mask" in parts, limit=limit, output=output)
    for split in ("val", "test"):
        if split in parts:
            passes[split] = build.model_pass(config, split, limit=limit, output=_output(config, split))
    for split, label_pass in passes.items():
        if split != "test":
            _check_truth(label_pass, config, split)
    return passes


def _output(config: Config, split: str) -> str:
    """Where the masks go; "" for where the passes put them by themselves."""
    name, limit = config.evaluate.name, config.evaluate.limit
    part = f"{split}_first_{limit}" if limit else split
    return storage.join(config.run, f"evaluate/{name}/{part}") if name else ""


def _submission(label_pass: LabelPass, competition: str) -> Result:
    address = storage.beside(label_pass.output, f"_{competition}.tgz")
    return {
        "submission": address,
        "test_images": export_submission(label_pass.output, address, competition=competition),
    }


def _check_truth(label_pass: LabelPass, config: Config, split: str) -> None:
    num_truth = num_samples = 0
    for _, rows in label_pass.images.samples(label_pass.limit or None):
        num_truth += sum(row.has_mask for row in rows)
        num_samples += len(rows)
    if num_truth == 0:
        raise ValueError(
            f"shards.{split} {label_pass.images.root} holds no masks to score against; shard it with data.masks,"
            f" or leave its parts out of evaluate.parts={config.evaluate.parts}"
        )
    if num_truth < num_samples:
        log.warning("%d of the %d images of shards.%s have a mask and are scored", num_truth, num_samples, split)


def _score(split: str, tally: Tally, label_pass: LabelPass, config: Config) -> tuple[Result, dict[str, Tensor]]:
    """mIoU in percent, and the confusion matrices behind them by the table's column."""
    parts = config.evaluate.parts
    scores: Result = {}
    if split == "val":
        presets = config.evaluate.crf_presets
        confusions = {"val": tally.mask_CC, "val_no_crf": tally.argmax_CC}
        confusions |= {f"val_{preset}": each_CC for preset, each_CC in zip(presets, tally.other_PCC, strict=True)}
        scores = {column.replace("val", "val_miou"): percent(mean_iou(each)) for column, each in confusions.items()}
        return scores, confusions
    confusions = {}
    if "seed" in parts:
        thresholds, sweep_TCC = label_pass.settings.thresholds, tally.sweep_TCC
        best, miou = best_threshold(sweep_TCC, thresholds=thresholds)
        curve = [[each, percent(mean_iou(one))] for each, one in zip(thresholds, sweep_TCC, strict=True)]
        scores |= {"seed_miou": percent(miou), "seed_threshold": best, "seed_curve": curve}
        confusions["seed"] = tally.sweep_TCC[thresholds.index(best)]
    if "mask" in parts:
        scores["mask_miou"] = percent(mean_iou(tally.mask_CC))
        confusions["mask"] = tally.mask_CC
    return scores, confusions


def _per_class(names: tuple[str, ...], tables: dict[str, Tensor]) -> dict[str, Result]:
    """IoU in percent by class and column; None where a class does not occur in the ground truth (nor in the mean)."""
    columns = {}
    for column, confusion_CC in tables.items():
        iou_C = torch.where(confusion_CC.sum(1) > 0, iou_per_class(confusion_CC), torch.nan)
        columns[column] = [percent(float(value)) for value in iou_C]
    return {name: {column: values[row] for column, values in columns.items()} for row, name in enumerate(names)}


def _show(per_class: dict[str, Result], tables: dict[str, Tensor]) -> None:
    log.info("%-16s%s", "IoU, %", "".join(f"{column:>12}" for column in tables))
    for name, row in per_class.items():
        cells = "".join(f"{'-' if value is None else format(value, '.1f'):>12}" for value in row.values())
        log.info("%-16s%s", name[:15], cells)


if __name__ == "__main__":
    main(__doc__, work)
