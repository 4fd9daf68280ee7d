"""A trained model as one object: images in, masks and scores out."""

import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dfa.core.void import label_dtype
from dfa.data.classes import nearest, voc_palette
from dfa.data.transforms import LabelArray, UInt8Array, decode_rgb, header, is_turned, rgb_pixels
from dfa.label.crf import PRESETS, CrfSettings, dense_crf
from dfa.label.scoring import FloatArray, model_scores
from dfa.model.inference import NATIVE, InputSize
from dfa.model.segmenter import Segmenter

logger = logging.getLogger(__name__)

ImageLike = str | os.PathLike[str] | Image.Image | UInt8Array
_BATCH_PIXELS = 1_000_000  # of images that share a forward pass: with 21 classes 84 MB of logits; fewer of more


class Prediction(NamedTuple):
    """mask: (H, W) uint8 (uint16 of more than 254 classes), 0 background, 1..C. scores: (C + 1, H, W) float32,
    probabilities that sum to 1 over classes; the mask is their argmax, the lower class of equals."""

    mask: LabelArray
    scores: FloatArray


class Predictor:
    """A segmenter with what its callers need not know: decoding, batches, softmax, CRF.

    Attributes:
        class_names: the C foreground classes; `class_names[c - 1]` is mask value c.
        palette: PASCAL VOC's colours of all 8-bit mask values, uint8 (256, 3).
    """

    def __init__(
        self,
        segmenter: Segmenter,
        class_names: Sequence[str],
        *,
        scales: Sequence[float],
        flip: bool,
        min_probability: float,
        max_pixels: int,
        input_size: InputSize = NATIVE,
    ) -> None:
        """
        Args:
            scales, flip: what `predict` uses where it is told nothing else (METHOD 1.22).
            input_size: the size at which an image is seen at scale 1.
            min_probability: classes that exceed this nowhere in an image take no part in its CRF.
            max_pixels: largest width x height accepted.
        """
        self.class_names = tuple(class_names)
        self.palette = voc_palette()
        self.scales, self.flip = _scales(scales), flip
        self.min_probability, self.max_pixels = min_probability, max_pixels
        self._segmenter, self._input_size = segmenter, input_size

    def predict(
        self,
        image: ImageLike,
        *,
        crf: CrfSettings | str | None = None,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
    ) -> Prediction:
        """Segment one image of any size.

        Args:
            image: path of a JPEG or PNG, a PIL image, or RGB pixels (H, W, 3) uint8. Pixels are taken as they are
                stored, and the mask is of these: an EXIF orientation is not applied, a warning tells of one. To have it
                applied, hand over `PIL.ImageOps.exif_transpose(PIL.Image.open(path))`.
            crf: refine with a dense CRF: the name of a preset ("deeplab", "smooth", "wide"), or a
                `dfa.label.crf.CrfSettings`. The scores are then the CRF's, with 0 for classes that took no part.
            scales, flip: factors of the size at which it is seen to average over, and whether mirrored copies join; None: what the
                predictor was made with.

        Returns:
            Mask and scores at the image's own size.

        Raises:
            ValueError: neither of the three kinds, a file that does not decode, too many pixels, an unknown preset,
                scales that are no positive numbers.
            FileNotFoundError: no such file.
        """
        return self.predict_batch([image], crf=crf, scales=scales, flip=flip)[0]

    def predict_batch(
        self,
        images: Sequence[ImageLike],
        *,
        crf: CrfSettings | str | None = None,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
    ) -> list[Prediction]:
        """Segment several images, of any sizes; those of one size share forward passes. Arguments as in `predict`."""
        if isinstance(images, str | os.PathLike | Image.Image):
            raise ValueError(
                f"predict_batch takes a list of images, not one {type(images).__name__}; predict takes one"
            )
        settings, factors = _crf_settings(crf), self.scales if scales is None else _scales(scales)
        opened = [self._pixels(image) for image in images]
        pixels, num_turned = [image for image, _ in opened], sum(turned for _, turned in opened)
        if num_turned:
            logger.warning(
                "%d of %d images carry an EXIF orientation, which is not applied; PIL.ImageOps.exif_transpose turns them",
                num_turned,
                len(pixels),
            )
        found: dict[int, Prediction] = {}
        limit = _BATCH_PIXELS * 21 // max(21, 1 + len(self.class_names))
        for places in _batches([(each.shape[0], each.shape[1]) for each in pixels], max_pixels=limit):
            batch_BHW3 = torch.from_numpy(np.stack([pixels[place] for place in places]))
            (logits_BCHW,) = self._segmenter.logits_together(
                [batch_BHW3.permute(0, 3, 1, 2).to(self._segmenter.clip.device)],
                scales=factors,
                flip=self.flip if flip is None else flip,
                input_size=self._input_size,
            )
            for place, logits_CHW in zip(places, logits_BCHW, strict=True):
                found[place] = self._prediction(pixels[place], logits_CHW, settings)
        return [found[place] for place in range(len(pixels))]

    def _pixels(self, image: ImageLike) -> tuple[UInt8Array, bool]:
        """Pixels, and whether viewers would turn them."""
        if isinstance(image, Image.Image):
            return self._check(rgb_pixels(image, max_pixels=self.max_pixels)), is_turned(image)
        if isinstance(image, str | os.PathLike):
            with open(image, "rb") as file:
                data = file.read()
            try:
                turned = header(io.BytesIO(data), max_pixels=self.max_pixels)[2]
                return decode_rgb(data, max_pixels=self.max_pixels), turned
            except ValueError as error:
                raise ValueError(f"{os.fspath(image)}: {error}") from error
        return self._check(image), False

    def _check(self, image_HW3: UInt8Array) -> UInt8Array:
        """Pixels that came as they are."""
        if not isinstance(image_HW3, np.ndarray):
            raise ValueError(
                f"image is a {type(image_HW3).__name__}; allowed are a path, a PIL image and a uint8 (H, W, 3) array"
            )
        shape = image_HW3.shape
        if image_HW3.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"image is {image_HW3.dtype} {shape}; an array must be uint8 (H, W, 3), RGB")
        if shape[0] * shape[1] > self.max_pixels:
            raise ValueError(
                f"image has {shape[1]} x {shape[0]} = {shape[0] * shape[1]} pixels, more than {self.max_pixels}"
            )
        return image_HW3

    def _prediction(self, image_HW3: UInt8Array, logits_CHW: torch.Tensor, crf: CrfSettings | None) -> Prediction:
        if crf is None:
            scores_CHW = logits_CHW.float().softmax(0).cpu().numpy()
        else:
            chosen = model_scores(logits_CHW[None], min_probability=self.min_probability)[0]
            scores_CHW = np.zeros(tuple(logits_CHW.shape), np.float32)
            scores_CHW[list(chosen.class_ids)] = dense_crf(image_HW3, chosen.score_KHW, crf)
        return Prediction(scores_CHW.argmax(0).astype(label_dtype(len(self.class_names))), scores_CHW)


