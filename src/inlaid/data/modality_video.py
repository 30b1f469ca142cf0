"""Video modality: videos and images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe
from inlaid.console import say
from inlaid.data.clips import VideoWindow, Window
from inlaid.data.modality import ImageSource, Modality, NamedImage, Progress
from inlaid.data.plan import Plan, plan_dataset
from inlaid.data.probes import Probes
from inlaid.families.grid import VideoExtent
from inlaid.media import compositing, rgba, video
from inlaid.media.contact_sheet import SheetRow, contact_sheet

if TYPE_CHECKING:
    from inlaid.families import Family


class VideoModality(Modality):
    """Modality of videos and images with captions."""

    one: ClassVar[str] = "clip"
    makes: ClassVar[str] = "video"
    asks: ClassVar[str] = '"a prompt"'
    columns: ClassVar[tuple[str, str, str]] = ("frames", "size", "windows")

    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probes: Probes | None = None,
    ) -> Plan:
        """Find and check the clips of all data sources, and split off the validation clips."""
        return plan_dataset(config.data, family.grid, family.fps, config.seed, progress, family, probes)

    def task(self, family: Family) -> str:
        """Return the `pipeline_tag` for the Hugging Face Hub."""
        return "image-to-video" if family.images else "text-to-video"

    def sheet(self, rows: Sequence[tuple[Window, Any]], path: Path, title: str) -> None:
        """Write a contact sheet with a caption and a strip of frames for each window."""
        made = []
        for window, frames in rows:
            assert isinstance(window, VideoWindow)
            at = f"from {window.start:.2f} s   " if window.start else ""
            shape = f"{at}{' x '.join(map(str, window.extent))} at {window.fps:g} fps"
            frames = compositing.preview(frames) if window.alpha else frames
            made.append(SheetRow(window.clip.name, window.caption, frames, shape))
        contact_sheet(made, path, title=title)

    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """Return the prompts unchanged.

        Raises:
            ValueError: if there is no prompt or if a prompt is empty.
        """
        if not prompts or not all(p.strip() for p in prompts):
            raise ValueError("generate: prompt is missing or empty: pass a prompt")
        return list(prompts)

    def read(self, family: Family, source: ImageSource, sample: recipe.Sample) -> list[NamedImage]:
        """Read the conditioning images of a video, scaled and cropped to the size of the video.

        If `source` is a window, the images are its first frame, its last frame or both, as the family
        requires. Otherwise, `source` contains the paths of the images.
        """
        assert sample.size and sample.frames
        if isinstance(source, Window):
            if not family.images:
                return []
            assert isinstance(source, VideoWindow)
            extent = VideoExtent(min(sample.frames, source.extent.frames), *sample.size)
            frames = replace(source, extent=extent).read()
            place = {"first": 0, "last": -1}
            named = {name: frames[place[name]] for name in family.images}
            return [NamedImage(f"{name} frame of {source.clip.name}", f) for name, f in named.items()]
        return [
            NamedImage(path, video.read_frames(Path(path), 0.0, 1, 1.0, sample.size)[0]) for path in source
        ]

    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """Return the sampling settings and the frame rate, which are recorded beside a generated video."""
        other = ("prompts", "images", "every", "seed", "transparent", "grid", "triangles", "texture")
        return {**{k: v for k, v in sample.model_dump().items() if k not in other}, "fps": fps}

    def write(self, stem: Path, made: Any, sample: recipe.Sample, fps: float) -> tuple[Path, dict[str, Any]]:
        """Write an mp4 and, for a video with alpha, a file in each format of `sample.transparent`.

        The mp4 of a video with alpha is a preview over a checkerboard. Every file with alpha is read back and
        compared with the video. If a file differs too much, a `.zip` of PNG frames is written instead, and a
        note is printed.
        """
        path, facts = stem.with_name(f"{stem.name}.mp4"), {}
        if made.shape[-1] == 4:
            files: dict[Path, str] = {}
            for name in sample.transparent:
                try:
                    files |= _write(name, path, made, fps)
                except ValueError as error:  # noise of a barely trained network compresses badly
                    instead = _write("png", path, made, fps)
                    say(f"note: {error}: written as {next(iter(instead)).name} instead")
                    files |= instead
            facts = {"alpha": "straight", "preview": "checkerboard", "files": [f.name for f in files]}
            multiplied = [f.name for f, kind in files.items() if kind == "premultiplied"]
            facts |= {"premultiplied": multiplied} if multiplied else {}
            level = made[..., 3].min()
            if level == made[..., 3].max():
                how = {0: "transparent", 255: "opaque"}.get(int(level), f"{level} of 255")
                say(f"note: {path.name}: alpha is constant ({how}): the model generated no alpha")
            made = compositing.composite(made, compositing.checkerboard(*made.shape[1:3]))
        video.write_video(path, made, fps)
        return path, facts


def _write(name: str, path: Path, made: Any, fps: float) -> dict[Path, str]:
    """Write a video with alpha in the format `name`.

    Returns:
        Content of each written file: `straight` or `premultiplied` (video), or `alpha` (alpha matte).
    """
    if name == "pair":
        color, matte = rgba.write_pair(path.with_suffix(""), made, fps, premultiplied=True)
        return {color: "premultiplied", matte: "alpha"}
    return {rgba.write_rgba(path.with_suffix(".zip" if name == "png" else f".{name}"), made, fps): "straight"}


MODALITY = VideoModality()
