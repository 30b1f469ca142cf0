"""Conversion of mesh files to training scenes: surfaces, rendered images and segmentations."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from inlaid import limits
from inlaid.console import progress
from inlaid.data.scenes import Finding
from inlaid.files import atomic
from inlaid.media import mesh_render, meshes
from inlaid.media.kinds import MediaError
from inlaid.media.mesh_files import (
    FILES,
    GROUPINGS,
    OTHER_FILES,
    Grouping,
    MeshObject,
    gray,
    read_objects,
)
from inlaid.media.mesh_looks import Look
from inlaid.media.mesh_render import View
from inlaid.media.mesh_surfaces import outward, sample_outer
from inlaid.media.meshes import POINTS
from inlaid.media.scene import DESCRIPTION, SEGMENTATION, SMALL, image_size, read_image, unique_names
from inlaid.paths import Root
from inlaid.reading import FileError
from inlaid.text import printable

if TYPE_CHECKING:
    import trimesh

Up = Literal["x", "y", "z", "-x", "-y", "-z"]
"""Axis that points up in a mesh file."""

UPS: tuple[Up, ...] = ("x", "y", "z", "-x", "-y", "-z")

REPORTED = 0.01
"""Minimum fraction of an object's surface for a warning about hidden parts or flipped normals."""


@dataclass(frozen=True)
class MeshOptions:
    """Options for importing meshes."""

    count: int = 4
    """Number of rendered views per mesh file."""
    size: int = 512
    """Width and height of the rendered images in pixels."""
    group: Grouping = "parent"
    """How the parts of a mesh file are grouped into objects; see `read_objects`."""
    up: Up | None = None
    """Axis that points up in the mesh files; it becomes the y axis of the scenes. Default: y."""
    points: int = POINTS
    """Number of points per surface."""
    seed: int = 0
    """Seed of the random cameras and surface points."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: if `group` or `up` has an unknown value.
        """
        if self.group not in GROUPINGS:
            raise ValueError(f"--group {self.group}: use {', '.join(GROUPINGS[:-1])} or {GROUPINGS[-1]}")
        if self.up is not None and self.up not in UPS:
            raise ValueError(f"--up {self.up}: use {', '.join(UPS[:-1])} or {UPS[-1]}")


