"""Scenes: an input image with object masks and surface points, and the meshes generated from it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from inlaid.media.images import load_image
from inlaid.media.isosurface import Field, extract
from inlaid.media.kinds import MediaError
from inlaid.media.mesh_render import PALETTE
from inlaid.media.meshes import POINTS, Note, decimated, mesh_problems, read_ids
from inlaid.media.pixels import to_rgb
from inlaid.paths import Root
from inlaid.reading import parse_json, read_text, reading

if TYPE_CHECKING:
    import trimesh


SMALL = 0.001
"""Minimum area of an object, as a fraction of the input image. Smaller objects are left out."""

MAX_SEGMENTS = 64
"""Maximum number of objects in a segmentation image; an image with more is probably not a segmentation."""

SEGMENTATION = "seg.png"
"""File name of the segmentation image, which contains the object IDs of a scene."""

DESCRIPTION = "scene.json"
"""Name of an optional file in a scene folder, which contains the names of the objects."""

MAX_NAME = 200
"""Maximum number of characters in the name of an object."""

MAX_OBJECTS = 7
"""Maximum number of objects in one training step."""


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene, with its mask and its surface points."""

    number: int
    """ID of the object in the segmentation image."""
    mask: np.ndarray
    """Pixels of the image that show the object, bool (h, w)."""
    surface: np.ndarray
    """Surface points with normals, float32 (n, 6), in scene coordinates."""
    name: str = ""
    """Name from `scene.json` or 3D-FRONT, unique in the scene; empty if the object has none."""

    @property
    def label(self) -> str:
        """Name of the object; if it has none, `object_` followed by its ID, such as `object_3`."""
        return self.name or f"object_{self.number}"


@dataclass(frozen=True)
class SceneSample:
    """Scene loaded into memory: input image, objects, and messages about unusual data."""

    name: str
    image: np.ndarray
    """Input image, uint8 (h, w, 3)."""
    objects: list[SceneObject]
    notes: tuple[Note, ...] = ()

    def alone(self, index: int) -> np.ndarray:
        """Return the image with all pixels white except those of one object: uint8 (h, w, 3)."""
        return np.where(self.objects[index].mask[..., None], self.image, np.uint8(255))


def read_image(path: Path) -> np.ndarray:
    """Read an image as it is displayed, over white: uint8 (h, w, 3).

    Raises:
        MediaError: if the file cannot be read or has more than 8 bits per channel; the message contains the
            path.
    """
    with load_image(path) as image:
        return to_rgb(path, image)


def unique_names(names: Sequence[str]) -> list[str]:
    """Make the names of objects 1, 2, ... unique and valid for `scene.json`.

    If object 3 has no name, it is called `object_3`. A name gets a number at its end if an earlier object has
    the same name, or if it is the default name of another object. Long names are truncated.
    """
    found: list[str] = []
    for number, name in enumerate(names, 1):
        base = name.strip()[: MAX_NAME - 10] or f"object_{number}"
        name, copy = base, 1
        while name in found or (re.fullmatch(r"object_\d+", name) and name != f"object_{number}"):
            copy += 1
            name = f"{base}_{copy}" if not base.startswith("object_") else f"{base}-{copy}"
        found.append(name)
    return found


