"""Dataset layouts: find clips and captions in folders, manifests and prompt lists."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlaid import config
from inlaid.data import captions, rgba_clips, sequences
from inlaid.data.clips import Clip
from inlaid.data.manifests import MANIFESTS, OBJECTS, TABLES, read_rows
from inlaid.data.problems import KINDS, Problem
from inlaid.data.rgba_clips import KNOWN, Pairs
from inlaid.families.base import PrecomputedLayout
from inlaid.media import kinds, rgba_images
from inlaid.paths import OUTSIDE, Root, refuse_playlist
from inlaid.reading import FileError, read_text
from inlaid.text import printable

PREPARED = "prepared.jsonl"
"""Manifest that `inlaid prepare` writes beside clips that also have caption files."""

PROMPTS, VIDEOS = ("prompts.txt", "prompt.txt", "captions.txt"), ("videos.txt",)

# --- finding clips ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Clips and problems found in a data source. All files of the clips exist."""

    layout: str
    why: str
    """The reason for choosing this layout, for messages."""
    clips: list[Clip]
    problems: list[Problem]
    count: int
    """Number of clips found, including unusable clips."""


class _Scan:
    """Collector of the clips and problems of one data source."""

    def __init__(self, source: config.Source, index: int, root: Path, channels: int = 3) -> None:
        self.source, self.index, self.root, self.channels = source, index, Root(root), channels
        self.pairs = Pairs(root)
        self.clips: list[Clip] = []
        self.problems: list[Problem] = []
        self.count = 0

    def problem(self, code: str, name: str, message: str = "") -> None:
        name, message = printable(name, lines=False), printable(message, lines=False)
        self.problems.append(Problem(KINDS[code].severity, code, name, message, self.index))

    def file(self, text: str, where: str) -> Path | None:
        """Return the path of the clip or alpha matte named `text`, or record a problem and return None.

        `where` is the location of the name in the manifest, for messages.
        """
        label = text[:200]
        if printable(text.encode("utf-8", "replace").decode()) != printable(text):
            self.problem("unreadable", label, "the file name is not UTF-8, rename the file")
            return None
        try:
            path = self._there(self.root.named(text))
            if path is None:
                self.problem("missing", label, where)
                return None
            if path.is_file():
                if path.suffix.lower() not in (KNOWN if self.channels == 4 else kinds.KNOWN):
                    raise FileError(path, f"`{path.suffix}` files are not supported")
                refuse_playlist(path)
            self.guard_frames(path)
            return path
        except FileError as error:
            place = error.code in (OUTSIDE, "missing") and where
            self.problem(error.code, label, where if place else error.cause)
        except (OSError, ValueError):  # the path is too long
            self.problem("missing", label, where)
        return None

    def _there(self, path: Path) -> Path | None:
        """Return the path of the file or image sequence that `path` names, or None if there is none.

        The suffix of a file may be missing: `dog` finds `dog.mp4`.
        """
        if path.is_file() or rgba_images.frames_in(path):
            return path
        if path.is_dir() or path.exists():
            raise FileError(path, "is a folder without images" if path.is_dir() else "is not a regular file")
        named = self.pairs.named(path) if self.channels == 4 else []
        if not named and not path.suffix:
            named = [p for p in self.pairs.named(path) if p.stem == path.name]
            named = named if len(named) == 1 else []
        return self.root.guard(named[0]) if named else None

    def guard_frames(self, path: Path) -> None:
        """Check that a file, or each image of a sequence, is inside the root folder.

        Raises:
            FileError: if a file is outside of the root folder.
        """
        self.root.guard(path)
        for image in rgba_images.frames_in(path) if rgba_images.is_sequence(path) else ():
            self.root.guard(image)

    def matte(self, path: Path, text: str | None, where: str) -> tuple[Path | None, bool]:
        """Find the alpha matte of a clip, and record problems.

        `text` is the path of the matte in the manifest. If it is None, the matte is searched for beside the
        clip.

        Returns:
            The path of the matte (or None), and a bool that is False if a problem was recorded.
        """
        if text is not None:
            named = self.file(text.strip(), where)
            return named, named is not None
        found = self.pairs.matte(path)
        if len(found) > 1:
            names = " and ".join(f.name for f in found)
            self.problem(
                "pair", self.name(path), f"has several alpha mattes ({names}): keep one, or use a manifest"
            )
        try:
            for file in found:
                self.guard_frames(file)
        except FileError as error:
            self.problem(error.code, self.name(found[0]), where or error.cause)
            return None, False
        return (found[0] if found else None), len(found) < 2

    def name(self, path: Path) -> str:
        """Return a path relative to the root folder, for messages."""
        try:
            return path.relative_to(self.root.folder).as_posix()
        except ValueError:
            return path.name

    def caption(self, clip: Path) -> str | None:
        """Return the text of the caption file beside a clip, or None if there is no such file.

        Raises:
            FileError: if the caption file cannot be read or is outside of the root folder.
        """
        beside = sequences.caption_file(self.root, clip)
        return captions.read_caption(self.root.guard(beside)) if beside else None

    def add(
        self, text: str, caption: Any, group: Any = None, *, where: str = "", matte: str | None = None
    ) -> None:
        """Add a clip with its caption and alpha matte, and record problems.

        Args:
            text: path of the clip, relative to the root folder.
            caption: caption of the clip.
            group: name under which the tables of an evaluation group the clip.
            where: location of the clip in the manifest, for messages.
            matte: path of the alpha matte, relative to the root folder.
        """
        self.count += 1
        text = text.strip() if where else text
        path, alpha, well = self.file(text, where), None, True
        if path and self.channels == 4:
            alpha, well = self.matte(path, matte, where)
        elif path and matte is not None:
            self.problem("matte", matte.strip(), where)
        if path and well:
            name = self.name(path)
            wrong = captions.caption_problem(caption)
            if wrong:
                self.problem(wrong[0], name, ": ".join(filter(None, (where, wrong[1]))))
            words = captions.clean(caption) if isinstance(caption, str) and not wrong else ""
            group = None if group is None else str(group)
            kind = rgba_clips.rgba_kind(path)
            self.clips.append(Clip(path, name, words, self.index, group, kind, matte=alpha))


