"""Label an image set with the run's checkpoint: `python -m jobs.pseudo_label CONF label.split=train`.

CAM, then dense CRF on the classes of each image, as label shards in RUN/labels/SPLIT (with label.png=true palette PNGs in
RUN/labels/SPLIT_png as well). Killed and started again it labels what is missing, to the same bytes.
"""

import logging

from dfa import build
from dfa.config import Config
from dfa.core.metrics import best_threshold, mean_iou
from dfa.label import factory
from dfa.label.output import export_pngs
from dfa.label.scoring import Tally
from dfa.train.loop import start_ray
from jobs import Result, main, percent

log = logging.getLogger("jobs.pseudo_label")


def work(config: Config) -> Result:
    """Label the shards of label.split."""
    label_pass = build.seed_pass(config, config.label.split, with_crf=True, limit=0)
    plan = build.factory_plan(config, [label_pass])
    start_ray()
    done = factory.run(plan)[label_pass.name]
    report, tally, root = done.report, done.report.tally, label_pass.output
    result: Result = {
        "job": "pseudo_label",
        "labels": root,
        "checkpoint": str(build.checkpoint(config)),
        "num_images": report.num_samples,
        "num_rejects": len(report.rejects),
        "labelled_now": done.images_now,
        "seconds": round(done.seconds, 2),
        "images_per_s": round(done.images_now / done.seconds, 2) if done.seconds else None,
        **_shares(tally, label_pass.index.class_names),
    }
    if config.label.png:
        result["png_folder"] = f"{root}_png"
        log.info("%d palette PNGs in %s", export_pngs(root, result["png_folder"]), result["png_folder"])
    return result | _quality(tally, label_pass.settings.thresholds)


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
    threshold, seed = best_threshold(tally.sweep_TCC, thresholds=thresholds)
    return {
        "mask_miou": percent(mean_iou(tally.mask_CC)),
        "seed_miou": percent(seed),
        "seed_threshold": threshold,
    }


if __name__ == "__main__":
    main(__doc__, work)
