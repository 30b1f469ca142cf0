"""Scenes on disk: an input image, a segmentation, and points on the surface of each object.

Two layouts are supported. In the first, each scene is a folder with `scene_rgb.png`, `seg.png`, and a file
`surface_ID.npy` for each object. A single file `surface.npy`, which contains all objects in order of ID, may
replace the files `surface_ID.npy`. The second layout is the 3D-FRONT dataset as processed by the authors of
MIDI.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inlaid import limits
from inlaid.data.problems import KINDS
from inlaid.media import meshes
from inlaid.media.kinds import MediaError
from inlaid.media.mesh_files import FILES as MESH_FILES
from inlaid.media.meshes import Note, Surface
from inlaid.media.scene import (
    DESCRIPTION,
    SMALL,
    SceneObject,
    SceneSample,
    image_size,
    read_image,
    read_names,
    unique_names,
)
from inlaid.paths import Root
from inlaid.reading import FileError, parse_json, read_text
from inlaid.text import printable

IMAGES = ("scene_rgb.png", "scene_rgb.jpg", "scene_rgb.webp", "rgb.png", "rgb.jpg", "rgb.webp")
"""File names of the input image, in order of priority. The name `rgb` is meant for a single object on a
white background."""

READER = 1
"""Version of the output of `Scene.read`, which is part of cache keys. Increase it when the output changes."""


@dataclass(frozen=True)
class Finding:
    """Problem with one scene; a scene with an error is excluded from training."""

    severity: Literal["error", "warning"]
    name: str
    message: str
    code: str = "unreadable"


@dataclass(frozen=True)
class Scene:
    """Files of one scene."""

    name: str
    image: Path
    segmentation: Path
    surfaces: dict[int, Path] = field(hash=False)
    """Surface files, keyed by the object's ID in the segmentation. Key 0 is a single file for all objects,
    which contains their surfaces in order of ID."""
    names: dict[int, str] = field(default_factory=dict, hash=False)
    """Object names, keyed by ID in the segmentation. Objects may be unnamed."""
    view: str = ""
    strict: bool = True
    """True if every visible object must have a surface."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the scene."""
        return (self.image, self.segmentation, *self.surfaces.values())

    def read(self) -> SceneSample:
        """Read the image, the segmentation and the surfaces.

        Raises:
            MediaError: if a file is invalid; the message names the file and the problem.
        """
        image, ids = read_image(self.image), meshes.read_ids(self.segmentation)
        if image.shape[:2] != ids.shape:
            why = f"is {image_size(ids)}, but {self.image.name} is {image_size(image)}"
            raise MediaError(self.segmentation, why, "image-size")
        numbers = [n for n in np.unique(ids).tolist() if n > 0]
        if many := limits.OBJECTS.exceeded(len(numbers), f"contains {len(numbers):,} objects"):
            raise MediaError(self.segmentation, many, "several")
        read = self._surfaces(numbers)
        absent = sorted(set(read) - set(numbers))
        if absent and self.strict:
            why = f"does not contain object {absent[0]}, which has a surface; it contains " + (
                ", ".join(map(str, numbers)) or "none"
            )
            raise MediaError(self.segmentation, why, "absent")
        notes, objects = [], []
        for number, surface in sorted(read.items()):
            mask = ids == number
            if number in absent:
                notes.append(Note("unseen", f"object {number} is not visible in this view and is left out"))
                continue
            if mask.mean() <= SMALL:
                why = f"object {number} covers {mask.mean():.2%} of the input image and is left out"
                notes.append(Note("small", why))
                continue
            objects.append(SceneObject(number, mask, surface.points, self.names.get(number, "")))
            notes += [Note(note.code, f"object {number}: {note}") for note in surface.notes]
        if not objects:
            why = f"every object of {self.name} covers too little of the input image"
            raise MediaError(self.segmentation, why, "hidden")
        spare = [n for n in numbers if n not in read and (ids == n).mean() > SMALL]
        if spare:
            which = f"object{'s' * (len(spare) > 1)} {', '.join(map(str, spare))}"
            why = f"{which} in the segmentation {'have' if len(spare) > 1 else 'has'} no surface"
            if self.strict:
                cure = f"add surface_{spare[0]}.npy, or set its pixels to background"
                raise MediaError(self.segmentation, f"{why}: {cure}", "no-surface")
            notes.append(Note("bare", why))
        notes += _frame_notes(objects)
        return SceneSample(self.name, image, objects, tuple(notes))

    def _surfaces(self, numbers: Sequence[int]) -> dict[int, Surface]:
        """Read the surface of each object; the keys of the result are object IDs.

        `numbers` are the sorted object IDs in the segmentation. If one file contains the surfaces of all
        objects, they are in this order.
        """
        if list(self.surfaces) != [0]:
            out = {}
            for number, path in self.surfaces.items():
                found = _read_surface(path)
                if len(found) != 1:
                    raise MediaError(path, f"contains {len(found)} surfaces for one object", "several")
                out[number] = found[0]
            return out
        path = self.surfaces[0]
        found = _read_surface(path)
        if len(found) != len(numbers):
            surfaces = f"one {path.name}" if len(found) == 1 else f"the {len(found)} surfaces of {path.name}"
            why = f"contains {len(numbers)} objects for {surfaces}"
            cure = "name the files surface_ID.npy, with the object's number in the segmentation as ID"
            raise MediaError(self.segmentation, f"{why}; {cure}", "several")
        return dict(zip(numbers, found, strict=True))


