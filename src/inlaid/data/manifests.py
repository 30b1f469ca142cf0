"""Manifests: files that list clips and captions, as tables (.csv, .tsv) or JSON objects (.jsonl, .json)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlaid import config
from inlaid.reading import FileError, parse_json, read_text

VIDEO_COLUMNS = (
    *("video", "file_name", "file", "path", "image", "frames_path"),
    *("video_path", "filename", "file_path", "image_path"),
)

COLOR_COLUMNS = ("video_rgb", "video_fgr", "rgb", "fgr")

ALPHA_COLUMNS = ("video_alpha", "video_pha", "alpha", "pha", "matte")

CAPTION_COLUMNS = ("caption", "prompt", "text")

TABLES, OBJECTS = (".csv", ".tsv"), (".jsonl", ".json")

MANIFESTS = (*TABLES, *OBJECTS)

DELIMITERS = (",", ";", "\t", "|")

FIELD = 131_072
"""Maximum number of characters of a table field. A longer field nearly always lacks a closing quote."""


@dataclass(frozen=True)
class Row:
    """Row of a manifest: its location in the file, and its values by column.

    If the row cannot be used, `problem` is the reason.
    """

    where: str
    values: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Columns:
    """Names of the manifest columns for the clip's path, caption, group and alpha matte.

    `group` and `alpha` are None if the manifest has no such column.
    """

    video: str
    caption: str
    group: str | None
    alpha: str | None


def read_rows(path: Path, source: config.Source, transparent: bool) -> tuple[Columns, Iterator[Row]]:
    """Return the columns of a manifest, and its rows.

    Args:
        path: the manifest.
        source: entry of the recipe's `data.sources`; it can set the names of columns.
        transparent: also look for the columns of color files and alpha mattes.

    Raises:
        ValueError: if the manifest cannot be read or lacks a required column.
    """
    try:
        text = read_text(path)
    except FileError as error:
        raise ValueError(f"{path.name} {error.cause}") from None
    if path.suffix.lower() in TABLES:
        return _table(path, text, source, transparent)
    rows = _whole(path, text) if path.suffix.lower() == ".json" else _lines(path, text)
    if not rows:
        raise ValueError(f"{path.name} is empty")
    there = list(dict.fromkeys(k for row in rows for k in row.values))
    return _columns(there, source, transparent), iter(rows)


# --- tables -------------------------------------------------------------------------------------------------


def _table(path: Path, text: str, source: config.Source, transparent: bool) -> tuple[Columns, Iterator[Row]]:
    delimiter = _delimiter(text, source, transparent)
    rows = _cells(path, text, delimiter)
    header = next((found for _, cells in rows if any(found := [c.strip() for c in cells])), [])
    if not any(header):
        raise ValueError(f"{path.name} is empty")
    twice = next((c for i, c in enumerate(header) if c and c in header[:i]), None)
    if twice:
        raise ValueError(f"{path.name} has two columns `{twice}`: rename one")
    columns = _columns(header, source, transparent)

    def read() -> Iterator[Row]:
        for number, cells in rows:
            where = f"line {number}"
            if len(cells) > len(header):
                many = f"{len(cells)} cells for {len(header)} columns: quote texts that contain "
                yield Row(where, {}, many + {",": "commas", "\t": "tabs"}.get(delimiter, f"`{delimiter}`"))
            elif any(c.strip() for c in cells):
                yield Row(where, dict(zip(header, cells, strict=False)))

    return columns, read()


def _cells(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """For each table row, yield the number of its last line and its cells.

    Raises:
        ValueError: if the text is not valid CSV, or a field is too long.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    csv.field_size_limit(FIELD)
    start = 1
    try:
        for cells in reader:
            yield reader.line_num, cells
            start = reader.line_num + 1
    except csv.Error as error:
        if "field larger" in str(error):
            long = f"a field of more than {FIELD:,} characters starts in line {start}"
            raise ValueError(
                f"{path.name}: {long}: look for an unclosed quote, or shorten the text"
            ) from None
        cure = "look for an unclosed quote"
        raise ValueError(f"{path.name} is not valid CSV ({error}): {cure} from line {start} on") from None


