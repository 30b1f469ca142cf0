"""Scenes on disk: an input image, a segmentation, and the surface of each object; import of meshes as scenes.

Three layouts: a folder per scene with `scene_rgb.png`, `seg.png` and `surface_ID.npy` for each object; the
same with a single `surface.npy` for a scene of one object; and 3D-FRONT as processed by MIDI's authors.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from inlaid import config as recipe
from inlaid import mesh
from inlaid.files import atomic
from inlaid.media import MediaError
from inlaid.mesh import Note

if TYPE_CHECKING:
    import trimesh

IMAGES = ("scene_rgb.png", "scene_rgb.jpg", "scene_rgb.webp", "rgb.png", "rgb.jpg", "rgb.webp")
"""File names of the input image; the first that exists is used. `rgb` is a single object on white."""

READER = 1
"""Version of the output of `Scene.read`; raise it when the output changes."""

SMALL = 0.001
"""Objects that cover at most this share of the input image are left out."""

MOST_DRAWN = 64
"""Maximum number of objects generated from one input image; more mean that the file is no segmentation."""

MOST = 7
"""Maximum number of objects of a scene in one training step."""


@dataclass(frozen=True)
class Finding:
    """A problem with one scene; a scene with an error is not trained on."""

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
    """Surface files by number in the segmentation; key 0 means all objects, in order of number."""
    view: str = ""
    strict: bool = True
    """True if every visible object must have a surface."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the scene."""
        return (self.image, self.segmentation, *self.surfaces.values())

    def read(self) -> Sample:
        """Read image, segmentation and surfaces.

        Raises:
            MediaError: if a file is invalid; the message names the file and the problem.
        """
        picture, ids = read_image(self.image), mesh.read_ids(self.segmentation)
        if picture.shape[:2] != ids.shape:
            why = f"is {_size(ids)}, but {self.image.name} is {_size(picture)}"
            raise MediaError(self.segmentation, why, "picture-size")
        numbers = [n for n in np.unique(ids).tolist() if n > 0]
        read = self._surfaces(numbers)
        absent = sorted(set(read) - set(numbers))
        if absent:
            why = f"does not contain object {absent[0]}, which has a surface; it contains " + (
                ", ".join(map(str, numbers)) or "none"
            )
            raise MediaError(self.segmentation, why, "absent")
        notes, objects = [], []
        for number, surface in sorted(read.items()):
            mask = ids == number
            if mask.mean() <= SMALL:
                why = f"object {number} covers {mask.mean():.2%} of the input image and is left out"
                notes.append(Note("small", why))
                continue
            objects.append(Object(number, mask, surface.points))
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
        return Sample(self.name, picture, objects, tuple(notes))

    def _surfaces(self, numbers: Sequence[int]) -> dict[int, mesh.Surface]:
        """Return surfaces by number; a single file holds all visible objects in order of number."""
        if list(self.surfaces) != [0]:
            out = {}
            for number, path in self.surfaces.items():
                found = mesh.read_surface(path)
                if len(found) != 1:
                    raise MediaError(path, f"contains {len(found)} surfaces for one object", "several")
                out[number] = found[0]
            return out
        path = self.surfaces[0]
        found = mesh.read_surface(path)
        if len(found) != len(numbers):
            surfaces = f"one {path.name}" if len(found) == 1 else f"the {len(found)} surfaces of {path.name}"
            why = f"contains {len(numbers)} objects for {surfaces}"
            cure = "name the files surface_ID.npy, with the object's number in the segmentation as ID"
            raise MediaError(self.segmentation, f"{why}; {cure}", "several")
        return dict(zip(numbers, found, strict=True))


@dataclass(frozen=True)
class Object:
    """One object of a scene."""

    number: int
    mask: np.ndarray
    """bool (h, w)."""
    surface: np.ndarray
    """Points and normals, float32 (n, 6), in the scene's frame."""


@dataclass(frozen=True)
class Sample:
    """Content of a scene."""

    name: str
    image: np.ndarray
    """uint8 (h, w, 3)."""
    objects: list[Object]
    notes: tuple[Note, ...] = ()

    def alone(self, index: int) -> np.ndarray:
        """Return the image of one object: uint8 (h, w, 3), all other pixels white, not cropped."""
        return np.where(self.objects[index].mask[..., None], self.image, np.uint8(255))


