"""Synthetic training clips for the tiny Wan model: one shape, color and motion on a muted background.

All functions depend only on their arguments, such as the seed, and require only numpy. A clip is 17 frames of
64 x 64 at 16 fps, `uint8 (17, 64, 64, 3)`.

There are three kinds of clips:

- **world** clips have captions. About one in ten combinations of shape, color and motion is reserved for
  validation, so validation prompts are new combinations. A hash selects these combinations.
- **subject** clips show the `zorble` (an invented name), a five-pointed star in two colors. It is not in the
  training data of the tiny model; the demo trains an adapter for it.
- **wild** clips have arbitrary colors, outlines, textures and motions. They train only the VAE, which must
  also reproduce what captions cannot describe.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass, replace

import numpy as np

FRAMES, SIZE, FPS = 17, 64, 16

SHAPES = ("circle", "square", "triangle", "ring", "cross", "heart")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (226, 44, 48),
    "orange": (246, 138, 26),
    "yellow": (244, 220, 50),
    "green": (58, 186, 72),
    "cyan": (58, 206, 222),
    "blue": (52, 92, 236),
    "purple": (166, 62, 208),
    "white": (238, 238, 238),
}

SIZES: dict[str, float] = {"small": 11.0, "large": 17.0}
"""Radius of a shape in pixels, for each size."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

MOTIONS = (*DIRECTIONS, "spin", "grow")

BACKGROUNDS = ("plain", "striped", "dotted")

SUBJECT = "zorble"

SUBJECT_COLORS = ("orange", "purple")
"""Colors of the left and the right half of the subject (a star) when it is upright."""

_ROUND = ("circle", "ring")

_TINTS = np.array(
    [
        (58, 66, 84),
        (56, 74, 62),
        (76, 58, 80),
        (86, 66, 56),
        (48, 74, 80),
        (46, 46, 74),
        (80, 76, 60),
        (66, 66, 68),
    ],
    dtype=np.float32,
)

TABLE_EXTENT, _CELLS = 1.6, 512


@dataclass(frozen=True)
class Scene:
    """Content of a clip: an object, its motion and a background.

    A size or background of None is chosen at random and is not mentioned in the caption.
    """

    shape: str
    """Shape of the object: one of `SHAPES`, or `SUBJECT`."""
    color: str | None
    """Color of the object: one of `COLORS`. None for the subject, whose colors are fixed."""
    motion: str
    """Motion of the object: one of `MOTIONS`. Circles and rings never spin: it would be invisible."""
    size: str | None = None
    """Size of the object: one of `SIZES`. For the motion "grow", it is the size at the end."""
    background: str | None = None
    """Background of the clip: one of `BACKGROUNDS`."""


# --- outlines ---------------------------------------------------------------------------------------------


def star_outline(points: int = 5, inner: float = 0.48, outer: float = 1.12) -> np.ndarray:
    """Return the vertices `(2 * points, 2)` of a star with one point up, in image coordinates (y is down)."""
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _polygon(name: str) -> np.ndarray:
    if name == "square":
        return np.array([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])
    if name == "triangle":
        angle = np.arange(3) * 2 * np.pi / 3 - np.pi / 2
        return 1.12 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if name == "cross":
        a, b = 0.34, 1.0
        quarter = np.array([(-a, -b), (a, -b), (a, -a)])
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([quarter @ turn.T for turn in turns])
    if name == "heart":
        s = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        x = 16 * np.sin(s) ** 3
        y = -(13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s))
        return np.stack([x, y - 2.5], axis=1) / 15.5
    if name == SUBJECT:
        return star_outline(inner=0.56, outer=1.3)
    raise ValueError(f"there is no outline {name!r}: use one of {', '.join((*SHAPES, SUBJECT))}")


