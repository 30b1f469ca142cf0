"""Clips on disk: source layouts, problems with clips, windows, buckets and the order of batches.

`plan` probes every file and selects the windows of a run. It collects problems and does not stop; `require`
raises all errors in one message. `BucketSampler` groups windows into batches; each batch is a pure function
of its index.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np

from inlaid import config, cutouts, encoded, media, rgba
from inlaid.families.base import Encoded, Family, Grid
from inlaid.files import sha256

Severity = Literal["error", "warning"]
Size = tuple[int, int]

VIDEO_COLUMNS = ("video", "file_name", "file", "path", "image", "frames_path")
COLOR_COLUMNS = ("video_rgb", "video_fgr", "rgb", "fgr")
ALPHA_COLUMNS = ("video_alpha", "video_pha", "alpha", "pha", "matte")
CAPTION_COLUMNS = ("caption", "prompt", "text")
MANIFESTS = (".csv", ".jsonl", ".json")
PROMPTS, VIDEOS = ("prompts.txt", "prompt.txt", "captions.txt"), ("videos.txt",)

UPSCALE = 1.5
"""Scale factor above which a clip gets a warning: the model learns the blur of an enlarged clip."""

CROPPED = 0.3
"""Cropped share of the frame, 0 to 1, above which a clip gets a warning."""

RESIDUE = 0.005
"""Share of pixels with nearly transparent alpha, 0 to 1, above which a clip gets a warning."""

ODD = 0.4
"""Distance of a clip's coverage from the median of all clips above which the clip gets a warning."""

FOLDER_CURE = "add a .txt beside each"
MANIFEST_CURE = "add a caption to each, as UTF-8 text"
CHOSEN_BY_TIME = "nothing to do, frames are selected by time"


@dataclass(frozen=True)
class Clip:
    """A training example on disk."""

    path: Path
    name: str
    """Path relative to the source's root, with forward slashes."""
    caption: str
    """Caption as stored, with each run of white space replaced by one space. Empty if the clip has none; then
    only precomputed latents have windows."""
    source: int
    """Index into `data.sources`."""
    group: str | None
    kind: cutouts.Kind | Literal["encoded", "scene"]
    latents: tuple[Path, ...] = ()
    """Files of precomputed latents: `path` first, then the latents of the conditioning images."""
    embedding: Path | None = None
    """File with the text embedding that belongs to precomputed latents."""
    matte: Path | None = None
    """File or folder with the alpha matte of `path`, if alpha is stored separately."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files whose content determines the pixels or the latents."""
        if self.latents:
            return self.latents
        return tuple(f for part in (self.path, self.matte) if part for f in cutouts.files(part))


@dataclass(frozen=True)
class Window:
    """Part of a clip that is one training example."""

    clip: Clip
    start: float
    """Seconds from the clip's first frame."""
    frames: int
    fps: float
    """Sampling rate in frames per second."""
    size: Size
    """Height and width in pixels."""
    caption: str
    """Caption with prefix and trigger."""
    alpha: config.Matte | None = None
    """Settings for reading and correcting alpha; None if the clip is read as opaque."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width; equal for all windows of a batch."""
        return (self.frames, *self.size)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Cache key: everything except the files' content that determines the pixels."""
        if self.clip.embedding:
            return ("encoded", encoded.READER)
        shape = (self.start, self.frames, self.fps, *self.size)
        if self.alpha:
            how, pair = self.alpha.model_dump_json(), self.clip.matte is not None
            return ("cutout", cutouts.READER, media.READER, self.clip.kind, pair, *shape, how)
        return ("window", media.READER, self.clip.kind, *shape)

    @property
    def words(self) -> str | Path:
        """Text condition: the caption, or the file with its precomputed embedding."""
        return self.clip.embedding or self.caption

    def read(self) -> Any:
        """Read the pixels as uint8: (t, h, w, 3), or (t, h, w, 4) with straight alpha in a transparent run.

        Windows of scenes return a `scenes.Sample`.

        Raises:
            ValueError: if the file cannot be read to the end of the window; the message names the file.
        """
        assert not self.clip.embedding, "precomputed latents have no pixels"
        place = (self.start, self.frames, self.fps, self.size)
        if self.alpha:
            return cutouts.read(self.clip.path, self.clip.matte, *place, self.alpha)
        return media.read(self.clip.path, *place)


@dataclass(frozen=True)
class Problem:
    """A problem with one clip, or with a whole source (codes `layout` and `held-out`)."""

    severity: Severity
    code: str
    name: str
    """Name of the clip or of the source."""
    message: str
    """Details of this case; may be empty if the code is sufficient."""
    source: int = 0


@dataclass(frozen=True)
class SourceReport:
    """Summary of one source."""

    path: str
    layout: str
    why: str
    """Reason why this layout was chosen."""
    clips: int = 0
    usable: int = 0
    windows: int = 0
    held_out: int = 0
    """Windows of validation clips."""
    seconds: float = 0.0
    repeats: int = 1
    weight: float = 1.0

    @property
    def shown(self) -> float:
        """Number of times each window is used per epoch."""
        return self.repeats * self.weight


@dataclass(frozen=True)
class Plan:
    """Clips and windows of a run, with the problems found."""

    clips: list[Clip]
    """All clips found, usable or not."""
    train: list[Window]
    held_out: list[Window]
    problems: list[Problem]
    sources: list[SourceReport]
    probes: dict[Path, media.Probe] = field(default_factory=dict)
    alphas: dict[Path, rgba.Alpha] = field(default_factory=dict)
    """Alpha statistics of each clip by path; empty unless the run is transparent."""
    noun: str = "clip"
    """Name of an example in messages."""

    @property
    def errors(self) -> list[Problem]:
        """Problems that stop the run or put a clip into quarantine."""
        return [p for p in self.problems if p.severity == "error"]


@dataclass(frozen=True)
class Kind:
    """Wording of a problem code: `3 of 40 clips` + `one` or `many` + (names) + `cure`."""

    severity: Severity
    one: str
    many: str
    cure: str = ""


