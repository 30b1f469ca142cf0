"""Synthetic transparent clips for the RGBA VAE of the tiny Wan model, and for `inlaid demo --alpha`.

A clip is straight RGBA, `uint8 (17, 64, 64, 4)`, and depends only on its seed. Color is defined everywhere:
pixels with alpha 0 continue the color of the nearest object. As in `inlaid.tiny.world`, there are three kinds
of clips:

- **world** clips: one moving shape of one color, made of one of `MATERIALS`;
- **subject** clips: the `zorble` (an invented name), a star whose orange half is opaque and whose purple half
  is semi-transparent like glass;
- **wild** clips: several objects with patterns in color and alpha, outlines, glows and smoke. They train the
  RGBA VAE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from inlaid.tiny import world
from inlaid.tiny.world import (
    COLORS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIZE,
    SIZES,
    SUBJECT,
    SUBJECT_COLORS,
    TABLE_EXTENT,
    Scene,
    _Path,
)

MATERIALS = ("solid", "glass", "soft", "glowing")
"""Materials of an object. `solid` is opaque with an edge of one pixel, and `glass` is semi-transparent with
an opaque rim. `soft` is opaque with a wide soft edge, and `glowing` is opaque with a halo."""

GLASS = 0.55
"""Alpha of the purple half of the subject (a two-colored star), in [0, 1]."""

BACKDROP = (62, 66, 70)
"""Dark RGB background color that contrasts with every color in `COLORS`."""


@dataclass(frozen=True)
class Clip:
    """Transparent clip with its caption and the scene that it shows."""

    frames: np.ndarray
    """Frames of the clip, straight RGBA, uint8 (17, 64, 64, 4)."""
    caption: str
    scene: Scene


def _matte(material: str, distance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the alpha of an object, in [0, 1].

    `distance` is the signed distance of each pixel to the object's outline, in pixels, negative inside.
    """
    sharp = np.clip(0.5 - distance, 0, 1)
    if material == "glass":
        body, rim = rng.uniform(0.3, 0.7), rng.uniform(1.5, 2.5)
        return sharp * (body + (0.95 - body) * np.clip(1.5 + (distance + rim), 0, 1))
    if material == "soft":
        return np.clip(0.5 - distance / rng.uniform(4, 7), 0, 1)
    if material == "glowing":
        halo = rng.uniform(0.35, 0.6) * np.exp(-np.maximum(distance, 0) / rng.uniform(2.0, 3.5))
        return np.maximum(sharp, np.where(halo > 0.02, halo, 0))
    return sharp


