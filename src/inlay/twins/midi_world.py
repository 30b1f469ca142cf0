"""The world of the MIDI twin: coloured things standing together on a floor, with pictures and exact surfaces.

A thing is made of solids whose signed distance is known in closed form, so pictures, numbers of objects,
surfaces with normals, and what is inside all come from the same few formulas. Everything is a function of its
seed. Of the kinds of things one, `SUBJECT`, is kept from the twin: it is there to be taught.

What surprises: the azimuth of the camera is nearly fixed. A scene's frame does not turn with the camera, so a
picture alone says where things stand only if it is known from where it was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from inlay.files import atomic

KINDS = ("box", "sphere", "cylinder", "cone", "torus", "capsule")
SUBJECT = "chair"
"""Seat, back and four legs: no thing of the twin's world."""

COLOURS = {
    "red": (214, 70, 60), "orange": (236, 140, 50), "yellow": (232, 200, 70), "green": (90, 170, 90),
    "cyan": (80, 185, 190), "blue": (70, 120, 215), "purple": (140, 95, 200), "grey": (140, 140, 140),
}  # fmt: skip
PINK = (240, 120, 190)
"""The subject's own colour."""

LONGEST = 1.9
"""Longest side of a scene."""

POINTS = 20_480
"""Points of a surface that is written."""

AZIMUTHS, ELEVATIONS, DISTANCES = (25.0, 35.0), (16.0, 28.0), (4.8, 5.4)
FIELD = 30.0
"""Degrees that the picture spans."""

Array = np.ndarray


@dataclass(frozen=True)
class Solid:
    """One solid in the frame of its thing, y up.

    `size` is: box, half of its sides; sphere (r,); cylinder and cone (r, half of the height); torus, lying,
    (R, r); capsule, lying along x, (r, half of the length without its ends).
    """

    kind: str
    size: tuple[float, ...]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Thing:
    """An object: its solids together, turned about the up axis and put in its place."""

    kind: str
    colour: tuple[int, int, int]
    solids: tuple[Solid, ...]
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Things in their common frame, centred, longest side 1.9; and the camera, in degrees."""

    things: tuple[Thing, ...]
    azimuth: float = 30.0
    elevation: float = 20.0
    distance: float = 5.0


# --- solids -------------------------------------------------------------------------------------------------


def _to_segment(x: Array, y: Array, a: tuple[float, float], b: tuple[float, float]) -> Array:
    along = ((x - a[0]) * (b[0] - a[0]) + (y - a[1]) * (b[1] - a[1])) / (
        (b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2
    )
    along = along.clip(0, 1)
    return np.hypot(x - a[0] - along * (b[0] - a[0]), y - a[1] - along * (b[1] - a[1]))


def _solid_distance(solid: Solid, p: Array) -> Array:
    """Signed distance (n,) of points (n, 3) in the solid's own frame, negative inside."""
    s = solid.size
    if solid.kind == "sphere":
        return np.sqrt((p * p).sum(-1)) - s[0]
    if solid.kind == "capsule":
        x = p[:, 0] - p[:, 0].clip(-s[1], s[1])
        return np.sqrt(x * x + p[:, 1] ** 2 + p[:, 2] ** 2) - s[0]
    if solid.kind == "box":
        q = np.abs(p) - np.array(s, p.dtype)
        return np.sqrt((q.clip(0) ** 2).sum(-1)) + q.max(-1).clip(max=0)
    rho = np.hypot(p[:, 0], p[:, 2])
    if solid.kind == "torus":
        return np.hypot(rho - s[0], p[:, 1]) - s[1]
    if solid.kind == "cylinder":
        a, b = rho - s[0], np.abs(p[:, 1]) - s[1]
        return np.hypot(a.clip(0), b.clip(0)) + np.maximum(a, b).clip(max=0)
    assert solid.kind == "cone"
    away = np.minimum(
        _to_segment(rho, p[:, 1], (s[0], -s[1]), (0.0, s[1])),
        _to_segment(rho, p[:, 1], (0.0, -s[1]), (s[0], -s[1])),
    )
    inside = (p[:, 1] > -s[1]) & (rho * 2 * s[1] < s[0] * (s[1] - p[:, 1]))
    return np.where(inside, -away, away)


