"""Scene modality: generate one mesh per object from an image and its segmentation.

A training example consists of the image, the segmentation, and points on the surface of each object. A scene
has no caption. Reports show the name of the scene instead. The name is not an input of any network.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from inlaid import config as recipe
from inlaid.console import say
from inlaid.data import scenes
from inlaid.data.clips import Clip, Window
from inlaid.data.layouts import Found
from inlaid.data.modality import ImageSource, Modality, NamedImage, Progress
from inlaid.data.plan import Plan, assemble_plan
from inlaid.data.probes import Probes
from inlaid.data.problems import KINDS, Problem
from inlaid.data.scenes import READER, Scene
from inlaid.families.grid import SceneExtent
from inlaid.files import atomic, sha256
from inlaid.media import mesh_render, meshes
from inlaid.media.contact_sheet import SheetRow, contact_sheet, contact_strip
from inlaid.media.kinds import MediaError
from inlaid.media.mesh_viewer import viewer_page
from inlaid.media.meshes import Note
from inlaid.media.scene import (
    MAX_OBJECTS,
    SEGMENTATION,
    SceneSample,
    published_order,
    read_image,
    read_names,
    tiles,
)
from inlaid.media.texture import look_of
from inlaid.reading import FileError, reading
from inlaid.text import printable

if TYPE_CHECKING:
    from inlaid.families import Family


@dataclass(frozen=True, kw_only=True)
class SceneClip(Clip):
    """Training example on disk: an image, its segmentation, and the surfaces of the objects."""

    scene: Scene

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the input image, the segmentation and the surfaces."""
        return self.scene.files


