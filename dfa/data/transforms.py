"""Pixels of one image: decoding with limits, the training crop, the resize for inference. Pure numpy and PIL.

One frame for everything: pixels are used as they are stored in the file. An EXIF orientation is *not* applied, because
masks, COCO's width/height and every array that a user reads with numpy live in the stored frame. Who wants pictures as viewers
show them has them stored so, by `upright`.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfa.data.randomness import stable_seed

UInt8Array = npt.NDArray[np.uint8]
#: Class indices, of the type and with the void of `dfa.core.void`: void is the largest value of the type.
LabelArray = npt.NDArray[np.uint8 | np.uint16]
BoolArray = npt.NDArray[np.bool_]

#: CLIP's mean colour: padding normalises to about zero, so that the frozen encoder sees nothing there.
CLIP_MEAN_COLOR = (123, 117, 104)

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAGIC_BYTES = 8
_EXIF_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that exchange width and height
_TURNED_QUALITY = 95
_DARKEST = 4096  # cameras of 12 bits write 16: such pictures are said to be unscaled, not taken for night
# What PIL raises on broken files, by experience and by its sources; anything else is a bug and shall surface.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def image_extension(data: bytes) -> Literal["jpg", "png"]:
    """Return the real format of encoded image bytes, whatever the file was called.

    Raises:
        ValueError: neither JPEG nor PNG.
    """
    if data.startswith(_JPEG_MAGIC):
        return "jpg"
    if data.startswith(_PNG_MAGIC):
        return "png"
    if not data:
        raise ValueError("the file is empty")
    raise ValueError(f"not a JPEG or PNG file (it starts with {data[:8]!r}); convert it to one of the two")


def _open(file: BinaryIO, *, max_pixels: int) -> Image.Image:
    """Open without decoding, so that an oversized picture is refused before its pixels take memory."""
    image_extension(file.read(_MAGIC_BYTES))
    file.seek(0)
    try:
        image = Image.open(file, formats=("JPEG", "PNG"))
    except _BROKEN as error:
        raise ValueError(f"cannot read the image header: {error}") from error
    _check_size(image, max_pixels)
    return image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"image has {width} x {height} = {width * height} pixels, more than max_pixels={max_pixels}")


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except _BROKEN as error:
        raise ValueError(f"image does not decode completely: {error}") from error
    return image


def upright(data: bytes, *, max_pixels: int) -> bytes:
    """Return a JPEG or PNG turned as its EXIF orientation says, in its own format (JPEG at quality 95), the same bytes at every call.

    One that is upright is returned as it is.

    Raises:
        ValueError: as `decode_rgb`.
    """
    image = _open(io.BytesIO(data), max_pixels=max_pixels)
    if not is_turned(image):
        return data
    turned, encoded = _load(image).transpose(_TURNS[image.getexif()[_EXIF_ORIENTATION]]), io.BytesIO()
    options = {"quality": _TURNED_QUALITY, "subsampling": 0} if image.format == "JPEG" else {}
    turned.save(encoded, format=image.format, exif=b"", **options)
    return encoded.getvalue()


def is_turned(image: Image.Image) -> bool:
    """Tell whether viewers turn or mirror an opened picture by its EXIF orientation; it is not decoded for that."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # PIL would decode it to look behind its pixels, where writers put none
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNS
    except _BROKEN:
        return False


def header(file: BinaryIO, *, max_pixels: int, apply_exif: bool = False) -> tuple[int, int, bool]:
    """Return (width, height, whether viewers turn it) of a JPEG or PNG, from its header alone; sizes in the stored frame, with
    `apply_exif` those after `upright`.

    Raises:
        ValueError: another format, a broken header, more than `max_pixels`.
    """
    image = _open(file, max_pixels=max_pixels)
    (width, height), turned = image.size, is_turned(image)
    if apply_exif and turned and image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS:
        width, height = height, width
    return width, height, turned


def decode_rgb(data: bytes, *, max_pixels: int) -> UInt8Array:
    """Decode a JPEG or PNG completely to RGB.

    Grayscale, palette and CMYK pictures are converted, 16-bit ones keep their upper byte (12 bits in 16 are
    refused), transparency is dropped.

    Args:
        data: encoded bytes.
        max_pixels: largest width x height accepted; checked from the header, before decoding.

    Returns:
        uint8 (H, W, 3), in the stored frame.

    Raises:
        ValueError: another format, too many pixels, truncated or broken data.
    """
    return np.array(decode_picture(data, max_pixels=max_pixels))


