"""Dataset layouts: find clips and captions in folders, manifests and prompt lists."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from inlaid import config
from inlaid.data import rgba_clips
from inlaid.data.clips import Clip
from inlaid.data.problems import KINDS, Problem
from inlaid.data.rgba_clips import KNOWN, Pairs
from inlaid.families.base import PrecomputedLayout
from inlaid.media import kinds, rgba_images

VIDEO_COLUMNS = ("video", "file_name", "file", "path", "image", "frames_path")

COLOR_COLUMNS = ("video_rgb", "video_fgr", "rgb", "fgr")

ALPHA_COLUMNS = ("video_alpha", "video_pha", "alpha", "pha", "matte")

CAPTION_COLUMNS = ("caption", "prompt", "text")

MANIFESTS = (".csv", ".jsonl", ".json")

PROMPTS, VIDEOS = ("prompts.txt", "prompt.txt", "captions.txt"), ("videos.txt",)

# --- finding clips ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Contents of a source: clips whose files exist, and problems."""

    layout: str
    why: str
    """Reason why this layout was chosen."""
    clips: list[Clip]
    problems: list[Problem]
    count: int
    """Number of clips found, usable or not."""


class _Scan:
    """Collector of the clips and problems of one source."""

    def __init__(self, source: config.Source, index: int, root: Path, channels: int = 3) -> None:
        self.source, self.index, self.root, self.channels = source, index, root, channels
        self.pairs = Pairs(root)
        self.clips: list[Clip] = []
        self.problems: list[Problem] = []
        self.count = 0

    def problem(self, code: str, name: str, message: str = "") -> None:
        self.problems.append(Problem(KINDS[code].severity, code, name, message, self.index))

    def file(self, text: str, where: str) -> Path | None:
        """Return the path of `text`, relative to the root, or record a problem and return None."""
        path = self.root / Path(os.path.normpath(text)).as_posix()
        transparent = self.channels == 4
        try:
            inside, there = _inside(path, self.root), path.is_file()
            if transparent and not there:
                there = bool(rgba_images.frames_in(path))
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
        elif path.is_file() and path.suffix.lower() not in (KNOWN if transparent else kinds.KNOWN):
            self.problem("unreadable", text, f"`{path.suffix}` files are not supported")
        else:
            return path
        return None

    def matte(self, path: Path, text: str | None, where: str) -> tuple[Path | None, bool]:
        """Return the alpha matte of a clip, or None, and True if there is no problem.

        The matte is the file named by `text`; if `text` is None, it is searched for beside the clip.
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
        """Add the clip at `text`, relative to the root, with its alpha matte; record problems.

        `where` is the clip's location in the manifest, for messages; `matte` is the path of the alpha matte.
        """
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
                excerpt = _legible(caption)[:40]
                self.problem("no-caption", name, f"{where}: invalid Unicode in `{excerpt}`")
                caption = ""
            text = " ".join(caption.split()) if isinstance(caption, str) else ""
            group = None if group is None else str(group)
            self.clips.append(
                Clip(path, name, text, self.index, group, rgba_clips.rgba_kind(path), matte=alpha)
            )


def _inside(path: Path, root: Path) -> bool:
    """Return True if the path is under the root after resolving links.

    Circular links raise no error, unlike in `Path.resolve`.
    """
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _legible(text: str) -> str:
    """Replace invalid Unicode, which file names and JSON can contain, so that the text can be printed."""
    return text.encode("utf-8", "replace").decode()


def find_clips(source: config.Source, index: int, patterns: PrecomputedLayout | None, channels: int) -> Found:
    """Find the clips of a source in any layout; problems are returned, not raised.

    Args:
        source: entry of `data.sources`.
        index: index of the source.
        patterns: layout of precomputed latents that the family reads, or None.
        channels: 4 if the run is transparent, else 3.
    """
    path = Path(source.path).expanduser()
    root = Path(source.root).expanduser() if source.root else path if path.is_dir() else path.parent
    scan = _Scan(source, index, root, channels)
    layout, why = source.layout, "as configured"
    try:
        if not path.exists():
            raise ValueError("no such file or folder")
        layout, why, target = _detect(path, source, patterns, channels)
        if source.root and layout in ("folder", "precomputed"):
            raise ValueError("`root` is only for manifests: remove it")
        if source.root and not root.is_dir():
            raise ValueError(f"`root` {root} is not a folder")
        if layout == "precomputed":
            assert patterns
            _precomputed(target, scan, patterns)
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
    path: Path, source: config.Source, patterns: PrecomputedLayout | None, channels: int
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
        pairs = Pairs(path)
        files = [f for f in rgba_clips.entries(path) if _caption_file(f).is_file() or not pairs.color(f)]
    stems = {f.with_suffix("") for f in files}
    options: list[tuple[str, str, Path]] = []
    if patterns and wanted in ("auto", "precomputed"):
        names = {n for part in (patterns.media[0], patterns.text) for n in _matching(path, part)}
        option = ("precomputed", f"{len(names)} clips of precomputed latents, {patterns.description}", path)
        if names and names >= {*_matching(path, patterns.video, kinds.KNOWN)}:
            return option  # the latents were computed from the videos in the folder
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


def _nothing(path: Path, wanted: str, patterns: PrecomputedLayout | None) -> str:
    """Return the error message for a folder that has no known layout."""
    reads = f"this model reads {patterns.description}" if patterns else "this model does not read any"
    needs = {
        "lines": "prompts.txt and videos.txt; set `caption_column` and `video_column` for other file names",
        "csv": ".csv",
        "jsonl": ".jsonl or .json",
        "precomputed": f"precomputed latents; {reads}",
    }
    tensors = len(_files(path, (".pt",)))
    aside = f"; it contains {tensors} .pt files, but {reads}" if tensors else ""
    readable = " ".join(kinds.KNOWN)
    return f"contains no {needs.get(wanted) or f'clips ({readable}){aside}'}"


def _line_files(folder: Path, source: config.Source) -> tuple[Path, Path] | None:
    """Return the file with captions and the file with paths, or None unless both exist.

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
    """Return the files that match a pattern such as `latents/*.pt`, keyed by the text that `*` matches."""
    head, tail = pattern.split("*")
    ends = tuple(tail + s for s in suffixes)
    found = {f.relative_to(folder / head).as_posix(): f for f in _files(folder / head, ends)}
    return {n[: -max(len(e) for e in ends if n.lower().endswith(e))]: f for n, f in found.items()}


