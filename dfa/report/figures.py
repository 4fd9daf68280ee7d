"""Pictures and curves as image bytes. The one door to matplotlib, which is used without its global state."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dfa.core.void import VOID, WIDE_VOID, void_label

_VOID_COLOUR = (236, 238, 241)
# One grey that reads on white and on near-black paper: figures are transparent and follow the page's light or dark.
_INK = "#7d8797"
_LINES = ("#4c7df0", "#f08a3c", "#22a884", "#d4548f", "#8f6ee8", "#c2a21f", "#3fb1d6", "#e0574f")
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


@dataclass(frozen=True)
class Panel:
    """One captioned picture: encoded PNG or JPEG bytes."""

    caption: str
    image: bytes


@dataclass(frozen=True)
class Example:
    """What there is to see of one sample; every array has the image's height and width.

    image_HW3: uint8 RGB. masks: 0 background, class index, 255 void. cam_HW: in [0, 1]. uncertainty_HW: in [0, 1].
    What is None is left out.
    """

    image_HW3: np.ndarray
    truth_HW: np.ndarray | None = None
    cam_HW: np.ndarray | None = None
    pseudo_HW: np.ndarray | None = None
    prediction_HW: np.ndarray | None = None
    uncertainty_HW: np.ndarray | None = None


def class_colour(index: int) -> tuple[int, int, int]:
    """The RGB colour of a class index: stable, distinct for at least 1000 classes, black for 0, light grey for void.

    Hue turns by the golden angle from one class to the next, so that neighbours differ most; lightness and
    colourfulness alternate (OKLCH, so that all colours look about equally strong). It does not depend on the number of
    classes. Class 255 of a larger set has no colour of its own, as it would be void.
    """
    if index < 0:
        raise ValueError(f"class index must be >= 0, got {index}")
    if index == 0:
        return (0, 0, 0)
    if index in (VOID, WIDE_VOID):
        return _VOID_COLOUR
    hue = math.radians(25 + 137.50776 * (index - 1))
    tier = (index - 1) % 3
    # Two more irrational turns tell apart the classes whose hues meet again after many rounds.
    lightness = (0.70, 0.80, 0.60)[tier] + 0.21 * ((index * 0.7548776662) % 1 - 0.5)
    chroma = (0.18, 0.13, 0.16)[tier] + 0.03 * ((index * 0.5698402910) % 1 - 0.5)
    return _oklch_to_rgb(lightness, chroma, hue)


def palette(num_classes: int) -> np.ndarray:
    """Colours of the indices 0..max(num_classes, 255): uint8 rows of RGB."""
    return np.array([class_colour(index) for index in range(max(num_classes, VOID) + 1)], np.uint8)


def _oklch_to_rgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """Ottosson's OKLab (2020) to 8-bit sRGB, clipped into the gamut."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    clipped = (min(max(value, 0.0), 1.0) for value in linear)
    gamma = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in clipped)
    red, green, blue = (round(255 * value) for value in gamma)
    return red, green, blue


