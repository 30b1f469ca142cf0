"""Scene modality: an input image with segmented objects and their surfaces, generated as one mesh per object.

A scene has no caption. Its name replaces the caption in reports and is not passed to a network.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from inlaid import config as recipe
from inlaid import cutouts, data, media, mesh, scenes
from inlaid.console import say
from inlaid.files import atomic, sha256
from inlaid.mediums import Images, Medium, Picture, Progress, viewer

if TYPE_CHECKING:
    from inlaid.families import Family


@dataclass(frozen=True, kw_only=True)
class SceneClip(data.Clip):
    """A scene on disk as a clip of `data`."""

    scene: scenes.Scene

    @property
    def files(self) -> tuple[Path, ...]:
        """The input image, the segmentation and the surfaces."""
        return self.scene.files


@dataclass(frozen=True)
class SceneWindow(data.Window):
    """A whole scene as a window of `data`; `frames` is the number of objects."""

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Cache key: everything except the files' content that determines the item."""
        assert isinstance(self.clip, SceneClip)
        return ("scene", scenes.READER, *self.shape, *self.clip.scene.surfaces)

    @property
    def words(self) -> str:
        """Empty: scenes have no text condition."""
        return ""

    def read(self) -> scenes.Sample:
        """Read the scene.

        Raises:
            MediaError: if a file is invalid; the message names the file and the problem.
        """
        assert isinstance(self.clip, SceneClip)
        return self.clip.scene.read()


class Scenes(Medium):
    """Scenes of an input image and the surfaces of its objects."""

    one: ClassVar[str] = "scene"
    makes: ClassVar[str] = "scene"
    asks: ClassVar[str] = "--image rgb.png --seg seg.png"
    columns: ClassVar[tuple[str, str, str]] = ("objects", "image size", "scenes")

    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probe: Callable[[Path], media.Probe] = media.probe,
        look: Callable[[Path, Path | None], cutouts.Look] = cutouts.look,
    ) -> data.Plan:
        """Read every scene with its surfaces, since most problems are in the surfaces."""
        problems: list[data.Problem] = []
        found = [_find(source, i, problems) for i, source in enumerate(config.data.sources)]
        clips: list[Any] = [c for f in found for c in f.clips]
        size = (family.extractor.crop,) * 2  # type: ignore[attr-defined]
        windows: dict[int, list[data.Window]] = {}

        def inspect(clip: SceneClip) -> tuple[int, Sequence[mesh.Note]] | media.MediaError:
            try:
                sample = clip.scene.read()
                return len(sample.objects), sample.notes
            except media.MediaError as error:
                return error

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i, seen in enumerate(pool.map(inspect, clips)):
                clip = clips[i]
                if isinstance(seen, media.MediaError):
                    said = str(seen).removeprefix(f"{clip.path.parent}{os.sep}")
                    problems.append(data.Problem("error", seen.code, clip.name, said, clip.source))
                else:
                    count, notes = seen
                    by_code = {c: [n for n in notes if n.code == c] for c in {n.code for n in notes}}
                    for code, alike in by_code.items():
                        more = f", and {len(alike) - 1} more" if len(alike) > 1 else ""
                        problems.append(_problem(clip, code, alike[0] + more))
                    if count > scenes.MOST:
                        many = f"{count} objects, at most {scenes.MOST} per step"
                        problems.append(_problem(clip, "crowded", many))
                    windows[i] = [SceneWindow(clip, 0.0, count, 1.0, size, clip.name)]
                if progress:
                    progress(i + 1, len(clips))
        together = _together if config.data.held_out else None
        return data.assemble(config.data, config.seed, found, windows, problems, {}, together, self.one)

    def task(self, family: Family) -> str:
        """Return the Hub's `pipeline_tag`."""
        return "image-to-3d"

    def sheet(self, rows: Sequence[tuple[data.Window, Any]], path: Path, title: str) -> None:
        """Draw per scene the input image, an object overlay and the surfaces from two sides."""
        made = []
        for window, sample in rows:
            count = len(sample.objects)
            points = sum(len(one.surface) for one in sample.objects)
            said = f"{count} object{'s' * (count != 1)}, {points:,} points"
            made.append(media.SheetRow(window.clip.name, " ".join(sample.notes), scenes.tiles(sample), said))
        media.contact_sheet(made, path, title=title, columns=4, width=1024)

    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """Return the stems of the input images.

        Raises:
            ValueError: if there are prompts, or no input image.
        """
        if prompts:
            raise ValueError(f"generate: scenes take no prompt (`{prompts[0]}`): pass --image and --seg")
        if not images:
            raise ValueError("generate: no input image: pass --image rgb.png --seg seg.png")
        return [Path(pair[0]).stem for pair in images]

    def read(self, family: Family, source: Images, sample: recipe.Sample) -> list[Picture]:
        """Read the input image and the segmentation."""
        if not isinstance(source, data.Window):
            return [
                Picture(source[0], scenes.read_image(Path(source[0]))),
                Picture(source[1], mesh.read_ids(Path(source[1]))),
            ]
        seen = source.read()
        ids = np.zeros(seen.image.shape[:2], np.int64)
        for one in seen.objects:
            ids[one.mask] = one.number
        return [Picture(f"{seen.name} {n}", p) for n, p in zip(family.images, (seen.image, ids), strict=True)]

    def asked(self, sample: recipe.Sample) -> dict[str, Any]:
        """Return the mesh resolution and the maximum number of triangles."""
        return {"grid": sample.grid, "triangles": sample.triangles}

    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """Return steps, guidance and mesh settings."""
        return {k: getattr(sample, k) for k in ("steps", "guidance", "grid", "triangles")}

    def write(self, stem: Path, made: Any, sample: recipe.Sample, fps: float) -> tuple[Path, dict[str, Any]]:
        """Write a glb with a named node per object, a PNG of views from all sides, and an HTML viewer.

        The returned facts are the triangle counts of the objects and notes on mesh defects.
        """
        path = stem.with_name(f"{stem.name}.glb")
        for note in made.notes:
            say(f"note: {stem.name}: {note}")
        mesh.write_scene(path, made.meshes, made.empty)
        with atomic(path.with_suffix(".png")) as part:
            Image.fromarray(strip(made)).save(part, format="PNG")
        with atomic(path.with_suffix(".html")) as part:
            part.write_text(viewer.page(made.meshes, stem.name), "utf-8")
        faces = {name: len(one.faces) for name, one in made.meshes.items()}
        return path, {"objects": faces, "notes": list(made.notes)}


