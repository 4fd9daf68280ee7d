"""Exact VOC mIoU of a run: `python -m jobs.evaluate CONF evaluate.parts=[seed,mask,val]`.

seed: CAM on the training shards, best background threshold of a sweep. mask: CAM and dense CRF there. val: the model on
the validation shards, several scales and mirrored, with and without CRF. What pseudo_label or an earlier run has labelled
is not done again.
"""

import json
import logging

import torch
from torch import Tensor

from dfa import build
from dfa.config import Config
from dfa.core.metrics import best_threshold, iou_per_class, mean_iou
from dfa.data import storage
from dfa.label import factory
from dfa.label.factory import LabelPass
from dfa.label.scoring import Tally
from dfa.train.loop import start_ray
from jobs import Result, main, percent

log = logging.getLogger("jobs.evaluate")
PARTS = ("seed", "mask", "val")
RESULT_NAME = "evaluate.json"


def work(config: Config) -> Result:
    """Label what is missing, score, and keep the result in RUN/evaluate.json."""
    passes = _passes(config)
    plan = build.factory_plan(config, tuple(passes.values()))
    start_ray()
    done = factory.run(plan)
    result: Result = {"job": "evaluate", "run": config.run, "checkpoint": build.checkpoint(config)}
    tables: dict[str, Tensor] = {}
    for split, label_pass in passes.items():
        tally = done[label_pass.name].report.tally
        scores, confusions = _score(split, tally, label_pass, config.evaluate.parts)
        result |= scores | {f"{split}_images": tally.num_truth}
        tables |= confusions
    result["seconds"] = round(sum(done[each.name].seconds for each in passes.values()), 2)
    result["per_class"] = _per_class(("background", *build.class_set(config).names), tables)
    _show(result["per_class"], tables)
    address = storage.join(config.run, RESULT_NAME)
    data = (json.dumps(result, indent=1) + "\n").encode()
    storage.write_atomic(address, lambda file: file.write(data))
    return result


def _passes(config: Config) -> dict[str, LabelPass]:
    """The passes that the parts need: CAM once for seed and mask."""
    parts, limit = config.evaluate.parts, config.evaluate.limit
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"evaluate.parts is {parts}, allowed are one or more of {list(PARTS)}")
    passes: dict[str, LabelPass] = {}
    if {"seed", "mask"} & set(parts):
        passes["train"] = build.seed_pass(config, "train", with_crf="mask" in parts, limit=limit)
    if "val" in parts:
        passes["val"] = build.model_pass(config, "val", limit=limit)
    for split, label_pass in passes.items():
        _check_truth(label_pass, config, split)
    return passes


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


def _score(split: str, tally: Tally, label_pass: LabelPass, parts: list[str]) -> tuple[Result, dict[str, Tensor]]:
    """mIoU in percent, and the confusion matrices behind them by the table's column."""
    if split == "val":
        with_crf, without = mean_iou(tally.mask_CC), mean_iou(tally.argmax_CC)
        scores = {"val_miou": percent(with_crf), "val_miou_no_crf": percent(without)}
        return scores, {"val": tally.mask_CC, "val_no_crf": tally.argmax_CC}
    scores, confusions = {}, {}
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