def _frame_notes(objects: Sequence[Object]) -> list[Note]:
    """Return a note if objects appear to be normalized separately instead of as a whole scene."""
    if len(objects) < 2:
        return []
    bounds = np.stack([[o.surface[:, :3].min(0), o.surface[:, :3].max(0)] for o in objects])
    why = "use one transform for the whole scene, or the model cannot learn object positions"
    if np.ptp(bounds, axis=1).max(-1).min() > 1.7:
        return [Note("unaligned", f"every object spans the whole box: {why}")]
    if np.abs(bounds.mean(1)).max() < 0.01:
        return [Note("unaligned", f"every object is centered at the origin: {why}")]
    return []


def read_image(path: Path) -> np.ndarray:
    """Read an image composited over white: uint8 (h, w, 3).

    Raises:
        MediaError: if the file cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise MediaError(path, f"cannot be read as an image ({error})") from None


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


# --- finding ------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Scenes and problems found in a folder."""

    layout: Literal["folders", "3d-front"]
    scenes: list[Scene] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def find(root: Path) -> Found:
    """Find the scenes of a folder, in order of names; problems are returned as findings.

    Raises:
        ValueError: if the folder contains no scenes.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found = _front(root) if (root / "midi_room_ids.json").is_file() else _folders(root)
    if not found.scenes and not found.findings:
        raise ValueError(
            f"{root}: contains no scenes; a scene is a folder with scene_rgb.png, seg.png and surface_ID.npy "
            "for each object"
        )
    return found


def _folders(root: Path) -> Found:
    found = Found("folders")
    places = [p for p in (root, *sorted(root.rglob("*"))) if p.is_dir() and not p.name.startswith(".")]
    for place in places:
        surfaces = sorted([*place.glob("surface*.npy"), *place.glob("surface*.npz")])
        marks = [n for n in (*IMAGES, "seg.png") if (place / n).is_file()]
        if not surfaces and "seg.png" not in marks:
            continue
        name = place.relative_to(root).as_posix() if place != root else root.name
        image = next((place / n for n in IMAGES if (place / n).is_file()), None)
        numbered = {int(m[1]): p for p in surfaces if (m := re.fullmatch(r"surface_(\d+)\.np[yz]", p.name))}
        plain = [p for p in surfaces if p.stem == "surface"]
        odd = [p.name for p in surfaces if p not in numbered.values() and p not in plain]
        wrong = [
            *([] if image else [("no-picture", "has no scene_rgb.png")]),
            *([] if (place / "seg.png").is_file() else [("no-segmentation", "has no seg.png")]),
            *([] if surfaces else [("no-surface", "has no surface.npy")]),
            *([("names", f"{odd[0]} is named neither surface.npy nor surface_ID.npy")] if odd else []),
            *([("names", "has both surface.npy and surface_ID.npy")] if numbered and plain else []),
        ]
        found.findings += [Finding("error", name, message, code) for code, message in wrong]
        if not wrong and image:
            found.scenes.append(Scene(name, image, place / "seg.png", numbered or {0: plain[0]}))
    return found


def _front(root: Path) -> Found:
    """Find scenes in MIDI's layout of 3D-FRONT: rooms, the furniture of each room, rendered views."""
    found = Found("3d-front")
    try:
        rooms, furniture = (
            json.loads((root / f"midi_{n}_ids.json").read_text("utf-8")) for n in ("room", "furniture")
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{root}: midi_room_ids.json and midi_furniture_ids.json cannot be read: {error}"
        ) from None
    if len(rooms) != len(furniture):
        raise ValueError(
            f"{root}: midi_room_ids.json has {len(rooms)} rooms, midi_furniture_ids.json {len(furniture)}"
        )
    for room, names in zip(rooms, furniture, strict=True):
        views = sorted((root / "3D-FRONT-RENDER" / room).glob("semantic_*.png"))
        surfaces = {i: root / "3D-FRONT-SURFACE" / room / f"{n}.npy" for i, n in enumerate(names, 1)}
        gone = [p.name for p in surfaces.values() if not p.is_file()]
        if gone or not views:
            code = "no-surface" if gone else "no-picture"
            found.findings.append(Finding("error", room, f"has no {gone[0] if gone else 'views'}", code))
            continue
        for view in views:
            label = view.stem.removeprefix("semantic_")
            image = next(
                (p for s in ("render", "rerender") if (p := view.with_name(f"{s}_{label}.webp")).is_file()),
                None,
            )
            if image is None:
                found.findings.append(Finding("error", f"{room}/{label}", "has no render", "no-picture"))
                continue
            found.scenes.append(Scene(f"{room}/{label}", image, view, surfaces, label, strict=False))
    return found