def _precomputed(folder: Path, scan: _Scan, patterns: PrecomputedLayout) -> None:
    """Collect precomputed latents; `precomputed.inspect_item` later inspects the content of the files."""
    parts = [_matching(folder, part) for part in (*patterns.media, patterns.text)]
    captions = _matching(folder, patterns.caption)
    for name in sorted({*parts[0], *parts[-1]}):
        scan.count += 1
        there = [part[name] for part in parts if name in part]
        label = there[0].relative_to(folder).as_posix()
        wanted = [p.replace("*", name) for p in (*patterns.media, patterns.text)]
        missing = [w for w, part in zip(wanted, parts, strict=True) if name not in part]
        outside = [f for f in there if not _inside(f, scan.root)]
        if missing:
            scan.problem(
                "half", label, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            )
        elif outside:
            scan.problem("outside", label)
        else:
            beside = captions.get(name)
            text = beside.read_text("utf-8-sig", "replace") if beside and _inside(beside, scan.root) else ""
            text = " ".join(text.split())
            scan.clips.append(
                Clip(there[0], label, text, scan.index, None, "precomputed", tuple(there[:-1]), there[-1])
            )


def _files(folder: Path, suffixes: tuple[str, ...] = kinds.KNOWN) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        visible = (f for f in sorted(files) if not f.startswith("."))
        found += [Path(parent, f) for f in visible if f.lower().endswith(suffixes)]
    return found


def _caption_file(clip: Path) -> Path:
    """Return the path of a clip's caption file, which may not exist."""
    places = rgba_clips.captions(clip)
    return next((p for p in places if p.is_file()), places[0])


def _folder(folder: Path, scan: _Scan) -> None:
    clips = rgba_clips.entries(folder) if scan.channels == 4 else _files(folder)
    stems = {place.with_suffix("") for c in clips for place in rgba_clips.captions(c)}
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
    """Return the names of the columns for path, caption, group and alpha matte; the last two may be None.

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
