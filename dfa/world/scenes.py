"""Procedural scenes with exact masks: a world small enough for a laptop, hard enough to need the method.

Every object is a **plain body** with one small **discriminative part**. The body's colour is drawn at random and says
nothing about the class, and each body shape is shared by two classes, so only the part (a pattern in light and one hue
of its class's own) names the object: a naive CAM lights up the part and misses the remainder, which is the failure that
weakly supervised segmentation is about. Blobs
without a part are distractors and belong to the background.

A scene is a pure function of (seed, index): the same on every machine, in any order, by any number of workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SIZE = 112
"""Width and height of a scene in pixels."""

CLOSE_UP_SIZE = 64
"""Width and height of a close-up in pixels."""


@dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
        image_HW3: uint8 RGB.
        mask_HW: uint8, 0 background, 1..10 the class as numbered in `CLASSES`; exact, without void pixels.
        labels: ascending class indices that are visible.
        background: name of the background texture.
    """

    image_HW3: np.ndarray
    mask_HW: np.ndarray
    labels: tuple[int, ...]
    background: str

    @property
    def caption(self) -> str:
        """An English sentence that is true of the scene: its classes and its background."""
        return caption(self.labels, self.background)


def caption(labels: tuple[int, ...], background: str) -> str:
    """ "a photo of a drum and a kite on grass" for the given class indices (1..10) and texture name."""
    return "a photo of " + " and ".join(f"a {CLASSES[label - 1]}" for label in labels) + f" on {background}"


# -- bodies: signed distance in units of the object's radius, negative inside ---------------------------------------


def _ellipse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.sqrt(x**2 + (y / 0.72) ** 2) - 1.0) * 0.8


def _box(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    dx, dy = np.abs(x) - 0.72, np.abs(y) - 0.5
    return np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2) + np.minimum(np.maximum(dx, dy), 0) - 0.14


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(-x - 0.62, np.maximum(0.5 * x + 0.866 * y, 0.5 * x - 0.866 * y) - 0.58)


def _capsule(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.abs(x) - 0.68, 0) ** 2 + y**2) - 0.4


def _hexagon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 0.866 + np.abs(y) * 0.5, np.abs(y)) - 0.78


# -- parts: 1 where the pattern's light colour goes, for coordinates in the unit disc --------------------------------


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.cos(x * 5.6) + np.cos(y * 5.6) > 0.55


def _eye(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x**2 + y**2 > 0.22) & (x**2 + y**2 < 0.8)