def find_clips(source: config.Source, index: int, patterns: PrecomputedLayout | None, channels: int) -> Found:
    """Find the clips of a data source in any supported layout. Problems are returned, not raised.

    Args:
        source: entry of the recipe's `data.sources`.
        index: index of the source in `data.sources`.
        patterns: file layout in which the model family expects precomputed latents, or None.
        channels: 4 if the run trains on alpha, else 3.
    """
    path = Path(source.path).expanduser()
    root = Path(source.root).expanduser() if source.root else path if path.is_dir() else path.parent
    scan = _Scan(source, index, root, channels)
    layout, why = source.layout, "as configured"
    try:
        if not path.exists():
            raise ValueError("no such file or folder")
        layout, why, target = _detect(path, source, patterns, scan)
        if source.root and layout in ("folder", "precomputed"):
            raise ValueError("`root` is only for manifests: remove it")
        if source.root and not root.is_dir():
            raise ValueError(f"`root` {root} is not a folder")
        if layout == "precomputed":
            assert patterns
            _precomputed(target, scan, patterns)
        elif layout in ("folder", "lines"):
            {"folder": _folder, "lines": _lines}[layout](target, scan)
        else:
            _manifest(target, scan)
        for skipped, error in scan.root.skipped.items() if layout in ("folder", "precomputed") else ():
            scan.count += error.code != "run"
            scan.problem(error.code, scan.name(skipped), error.cause)
        if not scan.count:
            raise ValueError(f"contains no clips ({why})")
    except (ValueError, OSError, RecursionError, MemoryError) as error:
        cause = error.cause if isinstance(error, FileError) else str(error) or type(error).__name__
        scan.problem("layout", source.path, cause)
    return Found(layout, why, scan.clips, scan.problems, scan.count)