def _read_surface(path: Path) -> Sequence[Surface]:
    """Read a surface file. If it was read before and is unchanged, return the cached result.

    In 3D-FRONT, all views of a room share the same surface files.
    """
    try:
        found = path.stat()
    except OSError:
        return meshes.read_surface(path)  # raises
    return _cached_surface(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=32)
def _cached_surface(path: Path, state: tuple[int, ...]) -> Sequence[Surface]:
    """Read a surface file, and cache the result.

    `state` contains the inode, size and times of the file, so a changed file is read again.
    """
    return tuple(meshes.read_surface(path))


def _frame_notes(objects: Sequence[SceneObject]) -> list[Note]:
    """Return a note if the objects seem to be normalized separately instead of together as one scene."""
    if len(objects) < 2:
        return []
    bounds = np.stack([[o.surface[:, :3].min(0), o.surface[:, :3].max(0)] for o in objects])
    why = "use one transform for the whole scene, or the model cannot learn object positions"
    if np.ptp(bounds, axis=1).max(-1).min() > 1.7:
        return [Note("unaligned", f"every object spans the whole box: {why}")]
    if np.abs(bounds.mean(1)).max() < 0.01:
        return [Note("unaligned", f"every object is centered at the origin: {why}")]
    return []


# --- finding ------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Scenes and problems found in a folder."""

    layout: Literal["folders", "3d-front"]
    scenes: list[Scene] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def find_scenes(root: Path) -> Found:
    """Find the scenes below a folder, sorted by name. Return the scenes, and a problem for each unusable one.

    Raises:
        ValueError: if the folder does not exist, or neither a scene nor a problem was found in it.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    tree = Root(root)
    found = _front(tree) if (root / "midi_room_ids.json").is_file() else _folders(tree)
    for folder, error in tree.skipped.items():
        name = printable(folder.relative_to(root).as_posix(), lines=False)
        found.findings.append(Finding(KINDS[error.code].severity, name, error.cause, error.code))
    kept = []
    for scene in found.scenes:
        try:
            for file in scene.files:
                tree.guard(file)
            kept.append(scene)
        except FileError as error:
            found.findings.append(Finding("error", scene.name, f"{file.name} {error.cause}", error.code))
    found.scenes = kept
    if not found.scenes and not found.findings:
        why = "a scene is a folder with scene_rgb.png, seg.png and surface_ID.npy for each object"
        if any(Path(name).suffix.lower() in MESH_FILES for _, _, names in tree.walk() for name in names):
            why = f"it contains meshes: run `inlaid import meshes {root} SCENES`, and use the folder SCENES"
        raise ValueError(f"{root}: contains no scenes; {why}")
    return found


def _folders(tree: Root) -> Found:
    found, root = Found("folders"), tree.folder
    for place, _, names in tree.walk():
        surfaces = [place / n for n in names if n.startswith("surface") and n.endswith((".npy", ".npz"))]
        marks = [n for n in (*IMAGES, "seg.png") if n in names]
        if not surfaces and "seg.png" not in marks:
            continue
        name = place.relative_to(root).as_posix() if place != root else root.name
        image = next((place / n for n in IMAGES if n in names), None)
        numbered = {
            int(m[1]): p for p in surfaces if (m := re.fullmatch(r"surface_(\d{1,9})\.np[yz]", p.name))
        }
        plain = [p for p in surfaces if p.stem == "surface"]
        odd = [p.name for p in surfaces if p not in numbered.values() and p not in plain]
        wrong = [
            *([] if image else [("no-image", "has no scene_rgb.png")]),
            *([] if "seg.png" in marks else [("no-segmentation", "has no seg.png")]),
            *([] if surfaces else [("no-surface", "has no surface.npy")]),
            *([("names", f"{odd[0]} is named neither surface.npy nor surface_ID.npy")] if odd else []),
            *([("names", "has both surface.npy and surface_ID.npy")] if numbered and plain else []),
        ]
        names_of: dict[int, str] = {}
        try:
            names_of = read_names(place, tree)
        except FileError as error:
            wrong.append((error.code, f"{DESCRIPTION} {error.cause}"))
        found.findings += [Finding("error", name, message, code) for code, message in wrong]
        if not wrong and image:
            surfaces_of = numbered or {0: plain[0]}
            found.scenes.append(Scene(name, image, place / "seg.png", surfaces_of, names_of))
    found.scenes.sort(key=lambda s: s.name)
    return found


def _ids(tree: Root, name: str) -> list[Any]:
    """Read a list of IDs from a JSON file of the 3D-FRONT dataset.

    Raises:
        ValueError: if the file cannot be read or is not a JSON list.
    """
    path = tree.folder / name
    try:
        found = parse_json(read_text(tree.guard(path)))
    except FileError as error:
        raise ValueError(f"{tree.folder}: {name} cannot be read: {error.cause}") from None
    except ValueError as error:
        raise ValueError(f"{tree.folder}: {name} cannot be read: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{tree.folder}: {name} is not a list of IDs")
    return found


def _part(value: Any) -> str:
    """Check an ID of the 3D-FRONT dataset, and return it. An ID is a relative path without suffix.

    Raises:
        ValueError: if the ID is not a string, is an absolute path, or contains `..`.
    """
    parts = Path(value).parts if isinstance(value, str) else ()
    if not parts or Path(value).is_absolute() or ".." in parts or "\0" in value:
        shown = printable(repr(value)[:60], lines=False)
        raise ValueError(f"the ID {shown} is not the name of a file or folder: correct the list of IDs")
    return value


def _surface_file(folder: Path, name: str) -> Path:
    """Return the file that contains the surface points of a piece of furniture.

    It is `NAME.npz` if that file exists and `NAME.npy` does not; otherwise, it is `NAME.npy`.
    """
    archive = folder / f"{name}.npz"
    published = folder / f"{name}.npy"
    return archive if archive.is_file() and not published.is_file() else published


def _front(tree: Root) -> Found:
    """Find the scenes in the 3D-FRONT dataset from the authors of MIDI.

    The dataset lists the rooms and the furniture of each room. It contains a surface of each piece of
    furniture, and rendered views of each room.
    """
    found, root = Found("3d-front"), tree.folder
    rooms, furniture = (_ids(tree, f"midi_{n}_ids.json") for n in ("room", "furniture"))
    if len(rooms) != len(furniture):
        raise ValueError(
            f"{root}: midi_room_ids.json has {len(rooms)} rooms, midi_furniture_ids.json {len(furniture)}"
        )
    for number, (given, objects) in enumerate(zip(rooms, furniture, strict=True), 1):
        try:
            room = _part(given)
            if not isinstance(objects, list):
                raise ValueError(f"the furniture of `{room}` is not a list of IDs")
            names = [_part(n) for n in objects]
            folder = root / "3D-FRONT-SURFACE" / room
            surfaces = {i: tree.guard(_surface_file(folder, n)) for i, n in enumerate(names, 1)}
            views = sorted(tree.guard(root / "3D-FRONT-RENDER" / room).glob("semantic_*.png"))
        except ValueError as error:
            code, cause = (error.code, error.cause) if isinstance(error, FileError) else ("names", str(error))
            found.findings.append(Finding("error", f"room {number}", cause, code))
            continue
        gone = [p.name for p in surfaces.values() if not p.is_file()]
        if gone or not views:
            code = "no-surface" if gone else "no-image"
            found.findings.append(Finding("error", room, f"has no {gone[0] if gone else 'views'}", code))
            continue
        for view in views:
            label = view.stem.removeprefix("semantic_")
            renders = [
                view.with_name(f"{prefix}_{label}{suffix}")
                for prefix in ("render", "rerender")
                for suffix in (".webp", ".png", ".jpg")
            ]
            image = next((path for path in renders if path.is_file()), None)
            if image is None:
                found.findings.append(Finding("error", f"{room}/{label}", "has no render", "no-image"))
                continue
            named = dict(enumerate(unique_names(names), 1))
            found.scenes.append(
                Scene(f"{room}/{label}", image, view, surfaces, named, view=label, strict=False)
            )
    return found
