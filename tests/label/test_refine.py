import math

import numpy as np
import pytest
import torch

from dfa.label.refine import pixel_adaptive_refine

SETTINGS = {"dilations": (1, 2), "iterations": 3, "colour_scale": 0.3, "position_scale": 1.0, "position_weight": 0.5}


def slow_refine(image, maps, *, dilations, iterations, colour_scale, position_scale, position_weight):
    """The equations, one pixel and one neighbour at a time, in float64. image (3,H,W) in [0,1], maps (K,H,W)."""
    _, height, width = image.shape
    ring = [(y * d, x * d) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    distances = [math.hypot(*offset) for offset in ring]
    mean = sum(distances) / len(ring)
    sigma = math.sqrt(sum((d - mean) ** 2 for d in distances) / len(ring))
    position = np.exp([-((d / (position_scale * sigma)) ** 2) for d in distances])
    position /= position.sum()

    def clamp(row, column):
        return min(max(row, 0), height - 1), min(max(column, 0), width - 1)

    for _ in range(iterations):
        result = np.zeros_like(maps)
        for row in range(height):
            for column in range(width):
                places = [clamp(row + y, column + x) for y, x in ring]
                colours = np.array([image[:, r, c] for r, c in places])
                std = np.maximum(colours.std(axis=0), 1e-4)
                ratio = ((colours - image[:, row, column]) / (colour_scale * std)) ** 2
                logit = -ratio.mean(axis=1)
                colour = np.exp(logit - logit.max())
                weight = (colour / colour.sum() + position_weight * position) / (1 + position_weight)
                for share, (r, c) in zip(weight, places, strict=True):
                    result[:, row, column] += share * maps[:, r, c]
        maps = result
    return maps


def random_case(seed, batch=2, classes=3, height=9, width=7):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    return image, torch.rand(batch, classes, height, width, generator=generator)


def test_refinement_equals_the_equations_pixel_by_pixel():
    image, maps = random_case(0)
    fast = pixel_adaptive_refine(image, maps, **SETTINGS)
    slow = np.stack(
        [
            slow_refine(i, m, **SETTINGS)
            for i, m in zip(image.double().numpy() / 255, maps.double().numpy(), strict=True)
        ]
    )
    np.testing.assert_allclose(fast, slow, atol=2e-5)  # fp32 exponents of about -10 and three iterations


def test_uint8_and_its_float_image_give_the_same():
    image, maps = random_case(1)
    torch.testing.assert_close(
        pixel_adaptive_refine(image, maps, **SETTINGS),
        pixel_adaptive_refine(image.float() / 255, maps, **SETTINGS),
        rtol=0,
        atol=0,
    )


def test_a_constant_map_stays_constant_and_values_keep_their_range():
    image, maps = random_case(2)
    maps[:, 0] = 0.45
    refined = pixel_adaptive_refine(image, maps, **SETTINGS)
    torch.testing.assert_close(refined[:, 0], maps[:, 0], rtol=0, atol=1e-6)  # fp32 sums of 16 weights
    assert refined.min() >= maps.min() - 1e-6 and refined.max() <= maps.max() + 1e-6


def test_labels_snap_to_a_colour_edge():
    image = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    image[..., 12:] = 200
    image += torch.randint(0, 4, image.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    soft = torch.linspace(1, 0, 24).expand(1, 1, 24, 24) - 0.2  # crosses 0.5 at column 7, five short of the edge
    refined = pixel_adaptive_refine(
        image, soft, dilations=(1, 2, 4), iterations=30, colour_scale=0.3, position_scale=0.3, position_weight=0.01
    )
    jump = (refined[0, 0, :, 11] - refined[0, 0, :, 12]).min()
    assert jump > 5 * (soft[0, 0, 0, 11] - soft[0, 0, 0, 12])


def test_flat_images_average_evenly_and_stay_finite():
    image = torch.full((1, 3, 8, 8), 7, dtype=torch.uint8)
    image[0, :, 4, 4] = 250  # an outlier in a flat neighbourhood has no deviation to divide by
    maps = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {**SETTINGS, "iterations": 1, "position_weight": 0.0, "dilations": (1,)}
    refined = pixel_adaptive_refine(image, maps, **settings)
    assert refined.isfinite().all()
    ring = (maps[0, :, 3:6, 3:6].sum(dim=(1, 2)) - maps[0, :, 4, 4]) / 8
    torch.testing.assert_close(refined[0, :, 4, 4], ring)


def test_stride_works_on_the_smaller_picture_and_returns_full_size():
    image, maps = random_case(3, height=11, width=14)
    refined = pixel_adaptive_refine(image, maps, **SETTINGS, stride=2)
    assert refined.shape == maps.shape
    resize = torch.nn.functional.interpolate
    small = [resize(x.float(), size=(6, 7), mode="area") for x in (image / 255, maps)]
    by_hand = resize(pixel_adaptive_refine(*small, **SETTINGS), size=(11, 14), mode="bilinear")
    torch.testing.assert_close(refined, by_hand)


def test_a_patch_map_is_upsampled_first():
    image, _ = random_case(4, height=12, width=8)
    patches = torch.rand(2, 3, 3, 2)
    upsampled = torch.nn.functional.interpolate(patches, size=(12, 8), mode="bilinear")
    torch.testing.assert_close(
        pixel_adaptive_refine(image, patches, **SETTINGS), pixel_adaptive_refine(image, upsampled, **SETTINGS)
    )


def test_autocast_changes_nothing():
    image, maps = random_case(5)
    plain = pixel_adaptive_refine(image, maps, **SETTINGS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pixel_adaptive_refine(image, maps, **SETTINGS)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("serial_elements", [1, 100, 150])
def test_working_in_bands_of_rows_changes_nothing(serial_elements, monkeypatch):
    image, maps = random_case(10)
    whole = pixel_adaptive_refine(image, maps, **SETTINGS)
    monkeypatch.setattr("dfa.label.refine._SERIAL_ELEMENTS", serial_elements)  # bands of 1, 2 and 3 of the nine rows
    torch.testing.assert_close(pixel_adaptive_refine(image, maps, **SETTINGS), whole, rtol=0, atol=1e-6)


def test_images_of_a_batch_do_not_touch_each_other():
    image, maps = random_case(6)
    alone = [pixel_adaptive_refine(image[i : i + 1], maps[i : i + 1], **SETTINGS) for i in range(2)]
    torch.testing.assert_close(pixel_adaptive_refine(image, maps, **SETTINGS), torch.cat(alone))


def test_no_channels_give_no_channels():
    image, _ = random_case(7)
    assert pixel_adaptive_refine(image, torch.zeros(2, 0, 3, 3), **SETTINGS).shape == (2, 0, 9, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dilations": ()}, "dilations"),
        ({"dilations": (1, 1)}, "dilations"),
        ({"stride": 0}, "stride"),
        ({"colour_scale": 0.0}, "scales"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    image, maps = random_case(8)
    with pytest.raises(ValueError, match=message):
        pixel_adaptive_refine(image, maps, **{**SETTINGS, **change})


def test_a_map_of_another_batch_size_is_refused():
    image, maps = random_case(9)
    with pytest.raises(ValueError, match="expected image"):
        pixel_adaptive_refine(image, maps[:1], **SETTINGS)
