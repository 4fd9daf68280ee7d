"""Decoding with limits, the training crop, the resize for inference."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dfa.data.classes import voc_palette
from dfa.data.transforms import (
    CLIP_MEAN_COLOR,
    augment,
    decode_mask,
    decode_rgb,
    encode_mask,
    header,
    image_extension,
    sample_rng,
    upright,
)

LIMIT = 10_000_000
COLORS = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)


def encoded(image, fmt="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


def smooth_image(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def block_mask(height, width, seed=0):
    """Large blocks of the classes 0..3, so that most pixels are far from a border."""
    blocks = np.random.default_rng(seed).integers(0, 4, (height // 16 + 1, width // 16 + 1), dtype=np.uint8)
    return np.kron(blocks, np.ones((16, 16), np.uint8))[:height, :width]


def plain_augment(image, mask, size, scale_range, flip_probability, rng):
    """Oracle: scale the whole picture, pad it, crop it, flip it."""
    height, width = image.shape[:2]
    scale_draw, flip_draw, y_draw, x_draw = rng.random(4)
    scale = scale_range[0] + (scale_range[1] - scale_range[0]) * scale_draw
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    picture = np.array(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
    labels = np.empty((new_height, new_width), np.uint8)
    for row in range(new_height):
        for column in range(new_width):
            labels[row, column] = mask[
                min(int((row + 0.5) * height / new_height), height - 1),
                min(int((column + 0.5) * width / new_width), width - 1),
            ]
    tall, wide = max(new_height, size), max(new_width, size)
    y, x = int(y_draw * (abs(new_height - size) + 1)), int(x_draw * (abs(new_width - size) + 1))
    top, left = (y if new_height < size else 0), (x if new_width < size else 0)
    canvas = np.empty((tall, wide, 3), np.uint8)
    canvas[:] = CLIP_MEAN_COLOR
    canvas_mask, valid = np.full((tall, wide), 255, np.uint8), np.zeros((tall, wide), bool)
    canvas[top : top + new_height, left : left + new_width] = picture
    canvas_mask[top : top + new_height, left : left + new_width] = labels
    valid[top : top + new_height, left : left + new_width] = True
    top, left = (y if new_height >= size else 0), (x if new_width >= size else 0)
    window = (slice(top, top + size), slice(left, left + size))
    step = -1 if flip_draw < flip_probability else 1
    return canvas[window][:, ::step], canvas_mask[window][:, ::step], valid[window][:, ::step]


@pytest.mark.parametrize("seed", range(40))  # some are narrower than the crop and flipped
def test_the_crop_equals_scaling_everything_and_cropping(seed):
    image, mask = smooth_image(61, 90), block_mask(61, 90)
    settings = {"size": 64, "scale_range": (0.5, 2.0), "flip_probability": 0.5}
    got = augment(Image.fromarray(image), mask, **settings, rng=sample_rng(0, seed, "a"))
    picture, labels, valid = plain_augment(image, mask, *settings.values(), sample_rng(0, seed, "a"))
    assert got.image.transpose(2, 0, 1).flags.c_contiguous  # stacked as it is, without another copy
    np.testing.assert_array_equal(got.valid, valid)
    np.testing.assert_array_equal(got.mask, labels)
    # PIL keeps the box in float32: a weight may round the other way, hence one grey level.
    assert np.abs(got.image.astype(int) - picture).max() <= 1


@pytest.mark.parametrize("seed", range(8))
def test_image_and_mask_move_together(seed):
    mask = block_mask(120, 150, seed)
    crop = augment(
        Image.fromarray(COLORS[mask]),
        mask,
        size=96,
        scale_range=(0.5, 2.0),
        flip_probability=0.5,
        rng=sample_rng(1, seed, "b"),
    )
    pure = (np.abs(crop.image[:, :, None].astype(int) - COLORS).sum(-1) == 0) & crop.valid[..., None]
    decided = pure.any(-1)
    assert decided.sum() > 0.4 * crop.valid.sum()  # block borders are blended by the filter, the rest is pure
    np.testing.assert_array_equal(crop.mask[decided], pure.argmax(-1)[decided])


def test_padding_is_invalid_void_and_of_the_pad_color():
    image, mask = np.full((20, 30, 3), 200, np.uint8), np.ones((20, 30), np.uint8)
    crop = augment(
        Image.fromarray(image), mask, size=64, scale_range=(1, 1), flip_probability=0, rng=sample_rng(0, 0, "c")
    )
    assert crop.valid.sum() == 600
    assert (crop.image[crop.valid] == 200).all()
    assert (crop.image[~crop.valid] == CLIP_MEAN_COLOR).all()
    assert (crop.mask == np.where(crop.valid, 1, 255)).all()


def test_all_placements_of_crop_and_padding_are_reached():
    image = np.zeros((4, 12, 3), np.uint8)
    image[..., 0] = np.arange(12)
    seen = set()
    for epoch in range(300):
        rng = sample_rng(0, epoch, "d")
        crop = augment(
            Image.fromarray(image),
            None,
            size=8,
            scale_range=(1, 1),
            flip_probability=0,
            rng=rng,
            pad_color=(99, 99, 99),
        )
        rows = np.flatnonzero(crop.valid[:, 0])
        seen.add((int(rows[0]), int(crop.image[rows[0], 0, 0])))
    assert seen == {(row, column) for row in range(5) for column in range(5)}


def test_a_crop_depends_on_seed_epoch_and_key_alone():
    def draws(*arguments):
        return sample_rng(*arguments).random(4).tolist()

    assert draws(1, 2, "key") == draws(1, 2, "key")
    assert (
        len({tuple(draws(*a)) for a in [(1, 2, "key"), (2, 2, "key"), (1, 3, "key"), (1, 2, "kez"), (12, 0, "k")]}) == 5
    )
    code = "from dfa.data.transforms import sample_rng; print(sample_rng(1, 2, 'key').random(4).tolist())"
    other = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str(draws(1, 2, "key"))


def test_without_a_mask_the_crop_is_the_same():
    image, mask = smooth_image(50, 60), block_mask(50, 60)
    settings = {"size": 32, "scale_range": (0.5, 2.0), "flip_probability": 0.5}
    with_mask = augment(Image.fromarray(image), mask, **settings, rng=sample_rng(0, 0, "e"))
    without = augment(Image.fromarray(image), None, **settings, rng=sample_rng(0, 0, "e"))
    np.testing.assert_array_equal(with_mask.image, without.image)
    assert without.mask is None


def test_a_camera_picture_is_cropped_as_if_it_were_smaller():
    image, mask = Image.fromarray(smooth_image(240, 360)), block_mask(240, 360)
    settings = {"size": 48, "flip_probability": 0.5}
    for seed in range(6):
        seen = augment(image, mask, scale_range=(0.5, 2.0), long_side=90, rng=sample_rng(0, seed, "f"), **settings)
        same = augment(image, mask, scale_range=(0.125, 0.5), rng=sample_rng(0, seed, "f"), **settings)
        np.testing.assert_array_equal(seen.image, same.image)
        np.testing.assert_array_equal(seen.mask, same.mask)
        small = augment(image, mask, scale_range=(0.5, 2.0), long_side=360, rng=sample_rng(0, seed, "f"), **settings)
        usual = augment(image, mask, scale_range=(0.5, 2.0), rng=sample_rng(0, seed, "f"), **settings)
        np.testing.assert_array_equal(small.image, usual.image)


def test_a_mask_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"mask is \(10, 11\), image is \(10, 12\)"):
        augment(
            Image.new("RGB", (12, 10)),
            np.zeros((10, 11), np.uint8),
            size=8,
            scale_range=(1, 1),
            flip_probability=0,
            rng=sample_rng(0, 0, "f"),
        )


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_gray_and_cmyk_jpegs_become_rgb(mode):
    picture = Image.fromarray(smooth_image(40, 50))
    data = encoded(picture.convert(mode), quality=95)
    image = decode_rgb(data, max_pixels=LIMIT)
    assert image.shape == (40, 50, 3) and image.dtype == np.uint8
    # JPEG at quality 95 with halved colour resolution: a few grey levels.
    assert np.abs(image.astype(int) - np.array(picture.convert(mode).convert("RGB"))).mean() < 4


def test_sixteen_bit_png_keeps_its_upper_byte():
    values = (np.arange(256, dtype=np.uint16) << 8).reshape(16, 16) + 17
    image = decode_rgb(encoded(Image.fromarray(values), "PNG"), max_pixels=LIMIT)
    np.testing.assert_array_equal(image[..., 1], np.arange(256).reshape(16, 16))


def test_twelve_bits_in_sixteen_are_refused_and_black_is_black():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    with pytest.raises(ValueError, match=r"16-bit picture with values up to 4080 .*scale them to 0\.\.65535"):
        decode_rgb(encoded(Image.fromarray(values), "PNG"), max_pixels=LIMIT)
    assert not decode_rgb(encoded(Image.fromarray(values * 0), "PNG"), max_pixels=LIMIT).any()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_image_is_an_error(fmt, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), fmt)
    with pytest.raises(ValueError, match=r"decode completely|image header"):
        decode_rgb(data[: int(len(data) * share)], max_pixels=LIMIT)


def test_oversized_images_are_refused_before_decoding():
    data = encoded(Image.new("RGB", (400, 300)), "PNG")
    with pytest.raises(ValueError, match=r"400 x 300 = 120000 pixels, more than max_pixels=100000"):
        decode_rgb(data, max_pixels=100_000)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="not a JPEG or PNG"):
        decode_rgb(encoded(Image.new("RGB", (4, 4)), "BMP"), max_pixels=LIMIT)


def test_exif_orientation_is_reported_but_not_applied():
    data = encoded(Image.new("RGB", (40, 20)), exif=turned_by(6))
    assert header(io.BytesIO(data), max_pixels=LIMIT) == (40, 20, True)
    assert decode_rgb(data, max_pixels=LIMIT).shape == (20, 40, 3)
    assert header(io.BytesIO(encoded(Image.new("RGB", (40, 20)))), max_pixels=LIMIT) == (40, 20, False)


def turned_by(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_pixels_are_those_that_viewers_show(orientation, mode):
    """By the EXIF standard: which edge of the stored rows and columns is the picture's top, and which its left."""
    picture = np.array(Image.fromarray(smooth_image(40, 64)).convert(mode))
    stored = [picture, picture[:, ::-1], picture[::-1, ::-1], picture[::-1]]
    stored += [np.swapaxes(each, 0, 1) for each in (picture, picture[:, ::-1], picture[::-1, ::-1], picture[::-1])]
    # 6: row 0 is the right side, column 0 the top; 8: row 0 is the left side, column 0 the bottom
    data = encoded(
        Image.fromarray(np.ascontiguousarray(stored[orientation - 1]), mode), quality=98, exif=turned_by(orientation)
    )
    shown = upright(data, max_pixels=LIMIT)
    assert header(io.BytesIO(data), max_pixels=LIMIT, apply_exif=True)[:2] == (64, 40)
    assert header(io.BytesIO(shown), max_pixels=LIMIT) == (64, 40, False) and shown == upright(data, max_pixels=LIMIT)
    expected = decode_rgb(encoded(Image.fromarray(picture, mode), quality=98), max_pixels=LIMIT).astype(int)
    assert np.abs(decode_rgb(shown, max_pixels=LIMIT).astype(int) - expected).max() <= 8  # JPEG twice
    assert (shown == data) == (orientation == 1)


