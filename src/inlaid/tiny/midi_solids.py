"""Simple solids with exact signed distances, and objects that consist of such solids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Solid:
    """Simple solid, such as a box, in the coordinates of its object (y is up).

    The meaning of `size` depends on `kind`:

    - box: half of the side length along x, y and z;
    - sphere: (radius,);
    - cylinder and cone: (radius, half of the height);
    - torus in the x-z plane: (major radius, minor radius);
    - capsule along x: (radius, half of the length without the caps).
    """

    kind: str
    size: tuple[float, ...]
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Thing:
    """Object that is a union of solids.

    It is rotated about the y axis by `yaw` (in radians) and then moved to `place`.
    """

    kind: str
    color: tuple[int, int, int]
    solids: tuple[Solid, ...]
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw: float = 0.0


# --- solids -------------------------------------------------------------------------------------------------


def _to_segment(x: Array, y: Array, a: tuple[float, float], b: tuple[float, float]) -> Array:
    along = ((x - a[0]) * (b[0] - a[0]) + (y - a[1]) * (b[1] - a[1])) / (
        (b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2
    )
    along = along.clip(0, 1)
    return np.hypot(x - a[0] - along * (b[0] - a[0]), y - a[1] - along * (b[1] - a[1]))


def _solid_distance(solid: Solid, p: Array) -> Array:
    """Return the signed distance (n,) from points (n, 3) to a solid; it is negative inside.

    The points are in the solid's own coordinates.
    """
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
    """Sample n unit vectors (n, 3) with uniformly distributed directions."""
    d = rng.standard_normal((n, 3))
    return d / np.linalg.norm(d, axis=-1, keepdims=True)


def _disc(rng: np.random.Generator, n: int, r: float, y: float) -> tuple[Array, Array]:
    angle, rho = rng.uniform(0, 2 * np.pi, n), r * np.sqrt(rng.random(n))
    points = np.stack([rho * np.cos(angle), np.full(n, y), rho * np.sin(angle)], -1)
    return points, np.tile([0.0, np.sign(y), 0.0], (n, 1))


def _areas(solid: Solid) -> list[float]:
    """Return the area of each part of a solid's surface, such as side, bottom and top of a cylinder."""
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
    """Sample points uniformly on the surface of a solid; return points and outward normals (n, 6).

    Both are in the solid's own coordinates.
    """
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


# --- objects ------------------------------------------------------------------------------------------------


def _turn(yaw: float) -> Array:
    """Return the matrix (3, 3) that rotates row vectors about y, from object to scene coordinates."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])


def distance(thing: Thing, points: Array) -> Array:
    """Return the signed distance (n,) from points (n, 3) to an object; it is negative inside.

    Inside an object of several solids, the absolute value is only a lower bound of the distance.
    """
    local = (points - np.array(thing.place, points.dtype)) @ _turn(thing.yaw).T.astype(points.dtype)
    each = [_solid_distance(s, local - np.array(s.offset, points.dtype)) for s in thing.solids]
    return np.minimum.reduce(each)


def surface(thing: Thing, count: int, seed: int | Sequence[int]) -> Array:
    """Sample points and normals uniformly on the surface of an object.

    Returns:
        Points and unit normals in scene coordinates, float32 (count, 6).
    """
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
    """Return the exact axis-aligned bounding box of an object, (2, 3): its lowest and highest corner."""
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
    """Return a copy of an object, scaled by `scale` and then moved by `shift`."""
    x, y, z = (scale * p + d for p, d in zip(thing.place, shift, strict=True))
    solids = tuple(
        Solid(s.kind, tuple(scale * v for v in s.size), tuple(scale * v for v in s.offset))  # type: ignore[arg-type]
        for s in thing.solids
    )
    return replace(thing, solids=solids, place=(x, y, z))
