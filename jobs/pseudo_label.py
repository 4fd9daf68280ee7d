"""Label an image set with the run's checkpoint: `python -m jobs.pseudo_label CONF label.split=train`.

CAM (or with label.unary=model the model's logits), then dense CRF on the classes of each image, as label shards in
RUN/labels/SPLIT (SPLIT_model), or label.output. Killed and started again it labels what is missing, to the same bytes. Beside them:
SPLIT_quality/quality.html and .json unless label.worst=0; SPLIT_png with label.png=true (VOC's form); SPLIT_coco.json with
label.coco=true (instances with run-length masks).

With label.follow=true it runs beside a training job: whenever label.checkpoint names a newer checkpoint it labels anew,
into RUN/labels/SPLIT_follow/step-N, and then points RUN/labels/SPLIT_follow/current.json there. A training with
shards.labels=RUN/labels/SPLIT_follow reads what is current. It ends with the last step of the training, or when stopped.
"""

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from dfa import build
from dfa.config import Config
from dfa.core.metrics import best_threshold, mean_iou
from dfa.data import storage
from dfa.data.offline import CURRENT_NAME, GENERATIONS_KIND
from dfa.label import factory
from dfa.label.export import OriginalIds, export_coco, export_pngs, read_original_ids
from dfa.label.factory import PassResult
from dfa.label.scoring import Tally
from dfa.label.work import NO_LABEL
from dfa.report.quality import write_quality
from dfa.train.checkpoint import FOLDER, find_checkpoint, list_checkpoints, read_info
from dfa.train.loop import start_ray
from jobs import Result, main, percent

log = logging.getLogger("jobs.pseudo_label")
_KEPT_GENERATIONS = 2  # one may still be read while the next becomes current


def work(config: Config) -> Result:
    """Label the shards of label.split, once or again and again."""
    if config.label.follow:
        return follow(config)
    return _label(config)


def _label(config: Config) -> Result:
    label_pass = build.label_pass(config, config.label.split, output=config.label.output)
    original = _original_ids(config, label_pass.images.class_names) if config.label.coco else None
    plan = build.factory_plan(config, [label_pass])
    start_ray()
    done = factory.run(plan)[label_pass.name]
    result: Result = {
        "job": "pseudo_label",
        "labels": label_pass.output,
        "checkpoint": str(build.checkpoint(config)),
        **_counts(done),
        **_shares(done.report.tally, label_pass.images.class_names),
        **_quality(done.report.tally, label_pass.settings.thresholds),
        **_exports(config, label_pass.output, original),
    }
    _check_rejects(config, done)
    return result


def _counts(done: PassResult) -> Result:
    return {
        "num_images": done.report.num_samples,
        "num_rejects": len(done.report.rejects),
        "labelled_now": done.images_now,
        "seconds": round(done.seconds, 2),
        "images_per_s": round(done.images_now / done.seconds, 2) if done.seconds else None,
        "work_s": {kind: round(seconds, 2) for kind, seconds in done.work_s.items()},
    }


def _shares(tally: Tally, class_names: tuple[str, ...]) -> Result:
    """Shares of all labelled pixels, in [0, 1]."""
    total = max(1, int(tally.pixels_C.sum()) + tally.void_pixels)
    shares = [round(int(pixels) / total, 5) for pixels in tally.pixels_C]
    return {
        "void_share": round(tally.void_pixels / total, 5),
        "pixel_share": dict(zip(("background", *class_names), shares, strict=True)),
    }


def _quality(tally: Tally, thresholds: tuple[float, ...]) -> Result:
    """Scores in percent where the image shards hold masks; training never sees those."""
    if not tally.num_truth:
        return {}
    scores: Result = {"mask_miou": percent(mean_iou(tally.mask_CC)), "argmax_miou": percent(mean_iou(tally.argmax_CC))}
    if thresholds:
        threshold, seed = best_threshold(tally.sweep_TCC, thresholds=thresholds)
        scores |= {"seed_miou": percent(seed), "seed_threshold": threshold}
    return scores


