"""Videos and images with captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlay import config as recipe
from inlay import data, media
from inlay.mediums import Images, Medium, Picture, Progress

if TYPE_CHECKING:
    from inlay.families import Family


class Video(Medium):
    """See `Medium`."""

    one: ClassVar[str] = "clip"
    makes: ClassVar[str] = "video"
    columns: ClassVar[tuple[str, str, str]] = ("frames", "size", "windows")

    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probe: Callable[[Path], media.Probe] = media.probe,
    ) -> data.Plan:
        """Clips in any layout that `data` reads."""
        return data.plan(config.data, family.grid, family.fps, config.seed, progress, family, probe)

    def sheet(self, rows: Sequence[tuple[data.Window, Any]], path: Path, title: str) -> None:
        """A strip of frames for each, under its caption."""
        made = []
        for window, frames in rows:
            at = f"from {window.start:.2f} s   " if window.start else ""
            shape = f"{at}{window.frames} x {window.size[0]} x {window.size[1]} at {window.fps:g} fps"
            made.append(media.SheetRow(window.clip.name, window.caption, frames, shape))
        media.contact_sheet(made, path, title=title)

    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """The prompts."""
        if not prompts or not all(p.strip() for p in prompts):
            raise ValueError("generate: needs a prompt that is not empty")
        return list(prompts)

    def read(self, family: Family, source: Images, sample: recipe.Sample) -> list[Picture]:
        """Images scaled and cropped to the size of the video."""
        assert sample.size and sample.frames
        if isinstance(source, data.Window):
            if not family.images:
                return []
            frames = replace(source, frames=min(sample.frames, source.frames), size=sample.size).read()
            place = {"first": 0, "last": -1}
            named = {name: frames[place[name]] for name in family.images}
            return [Picture(f"{name} frame of {source.clip.name}", f) for name, f in named.items()]
        return [Picture(path, media.read(Path(path), 0.0, 1, 1.0, sample.size)[0]) for path in source]

    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """The sample section, without what it says of other videos, and the rate."""
        other = ("prompts", "images", "every", "seed", "grid", "triangles")
        return {**{k: v for k, v in sample.model_dump().items() if k not in other}, "fps": fps}

    def write(self, stem: Path, made: Any, settings: Mapping[str, Any]) -> Path:
        """An mp4."""
        path = stem.with_name(f"{stem.name}.mp4")
        media.write_video(path, made, settings["fps"])
        return path


MEDIUM = Video()
