"""Search for the files of a dataset, and rejection of paths that lead out of its root folder.

A dataset may come from an untrusted person, so `Root.guard` checks every path that the dataset contains. Such
paths occur in manifests, prompt lists, file names, symbolic links, and meshes that refer to buffer files.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from inlaid.reading import FileError, cause_of

OUTSIDE = "outside"
"""Problem code of a path that leads out of its dataset's root folder."""

PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0\r\n", b"v=0\n", b"[playlist]", b"<?xml", b"<MPD")
"""First bytes of playlists and similar files. FFmpeg recognizes them under any suffix and would open the
other files that they name."""


class Root:
    """Root folder of a dataset. It finds paths inside the folder and refuses paths outside of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = os.path.realpath(folder)
        self._listed: dict[Path, dict[str, str]] = {}
        self._parents: dict[str, bool] = {}
        self.skipped: dict[Path, FileError] = {}
        """Folders that `walk` did not enter, with the reason."""

    def guard(self, path: Path) -> Path:
        """Return `path` if it is inside the root folder after all symbolic links are resolved.

        Raises:
            FileError: if the path is outside the root folder (error code `outside`) or cannot be resolved
                (error code `missing`). The message names the path.
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
        """Return True if a path is inside the root folder after all symbolic links are resolved.

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
        """Return the path of the file that a manifest entry names; the file need not exist.

        The entry is a path relative to the root folder, or an absolute path inside it. A relative path may
        come from Windows or macOS. If it does not exist, backslashes are read as folder separators, and names
        are compared after Unicode normalization.

        Raises:
            FileError: if the path is outside of the root folder or contains a null character.
        """
        if "\0" in text:
            raise FileError(Path(text.replace("\0", "\\0")), "contains a null character", "missing")
        plain = Path(os.path.normpath(text))
        if plain.is_absolute():
            return self._relative(self.guard(plain), text)
        path = self.folder / plain
        if not self._is_named_inside(path):
            return self.guard(path)  # raises, unless a link leads back inside
        if not os.path.lexists(path):
            windows = PureWindowsPath(text)
            if windows.drive:
                raise FileError(Path(text), f"is not in {self.folder}: use a relative path", OUTSIDE)
            if "\\" in text:
                path = self.folder / os.path.normpath(windows.as_posix())
            path = self.find(path) or path
        return self.guard(path)

    def _relative(self, path: Path, text: str) -> Path:
        """Convert an absolute path inside the root folder to a path that begins with `self.folder`."""
        base = os.path.normpath(self.folder.absolute())
        if _is_within(os.path.normpath(text), base):
            return self.folder / os.path.relpath(text, base)
        return self.folder / os.path.relpath(os.path.realpath(path), self._real)

    def find(self, path: Path) -> Path | None:
        """Return the existing path that equals `path` after Unicode normalization; None if there is none."""
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
        """Return the file beside `path` with the same stem and the given suffix, or None if there is none.

        The case of the suffix does not matter: for `a.mp4` and the suffix `.txt`, the result may be `a.TXT`.
        """
        found = self._names(path.parent).get(unicodedata.normalize("NFC", path.stem) + suffix.lower() + "\0")
        return None if found is None else path.parent / found

    def _names(self, folder: Path) -> dict[str, str]:
        """Return a lookup table of the file names in a folder. Each name has two keys.

        The first key is the name in Unicode form NFC. The second key does not depend on the case of the
        suffix. It consists of the stem in form NFC, the lower-case suffix, and a null character.
        """
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
        """Yield `top` and the folders below it, each with the sorted names of its subfolders and files.

        The default of `top` is the root folder. Names with a leading dot are left out. Each folder is entered
        once: a symbolic link is followed only if the walk does not reach its folder otherwise. Run folders,
        links to folders outside the root folder, and folders that cannot be listed are skipped and recorded
        in `skipped`.
        """

        def skip(error: OSError) -> None:
            path = Path(error.filename)
            self.skipped[path] = FileError(path, f"cannot be listed ({cause_of(error)})")

        top = self.folder if top is None else top
        real = os.path.realpath(top)
        seen: set[str] = set()
        if not top.is_dir() or not self._enters(top, real, seen):
            return
        for parent, folders, files in os.walk(top, followlinks=True, onerror=skip):
            visible = sorted(f for f in folders if not f.startswith("."))
            folders[:] = [f for f in visible if self._enters(Path(parent, f), real, seen)]
            yield Path(parent), list(folders), sorted(f for f in files if not f.startswith("."))

    def _enters(self, path: Path, top: str, seen: set[str]) -> bool:
        """Return True if `walk` should enter a folder, and add its real path to `seen`.

        Run folders and links to folders outside the root folder are not entered, and no folder is entered
        twice. A link to a visible folder below `top` is not followed, because the walk reaches that folder
        itself. `top` is a real path.
        """
        if is_run_folder(path):
            self.skipped[path] = FileError(path, "", "run")
            return False
        real = os.path.realpath(path)
        if real in seen:
            return False
        if path.is_symlink() and real != top:
            if _is_within(real, top) and not any(
                p.startswith(".") for p in Path(real).relative_to(top).parts
            ):
                return False
            try:
                self.guard(path)
            except FileError as error:
                self.skipped[path] = error
                return False
        seen.add(real)
        return True


def is_run_folder(path: Path) -> bool:
    """Return True if a folder is a run folder. Images and videos in a run folder are not training data."""
    return (
        (path / "run.lock").is_file()
        or (path / "check" / "report.json").is_file()
        or all((path / name).is_file() for name in ("config.yaml", "environment.json"))
    )


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def refuse_playlist(path: Path) -> None:
    """Check that a media file is not a playlist. FFmpeg would open the files that a playlist names.

    Raises:
        FileError: if the file is a playlist or a session description.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError:
        return  # reported by the reader of the file
    if head.startswith(PLAYLISTS):
        raise FileError(path, "is a playlist, which names other files: use the files themselves")