# --- import of meshes ---------------------------------------------------------------------------------------


def views(count: int, seed: int) -> Iterator[mesh.View]:
    """Yield cameras as in MIDI's training data: azimuths over 360 degrees, elevation 0 to 30 degrees."""
    random = np.random.default_rng(seed)
    for i in range(count):
        yield mesh.View(
            azimuth=(360 * i / count + random.uniform(0, 360 / count)) % 360, elevation=random.uniform(0, 30)
        )


def import_meshes(folder: Path, out: Path, *, count: int = 4, size: int = 512) -> list[Finding]:
    """Convert the mesh files of a folder to training scenes with `prepare`.

    Raises:
        ValueError: if the folder has no meshes, if no scene was written, or if `out` is not empty.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sources = sorted(p for p in folder.iterdir() if p.suffix.lower() in mesh.FILES)
    if not sources:
        raise ValueError(f"{folder}: contains no meshes ({' '.join(mesh.FILES)})")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty: use another folder")
    findings = prepare(sources, out, count=count, size=size)
    if not out.is_dir():
        raise ValueError("\n".join(f"{f.name}: {f.message}" for f in findings))
    return findings


def _supplied(source: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return images and segmentations beside a mesh: `NAME*_rgb.png` and `NAME*_seg.png`, one pair per view.

    Raises:
        MediaError: if a file cannot be read, a segmentation is missing, or sizes differ.
    """
    found = []
    for path in sorted(source.parent.glob(f"{glob.escape(source.stem)}*_rgb.png")):
        seg = path.with_name(path.name.replace("_rgb.png", "_seg.png"))
        if not seg.is_file():
            raise MediaError(path, f"has no {seg.name} beside it", "no-segmentation")
        image, ids = read_image(path), mesh.read_ids(seg)
        if image.shape[:2] != ids.shape:
            raise MediaError(seg, f"is {_size(ids)}, but {path.name} is {_size(image)}", "picture-size")
        found.append((image, ids.astype(np.uint8)))
    return found


def prepare(
    sources: Sequence[Path],
    out: Path,
    *,
    count: int = 4,
    size: int = 512,
    points: int = mesh.POINTS,
    seed: int = 0,
) -> list[Finding]:
    """Convert mesh files to training scenes: normalize each file, sample surfaces, render views.

    Images and segmentations beside a mesh replace renders; object numbers follow the order of object names.

    Args:
        sources: files with a mesh per object.
        out: output folder; gets a folder per source and view.
        count: number of rendered views per source.
        size: width and height of the renders in pixels.
        points: number of points per surface.
        seed: seed of cameras and points.

    Returns:
        Files that cannot be read, and objects that are inside out, not watertight or hidden.
    """
    findings = []
    for source in sources:
        try:
            parts, given = mesh.read_scene(source), _supplied(source)
        except ValueError as error:
            findings.append(Finding("error", source.name, str(error)))
            continue
        bounds = np.stack([m.bounds for m in parts.values()])
        transform = mesh.normalising(np.stack([bounds[:, 0].min(0), bounds[:, 1].max(0)]))
        moved = []
        for name, one in parts.items():
            whole, turned = mesh.outward(one.apply_transform(transform))
            moved.append(whole)
            if turned:
                many = f"{turned} of its parts were inside out and were flipped"
                findings.append(Finding("warning", source.name, f"`{name}`: {many}", "flipped"))
            if not whole.is_watertight:
                why = "is not watertight: normals may be wrong"
                findings.append(Finding("warning", source.name, f"`{name}` {why}", "surface"))
        surfaces = [mesh.sample_surface(m, points, seed + i) for i, m in enumerate(moved)]
        shown = given or [mesh.render(moved, view, size) for view in views(count, seed)]
        for i, (image, ids) in enumerate(shown):
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


# --- generated scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Generated scene: the mesh of each object by name, in the scene's frame, with notes on defects."""

    meshes: dict[str, trimesh.Trimesh]
    empty: tuple[str, ...] = ()
    """Names of objects without a mesh."""
    notes: tuple[str, ...] = ()


