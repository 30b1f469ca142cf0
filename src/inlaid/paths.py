"""Paths that a data set names: the one guard that decides whether they may be read, and how they are found.

A data set may come from somebody else. Whatever names a path in it (a manifest, a prompt list, a file name
beside a clip, a symbolic link, a mesh that refers to a buffer) goes through `Root.guard`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from inlaid.reading import FileError, cause_of

OUTSIDE = "outside"
"""Problem code of a path that leads out of its data set."""

PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0\r\n", b"v=0\n", b"[playlist]", b"<?xml", b"<MPD")
"""First bytes of files that name other files, which FFmpeg would open under any suffix."""


class Root:
    """Root folder of a data set, and the guard of the paths in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = os.path.realpath(folder)
        self._listed: dict[Path, dict[str, str]] = {}
        self._parents: dict[str, bool] = {}
        self.skipped: dict[Path, FileError] = {}
        """Folders that `walk` did not enter, with the reason."""

    def guard(self, path: Path) -> Path:
        """Return `path` if it may be read: inside the root after all symbolic links are resolved.

        Raises:
            FileError: if it is outside (code `outside`); the message names the path and what to do.
        """
        try:
            inside = self.holds(path)
        except OSError as error:  # such as a path that is too long
            raise FileError(path, f"cannot be read ({cause_of(error)})", "missing") from None
        if not inside:
            target = os.path.realpath(path)
            leads = f"is a link to {target}" if self._is_named_inside(path) else "is outside"
            raise FileError(path, f"{leads}, which is not in {self.folder}: copy the file into it", OUTSIDE)
        return path

    def holds(self, path: Path) -> bool:
        """Return True if a path is inside the root after all symbolic links are resolved.

        Circular links raise no error, unlike in `Path.resolve`.
        """
        try:
            if path.is_symlink() or ".." in path.parts:
                return _is_within(os.path.realpath(path), self._real)
            parent = str(path.parent)
            if parent not in self._parents:
                self._parents[parent] = _is_within(os.path.realpath(parent), self._real)
            return self._parents[parent] or _is_within(os.path.realpath(path), self._real)
        except ValueError:  # a null character
            return False

    def _is_named_inside(self, path: Path) -> bool:
        return _is_within(os.path.normpath(path.absolute()), os.path.normpath(self.folder.absolute()))

    def named(self, text: str) -> Path:
        """Return the path that a manifest names: relative to the root, or absolute and inside of it.

        Backslashes separate folders if no such file exists otherwise, and Unicode names are compared in
        normalized form, as manifests from Windows and macOS need. The file may not exist.

        Raises:
            FileError: if the path is outside of the root or contains a null character.
        """
        if "\0" in text:
            raise FileError(Path(text.replace("\0", "\\0")), "contains a null character", "missing")
        plain = Path(os.path.normpath(text))
        if plain.is_absolute():
            return self._relative(self.guard(plain), text)
        path = self.folder / plain
        if not self._is_named_inside(path):
            return self.guard(path)  # raises, unless a detour leads back
        if not os.path.lexists(path):
            windows = PureWindowsPath(text)
            if windows.drive:
                raise FileError(Path(text), f"is not in {self.folder}: use a relative path", OUTSIDE)
            if "\\" in text:
                path = self.folder / os.path.normpath(windows.as_posix())
            path = self.find(path) or path
        return self.guard(path)

    def _relative(self, path: Path, text: str) -> Path:
        """Return an absolute path inside the root as a path below `folder`, which may be relative."""
        base = os.path.normpath(self.folder.absolute())
        if _is_within(os.path.normpath(text), base):
            return self.folder / os.path.relpath(text, base)
        return self.folder / os.path.relpath(os.path.realpath(path), self._real)

    def find(self, path: Path) -> Path | None:
        """Return the existing path that equals `path` up to Unicode normalization; None if there is none."""
        if os.path.lexists(path):
            return path
        try:
            parts = path.relative_to(self.folder).parts
        except ValueError:
            return None
        found = self.folder
        for part in parts:
            name = self._names(found).get(unicodedata.normalize("NFC", part))
            if name is None:
                return None
            found = found / name
        return found

    def beside(self, path: Path, suffix: str) -> Path | None:
        """Return the existing file with the stem of `path` and a suffix in any case, such as `A.TXT`."""
        names = self._names(path.parent)
        for name in (path.name, path.stem + suffix):
            found = names.get(unicodedata.normalize("NFC", Path(name).stem) + suffix.lower() + "\0")
            if found is not None:
                return path.parent / found
        return None

    def _names(self, folder: Path) -> dict[str, str]:
        """Return the names in a folder by normalized name, and by stem + lower-case suffix + null."""
        if folder not in self._listed:
            found: dict[str, str] = {}
            try:
                names = sorted((f.name for f in os.scandir(folder)), reverse=True)  # the first is kept
            except OSError:
                names = []
            for name in names:
                plain = unicodedata.normalize("NFC", name)
                found[plain] = name
                found[Path(plain).stem + Path(plain).suffix.lower() + "\0"] = name
            for name in names:  # an exact name precedes one that differs in form
                stem, suffix = Path(name).stem, Path(name).suffix
                if suffix == suffix.lower():
                    found[unicodedata.normalize("NFC", stem) + suffix + "\0"] = name
            self._listed[folder] = found
        return self._listed[folder]

    def walk(self, top: Path | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
        """Yield each visible folder with the sorted names of its folders and files, from the top down.

        Linked folders inside the root are followed, except into folders that were entered before. Folders
        that are outside or cannot be listed are recorded in `skipped`.
        """

        def skip(error: OSError) -> None:
            path = Path(error.filename)
            self.skipped[path] = FileError(path, f"cannot be listed ({cause_of(error)})")

        top = self.folder if top is None else top
        seen = {os.path.realpath(top)}
        if not top.is_dir() or not self._enters(top, set()):
            return
        for parent, folders, files in os.walk(top, followlinks=True, onerror=skip):
            visible = sorted(f for f in folders if not f.startswith("."))
            seen.update(
                os.path.realpath(Path(parent, f)) for f in visible if not Path(parent, f).is_symlink()
            )
            folders[:] = [f for f in visible if self._enters(Path(parent, f), seen)]
            yield Path(parent), list(folders), sorted(f for f in files if not f.startswith("."))

    def _enters(self, path: Path, seen: set[str]) -> bool:
        """Return True if `walk` enters a folder; `seen` has the resolved folders that were entered before.

        A folder is entered once through links, however many links point to it and to each other.
        """
        if not path.is_symlink():
            return True
        real = os.path.realpath(path)
        if real in seen:
            return False
        seen.add(real)
        try:
            self.guard(path)
        except FileError as error:
            self.skipped[path] = error
            return False
        return True


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def refuse_playlist(path: Path) -> None:
    """Check that a media file does not name other files.

    Raises:
        FileError: if it is a playlist or a session description.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError:
        return  # reported by the reader of the file
    if head.startswith(PLAYLISTS):
        raise FileError(path, "is a playlist, which names other files: use the files themselves")