def _round(rng: np.random.Generator, n: int) -> Array:
    """Uniform directions (n, 3)."""
    d = rng.standard_normal((n, 3))
    return d / np.linalg.norm(d, axis=-1, keepdims=True)


def _disc(rng: np.random.Generator, n: int, r: float, y: float) -> tuple[Array, Array]:
    angle, rho = rng.uniform(0, 2 * np.pi, n), r * np.sqrt(rng.random(n))
    points = np.stack([rho * np.cos(angle), np.full(n, y), rho * np.sin(angle)], -1)
    return points, np.tile([0.0, np.sign(y), 0.0], (n, 1))


def _areas(solid: Solid) -> list[float]:
    """Areas of the pieces of its surface, in the order in which `_solid_surface` draws them."""
    s, pi = solid.size, np.pi
    return {
        "sphere": lambda: [4 * pi * s[0] ** 2],
        "capsule": lambda: [4 * pi * s[0] * s[1], 4 * pi * s[0] ** 2],
        "box": lambda: [8 * s[1] * s[2], 8 * s[0] * s[2], 8 * s[0] * s[1]],
        "torus": lambda: [4 * pi * pi * s[0] * s[1]],
        "cylinder": lambda: [4 * pi * s[0] * s[1], pi * s[0] ** 2, pi * s[0] ** 2],
        "cone": lambda: [pi * s[0] * float(np.hypot(s[0], 2 * s[1])), pi * s[0] ** 2],
    }[solid.kind]()


def _solid_surface(solid: Solid, n: int, rng: np.random.Generator) -> Array:
    """Uniform points of its surface with outward normals (n, 6), in its own frame."""
    s, areas = solid.size, np.array(_areas(solid))
    counts = rng.multinomial(n, areas / areas.sum())
    pieces: list[tuple[Array, Array]] = []
    if solid.kind == "sphere":
        d = _round(rng, n)
        pieces.append((s[0] * d, d))
    elif solid.kind == "box":
        for axis, count in enumerate(counts):
            points = rng.uniform(-1, 1, (count, 3)) * s
            side = rng.choice([-1.0, 1.0], count)
            points[:, axis] = side * s[axis]
            pieces.append((points, side[:, None] * np.eye(3)[axis]))
    elif solid.kind == "torus":
        turn, tube = rng.uniform(0, 2 * np.pi, 4 * n + 64), rng.uniform(0, 2 * np.pi, 4 * n + 64)
        kept = rng.random(len(tube)) * (s[0] + s[1]) < s[0] + s[1] * np.cos(tube)
        turn, tube = turn[kept][:n], tube[kept][:n]
        d = np.stack([np.cos(tube) * np.cos(turn), np.sin(tube), np.cos(tube) * np.sin(turn)], -1)
        ring = np.stack([np.cos(turn), np.zeros(n), np.sin(turn)], -1)
        pieces.append((s[0] * ring + s[1] * d, d))
    elif solid.kind == "capsule":
        d = _round(rng, counts[1])
        pieces.append((s[0] * d + np.sign(d[:, :1]) * [s[1], 0.0, 0.0], d))
        angle = rng.uniform(0, 2 * np.pi, counts[0])
        d = np.stack([np.zeros(len(angle)), np.cos(angle), np.sin(angle)], -1)
        pieces.append((s[0] * d + rng.uniform(-s[1], s[1], (len(angle), 1)) * [1.0, 0.0, 0.0], d))
    else:
        angle, share = rng.uniform(0, 2 * np.pi, counts[0]), rng.random(counts[0])
        tapered = solid.kind == "cone"
        rho = s[0] * (np.sqrt(share) if tapered else np.ones(counts[0]))
        y = s[1] - 2 * s[1] * (np.sqrt(share) if tapered else share)
        out = np.array([2 * s[1], s[0]]) / np.hypot(s[0], 2 * s[1]) if tapered else np.array([1.0, 0.0])
        ring = np.stack([np.cos(angle), np.zeros(len(angle)), np.sin(angle)], -1)
        pieces.append(
            (rho[:, None] * ring + y[:, None] * [0.0, 1.0, 0.0], out[0] * ring + [0.0, out[1], 0.0])
        )
        pieces += [_disc(rng, c, s[0], y) for c, y in zip(counts[1:], (-s[1], s[1]), strict=False)]
    return np.concatenate([np.concatenate(piece, -1) for piece in pieces])


