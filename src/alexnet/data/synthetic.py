"""The embedded data set: ten classes of textured shapes, drawn by the project itself in seconds.

A class is a shape (disc, ring, square, triangle, cross) filled with a texture (stripes, checks); neither
alone decides it. Everything else is nuisance, drawn anew for every image: position, size, rotation, the two
colours of the texture and which is brighter, its period, phase and direction, the tint of the dark outline,
a shaded background and pixel noise. So the mean colour says nothing, no pixel by itself says anything, and yet
a person sees the class at once.

    label = 2 * shape + texture

Coordinates: an image is the square [-1, 1]^2, x to the right, y down. (u, v) are the shape's own
coordinates: shifted, rotated, and divided by its size. A shape is its signed distance d(u, v) in the
shape's units, negative inside; its coverage of a pixel is 1/2 - d in pixels, clipped to 0..1.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

SHAPES = ("disc", "ring", "square", "triangle", "cross")
TEXTURES = ("striped", "checked")
CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
VERSION = 1  # of the pictures: to be raised with any change to them, so that a store of others is noticed
BLOCK = 128  # images drawn at a time; part of the definition, because the noise is drawn by block
OUTLINE = 0.04  # half the width of a shape's outline, in half image sides
NOISE = 0.03  # standard deviation of the pixel noise, in units of the full range


def labels_of(n: int) -> np.ndarray:
    """(n,) int64: the classes in turn, so that any n is balanced to within one image per class."""
    return np.arange(n, dtype=np.int64) % len(CLASSES)


def blocks(n: int, px: int, seed: int, split: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, images (<=BLOCK, px, px, 3) uint8) of a split, in order; split 0 is train, 1 is val.

    Image i depends on (seed, split, i) and px alone, whatever n is, as long as its block is whole.
    """
    labels = labels_of(n)
    for first in range(0, n, BLOCK):
        random = np.random.default_rng([seed, split, first // BLOCK])
        yield first, draw(labels[first : first + BLOCK], px, random)


def draw(labels: np.ndarray, px: int, random: np.random.Generator) -> np.ndarray:
    """One image for each label: (n, px, px, 3) uint8."""
    scene = draw_scene(len(labels), random)
    axis = ((np.arange(px, dtype=np.float32) + 0.5) * 2 / px - 1).astype(np.float32)
    across, down = axis[None, None, :], axis[None, :, None]
    size = _column(scene.size)
    u, v = _turned(
        (across - _column(scene.centre[:, 0])) / size,
        (down - _column(scene.centre[:, 1])) / size,
        scene.angle,
    )
    distance = np.empty_like(u)
    for shape, name in enumerate(SHAPES):
        rows = labels // 2 == shape
        distance[rows] = DISTANCE[name](u[rows], v[rows])

    # The texture, how much of its second colour: checks are the product of two crossed stripes.
    a, b = _turned(across, down, scene.direction)
    turns = _column(2 * np.pi / scene.period)
    first = np.sin(a * turns + _column(scene.phase[:, 0]))
    second = np.sin(b * turns + _column(scene.phase[:, 1]))
    wave = np.where(_column(labels % 2) == 0, first, first * second)
    sharpness = scene.period * px / (4 * np.pi)  # a slope of about one pixel at the zero crossings
    paint = _blend(scene.paint, np.clip(0.5 + wave * _column(sharpness), 0, 1))

    shade, _ = _turned(across, down, scene.shading)
    picture = _blend(scene.ground, np.clip(0.5 + 0.4 * shade, 0, 1))
    picture = _over(paint, np.clip(0.5 - distance * size * px / 2, 0, 1), picture)
    outline = np.clip(0.5 + (OUTLINE - np.abs(distance) * size) * px / 2, 0, 1)
    picture = _over(scene.ink[:, None, None], outline, picture)
    picture += random.standard_normal(picture.shape, dtype=np.float32) * NOISE
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw_scene(n: int, random: np.random.Generator) -> SimpleNamespace:
    """The nuisances, one row per image: float32, angles in radians, lengths in half image sides.

    The texture's colours straddle the background in lightness, the outline is dark.
    """
    ground = random.uniform(0.35, 0.65, (n, 2, 3))
    dark, bright = random.uniform(0.2, 0.4, (n, 3)), random.uniform(0.6, 0.9, (n, 3))
    swap = random.random(n) < 0.5
    size = random.uniform(0.55, 0.85, n)
    scene = {
        "centre": random.uniform(-1, 1, (n, 2)) * (0.95 - size)[:, None],  # x and y
        "size": size,
        "angle": random.uniform(-np.pi / 6, np.pi / 6, n),  # of the shape
        "direction": random.uniform(0, np.pi, n),  # of the texture, as the next three
        "period": random.uniform(0.22, 0.32, n),
        "phase": random.uniform(0, 2 * np.pi, (n, 2)),
        "paint": np.where(swap[:, None, None], np.stack([dark, bright], 1), np.stack([bright, dark], 1)),
        "ink": random.uniform(0, 0.12, (n, 3)),  # of the outline
        "ground": ground,  # the background's two colours
        "shading": random.uniform(0, 2 * np.pi, n),  # direction in which one of them becomes the other
    }
    return SimpleNamespace(**{name: values.astype(np.float32) for name, values in scene.items()})


def _turned(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = _column(np.cos(angle)), _column(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _blend(colours: np.ndarray, weight: np.ndarray) -> np.ndarray:
    first, second = colours[:, None, None, 0], colours[:, None, None, 1]
    return first + (second - first) * weight[..., None]


def _over(colour: np.ndarray, coverage: np.ndarray, below: np.ndarray) -> np.ndarray:
    return below + (colour - below) * coverage[..., None]


def _column(values: np.ndarray) -> np.ndarray:
    return values[:, None, None]


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1, v - 0.32), np.maximum(u - 0.32, v - 1))


DISTANCE = {
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.25,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "triangle": lambda u, v: np.maximum(np.abs(u) * np.float32(np.sqrt(0.75)) - v * 0.5, v) - 0.5,
    "cross": _cross,
}
