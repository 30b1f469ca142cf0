"""Render meshes to images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.media.mesh_looks import Look, to_linear

if TYPE_CHECKING:
    import trimesh


# --- rendering ----------------------------------------------------------------------------------------------

PALETTE = (
    (222, 96, 80), (80, 140, 220), (110, 185, 110), (235, 180, 70), (150, 115, 205), (90, 190, 190),
    (225, 130, 185), (150, 130, 110),
)  # fmt: skip
"""RGB colors of objects, by index of the object in the scene."""


@dataclass(frozen=True)
class View:
    """Perspective camera that looks at the origin. The y axis points up.

    All angles are in degrees. At elevation 0, the camera is on the +z axis for azimuth 0, and on the +x axis
    for azimuth 90. `field` is the field of view.
    """

    azimuth: float = 30.0
    elevation: float = 20.0
    distance: float = 5.0
    field: float = 30.0

    def axes(self) -> np.ndarray:
        """Return the camera's right, up and forward unit vectors as the rows of an array (3, 3)."""
        a, e = np.radians([self.azimuth, self.elevation])
        forward = -np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
        right = np.cross(forward, [0.0, 1.0, 0.0])
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(right, forward), forward])

    def fitting(self, points: np.ndarray, margin: float = 0.95) -> View:
        """Return a camera whose picture contains all points (n, 3). It is moved back if needed.

        `margin` is the largest share of the picture's width and height that the points may fill.
        """
        x, y, depth = self.axes() @ points.T
        reach = margin * np.tan(np.radians(self.field) / 2)
        needed = (np.maximum(np.abs(x), np.abs(y)) / reach - depth).max()
        return replace(self, distance=max(self.distance, float(needed)))

    def rays(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the origin and the unit direction of each pixel's ray, as two arrays (size * size, 3).

        Rays are ordered row by row from the top left pixel.
        """
        right, up, forward = self.axes()
        eye = -self.distance * forward
        reach = np.tan(np.radians(self.field) / 2)
        y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
        directions = forward + reach * (x[..., None] * right - y[..., None] * up)
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        return np.broadcast_to(eye, (size * size, 3)).copy(), directions.reshape(-1, 3)


LAYERS = 16
"""Maximum number of transparent triangles in front of a visible point."""


def render(
    meshes: Sequence[trimesh.Trimesh],
    view: View = View(),
    size: int = 384,
    colors: Sequence[Sequence[int]] = PALETTE,
    looks: Sequence[Look | None] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Render objects by ray casting on the CPU.

    Args:
        meshes: one mesh per object, in scene coordinates.
        view: the camera.
        size: height and width of the image.
        colors: RGB colors for the objects that have no entry in `looks`. The colors are repeated cyclically.
        looks: vertex colors and textures of each object, or None for an object without them. May be empty if
            no object has them.

    Returns:
        Image on white, uint8 (size, size, 3), and object IDs (size, size). ID 0 is the background. IDs 1, 2,
        ... are the objects in the order of `meshes`. IDs are uint8, or uint16 if there are more than 255
        objects.
    """
    import trimesh

    origins, directions = view.rays(size)
    image = np.full((size * size, 3), 255, np.uint8)
    ids = np.zeros(size * size, np.uint8 if len(meshes) < 256 else np.uint16)
    if not meshes:
        return image.reshape(size, size, 3), ids.reshape(size, size)
    whole: Any = trimesh.util.concatenate(list(meshes))
    owner = np.repeat(np.arange(len(meshes)), [len(m.faces) for m in meshes])
    plain = np.array([colors[i % len(colors)] for i in range(len(meshes))], np.float64)
    look = _joined(meshes, looks, plain / 255)
    light = np.array([0.4, 0.8, 0.45]) / np.linalg.norm([0.4, 0.8, 0.45])
    triangles = np.asarray(whole.triangles)
    pixels = np.arange(size * size)
    for _ in range(LAYERS):
        hit = whole.ray.intersects_first(origins[pixels], directions[pixels])
        pixels, hit = pixels[hit >= 0], hit[hit >= 0]
        if not len(pixels):
            break
        normals, rays = whole.face_normals[hit], directions[pixels]
        paint, visible = plain[owner[hit]], np.ones(len(hit), bool)
        if look:
            corners = triangles[hit]
            across = (rays * normals).sum(-1)
            across = np.where(np.abs(across) < 1e-12, 1e-12, across)
            along = ((corners[:, 0] - origins[pixels]) * normals).sum(-1) / across
            points = origins[pixels] + along[:, None] * rays
            weights = np.nan_to_num(trimesh.triangles.points_to_barycentric(corners, points)).clip(0)
            weights /= weights.sum(-1, keepdims=True).clip(1e-12)
            found, visible = look.at(hit, weights)
            paint = 255 * found
            origins[pixels] = points + 1e-4 * rays
        shade = 0.35 + 0.35 * np.abs((normals * rays).sum(-1)) + 0.3 * (normals @ light).clip(0)
        shown = (paint * shade[:, None]).round().clip(0, 255).astype(np.uint8)
        image[pixels[visible]], ids[pixels[visible]] = shown[visible], owner[hit[visible]] + 1
        pixels = pixels[~visible]
    return image.reshape(size, size, 3), ids.reshape(size, size)


def _joined(
    meshes: Sequence[trimesh.Trimesh], looks: Sequence[Look | None], plain: np.ndarray
) -> Look | None:
    """Join the looks (colors and textures) of all meshes; return None if no mesh has a look.

    A mesh without a look gets its color in `plain` (sRGB in [0, 1]).
    """
    if not any(looks):
        return None
    opaque = np.concatenate([to_linear(plain), np.ones((len(plain), 1))], -1)
    return Look.joined(
        [
            look or Look.plain(np.tile(color, (len(mesh.faces), 3, 1)))
            for mesh, look, color in zip(meshes, looks, opaque, strict=True)
        ]
    )


def turntable(
    meshes: Sequence[trimesh.Trimesh], frames: int = 8, size: int = 256, looks: Sequence[Look | None] = ()
) -> np.ndarray:
    """Render evenly spaced views around the scene: uint8 (frames, size, size, 3)."""
    views = [View(azimuth=360 * i / frames) for i in range(frames)]
    return np.stack([render(meshes, view, size, looks=looks)[0] for view in views])