def _detect(
    path: Path, source: config.Source, patterns: PrecomputedLayout | None, scan: _Scan
) -> tuple[str, str, Path]:
    """Detect the layout of a data source.

    Returns:
        The layout, the reason for it, and the file or folder to read.

    Raises:
        ValueError: if no layout or more than one layout matches.
    """
    wanted = source.layout
    if path.is_file():
        suffix = path.suffix.lower()
        found = "csv" if suffix in TABLES else "jsonl" if suffix in OBJECTS else None
        if found is None:
            raise ValueError(f"is neither a folder nor a manifest ({', '.join(MANIFESTS)})")
        if wanted not in ("auto", found):
            raise ValueError(f"is {found}, but `layout` is {wanted}")
        return found, f"a {suffix} manifest", path
    if not path.is_dir():
        raise ValueError("is neither a folder nor a regular file")
    tree = scan.root if scan.root.folder == path else Root(path)
    files = sequences.find_entries(tree, scan.channels)
    captioned = {f for f in files if sequences.caption_file(tree, f)}
    if scan.channels == 4:
        pairs = Pairs(path)
        files = [f for f in files if f in captioned or not pairs.color(f)]
    stems = {f.with_suffix("") for f in files}
    options: list[tuple[str, str, Path]] = []
    partly = False
    if patterns and wanted in ("auto", "precomputed"):
        names = {n for part in (patterns.media[0], patterns.text) for n in _matching(tree, part)}
        videos = {*_matching(tree, patterns.video, kinds.KNOWN)}
        option = ("precomputed", f"{len(names)} clips of precomputed latents, {patterns.description}", path)
        if names and names >= videos:
            return option  # the latents were computed from the videos in the folder
        if names:
            options.append(option)
            partly = bool(videos - names)
    lines = _line_files(path, source)
    if lines:
        options.append(("lines", " and ".join(f.name for f in lines), path))
    manifests = (f for f in path.iterdir() if f.suffix.lower() in MANIFESTS and not f.name.startswith("."))
    for file in sorted(f for f in manifests if f.is_file() and f.with_suffix("") not in stems):
        options.append(("csv" if file.suffix.lower() in TABLES else "jsonl", file.name, tree.guard(file)))
    beside = len(captioned.intersection(files))
    if beside or (files and (not options or partly)) or wanted == "folder":
        options.append(("folder", f"{len(files)} clips, {beside} with a .txt beside", path))
    options = [o for o in options if wanted in ("auto", o[0])]
    if len(options) > 1:
        options = [o for o in options if o[2].name != PREPARED]
    if not options:
        raise ValueError(_nothing(tree, wanted, patterns))
    if len(options) > 1:
        held = "; ".join(o[1] for o in options)
        raise ValueError(f"is ambiguous: it contains {held}. Set `path` to the manifest, or set `layout`")
    return options[0]


def _nothing(tree: Root, wanted: str, patterns: PrecomputedLayout | None) -> str:
    """Return the error message for a folder in which no supported layout was found."""
    reads = f"this model reads {patterns.description}" if patterns else "this model does not read any"
    needs = {
        "lines": "prompts.txt and videos.txt; set `caption_column` and `video_column` for other file names",
        "csv": ".csv",
        "jsonl": ".jsonl or .json",
        "precomputed": f"precomputed latents; {reads}",
    }
    tensors = len(_files(tree, (".pt",)))
    aside = f"; it contains {tensors} .pt files, but {reads}" if tensors else ""
    readable = " ".join(kinds.KNOWN)
    return f"contains no {needs.get(wanted) or f'clips ({readable}){aside}'}"


