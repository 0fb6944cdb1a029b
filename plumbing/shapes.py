"""The embedded dataset: ten shapes drawn by numpy from a seed. No files, a few seconds.

Every image shows five to nine small copies of one shape. The class is the shape. Places, rotations,
sizes, the number of copies and the colour of each copy are drawn independently of it, so raw pixels
say next to nothing about the class: it takes features that do not depend on colour and place. Two
crops of an image share the shape, and most other images do not have it. To tell images apart the
network has to look at the shape. Backgrounds are plain and colours few on purpose. With
`textured=True` every image gets its own texture. The texture is a shortcut: it identifies the image
without a look at the shape, and learning collapses.

This set shows that the code works. It is not a research result.
"""

import numpy as np


def _box(u, v, width, height):
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def _fold(u, v, sides):
    """The point in the wedge around the nearest of `sides` tips: (along the tip, across it)."""
    r, phi = np.hypot(u, v), np.arctan2(v, u)
    phi = (phi + np.pi / sides) % (2 * np.pi / sides) - np.pi / sides
    return r * np.cos(phi), np.abs(r * np.sin(phi))


def _star(u, v):
    along, beside = _fold(u, v, 5)
    x, y = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)  # the valley between two tips; the tip is (1, 0)
    return ((along - 1) * y + beside * (1 - x)) / np.hypot(y, 1 - x)


# A shape is a signed distance in its own frame, (u, v) in units of its radius: negative inside.
DISTANCE = {
    "bar": lambda u, v: _box(u, v, 1.0, 0.22),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.78 - np.hypot(u - 0.42, v)),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.27), _box(u, v, 0.27, 0.95)),
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "dots": lambda u, v: np.hypot(np.abs(u) - 0.56, v) - 0.36,
    "frame": lambda u, v: np.abs(_box(u, v, 0.62, 0.62)) - 0.15,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.17,
    "square": lambda u, v: _box(u, v, 0.74, 0.74),
    "star": _star,
    "triangle": lambda u, v: _fold(u, v, 3)[0] - 0.5,
}
CLASSES = tuple(DISTANCE)


