"""Synthetic scenes for the tiny MIDI model: colored objects on a floor, with images and exact surfaces.

An object consists of solids with exact signed distances. Images, object IDs and surface points are
computed with these distances. All results depend only on the arguments, such as the seed. No scene in the
training data of the tiny model contains a table. The demo trains an adapter for tables.

The coordinate frame of a scene does not rotate with the camera, so an image alone does not determine the
positions of the objects. The azimuth of the camera is therefore nearly fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from inlaid.files import atomic
from inlaid.media.meshes import LONGEST, POINTS
from inlaid.tiny.midi_solids import Solid, Thing, bounds, distance, moved, surface

KINDS = ("box", "sphere", "cylinder", "cone", "torus", "capsule")

SUBJECT = "table"
"""Object kind for which the demo trains an adapter: a table with a round top and one leg. It is not in the
training data of the tiny model."""

COLORS = {
    "red": (214, 70, 60), "orange": (236, 140, 50), "yellow": (232, 200, 70), "green": (90, 170, 90),
    "cyan": (80, 185, 190), "blue": (70, 120, 215), "purple": (140, 95, 200), "grey": (140, 140, 140),
}  # fmt: skip

PINK = (240, 120, 190)
"""RGB color of the tables (`SUBJECT`)."""

AZIMUTHS, ELEVATIONS, DISTANCES = (25.0, 35.0), (16.0, 28.0), (4.8, 5.4)

FIELD = 30.0
"""Field of view of the camera in degrees."""

Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    """Objects in scene coordinates, and a camera with angles in degrees.

    The bounding box of all objects is centered at the origin, and its longest side is 1.9.
    """

    things: tuple[Thing, ...]
    azimuth: float = 30.0
    elevation: float = 20.0
    distance: float = 5.0


# --- objects ----------------------------------------------------------------------------------------------


def make(kind: str, color: tuple[int, int, int], rng: np.random.Generator) -> Thing:
    """Return an object with random proportions.

    Its size is about 1 unit. It stands on the plane y = 0.
    """

    def u(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    yaw, grow = u(-np.pi, np.pi), u(0.7, 1.25)
    if kind == SUBJECT:
        half, thick = u(0.4, 0.5), u(0.06, 0.08)
        foot = Solid("cylinder", (u(0.24, 0.32), thick), (0.0, thick, 0.0))
        leg = Solid("cylinder", (u(0.1, 0.13), half), (0.0, half, 0.0))
        top = Solid("cylinder", (u(0.4, 0.5), thick), (0.0, 2 * half, 0.0))
        return moved(Thing(kind, color, (foot, leg, top), yaw=yaw), grow, (0, 0, 0))
    size = {
        "box": lambda: (u(0.2, 0.5), u(0.2, 0.5), u(0.2, 0.5)),
        "sphere": lambda: (u(0.35, 0.5),),
        "cylinder": lambda: (u(0.2, 0.45), u(0.2, 0.55)),
        "cone": lambda: (u(0.3, 0.5), u(0.3, 0.55)),
        "torus": lambda: ((r := u(0.13, 0.2)) * 1.1 + u(0.1, 0.25), r),
        "capsule": lambda: (u(0.18, 0.3), u(0.15, 0.4)),
    }[kind]()
    height = size[1] if kind in ("box", "cylinder", "cone", "torus") else size[0]
    solids = (Solid(kind, size, (0.0, height, 0.0)),)
    return moved(Thing(kind, color, solids, yaw=yaw), grow, (0, 0, 0))


def wild(seed: int | Sequence[int]) -> Thing:
    """Return a random object with a random position and scale, for training the shape VAE.

    Its kind is one of `KINDS`, or it is a union of several random solids.
    """
    rng = np.random.default_rng(seed)
    if rng.random() < 0.6:
        thing = make(str(rng.choice(KINDS)), (0, 0, 0), rng)
    else:
        solids = []
        for _ in range(rng.integers(2, 6)):
            one = make(str(rng.choice(KINDS, p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])), (0, 0, 0), rng).solids[0]
            squash = tuple(v * rng.uniform(0.3, 1.2) for v in one.size) if one.kind == "box" else one.size
            solids.append(Solid(one.kind, squash, tuple(rng.uniform(-0.5, 0.5, 3).tolist())))
        thing = Thing("wild", (0, 0, 0), tuple(solids), yaw=float(rng.uniform(-np.pi, np.pi)))
    box = bounds(thing)
    scale = np.exp(rng.uniform(np.log(0.4), np.log(LONGEST))) / np.ptp(box, axis=0).max()
    room = (LONGEST / 2 - scale * np.ptp(box, axis=0) / 2).clip(0)
    return moved(thing, scale, rng.uniform(-room, room) - scale * box.mean(0))


# --- scenes -------------------------------------------------------------------------------------------------


def _arrange(kinds: Sequence[str], rng: np.random.Generator) -> Scene:
    """Return a scene with one object of each given kind, at random places without overlap."""
    names = rng.permutation(list(COLORS))[: len(kinds)]
    side, things, taken = 0.55 * np.sqrt(len(kinds)), [], []
    for kind, name in zip(kinds, names, strict=True):
        thing = make(kind, PINK if kind == SUBJECT else COLORS[str(name)], rng)
        reach = float(np.hypot(*np.abs(bounds(replace(thing, yaw=0.0))).max(0)[[0, 2]]))
        if kind != "box":
            reach = float(np.abs(bounds(replace(thing, yaw=0.0))).max(0)[[0, 2]].max())
        for attempt in range(1000):
            x, z = rng.uniform(-side, side, 2) * (1 + attempt / 100)
            if all(np.hypot(x - a, z - b) > reach + r + 0.05 for a, b, r in taken):
                break
        taken.append((x, z, reach))
        things.append(replace(thing, place=(float(x), 0.0, float(z))))
    return _framed(things, rng)


def _framed(things: Sequence[Thing], rng: np.random.Generator) -> Scene:
    """Return a scene with a random camera. The group of objects is centered, and its longest side is 1.9."""
    every = np.stack([bounds(t) for t in things])
    low, high = every[:, 0].min(0), every[:, 1].max(0)
    scale = LONGEST / float((high - low).max())
    camera = (float(rng.uniform(*r)) for r in (AZIMUTHS, ELEVATIONS, DISTANCES))
    return Scene(tuple(moved(t, scale, -scale * (low + high) / 2) for t in things), *camera)


def turned(scene: Scene, seed: int | Sequence[int]) -> Scene:
    """Return the scene rotated about the y axis, with a new camera from which all objects are visible.

    Up to 100 random rotations are tried. If each of them hides an object, the scene is returned unchanged.
    """
    for attempt in range(100):
        rng = np.random.default_rng([*np.atleast_1d(seed), attempt, 83])
        angle = rng.uniform(-np.pi, np.pi)
        c, s = np.cos(angle), np.sin(angle)
        things = [
            replace(t, yaw=t.yaw + angle, place=(c * x + s * z, y, c * z - s * x))
            for t in scene.things
            for x, y, z in [t.place]
        ]
        other = _framed(things, rng)
        if _visible(other):
            return other
    return scene


def _visible(scene: Scene) -> bool:
    """Return True if each object is sufficiently visible in a render of 32 x 32 pixels.

    An object must show at least 8 pixels, and at least half of the pixels that it would show alone.
    """
    near = _depths(scene, 32)
    first = near.argmin(0)
    alone = np.isfinite(near).sum(1)
    seen = np.array([(np.isfinite(near[i]) & (first == i)).sum() for i in range(len(near))])
    return bool((seen >= np.maximum(8, alone / 2)).all())


def _draw(kinds: Callable[[np.random.Generator], Sequence[str]], seed: Sequence[int]) -> Scene:
    for attempt in range(100):
        rng = np.random.default_rng([*seed, attempt])
        scene = _arrange(kinds(rng), rng)
        if _visible(scene):
            return scene
    raise AssertionError(f"seed {seed}: no arrangement has all objects visible")


def scenes(seed: int, n: int, *, counts: Sequence[int] = (1, 2, 3, 4), start: int = 0) -> list[Scene]:
    """Return random scenes for the tiny model; scene k depends only on `seed`, k and `counts`.

    Args:
        seed: random seed. The tiny model was trained with seed 0.
        n: number of scenes.
        counts: numbers of objects per scene, used in turn.
        start: index k of the first scene.
    """

    def kinds(count: int) -> Callable[[np.random.Generator], Sequence[str]]:
        return lambda rng: [str(k) for k in rng.choice(KINDS, count)]

    return [_draw(kinds(counts[k % len(counts)]), [seed, k]) for k in range(start, start + n)]


def subject_scenes(n: int = 24, *, seed: int = 0, counts: Sequence[int] = (1, 2, 3)) -> list[Scene]:
    """Return random scenes whose first object is a `SUBJECT` (a table); the others have kinds from `KINDS`.

    Args:
        n: number of scenes.
        seed: 0 for training, any other value for validation.
        counts: numbers of objects per scene, used in turn.
    """

    def kinds(count: int) -> Callable[[np.random.Generator], Sequence[str]]:
        return lambda rng: [SUBJECT, *(str(k) for k in rng.choice(KINDS, count - 1))]

    return [_draw(kinds(counts[k % len(counts)]), [1 << 20, seed, k]) for k in range(n)]


# --- rendering ----------------------------------------------------------------------------------------------


def _rays(scene: Scene, size: int) -> tuple[Array, Array]:
    """Return the camera position (3,), and a unit ray direction for each pixel (size^2, 3).

    The rays are in row order from the top left pixel.
    """
    a, e = np.radians([scene.azimuth, scene.elevation])
    back = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    right = np.array([np.cos(a), 0.0, -np.sin(a)])
    up = np.cross(back, right)
    y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    reach = np.tan(np.radians(FIELD) / 2)
    d = reach * (x[..., None] * right - y[..., None] * up) - back
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    return (scene.distance * back).astype(np.float32), d.reshape(-1, 3).astype(np.float32)


def _depths(scene: Scene, size: int) -> Array:
    """Return the depth of each object along each camera ray, (objects, size^2).

    The depth is infinite if the ray misses the object. The method is sphere tracing.
    """
    eye, directions = _rays(scene, size)
    out = np.full((len(scene.things), size * size), np.inf, np.float32)
    for depth, thing in zip(out, scene.things, strict=True):
        box = bounds(thing)
        middle, radius = box.mean(0) - eye, np.linalg.norm(np.ptp(box, axis=0)) / 2
        along = (directions @ middle).astype(np.float32)
        rays = np.flatnonzero((middle @ middle) - along**2 < radius**2)
        t, end = along[rays] - np.float32(radius), along[rays] + np.float32(radius)
        for _ in range(64):
            gap = distance(thing, eye + t[:, None] * directions[rays])
            hit = gap < 5e-4
            depth[rays[hit]] = t[hit]
            going = ~hit & (t < end)
            rays, t, end = rays[going], (t + gap)[going], end[going]
            if not len(rays):
                break
    return out


def render(scene: Scene, size: int = 128) -> tuple[Array, Array]:
    """Render a scene to an image and a segmentation.

    Returns:
        The image with a white background, uint8 (size, size, 3), and the object IDs, uint8 (size, size). The
        ID is 0 for the background, and 1, 2, ... for the objects in the order of `scene.things`.
    """
    eye, directions = _rays(scene, size)
    depths = _depths(scene, size)
    image, ids = np.full((size * size, 3), 255, np.uint8), np.zeros(size * size, np.uint8)
    owner, depth = depths.argmin(0), depths.min(0)
    light = np.array([0.4, 0.8, 0.45], np.float32)
    light /= np.linalg.norm(light)
    for i, thing in enumerate(scene.things):
        seen = np.isfinite(depth) & (owner == i)
        points = eye + depth[seen, None] * directions[seen]
        steps = 2e-3 * np.eye(3, dtype=np.float32)
        slope = np.stack([distance(thing, points + s) - distance(thing, points - s) for s in steps], -1)
        normals = slope / np.linalg.norm(slope, axis=-1, keepdims=True).clip(1e-9)
        shade = 0.4 + 0.25 * np.abs((normals * directions[seen]).sum(-1)) + 0.35 * (normals @ light).clip(0)
        image[seen] = (np.array(thing.color) * shade[:, None]).round().clip(0, 255).astype(np.uint8)
        ids[seen] = i + 1
    return image.reshape(size, size, 3), ids.reshape(size, size)


def write(folder: Path, scene: Scene, *, size: int = 128, points: int = POINTS, seed: int = 0) -> Path:
    """Write a scene as a training example: `scene_rgb.png`, `seg.png`, and a `surface_ID.npy` per object.

    The folder is written atomically.
    """
    from PIL import Image

    image, ids = render(scene, size)
    with atomic(folder) as part:
        part.mkdir(parents=True)
        Image.fromarray(image).save(part / "scene_rgb.png")
        Image.fromarray(ids).save(part / "seg.png")
        for i, thing in enumerate(scene.things, 1):
            np.save(part / f"surface_{i}.npy", surface(thing, points, [seed, i]))
    return folder
