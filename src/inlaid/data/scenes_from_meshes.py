"""Conversion of mesh files to training scenes: surfaces, renders and segmentations."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from inlaid.data.scenes import Finding
from inlaid.files import atomic
from inlaid.media import mesh_render, meshes
from inlaid.media.kinds import MediaError
from inlaid.media.mesh_render import View
from inlaid.media.meshes import FILES, POINTS
from inlaid.media.scene import SMALL, image_size, read_image

if TYPE_CHECKING:
    pass


# --- import of meshes ---------------------------------------------------------------------------------------


def views(count: int, seed: int) -> Iterator[View]:
    """Yield random cameras as in MIDI's training data: azimuth 0 to 360 degrees, elevation 0 to 30 degrees.

    The azimuths are spread over `count` equal sectors.
    """
    random = np.random.default_rng(seed)
    for i in range(count):
        yield View(
            azimuth=(360 * i / count + random.uniform(0, 360 / count)) % 360, elevation=random.uniform(0, 30)
        )


def import_meshes(folder: Path, out: Path, *, count: int = 4, size: int = 512) -> list[Finding]:
    """Convert the mesh files in a folder to training scenes with `prepare`, and return the problems found.

    Raises:
        ValueError: if the folder has no meshes, if no scene was written, or if `out` is not empty.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sources = sorted(p for p in folder.iterdir() if p.suffix.lower() in FILES)
    if not sources:
        raise ValueError(f"{folder}: contains no meshes ({' '.join(FILES)})")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty: use another folder")
    findings = prepare(sources, out, count=count, size=size)
    if not out.is_dir():
        raise ValueError("\n".join(f"{f.name}: {f.message}" for f in findings))
    return findings


def _supplied(source: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read images and segmentations that the user supplied beside a mesh file; they replace renders.

    Each view of a mesh file `NAME.glb` is a pair of files `NAME*_rgb.png` and `NAME*_seg.png`.

    Raises:
        MediaError: if a file cannot be read, a segmentation is missing, or sizes differ.
    """
    found = []
    for path in sorted(source.parent.glob(f"{glob.escape(source.stem)}*_rgb.png")):
        seg = path.with_name(path.name.replace("_rgb.png", "_seg.png"))
        if not seg.is_file():
            raise MediaError(path, f"has no {seg.name} beside it", "no-segmentation")
        image, ids = read_image(path), meshes.read_ids(seg)
        if image.shape[:2] != ids.shape:
            raise MediaError(
                seg, f"is {image_size(ids)}, but {path.name} is {image_size(image)}", "image-size"
            )
        found.append((image, ids.astype(np.uint8)))
    return found


def prepare(
    sources: Sequence[Path],
    out: Path,
    *,
    count: int = 4,
    size: int = 512,
    points: int = POINTS,
    seed: int = 0,
) -> list[Finding]:
    """Convert mesh files to training scenes: normalize each file, sample surfaces, render views.

    If there are images and segmentations beside a mesh file, they are used instead of renders. Object IDs in
    these segmentations must be 1, 2, ... in the sorted order of the object names.

    Args:
        sources: mesh files, with a separate mesh for each object.
        out: output folder, with a subfolder for each source and view.
        count: number of rendered views per source.
        size: width and height of the renders in pixels.
        points: number of points per surface.
        seed: seed of cameras and points.

    Returns:
        Problems found: unreadable files, and objects that are inside out, not watertight or hidden.
    """
    findings = []
    for source in sources:
        try:
            parts, given = meshes.read_scene(source), _supplied(source)
        except ValueError as error:
            findings.append(Finding("error", source.name, str(error)))
            continue
        bounds = np.stack([m.bounds for m in parts.values()])
        transform = meshes.normalizing(np.stack([bounds[:, 0].min(0), bounds[:, 1].max(0)]))
        moved = []
        for name, one in parts.items():
            whole, turned = meshes.outward(one.apply_transform(transform))
            moved.append(whole)
            if turned:
                many = f"{turned} of its parts were inside out and were flipped"
                findings.append(Finding("warning", source.name, f"`{name}`: {many}", "flipped"))
            if not whole.is_watertight:
                why = "is not watertight: normals may be wrong"
                findings.append(Finding("warning", source.name, f"`{name}` {why}", "surface"))
        surfaces = [meshes.sample_surface(m, points, seed + i) for i, m in enumerate(moved)]
        pairs = given or [mesh_render.render(moved, view, size) for view in views(count, seed)]
        for i, (image, ids) in enumerate(pairs):
            seen = [n for n in range(1, len(moved) + 1) if (ids == n).mean() > SMALL]
            hidden = [list(parts)[n - 1] for n in range(1, len(moved) + 1) if n not in seen]
            if hidden:
                findings.append(
                    Finding("warning", f"{source.stem}_{i:02d}", f"`{hidden[0]}` is hidden in this view")
                )
            if seen:
                _write(out / f"{source.stem}_{i:02d}", image, ids, {n: surfaces[n - 1] for n in seen})
    return findings


def _write(folder: Path, image: np.ndarray, ids: np.ndarray, surfaces: dict[int, np.ndarray]) -> None:
    with atomic(folder) as part:
        part.mkdir(parents=True)
        Image.fromarray(image).save(part / "scene_rgb.png")
        Image.fromarray(ids).save(part / "seg.png")
        for number, points in surfaces.items():
            np.save(part / f"surface_{number}.npy", points)