def _checker(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin(x * 4.7) * np.sin(y * 4.7) > 0


def _zigzag(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin((y + 0.35 * np.abs((x * 1.6) % 2 - 1)) * 9.0) > 0


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(np.abs(x), np.abs(y)) < 0.24


def _stripes(x: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.sin(x * 8.5) > 0


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.cos(np.sqrt(x**2 + y**2) * 11.0) > 0


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x + 1.4 * np.abs(y) < 0.75) & (x + 1.4 * np.abs(y) > -0.1)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x**2 + y**2) < 0.55 + 0.4 * np.cos(5 * np.arctan2(y, x))


def _fan(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin(4 * np.arctan2(y, x)) > 0


_Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]

# name -> (body, part, part's centre along the body's long axis, part's radius), in units of the object's radius
_OBJECTS: dict[str, tuple[_Shape, _Shape, float, float]] = {
    "beetle": (_ellipse, _dots, 0.42, 0.46),
    "board": (_box, _checker, 0.36, 0.46),
    "drum": (_box, _zigzag, -0.36, 0.46),
    "fish": (_ellipse, _eye, -0.45, 0.42),
    "kite": (_triangle, _cross, -0.18, 0.44),
    "lantern": (_hexagon, _star, 0.25, 0.48),
    "pencil": (_capsule, _arrow, 0.60, 0.42),
    "shell": (_hexagon, _fan, -0.28, 0.46),
    "tent": (_triangle, _stripes, -0.20, 0.44),
    "train": (_capsule, _ring, -0.58, 0.42),
}

CLASSES: tuple[str, ...] = tuple(_OBJECTS)
"""The ten foreground classes; class index = position + 1."""

BACKGROUNDS: tuple[str, ...] = ("grass", "water", "sand", "brick", "sky", "forest")


# -- backgrounds ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _upsampling(size: int, cells: int) -> np.ndarray:
    """(size, cells) matrix of linear interpolation weights."""
    position = np.linspace(0, cells - 1, size)
    low = np.minimum(position.astype(int), cells - 2)
    weight = np.zeros((size, cells), np.float32)
    weight[np.arange(size), low] = 1 - (position - low)
    weight[np.arange(size), low + 1] = position - low
    return weight


def _smooth_noise(rng: np.random.Generator, size: int, rows: float, columns: float) -> np.ndarray:
    """(size, size) noise of about unit range whose grain is SIZE / rows by SIZE / columns pixels."""
    cells = [max(2, round(count * size / SIZE)) for count in (rows, columns)]
    grain = rng.uniform(-1, 1, cells).astype(np.float32)
    return _upsampling(size, cells[0]) @ grain @ _upsampling(size, cells[1]).T


_AXIS = np.arange(SIZE, dtype=np.float32)


def _texture(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size) field in about [-1, 1], one structure for each background name."""
    y, x = _AXIS[:size, None], _AXIS[None, :size]
    coarse = _smooth_noise(rng, size, 6, 6)
    if name == "grass":
        return 0.75 * _smooth_noise(rng, size, 22, 75) + 0.3 * coarse
    if name == "water":
        return 0.6 * np.sin(y * rng.uniform(0.5, 0.75) + 2.5 * coarse + x * rng.uniform(-0.08, 0.08)) + 0.25 * coarse
    if name == "sand":
        return 0.45 * rng.uniform(-1, 1, (size, size)).astype(np.float32) + 0.35 * coarse
    if name == "brick":
        height, width = rng.uniform(9, 13), rng.uniform(18, 26)
        row = np.floor(y / height)
        joint = ((y % height) < 2) | (((x + (row % 2) * width / 2) % width) < 2)
        return np.where(joint, -0.9, 0.3) + 0.2 * coarse
    if name == "sky":
        return 0.9 * _smooth_noise(rng, size, 4, 4) + 0.25 * _smooth_noise(rng, size, 9, 9)
    return (
        0.8 * np.sign(_smooth_noise(rng, size, 17, 17)) * np.abs(_smooth_noise(rng, size, 30, 30)) ** 0.5 + 0.2 * coarse
    )


_PALETTES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "grass": ((96, 140, 60), (40, 45, 28)),
    "water": ((70, 118, 165), (35, 38, 40)),
    "sand": ((188, 165, 118), (42, 40, 36)),
    "brick": ((150, 92, 76), (50, 36, 34)),
    "sky": ((150, 178, 210), (62, 44, 26)),
    "forest": ((62, 92, 58), (48, 52, 34)),
}


def _background(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    mean, spread = (np.asarray(values, np.float32) for values in _PALETTES[name])
    mean = mean + rng.uniform(-28, 28, 3).astype(np.float32)
    return mean + _texture(name, rng, size)[:, :, None].astype(np.float32) * spread


# -- objects -------------------------------------------------------------------------------------------------------


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random plain colour, neither near black nor near white, of any hue."""
    colour = rng.uniform(35, 225, 3)
    return colour.astype(np.float32)


def _part_colour(name: str, rng: np.random.Generator) -> np.ndarray:
    """The dark colour of a class's part: its own hue, give or take, in varying strength."""
    hue = 2 * np.pi * (CLASSES.index(name) / len(CLASSES) + rng.uniform(-0.03, 0.03))
    wave = 0.5 + 0.5 * np.cos(hue - 2 * np.pi / 3 * np.arange(3))
    return (rng.uniform(5, 40) + rng.uniform(90, 180) * wave).astype(np.float32)


@dataclass(frozen=True)
class _Placed:
    """An object in its bounding window: where, how opaque, which colour, and where its part is."""

    rows: slice
    columns: slice
    alpha: np.ndarray
    colour: np.ndarray
    inside: np.ndarray
    part: np.ndarray


def _window(centre: np.ndarray, reach: float, size: int) -> tuple[slice, slice]:
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, size).astype(int)
    return slice(low[0], high[0]), slice(low[1], high[1])