KINDS: dict[str, Kind] = {
    "layout": Kind("error", "", ""),
    "held-out": Kind("error", "", ""),
    "outside": Kind(
        "error",
        "is outside of its source",
        "are outside of their source",
        "use paths inside the source's `root`",
    ),
    "missing": Kind("error", "does not exist", "do not exist", "correct the manifest or `root`"),
    "row": Kind("error", "has a broken row", "have a broken row", "correct the manifest"),
    "no-caption": Kind("error", "has no caption", "have no caption", FOLDER_CURE),
    "empty-caption": Kind("error", "has an empty caption", "have an empty caption", "describe the clip"),
    "unreadable": Kind("error", "cannot be read", "cannot be read", "convert or remove the file"),
    "truncated": Kind("error", "is truncated", "are truncated", "copy the file again or trim its end"),
    "unfitting": Kind(
        "error",
        "does not fit the checkpoint",
        "do not fit the checkpoint",
        "encode again for model.checkpoint, or remove",
    ),
    "pair": Kind(
        "error",
        "does not match its alpha matte",
        "do not match their alpha mattes",
        "trim and scale both files in the same way, inlaid does not trim them",
    ),
    "no-alpha": Kind(
        "error",
        "has no alpha",
        "have no alpha",
        "add an alpha matte, NAME_alpha.mp4 beside NAME.mp4, or remove",
    ),
    "constant-alpha": Kind(
        "error",
        "has constant alpha",
        "have constant alpha",
        "export again with transparency, or remove",
    ),
    "half": Kind("error", "is incomplete", "are incomplete", "encode again, or remove the remaining files"),
    "too-short": Kind(
        "error", "is too short", "are too short", "remove, or add a smaller length to data.frames"
    ),
    "image": Kind("error", "is an image", "are images", "add 1 to data.frames to train on images too"),
    "duplicate": Kind("warning", "is a copy", "are copies", "keep one copy, or set `repeats`"),
    "odd-size": Kind(
        "warning", "has an odd size", "have an odd size", "nothing to do, clips are scaled and cropped"
    ),
    "variable-rate": Kind(
        "warning", "has a variable frame rate", "have a variable frame rate", CHOSEN_BY_TIME
    ),
    "slow": Kind(
        "warning",
        "is slower than data.fps",
        "are slower than data.fps",
        "lower data.fps or set data.slow=keep",
    ),
    "upscaled": Kind("warning", "is enlarged", "are enlarged", "lower data.size or use larger clips"),
    "cropped": Kind(
        "warning", "is cropped a lot", "are cropped a lot", "add a closer aspect ratio to data.aspects"
    ),
    "fixed-caption": Kind(
        "warning",
        "has a precomputed text embedding",
        "have precomputed text embeddings",
        "data.trigger and data.caption_prefix do not apply: add them to the caption and encode it again",
    ),
    "no-picture": Kind("error", "has no input image", "have no input image", "add scene_rgb.png"),
    "no-segmentation": Kind("error", "has no segmentation", "have no segmentation", "add seg.png"),
    "no-surface": Kind(
        "error", "lacks a surface", "lack surfaces", "add surface_ID.npy for each visible object"
    ),
    "names": Kind(
        "error",
        "has unexpected file names",
        "have unexpected file names",
        "use surface_ID.npy, or surface.npy for a single object",
    ),
    "picture-size": Kind(
        "error",
        "differs in size from its segmentation",
        "differ in size from their segmentations",
        "save image and segmentation in the same size",
    ),
    "several": Kind(
        "error",
        "has surfaces that do not match its objects",
        "have surfaces that do not match their objects",
        "save one surface per object",
    ),
    "absent": Kind("error", "lacks an object", "lack objects", "correct seg.png"),
    "hidden": Kind(
        "error",
        "has no visible object",
        "have no visible object",
        "use a view in which the objects are larger",
    ),
    "pickle": Kind("error", "contains a pickle", "contain pickles", "save with numpy.savez"),
    "surface": Kind("error", "has a broken surface", "have broken surfaces", "sample the mesh again"),
    "outside-box": Kind(
        "error",
        "exceeds the box",
        "exceed the box",
        "normalize the whole scene with one transform, longest side 1.9",
    ),
    "unaligned": Kind(
        "warning",
        "has objects normalized separately",
        "have objects normalized separately",
        "keep all objects in the frame of the scene",
    ),
    "flipped": Kind(
        "warning", "has normals that point inward", "have normals that point inward", "flip the normals"
    ),
    "sparse": Kind("warning", "has few points", "have few points", "sample about 20,480 per object"),
    "estimated": Kind("warning", "has no normals", "have no normals", "save them: (n, 6)"),
    "fourth-column": Kind(
        "warning", "has a fourth column", "have a fourth column", "save normals instead: (n, 6)"
    ),
    "small": Kind("warning", "has tiny objects", "have tiny objects", "tiny objects are not trained on"),
    "bare": Kind(
        "warning",
        "has objects without a surface",
        "have objects without a surface",
        "objects without a surface are not trained on",
    ),
    "crowded": Kind(
        "warning",
        "has many objects",
        "have many objects",
        "each step trains on a random subset of the objects",
    ),
    "transparent": Kind(
        "warning", "is transparent", "are transparent", "composited over white, this run is opaque"
    ),
    "matte": Kind(
        "warning",
        "is an alpha matte",
        "are alpha mattes",
        "left out, this run is opaque: set alpha.kind=joint or merged to train on them",
    ),
    "inverted": Kind(
        "warning",
        "looks inverted",
        "look inverted",
        "set data.matte.invert=true if white means transparent",
    ),
    "limited": Kind(
        "warning",
        "has no alpha outside 14 to 237",
        "have no alpha outside 14 to 237",
        "set data.matte.limited=true if the alpha mattes have limited range, 16 to 235",
    ),
    "premultiplied": Kind(
        "warning",
        "looks premultiplied",
        "look premultiplied",
        "color is divided by alpha; if that is wrong, set data.matte.premultiplied=true or false",
    ),
    "residue": Kind(
        "warning",
        "has a background that is nearly but not fully transparent",
        "have backgrounds that are nearly but not fully transparent",
        "set data.matte.snap=2 to remove residue of lossy compression",
    ),
    "odd-alpha": Kind(
        "warning",
        "has unusual alpha",
        "have unusual alpha",
        "inspect the contact sheet",
    ),
    "hdr": Kind("warning", "is HDR", "are HDR", "colors will look pale: convert to SDR"),
}
"""All problem codes, in the order of reporting."""

