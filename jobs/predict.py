"""Masks of a trained model for any images: `python -m jobs.predict CONF run=RUN predict.input=FOLDER`.

FOLDER holds images, in any sub-folders, or shards. Label shards go to predict.output (RUN/predict/NAME of the input)
and palette PNGs beside them: OUTPUT_png/trip/a.png is the mask of FOLDER/trip/a.jpg. OUTPUT/images.csv lists all images, with
the key in the label shards and, where there is no mask, the reason. Classes come from the checkpoint that label.checkpoint
names. Killed and started again it predicts what is missing, to the same bytes.
"""

import csv
import io
import logging

from dfa import build
from dfa.config import Config
from dfa.data import storage
from dfa.data.labels import strip_image_extension
from dfa.data.listing import ImageListing
from dfa.label import factory
from dfa.label.export import export_pngs
from dfa.label.finished import read_label_index
from dfa.label.images import ListedImages
from dfa.label.output import LabelReject
from dfa.label.work import Pool
from dfa.train.loop import start_ray
from jobs import Result, main

log = logging.getLogger("jobs.predict")
_IMAGES_NAME = "images.csv"
_REJECTS_SHOWN = 5


def work(config: Config, pool: Pool | None = None) -> Result:
    """Predict the images of predict.input. pool: who works; None: all that Ray has free."""
    label_pass = build.predict_pass(config)
    plan = build.factory_plan(config, [label_pass])
    if pool is None:
        start_ray()
    done = factory.run(plan, pool)[label_pass.name]
    root, listing = label_pass.output, None
    rejects, unread = [f"{reject.key}: {reject.reason}" for reject in done.report.rejects], {}
    if isinstance(label_pass.images, ListedImages):
        listing = label_pass.images.index
        unread = listing.unread
        rejects += [f"{reject.path}: {reject.reason}" for reject in listing.rejects]
        _write_table(root, listing, done.report.rejects)
    return {
        "job": "predict",
        "output": root,
        "png_folder": _pngs(root, listing) if config.predict.png else None,
        "num_images": done.report.num_samples,
        "num_rejects": len(rejects),
        "unread": dict(unread),
        "rejects": rejects[:_REJECTS_SHOWN],
        "predicted_now": done.images_now,
        "seconds": round(done.seconds, 2),
        "images_per_s": round(done.images_now / done.seconds, 2) if done.seconds else None,
        "pixel_share": _pixel_share(root),
    }


def _pngs(root: str, listing: ImageListing | None) -> str:
    folder = storage.beside(root, "_png")
    names = {key: _mask_name(path) for key, path in listing.paths().items()} if listing else None
    log.info("%d palette PNGs in %s", export_pngs(root, folder, names), folder)
    return folder


def _mask_name(path: str) -> str:
    return f"{strip_image_extension(path)}.png"


def _write_table(root: str, listing: ImageListing, rejects: tuple[LabelReject, ...]) -> None:
    """OUTPUT/images.csv: every picture of the folder, its key in the label shards, its mask in OUTPUT_png or the reason
    why there is none."""
    reasons, file = {reject.key: reject.reason for reject in rejects}, io.StringIO(newline="")
    table = csv.writer(file, lineterminator="\n")
    table.writerow(("image", "key", "mask", "reject"))
    rows = [
        (path, key, "" if key in reasons else _mask_name(path), reasons.get(key, ""))
        for key, path in listing.paths().items()
    ]
    rows += [(reject.path, "", "", reject.reason) for reject in listing.rejects]
    table.writerows(sorted(rows))
    address, data = storage.join(root, _IMAGES_NAME), file.getvalue().encode()
    if not storage.exists(address) or storage.read_bytes(address) != data:
        storage.write_atomic(address, lambda file: file.write(data))


def _pixel_share(root: str) -> dict[str, float]:
    """Shares of all pixels, in [0, 1], by class name."""
    index = read_label_index(root)
    total = max(1, sum(index["pixels"]) + index["void_pixels"])
    names = ("background", *index["class_names"])
    return {name: round(pixels / total, 5) for name, pixels in zip(names, index["pixels"], strict=True)}


if __name__ == "__main__":
    main(__doc__, work)
