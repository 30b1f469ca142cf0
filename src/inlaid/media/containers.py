"""Detection of truncated video files, from the structure of their containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"pnot")
"""Possible types of the first box in an mp4 or mov file."""

SEGMENT = b"\x18\x53\x80\x67"


def cut_off(path: Path) -> str:
    """Return a message if the end of an mp4, mov, Matroska or WebM file is missing, else an empty string.

    The check compares the sizes that the file declares (ISO/IEC 14496-12; RFC 8794) with the size of the
    file, so it does not decode the file. The format is recognized from the content, not from the suffix.
    Files of other formats are not checked.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in BOXES:
            return _boxes(file, path.stat().st_size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _segment(file, path.stat().st_size)
    return ""


def _boxes(file: Any, end: int) -> str:
    file.seek(0)
    seen, at = [], 0
    while len(head := file.read(16)) >= 8:
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        size = int.from_bytes(head[8:], "big") if size == 1 else size or end - at
        at += size
        if size < 8 or at > end:
            index = "" if b"moov" in seen or kind == b"moov" else "its index (moov) is missing"
            return index or f"{at - end} bytes are missing at its end" if at > end else ""
        seen.append(kind)
        file.seek(at)
    return "" if b"moov" in seen else "its index (moov) is missing"


def _segment(file: Any, end: int) -> str:
    """Return a message if a Matroska file is shorter than its header declares, else an empty string.

    The header of a live recording declares no size. The result is then an empty string.
    """
    file.seek(4)
    header = _length(file)
    file.seek((header or 0) + file.tell())
    if file.read(4) != SEGMENT:
        return ""
    size = _length(file)
    missing = file.tell() + size - end if size is not None else 0
    return f"{missing} bytes are missing at its end" if missing > 0 else ""


def _length(file: Any) -> int | None:
    """Read an EBML length field (1 to 8 bytes).

    Returns None if the field is invalid, or if it states that the length is unknown.
    """
    first = file.read(1)
    if not first or not first[0]:
        return None
    extra = 8 - first[0].bit_length()
    rest = file.read(extra)
    value = int.from_bytes(bytes([first[0] & (0x7F >> extra)]) + rest, "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value