SOURCE_CODES = ("layout", "held-out")
"""Codes of problems with a source rather than a clip; quarantine does not apply to them."""


# --- finding clips ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Contents of a source: clips whose files exist, and problems."""

    layout: str
    why: str
    clips: list[Clip]
    problems: list[Problem]
    count: int


class _Scan:
    """Collector of the clips and problems of one source."""

    def __init__(self, source: config.Source, index: int, root: Path, channels: int = 3) -> None:
        self.source, self.index, self.root, self.channels = source, index, root, channels
        self.pairs = cutouts.Pairs(root)
        self.clips: list[Clip] = []
        self.problems: list[Problem] = []
        self.count = 0

    def problem(self, code: str, name: str, message: str = "") -> None:
        self.problems.append(Problem(KINDS[code].severity, code, name, message, self.index))

    def file(self, text: str, where: str) -> Path | None:
        """Return the path `text` (relative to the root) if it can be read; else record a problem."""
        path = self.root / Path(os.path.normpath(text)).as_posix()
        transparent = self.channels == 4
        try:
            inside, there = _inside(path, self.root), path.is_file()
            if transparent and not there:
                there = bool(cutouts.frames_in(path))
                named = [] if there or not inside else self.pairs.named(path)
                path, there = (named[0], True) if named else (path, there)
        except (OSError, ValueError):  # path too long, or contains a null character
            inside, there = True, False
        if Path(text).is_absolute() or PureWindowsPath(text).drive or not inside:
            self.problem("outside", text, where)
        elif _legible(text) != text:
            self.problem("unreadable", _legible(text), "the file name is not UTF-8, rename the file")
        elif not there:
            self.problem("missing", text[:200].replace("\0", "\\0"), where)
        elif path.is_file() and path.suffix.lower() not in (cutouts.KNOWN if transparent else media.KNOWN):
            self.problem("unreadable", text, f"`{path.suffix}` files are not supported")
        else:
            return path
        return None

    def matte(self, path: Path, text: str | None, where: str) -> tuple[Path | None, bool]:
        """Return the alpha matte of a clip, given by `text` or found beside it, and True without problems."""
        if text is not None:
            named = self.file(text.strip(), where)
            return named, named is not None
        found = self.pairs.matte(path)
        if len(found) > 1:
            shown = " and ".join(f.name for f in found)
            self.problem(
                "pair", self.name(path), f"has several alpha mattes ({shown}): keep one, or use a manifest"
            )
        outside = [f for f in found if not _inside(f, self.root)]
        if outside:
            self.problem("outside", self.name(outside[0]), where)
        return (found[0] if found else None), len(found) < 2 and not outside

    def name(self, path: Path) -> str:
        """Return the path relative to the root, for messages."""
        return Path(os.path.relpath(path, self.root)).as_posix()

    def add(
        self, text: str, caption: Any, group: Any = None, *, where: str = "", matte: str | None = None
    ) -> None:
        """Add the clip at `text` (relative to the root) with its alpha matte, if both can be read."""
        self.count += 1
        text = text.strip()
        path, alpha, well = self.file(text, where), None, True
        if path and self.channels == 4:
            alpha, well = self.matte(path, matte, where)
        elif path and matte is not None:
            self.problem("matte", matte.strip(), where)
        if path and well:
            name = self.name(path)
            if caption is None:
                self.problem("no-caption", name, where)
            elif not isinstance(caption, str):
                self.problem("no-caption", name, f"{where}: {type(caption).__name__}, not text")
            elif not caption.strip():
                self.problem("empty-caption", name, where)
            elif _legible(caption) != caption:
                shown = _legible(caption)[:40]
                self.problem("no-caption", name, f"{where}: invalid Unicode in `{shown}`")
                caption = ""
            text = " ".join(caption.split()) if isinstance(caption, str) else ""
            group = None if group is None else str(group)
            self.clips.append(Clip(path, name, text, self.index, group, cutouts.kind(path), matte=alpha))


def _inside(path: Path, root: Path) -> bool:
    """Return True if the path is under the root after resolving links.

    Accepts circular links, for which `Path.resolve` raises.
    """
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _legible(text: str) -> str:
    """Replace invalid Unicode, which file names and JSON may contain, so that text can be printed."""
    return text.encode("utf-8", "replace").decode()


def _find(source: config.Source, index: int, patterns: Encoded | None, channels: int) -> Found:
    """Find the clips of a source in any layout."""
    path = Path(source.path).expanduser()
    root = Path(source.root).expanduser() if source.root else path if path.is_dir() else path.parent
    scan = _Scan(source, index, root, channels)
    layout, why = source.layout, "as configured"
    try:
        if not path.exists():
            raise ValueError("no such file or folder")
        layout, why, target = _detect(path, source, patterns, channels)
        if source.root and layout in ("folder", "encoded"):
            raise ValueError("`root` is only for manifests: remove it")
        if source.root and not root.is_dir():
            raise ValueError(f"`root` {root} is not a folder")
        if layout == "encoded":
            assert patterns
            _encoded(target, scan, patterns)
        else:
            {"folder": _folder, "lines": _lines, "csv": _table, "jsonl": _objects}[layout](target, scan)
        if not scan.count:
            raise ValueError(f"contains no clips ({why})")
    except csv.Error as error:
        scan.problem("layout", source.path, f"is not valid CSV ({error}): look for an unclosed quote")
    except (ValueError, OSError) as error:
        scan.problem("layout", source.path, str(error))
    return Found(layout, why, scan.clips, scan.problems, scan.count)