def read_names(folder: Path, root: Root | None = None) -> dict[int, str]:
    """Read the names of a scene's objects from `scene.json`.

    Args:
        folder: folder of the scene.
        root: root folder of the dataset. Default: `folder`.

    Returns:
        Unique names by object ID; empty if the file does not exist or has no `names`.

    Raises:
        FileError: if the file is invalid; the message names the file and the problem.
    """
    path = folder / DESCRIPTION
    if not os.path.lexists(path):
        return {}
    (root or Root(folder)).guard(path)
    with reading(path, MediaError, "JSON"):
        found = parse_json(read_text(path))
        names = found.get("names", {}) if isinstance(found, dict) else None
        if not isinstance(names, dict):
            raise MediaError(path, 'must be {"names": {"1": "table", "2": "chair"}}', "names")
        for number, name in names.items():
            if not re.fullmatch(r"[1-9]\d{0,8}", number):
                raise MediaError(path, f"names: `{number[:40]}` is not an object ID, 1 or larger", "names")
            if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
                why = f"the name of object {number} must be a text of 1 to {MAX_NAME} characters"
                raise MediaError(path, why, "names")
        for number, name in names.items():
            if re.fullmatch(r"object_\d+", name) and name != f"object_{number}":
                why = f"object {number} has the name `{name}`, which is that of another object without a name"
                raise MediaError(path, why, "names")
        twice = [n for n, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise MediaError(path, f"two objects have the name `{twice[0]}`", "names")
    return {int(number): name for number, name in names.items()}


def published_order(path: Path, ids: np.ndarray) -> list[int]:
    """Return the object IDs of a segmentation, in the order of the published MIDI-3D pipeline.

    The published pipeline converts the segmentation to 8-bit gray and sorts the gray values. The order
    decides which part of the initial noise each object gets. Another order would therefore generate another
    scene from the same seed. Objects with the same gray value are all returned. Objects with gray value 0 are
    last.

    Args:
        path: segmentation.
        ids: object IDs of its pixels, int (h, w), from `meshes.read_ids`.

    Raises:
        MediaError: if the image cannot be read; the message names the file.
    """
    with load_image(path) as image:
        gray = np.asarray(image.convert("L")).astype(int)
    numbers, first = np.unique(ids, return_index=True)
    shown = {int(n): int(g) for n, g in zip(numbers, gray.ravel()[first], strict=True) if n > 0}
    return sorted(shown, key=lambda n: (shown[n] == 0, shown[n], n))


def image_size(image: np.ndarray) -> str:
    """Return the size of an image as text, `HEIGHTxWIDTH`, for messages."""
    return f"{image.shape[0]}x{image.shape[1]}"


# --- generated scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratedScene:
    """Generated scene: meshes by object name, in scene coordinates, and messages about defects."""

    meshes: dict[str, trimesh.Trimesh]
    empty: tuple[str, ...] = ()
    """Names of objects without a mesh."""
    notes: tuple[str, ...] = ()


def make_meshes(fields: Mapping[str, Field], resolution: int, triangles: int | None = None) -> GeneratedScene:
    """Extract one mesh per object from its implicit function, and check the meshes for defects.

    Args:
        fields: implicit function of each object by name, negative inside the object.
        resolution: grid cells per side of each object's bounding box.
        triangles: maximum number of triangles per object. Larger meshes are decimated with the package
            fast-simplification. Default: no limit.

    Raises:
        ValueError: if a mesh must be decimated and fast-simplification is not installed.
    """
    meshes, empty, notes = {}, [], []
    coarse = min(64, resolution)
    for name, field_ in fields.items():
        found, note = extract(field_, resolution=resolution, coarse=coarse)
        notes += [f"{name}: {note}"] if note else []
        if found is None:
            empty.append(name)
            notes.append(f"{name} is empty: the field has no surface in the box")
            continue
        if triangles and len(found.faces) > triangles:
            found = decimated(found, triangles)
        notes += [f"{name} {problem}" for problem in mesh_problems(found)]
        meshes[name] = found
    return GeneratedScene(meshes, tuple(empty), tuple(notes))


def thinned(surface: np.ndarray, count: int = POINTS) -> np.ndarray:
    """Select `count` pseudo-random points from the points of a surface (n, 6); return (count, 6).

    Every call selects the same points. Points are repeated only if n < `count`.
    """
    drawn = np.random.default_rng(0).choice(len(surface), count, replace=len(surface) < count)
    return surface if len(surface) == count else surface[drawn]


def invalid_pairs(given: Sequence[Sequence[str]]) -> list[str]:
    """Return an error message for each invalid pair of an input image and a segmentation image."""
    found = []
    for pair in given:
        if len(pair) != 2:
            found.append(f"a scene needs an input image and a segmentation, got {len(pair)} image(s)")
            continue
        try:
            picture, ids = read_image(Path(pair[0])), read_ids(Path(pair[1]))
        except ValueError as error:
            found.append(str(error))
            continue
        if picture.shape[:2] != ids.shape:
            found.append(f"{pair[1]} is {image_size(ids)}, but {pair[0]} is {image_size(picture)}")
        elif not ids.any():
            found.append(f"{pair[1]} contains no object: all pixels are background")
        elif len(np.unique(ids)) > MAX_SEGMENTS + 1:
            found.append(
                f"{pair[1]} contains {len(np.unique(ids)) - 1} objects, more than {MAX_SEGMENTS}: use a "
                "segmentation, with one color or number for each object and without soft edges"
            )
    return found


# --- rendering ----------------------------------------------------------------------------------------------


def tiles(sample: SceneSample, cell: int = 240) -> np.ndarray:
    """Return four preview images of a scene: uint8 (4, cell, cell, 3).

    They show the input image, the image with colored objects, and the surface points from two sides.
    """
    overlay = sample.image.astype(np.float32)
    for i, one in enumerate(sample.objects):
        color = np.array(PALETTE[i % len(PALETTE)], np.float32)
        overlay[one.mask] = 0.45 * overlay[one.mask] + 0.55 * color
    found = [sample.image, overlay.astype(np.uint8), _cloud(sample, cell, 30), _cloud(sample, cell, 120)]
    return np.stack([_tile(t, cell) for t in found])


def _tile(image: np.ndarray, cell: int) -> np.ndarray:
    """Center an image in a white square of `cell` pixels; a larger image is scaled down."""
    picture = Image.fromarray(image)
    picture.thumbnail((cell, cell))
    out = Image.new("RGB", (cell, cell), "white")
    out.paste(picture, ((cell - picture.width) // 2, (cell - picture.height) // 2))
    return np.asarray(out)


def _cloud(sample: SceneSample, size: int, azimuth: float) -> np.ndarray:
    """Render surface points from one side, colored by object and shaded by normal."""
    a, e = np.radians([azimuth, 20.0])
    toward = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    right = np.cross([0.0, 1.0, 0.0], toward)
    right /= np.linalg.norm(right)
    up = np.cross(toward, right)
    out = np.full((size, size, 3), 255, np.uint8)
    points = np.concatenate([o.surface for o in sample.objects])
    owner = np.repeat(np.arange(len(sample.objects)), [len(o.surface) for o in sample.objects])
    order = np.argsort(points[:, :3] @ toward)  # nearer points cover farther points
    points, owner = points[order], owner[order]
    x = ((points[:, :3] @ right) / 3.2 + 0.5) * size
    y = (0.5 - (points[:, :3] @ up) / 3.2) * size
    shade = 0.45 + 0.55 * (points[:, 3:] @ toward).clip(0)
    colors = np.array(PALETTE, np.float64)[owner % len(PALETTE)] * shade[:, None]
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    out[y[inside].astype(int), x[inside].astype(int)] = colors[inside]
    return out