# --- things -------------------------------------------------------------------------------------------------


def _turn(yaw: float) -> Array:
    """Rotation about y: a thing's frame -> the scene's, for row vectors."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])


def distance(thing: Thing, points: Array) -> Array:
    """Signed distance (n,) of points (n, 3), negative inside; within several solids a bound of it."""
    local = (points - np.array(thing.place, points.dtype)) @ _turn(thing.yaw).T.astype(points.dtype)
    each = [_solid_distance(s, local - np.array(s.offset, points.dtype)) for s in thing.solids]
    return np.minimum.reduce(each)


def surface(thing: Thing, count: int, seed: int | Sequence[int]) -> Array:
    """Uniform points of its surface with outward unit normals: float32 (count, 6), in the scene's frame."""
    rng = np.random.default_rng(seed)
    areas = np.array([sum(_areas(s)) for s in thing.solids])
    found, have = [], 0
    while have < count:
        for i, share in enumerate(rng.multinomial(2 * count, areas / areas.sum())):
            one = thing.solids[i]
            points = _solid_surface(one, share, rng)
            points[:, :3] += one.offset
            others = [_solid_distance(s, points[:, :3] - s.offset) for s in thing.solids if s is not one]
            found.append(points[np.minimum.reduce(others) > 0] if others else points)
            have += len(found[-1])
    points = rng.permutation(np.concatenate(found))[:count]
    turn = _turn(thing.yaw)
    return np.concatenate([points[:, :3] @ turn + thing.place, points[:, 3:] @ turn], -1).astype(np.float32)


def bounds(thing: Thing) -> Array:
    """Lowest and highest corner (2, 3), exact."""
    c, s = np.abs(_turn(thing.yaw)[0, [0, 2]])
    low, high = [], []
    for solid in thing.solids:
        z = solid.size
        half = {
            "sphere": lambda z=z: (z[0], z[0], z[0]),
            "capsule": lambda z=z: (z[0] + c * z[1], z[0], z[0] + s * z[1]),
            "box": lambda z=z: (c * z[0] + s * z[2], z[1], s * z[0] + c * z[2]),
            "torus": lambda z=z: (z[0] + z[1], z[1], z[0] + z[1]),
        }.get(solid.kind, lambda z=z: (z[0], z[1], z[0]))()
        middle = np.array(solid.offset) @ _turn(thing.yaw)
        low.append(middle - half)
        high.append(middle + half)
    return np.stack([np.min(low, 0), np.max(high, 0)]) + thing.place


def moved(thing: Thing, scale: float, shift: Sequence[float]) -> Thing:
    """The thing, everything times `scale`, then shifted."""
    x, y, z = (scale * p + d for p, d in zip(thing.place, shift, strict=True))
    solids = tuple(
        Solid(s.kind, tuple(scale * v for v in s.size), tuple(scale * v for v in s.offset))  # type: ignore[arg-type]
        for s in thing.solids
    )
    return replace(thing, solids=solids, place=(x, y, z))