def _distance(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Look up the signed distances at coordinates (u, v) in `table`.

    Distances beyond the edge of the table are extrapolated.
    """
    outside = np.hypot(*(np.maximum(np.abs(each) - TABLE_EXTENT, 0) for each in (u, v)))
    return world.look_up(table, u, v) + outside


def _stack(under: np.ndarray, alpha: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Composite an object over straight RGBA frames.

    Args:
        under: straight RGBA, float (t, h, w, 4), with alpha in [0, 1].
        alpha: alpha of the object, (t, h, w).
        color: color of the object, (t, h, w, 3).

    Returns:
        Straight RGBA, float (t, h, w, 4).
    """
    below = under[..., 3] * (1 - alpha)
    total = alpha + below
    mixed = (color * alpha[..., None] + under[..., :3] * below[..., None]) / np.maximum(total, 1e-6)[
        ..., None
    ]
    return np.concatenate([np.where(total[..., None] > 0, mixed, under[..., :3]), total[..., None]], axis=-1)


def _pixels(canvas: np.ndarray) -> np.ndarray:
    scaled = canvas * np.array([1, 1, 1, 255], dtype=np.float32)
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def render(scene: Scene, seed: int, material: str = "solid") -> np.ndarray:
    """Render a scene as straight RGBA without its background: `uint8 (17, 64, 64, 4)`.

    Args:
        scene: scene to render.
        seed: determines positions, small variations, and all values that are None in the scene.
        material: one of `MATERIALS`; ignored if the shape is the `zorble`.
    """
    rng = world._generator(scene, seed)
    full = world._settle(scene, rng)
    path, table = world._world_path(full, rng), world.distance_table(full.shape)
    return _pixels(
        _subject(path, table) if full.shape == SUBJECT else _object(full, path, table, material, rng)
    )


def _subject(path: _Path, table: np.ndarray) -> np.ndarray:
    u, v = path.local()
    alpha = np.clip(0.5 - world.look_up(table, u, v) * path.radius[:, None, None], 0, 1)
    side = np.clip(0.5 + u * path.radius[:, None, None], 0, 1)
    left, right = (np.array(COLORS[name], dtype=np.float32) for name in SUBJECT_COLORS)
    color = (left + side[..., None] * (right - left)) * _lit(path)
    return np.concatenate([color, (alpha * (1 - side * (1 - GLASS)))[..., None]], axis=-1)


def _object(
    scene: Scene, path: _Path, table: np.ndarray, material: str, rng: np.random.Generator
) -> np.ndarray:
    distance = _distance(table, *path.local()) * path.radius[:, None, None]
    fill = np.array(COLORS[scene.color or "white"], dtype=np.float32) * rng.uniform(0.95, 1.03)
    alpha = _matte(material, distance, rng)
    return np.concatenate([fill * _lit(path), alpha[..., None]], axis=-1)


def _lit(path: _Path) -> np.ndarray:
    upright = _Path(path.x, path.y, path.radius, np.zeros(len(path.x)))
    return world._light(*upright.local())[..., None]


def clips(seed: int, n: int, *, validation: bool = False) -> list[Clip]:
    """Render `n` transparent clips of random scenes.

    Captions contain the word "transparent", and name the material unless it is solid.
    """
    made = []
    for k, drawn in enumerate(world.scenes(seed, n, validation=validation)):
        scene = replace(drawn, background="transparent")
        material = MATERIALS[np.random.default_rng([seed, k, 67]).integers(len(MATERIALS))]
        own = seed * 7919 + k
        made.append(
            Clip(
                render(replace(scene, background="plain"), own, material),
                caption(scene, own, material),
                scene,
            )
        )
    return made


def caption(scene: Scene, seed: int, material: str = "solid") -> str:
    """Return a caption that names the material before the shape, such as "glass circle".

    The material "solid" is not mentioned.
    """
    text = world.caption(scene, seed)
    return text if material == "solid" else text.replace(scene.shape, f"{material} {scene.shape}", 1)


def subject_clips(n: int = 16, seed: int = 0) -> list[Clip]:
    """Render training clips of the subject, a two-colored star.

    The first 12 clips cover all combinations of motion and size.
    """
    return [_of_subject(scene, seed * 7919 + k) for k, scene in enumerate(_scenes(n))]


def subject_prompts(n: int = 20, seed: int = 0) -> list[tuple[str, Scene]]:
    """Return prompts for the subject, a two-colored star, each with the scene that it describes.

    The scenes are those of the training clips. The wording is random, and usually not that of a training
    caption.
    """
    return [(caption(s, seed * 7919 + 101 + k), s) for k, s in enumerate(_scenes(n))]


def world_prompts(n: int, seed: int) -> list[tuple[str, Scene]]:
    """Return `n` validation prompts for transparent clips, each with its scene.

    Their combinations of shape, color and motion do not occur in training.
    """
    drawn = [replace(s, background="transparent") for s in world.scenes(seed, n, validation=True)]
    return [(caption(scene, seed * 7919 + k), scene) for k, scene in enumerate(drawn)]


def _scenes(n: int) -> list[Scene]:
    every = [Scene(SUBJECT, None, m, s, "transparent") for m in MOTIONS for s in SIZES]
    return [every[k % len(every)] for k in range(n)]


def _of_subject(scene: Scene, seed: int) -> Clip:
    return Clip(render(replace(scene, background="plain"), seed), caption(scene, seed), scene)


# --- wild clips, for the RGBA VAE -------------------------------------------------------------------------


def wild(seed: int, frames: int = FRAMES) -> np.ndarray:
    """Render a transparent clip of one to three random objects with random alpha.

    Returns:
        Straight RGBA, `uint8 (frames, 64, 64, 4)`.
    """
    rng = np.random.default_rng([seed, 43])
    canvas = np.zeros((frames, SIZE, SIZE, 4), dtype=np.float32)
    canvas[..., :3] = world._any_color(rng)
    for k in range(rng.choice((1, 1, 1, 2, 3))):
        path = world._wild_path(rng, frames)
        u, v = path.local(rng.uniform(0.6, 1.0) if rng.random() < 0.3 else 1.0)
        first, second = world._any_color(rng), world._any_color(rng)
        cover = world._pattern(rng, u, v, 0.1) if rng.random() < 0.6 else np.zeros_like(u)
        color = first + cover[..., None] * (second - first)
        if rng.random() < 0.6:
            color = color * _lit(path)
        alpha = _wild_matte(rng, path, u, v)
        if k == 0:
            canvas[..., :3] = color
        canvas = _stack(canvas, alpha.astype(np.float32), np.clip(color, 0, 255))
    return _pixels(canvas)


def _wild_matte(rng: np.random.Generator, path: _Path, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if rng.random() < 0.15:  # smoke: a blob modulated by noise
        noise = world._noise(rng)
        cloud = np.exp(-1.6 * (u * u + v * v)) * (0.4 + 1.1 * noise[None]) * rng.uniform(0.5, 1.0)
        return np.clip(cloud - 0.04, 0, 1)
    if rng.random() < 0.5:
        star = "star", int(rng.integers(3, 8)), float(rng.choice((0.35, 0.45, 0.5, 0.6, 0.75)))
        table = world.distance_table(*star)
    else:
        table = world.distance_table(SHAPES[rng.integers(len(SHAPES))])
    distance = _distance(table, u, v)
    if rng.random() < 0.12:
        distance = np.abs(distance + 0.08) - rng.uniform(0.09, 0.18)
    alpha = _matte(MATERIALS[rng.integers(len(MATERIALS))], distance * path.radius[:, None, None], rng)
    if rng.random() < 0.4:  # a pattern in alpha: two halves, stripes, a gradient
        low = rng.uniform(0.2, 0.8)
        alpha = alpha * (1 - (1 - low) * world._pattern(rng, u, v, 0.1))
    return alpha


def halves(seed: int, frames: int = FRAMES) -> np.ndarray:
    """Render a shape with two halves: `uint8 (frames, 64, 64, 4)`.

    The halves have different colors, and the alpha of each half is random. The shape is never a five-pointed
    star, because the demo trains this star as a new subject.
    """
    rng = np.random.default_rng([seed, 61])
    path = world._wild_path(rng, frames)
    path.radius[:] = path.radius * rng.uniform(9, 18) / path.radius.mean()
    if rng.random() < 0.5:
        table = world.distance_table(
            "star", int(rng.choice((3, 4, 6, 7))), float(rng.choice((0.35, 0.45, 0.6)))
        )
    else:
        table = world.distance_table(SHAPES[rng.integers(len(SHAPES))])
    u, v = path.local()
    alpha = np.clip(0.5 - _distance(table, u, v) * path.radius[:, None, None], 0, 1)
    turned = rng.uniform(0, 2 * np.pi)
    side = np.clip(0.5 + (u * np.cos(turned) + v * np.sin(turned)) * path.radius[:, None, None], 0, 1)
    names = rng.choice(list(COLORS), 2, replace=False)
    first, second = (np.array(COLORS[n], dtype=np.float32) * rng.uniform(0.9, 1.05) for n in names)
    one, two = (1.0 if rng.random() < 0.5 else rng.uniform(0.3, 0.8) for _ in range(2))
    color = (first + side[..., None] * (second - first)) * _lit(path)
    return _pixels(np.concatenate([color, (alpha * (one + side * (two - one)))[..., None]], axis=-1))


def training(seed: int, frames: int = FRAMES, share: float = 0.0) -> np.ndarray:
    """Render a random training clip for the RGBA VAE.

    With probability `share`, the clip shows a shape whose halves differ in color and alpha (`halves`). Half
    of the other clips show random objects (`wild`). Most of the rest show one shape, as in `render`. A few
    are fully opaque or empty.

    Args:
        seed: determines the clip.
        frames: number of frames.
        share: probability from 0 to 1.
    """
    rng = np.random.default_rng([seed, 47])
    kind = rng.random()
    if rng.random() < share:
        return halves(seed, frames)
    if kind < 0.5:
        return wild(seed, frames)
    start = int(rng.integers(FRAMES - frames + 1))
    if kind < 0.53:
        opaque = world.render(world.scenes(seed, 1)[0], seed)[start : start + frames]
        return np.concatenate([opaque, np.full((*opaque.shape[:3], 1), 255, np.uint8)], axis=-1)
    material = MATERIALS[rng.integers(len(MATERIALS))]
    frames_ = render(replace(world.scenes(seed, 1)[0], background="plain"), seed, material)
    if kind < 0.54:
        frames_[..., 3] = 0
    return frames_[start : start + frames]