def test_an_upright_png_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(4096, 65535, (6, 9), dtype=np.uint16)
    data = encoded(Image.fromarray(pixels), "PNG", exif=turned_by(6))
    shown = upright(data, max_pixels=LIMIT)
    assert header(io.BytesIO(data), max_pixels=LIMIT)[2] and not header(io.BytesIO(shown), max_pixels=LIMIT)[2]
    np.testing.assert_array_equal(decode_rgb(shown, max_pixels=LIMIT)[..., 0], np.rot90(pixels >> 8, -1))


def test_masks_survive_encoding_with_voc_colors():
    mask = np.random.default_rng(0).integers(0, 256, (31, 17), dtype=np.uint8)
    data = encode_mask(mask, voc_palette())
    assert image_extension(data) == "png" and data == encode_mask(mask, voc_palette())
    np.testing.assert_array_equal(decode_mask(data, max_pixels=LIMIT), mask)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(data)).convert("RGB")), voc_palette()[mask])


def test_an_rgb_picture_of_a_mask_is_an_error():
    with pytest.raises(ValueError, match="mode RGB, not class indices"):
        decode_mask(encoded(Image.new("RGB", (4, 4)), "PNG"), max_pixels=LIMIT)
    with pytest.raises(ValueError, match="mask is a JPEG"):
        decode_mask(encoded(Image.new("L", (4, 4))), max_pixels=LIMIT)