def _detect(
    path: Path, source: config.Source, patterns: Encoded | None, channels: int
) -> tuple[str, str, Path]:
    """Return the layout, the reason for it, and the file or folder to read.

    Raises:
        ValueError: if no layout or more than one layout matches.
    """
    wanted = source.layout
    if path.is_file():
        found = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}.get(path.suffix.lower())
        if found is None:
            raise ValueError("is neither a folder nor a manifest (.csv, .jsonl, .json)")
        if wanted not in ("auto", found):
            raise ValueError(f"is {found}, but `layout` is {wanted}")
        return found, f"a {path.suffix.lower()} manifest", path
    files = _files(path)
    if channels == 4:
        pairs = cutouts.Pairs(path)
        files = [f for f in cutouts.entries(path) if _caption_file(f).is_file() or not pairs.color(f)]
    stems = {f.with_suffix("") for f in files}
    options: list[tuple[str, str, Path]] = []
    if patterns and wanted in ("auto", "encoded"):
        names = {n for part in (patterns.media[0], patterns.text) for n in _matching(path, part)}
        option = ("encoded", f"{len(names)} clips of precomputed latents, {patterns.says}", path)
        if names and names >= {*_matching(path, patterns.video, media.KNOWN)}:
            return option  # the videos in the folder are those the latents were computed from
        options += [option] if names else []
    lines = _line_files(path, source)
    if lines:
        options.append(("lines", " and ".join(f.name for f in lines), path))
    manifests = (f for f in path.iterdir() if f.suffix.lower() in MANIFESTS and not f.name.startswith("."))
    for file in sorted(f for f in manifests if f.is_file() and f.with_suffix("") not in stems):
        options.append(("csv" if file.suffix.lower() == ".csv" else "jsonl", file.name, file))
    beside = sum(_caption_file(f).is_file() for f in files)
    if beside or (files and not options) or wanted == "folder":
        options.append(("folder", f"{len(files)} clips, {beside} with a .txt beside", path))
    options = [o for o in options if wanted in ("auto", o[0])]
    if not options:
        raise ValueError(_nothing(path, wanted, patterns))
    if len(options) > 1:
        held = "; ".join(o[1] for o in options)
        raise ValueError(f"is ambiguous: it contains {held}. Set `path` to the manifest, or set `layout`")
    return options[0]


def _nothing(path: Path, wanted: str, patterns: Encoded | None) -> str:
    """Return the message for a folder without any known layout."""
    reads = f"this model reads {patterns.says}" if patterns else "this model does not read any"
    needs = {
        "lines": "prompts.txt and videos.txt; set `caption_column` and `video_column` for other file names",
        "csv": ".csv",
        "jsonl": ".jsonl or .json",
        "encoded": f"precomputed latents; {reads}",
    }
    tensors = len(_files(path, (".pt",)))
    aside = f"; it contains {tensors} .pt files, but {reads}" if tensors else ""
    readable = " ".join(media.KNOWN)
    return f"contains no {needs.get(wanted) or f'clips ({readable}){aside}'}"


def _line_files(folder: Path, source: config.Source) -> tuple[Path, Path] | None:
    """Return the file of captions and the file of paths, if both exist.

    Raises:
        ValueError: if several files match.
    """
    found = []
    for key, named, defaults in (
        ("caption_column", source.caption_column, PROMPTS),
        ("video_column", source.video_column, VIDEOS),
    ):
        there = [n for n in ([named] if named else defaults) if (folder / n).is_file()]
        if len(there) > 1 and source.layout == "lines":
            raise ValueError(f"contains {' and '.join(there)}; set `{key}` to one of these files")
        found += [folder / n for n in there[:1]]
    return (found[0], found[1]) if len(found) == 2 else None


def _matching(folder: Path, pattern: str, suffixes: tuple[str, ...] = ("",)) -> dict[str, Path]:
    """Return the files that match a pattern such as `latents/*.pt`, by the text that replaces `*`."""
    head, tail = pattern.split("*")
    ends = tuple(tail + s for s in suffixes)
    found = {f.relative_to(folder / head).as_posix(): f for f in _files(folder / head, ends)}
    return {n[: -max(len(e) for e in ends if n.lower().endswith(e))]: f for n, f in found.items()}


def _encoded(folder: Path, scan: _Scan, patterns: Encoded) -> None:
    """Collect precomputed latents; `encoded.look` later inspects the content of the files."""
    parts = [_matching(folder, part) for part in (*patterns.media, patterns.text)]
    captions = _matching(folder, patterns.caption)
    for name in sorted({*parts[0], *parts[-1]}):
        scan.count += 1
        there = [part[name] for part in parts if name in part]
        shown = there[0].relative_to(folder).as_posix()
        wanted = [p.replace("*", name) for p in (*patterns.media, patterns.text)]
        missing = [w for w, part in zip(wanted, parts, strict=True) if name not in part]
        outside = [f for f in there if not _inside(f, scan.root)]
        if missing:
            scan.problem(
                "half", shown, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            )
        elif outside:
            scan.problem("outside", shown)
        else:
            beside = captions.get(name)
            text = beside.read_text("utf-8-sig", "replace") if beside and _inside(beside, scan.root) else ""
            text = " ".join(text.split())
            scan.clips.append(
                Clip(there[0], shown, text, scan.index, None, "encoded", tuple(there[:-1]), there[-1])
            )


def _files(folder: Path, suffixes: tuple[str, ...] = media.KNOWN) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        shown = (f for f in sorted(files) if not f.startswith("."))
        found += [Path(parent, f) for f in shown if f.lower().endswith(suffixes)]
    return found


def _caption_file(clip: Path) -> Path:
    """Return the path of a clip's caption file, which may not exist."""
    places = cutouts.captions(clip)
    return next((p for p in places if p.is_file()), places[0])


