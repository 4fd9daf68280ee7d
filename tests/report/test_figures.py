import colorsys
import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dfa.report.figures import (
    VOID,
    Example,
    class_colour,
    encode,
    heat_overlay,
    learning_curves,
    mask_overlay,
    palette,
    panel_sheet,
    present_legend,
    sample_panels,
    sweep_curve,
)


def example(height=30, width=40):
    random = np.random.default_rng(0)
    truth = np.zeros((height, width), np.int64)
    truth[5:20, 5:15], truth[10:25, 20:35] = 3, 1
    pseudo = truth.copy()
    pseudo[:3] = VOID
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Example(image, truth, random.random((height, width)), pseudo, truth, random.random((height, width)))


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_thousand_classes_have_a_thousand_colours():
    colours = {class_colour(index) for index in range(1001)}
    assert len(colours) == 1001
    assert class_colour(0) == (0, 0, 0) and min(class_colour(VOID)) > 220


def test_the_first_twenty_colours_are_far_apart_and_strong():
    colours = palette(20)[1:21].astype(float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1000 * np.eye(20)
    assert distance.min() > 20  # of 441; below ten, two classes look alike
    assert all(colorsys.rgb_to_hsv(*(colour / 255))[1] > 0.3 for colour in colours)


def test_a_colour_does_not_depend_on_the_number_of_classes():
    assert (palette(1000)[:256] == palette(5)).all()


def test_mask_pixels_take_their_class_colour_and_background_none():
    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 2
    mask[:4, :4] = VOID
    picture = mask_overlay(image, mask, opacity=1.0)
    assert tuple(picture[1, 6]) == class_colour(2)
    assert tuple(picture[1, 1]) == class_colour(VOID)
    assert tuple(picture[7, 7]) == (80, 80, 80)  # 0.6 * 100 + 20: the dimmed image


def test_outlines_lie_between_classes_only():
    image = np.zeros((6, 6, 3), np.uint8)
    mask = np.zeros((6, 6), np.uint8)
    flat = mask_overlay(image, mask)
    mask[:, 3:] = 1
    edged = mask_overlay(image, mask)
    assert (flat == flat[0, 0]).all()
    assert (edged[:, 2] > 150).all() and (edged[:, :2] == flat[:, :2]).all()


def test_heat_grows_with_the_map_and_survives_values_out_of_range():
    image = np.full((1, 5, 3), 60, np.uint8)
    picture = heat_overlay(image, np.array([[-1.0, 0.0, 0.5, 1.0, np.nan]])).astype(int).sum(axis=2)[0]
    assert picture[0] == picture[1] == picture[4] < picture[2] < picture[3]


def test_panels_are_the_parts_that_exist_in_reading_order_and_one_size():
    full, bare = example(), Example(example().image_HW3, prediction_HW=example().prediction_HW)
    captions = ["image", "ground truth", "CAM", "pseudo-label", "prediction", "uncertainty"]
    panels = sample_panels(full, width=80)
    assert [panel.caption for panel in panels] == captions
    assert {opened(panel.image).shape for panel in panels} == {(60, 80, 3)}
    assert [panel.caption for panel in sample_panels(bare)] == ["image", "prediction"]


def test_the_image_panel_shows_the_image():
    panel = sample_panels(example(), width=40, quality=95)[0]
    assert np.abs(opened(panel.image).astype(int) - example().image_HW3).mean() < 6  # JPEG of pure noise


def test_scaled_masks_invent_no_classes():
    panel = sample_panels(Example(np.zeros((2, 4, 3), np.uint8), truth_HW=np.array([[1, 1, 9, 9]] * 2)), width=64)[1]
    picture = opened(panel.image)
    for column, index in ((5, 1), (28, 1), (36, 9), (58, 9)):
        expected = 0.8 * np.array(class_colour(index)) + 0.2 * 20
        assert np.abs(picture[16, column] - expected).max() < 25  # JPEG beside an outline


def test_the_legend_names_what_the_masks_show():
    legend = present_legend(example(), ("bell", "cactus", "drum"))
    assert legend == (("bell", class_colour(1)), ("drum", class_colour(3)), ("void", class_colour(VOID)))
    with pytest.raises(ValueError, match="class 3, but there are 2"):
        present_legend(example(), ("bell", "cactus"))


def test_png_is_exact_and_jpeg_is_small():
    image = example().image_HW3
    assert (opened(encode(image)) == image).all()
    assert encode(image, quality=50).startswith(b"\xff\xd8") and len(encode(image, quality=50)) < image.nbytes


@pytest.mark.parametrize(
    "data",
    [
        learning_curves({"loss": [(0, 2.0), (1, 1.0), (2, float("nan"))]}, title="t", y_label="y"),
        learning_curves({}, title="nothing yet", y_label="y"),
        learning_curves({"loss": []}, title="t", y_label="y", log=True),
        sweep_curve({"seed": [(0.02, 10.0), (0.4, 48.0), (0.9, 7.0)]}, title="t"),
    ],
)
def test_figures_are_transparent_png(data):
    picture = opened(data)
    assert data.startswith(b"\x89PNG") and picture.shape[2] == 4
    assert picture[0, 0, 3] == 0 and picture[..., 3].max() == 255


def test_a_sheet_holds_all_examples_in_one_png():
    sheet = panel_sheet([example(), example()], ("bell", "cactus", "drum"))
    assert opened(sheet).shape[1] > 1000
    with pytest.raises(ValueError, match="at least one"):
        panel_sheet([], ())


def test_matplotlib_is_left_as_it_was():
    learning_curves({"loss": [(0, 1.0)]}, title="t", y_label="y")
    for key in ("text.color", "axes.grid", "font.size", "lines.linewidth"):
        assert matplotlib.rcParams[key] == matplotlib.rcParamsDefault[key]


def test_maps_of_another_size_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        sample_panels(Example(example().image_HW3, truth_HW=np.zeros((3, 3), np.uint8)))
    with pytest.raises(ValueError, match="uint8"):
        mask_overlay(np.zeros((3, 3, 3), np.float32), np.zeros((3, 3), np.uint8))