def _line_files(folder: Path, source: config.Source) -> tuple[Path, Path] | None:
    """Return the file that lists captions and the file that lists clips, or None if either is missing.

    Raises:
        ValueError: if the recipe sets `layout: lines` and there are several candidates for one of the files.
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


def _matching(tree: Root, pattern: str, suffixes: tuple[str, ...] = ("",)) -> dict[str, Path]:
    """Return the files that match a pattern such as `latents/*.pt`, keyed by the text that `*` matches."""
    head, tail = pattern.split("*")
    ends, top = tuple(tail + s for s in suffixes), tree.folder / head
    found = {f.relative_to(top).as_posix(): f for f in _files(tree, ends, top)}
    return {n[: -max(len(e) for e in ends if n.lower().endswith(e))]: f for n, f in found.items()}


def _precomputed(folder: Path, scan: _Scan, patterns: PrecomputedLayout) -> None:
    """Collect clips with precomputed latents and text embeddings, without reading the tensors.

    Files of the same clip have the same name.
    """
    parts = [_matching(scan.root, part) for part in (*patterns.media, patterns.text)]
    texts = _matching(scan.root, patterns.caption)
    for name in sorted({*parts[0], *parts[-1]}):
        scan.count += 1
        there = [part[name] for part in parts if name in part]
        label = there[0].relative_to(folder).as_posix()
        wanted = [p.replace("*", name) for p in (*patterns.media, patterns.text)]
        missing = [w for w, part in zip(wanted, parts, strict=True) if name not in part]
        if missing:
            scan.problem(
                "half", label, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            )
            continue
        try:
            for file in there:
                scan.root.guard(file)
            text = captions.read_caption(scan.root.guard(texts[name])) if name in texts else ""
        except FileError as error:
            scan.problem(error.code, label, error.cause)
            continue
        text = captions.clean(text) if not captions.caption_problem(text) else ""
        clip = Clip(there[0], label, text, scan.index, None, "precomputed", tuple(there[:-1]), there[-1])
        scan.clips.append(clip)


def _files(tree: Root, suffixes: tuple[str, ...], top: Path | None = None) -> list[Path]:
    return [here / n for here, _, names in tree.walk(top) for n in names if n.lower().endswith(suffixes)]


def _plain(path: Path) -> Path:
    """Return a path without suffix and with its name in normalized Unicode (NFC), for comparison."""
    return path.with_name(unicodedata.normalize("NFC", path.stem))


def _folder(folder: Path, scan: _Scan) -> None:
    clips = sequences.find_entries(scan.root, scan.channels)
    _unsupported(clips, scan)
    for file in clips:
        name = file.relative_to(folder).as_posix()
        if scan.pairs.color(file) and not sequences.caption_file(scan.root, file):
            if scan.channels != 4:
                scan.count += 1
                scan.problem("matte", name)
            continue
        try:
            scan.add(name, scan.caption(file))
        except FileError as error:
            beside = sequences.caption_file(scan.root, file)
            scan.count += 1
            if error.code == OUTSIDE and beside:
                scan.problem(OUTSIDE, beside.relative_to(folder).as_posix(), error.cause)
            else:
                scan.problem("no-caption", name, f"{beside.name if beside else name} {error.cause}")


def _unsupported(clips: list[Path], scan: _Scan) -> None:
    """Record problems for files and folders that look like clips but are not supported.

    These are captioned files of unsupported type, such as .swf, and folders with names such as `dog.mp4`.
    Without this check, they would be skipped silently.
    """
    known = KNOWN if scan.channels == 4 else kinds.KNOWN
    stems = {_plain(place) for c in clips for place in rgba_clips.captions(c)}
    for here, folders, names in scan.root.walk():
        for name in folders:
            if name.lower().endswith(known) and here / name not in clips:
                scan.count += 1
                scan.problem("unreadable", scan.name(here / name), "is a folder, not a file")
        captioned = {_plain(here / n) for n in names if n.lower().endswith(".txt")} - stems
        for name in names if captioned else ():
            suffix = Path(name).suffix.lower()
            if _plain(here / name) in captioned and suffix not in (".txt", ".md", *MANIFESTS):
                scan.count += 1
                scan.problem("unreadable", scan.name(here / name), f"`{suffix}` files are not supported")


def _lines(folder: Path, scan: _Scan) -> None:
    files = _line_files(folder, scan.source)
    assert files
    texts = [read_text(scan.root.guard(f)) for f in files]
    prompts, videos = (list(enumerate(t.rstrip().split("\n"), 1)) for t in texts)
    if len(prompts) != len(videos):  # the files may differ only in blank lines
        prompts, videos = ([line for line in part if line[1].strip()] for part in (prompts, videos))
    if len(prompts) != len(videos):
        message = " and ".join(
            f"{f.name} has {len(n)} lines" for f, n in zip(files, (prompts, videos), strict=True)
        )
        raise ValueError(message)
    for (_, prompt), (number, video) in zip(prompts, videos, strict=True):
        if video.strip():
            scan.add(video, prompt, where=f"line {number}")
        elif prompt.strip():
            scan.count += 1
            scan.problem("row", f"line {number}", f"{files[1].name} has an empty line")


def _manifest(path: Path, scan: _Scan) -> None:
    """Add the clips of a manifest to `scan`."""
    columns, rows = read_rows(path, scan.source, scan.channels == 4)
    for row in rows:
        video = row.values.get(columns.video)
        problem = row.problem
        if not problem and (not isinstance(video, str) or not video.strip()):
            problem = f"`{columns.video}` is not a file name"
        if problem:
            scan.count += 1
            scan.problem("row", row.where, problem)
            continue
        group, alpha = (row.values.get(c) if c else None for c in (columns.group, columns.alpha))
        if columns.alpha and not (isinstance(alpha, str) and alpha.strip()):
            alpha = None  # the clip of this row may have an alpha channel
        scan.add(str(video), row.values.get(columns.caption), group, where=row.where, matte=alpha)
