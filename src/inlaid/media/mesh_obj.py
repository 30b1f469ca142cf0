"""Rewriting of Wavefront .obj files, so that trimesh reads all objects, groups and material files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from inlaid.reading import FileError
from inlaid.text import decode_text

MATERIALS = "inlaid:materials"
"""Virtual file name of all material files, joined into one."""


class Obj:
    """Text of an .obj file, rewritten so that trimesh reads it completely.

    trimesh supports objects or groups, but not both. It resolves relative indices against the end of the
    file, and reads only one material file. In the rewritten text, each combination of object and group is a
    numbered object. All indices are absolute, and the only material file is `MATERIALS`.
    """

    def __init__(self, content: bytes) -> None:
        self.libraries: list[str] = []
        self.names: dict[str, str] = {}
        """Names of objects and groups, by ID."""
        self._pairs: dict[tuple[str | None, str | None], int] = {}
        self._lines: list[str] = []
        counts = {"v": 0, "vt": 0, "vn": 0}
        thing: str | None = None
        group: str | None = None
        text = re.sub(r"\\\r?\n", " ", decode_text(content))
        for line in text.splitlines():
            key, rest = (*line.split(None, 1), "", "")[:2]
            if key in counts:
                counts[key] += 1
                self._lines.append(f"{key} {rest}")
            elif key == "f":
                self._lines.append(f"f {_absolute(rest, counts) if '-' in rest else rest}")
            elif key == "usemtl":
                self._lines.append(f"usemtl {rest.strip()}")
            elif key == "mtllib":
                self.libraries.append(rest.strip())
            elif key in ("o", "g"):
                thing, group = (rest.strip(), None) if key == "o" else (thing, rest.strip())
                number = self._pairs.setdefault((thing, group), len(self._pairs))
                self._lines.append(f"o {number}")

    def stream(self) -> io.BytesIO:
        """Return the rewritten .obj text as a file in memory."""
        start = [f"mtllib {MATERIALS}"] if self.libraries else []
        return io.BytesIO("\n".join([*start, *self._lines, ""]).encode())

    def materials(self, read: Callable[[str], bytes]) -> bytes:
        """Return the joined contents of all material files.

        A file is left out if `read` raises `FileError` for it.
        """
        out = []
        for line in self.libraries:
            try:
                out.append(read(line))
            except FileError:  # reported by `read`; a line may name several files
                for name in line.split() if " " in line else ():
                    try:
                        out.append(read(name))
                    except FileError:
                        continue
        return b"\n".join(out)

    def path_of(self, geometry: str) -> list[str]:
        """Return the IDs of the object and the group that contain a trimesh geometry.

        The result is `["file"]` if the geometry is in neither.
        """
        number = re.match(r"\d+", geometry)
        pairs = {i: pair for pair, i in self._pairs.items()}
        thing, group = pairs.get(int(number[0]), (None, None)) if number else (None, None)
        path = []
        for kind, name in (("o", thing), ("g", group)):
            if name is not None:
                path.append(f"{''.join(path)} {kind} {name}")
                self.names[path[-1]] = name
        return path or ["file"]


def _absolute(rest: str, counts: dict[str, int]) -> str:
    """Replace relative (negative) indices in a face by absolute indices."""

    def index(text: str, count: int) -> str:
        return str(count + int(text) + 1) if text.startswith("-") else text

    kinds = ("v", "vt", "vn")
    return " ".join(
        "/".join(index(part, counts[kind]) for part, kind in zip(corner.split("/"), kinds, strict=False))
        for corner in rest.split()
    )