def _exports(config: Config, root: str, original: OriginalIds | None) -> Result:
    """What other tools and people read, beside the label shards."""
    label, made = config.label, Result()
    if label.png:
        made["png_folder"] = storage.beside(root, "_png")
        log.info("%d palette PNGs in %s", export_pngs(root, made["png_folder"]), made["png_folder"])
    if label.coco:
        made["coco"] = storage.beside(root, "_coco.json")
        ids = {"categories": original.categories, "images": original.images} if original else {}
        log.info("%d annotations in %s", export_coco(root, made["coco"], **ids), made["coco"])
    if label.worst:
        title = f"{config.name}: labels of {label.split}"
        index = build.index(config, label.split)
        made["quality"] = write_quality(root, index, storage.beside(root, "_quality"), count=label.worst, title=title)
        log.info("quality without ground truth, and the least confident samples: %s", made["quality"])
    return made


def _original_ids(config: Config, class_names: tuple[str, ...]) -> OriginalIds | None:
    """COCO's own numbers, where the images come from COCO."""
    if config.data.source != "coco" or not config.data.annotations:
        return None
    return read_original_ids(config.data.annotations, class_names)


def _check_rejects(config: Config, done: PassResult) -> None:
    """Too many images without a label fail the job, after all else is written."""
    rejects = [each for each in done.report.rejects if not each.reason.startswith(NO_LABEL)]
    share = len(rejects) / max(1, len(rejects) + done.report.num_samples)
    if share > config.data.max_reject_share:
        shown = "; ".join(f"{each.key}: {each.reason}" for each in rejects[:3])
        raise ValueError(
            f"{len(rejects)} images have no label ({share:.2%}), allowed are data.max_reject_share="
            f"{config.data.max_reject_share:.2%}; the labels of the others are in {done.report.root}: {shown}"
        )


def follow(config: Config) -> Result:
    """Label with one checkpoint after the other until the training of the configuration has ended."""
    root = config.label.output or f"{config.run}/labels/{config.label.split}_follow"
    snapshots, done = Path(config.run) / "follow", _current(root)
    results: list[Result] = []
    log.info("following the checkpoints of %s into %s", config.run, root)
    while True:
        ended = _training_has_ended(config)
        folder = _wanted_checkpoint(config)
        if folder is not None and folder.name != done:
            snapshot = _keep(folder, snapshots / FOLDER)
            results.append(_generation(config, root, snapshots, snapshot.name))
            _point(root, snapshot.name)
            _forget(root, snapshots / FOLDER)
            done = snapshot.name
            log.info("labels of %s are current: %s", done, results[-1])
        elif ended:
            break
        time.sleep(config.label.follow_interval_s)
    return {"job": "pseudo_label", "labels": root, "current": done, "generations": results}


def _wanted_checkpoint(config: Config) -> Path | None:
    return Path(find_checkpoint(config.run, config.label.checkpoint)) if list_checkpoints(config.run) else None


def _training_has_ended(config: Config) -> bool:
    run = config.run
    return bool(list_checkpoints(run)) and read_info(find_checkpoint(run, "latest")).step >= config.train.steps


def _keep(folder: Path, snapshots: Path) -> Path:
    """A copy of a checkpoint: the training may delete its own while it is labelled with."""
    target = snapshots / folder.name
    if not target.exists():
        partial = snapshots / f".{folder.name}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        partial.rename(target)
    return target


def _generation(config: Config, root: str, snapshots: Path, name: str) -> Result:
    """Label with one checkpoint; continued where a killed job left it."""
    label = replace(config.label, checkpoint=name, output=storage.join(root, name), follow=False)
    result = _label(replace(config, run=str(snapshots), label=label))
    return {"step": read_info(snapshots / FOLDER / name).step} | {
        key: result.get(key) for key in ("labels", "labelled_now", "seconds", "mask_miou", "quality")
    }


def _point(root: str, name: str) -> None:
    storage.write_json(storage.join(root, CURRENT_NAME), {"kind": GENERATIONS_KIND, "folder": name})


def _current(root: str) -> str | None:
    address = storage.join(root, CURRENT_NAME)
    return storage.read_json(address).get("folder") if storage.exists(address) else None


def _forget(root: str, snapshots: Path) -> None:
    """Older generations, with what was exported beside them, and the checkpoints that they were made with."""
    names = sorted(path.name for path in snapshots.iterdir() if not path.name.startswith("."))
    for name in names[:-_KEPT_GENERATIONS]:
        for entry in storage.list_names(root):
            if entry == name or entry.startswith(f"{name}_"):
                storage.remove_tree(storage.join(root, entry))
        shutil.rmtree(snapshots / name)


if __name__ == "__main__":
    main(__doc__, work)