def make(fields: Mapping[str, mesh.Field], resolution: int, triangles: int | None = None) -> Made:
    """Extract meshes from fields and check the meshes.

    Args:
        fields: field of each object by name, negative inside.
        resolution: grid cells per side.
        triangles: maximum number of triangles per object; larger meshes are decimated, which needs the
            package fast-simplification.
    """
    meshes, empty, notes = {}, [], []
    coarse = min(64, resolution)
    for name, field_ in fields.items():
        found, note = mesh.extract(field_, resolution=resolution, coarse=coarse)
        notes += [f"{name}: {note}"] if note else []
        if found is None:
            empty.append(name)
            notes.append(f"{name} is empty: the field has no surface in the box")
            continue
        if triangles and len(found.faces) > triangles:
            found = mesh.decimated(found, triangles)
        notes += [f"{name} {problem}" for problem in mesh.problems(found)]
        meshes[name] = found
    return Made(meshes, tuple(empty), tuple(notes))


def thinned(surface: np.ndarray, count: int = mesh.POINTS) -> np.ndarray:
    """Sample `count` points of a surface (n, 6) -> (count, 6), without replacement if n >= count."""
    drawn = np.random.default_rng(0).choice(len(surface), count, replace=len(surface) < count)
    return surface if len(surface) == count else surface[drawn]


def wrong_pairs(given: Sequence[Sequence[str]]) -> list[str]:
    """Return a message for each invalid pair of input image and segmentation."""
    found = []
    for pair in given:
        if len(pair) != 2:
            found.append(f"a scene needs an input image and a segmentation, got {len(pair)} image(s)")
            continue
        try:
            picture, ids = read_image(Path(pair[0])), mesh.read_ids(Path(pair[1]))
        except ValueError as error:
            found.append(str(error))
            continue
        if picture.shape[:2] != ids.shape:
            found.append(f"{pair[1]} is {_size(ids)}, but {pair[0]} is {_size(picture)}")
        elif not ids.any():
            found.append(f"{pair[1]} contains no object: all pixels are background")
        elif len(np.unique(ids)) > MOST_DRAWN + 1:
            found.append(
                f"{pair[1]} contains {len(np.unique(ids)) - 1} objects, more than {MOST_DRAWN}: use a "
                "segmentation, with one color or number for each object and without soft edges"
            )
    return found


VIDEO_KEYS = {
    "data": ("size", "aspects", "frames", "fps", "stride", "max_windows", "slow", "trigger", "caption_prefix",
             "caption_dropout", "matte"),
    "sample": ("prompts", "negative_prompt", "size", "frames"),
}  # fmt: skip
"""Recipe keys that do not apply to scenes."""


def not_of_scenes(config: recipe.Config) -> list[str]:
    """Return a message for each recipe key that applies only to videos."""
    derived = {"size": config.data.size, "frames": max(config.data.frames)}
    out = []
    for section, keys in VIDEO_KEYS.items():
        given = getattr(config, section)
        for key in keys:
            usual = type(given).model_fields[key].get_default(call_default_factory=True)
            if getattr(given, key) not in (usual, derived.get(key) if section == "sample" else usual):
                out.append(f"{section}.{key}: applies only to videos: remove it")
    return out


# --- rendering ----------------------------------------------------------------------------------------------


def sheet(samples: Sequence[Sample], path: Path, *, cell: int = 256) -> None:
    """Write a PNG with a row per scene: input image, object overlay and surfaces. The write is atomic."""
    rows = [np.concatenate(list(tiles(sample, cell)), 1) for sample in samples]
    with atomic(path) as part:
        Image.fromarray(np.concatenate(rows)).save(part, format="PNG")


def tiles(sample: Sample, cell: int = 240) -> np.ndarray:
    """Return input image, object overlay and surfaces from two sides: uint8 (4, cell, cell, 3)."""
    overlay = sample.image.astype(np.float32)
    for i, one in enumerate(sample.objects):
        color = np.array(mesh.PALETTE[i % len(mesh.PALETTE)], np.float32)
        overlay[one.mask] = 0.45 * overlay[one.mask] + 0.55 * color
    found = [sample.image, overlay.astype(np.uint8), _cloud(sample, cell, 30), _cloud(sample, cell, 120)]
    return np.stack([_tile(t, cell) for t in found])


def _tile(image: np.ndarray, cell: int) -> np.ndarray:
    """Fit an image into a white square."""
    picture = Image.fromarray(image)
    picture.thumbnail((cell, cell))
    out = Image.new("RGB", (cell, cell), "white")
    out.paste(picture, ((cell - picture.width) // 2, (cell - picture.height) // 2))
    return np.asarray(out)


def _cloud(sample: Sample, size: int, azimuth: float) -> np.ndarray:
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
    colors = np.array(mesh.PALETTE, np.float64)[owner % len(mesh.PALETTE)] * shade[:, None]
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    out[y[inside].astype(int), x[inside].astype(int)] = colors[inside]
    return out