def _delimiter(text: str, source: config.Source, transparent: bool) -> str:
    """Return the delimiter that splits the header into the most known column names.

    If no name is known, return the delimiter that gives the most cells. In a tie, the comma has priority.
    """
    first = text.lstrip("\n").partition("\n")[0][:FIELD]

    def known(delimiter: str) -> tuple[int, int]:
        try:
            cells = [c.strip() for c in next(csv.reader([first], delimiter=delimiter), [])]
        except csv.Error:
            return 0, 0
        wanted = [_find(n, d, cells) for n, d in _wanted(source, transparent).values()]
        return sum(w is not None for w in wanted), len(cells) if not any(wanted) else 0

    return max(DELIMITERS, key=known)


# --- objects ------------------------------------------------------------------------------------------------


def _lines(path: Path, text: str) -> list[Row]:
    """Return the rows of a `.jsonl` file, which has one JSON object per line."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        value = _json(path, line, number)
        if not isinstance(value, dict):
            raise ValueError(f"{path.name}, line {number}: expected an object with a path and a caption")
        rows.append(Row(f"line {number}", value))
    return rows


def _whole(path: Path, text: str) -> list[Row]:
    """Return the rows of a `.json` file, which contains a list of objects or a single object.

    A single object maps the path of each clip to its caption, or to an object with the caption.
    """
    if not text.strip():
        return []
    value = _json(path, text)
    if isinstance(value, dict):
        # A single row, such as {"video": "a.mp4"}, or lists, such as {"videos": [...]}, are mistakes.
        lower = {k.strip().lower() for k in value}
        if lower & {*VIDEO_COLUMNS, *CAPTION_COLUMNS, *COLOR_COLUMNS} or any(
            not isinstance(v, (str, dict)) for v in value.values()
        ):
            raise ValueError(f"{path.name}, entry 1: expected an object with a path and a caption, in a list")
        objects = [
            {VIDEO_COLUMNS[0]: k, **(v if isinstance(v, dict) else {CAPTION_COLUMNS[0]: v})}
            for k, v in value.items()
        ]
        return [Row(f"entry {i}", o) for i, o in enumerate(objects, 1)]
    if not isinstance(value, list):
        raise ValueError(f"{path.name}, line 1: not a JSON list of objects")
    wrong = next((i for i, v in enumerate(value, 1) if not isinstance(v, dict)), None)
    if wrong:
        raise ValueError(f"{path.name}, entry {wrong}: expected an object with a path and a caption")
    return [Row(f"entry {i}", v) for i, v in enumerate(value, 1)]


def _json(path: Path, text: str, line: int | None = None) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        at = line or error.lineno
        raise ValueError(
            f"{path.name}, line {at}: not valid JSON (column {error.colno}: {error.msg})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path.name}{f', line {line}' if line else ''}: {error}") from None


# --- columns ------------------------------------------------------------------------------------------------


def _wanted(source: config.Source, transparent: bool) -> dict[str, tuple[str | None, Sequence[str]]]:
    """Return the column names to look for, by recipe key: the name in the recipe, and the default names."""
    return {
        "video_column": (source.video_column, VIDEO_COLUMNS + COLOR_COLUMNS * transparent),
        "caption_column": (source.caption_column, CAPTION_COLUMNS),
        "group_column": (source.group_column, ()),
        "alpha_column": (source.alpha_column, ALPHA_COLUMNS * transparent),
    }


def _find(named: str | None, defaults: Sequence[str], there: Sequence[str]) -> str | None:
    """Return the name of a column in a manifest, or None if the manifest has no such column.

    An exact match has priority. Otherwise, case is ignored and a space equals an underscore: `Video Path`
    matches `video_path`.

    Args:
        named: name of the column in the recipe; None if the recipe does not set it.
        defaults: names to look for if `named` is None, in order of priority.
        there: columns of the manifest.
    """
    wanted = [named] if named else defaults
    plain = {c.strip().lower().replace(" ", "_"): c for c in reversed(there)}
    exact = next((c for c in wanted if c in there), None)
    return exact or next(
        (plain[p] for c in wanted if (p := c.strip().lower().replace(" ", "_")) in plain), None
    )


def _columns(there: list[str], source: config.Source, transparent: bool) -> Columns:
    """Find the columns of a manifest, and return their names.

    Raises:
        ValueError: if a required column is missing; the message lists the existing columns.
    """
    out: list[Any] = []
    for key, (named, defaults) in _wanted(source, transparent).items():
        found = _find(named, defaults, there)
        if found is None and (named or (defaults and key != "alpha_column")):
            want = f"no column `{named}`" if named else f"none of the columns {', '.join(defaults)}"
            listed = ", ".join(there[:20])[:1000]
            raise ValueError(f"has {want}; its columns are {listed}: set `{key}`")
        out.append(found)
    return Columns(*out)
