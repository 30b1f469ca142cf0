"""Outward orientation of mesh surfaces, and sampling of surface points that can be seen from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.media.meshes import POINTS

if TYPE_CHECKING:
    import trimesh

FEW, MANY = 8, 64
"""Number of rays per point in the visibility test: `FEW` for all points, then `MANY` for points that were not
visible with few rays."""

OFFSET = 2e-4
"""Distance between a ray's origin and the surface, relative to the diagonal of the object."""


@dataclass(frozen=True)
class Outward:
    """Result of turning the triangles of a mesh outward."""

    mesh: trimesh.Trimesh
    components: int
    """Number of components that were inside out and were turned."""
    turned: np.ndarray
    """Triangles whose corners were put in reverse order, bool (m,)."""


def outward(triangles: np.ndarray) -> Outward:
    """Turn the connected components of a mesh that are inside out.

    The triangles of each component first get a common orientation. A component is then inside out if its
    signed volume is negative. It is not turned if it lies inside the bounding box of another component,
    because it may be a cavity.

    Args:
        triangles: corners of the triangles, (m, 3, 3).
    """
    import trimesh

    mesh = trimesh.Trimesh(
        triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3), process=False
    )
    mesh.merge_vertices()
    before = np.array(mesh.faces)
    trimesh.repair.fix_winding(mesh)
    labels = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    triangles = np.array(mesh.triangles)
    flux = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    faces, turned = np.array(mesh.faces), 0
    low, high, volume = _components(triangles, flux, labels)
    for i in np.flatnonzero(volume < 0):
        if not ((low < low[i]).all(1) & (high > high[i]).all(1)).any():
            own = labels == i
            faces[own] = faces[own][:, ::-1]
            turned += 1
    return Outward(trimesh.Trimesh(mesh.vertices, faces, process=False), turned, (faces != before).any(1))


def _components(
    triangles: np.ndarray, flux: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the bounding box corners and six times the signed volume of each connected component."""
    count = labels.max() + 1
    low, high = np.full((count, 3), np.inf), np.full((count, 3), -np.inf)
    np.minimum.at(low, labels, triangles.min(1))
    np.maximum.at(high, labels, triangles.max(1))
    faces = np.bincount(labels, minlength=count)
    middle = np.stack([np.bincount(labels, triangles.mean(1)[:, k], count) / faces for k in range(3)], -1)
    volume = np.bincount(labels, ((triangles.mean(1) - middle[labels]) * flux).sum(-1), count)
    return low, high, volume


@dataclass(frozen=True)
class OuterSurface:
    """Points on the part of a mesh that can be seen from outside."""

    points: np.ndarray
    """Positions and outward unit normals, float32 (n, 6)."""
    hidden: float
    """Share of the area of the mesh that cannot be seen from outside, in [0, 1]."""
    flipped: float
    """Share of the points whose normal was turned, because only the back of their triangle can be seen."""


def sample_outer(mesh: trimesh.Trimesh, count: int = POINTS, seed: int = 0) -> OuterSurface:
    """Sample points, uniformly by area, on the part of a mesh that can be seen from outside.

    A point can be seen if a ray in a random direction leaves the mesh without another intersection. Rays are
    tried on both sides of the surface. Points inside an open box can therefore be seen. Points on a body that
    another body encloses cannot be seen.

    Args:
        mesh: mesh of one object; other objects of a scene do not hide it.
        count: number of points.
        seed: seed of points and rays.

    Raises:
        ValueError: if too few points can be seen.
    """
    import trimesh

    rng = np.random.default_rng(seed)
    kept, tried, seen, turned = [], 0, 0, 0
    diagonal = float(np.linalg.norm(mesh.extents))
    for batch in range(16):
        wanted = (
            count - seen if not batch else max(256, round((count - seen) * tried / max(seen, tried / 20)))
        )
        drawn: Any = trimesh.sample.sample_surface(mesh, wanted, seed=seed + 1000 * batch)
        points, normals = np.asarray(drawn[0]), np.asarray(mesh.face_normals[drawn[1]])
        front, back = _escapes(mesh, points, normals, OFFSET * diagonal, rng)
        visible, flip = front | back, back & ~front
        normals = np.where(flip[:, None], -normals, normals)
        kept.append(np.concatenate([points, normals], -1)[visible])
        tried, seen, turned = tried + wanted, seen + int(visible.sum()), turned + int(flip.sum())
        if seen >= count:
            break
    if seen < count:
        raise ValueError("no part of it can be seen from outside")
    found = np.concatenate(kept)[:count].astype(np.float32)
    return OuterSurface(found, 1 - seen / tried, turned / seen)


def _escapes(
    mesh: trimesh.Trimesh, points: np.ndarray, normals: np.ndarray, offset: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays, bool (n,): True for points with a visible front, and for points with a visible back.

    A side is visible if at least one random ray from this side does not hit the mesh. The back is tested only
    if the front is not visible.
    """
    front, back = np.zeros(len(points), bool), np.zeros(len(points), bool)
    for side, found in ((1.0, front), (-1.0, back)):
        for rays in (FEW, MANY):
            ask = np.flatnonzero(~found if side > 0 else ~(found | front))
            if not len(ask):
                continue
            n = side * np.repeat(normals[ask], rays, 0)
            directions = n + _unit(rng.standard_normal((len(n), 3)))  # cosine-weighted about the normal
            directions = _unit(np.where(np.abs(directions) < 1e-9, n, directions))
            origins = np.repeat(points[ask], rays, 0) + offset * n
            free = ~mesh.ray.intersects_any(origins, directions)
            found[ask] |= free.reshape(-1, rays).any(1)
    return front, back


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