def _place(name: str, rng: np.random.Generator, size: int) -> _Placed:
    body, pattern, offset, part_radius = _OBJECTS[name]
    radius, angle = rng.uniform(22.0, 38.0), rng.uniform(0, 2 * np.pi)
    stretch = rng.uniform(0.88, 1.12)
    centre = rng.uniform(radius * 0.75, size - radius * 0.75, 2)
    rows, columns = _window(centre, radius * 1.25, size)
    dy, dx = _AXIS[rows, None] - centre[0], _AXIS[None, columns] - centre[1]
    x = (np.cos(angle) * dx + np.sin(angle) * dy) / (radius * stretch)
    y = (np.cos(angle) * dy - np.sin(angle) * dx) * stretch / radius
    distance = body(x, y) * radius
    px, py = (x - offset) / part_radius, y / part_radius
    part = (px**2 + py**2 < 1) & (distance < 0)
    shade = 1 + rng.uniform(-0.18, 0.18) * x + rng.uniform(-0.18, 0.18) * y
    colour = _colour(rng)[None, None] * shade[:, :, None]
    light, dark = rng.uniform(190, 250, 3), _part_colour(name, rng)
    colour[part] = np.where(pattern(px, py)[part][:, None], light, dark)
    return _Placed(rows, columns, np.clip(0.5 - distance, 0, 1), colour, distance < 0, part)


def _blob(rng: np.random.Generator, size: int) -> _Placed:
    """A distractor: a wobbly plain disc without a part."""
    radius, centre = rng.uniform(5.0, 12.0), rng.uniform(4, size - 4, 2)
    rows, columns = _window(centre, radius * 1.5, size)
    dy, dx = _AXIS[rows, None] - centre[0], _AXIS[None, columns] - centre[1]
    theta = np.arctan2(dy, dx)
    wobble = 1 + 0.25 * np.sin(2 * theta + rng.uniform(0, 6.3)) + 0.15 * np.sin(3 * theta + rng.uniform(0, 6.3))
    distance = np.sqrt(dx**2 + dy**2) - radius * wobble
    colour = np.broadcast_to(_colour(rng), (*distance.shape, 3))
    nothing = np.zeros(distance.shape, bool)
    return _Placed(rows, columns, np.clip(0.5 - distance, 0, 1), colour, nothing, nothing)


def _paint(image: np.ndarray, item: _Placed) -> None:
    region = image[item.rows, item.columns]
    region += item.alpha[:, :, None] * (item.colour - region)


def _still_recognisable(owner: np.ndarray, parts: list[np.ndarray], sizes: list[int]) -> bool:
    """Whether every object keeps over half of its pixels and nearly all of its part."""
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True), start=1):
        visible = owner == number
        if visible.sum() < 0.55 * size or (visible & part).sum() < 0.85 * part.sum():
            return False
    return True


def draw(seed: int, index: int) -> Scene:
    """Draw scene number `index` of the world `seed`: a pure function of both (non-negative integers)."""
    rng = np.random.default_rng([seed, index])
    return _draw(rng, SIZE, num_objects=int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])), most_blobs=3)


def draw_close_up(seed: int, index: int) -> Scene:
    """Draw a small picture of one object, as most captioned pictures of the real world are: 64 px, one class."""
    return _draw(np.random.default_rng([seed, index, 64]), CLOSE_UP_SIZE, num_objects=1, most_blobs=1)


def _draw(rng: np.random.Generator, size: int, *, num_objects: int, most_blobs: int) -> Scene:
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    image = _background(background, rng, size)
    for _ in range(rng.integers(0, most_blobs + 1)):
        _paint(image, _blob(rng, size))
    owner = np.zeros((size, size), np.uint8)
    classes, parts, areas = [0], [], []
    for class_number in rng.choice(len(CLASSES), size=num_objects, replace=False):
        for _ in range(12):
            item = _place(CLASSES[class_number], rng, size)
            trial, part = owner.copy(), np.zeros((size, size), bool)
            trial[item.rows, item.columns][item.inside] = len(parts) + 1
            part[item.rows, item.columns] = item.part
            if _still_recognisable(trial, [*parts, part], [*areas, int(item.inside.sum())]):
                owner = trial
                parts.append(part)
                areas.append(int(item.inside.sum()))
                classes.append(int(class_number) + 1)
                _paint(image, item)
                break
    mask = np.asarray(classes, np.uint8)[owner]
    return Scene(_lit(image, rng), mask, tuple(sorted(classes[1:])), background)


def _lit(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light and sensor noise, as uint8."""
    gradient, axis = rng.uniform(-0.18, 0.18, 2), _AXIS[: len(image)] / len(image) - 0.5
    light = (1 + gradient[0] * axis[:, None] + gradient[1] * axis[None, :]) * rng.uniform(0.85, 1.15)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(3, 9)
    return np.clip(image * light[:, :, None] + noise, 0, 255).astype(np.uint8)