def decode_picture(data: bytes, *, max_pixels: int) -> Image.Image:
    """`decode_rgb` as PIL has it: what is resized next need not be made an array and a picture again."""
    return _rgb(_open(io.BytesIO(data), max_pixels=max_pixels), max_pixels=max_pixels)


def rgb_pixels(image: Image.Image, *, max_pixels: int) -> UInt8Array:
    """Return the pixels of an opened picture, uint8 (H, W, 3), converted as in `decode_rgb` and with its errors."""
    return np.array(_rgb(image, max_pixels=max_pixels))


def _rgb(image: Image.Image, *, max_pixels: int) -> Image.Image:
    _check_size(image, max_pixels)
    image = _load(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if 0 < (highest := int(values.max())) < _DARKEST:
            raise ValueError(
                f"16-bit picture with values up to {highest} would be almost black: scale them to 0..65535"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.copy()  # the caller's stays as it is
        del image.info["transparency"]  # PIL warns of what it means for a palette
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_mask(data: bytes, *, max_pixels: int) -> LabelArray:
    """Decode a class-index mask: a PNG whose *values* are classes (0 background, 255 void), palette or 8-bit grey; of
    more than 254 classes 16-bit grey (65535 void). Which of the two a data set has, `check_mask_values` knows.

    Returns:
        uint8 (H, W), or uint16 from a 16-bit PNG.

    Raises:
        ValueError: not a PNG, an RGB picture of a mask (the palette's colours instead of indices), 1-bit values.
    """
    if image_extension(data) != "png":
        raise ValueError("mask is a JPEG: lossy compression changes class indices, a PNG is needed")
    image = _load(_open(io.BytesIO(data), max_pixels=max_pixels))
    if image.mode.startswith("I"):
        return np.array(image).astype(np.uint16)
    if image.mode not in ("P", "L"):
        raise ValueError(
            f"mask has mode {image.mode}, not class indices: needed is a palette (P) or 8-bit grey (L) PNG "
            "with 0 for background, 1..C for classes and 255 for void (16-bit grey and 65535 above 254 classes)"
        )
    return np.array(image)


def encode_mask(mask_HW: LabelArray, palette: UInt8Array) -> bytes:
    """Encode class indices (H, W) as a palette PNG; `palette` is (256, 3) uint8. Same input, same bytes.

    uint16 indices become a 16-bit grey PNG: a palette has 256 colours.
    """
    if mask_HW.dtype not in (np.uint8, np.uint16) or mask_HW.ndim != 2:
        raise ValueError(f"mask must be uint8 or uint16 (H, W), got {mask_HW.dtype} {mask_HW.shape}")
    image = Image.fromarray(mask_HW)
    if mask_HW.dtype == np.uint8:
        image = image.convert("L")
        image.putpalette(palette.reshape(-1).tolist())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def encode_grey(map_HW: UInt8Array) -> bytes:
    """Encode an 8-bit map (H, W) as a grey PNG. Same input, same bytes."""
    file = io.BytesIO()
    Image.fromarray(map_HW).save(file, "PNG")
    return file.getvalue()


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Return the generator of one sample in one epoch: a pure function of its arguments.

    One worker or eight, this process or another: the same crops.
    """
    return np.random.Generator(np.random.PCG64(stable_seed(int(seed), int(epoch), key)))


@dataclass(frozen=True)
class Augmented:
    """A square training crop of side S.

    Attributes:
        image: uint8 (S, S, 3), in memory one plane a colour: as (3, S, S), the form of training, it is contiguous.
        window: top, bottom, left and right end (exclusive) of the part that shows the picture; the rest is padding.
        mask: (S, S) with void on padding, or None when the sample has no mask.
    """

    image: UInt8Array
    window: tuple[int, int, int, int]
    mask: LabelArray | None

    @property
    def valid(self) -> BoolArray:
        """Bool (S, S), False on padding."""
        top, bottom, left, right = self.window
        valid = np.zeros(self.image.shape[:2], bool)
        valid[top:bottom, left:right] = True
        return valid


@dataclass(frozen=True)
class _Window:
    """One axis of the crop: `count` pixels from `source` of the scaled image land at `target` of the crop."""

    source: int
    target: int
    count: int


def _window(scaled: int, size: int, position: float) -> _Window:
    """Place a crop on an axis of `scaled` pixels; `position` in [0, 1) chooses evenly among all placements."""
    offset = int(position * (abs(scaled - size) + 1))
    return _Window(offset, 0, size) if scaled >= size else _Window(0, offset, scaled)


def _nearest_index(window: _Window, scaled: int, original: int) -> npt.NDArray[np.int64]:
    """Original index of each pixel in the window: pixel centres, as PIL's nearest filter has them."""
    centre = np.arange(window.source, window.source + window.count) + 0.5
    return np.minimum((centre * original / scaled).astype(np.int64), original - 1)


def augment(
    image: Image.Image,
    mask_HW: LabelArray | None,
    *,
    size: int,
    scale_range: tuple[float, float],
    flip_probability: float,
    rng: np.random.Generator,
    long_side: int = 0,
    pad_color: tuple[int, int, int] = CLIP_MEAN_COLOR,
) -> Augmented:
    """Random scale, crop (or padding, where the scaled image is smaller) and horizontal flip; METHOD 1.21.

    Image and mask move together: bilinear with antialiasing for the image, nearest for the mask. Only the crop's part
    of the scaled image is computed, which equals scaling everything and cropping to within one grey level. The number
    of draws from `rng` is always four, whatever they decide.

    Args:
        image: RGB, from `decode_picture`.
        mask_HW: (H, W) of class indices, or None.
        size: side S of the crop in pixels.
        scale_range: smallest and largest scale factor, drawn uniformly.
        flip_probability: chance of a horizontal flip.
        rng: from `sample_rng`.
        long_side: an image with a longer side is scaled as if it had this one: a crop of a camera's picture would otherwise show
            so little of it that its image-level labels are not true of it. 0: every image has its own size.
        pad_color: RGB of padded pixels (they are also outside `window`).

    Raises:
        ValueError: mask of another size than the image, or settings out of range.
    """
    width, height = image.size
    if mask_HW is not None and mask_HW.shape != (height, width):
        raise ValueError(f"mask is {mask_HW.shape}, image is {(height, width)} (height, width)")
    low, high = scale_range
    if not 0 < low <= high or not 0 <= flip_probability <= 1 or size < 1:
        raise ValueError(f"size={size}, scale_range={scale_range}, flip_probability={flip_probability} are not usable")
    scale_draw, flip_draw, y_draw, x_draw = rng.random(4)
    scale = low + (high - low) * scale_draw
    if 0 < long_side < max(width, height):
        scale *= long_side / max(width, height)
    scaled_height, scaled_width = max(1, round(height * scale)), max(1, round(width * scale))
    y, x = _window(scaled_height, size, y_draw), _window(scaled_width, size, x_draw)
    is_flipped = flip_draw < flip_probability
    left = size - x.target - x.count if is_flipped else x.target
    window = (y.target, y.target + y.count, left, left + x.count)
    inside = (slice(*window[:2]), slice(*window[2:]))

    step_y, step_x = height / scaled_height, width / scaled_width
    box = (x.source * step_x, y.source * step_y, (x.source + x.count) * step_x, (y.source + y.count) * step_y)
    # PIL's filter reads beyond the box where the image has pixels, so that a box equals resize-then-crop.
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    resized = image.resize((x.count, y.count), Image.Resampling.BILINEAR, box=box)
    pixels = _pixels(resized)
    crop = _padded(pixels[:, ::-1] if is_flipped else pixels, inside, size=size, pad_color=pad_color)
    mask = None
    if mask_HW is not None:
        mask = np.full((size, size), np.iinfo(mask_HW.dtype).max, mask_HW.dtype)
        rows, columns = _nearest_index(y, scaled_height, height), _nearest_index(x, scaled_width, width)
        mask[inside] = mask_HW[rows][:, columns[::-1] if is_flipped else columns]
    return Augmented(crop, window, mask)


def _pixels(image: Image.Image) -> UInt8Array:
    """Pixels (H, W, 3) of an RGB picture: a view of PIL's own four bytes a pixel, which take a tenth of the time."""
    pixels_HW4 = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4)
    return pixels_HW4[..., :3]


def _padded(
    pixels_HW3: UInt8Array, inside: tuple[slice, slice], *, size: int, pad_color: tuple[int, int, int]
) -> UInt8Array:
    """Put pixels `inside` a crop (S, S, 3) that lies in memory as (3, S, S): so padding and flips cost next to nothing."""
    crop_3SS = np.empty((3, size, size), np.uint8)
    if pixels_HW3.shape[:2] != (size, size):
        crop_3SS[:] = np.array(pad_color, np.uint8)[:, None, None]
    crop_3SS[:, *inside] = pixels_HW3.transpose(2, 0, 1)
    return crop_3SS.transpose(1, 2, 0)