def import_meshes(
    source: Path, out: Path, options: MeshOptions = MeshOptions(), *, bad: Literal["skip", "stop"] = "skip"
) -> list[Finding]:
    """Convert a mesh file, or all mesh files in a folder and its subfolders, to training scenes.

    Args:
        source: mesh file or folder.
        out: output folder, which must be empty or not exist. Each view of a file becomes a subfolder.
        options: options of the import.
        bad: `skip` leaves out files and objects that cannot be used; `stop` raises an error before anything
            is written.

    Returns:
        Problems found; those with severity `error` are files and objects that were left out.

    Raises:
        ValueError: if there are no meshes, `out` is not empty, or no scene was written. If `bad` is `stop`,
            also if a file or object cannot be used.
    """
    if bad not in ("skip", "stop"):
        raise ValueError(f"--bad-meshes {bad}: use skip or stop")
    found, findings = _sources(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty: use another folder")
    root = source if source.is_dir() else source.parent
    if bad == "stop":
        wrong = list(findings)
        with progress("check meshes", len(found), "mesh") as advance:
            for path in found:
                room = _Room(path, _label(path, root), options)
                wrong += [f for f in room.findings if f.severity == "error"]
                advance()
        if wrong:
            lines = [f"{f.name}: {f.message}" for f in wrong]
            raise ValueError("\n".join([*lines, "repair or remove these meshes, or pass --bad-meshes skip"]))
    findings += prepare(found, out, options, root=root)
    if not out.is_dir() or not any(out.iterdir()):
        raise ValueError("\n".join(f"{f.name}: {f.message}" for f in findings))
    if options.up is None and any(p.suffix.lower() not in (".glb", ".gltf") for p in found):
        why = ".obj, .ply and .stl files do not state which axis points up: y is assumed, else pass --up z"
        findings.append(Finding("warning", source.name, why, "up"))
    return findings


def _sources(source: Path) -> tuple[list[Path], list[Finding]]:
    """Return the mesh files in a folder, and problems with files that cannot be imported.

    `source` may also be a single mesh file.

    Raises:
        ValueError: if there are no mesh files.
    """
    if source.is_file() and source.suffix.lower() in FILES:
        return [source], []
    if not source.is_dir():
        raise ValueError(
            f"{source}: no such folder" if not source.exists() else f"{source}: is not a mesh file"
        )
    tree, found, findings = Root(source), [], []
    for place, _, names in tree.walk():
        for path in (place / name for name in names):
            suffix, name = path.suffix.lower(), path.relative_to(source).as_posix()
            if suffix in OTHER_FILES:
                why = f"{suffix} files are not supported: export it as .glb"
                findings.append(Finding("error", name, why))
            elif suffix in FILES:
                try:
                    found.append(tree.guard(path))
                except FileError as error:
                    findings.append(Finding("error", name, error.cause, error.code))
    for folder, error in tree.skipped.items():
        findings.append(Finding("error", folder.relative_to(source).as_posix(), error.cause, error.code))
    if not found:
        lines = [f"{source}: contains no meshes ({' '.join(FILES)})"]
        raise ValueError("\n".join([*lines, *(f"{f.name}: {f.message}" for f in findings)]))
    return found, findings


def views(count: int, seed: int) -> Iterator[View]:
    """Yield random cameras as in MIDI's training data: azimuth 0 to 360 degrees, elevation 0 to 30 degrees.

    The full circle is divided into `count` equal sectors; the azimuth of each camera is in its own sector.
    """
    random = np.random.default_rng(seed)
    for i in range(count):
        yield View(
            azimuth=(360 * i / count + random.uniform(0, 360 / count)) % 360, elevation=random.uniform(0, 30)
        )


# --- one mesh file ------------------------------------------------------------------------------------------


class _Room:
    """Usable objects of a mesh file in scene coordinates, and the images and segmentations from the user."""

    def __init__(self, path: Path, name: str, options: MeshOptions) -> None:
        self.path = path
        self.name = name
        self.findings: list[Finding] = []
        self.names: list[str] = []
        self.meshes: list[trimesh.Trimesh] = []
        self.looks: list[Look] = []
        self.given: list[tuple[np.ndarray, np.ndarray]] = []
        self.transform = np.eye(4)
        try:
            objects, notes = read_objects(path, options.group)
            if many := limits.OBJECTS.exceeded(len(objects), f"has {len(objects):,} objects"):
                raise MediaError(path, many, "several")
            self.given = _supplied(path, len(objects))
            self._place(objects, options)
        except FileError as error:
            text = str(error).removeprefix(f"{path}: ").removeprefix(f"{path.parent}/")
            self.report("error", text, error.code)
            self.meshes = []
            return
        for note in notes:
            self.report("warning", note)

    def report(self, severity: Literal["error", "warning"], message: str, code: str = "surface") -> None:
        """Record a problem."""
        self.findings.append(Finding(severity, self.name, printable(message, lines=False), code))

    def _place(self, objects: Sequence[MeshObject], options: MeshOptions) -> None:
        """Check the objects. Move and scale them together into the cube from -1 to 1.

        Raises:
            MediaError: if no object can be used. If the user supplied segmentations, also if any object
                cannot be used, because the object IDs would no longer match.
        """
        usable: list[MeshObject] = []
        for one, name in zip(objects, unique_names([o.name for o in objects]), strict=True):
            broken = int((~np.isfinite(one.triangles)).any((1, 2)).sum())
            faces = np.zeros(0, bool) if broken else _nonempty(one.triangles)
            why = ""
            if broken:
                why = f"{broken} of its {len(one.triangles)} triangles have coordinates that are not finite"
            elif not faces.any():
                why = "all of its triangles have no area"
            if why and (self.given or len(objects) == 1):
                raise MediaError(self.path, f"`{name}`: {why}", "surface")
            if why:
                self.report("error", f"`{name}`: {why}; the object is left out")
                continue
            self.names.append(name)
            usable.append(MeshObject(name, one.triangles[faces], one.look.of(faces) if one.look else None))
        if not usable:
            raise MediaError(self.path, "has no object that can be used", "surface")
        turn = _upright(options.up or "y")
        corners = np.concatenate([o.triangles.reshape(-1, 3) for o in usable]) @ turn[:3, :3].T
        self.transform = meshes.normalizing(np.stack([corners.min(0), corners.max(0)])) @ turn
        plain = [name for name, one in zip(self.names, usable, strict=True) if one.look is None]
        if plain and not self.given:
            which = f"`{plain[0]}`" + (f" and {len(plain) - 1} more" if len(plain) > 1 else "")
            self.report("warning", f"{which}: without colors, rendered in gray", "gray")
        for name, one in zip(self.names, usable, strict=True):
            placed = one.moved(self.transform)
            found = outward(placed.triangles)
            self.meshes.append(found.mesh)
            look = one.look or gray(len(one.triangles))
            self.looks.append(look.turned(found.turned))
            if found.components:
                why = f"{found.components} of its parts were inside out and were flipped"
                self.report("warning", f"`{name}`: {why}", "flipped")
            if not found.mesh.is_watertight:
                self.report("warning", f"`{name}` is not watertight: normals may be wrong")


def _nonempty(triangles: np.ndarray) -> np.ndarray:
    """Return a mask, bool (m,), of the triangles whose area is not zero, up to rounding errors."""
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    size = float(np.ptp(triangles.reshape(-1, 3), axis=0).max())
    return np.linalg.norm(normals, axis=-1) > 1e-14 * size * size


def _upright(up: Up) -> np.ndarray:
    """Return the rotation (4, 4) that turns the axis `up` to the y axis.

    If `up` is z, the y axis turns to -z.
    """
    sign = -1.0 if up.startswith("-") else 1.0
    rows = {
        "x": [[0, -sign, 0], [sign, 0, 0], [0, 0, 1]],
        "y": [[1, 0, 0], [0, sign, 0], [0, 0, sign]],
        "z": [[1, 0, 0], [0, 0, sign], [0, -sign, 0]],
    }[up[-1]]
    out = np.eye(4)
    out[:3, :3] = rows
    return out


def _supplied(source: Path, objects: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the images and object segmentations that the user stored beside a mesh file.

    They are used instead of rendered images. Each view of a mesh file `NAME.glb` is a pair of files
    `NAME*_rgb.png` and `NAME*_seg.png`. If there is also a mesh file `NAME_2.glb`, `NAME_2_rgb.png` belongs
    to that file.

    Args:
        source: the mesh file.
        objects: number of objects in the mesh file.

    Raises:
        MediaError: if a file cannot be read, a segmentation is missing, sizes differ, or a segmentation
            contains an object ID above `objects`.
    """
    found = []
    stems = [p.stem for p in source.parent.iterdir() if p.suffix.lower() in FILES]
    for path in sorted(source.parent.glob(f"{glob.escape(source.stem)}*_rgb.png")):
        if max((s for s in stems if path.name.startswith(s)), key=len) != source.stem:
            continue
        seg = path.with_name(path.name.replace("_rgb.png", "_seg.png"))
        if not seg.is_file():
            raise MediaError(path, f"has no {seg.name} beside it", "no-segmentation")
        root = Root(source.parent)
        image, ids = read_image(root.guard(path)), meshes.read_ids(root.guard(seg))
        if image.shape[:2] != ids.shape:
            raise MediaError(
                seg, f"is {image_size(ids)}, but {path.name} is {image_size(image)}", "image-size"
            )
        if ids.max() > objects:
            raise MediaError(seg, f"contains ID {ids.max()}, but the mesh has {objects} objects", "several")
        found.append((image, ids.astype(np.uint8 if ids.max() < 256 else np.uint16)))
    return found


def prepare(
    sources: Sequence[Path], out: Path, options: MeshOptions = MeshOptions(), *, root: Path | None = None
) -> list[Finding]:
    """Convert mesh files to training scenes: normalize each file, sample surfaces, render views.

    If there are images and segmentations beside a mesh file, they are used instead of rendered ones. Object
    IDs in these segmentations must be 1, 2, ... in the sorted order of the object names.

    Args:
        sources: mesh files, with a separate mesh for each object.
        out: output folder, with a subfolder for each source and view.
        options: options of the import.
        root: folder whose subfolders are recreated in `out`. Default: all scenes are written directly to
            `out`.

    Returns:
        Problems found, such as unreadable files, and objects that are not watertight.
    """
    findings = []
    labels = [Path(_label(p, root)).with_suffix("").as_posix() for p in sources]
    with progress("import", options.count * len(sources), "view") as advance:
        for i, (source, label) in enumerate(zip(sources, labels, strict=True), 1):
            advance(0, note=_label(source, root))
            if labels.count(label) > 1:
                label += source.suffix.replace(".", "_")
            room = _Room(source, _label(source, root), options)
            if room.meshes:
                _write_views(room, out, label, options, advance)
            findings += room.findings
            advance(done=options.count * i, note="")
    return findings


def _label(path: Path, root: Path | None) -> str:
    """Return the path of a mesh file relative to `root`; its file name if `root` is None."""
    return (path.relative_to(root) if root else Path(path.name)).as_posix()


def _write_views(
    room: _Room, out: Path, label: str, options: MeshOptions, advance: Callable[[], None]
) -> None:
    """Write a training scene for each view of a mesh file, and call `advance` after each view.

    A scene contains an image, its segmentation, and surface points of the visible objects. Views without
    visible objects are skipped.
    """
    surfaces: dict[int, np.ndarray] = {}
    for number, (name, mesh) in enumerate(zip(room.names, room.meshes, strict=True), 1):
        try:
            outer = sample_outer(mesh, options.points, options.seed + number - 1)
        except ValueError as error:
            room.report("error", f"`{name}`: {error}; the file is left out")
            return
        surfaces[number] = outer.points
        if outer.hidden > REPORTED:
            why = f"{outer.hidden:.0%} of its surface is hidden inside and is left out"
            room.report("warning", f"`{name}`: {why}", "inner")
        if outer.flipped > REPORTED:
            why = f"{outer.flipped:.0%} of its normals pointed inward and were flipped"
            room.report("warning", f"`{name}`: {why}", "flipped")
    for i, (image, ids) in enumerate(_images(room, options)):
        areas = np.bincount(ids.ravel(), minlength=len(room.meshes) + 1) / ids.size
        seen = [n for n in surfaces if areas[n] > SMALL]
        hidden = [room.names[n - 1] for n in surfaces if n not in seen]
        if hidden:
            more = f" and {len(hidden) - 1} more objects are" if len(hidden) > 1 else " is"
            why = f"`{hidden[0]}`{more} hidden in this view"
            room.findings.append(Finding("warning", f"{label}_{i:02d}", why, "hidden"))
        if seen:
            _write(out / f"{label}_{i:02d}", image, ids, {n: surfaces[n] for n in seen}, room)
        advance()


def _images(room: _Room, options: MeshOptions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the image of each view, and the object ID of each pixel.

    These are the images that the user supplied. If there are none, the meshes are rendered.
    """
    yield from room.given
    if not room.given:
        corners = np.concatenate([mesh.vertices for mesh in room.meshes])
        for view in views(options.count, options.seed):
            yield mesh_render.render(room.meshes, view.fitting(corners), options.size, looks=room.looks)


def _write(
    folder: Path, image: np.ndarray, ids: np.ndarray, surfaces: dict[int, np.ndarray], room: _Room
) -> None:
    about = {
        "names": {str(n): room.names[n - 1] for n in surfaces},
        "source": room.name,
        "transform": room.transform.round(9).tolist(),
    }
    with atomic(folder) as part:
        part.mkdir(parents=True)
        Image.fromarray(image).save(part / "scene_rgb.png")
        Image.fromarray(ids).save(part / SEGMENTATION)
        for number, points in surfaces.items():
            np.save(part / f"surface_{number}.npy", points)
        (part / DESCRIPTION).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
