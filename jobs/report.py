"""Write the page of a run: `python -m jobs.report CONF key=value ...`. Reads what training and evaluation left."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dfa import build
from dfa.config import Config
from dfa.data import storage
from dfa.data.shards import RawSample, ShardIndex, read_shard
from dfa.data.transforms import decode_mask, decode_rgb
from dfa.label.crf import crf_labels
from dfa.model.segmenter import Segmenter
from dfa.report import figures
from dfa.report.page import Picture, Report, Table, write_page
from dfa.train.record import read_metrics
from jobs import Result, main

log = logging.getLogger("jobs.report")
_PICTURES = 6
_SHEET_ROWS = 5
_LOSSES = ("loss", "segmentation", "alignment", "rectification")
_SCORES = {
    "val_miou": ("model on held-out images", "mIoU, several scales, flip and CRF"),
    "mask_miou": ("pseudo-masks", "mIoU on the training images, CAM and CRF"),
    "seed_miou": ("CAM seeds", "mIoU on the training images, best threshold"),
    "second_stage_miou": ("second student", "the same, trained from scratch on the first one's CAM + CRF labels"),
    "supervised_miou": ("trained on ground truth", "mIoU on held-out images: the bound, not a result"),
}
_EXTRA_SCORES = ("second_stage_miou", "supervised_miou")


def work(config: Config, extra: dict[str, Any] | None = None) -> Result:
    """Write RUN/report.html.

    extra: further scores and provenance that the caller measured (keys `second_stage_miou`, `supervised_miou`,
    `seconds`, `peak_gb`, `command`).
    """
    extra = extra or {}
    scores = _read(storage.join(config.run, "evaluate.json")) | {k: v for k, v in extra.items() if k in _EXTRA_SCORES}
    segmenter = build.trained_segmenter(config, build.device(config), config.label.checkpoint)
    names, pictures, sheet = build.class_set(config).names, [], []
    for split, title in (("val", "held-out"), ("train", "training")):
        if getattr(config.shards, split):
            examples = _examples(segmenter, config, build.index(config, split))
            pictures += [_picture(f"{title} {key}", example, names) for key, example in examples.items()]
            sheet += list(examples.values())
    examples_png = figures.panel_sheet(sheet[:_SHEET_ROWS], names)
    storage.write_atomic(storage.join(config.run, "examples.png"), lambda file: file.write(examples_png))
    report = Report(
        title=f"{config.name}: image-level labels to masks",
        scores={name: scores[key] for key, (name, _) in _SCORES.items() if scores.get(key) is not None},
        notes=dict(_SCORES.values()),
        tables=_tables(scores),
        figures=_curves(config.run, scores),
        pictures=tuple(pictures),
        provenance=_provenance(config, extra),
        summary="Only image-level labels supervise. Each row shows an image, its exact mask (used for scoring alone), "
        "the class activation map, the pseudo-label made from it, and what the trained model predicts.",
    )
    page = write_page(report, storage.join(config.run, "report.html"))
    return {"job": "report", "report": page, "pictures": len(pictures)}


def _read(address: str) -> dict[str, Any]:
    return storage.read_json(address) if storage.exists(address) else {}


def _examples(segmenter: Segmenter, config: Config, index: ShardIndex) -> dict[str, figures.Example]:
    raws = (raw for shard in index.shards for raw in read_shard(index.path(shard.name)))
    chosen = itertools.islice(raws, _PICTURES)
    return {raw.key: _example(segmenter, config, raw, len(index.class_names)) for raw in chosen}


def _picture(name: str, example: figures.Example, names: Sequence[str]) -> Picture:
    return Picture(name, figures.sample_panels(example), figures.present_legend(example, names))


def _example(segmenter: Segmenter, config: Config, raw: RawSample, num_classes: int) -> figures.Example:
    evaluate, limit, seen = config.evaluate, config.data.max_pixels, build.views(config)
    image_HW3 = decode_rgb(raw.image, max_pixels=limit)
    image_B3HW = torch.from_numpy(image_HW3.copy()).permute(2, 0, 1)[None].to(segmenter.clip.device)
    labels_BC = torch.zeros(1, num_classes, dtype=torch.bool, device=segmenter.clip.device)
    labels_BC[0, [label - 1 for label in raw.labels]] = True
    (seeds,) = segmenter.pixel_seeds_together(
        [image_B3HW], labels_BC, scales=evaluate.cam_scales, with_model=False, **seen
    )
    cam_KHW = seeds.score_BMHW[0].cpu().numpy()
    background_HW = np.full(cam_KHW.shape[1:], config.cam.threshold, np.float32)
    classes = [0, *(int(each) for each in seeds.class_BM[0] if each > 0)]
    settings = build.crf_settings(config)
    pseudo_HW = crf_labels(image_HW3, np.stack([background_HW, *cam_KHW])[: len(classes)], classes, settings)
    (logits_BCHW,) = segmenter.logits_together([image_B3HW], scales=evaluate.scales, **seen)
    probability_KHW = logits_BCHW[0].softmax(0).cpu().numpy()
    likely = [
        0,
        *(k for k in range(1, len(probability_KHW)) if probability_KHW[k].max() > config.label.min_probability),
    ]
    prediction_HW = crf_labels(image_HW3, probability_KHW[likely], likely, settings)
    return figures.Example(
        image_HW3,
        truth_HW=None if raw.mask is None else decode_mask(raw.mask, max_pixels=limit),
        cam_HW=cam_KHW.max(0) if len(cam_KHW) else np.zeros_like(background_HW),
        pseudo_HW=pseudo_HW,
        prediction_HW=prediction_HW,
    )


def _tables(scores: dict[str, Any]) -> tuple[Table, ...]:
    per_class: dict[str, dict[str, float | None]] = scores.get("per_class") or {}
    if not per_class:
        return ()
    columns = list(next(iter(per_class.values())))
    rows = tuple((name, *(row[column] for column in columns)) for name, row in per_class.items())
    names = ("class", *(column.replace("_no_crf", " without CRF") for column in columns))
    return (Table("IoU of each class, %", names, rows, bar_column=1 + columns.index("val") if "val" in columns else 1),)


def _curves(run: str, scores: dict[str, Any]) -> tuple[figures.Panel, ...]:
    lines, panels = read_metrics(run), []
    steps = [line for line in lines if line["kind"] == "train"]
    parts = sorted({key for line in steps for key in line if key.startswith(_LOSSES)})
    losses = {part: [(line["step"], line[part]) for line in steps if line.get(part) is not None] for part in parts}
    if steps:
        png = figures.learning_curves(losses, title="Losses", y_label="loss", log=True)
        panels.append(figures.Panel("The parts of the loss over the steps.", png))
    checks = [(line["step"], 100 * line["miou"]) for line in lines if line["kind"] == "val" and line.get("miou")]
    if checks:
        png = figures.learning_curves({"validation": checks}, title="Validation", y_label="mIoU, %")
        panels.append(figures.Panel("The model alone on held-out images while it trains: one scale, no CRF.", png))
    if scores.get("seed_curve"):
        png = figures.sweep_curve({"CAM": scores["seed_curve"]}, title="CAM seeds")
        panels.append(figures.Panel("CAM seeds over the background threshold.", png))
    return tuple(panels)


def _provenance(config: Config, extra: dict[str, Any]) -> dict[str, str]:
    facts = {
        "command": str(extra.get("command", f"python -m jobs.report {config.name}")),
        "training": f"{config.train.steps} steps of {config.train.batch_size} images, {config.train.workers} worker(s), "
        f"{config.train.precision}, seed {config.train.seed}",
        "encoder": f"{config.clip.model}, {config.clip.checkpoint}",
    }
    if "seconds" in extra:
        facts["time and memory"] = f"{extra['seconds']:.0f} s, {extra['peak_gb']:.1f} GB at most"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in build.versions().items())
    facts["processor"] = (
        f"{torch.get_num_threads()} threads" if not config.train.use_gpu else torch.cuda.get_device_name()
    )
    return facts


if __name__ == "__main__":
    main(__doc__, work)
