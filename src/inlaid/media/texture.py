"""Textures for generated meshes, projected from the input image.

A generated scene has no camera. A camera is therefore fitted to match the silhouettes of the meshes with the
object masks. The texture coordinates of a vertex are its position in the image. A vertex that the camera does
not see gets the texture coordinates of the nearest visible vertex of the same object.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from inlaid.media.mesh_looks import LARGEST, Look, Texture
from inlaid.media.mesh_render import View
from inlaid.media.meshes import sample_surface

if TYPE_CHECKING:
    import trimesh

ENOUGH = 0.5
"""Minimum overlap (IoU, 0 to 1) of silhouettes and masks; below it, meshes get no texture."""

SIDE = 64
"""Side in pixels of the square silhouettes that are compared with the masks."""

DEPTHS = 512
"""Side in pixels of the square depth image that determines which vertices are visible."""

NEAR = 0.02
"""Depth tolerance in scene units: a vertex that lies farther behind the depth image is hidden."""

STARTS = 6
"""Number of cameras that are refined: the best ones of the coarse search."""


@dataclass(frozen=True)
class Camera:
    """Perspective camera (`View`) whose image is shifted."""

    view: View
    shift: tuple[float, float] = (0.0, 0.0)
    """Shift to the right and down, as a fraction of half the image side."""

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return image coordinates (n, 2) of points (n, 3), and their distances from the camera (n,).

        The first coordinate points right and the second points down. The image covers [-1, 1] in both.
        """
        right, up, forward = self.view.axes()
        offset = points + self.view.distance * forward
        plane = np.stack([offset @ right, offset @ -up], -1)
        reach = np.tan(np.radians(self.view.field) / 2) * (offset @ forward)[:, None]
        return plane / reach.clip(1e-6) + self.shift, np.linalg.norm(offset, axis=-1)

    def rays(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return origins and unit directions (size * size, 3) of the rays through all pixels."""
        right, up, forward = self.view.axes()
        reach = np.tan(np.radians(self.view.field) / 2)
        y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
        across, down = ((v[..., None] - s) * reach for v, s in zip((x, y), self.shift, strict=True))
        rays = forward + across * right - down * up
        rays = (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)
        return np.broadcast_to(-self.view.distance * forward, rays.shape).copy(), rays


def textured(
    meshes: Mapping[str, trimesh.Trimesh], image: np.ndarray, masks: Mapping[str, np.ndarray]
) -> tuple[dict[str, trimesh.Trimesh], str]:
    """Return meshes with a texture projected from the input image, and a message about the fit.

    Args:
        meshes: mesh of each object by name, in scene coordinates.
        image: input image, uint8 (h, w, 3).
        masks: mask of each object by name, bool (h, w).

    Returns:
        The meshes and a message for the user. The meshes are unchanged if no camera matches the masks.
    """
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    if not meshes:
        return dict(meshes), "no texture: there is no mesh"
    side = max(image.shape[:2])
    pad = [(side - n) // 2 for n in image.shape[:2]]
    square = {n: _squared(masks[n], side, pad) for n in meshes}
    camera, overlap = fit_camera(meshes, square)
    if overlap < ENOUGH:
        why = f"the best overlaps them by {overlap:.0%}, less than {ENOUGH:.0%}"
        return dict(meshes), f"no texture: no camera matches the masks ({why})"
    seen = _seen(camera, meshes, square)
    picture = Image.fromarray(_without_background(image, masks))
    picture.thumbnail((LARGEST, LARGEST))
    material = PBRMaterial(baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=1.0)
    out = {}
    for name, mesh in meshes.items():
        place = (camera.project(mesh.vertices)[0] + 1) / 2 * side
        place = (place - pad[::-1]) / image.shape[1::-1]
        if seen[name].any():
            place = place[_nearest(mesh.vertices, seen[name])]
        else:  # hidden behind others: the middle of its mask
            rows, columns = np.nonzero(masks[name])
            middle = np.abs(rows - np.median(rows)) + np.abs(columns - np.median(columns))
            i = int(middle.argmin())
            place[:] = ((columns[i] + 0.5) / image.shape[1], (rows[i] + 0.5) / image.shape[0])
        uv = np.stack([place[:, 0], 1 - place[:, 1]], -1)
        out[name] = mesh.copy()
        out[name].visual = TextureVisuals(uv=uv, material=material)
    share = float(np.mean(np.concatenate([seen[n] for n in meshes])))
    return out, f"texture: silhouettes overlap the masks by {overlap:.0%}; {share:.0%} of the surface is seen"


def look_of(mesh: trimesh.Trimesh) -> Look | None:
    """Return the texture of a mesh from `textured` as a `Look`, or None if the mesh has no texture."""
    image = getattr(getattr(mesh.visual, "material", None), "baseColorTexture", None)
    if image is None:
        return None
    count = len(mesh.faces)
    uv = np.asarray(mesh.visual.uv * [1, -1] + [0, 1], np.float32)[mesh.faces]  # type: ignore[union-attr]
    white, opaque = np.ones((count, 3, 4), np.float32), np.zeros(count, np.float32)
    return Look(white, uv, np.zeros(count, int), opaque, (Texture.of(image),))


def fit_camera(
    meshes: Mapping[str, trimesh.Trimesh], masks: Mapping[str, np.ndarray]
) -> tuple[Camera, float]:
    """Find the camera from which the silhouettes of the meshes match the masks best.

    The search covers 36 azimuths at elevations of 0 to 50 degrees. The best cameras are then refined.

    Args:
        meshes: mesh of each object by name.
        masks: square mask of each object by name.

    Returns:
        The camera, and the mean IoU of silhouette and mask over all objects.
    """
    from scipy.optimize import minimize

    names = list(meshes)
    points = [sample_surface(meshes[name], 3000)[:, :3] for name in names]
    owner = np.repeat(np.arange(len(names)), [len(p) for p in points])
    every = np.concatenate(points)
    targets = np.stack([_small(masks[name]) for name in names])
    whole = np.argwhere(targets.any(0))
    low, high = (whole.min(0) / SIDE * 2 - 1)[::-1], ((whole.max(0) + 1) / SIDE * 2 - 1)[::-1]

    def camera(values: np.ndarray) -> Camera:
        azimuth, elevation, distance, size, x, y = values
        field = float(np.degrees(2 * np.arctan(np.exp(size) / np.exp(distance))))
        elevation = float(np.clip(elevation, -80, 80))
        return Camera(View(float(azimuth), elevation, float(np.exp(distance)), field), (float(x), float(y)))

    def overlap(values: np.ndarray) -> float:
        return _overlap(camera(values), every, owner, targets)

    found = []
    for azimuth, elevation in itertools.product(range(0, 360, 10), (0, 15, 30, 50)):
        values = np.array([azimuth, elevation, np.log(5.0), np.log(1.35), 0.0, 0.0])
        place = camera(values).project(every)[0]
        own_low, own_high = place.min(0), place.max(0)
        scale = float(np.max((own_high - own_low) / (high - low)))
        values[3] += np.log(scale)
        values[4:] = (low + high) / 2 - (own_low + own_high) / 2 / scale
        found.append((overlap(values), values))
    found.sort(key=lambda each: -each[0])
    best = found[0]
    steps = np.array([5.0, 5.0, 0.2, 0.1, 0.05, 0.05])
    for _, start in found[:STARTS]:
        simplex = np.stack([start, *(start + steps * row for row in np.eye(6))])
        options = {"initial_simplex": simplex, "maxfev": 250, "xatol": 1e-3, "fatol": 1e-4}
        end: Any = minimize(lambda v: -overlap(v), start, method="Nelder-Mead", options=options)
        best = max(best, (-float(end.fun), end.x), key=lambda each: each[0])
    return camera(best[1]), best[0]


def _overlap(camera: Camera, points: np.ndarray, owner: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean IoU of the objects' silhouettes and their masks `targets` (objects, n, n).

    The silhouettes are drawn from surface points.
    """
    place, depth = camera.project(points)
    pixel = np.floor((place + 1) / 2 * SIDE).astype(int)
    shown = ((pixel >= 0) & (pixel < SIDE)).all(1)
    order = np.flatnonzero(shown)[np.argsort(-depth[shown], kind="stable")]  # nearer points come last
    ids = np.full((SIDE, SIDE), -1)
    ids[pixel[order, 1], pixel[order, 0]] = owner[order]
    silhouettes = ids == np.arange(len(targets))[:, None, None]
    # Points leave gaps: a pixel without a point belongs to the object on two opposite sides of it.
    for axis in (1, 2):
        silhouettes |= np.roll(silhouettes, 1, axis) & np.roll(silhouettes, -1, axis) & (ids < 0)
    union = (silhouettes | targets).sum((1, 2))
    return float(((silhouettes & targets).sum((1, 2)) / union.clip(1)).mean())


def _seen(
    camera: Camera, meshes: Mapping[str, trimesh.Trimesh], masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the visibility of each vertex by mesh name: bool (vertices,).

    A vertex is visible if the camera sees it and it projects into the mask of its object.
    """
    import trimesh

    whole: Any = trimesh.util.concatenate(
        [trimesh.Trimesh(m.vertices, m.faces, process=False) for m in meshes.values()]
    )
    origins, rays = camera.rays(DEPTHS)
    depth = np.full(DEPTHS * DEPTHS, np.inf)
    places, index, _ = whole.ray.intersects_location(origins, rays, multiple_hits=False)
    depth[index] = np.linalg.norm(places - origins[index], axis=-1)
    depth = depth.reshape(DEPTHS, DEPTHS)
    out = {}
    for name, mesh in meshes.items():
        place, distance = camera.project(mesh.vertices)
        pixel = np.floor((place + 1) / 2 * DEPTHS).astype(int).clip(0, DEPTHS - 1)
        inside = _eroded(masks[name])
        own = np.floor((place + 1) / 2 * len(inside)).astype(int)
        shown = ((own >= 0) & (own < len(inside))).all(1)
        own = own.clip(0, len(inside) - 1)
        toward = -camera.view.distance * camera.view.axes()[2] - mesh.vertices
        facing = (mesh.vertex_normals * toward).sum(-1) > 0.2 * np.linalg.norm(toward, axis=-1)
        near = distance < depth[pixel[:, 1], pixel[:, 0]] + NEAR
        out[name] = shown & near & facing & inside[own[:, 1], own[:, 0]]
    return out


def _without_background(image: np.ndarray, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Replace pixels outside the masks by the nearest pixel inside a mask; mask edges count as outside.

    Vertices at the edge of a silhouette would otherwise take the color of the background.
    """
    from scipy.ndimage import distance_transform_edt

    inside = np.any([_eroded(mask) for mask in masks.values()], axis=0)
    nearest: Any = distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return image[tuple(nearest)]


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Return a mask without its edge, because image pixels at the edge often contain background color.

    If nothing would remain, the mask is unchanged.
    """
    from scipy.ndimage import binary_erosion

    inner = np.asarray(binary_erosion(mask, iterations=max(1, max(mask.shape) // 200)))
    return inner if inner.any() else mask


def _nearest(vertices: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return the index of the nearest visible vertex for each vertex (n, 3).

    The result for a visible vertex is its own index.
    """
    from scipy.spatial import KDTree

    out, known = np.arange(len(vertices)), np.flatnonzero(seen)
    out[~seen] = known[KDTree(vertices[known]).query(vertices[~seen])[1]]
    return out


def _squared(mask: np.ndarray, side: int, pad: list[int]) -> np.ndarray:
    """Pad a mask (h, w) with False to a square (side, side).

    `pad` contains the number of rows above the mask and the number of columns left of it.
    """
    out = np.zeros((side, side), bool)
    out[pad[0] : pad[0] + mask.shape[0], pad[1] : pad[1] + mask.shape[1]] = mask
    return out


def _small(mask: np.ndarray) -> np.ndarray:
    """Resize a square mask to (SIDE, SIDE). A pixel is True if the mask covers at least half of it.

    If no pixel is half covered, the pixels with the largest coverage are True.
    """
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((SIDE, SIDE), Image.Resampling.BOX)
    share = np.asarray(image)
    return share >= min(128, share.max())
