"""Label an image set with the run's checkpoint: `python -m jobs.pseudo_label CONF label.split=train`.

CAM (or with label.unary=model the model's logits), then dense CRF on the classes of each image, as label shards in
RUN/labels/SPLIT (SPLIT_model), or label.output. Killed and started again it labels what is missing, to the same bytes. Beside them:
SPLIT_quality/quality.html and .json unless label.worst=0; SPLIT_png with label.png=true (VOC's form); SPLIT_coco.json with
label.coco=true (instances with run-length masks).

With label.follow=true it runs beside a training job: whenever label.checkpoint names a newer checkpoint it labels anew,
into RUN/labels/SPLIT_follow/step-N-HASH, and then points RUN/labels/SPLIT_follow/current.json there. A training with
shards.labels=RUN/labels/SPLIT_follow, started after it, reads what is current. It ends with the last step of the training
that RUN/run.json describes, or when stopped.
"""

import logging
from dataclasses import replace

from dfa import build
from dfa.config import Config
from dfa.core.metrics import best_threshold, mean_iou
from dfa.data import storage
from dfa.data.offline import resolve
from dfa.label import factory
from dfa.label.export import (
    OriginalIds,
    check_file,
    check_folder,
    check_listed,
    export_coco,
    export_pngs,
    read_original_ids,
)
from dfa.label.factory import PassResult
from dfa.label.scoring import Tally
from dfa.label.work import NO_LABEL, Pool
from dfa.report.quality import write_quality
from dfa.train.checkpoint import read_info
from dfa.train.follow import follow
from dfa.train.loop import start_ray
from jobs import Result, main, percent

log = logging.getLogger("jobs.pseudo_label")
_PNG, _COCO, _QUALITY = "_png", "_coco.json", "_quality"  # beside the folder of labels


def work(config: Config, pool: Pool | None = None) -> Result:
    """Label the shards of label.split, once or again and again. pool: who works; None: all that Ray has free."""
    if config.label.follow:
        return _follow(config, pool)
    return _label(config, pool)


def _label(config: Config, pool: Pool | None) -> Result:
    label_pass = build.label_pass(config, config.label.split, output=config.label.output)
    original = _original_ids(config)
    _check_exports(config, label_pass.output)
    plan, folder = build.factory_plan(config, [label_pass]), build.checkpoint(config)
    if pool is None:
        start_ray()
    done = factory.run(plan, pool)[label_pass.name]
    result: Result = {
        "job": "pseudo_label",
        "labels": label_pass.output,
        "checkpoint": str(folder),
        "step": read_info(folder).step,
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
        made["png_folder"] = storage.beside(root, _PNG)
        log.info("%d palette PNGs in %s", export_pngs(root, made["png_folder"]), made["png_folder"])
    if label.coco:
        made["coco"] = storage.beside(root, _COCO)
        ids = {"categories": original.categories, "images": original.images} if original else {}
        log.info("%d annotations in %s", export_coco(root, made["coco"], **ids), made["coco"])
    if label.worst:
        title = f"{config.name}: labels of {label.split}"
        index = build.index(config, label.split)
        made["quality"] = write_quality(
            root,
            index,
            storage.beside(root, _QUALITY),
            count=label.worst,
            title=title,
            unary={"cam": "CAM"}.get(label.unary, label.unary),
            facts=build.label_facts(config),
        )
        log.info("quality without ground truth, and doubtful samples: %s", made["quality"])
    return made


def _check_exports(config: Config, root: str) -> None:
    """What cannot be written after the labelling is found before it."""
    label = config.label
    check_folder(root)
    if label.png:
        check_folder(storage.beside(root, _PNG))
    if label.coco:
        check_file(storage.beside(root, _COCO))
    if label.worst:
        check_folder(storage.beside(root, _QUALITY))


def _original_ids(config: Config) -> OriginalIds | None:
    """COCO's own numbers of what is labelled; None where the images have none, or no COCO JSON is asked for.

    Raises:
        ValueError: COCO's images without their annotation file, or with one that does not list them.
    """
    data, label = config.data, config.label
    if not label.coco or not (data.annotations or data.source == "coco"):
        return None
    if not data.annotations:
        raise ValueError(
            "label.coco=true with data.source=coco needs data.annotations: give the instances JSON that the shards were"
            " made from, so that the exported labels have COCO's own category and image ids (or data.source=folder, to"
            " number categories 1..C and images 1..n)"
        )
    index = build.index(config, label.split)
    original = read_original_ids(data.annotations, index.class_names)
    check_listed(original, index, where=f"data.annotations {data.annotations}")
    return original


def _check_rejects(config: Config, done: PassResult) -> None:
    """Too many images without a label fail the job, after all else is written."""
    rejects = [each for each in done.report.rejects if not each.reason.startswith(NO_LABEL)]
    share = len(rejects) / max(1, len(rejects) + done.report.num_samples)
    if share > config.data.max_reject_share:
        shown = "; ".join(f"{each.key}: {each.reason}" for each in rejects[:3])
        raise ValueError(
            f"{len(rejects)} images could not be labelled ({share:.2%}), allowed are data.max_reject_share="
            f"{config.data.max_reject_share:.2%}; the labels of the others are in {done.report.root}: {shown}"
        )


def _follow(config: Config, pool: Pool | None) -> Result:
    """Label with one checkpoint after the other until the training has ended."""
    # What is wrong with these shows now, and not when the first checkpoint is there.
    build.index(config, config.label.split)
    _original_ids(config)
    plan = build.follow_plan(config)

    def label(checkpoint: str, folder: str) -> Result:
        generation = replace(config.label, checkpoint=checkpoint, output=folder, follow=False)
        result = _label(replace(config, run=plan.snapshots, label=generation), pool)
        log.info("labelled with %s: %s", checkpoint, result)
        return {key: result.get(key) for key in ("step", "labels", "labelled_now", "seconds", "mask_miou", "quality")}

    generations = follow(plan, label)
    return {"job": "pseudo_label", "labels": plan.root, "current": resolve(plan.root), "generations": generations}


if __name__ == "__main__":
    main(__doc__, work)
