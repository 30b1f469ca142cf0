"""Scenes: a picture, the objects in it, and the surface of each; what is made of a picture is meshes.

A scene has no caption. Its name stands where one is shown, and nothing of it is read by a network.
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
    """A scene on disk, where data speaks of clips."""

    scene: scenes.Scene

    @property
    def files(self) -> tuple[Path, ...]:
        """The picture, the segmentation and the surfaces."""
        return self.scene.files


@dataclass(frozen=True)
class SceneWindow(data.Window):
    """What the model sees of a scene: all of it. Its length is the number of objects."""

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What decides its item besides the content of its files."""
        assert isinstance(self.clip, SceneClip)
        return ("scene", scenes.READER, *self.shape, *self.clip.scene.surfaces)

    @property
    def words(self) -> str:
        """Nothing is read."""
        return ""

    def read(self) -> scenes.Sample:
        """The scene.

        Raises:
            MediaError: naming the file and what is wrong with it.
        """
        assert isinstance(self.clip, SceneClip)
        return self.clip.scene.read()


class Scenes(Medium):
    """See `Medium`."""

    one: ClassVar[str] = "scene"
    makes: ClassVar[str] = "scene"
    asks: ClassVar[str] = "--image rgb.png --seg seg.png"
    columns: ClassVar[tuple[str, str, str]] = ("objects", "seen at", "scenes")

    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probe: Callable[[Path], media.Probe] = media.probe,
        look: Callable[[Path, Path | None], cutouts.Look] = cutouts.look,
    ) -> data.Plan:
        """Reads every scene, its surfaces too, since what is wrong with one is in there."""
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
                        many = f"{count} objects, {scenes.MOST} at once"
                        problems.append(_problem(clip, "crowded", many))
                    windows[i] = [SceneWindow(clip, 0.0, count, 1.0, size, clip.name)]
                if progress:
                    progress(i + 1, len(clips))
        together = _together if config.data.held_out else None
        return data.assemble(config.data, config.seed, found, windows, problems, {}, together, self.one)

    def task(self, family: Family) -> str:
        """What the Hub calls it."""
        return "image-to-3d"

    def sheet(self, rows: Sequence[tuple[data.Window, Any]], path: Path, title: str) -> None:
        """The picture, the objects over it, and their surfaces from two sides."""
        made = []
        for window, sample in rows:
            count = len(sample.objects)
            points = sum(len(one.surface) for one in sample.objects)
            said = f"{count} object{'s' * (count != 1)}, {points:,} points"
            made.append(media.SheetRow(window.clip.name, " ".join(sample.notes), scenes.tiles(sample), said))
        media.contact_sheet(made, path, title=title, columns=4, width=1024)

    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """Names of the pictures."""
        if prompts:
            raise ValueError(f"generate: a scene is made from a picture, not from words: `{prompts[0]}`")
        if not images:
            raise ValueError("generate: give --image rgb.png --seg seg.png")
        return [Path(pair[0]).stem for pair in images]

    def read(self, family: Family, source: Images, sample: recipe.Sample) -> list[Picture]:
        """The picture and the numbers of its objects."""
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
        """How finely it is meshed."""
        return {"grid": sample.grid, "triangles": sample.triangles}

    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """How it was made."""
        return {k: getattr(sample, k) for k in ("steps", "guidance", "grid", "triangles")}

    def write(self, stem: Path, made: Any, sample: recipe.Sample, fps: float) -> tuple[Path, dict[str, Any]]:
        """A glb with a named node for each object, a picture from all sides, and a page that turns it.

        Beside it are the triangles of each object, and what is odd about the meshes.
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
    """A turntable as one picture: uint8 (size, frames size, 3)."""
    return np.concatenate(list(mesh.turntable(list(made.meshes.values()), frames, size)), 1)


def _find(source: recipe.Source, index: int, problems: list[data.Problem]) -> data.Found:
    """The scenes of a source; what is wrong is added to the problems."""
    root = Path(source.path).expanduser()
    clips: list[data.Clip] = []
    own: list[data.Problem] = []
    layout, count = "folders", 0
    named = [k for k in ("root", "video_column", "caption_column", "group_column") if getattr(source, k)]
    try:
        if named or source.layout not in ("auto", "folder"):
            what = named[0] if named else f"layout {source.layout}"
            raise ValueError(f"`{what}` is for clips; a source of scenes is a folder")
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
    """Marks by path, equal for scenes that share a surface: views of one scene are held out together."""
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