def draw(count: int, seed: int = 0, size: int = 32, textured: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`count` images: uint8 (count, 3, size, size) and labels int64 (count,), classes balanced."""
    rng = np.random.default_rng([seed, count])
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    for start in range(0, count, 500):  # in pieces: the masks are floats
        chosen = labels[start : start + 500]
        images[start : start + len(chosen)] = _draw(chosen, rng, size, textured)
    return images, labels.astype(np.int64)


def _draw(labels: np.ndarray, rng: np.random.Generator, size: int, textured: bool) -> np.ndarray:
    batch, half = len(labels), size / 2
    reach = int(np.ceil(0.37 * half)) + 1  # pixels; no copy goes further from its centre
    column = lambda low, high: rng.uniform(low, high, (batch, 1, 1)).astype(np.float32)  # noqa: E731  (B, 1, 1)
    patch = np.arange(2 * reach)

    paper, dark = _paper(rng, batch)  # (B, 3, 1, 1), (B, 1)
    side = size + 4 * reach  # with a margin, which copies at the border need
    picture = np.broadcast_to(paper.transpose(0, 2, 3, 1), (batch, side, side, 3)).astype(np.float32)
    bare = np.ones((batch, side, side, 1), dtype=np.float32)  # 1 where no copy lies
    copies = rng.integers(5, 10, batch)
    cells = rng.permuted(np.tile(np.arange(9), (batch, 1)), axis=1)[..., None, None]  # of a 3 x 3 grid, copy by copy
    shift_x, shift_y = column(-0.15, 0.15), column(-0.15, 0.15)  # of the whole grid
    for k in range(9):
        # the copy's centre in pixels, and the patch around it
        x = (1 + (cells[:, k] % 3 - 1) * 2 / 3 + column(-0.08, 0.08) + shift_x) * half
        y = (1 + (cells[:, k] // 3 - 1) * 2 / 3 + column(-0.08, 0.08) + shift_y) * half
        left, top = (np.rint(c).astype(int) - reach + patch for c in (x, y))  # (B, 1, P) each
        radius, angle, colour = column(0.24, 0.33) * half, column(0, 2 * np.pi), _ink(rng, dark)
        dx, dy = (left + 0.5 - x) / radius, ((top + 0.5 - y) / radius).swapaxes(1, 2)
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)  # (B, P, P)
        ink = np.zeros((batch, 2 * reach, 2 * reach, 1), dtype=np.float32)
        for c, name in enumerate(CLASSES):
            chosen = (labels == c) & (k < copies)
            edge = 0.5 - DISTANCE[name](u[chosen], v[chosen]) * radius[chosen]  # a pixel wide
            ink[chosen] = edge.clip(0, 1)[..., None]
        place = np.arange(batch)[:, None, None], top.swapaxes(1, 2) + 2 * reach, left + 2 * reach
        picture[place] += (colour.transpose(0, 2, 3, 1) - picture[place]) * ink
        bare[place] *= 1 - ink

    inside = slice(2 * reach, 2 * reach + size)
    picture, bare = (p[:, inside, inside].transpose(0, 3, 1, 2) for p in (picture, bare))
    axis = (np.arange(size, dtype=np.float32) + 0.5) / half - 1  # pixel centres in [-1, 1]
    y, x = np.meshgrid(axis, axis, indexing="ij")  # (S, S)
    return _light(picture, bare, rng, x, y, textured)


def _light(picture, bare, rng: np.random.Generator, x: np.ndarray, y: np.ndarray, textured: bool) -> np.ndarray:
    """A faint gradient of light, a texture where asked, noise: (B, 3, S, S) as uint8."""
    column = lambda: rng.uniform(-0.06, 0.06, (len(picture), 1, 1)).astype(np.float32)  # noqa: E731  (B, 1, 1)
    picture = picture + (column() * x + column() * y)[:, None]
    if textured:
        picture = picture + bare * _texture(rng, len(picture), x, y)
    picture = picture + 0.02 * rng.standard_normal(picture.shape, dtype=np.float32)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def draw_scene(seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image of one to four shapes of any classes, for detection.

    Returns uint8 (3, size, size), labels int64 (M,) and masks bool (M, size, size): the pixels
    whose centres lie in the shape. Shapes are whole and apart: no mask is empty, none overlap.
    """
    rng = np.random.default_rng([seed, size])
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size * 2 - 1  # pixel centres in [-1, 1], (S, S) each
    placed, labels, distances = [], [], []
    for _ in range(rng.integers(1, 5)):
        radius, angle, name = rng.uniform(0.2, 0.42), rng.uniform(0, 2 * np.pi), rng.choice(CLASSES)
        reach = 1.1 * radius  # no shape goes further from its centre
        for centre in rng.uniform(reach - 1, 1 - reach, (50, 2)):
            if all(np.hypot(*(centre - other)) > reach + far for other, far in placed):
                u, v = (x - centre[0]) / radius, (y - centre[1]) / radius  # (S, S)
                u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
                placed.append((centre, reach))
                labels.append(CLASSES.index(name))
                distances.append(DISTANCE[name](u, v) * radius * size / 2)  # in pixels
                break
    distances = np.stack(distances).astype(np.float32)  # (M, S, S)
    ink = np.clip(0.5 - distances.min(0), 0, 1)  # a pixel wide, for smooth outlines
    paper, dark = _paper(rng, 1)
    picture = paper * (1 - ink) + _ink(rng, dark) * ink  # (1, 3, S, S)
    return _light(picture, None, rng, x, y, False)[0], np.array(labels, dtype=np.int64), distances < 0


def _paper(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Light or dark grey, (B, 3, 1, 1), and whether it is dark, (B, 1).

    Few colours on purpose: with any colour allowed, its colours would identify an image, and the
    network would not need the shape. Colour would be the same shortcut as a texture.
    """
    dark = rng.integers(0, 2, (batch, 1))
    paper = np.where(dark, 0.12, 0.88) + rng.uniform(-0.07, 0.07, (batch, 1)) + rng.uniform(-0.03, 0.03, (batch, 3))
    return paper[:, :, None, None], dark


def _ink(rng: np.random.Generator, dark: np.ndarray) -> np.ndarray:
    """One of six inks that stands out from the paper, for each image: (B, 3, 1, 1)."""
    hue = rng.integers(0, 6, dark.shape) + rng.uniform(-0.1, 0.1, dark.shape)  # in sixths of a turn
    position = (hue + np.array([5, 3, 1])) % 6  # R, G, B
    full = 1 - np.clip(np.minimum(position, 4 - position), 0, 1)
    ink = np.where(dark, 0.45 + 0.5 * full, 0.1 + 0.5 * full) + rng.uniform(-0.05, 0.05, dark.shape)
    return ink[:, :, None, None]


def _texture(rng: np.random.Generator, batch: int, x: np.ndarray, y: np.ndarray, waves: int = 6) -> np.ndarray:
    """A sum of waves with random directions and colours, (B, 3, S, S): no two images share it."""
    frequency = rng.uniform(-12, 12, (2, waves, batch, 1, 1, 1))
    phase, strength = rng.uniform(0, 2 * np.pi, (waves, batch, 1, 1, 1)), rng.normal(0, 0.12, (waves, batch, 3, 1, 1))
    return (strength * np.sin(frequency[0] * x + frequency[1] * y + phase)).sum(0)