@dataclass(frozen=True)
class SceneWindow(Window):
    """Training example that contains a whole scene. Its `caption` is the scene's name, for display only."""

    extent: SceneExtent
    """Number of objects, and height and width of the image encoder's input in pixels."""

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Part of the cache key: reader version, number of objects, image size and object IDs.

        The cache adds the content hashes of the files.
        """
        assert isinstance(self.clip, SceneClip)
        return ("scene", READER, *self.extent, *self.clip.scene.surfaces)

    @property
    def words(self) -> str:
        """Text input of the network: empty, because scenes have no captions."""
        return ""

    def read(self) -> SceneSample:
        """Read the scene.

        Raises:
            MediaError: if a file is invalid; the message names the file and the problem.
        """
        assert isinstance(self.clip, SceneClip)
        with reading(self.clip.path, MediaError):
            return self.clip.scene.read()


class SceneModality(Modality):
    """Modality of scenes: an input image and the surfaces of the objects in it."""

    one: ClassVar[str] = "scene"
    makes: ClassVar[str] = "scene"
    asks: ClassVar[str] = "--image rgb.png --seg seg.png"
    columns: ClassVar[tuple[str, str, str]] = ("objects", "image size", "scenes")

    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probes: Probes | None = None,
    ) -> Plan:
        """Find and check the scenes of all data sources, and split off the validation scenes.

        All files of each scene are read, because most problems are in the surfaces of the objects.
        """
        problems: list[Problem] = []
        found = [_find(source, i, problems) for i, source in enumerate(config.data.sources)]
        clips: list[Any] = [c for f in found for c in f.clips]
        size = family.extractor.crop  # type: ignore[attr-defined]
        windows: dict[int, list[Window]] = {}

        def inspect(clip: SceneClip) -> tuple[int, Sequence[Note]] | FileError:
            try:
                with reading(clip.path, MediaError):
                    sample = clip.scene.read()
                    return len(sample.objects), sample.notes
            except FileError as error:
                return error
            raise AssertionError("unreachable")

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i, seen in enumerate(pool.map(inspect, clips)):
                clip = clips[i]
                if isinstance(seen, FileError):
                    cause = str(seen).removeprefix(f"{clip.path.parent}{os.sep}")
                    problems.append(Problem("error", seen.code, clip.name, cause, clip.source))
                else:
                    count, notes = seen
                    by_code = {c: [n for n in notes if n.code == c] for c in {n.code for n in notes}}
                    for code, alike in by_code.items():
                        more = f", and {len(alike) - 1} more" if len(alike) > 1 else ""
                        problems.append(_problem(clip, code, alike[0] + more))
                    if count > MAX_OBJECTS:
                        many = f"{count} objects, at most {MAX_OBJECTS} per step"
                        problems.append(_problem(clip, "crowded", many))
                    windows[i] = [SceneWindow(clip, SceneExtent(count, size, size), clip.name)]
                if progress:
                    progress(i + 1, len(clips))
        together = _together if config.data.validation else None
        return assemble_plan(config.data, config.seed, found, windows, problems, {}, together, self.one)

    def task(self, family: Family) -> str:
        """Return the `pipeline_tag` for the Hugging Face Hub."""
        return "image-to-3d"

    def sheet(self, rows: Sequence[tuple[Window, Any]], path: Path, title: str) -> None:
        """Write a contact sheet with one row per scene.

        A row shows the input image, the image with an overlay of the objects, and the surfaces from two
        sides.
        """
        made = []
        for window, sample in rows:
            count = len(sample.objects)
            points = sum(len(one.surface) for one in sample.objects)
            names = ", ".join(one.name for one in sample.objects if one.name)
            named = f" ({names})" if names else ""
            note = f"{count} object{'s' * (count != 1)}{named}, {points:,} points"
            made.append(SheetRow(window.clip.name, " ".join(sample.notes), tiles(sample), note))
        contact_sheet(made, path, title=title, columns=4, width=1024)

    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """Return a name for each output: the file name of its input image, without suffix.

        Raises:
            ValueError: if there are prompts or if there is no input image.
        """
        if prompts:
            raise ValueError(f"generate: scenes take no prompt (`{prompts[0]}`): pass --image and --seg")
        if not images:
            raise ValueError("generate: no input image: pass --image rgb.png --seg seg.png")
        return [Path(pair[0]).stem for pair in images]

    def read(self, family: Family, source: ImageSource, sample: recipe.Sample) -> list[NamedImage]:
        """Read the input image, and the segmentation with the names of the objects."""
        if not isinstance(source, Window):
            image, segmentation = (Path(path) for path in source)
            names = read_names(segmentation.parent) if segmentation.name == SEGMENTATION else {}
            ids = meshes.read_ids(segmentation)
            order = published_order(segmentation, ids)
            named = {n: names.get(n, f"object_{n}") for n in order}
            return [NamedImage(source[0], read_image(image)), NamedImage(source[1], ids, named)]
        assert isinstance(source.clip, SceneClip)
        seen = source.read()
        ids = np.zeros(seen.image.shape[:2], np.int64)
        for one in seen.objects:
            ids[one.mask] = one.number
        first, second = (f"{seen.name} {name}" for name in family.images)
        labels = {one.number: one.label for one in seen.objects}
        order = published_order(source.clip.scene.segmentation, ids)
        return [NamedImage(first, seen.image), NamedImage(second, ids, {n: labels[n] for n in order})]

    def asked(self, sample: recipe.Sample, images: Sequence[NamedImage]) -> dict[str, Any]:
        """Return the arguments of `Family.sample` that only scenes use: object names and mesh settings."""
        settings = {k: getattr(sample, k) for k in ("grid", "triangles", "texture")}
        return {"objects": images[1].objects, **settings}

    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """Return the sampling settings to record with each scene: steps, guidance and mesh settings."""
        return {k: getattr(sample, k) for k in ("steps", "guidance", "grid", "triangles", "texture")}

    def write(self, stem: Path, made: Any, sample: recipe.Sample, fps: float) -> tuple[Path, dict[str, Any]]:
        """Write a `.glb` with a named node per object, a PNG of views from all sides, and an HTML viewer.

        The returned metadata contain the number of triangles of each object, and notes on defects of the
        meshes.
        """
        path = stem.with_name(f"{stem.name}.glb")
        for note in made.notes:
            say(f"note: {stem.name}: {note}")
        meshes.write_scene(path, made.meshes, made.empty)
        shown = meshes.preview_meshes(made.meshes)
        with atomic(path.with_suffix(".png")) as part:
            looks = [look_of(one) for one in made.meshes.values()]
            solid = list((made.meshes if any(looks) else shown).values())
            views = np.stack(list(mesh_render.turntable(solid, 6, 192, looks)))
            contact_strip(views, box=(192, 192), gap=0).convert("RGB").save(part, format="PNG")
        with atomic(path.with_suffix(".html")) as part:
            part.write_text(viewer_page(shown, stem.name), "utf-8")
        faces = {name: len(one.faces) for name, one in made.meshes.items()}
        return path, {"objects": faces, "notes": list(made.notes)}


MODALITY = SceneModality()


def _find(source: recipe.Source, index: int, problems: list[Problem]) -> Found:
    """Find the scenes of a data source, and append their problems to `problems`."""
    root = Path(source.path).expanduser()
    clips: list[Clip] = []
    own: list[Problem] = []
    layout, count = "folders", 0
    named = [k for k in ("root", "video_column", "caption_column", "group_column") if getattr(source, k)]
    try:
        if named or source.layout not in ("auto", "folder"):
            what = named[0] if named else f"layout {source.layout}"
            raise ValueError(f"`{what}` applies only to clips: remove it, a source of scenes is a folder")
        found = scenes.find_scenes(root)
        layout, count = found.layout, len(found.scenes) + len({f.name for f in found.findings})
        own = [Problem(f.severity, f.code, f.name, f.message, index) for f in found.findings]
        clips = [SceneClip(s.image, s.name, "", index, None, "scene", scene=s) for s in found.scenes]
    except (ValueError, OSError) as error:
        own = [Problem("error", "layout", source.path, str(error).removeprefix(f"{root}: "), index)]
    problems += own
    return Found(layout, f"{count} scenes", clips, own, count)


def _problem(clip: Clip, code: str, message: str) -> Problem:
    return Problem(KINDS[code].severity, code, clip.name, printable(message, lines=False), clip.source)


def _together(clips: Sequence[Clip]) -> dict[Path, str]:
    """Return a group label for each scene, by image path. Scenes that share a file get equal labels.

    Files are compared by content. The labels keep all views of a scene on the same side of the validation
    split.
    """
    owner: dict[str, int] = {}
    parent = list(range(len(clips)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    hashes: dict[Path, str] = defaultdict(str)
    for i, clip in enumerate(clips):
        assert isinstance(clip, SceneClip)
        for file in (clip.path, *clip.scene.surfaces.values()):
            hashes[file] = hashes[file] or sha256(file)
            parent[root(i)] = root(owner.setdefault(hashes[file], i))
    return {clip.path: str(root(i)) for i, clip in enumerate(clips)}