def _folder(folder: Path, scan: _Scan) -> None:
    clips = cutouts.entries(folder) if scan.channels == 4 else _files(folder)
    stems = {place.with_suffix("") for c in clips for place in cutouts.captions(c)}
    for caption in _files(folder, (".txt",)):
        if caption.with_suffix("") in stems:
            continue
        for file in sorted(caption.parent.glob(f"{glob.escape(caption.stem)}.*")):
            # a file with a caption but an unsupported format, such as .wmv: report it instead of skipping it
            if file.is_file() and file.suffix.lower() not in (".txt", ".md", *MANIFESTS):
                scan.count += 1
                name = file.relative_to(folder).as_posix()
                scan.problem("unreadable", name, f"`{file.suffix}` files are not supported")
    for file in clips:
        beside = _caption_file(file)
        name = file.relative_to(folder).as_posix()
        if not beside.is_file() and scan.pairs.color(file):
            if scan.channels != 4:
                scan.count += 1
                scan.problem("matte", name)
            continue
        if beside.is_file() and not _inside(beside, scan.root):
            scan.count += 1
            scan.problem("outside", beside.relative_to(folder).as_posix())
            continue
        try:
            scan.add(name, beside.read_text("utf-8-sig") if beside.is_file() else None)
        except UnicodeDecodeError:
            scan.count += 1
            scan.problem("no-caption", name, f"{beside.name} is not UTF-8")


def _lines(folder: Path, scan: _Scan) -> None:
    files = _line_files(folder, scan.source)
    assert files
    prompts, videos = (list(enumerate(_text(f).rstrip().split("\n"), 1)) for f in files)
    if len(prompts) != len(videos):  # the files may differ only in blank lines
        prompts, videos = ([line for line in part if line[1].strip()] for part in (prompts, videos))
    if len(prompts) != len(videos):
        told = " and ".join(
            f"{f.name} has {len(n)} lines" for f, n in zip(files, (prompts, videos), strict=True)
        )
        raise ValueError(told)
    for (_, prompt), (number, video) in zip(prompts, videos, strict=True):
        if video.strip():
            scan.add(video, prompt, where=f"line {number}")
        elif prompt.strip():
            scan.count += 1
            scan.problem("row", f"line {number}", f"{files[1].name} has an empty line")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8") from None


def _table(path: Path, scan: _Scan) -> None:
    rows = csv.reader(io.StringIO(_text(path)), strict=True)
    header = [c.strip() for c in next(rows, [])]
    if not any(header):
        raise ValueError(f"{path.name} is empty")
    columns = _columns(scan, header)
    for cells in rows:
        where = f"line {rows.line_num}"
        if len(cells) > len(header):
            scan.count += 1
            scan.problem(
                "row", where, f"{len(cells)} cells for {len(header)} columns: quote texts that contain commas"
            )
        elif any(c.strip() for c in cells):
            _row(dict(zip(header, cells, strict=False)), columns, scan, where)


def _objects(path: Path, scan: _Scan) -> None:
    text = _text(path)
    whole = path.suffix.lower() == ".json"
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        try:
            if whole:
                rows = [(f"entry {i}", r) for i, r in enumerate(json.loads(line), 1)]
            elif line.strip():
                rows.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            at = error.lineno if whole else number
            raise ValueError(
                f"{path.name}, line {at}: not valid JSON (column {error.colno}: {error.msg})"
            ) from None
        except TypeError:
            raise ValueError(f"{path.name}, line {number}: not a JSON list of objects") from None
    if not rows:
        raise ValueError(f"{path.name} is empty")
    wrong = next((where for where, r in rows if not isinstance(r, dict)), None)
    if wrong:
        raise ValueError(f"{path.name}, {wrong}: expected an object with a path and a caption")
    columns = _columns(scan, list(dict.fromkeys(k for _, r in rows for k in r)))
    for where, row in rows:
        _row(row, columns, scan, where)


def _columns(scan: _Scan, there: list[str]) -> Columns:
    """Return the names of the columns with path, caption, group and alpha matte.

    Raises:
        ValueError: if a column is missing; the message lists the existing columns.
    """
    source, transparent = scan.source, scan.channels == 4
    out = []
    for key, named, defaults in (
        ("video_column", source.video_column, VIDEO_COLUMNS + COLOR_COLUMNS * transparent),
        ("caption_column", source.caption_column, CAPTION_COLUMNS),
        ("group_column", source.group_column, ()),
        ("alpha_column", source.alpha_column, ALPHA_COLUMNS * transparent),
    ):
        found = next((c for c in ([named] if named else defaults) if c in there), None)
        if found is None and (named or (defaults and key != "alpha_column")):
            want = f"no column `{named}`" if named else f"none of the columns {', '.join(defaults)}"
            raise ValueError(f"has {want}; its columns are {', '.join(there)}: set `{key}`")
        out.append(found)
    return out[0], out[1], out[2], out[3]


Columns = tuple[str, str, str | None, str | None]


def _row(row: Mapping[str, Any], columns: Columns, scan: _Scan, where: str) -> None:
    video = row.get(columns[0])
    if not isinstance(video, str) or not video.strip():
        scan.count += 1
        scan.problem("row", where, f"`{columns[0]}` is not a file name")
        return
    group, alpha = (row.get(c) if c else None for c in columns[2:])
    if columns[3] and not (isinstance(alpha, str) and alpha.strip()):
        alpha = None  # the clip of this row may have an alpha channel
    scan.add(video, row.get(columns[1]), group, where=where, matte=alpha)


# --- windows and buckets ------------------------------------------------------------------------------------


def caption(text: str, data: config.Data) -> str:
    """Return the caption with the prefix, and with the trigger unless the caption contains it as a word."""
    text = f"{data.caption_prefix.strip()} {text}".strip()
    trigger = data.trigger.strip()
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        text = f"{trigger} {text}"
    return text