def encode(rgb_HW3: np.ndarray, *, quality: int | None = None) -> bytes:
    """uint8 RGB as PNG bytes, or as JPEG of the given quality (1..95)."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(rgb_HW3))
    if quality is None:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def mask_overlay(image_HW3: np.ndarray, mask_HW: np.ndarray, *, opacity: float = 0.8) -> np.ndarray:
    """A mask in class colours over the dimmed grey image, with light outlines; void is pale. uint8 RGB."""
    _same_size(image_HW3, mask_HW)
    picture = image_HW3.astype(np.float32)
    grey = (0.75 * picture.mean(axis=2, keepdims=True) + 0.25 * picture) * 0.6 + 20
    present_P, place_HW = np.unique(mask_HW, return_inverse=True)
    colour = np.array([class_colour(int(index)) for index in present_P], np.float32)[place_HW.reshape(mask_HW.shape)]
    share = np.where(mask_HW == 0, 0, opacity)[..., None]
    result = grey * (1 - share) + colour * share
    edge = np.zeros(mask_HW.shape, bool)
    edge[:-1] |= mask_HW[:-1] != mask_HW[1:]
    edge[:, :-1] |= mask_HW[:, :-1] != mask_HW[:, 1:]
    result[edge] = result[edge] * 0.25 + 255 * 0.75
    return result.round().astype(np.uint8)


def heat_overlay(image_HW3: np.ndarray, map_HW: np.ndarray, *, colours: str = "inferno") -> np.ndarray:
    """A map in [0, 1] (clipped) as heat over the dimmed image: dark where cold. uint8 RGB."""
    _same_size(image_HW3, map_HW)
    level = np.clip(np.nan_to_num(map_HW.astype(np.float32)), 0, 1)
    heat = matplotlib.colormaps[colours](level)[..., :3] * 255
    grey = image_HW3.astype(np.float32).mean(axis=2, keepdims=True) * 0.6
    share = 0.35 + 0.5 * level[..., None]
    return (grey * (1 - share) + heat * share).round().astype(np.uint8)


def sample_panels(example: Example, *, width: int = 320, quality: int = 88) -> tuple[Panel, ...]:
    """Image, ground truth, CAM, pseudo-label, prediction and uncertainty (those that exist), as JPEG panels.

    Arrays are first brought to ``width`` pixels across (images bicubic, maps bilinear, masks nearest) so that outlines
    are equally fine whatever the sample's size.
    """
    image = _scale(example.image_HW3, width, Image.Resampling.BICUBIC)
    panels = [("image", image)]
    masks = (
        ("ground truth", example.truth_HW),
        ("pseudo-label", example.pseudo_HW),
        ("prediction", example.prediction_HW),
    )
    maps = (("CAM", example.cam_HW, "inferno"), ("uncertainty", example.uncertainty_HW, "viridis"))
    for caption, mask in masks:
        if mask is not None:
            _same_size(example.image_HW3, mask)
            panels.append((caption, mask_overlay(image, _scale(mask, width, Image.Resampling.NEAREST))))
    for caption, level, colours in maps:
        if level is not None:
            _same_size(example.image_HW3, level)
            level = _scale(level.astype(np.float32), width, Image.Resampling.BILINEAR)
            panels.append((caption, heat_overlay(image, level, colours=colours)))
    order = ("image", "ground truth", "CAM", "pseudo-label", "prediction", "uncertainty")
    panels.sort(key=lambda panel: order.index(panel[0]))
    return tuple(Panel(caption, encode(rgb, quality=quality)) for caption, rgb in panels)


def present_legend(example: Example, names: Sequence[str]) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    """(name, colour) of the foreground classes that the example's masks show, ascending, then "void" if they hold it.

    ``names[c - 1]`` is the name of class c.
    """
    masks = [m for m in (example.truth_HW, example.pseudo_HW, example.prediction_HW) if m is not None]
    shown = {int(index) for mask in masks for index in np.unique(mask)}
    void = void_label(len(names))
    present = sorted(shown - {0, void})
    if present and present[-1] > len(names):
        raise ValueError(f"mask holds class {present[-1]}, but there are {len(names)} class names")
    last = (("void", _VOID_COLOUR),) if void in shown else ()
    return tuple((names[index - 1], class_colour(index)) for index in present) + last


def panel_sheet(examples: Sequence[Example], names: Sequence[str], *, width: int = 220) -> bytes:
    """All examples as one PNG, a row each, with captions and a legend of the classes seen: for a README or a paper."""
    if not examples:
        raise ValueError("a sheet needs at least one example")
    rows = [sample_panels(example, width=width, quality=95) for example in examples]
    legend = dict(entry for example in examples for entry in present_legend(example, names))
    num_columns = max(len(row) for row in rows)
    first = Image.open(io.BytesIO(rows[0][0].image))
    row_height = 2.2 * first.height / first.width
    with matplotlib.rc_context(_STYLE):
        figure = Figure(
            figsize=(2.2 * num_columns, row_height * len(rows) + 0.8), layout="constrained", facecolor="white"
        )
        axes = figure.subplots(len(rows), num_columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, panels in enumerate(rows):
            for axis, panel in zip(axes[row], panels, strict=False):
                axis.imshow(np.asarray(Image.open(io.BytesIO(panel.image))))
                axis.set_title(panel.caption if row == 0 else "", color="#333a45")
        if legend:
            handles = [_swatch(colour) for colour in legend.values()]
            figure.legend(
                handles, list(legend), loc="outside lower center", ncols=min(len(legend), 8), labelcolor="#333a45"
            )
        return _png(figure, transparent=False)


def learning_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    log: bool = False,
) -> bytes:
    """Named curves of (x, y) points over the steps, transparent PNG. Points that are not finite leave a gap."""
    with matplotlib.rc_context(_STYLE):
        figure, axis = _axes(title, x_label, y_label)
        for number, (name, points) in enumerate(curves.items()):
            x, y = np.array(points, float).reshape(-1, 2).T
            marker = "o" if len(x) <= 25 else None
            axis.plot(x, y, label=name, color=_LINES[number % len(_LINES)], marker=marker, markersize=4)
        if log:
            axis.set_yscale("log")
        if curves:
            axis.legend(ncols=2, fontsize=9)
        return _png(figure)


def sweep_curve(curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> bytes:
    """mIoU in percent over the background threshold, the best point of each curve marked; transparent PNG."""
    with matplotlib.rc_context(_STYLE):
        figure, axis = _axes(title, "background threshold", "mIoU, %")
        for number, (name, points) in enumerate(curves.items()):
            x, y = np.array(points, float).reshape(-1, 2).T
            best, colour = int(np.nanargmax(y)), _LINES[number % len(_LINES)]
            axis.plot(x, y, color=colour, label=f"{name}: {y[best]:.1f} at {x[best]:.2f}")
            axis.plot(x[best], y[best], "o", color=colour, markersize=7)
        if curves:
            axis.legend(fontsize=9)
        axis.set_ylim(bottom=0)
        return _png(figure)


def _axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, loc="left")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    return figure, axis


def _png(figure: Figure, *, transparent: bool = True) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=144, transparent=transparent)
    return buffer.getvalue()


def _swatch(colour: tuple[int, int, int]) -> matplotlib.patches.Patch:
    return matplotlib.patches.Patch(color="#{:02x}{:02x}{:02x}".format(*colour))


def _scale(array: np.ndarray, width: int, method: Image.Resampling) -> np.ndarray:
    """To ``width`` pixels across; the height keeps the aspect ratio."""
    height = max(1, round(array.shape[0] * width / array.shape[1]))
    kind = array if array.ndim == 3 or array.dtype == np.float32 else array.astype(np.int32)
    return np.asarray(Image.fromarray(np.ascontiguousarray(kind)).resize((width, height), method))


def _same_size(image_HW3: np.ndarray, map_HW: np.ndarray) -> None:
    if image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or image_HW3.dtype != np.uint8:
        raise ValueError(f"picture must be (H, W, 3) uint8, got {image_HW3.shape} {image_HW3.dtype}")
    if map_HW.shape != image_HW3.shape[:2]:
        raise ValueError(f"map {map_HW.shape} does not fit the picture {image_HW3.shape}")
