"""Weakly supervised semantic segmentation as a distributed system: image-level labels in, models and masks out."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from dfa.model.predictor import Predictor

__all__ = ["load"]


def load(
    checkpoint: str | os.PathLike[str],
    *,
    device: "str | torch.device" = "cpu",
    scales: Sequence[float] = (1.0, 1.2, 1.5),
    flip: bool = True,
    long_side: int | None = None,
    clip_checkpoint: str | os.PathLike[str] | None = None,
    clip_model: str | os.PathLike[str] | None = None,
    weights: Literal["auto", "trained", "average"] = "auto",
) -> "Predictor":
    """Load a trained model, ready to segment images.

    >>> model = dfa.load("runs/demo")                                   # or runs/demo/checkpoints/step-00000240
    >>> mask, scores = model.predict("photo.jpg")                       # (H, W) uint8 and (C + 1, H, W) float32
    >>> [model.class_names[value - 1] for value in numpy.unique(mask) if value]
    ['kite', 'wheel']
    >>> mask, scores = model.predict("photo.jpg", crf="deeplab")       # borders along edges
    >>> picture = PIL.Image.fromarray(mask); picture.putpalette(model.palette.tobytes()); picture.save("photo.png")

    Neither configuration nor class list is needed: the checkpoint describes its model. Its files are verified by their
    hashes, and nothing in them is unpickled.

    Args:
        checkpoint: folder of a checkpoint, or of a run, whose best one is taken (the newest where none was validated);
            a path or an address ("s3://bucket/run").
        device: where to compute, e.g. "cuda".
        scales: factors of an image's size to average over (METHOD 1.22); (1.0,) is three to five times as fast.
        flip: average with the mirrored image.
        long_side: see each image with so many pixels along its longer side at scale 1, as trainings with crop.long_side do.
            None: at its own. Masks always have that.
        clip_checkpoint: the frozen CLIP's weight file, where it is not found under the name that training used.
        clip_model: its model JSON, likewise.
        weights: the trained ones, their moving average, or (auto) the average where training kept one.

    Returns:
        A `dfa.model.predictor.Predictor`: `predict(image)`, `predict_batch(images)`, `class_names`, `palette`.

    Raises:
        ValueError: no checkpoint there, damaged files, CLIP weights that are absent or do not fit, a model of another
            version of dfa, a long_side below one pixel, or a device that is not there.
    """
    from dfa.build.predicting import load as load_predictor  # here, so that `import dfa.core` needs torch alone

    return load_predictor(
        checkpoint,
        device=device,
        scales=scales,
        flip=flip,
        long_side=long_side,
        clip_checkpoint=clip_checkpoint,
        clip_model=clip_model,
        weights=weights,
    )