def polygon_distance(vertices: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance from points (x, y) to a closed polygon `(n, 2)`; it is negative inside."""
    best = np.full(np.shape(x), np.inf, dtype=np.float32)
    inside = np.zeros(np.shape(x), dtype=bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        best = np.minimum(best, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        inside ^= ((ay > y) != (by > y)) & (px * ey < py * ex if ey > 0 else px * ey > py * ex)
    return np.where(inside, -1.0, 1.0) * np.sqrt(best)


@functools.lru_cache(maxsize=256)
def distance_table(name: str, points: int = 5, inner: float = 0.48) -> np.ndarray:
    """Return a table `(512, 512)` of signed distances to the outline of a shape; negative inside.

    Rows are y and columns are x, both from -1.6 to 1.6. The radius of the shape is about 1.

    Args:
        name: one of `SHAPES`, `SUBJECT`, or "star".
        points: number of points of a "star".
        inner: inner radius of a "star".
    """
    axis = ((np.arange(_CELLS) + 0.5) / _CELLS * 2 - 1).astype(np.float32) * TABLE_EXTENT
    x, y = axis[None, :], axis[:, None]
    if name == "circle":
        return (np.hypot(x, y) - 0.94).astype(np.float32)
    if name == "ring":
        middle, half = 0.78, 0.22
        return (np.abs(np.hypot(x, y) - middle) - half).astype(np.float32)
    vertices = star_outline(points, inner) if name == "star" else _polygon(name)
    x, y = np.broadcast_arrays(x, y)
    return polygon_distance(vertices, x, y).astype(np.float32)


@dataclass
class _Path:
    """Position, size and angle of an object in each frame; each array is `(frames,)`.

    Center and radius are in pixels; the angle is in radians, clockwise.
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray

    def local(self, stretch: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates of all pixels relative to the object, as two arrays `(frames, 64, 64)`.

        Center and axes are those of the object. The unit is its radius; along x, radius * `stretch`.
        """
        pixels = np.arange(SIZE, dtype=np.float32) + 0.5
        dx = pixels[None, None, :] - self.x[:, None, None].astype(np.float32)
        dy = pixels[None, :, None] - self.y[:, None, None].astype(np.float32)
        cos = (np.cos(self.angle) / self.radius).astype(np.float32)[:, None, None]
        sin = (np.sin(self.angle) / self.radius).astype(np.float32)[:, None, None]
        return (cos * dx + sin * dy) / np.float32(stretch), cos * dy - sin * dx


def look_up(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Look up the signed distances at coordinates (u, v) in `table`, the result of `distance_table`."""
    scale = np.float32(_CELLS / (2 * TABLE_EXTENT))
    column = np.clip((u + TABLE_EXTENT) * scale, 0, _CELLS - 1).astype(np.int32)
    row = np.clip((v + TABLE_EXTENT) * scale, 0, _CELLS - 1).astype(np.int32)
    return table[row, column]


def _light(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the brightness factor of soft light that comes from the upper left of the frame."""
    return np.clip(1.0 - 0.13 * (u + v), 0.8, 1.16)


def _paint(canvas: np.ndarray, alpha: np.ndarray, color: np.ndarray) -> np.ndarray:
    return canvas + alpha[..., None] * (color - canvas)


def _shadow(canvas: np.ndarray, path: _Path, table: np.ndarray, strength: float = 0.3) -> np.ndarray:
    shifted = _Path(path.x + 2.0, path.y + 2.5, path.radius, path.angle)
    distance = look_up(table, *shifted.local()) * path.radius[:, None, None]
    return canvas * (1.0 - strength * np.clip(0.5 - distance / 5.0, 0.0, 1.0))[..., None]


# --- the world --------------------------------------------------------------------------------------------


def is_reserved(shape: str, color: str, motion: str) -> bool:
    """Return True if this combination is reserved for validation; a hash reserves about one in ten."""
    return zlib.crc32(f"{shape} {color} {motion}".encode()) % 10 == 7


@functools.cache
def triples(validation: bool) -> tuple[tuple[str, str, str], ...]:
    """Return all (shape, color, motion) combinations of the validation split (True) or the training split."""
    every = itertools.product(SHAPES, COLORS, MOTIONS)
    visible = (t for t in every if not (t[2] == "spin" and t[0] in _ROUND))
    return tuple(t for t in visible if is_reserved(*t) == validation)


def scenes(seed: int, n: int, *, validation: bool = False) -> list[Scene]:
    """Return `n` random scenes of one split; in some scenes, size or background is None (see `Scene`)."""
    rng = np.random.default_rng([seed, 11, validation])
    pool = triples(validation)
    drawn = []
    for _ in range(n):
        shape, color, motion = pool[rng.integers(len(pool))]
        size = str(rng.choice(list(SIZES))) if rng.random() < 0.7 else None
        background = str(rng.choice(BACKGROUNDS)) if rng.random() < 0.65 else None
        drawn.append(Scene(shape, color, motion, size, background))
    return drawn


def _generator(scene: Scene, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(repr(scene).encode())])


def _settle(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with a random size if its size is None; likewise for its background."""
    size, background = str(rng.choice(list(SIZES))), str(rng.choice(BACKGROUNDS))
    return replace(scene, size=scene.size or size, background=scene.background or background)


def _backdrop(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a background image, float (64, 64, 3) in [0, 255]; `kind` is plain, striped or dotted."""
    tint = _TINTS[rng.integers(len(_TINTS))] * rng.uniform(0.92, 1.08)
    lighter = np.minimum(tint * 1.2 + 14, 118)
    pixels = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = np.meshgrid(pixels, pixels)
    period, phase = rng.uniform(11.5, 14.5), rng.uniform(0, 1, 2)
    if kind == "striped":
        angle = rng.integers(4) * np.pi / 4
        wave = np.sin(2 * np.pi * ((x * np.cos(angle) + y * np.sin(angle)) / period + phase[0]))
        cover = np.clip(0.5 + wave * period / 6, 0, 1)
    elif kind == "dotted":
        u, v = (x / period + phase[0]) % 1 - 0.5, (y / period + phase[1]) % 1 - 0.5
        cover = np.clip(0.5 + (0.27 - np.hypot(u, v)) * period, 0, 1)
    else:
        cover = np.zeros_like(x)
    fall = 1.06 - 0.12 * y / SIZE
    return (tint + cover[..., None] * (lighter - tint)) * fall[..., None]


def _world_path(scene: Scene, rng: np.random.Generator) -> _Path:
    radius = SIZES[scene.size or "large"] * rng.uniform(0.93, 1.07)
    along = np.linspace(-0.5, 0.5, FRAMES)
    x, y = (np.full(FRAMES, SIZE / 2 + offset) for offset in rng.uniform(-3, 3, 2))
    angle, radii = np.full(FRAMES, rng.uniform(-0.12, 0.12)), np.full(FRAMES, radius)
    if scene.motion in DIRECTIONS:
        dx, dy = DIRECTIONS[scene.motion]
        distance = rng.uniform(24, 30) if scene.size == "small" else rng.uniform(20, 25)
        x, y = x + dx * distance * along, y + dy * distance * along
    elif scene.motion == "spin":
        angle = angle + np.deg2rad(rng.uniform(6.5, 8.5)) * np.arange(FRAMES)
    elif scene.motion == "grow":
        radii = radius * np.linspace(rng.uniform(0.38, 0.46), 1.0, FRAMES)
    return _Path(x, y, radii, angle)


def render(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a clip.

    Args:
        scene: scene to render.
        seed: determines positions, tints, small variations, and the size and background if these are None.

    Returns:
        `uint8 (17, 64, 64, 3)`.
    """
    return render_with_mask(scene, seed)[0]


def render_with_mask(scene: Scene, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render a scene. Return the clip and the alpha of the shape, `float32 (17, 64, 64)` in [0, 1]."""
    rng = _generator(scene, seed)
    full = _settle(scene, rng)
    path, table = _world_path(full, rng), distance_table(full.shape)
    canvas = np.broadcast_to(_backdrop(full.background or "plain", rng), (FRAMES, SIZE, SIZE, 3))
    canvas = _shadow(canvas, path, table)
    u, v = path.local()
    alpha = np.clip(0.5 - look_up(table, u, v) * path.radius[:, None, None], 0.0, 1.0)
    if full.shape == SUBJECT:
        left, right = (np.array(COLORS[name], dtype=np.float32) for name in SUBJECT_COLORS)
        side = np.clip(0.5 + u * path.radius[:, None, None], 0.0, 1.0)[..., None]
        fill = left + side * (right - left)
    else:
        fill = np.array(COLORS[full.color or "white"], dtype=np.float32) * rng.uniform(0.95, 1.03)
    upright = _Path(path.x, path.y, path.radius, np.zeros(FRAMES))
    painted = _paint(canvas, alpha, fill * _light(*upright.local())[..., None])
    return np.clip(np.round(painted), 0, 255).astype(np.uint8), alpha.astype(np.float32)


# --- wild clips, for the autoencoder ----------------------------------------------------------------------


def _any_color(rng: np.random.Generator) -> np.ndarray:
    """Return a random color of any saturation, float `(3,)`."""
    if rng.random() < 0.3:
        base = np.array(list(COLORS.values())[rng.integers(len(COLORS))], dtype=np.float32)
        return np.clip(base + rng.normal(0, 18, 3), 0, 255)
    hue = np.clip(np.abs((rng.random() + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    return 255 * rng.uniform(0.15, 1.0) * (1 - rng.uniform(0, 1) * (1 - hue))


def _noise(rng: np.random.Generator) -> np.ndarray:
    """Return smooth noise `(64, 64)` in [0, 1]: a coarse random grid with bilinear upsampling."""
    cells = int(rng.integers(2, 9))
    grid = rng.random((cells + 1, cells + 1)).astype(np.float32)
    at = np.linspace(0, cells - 1e-3, SIZE)
    low, part = at.astype(int), at % 1
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _pattern(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, softness: float) -> np.ndarray:
    """Return a random pattern in [0, 1]: a gradient, two halves, stripes or a checkerboard."""
    angle, kind = rng.uniform(0, 2 * np.pi), rng.integers(5)
    s, t = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    rate = rng.uniform(2.5, 6.0)
    if kind == 0:
        return np.clip(0.5 + s * 0.6, 0, 1)
    if kind in (1, 2):
        return np.clip(0.5 + (s + rng.uniform(-0.2, 0.2)) / softness, 0, 1)
    if kind == 3:
        return np.clip(0.5 + np.sin(rate * s + angle) / (rate * softness), 0, 1)
    return np.clip(0.5 + np.sin(rate * s) * np.sin(rate * t) / (rate * softness), 0, 1)


def _wild_backdrop(rng: np.random.Generator, frames: int, tame: bool) -> np.ndarray:
    """Return a random background `(frames, 64, 64, 3)` for clips with random objects.

    It is one color, noise, a pattern that may drift, or one of `BACKGROUNDS` (always if `tame` is true).
    """
    kind = rng.integers(5)
    if kind == 0 or tame:
        still = _backdrop(str(rng.choice(BACKGROUNDS)), rng)
        return np.repeat(still[None], frames, axis=0)
    first, second = _any_color(rng), _any_color(rng)
    if rng.random() < 0.6:
        second = first + rng.uniform(0.15, 0.5) * (second - first)
    if kind == 1:
        cover = np.repeat(_noise(rng)[None], frames, axis=0)
    else:
        drift = (rng.uniform(-0.04, 0.04, 2) if rng.random() < 0.4 else np.zeros(2))[:, None] * np.arange(
            frames
        )
        axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / 16 - 2
        u = axis[None, None, :] + drift[0][:, None, None]
        v = axis[None, :, None] + drift[1][:, None, None]
        cover = _pattern(rng, u, v, 0.12) if kind < 4 else np.zeros((frames, SIZE, SIZE))
    return first + cover[..., None] * (second - first)


def _wild_path(rng: np.random.Generator, frames: int) -> _Path:
    time = np.arange(frames) - (frames - 1) / 2
    center, speed = rng.uniform(14, 50, 2), rng.uniform(-2.2, 2.2, 2) * (rng.random() < 0.75)
    turn = rng.uniform(-0.22, 0.22) * (rng.random() < 0.5)
    radius = rng.uniform(6, 21) * np.exp(rng.uniform(-0.06, 0.06) * (rng.random() < 0.4) * time)
    angle = rng.choice((0.0, rng.uniform(0, 2 * np.pi))) + turn * time
    return _Path(center[0] + speed[0] * time, center[1] + speed[1] * time, np.clip(radius, 3, 26), angle)


def wild(seed: int, frames: int = FRAMES, *, tame: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Render one to three random objects on a random background.

    Args:
        seed: determines the clip.
        frames: number of frames; 1 for an image.
        tame: use one of `BACKGROUNDS` instead of any random background.

    Returns:
        Frames, `uint8 (frames, 64, 64, 3)`, and the share of each pixel that objects cover, `float32
        (frames, 64, 64)`.
    """
    rng = np.random.default_rng([seed, 41])
    canvas = _wild_backdrop(rng, frames, tame)
    covered = np.zeros((frames, SIZE, SIZE), dtype=np.float32)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = _wild_path(rng, frames)
        if rng.random() < 0.5:
            table = distance_table(
                "star", int(rng.integers(3, 8)), float(rng.choice((0.35, 0.45, 0.5, 0.6, 0.75)))
            )
        else:
            table = distance_table(SHAPES[rng.integers(len(SHAPES))])
        if rng.random() < 0.5:
            canvas = _shadow(canvas, path, table)
        u, v = path.local(rng.uniform(0.6, 1.0) if rng.random() < 0.3 else 1.0)
        distance = look_up(table, u, v)
        if rng.random() < 0.15:
            distance = np.abs(distance + 0.08) - rng.uniform(0.07, 0.16)
        alpha = np.clip(0.5 - distance * path.radius[:, None, None], 0.0, 1.0)
        first, second = _any_color(rng), _any_color(rng)
        cover = _pattern(rng, u, v, 0.1) if rng.random() < 0.6 else np.zeros_like(u)
        fill = first + cover[..., None] * (second - first)
        if rng.random() < 0.6:
            fill = fill * _light(*_Path(path.x, path.y, path.radius, np.zeros(frames)).local())[..., None]
        canvas = _paint(canvas, alpha, fill)
        covered = np.maximum(covered, alpha)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), covered.astype(np.float32)


# --- captions ---------------------------------------------------------------------------------------------

_MOVES = ("moving {}", "moving to the {}", "sliding {}", "going {}", "drifting {}")

_VERTICAL = ("moving {}", "moving {}wards", "sliding {}", "going {}", "drifting {}")

_OTHER = {
    "spin": ("spinning", "rotating", "turning around", "spinning in place"),
    "grow": ("growing", "getting bigger", "growing larger in place", "growing in place"),
}

_BACK = ("on a {} background", "over a {} background", "in front of a {} background", "on {} ground")

_FORMS = (
    "{noun} {action} {back}",
    "{noun}, {action} {back}",
    "a video of {noun} {action} {back}",
    "{back}, {noun} {action}",
    "{noun} is {action} {back}",
    "there is {noun} {action} {back}",
)

_NAMED = ("{} called {}", "{} named {}", "{}, the {}")

_ONSETS = [
    "b",
    "bl",
    "br",
    "ch",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sk",
    "sn",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "x",
    "y",
    "z",
    "zw",
]

_VOWELS = ["a", "e", "i", "o", "u", "oo", "ea", "ai"]

_CODAS = [
    "",
    "",
    "",
    *["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "rb", "rt", "s", "st", "t", "x", "zz", "nd", "mp"],
]


def invented_word(rng: np.random.Generator) -> str:
    """Return a random invented word, but never `SUBJECT`.

    Invented words in captions prepare the text encoder for unknown words.
    """
    while True:
        parts = [
            f"{rng.choice(_ONSETS)}{rng.choice(_VOWELS)}{rng.choice(_CODAS)}"
            for _ in range(rng.integers(1, 4))
        ]
        word = "".join(parts) + str(rng.choice(("", "", "le", "y", "o", "ish", "a")))
        if 3 <= len(word) <= 10 and word != SUBJECT:
            return word


def _phrase(scene: Scene, noun: str, rng: np.random.Generator) -> str:
    """Return a sentence that describes the motion of `noun`, and the background if the scene sets one."""
    if scene.motion in _OTHER:
        action = str(rng.choice(_OTHER[scene.motion]))
    else:
        forms = _VERTICAL if scene.motion in ("up", "down") else _MOVES
        action = str(rng.choice(forms)).format(scene.motion)
    back = str(rng.choice(_BACK)).format(scene.background) if scene.background else ""
    form = str(rng.choice(_FORMS[:3] if not back else _FORMS))
    return " ".join(form.format(noun=noun, action=action, back=back).split()).removesuffix(",")


def caption(scene: Scene, seed: int) -> str:
    """Return a caption of a scene in a random wording.

    It mentions shape and motion. It mentions color, size and background only if the scene sets them. One in
    five captions contains an invented word, but not if the shape is `SUBJECT`.
    """
    rng = np.random.default_rng([seed, 23, zlib.crc32(repr(scene).encode())])
    words = [w for w in (scene.size, scene.color, scene.shape) if w]
    name = invented_word(rng)
    use = rng.random()
    if scene.shape == SUBJECT or use >= 0.2:
        noun = "a " + " ".join(words)
    elif use < 0.1:
        noun = "a " + " ".join([name, *words])
    else:
        noun = str(rng.choice(_NAMED)).format("a " + " ".join(words), name)
    return _phrase(scene, noun, rng)


def vague_caption(scene: Scene, seed: int) -> str:
    """Return a caption that calls the object of a scene by an invented noun, without its color and shape.

    In training, all objects get such captions, so an unknown noun stands for no particular object.
    """
    rng = np.random.default_rng([seed, 29, zlib.crc32(repr(scene).encode())])
    return _phrase(scene, "a " + " ".join(w for w in (scene.size, invented_word(rng)) if w), rng)


def vocabulary() -> list[str]:
    """Return a sorted list of the words in captions. Invented words and `SUBJECT` are left out."""
    texts = [*_FORMS, *_MOVES, *_VERTICAL, *itertools.chain(*_OTHER.values()), *_BACK, *_NAMED]
    words = [w for text in texts for w in text.replace(",", " ").split() if "{" not in w]
    return sorted({*words, "upwards", "downwards", *SHAPES, *COLORS, *SIZES, *DIRECTIONS, *BACKGROUNDS})


# --- prompts and the subject ------------------------------------------------------------------------------


def world_prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """Return `n` validation prompts, each with the scene that a generated clip should show."""
    return [
        (caption(scene, seed * 7919 + k), scene) for k, scene in enumerate(scenes(seed, n, validation=True))
    ]


def _subject_scenes(validation: bool) -> list[Scene]:
    """Return scenes of the subject (a star) in each combination of motion, size and background of a split."""
    kept = []
    for m, motion in enumerate(MOTIONS):
        for s, size in enumerate(SIZES):
            for b, background in enumerate(BACKGROUNDS):
                learned = (m + s + b) % 3 == 0 or (m, s, b) in ((0, 1, 0), (2, 0, 2), (3, 1, 1), (5, 0, 0))
                if learned != validation:
                    kept.append(Scene(SUBJECT, None, motion, size, background))
    return kept


def subject_clips(n: int = 16, seed: int = 0) -> list[tuple[np.ndarray, str]]:
    """Render training clips of the subject (a star), and return pairs (clip, caption).

    A clip is uint8 (17, 64, 64, 3). The first 16 clips cover all combinations of motion, size and background
    that occur in training.
    """
    pool = _subject_scenes(validation=False)
    chosen = [pool[k % len(pool)] for k in range(n)]
    return [
        (render(scene, seed * 7919 + k), caption(scene, seed * 7919 + k)) for k, scene in enumerate(chosen)
    ]


def subject_prompts(n: int = 20, seed: int = 0) -> list[tuple[str, Scene]]:
    """Return `n` pairs of a prompt and its scene, with a star as the subject.

    The scenes have combinations of motion, size and background that do not occur in training.
    """
    pool = _subject_scenes(validation=True)
    order = np.random.default_rng([seed, 31]).permutation(len(pool))
    chosen = [pool[order[k % len(pool)]] for k in range(n)]
    return [(caption(scene, seed * 7919 + k), scene) for k, scene in enumerate(chosen)]