def make(kind: str, colour: tuple[int, int, int], rng: np.random.Generator) -> Thing:
    """A thing of random proportions standing on y = 0, about 1 across."""

    def u(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    yaw, grow = u(-np.pi, np.pi), u(0.7, 1.25)
    if kind == SUBJECT:
        w, d, t = u(0.36, 0.42), u(0.36, 0.42), u(0.085, 0.1)
        seat, top = u(0.4, 0.48), u(0.45, 0.55)
        legs = [
            Solid("box", (t, seat / 2, t), (x * (w - t), seat / 2, z * (d - t)))
            for x in (-1, 1)
            for z in (-1, 1)
        ]
        back = Solid("box", (w, top / 2, t), (0.0, seat + top / 2, t - d))
        solids = (Solid("box", (w, t, d), (0.0, seat, 0.0)), back, *legs)
        return moved(Thing(kind, colour, solids, yaw=yaw), grow, (0, 0, 0))
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
    return moved(Thing(kind, colour, solids, yaw=yaw), grow, (0, 0, 0))


def wild(seed: int | Sequence[int]) -> Thing:
    """What the shape VAE learns from: a thing of the world, or some solids grown together, anywhere."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        thing = make(str(rng.choice(KINDS)), (0, 0, 0), rng)
    else:
        solids = []
        for _ in range(rng.integers(2, 7)):
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
    """Things of these kinds side by side, in their common frame."""
    names = rng.permutation(list(COLOURS))[: len(kinds)]
    side, things, taken = 0.55 * np.sqrt(len(kinds)), [], []
    for kind, name in zip(kinds, names, strict=True):
        thing = make(kind, PINK if kind == SUBJECT else COLOURS[str(name)], rng)
        reach = float(np.hypot(*np.abs(bounds(replace(thing, yaw=0.0))).max(0)[[0, 2]]))
        if kind not in ("box", SUBJECT):
            reach = float(np.abs(bounds(replace(thing, yaw=0.0))).max(0)[[0, 2]].max())
        for attempt in range(1000):
            x, z = rng.uniform(-side, side, 2) * (1 + attempt / 100)
            if all(np.hypot(x - a, z - b) > reach + r + 0.05 for a, b, r in taken):
                break
        taken.append((x, z, reach))
        things.append(replace(thing, place=(float(x), 0.0, float(z))))
    every = np.stack([bounds(t) for t in things])
    low, high = every[:, 0].min(0), every[:, 1].max(0)
    scale = LONGEST / float((high - low).max())
    things = [moved(t, scale, -scale * (low + high) / 2) for t in things]
    camera = (float(rng.uniform(*r)) for r in (AZIMUTHS, ELEVATIONS, DISTANCES))
    return Scene(tuple(things), *camera)


def _visible(scene: Scene) -> bool:
    """Whether at least half of every thing is seen, and enough of it."""
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
    raise AssertionError(f"no arrangement of seed {seed} shows all its things")


def scenes(seed: int, n: int, *, counts: Sequence[int] = (1, 2, 3, 4), start: int = 0) -> list[Scene]:
    """Scenes of the twin's world; scene k is a function of (seed, k, counts).

    Args:
        seed: 0 is the twin's training, so that every other is held out.
        n: how many.
        counts: numbers of things, in turn.
        start: k of the first.
    """

    def kinds(count: int) -> Callable[[np.random.Generator], Sequence[str]]:
        return lambda rng: [str(k) for k in rng.choice(KINDS, count)]

    return [_draw(kinds(counts[k % len(counts)]), [seed, k]) for k in range(start, start + n)]


def subject_scenes(n: int = 24, *, seed: int = 0, counts: Sequence[int] = (1, 2, 3)) -> list[Scene]:
    """Scenes with one `SUBJECT`, the first of the things; the others are of the twin's world.

    Args:
        n: how many.
        seed: 0 is for training, every other is held out.
        counts: numbers of things, in turn.
    """

    def kinds(count: int) -> Callable[[np.random.Generator], Sequence[str]]:
        return lambda rng: [SUBJECT, *(str(k) for k in rng.choice(KINDS, count - 1))]

    return [_draw(kinds(counts[k % len(counts)]), [1 << 20, seed, k]) for k in range(n)]


# --- pictures -----------------------------------------------------------------------------------------------


def _rays(scene: Scene, size: int) -> tuple[Array, Array]:
    """Eye (3,) and unit directions (size^2, 3), row by row from the top left."""
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
    """Distance (things, size^2) along each ray to each thing, infinite where it misses: sphere tracing."""
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
    """Draws a scene.

    Returns:
        Picture uint8 (size, size, 3) on white; map of objects uint8 (size, size), 0 none, then 1, 2, ... in
        the order of `scene.things`.
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
        image[seen] = (np.array(thing.colour) * shade[:, None]).round().clip(0, 255).astype(np.uint8)
        ids[seen] = i + 1
    return image.reshape(size, size, 3), ids.reshape(size, size)


def write(folder: Path, scene: Scene, *, size: int = 128, points: int = POINTS, seed: int = 0) -> Path:
    """Writes a scene for training: `scene_rgb.png`, `seg.png` and `surface_ID.npy` of each object; atomic."""
    from PIL import Image

    image, ids = render(scene, size)
    with atomic(folder) as part:
        part.mkdir(parents=True)
        Image.fromarray(image).save(part / "scene_rgb.png")
        Image.fromarray(ids).save(part / "seg.png")
        for i, thing in enumerate(scene.things, 1):
            np.save(part / f"surface_{i}.npy", surface(thing, points, [seed, i]))
    return folder