MEDIUM = Scenes()


def strip(made: scenes.Made, frames: int = 6, size: int = 192) -> np.ndarray:
    """Render a turntable as one image: uint8 (size, frames * size, 3)."""
    return np.concatenate(list(mesh.turntable(list(made.meshes.values()), frames, size)), 1)


def _find(source: recipe.Source, index: int, problems: list[data.Problem]) -> data.Found:
    """Find the scenes of a source; append its problems to `problems`."""
    root = Path(source.path).expanduser()
    clips: list[data.Clip] = []
    own: list[data.Problem] = []
    layout, count = "folders", 0
    named = [k for k in ("root", "video_column", "caption_column", "group_column") if getattr(source, k)]
    try:
        if named or source.layout not in ("auto", "folder"):
            what = named[0] if named else f"layout {source.layout}"
            raise ValueError(f"`{what}` applies only to clips: remove it, a source of scenes is a folder")
        found = scenes.find(root)
        layout, count = found.layout, len(found.scenes) + len({f.name for f in found.findings})
        own = [data.Problem(f.severity, f.code, f.name, f.message, index) for f in found.findings]
        clips = [SceneClip(s.image, s.name, "", index, None, "scene", scene=s) for s in found.scenes]
    except (ValueError, OSError) as error:
        own = [data.Problem("error", "layout", source.path, str(error).removeprefix(f"{root}: "), index)]
    problems += own
    return data.Found(layout, f"{count} scenes", clips, own, count)


def _problem(clip: data.Clip, code: str, message: str) -> data.Problem:
    return data.Problem(data.KINDS[code].severity, code, clip.name, str(message), clip.source)


def _together(clips: Sequence[data.Clip]) -> dict[Path, str]:
    """Return marks by path, equal for scenes that share a file, so that views of one scene stay together."""
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
