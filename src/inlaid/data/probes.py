"""Properties of media files, read from the files or from a cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from inlaid.data import rgba_clips, sequences
from inlaid.data.rgba_clips import ClipInspection
from inlaid.files import atomic, sha256
from inlaid.media import kinds, video
from inlaid.media.kinds import Probe
from inlaid.media.rgba import AlphaStats
from inlaid.media.rgba_images import is_sequence


class Probes:
    """Reader of the properties of media files. Results are not cached."""

    def probe(self, path: Path) -> Probe:
        """Return the properties of a clip, for a run that trains without alpha.

        Raises:
            MediaError: if the file cannot be used.
        """
        return sequences.probe_sequence(path) if is_sequence(path) else video.probe(path)

    def content(self, path: Path) -> str:
        """Return the SHA-256 of a file's content."""
        return sha256(path)

    def inspect(self, color: Path, alpha: Path | None = None) -> ClipInspection:
        """Return the properties and alpha statistics of an RGBA clip; its alpha may be in a separate file.

        Raises:
            MediaError: if the clip cannot be used.
        """
        return rgba_clips.inspect_clip(color, alpha)


class CachedProbes(Probes):
    """Reader of file properties and content hashes that caches results.

    A cached result is used until one of the clip's files changes. Resuming a run therefore opens no video.
    """

    def __init__(self, folder: Path) -> None:
        names = ("probes", "alphas", "hashes")
        self._probes, self._alphas, self._hashes = (read_memo(folder / f"{name}.json") for name in names)
        self._folder = folder

    def probe(self, path: Path) -> Probe:
        """Return the result of `Probes.probe`, from the cache if the files are unchanged."""
        if is_sequence(path):
            key = f"{kinds.READER}|{path.resolve()}|{_together(rgba_clips.files(path))}"
        elif path.is_file():
            key = f"{kinds.READER}|{file_state(path)}"
        else:
            return super().probe(path)
        return self._known(key) or self._add(key, super().probe(path))

    def inspect(self, color: Path, alpha: Path | None = None) -> ClipInspection:
        """Return the result of `Probes.inspect`, from the cache if all files of the clip are unchanged."""
        files = [f for part in (color, alpha) if part for f in rgba_clips.files(part)]
        if not files or not all(f.is_file() for f in files):
            return super().inspect(color, alpha)
        key = f"{rgba_clips.READER}|{kinds.READER}|{color.resolve()}|{_together(files)}"
        known = self._known(key)
        try:
            if known:
                return ClipInspection(known, AlphaStats(**self._alphas[key]))
        except (LookupError, TypeError):
            pass
        found = super().inspect(color, alpha)
        self._alphas[key] = asdict(found.alpha)
        self._add(key, found.probe)
        return found

    def content(self, path: Path) -> str:
        """Return the SHA-256 of a file's content, from the cache if the file is unchanged."""
        key = file_state(path)
        if key not in self._hashes:
            self._hashes[key] = super().content(path)
        return self._hashes[key]

    def save(self) -> None:
        """Write the cached results to the cache folder."""
        write_memo(self._folder / "probes.json", self._probes)
        for name, memo in (("alphas", self._alphas), ("hashes", self._hashes)):
            if memo:
                write_memo(self._folder / f"{name}.json", memo)

    def _known(self, key: str) -> Probe | None:
        try:
            known: dict[str, Any] = dict(self._probes[key])
            known["fps"] = known["fps"] and Fraction(known["fps"])
            return Probe(**known)
        except (LookupError, TypeError, ValueError):
            return None

    def _add(self, key: str, found: Probe) -> Probe:
        self._probes[key] = asdict(found) | {"fps": found.fps and str(found.fps)}
        return found


# --- memoized values ----------------------------------------------------------------------------------------


def file_state(path: Path) -> str:
    """Return a string that changes when a file is replaced or modified.

    It contains the path, size, inode number, modification time (mtime) and inode change time (ctime). Because
    of ctime, it also changes if a program restores the modification time.
    """
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}|{stat.st_ctime_ns}"


def _together(files: Sequence[Path]) -> str:
    """Return a hash that changes when one of several files is replaced or modified."""
    return hashlib.sha256("\n".join(map(file_state, files)).encode("utf-8", "replace")).hexdigest()


def read_memo(path: Path) -> dict[str, Any]:
    """Read cached values from a JSON file.

    A missing or damaged file gives an empty dict, because the values can be computed again.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError):
        found = None
    return found if isinstance(found, dict) else {}


def write_memo(path: Path, memo: Mapping[str, Any]) -> None:
    """Write cached values as JSON, atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(memo), "utf-8")
