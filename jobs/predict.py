"""Masks of a trained model for any images: `python -m jobs.predict CONF run=RUN predict.input=FOLDER`.

FOLDER holds images, in any sub-folders, or shards. Label shards go to predict.output (RUN/predict/NAME of the input)
and palette PNGs beside them (OUTPUT_png). Classes come from the checkpoint that label.checkpoint names. Killed and
started again it predicts what is missing, to the same bytes.
"""

import logging

from dfa import build
from dfa.config import Config
from dfa.data import storage
from dfa.label import factory
from dfa.label.export import export_pngs, read_label_index
from dfa.label.output import LabelReject
from dfa.train.loop import start_ray
from jobs import Result, main

log = logging.getLogger("jobs.predict")
_REJECTS_SHOWN = 5


def work(config: Config) -> Result:
    """Predict the images of predict.input."""
    label_pass = build.predict_pass(config)
    plan = build.factory_plan(config, [label_pass])
    start_ray()
    done = factory.run(plan)[label_pass.name]
    rejects, root = done.report.rejects, label_pass.output
    return {
        "job": "predict",
        "output": root,
        "png_folder": _pngs(root) if config.predict.png else None,
        "num_images": done.report.num_samples,
        "num_rejects": len(rejects),
        "rejects": _shown(rejects),
        "predicted_now": done.images_now,
        "seconds": round(done.seconds, 2),
        "images_per_s": round(done.images_now / done.seconds, 2) if done.seconds else None,
        "pixel_share": _pixel_share(root),
    }


def _pngs(root: str) -> str:
    folder = storage.beside(root, "_png")
    log.info("%d palette PNGs in %s", export_pngs(root, folder), folder)
    return folder


def _shown(rejects: tuple[LabelReject, ...]) -> list[str]:
    return [f"{reject.key}: {reject.reason}" for reject in rejects[:_REJECTS_SHOWN]]


def _pixel_share(root: str) -> dict[str, float]:
    """Shares of all pixels, in [0, 1], by class name."""
    index = read_label_index(root)
    total = max(1, sum(index["pixels"]) + index["void_pixels"])
    names = ("background", *index["class_names"])
    return {name: round(pixels / total, 5) for name, pixels in zip(names, index["pixels"], strict=True)}


if __name__ == "__main__":
    main(__doc__, work)