def sizes(data: config.Data, grid: Grid) -> list[Size]:
    """Return height and width of each bucket: `size`, or one size of about that area per aspect ratio."""
    if not data.aspects:
        return [data.size]
    area = data.size[0] * data.size[1]
    ratios = (float(w) / float(h) for w, h in (a.split(":") for a in data.aspects))
    return list(dict.fromkeys(grid.snap_size(math.sqrt(area / r), math.sqrt(area * r)) for r in ratios))


def spread(there: int, length: int, stride: int, most: int) -> list[int]:
    """Return first frames of at most `most` windows, at least `stride` apart, spread over `there` frames."""
    room = there - length
    count = min(most, 1 + room // stride)
    return [room // 2] if count == 1 else [i * room // (count - 1) for i in range(count)]


def _there(probe: media.Probe, data: config.Data, fps: float) -> tuple[int, float]:
    """Return the number of frames available in a clip and its sampling rate in frames per second."""
    if data.slow == "keep" and probe.fps and probe.fps < fps * 0.99:
        return probe.frames, float(probe.fps)
    return media.available(probe, fps), fps


def _windows(
    clip: Clip,
    probe: media.Probe,
    data: config.Data,
    buckets: list[Size],
    fps: float,
    alpha: rgba.Alpha | None,
) -> list[Window]:
    if clip.embedding:
        return [Window(clip, 0.0, probe.frames, fps, (probe.height, probe.width), clip.caption)]
    there, rate = _there(probe, data, fps)
    length = max((n for n in data.frames if n <= there), default=0)
    if not length:
        return []
    ratio = math.log(probe.width / probe.height)
    size = min(buckets, key=lambda s: abs(math.log(s[1] / s[0]) - ratio))
    starts = spread(there, length, data.stride or length, data.max_windows)
    text, how = caption(clip.caption, data), None
    if alpha:
        divided = alpha.premultiplied if data.matte.premultiplied == "auto" else data.matte.premultiplied
        how = data.matte.model_copy(update={"premultiplied": divided})
    return [Window(clip, round(s / rate, 9), length, rate, size, text, how) for s in starts]


def _clip_problems(
    clip: Clip,
    probe: media.Probe,
    data: config.Data,
    fps: float,
    size: Size | None,
    alpha: rgba.Alpha | None,
) -> list[Problem]:
    """Return the problems of a readable clip; `size` is its bucket's, or None if the clip has no window."""
    out: list[Problem] = []

    def add(code: str, message: str) -> None:
        out.append(Problem(KINDS[code].severity, code, clip.name, message, clip.source))

    if clip.embedding:
        if data.trigger or data.caption_prefix:
            add("fixed-caption", "")
        return out
    if size is None and clip.kind == "image" and probe.frames == 1:
        add("image", "")
    elif size is None:
        need, (there, rate) = min(data.frames), _there(probe, data, fps)
        add(
            "too-short",
            f"{need} frames at {rate:g} fps need {need / rate:.2f} s, it has {there / rate:.2f} s",
        )
    if probe.width % 2 or probe.height % 2:
        add("odd-size", f"{probe.width}x{probe.height}")
    if probe.variable:
        add("variable-rate", f"{float(probe.fps or 0):.2f} fps on average")
    if probe.fps and probe.fps < fps * 0.99:
        told = "frames are repeated" if data.slow == "repeat" else "the video plays faster"
        add("slow", f"{float(probe.fps):g} fps of {fps:g}: {told}")
    if alpha:
        out += _alpha_problems(clip, alpha, data.matte)
    elif probe.transparent:
        add("transparent", "")
    if probe.hdr:
        add("hdr", "")
    if size is not None:
        scale = max(size[0] / probe.height, size[1] / probe.width)
        seen = size[0] * size[1] / (probe.height * probe.width * scale**2)
        if scale > UPSCALE:
            add("upscaled", f"{probe.width}x{probe.height} by {scale:.1f}")
        if 1 - seen > CROPPED:
            add("cropped", f"{1 - seen:.0%} of {probe.width}x{probe.height}")
    return out


def _alpha_problems(clip: Clip, alpha: rgba.Alpha, how: config.Matte) -> list[Problem]:
    """Return the problems of a clip's alpha that the recipe does not correct."""
    found = {
        "inverted": alpha.inverted and not how.invert,
        "limited": alpha.limited and not how.limited,
        "premultiplied": alpha.premultiplied and how.premultiplied == "auto",
        "residue": alpha.residue > RESIDUE and not how.snap,
    }
    says = {
        "limited": f"{alpha.lowest} to {alpha.highest}",
        "residue": f"{alpha.residue:.1%} of its pixels",
        "inverted": f"covers {alpha.coverage:.0%}",
    }
    return [
        Problem(KINDS[code].severity, code, clip.name, says.get(code, ""), clip.source)
        for code, yes in found.items()
        if yes
    ]


def _odd_ones(clips: Sequence[Clip], alphas: Mapping[Path, rgba.Alpha]) -> list[Problem]:
    """Return a warning for each clip whose alpha differs from that of nearly all other clips."""
    there = [(c, alphas[c.path]) for c in clips if c.path in alphas]
    if len(there) < 4:
        return []
    typical = float(np.median([a.coverage for _, a in there]))
    divided = sum(a.premultiplied for _, a in there)
    out = []
    for clip, alpha in there:
        says = []
        if abs(alpha.coverage - typical) > ODD:
            says.append(f"covers {alpha.coverage:.0%}, the median is {typical:.0%}")
        same = divided if alpha.premultiplied else len(there) - divided
        if same * 10 <= len(there):
            says.append("premultiplied" if alpha.premultiplied else "straight, the others look premultiplied")
        if says:
            message = "; ".join(says)
            out.append(Problem("warning", "odd-alpha", clip.name, message, clip.source))
    return out


# --- the plan -----------------------------------------------------------------------------------------------


def plan(
    data: config.Data,
    grid: Grid,
    fps: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    family: Family | None = None,
    probe: Callable[[Path], media.Probe] = media.probe,
    look: Callable[[Path, Path | None], cutouts.Look] = cutouts.look,
) -> Plan:
    """Probe every clip and select the windows of a run.

    Decodes only the first frame and the end of each file.

    Args:
        data: the recipe's `data` section; its `fps` overrides the argument.
        grid: frame counts and sizes that the family supports.
        fps: the family's frame rate.
        seed: determines the validation clips.
        progress: called with (done, total) while files are probed.
        family: adds its layout of precomputed latents, and alpha if it has 4 channels.
        probe: probes a file; a cache can supply a memoized version.
        look: replaces `probe` if the family is transparent; also takes the alpha matte.
    """
    fps = float(data.fps or fps)
    patterns = [family.encoded_in(Path(s.path).expanduser()) if family else None for s in data.sources]
    channels = family.channels if family else 3
    found = [_find(source, i, patterns[i], channels) for i, source in enumerate(data.sources)]
    problems = [p for f in found for p in f.problems]
    clips = [c for f in found for c in f.clips]
    looks, failed = _look_all(clips, progress, family, fps, look if channels == 4 else probe)
    probes = {p: each.probe if isinstance(each, cutouts.Look) else each for p, each in looks.items()}
    alphas = {p: each.alpha for p, each in looks.items() if isinstance(each, cutouts.Look)}
    problems += failed + _odd_ones(clips, alphas)
    buckets = sizes(data, grid)
    windows: dict[int, list[Window]] = {}
    for i, clip in enumerate(clips):
        if clip.path in probes:
            probed, alpha = probes[clip.path], alphas.get(clip.path)
            made = _windows(clip, probed, data, buckets, fps, alpha)
            problems += _clip_problems(clip, probed, data, fps, made[0].size if made else None, alpha)
            if made and (clip.caption or clip.embedding):
                windows[i] = made
    return assemble(data, seed, found, windows, problems, probes, alphas=alphas)


def assemble(
    data: config.Data,
    seed: int,
    found: Sequence[Found],
    windows: Mapping[int, Sequence[Window]],
    problems: list[Problem],
    probes: dict[Path, media.Probe],
    alike: Callable[[Sequence[Clip]], Mapping[Path, str]] | None = None,
    noun: str = "clip",
    alphas: dict[Path, rgba.Alpha] | None = None,
) -> Plan:
    """Split the windows into training and validation and build the plan.

    Args:
        data: the recipe's `data` section.
        seed: determines the validation clips.
        found: contents of each source.
        windows: windows of usable clips, by index among all clips found.
        problems: problems of clips; duplicates and validation problems are appended.
        probes: probes by path.
        alike: returns a mark by path; clips with equal marks go to the same side of the split. Default: clips
            with equal content.
        noun: name of an example in messages.
        alphas: alpha statistics by path.
    """
    clips = [c for f in found for c in f.clips]
    usable = [clips[i] for i in windows]
    twins, doubled = _duplicates(usable)
    problems += doubled
    held, held_problems = _hold_out(usable, alike(usable) if alike else twins, data.held_out, seed)
    problems += held_problems
    train = [w for i, ws in windows.items() for w in ws if clips[i].path not in held]
    out = [w for i, ws in windows.items() for w in ws if clips[i].path in held]
    reports = [
        SourceReport(
            path=source.path,
            layout=f.layout,
            why=f.why,
            clips=f.count,
            usable=sum(clips[i].source == index for i in windows),
            windows=sum(w.clip.source == index for w in train),
            held_out=sum(w.clip.source == index for w in out),
            seconds=sum(probes[c.path].duration for c in f.clips if c.path in probes),
            repeats=source.repeats,
            weight=source.weight,
        )
        for index, (source, f) in enumerate(zip(data.sources, found, strict=True))
    ]
    order = list(KINDS)
    problems.sort(key=lambda p: (p.severity, order.index(p.code), p.source, p.name))
    return Plan(clips, train, out, problems, reports, probes, alphas or {}, noun)


def _look_all(
    clips: Sequence[Clip],
    progress: Callable[[int, int], None] | None,
    family: Family | None,
    fps: float,
    see: Callable[..., media.Probe | cutouts.Look],
) -> tuple[dict[Path, media.Probe | cutouts.Look], list[Problem]]:
    """Probe every clip once, in threads."""
    first = {c.path: c for c in reversed(clips)}
    probes: dict[Path, media.Probe | cutouts.Look] = {}
    problems = [
        Problem("error", "pair", c.name, "it is listed with two different alpha mattes", c.source)
        for c in clips
        if c.matte != first[c.path].matte
    ]

    def look(path: Path) -> media.Probe | cutouts.Look | media.MediaError:
        clip = first[path]
        try:
            if not (clip.embedding and family):
                return see(path, clip.matte) if family and family.channels == 4 else see(path)
            frames, height, width = encoded.look(family, clip.latents, clip.embedding)
            rate = Fraction(fps).limit_denominator(1000)
            return media.Probe(frames, rate, height, width, frames / fps, 1 / fps)
        except media.MediaError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, (path, result) in enumerate(zip(first, pool.map(look, first), strict=True), 1):
            if isinstance(result, media.MediaError):
                clip = first[path]
                problems.append(Problem("error", result.code, clip.name, result.cause, clip.source))
            else:
                probes[path] = result
            if progress:
                progress(done, len(first))
    return probes, problems


def _duplicates(clips: Sequence[Clip]) -> tuple[dict[Path, str], list[Problem]]:
    """Return a mark per path, equal for files of equal content, and a warning for each further copy."""

    def files(clip: Clip) -> tuple[Path, ...]:
        return (clip.path,) if clip.latents else clip.files

    def size(clip: Clip) -> int:
        return sum(f.stat().st_size for f in files(clip))

    by_size: dict[int, set[Path]] = defaultdict(set)
    for clip in clips:
        by_size[size(clip)].add(clip.path.resolve())
    marks: dict[Path, str] = {}
    problems: list[Problem] = []
    first: dict[str, Clip] = {}
    for clip in clips:
        alone = len(by_size[size(clip)]) == 1
        mark = str(clip.path.resolve()) if alone else ",".join(sha256(f.resolve()) for f in files(clip))
        marks[clip.path] = mark
        other = first.setdefault(mark, clip)
        if other is not clip:
            same = "listed twice" if other.path == clip.path else f"same content as {other.name}"
            problems.append(Problem("warning", "duplicate", clip.name, same, clip.source))
    return marks, problems


def _hold_out(
    clips: Sequence[Clip], marks: Mapping[Path, str], wanted: float, seed: int
) -> tuple[set[Path], list[Problem]]:
    """Return the paths of the validation clips: those with the lowest hash of seed and name.

    Clips with equal marks stay together.
    """
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[marks[clip.path]].append(clip)
    count = math.floor(wanted * len(clips) + 0.5) if wanted < 1 else int(wanted)
    if not clips or not count:
        return set(), []
    if count >= len(clips):
        message = f"data.validation={wanted:g} of {len(clips)} clips leaves none to train on: lower it"
        return set(), [Problem("error", "held-out", "data.held_out", message)]

    def rank(group: list[Clip]) -> bytes:
        return hashlib.sha256(f"{seed}\0{min(c.name for c in group)}".encode()).digest()

    held: list[Clip] = []
    for group in sorted(groups.values(), key=rank):
        if len(held) < count and len(held) + len(group) < len(clips):
            held += group
    return {c.path for c in held}, []


def describe(problems: Sequence[Problem], total: int, shown: int = 5, noun: str = "clip") -> list[str]:
    """Return one line per code: `2 of 40 clips have no caption (07.mp4, 12.mp4): add a .txt beside each`."""
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.code].append(problem)
    out = []
    for code in sorted(groups, key=list(KINDS).index):
        group, says = groups[code], KINDS[code]
        if code in SOURCE_CODES:
            out += [f"{p.name}: {p.message}" if code == "layout" else p.message for p in group]
            continue
        names = [f"{p.name}: {p.message}" if p.message else p.name for p in group[:shown]]
        more = f" and {len(group) - shown} more" if len(group) > shown else ""
        joined = ("; " if any(p.message for p in group[:shown]) else ", ").join(names)
        verb = says.one if len(group) == 1 else says.many
        cure = MANIFEST_CURE if says.cure == FOLDER_CURE and any(p.message for p in group) else says.cure
        out.append(f"{len(group)} of {total} {noun}s {verb} ({joined}{more}): {cure}")
    return out


def require(plan: Plan, bad_clips: Literal["stop", "quarantine"]) -> list[Problem]:
    """Raise if the plan has errors; with `quarantine`, only for errors of sources or if no clip remains.

    Returns:
        The errors of the clips left out, for the caller to record; empty without errors.

    Raises:
        ValueError: with all errors, one line per code.
    """
    total = sum(s.clips for s in plan.sources)
    stops = [p for p in plan.errors if bad_clips == "stop" or p.code in SOURCE_CODES]
    if stops or not plan.train:
        raise ValueError("\n".join(describe(stops or plan.errors, total, noun=plan.noun)))
    return plan.errors


# --- order --------------------------------------------------------------------------------------------------


def _permutation(n: int, *key: Hashable) -> list[int]:
    """Return a permutation of `n` that depends only on the key, on every machine and in every version."""
    entropy = np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), np.uint32)
    return np.random.RandomState(entropy).permutation(n).tolist()