def _crf_settings(crf: CrfSettings | str | None) -> CrfSettings | None:
    if crf is None or isinstance(crf, CrfSettings):
        return crf
    if isinstance(crf, str) and crf in PRESETS:
        return PRESETS[crf]
    near = f"; did you mean {nearest(crf, PRESETS)!r}?" if isinstance(crf, str) else ""
    raise ValueError(f"crf is {crf!r}; allowed are None, {', '.join(map(repr, PRESETS))} and a CrfSettings{near}")


def _scales(scales: Sequence[float]) -> tuple[float, ...]:
    try:
        factors = tuple(float(each) for each in scales)
    except (TypeError, ValueError):
        factors = ()
    if not factors or not all(0 < each < math.inf for each in factors):
        raise ValueError(
            f"scales is {scales!r}; allowed is a list of factors above 0, such as (1.0,) or (1.0, 1.2, 1.5)"
        )
    return factors


def _batches(sizes: Sequence[tuple[int, int]], *, max_pixels: int) -> Iterator[list[int]]:
    """Places of images that share a forward pass: of one size, and within the limit of pixels."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, size in enumerate(sizes):
        by_size.setdefault(size, []).append(place)
    for (height, width), places in by_size.items():
        step = max(1, max_pixels // (height * width))
        yield from (places[first : first + step] for first in range(0, len(places), step))