class BucketSampler:
    """Sampler of batches of window indices; all windows of a batch have the same shape.

    Batch k is a function of the arguments and k only. Per epoch, each (source, shape) contributes
    max(1, round(n * repeats * weight)) of its n windows, taken from an endless sequence of permutations: the
    use counts of two of these windows never differ by more than one.
    """

    def __init__(
        self,
        entries: Sequence[tuple[int, Hashable]],
        repeats: Mapping[int, float] | Sequence[float],
        batch: int,
        seed: int,
    ) -> None:
        """Prepare the order.

        Args:
            entries: source index and shape of each window.
            repeats: per source, repeats * weight.
            batch: windows per batch; the last of a shape may be smaller.
            seed: determines the order.

        Raises:
            ValueError: if there are no windows.
        """
        if not entries:
            raise ValueError("no windows to train on")
        self.size, self.seed = batch, seed
        self._groups: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
        for i, entry in enumerate(entries):
            self._groups[entry].append(i)
        self._shown = {g: max(1, math.floor(len(v) * repeats[g[0]] + 0.5)) for g, v in self._groups.items()}
        counts: dict[Hashable, int] = defaultdict(int)
        for (_, shape), shown in self._shown.items():
            counts[shape] += shown
        self._length = sum(math.ceil(n / batch) for n in counts.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self._length

    def batch(self, k: int) -> list[int]:
        """Return the indices of the windows of batch k, for any k >= 0."""
        epoch, at = divmod(k, self._length)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][at]

    def _batches(self, epoch: int) -> list[list[int]]:
        shapes: dict[Hashable, list[int]] = defaultdict(list)
        for group, members in self._groups.items():
            n, shown = len(members), self._shown[group]
            first, last = epoch * shown, (epoch + 1) * shown
            for turn in range(first // n, (last - 1) // n + 1):
                order = _permutation(n, self.seed, "windows", group, turn)
                picked = order[max(first - turn * n, 0) : last - turn * n]
                shapes[group[1]] += [members[i] for i in picked]
        batches = []
        for shape, indices in shapes.items():
            order = _permutation(len(indices), self.seed, "shape", shape, epoch)
            mixed = [indices[i] for i in order]
            batches += [mixed[i : i + self.size] for i in range(0, len(mixed), self.size)]
        return [batches[i] for i in _permutation(len(batches), self.seed, "batches", epoch)]


def sampler(
    windows: Sequence[Window], sources: Sequence[config.Source], batch: int, seed: int
) -> BucketSampler:
    """Return the batch sampler of a plan's training windows."""
    shares = [s.repeats * s.weight for s in sources]
    return BucketSampler([(w.clip.source, w.shape) for w in windows], shares, batch, seed)
