"""Reading of users' files. Library errors become one exception type; text and JSON have size limits."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inlaid import limits
from inlaid.limits import Limit
from inlaid.text import decode_text, printable


class FileError(ValueError):
    """Error for an unusable file; the message contains path and cause.

    `code` is a problem code, a key of `data.problems.KINDS`.
    """

    def __init__(self, path: Path, cause: str, code: str = "unreadable") -> None:
        cause = printable(cause)
        super().__init__(f"{printable(path, lines=False)}: {cause}")
        self.cause = cause
        self.code = code


@contextmanager
def reading(
    path: Path, raises: Callable[[Path, str, str], FileError] = FileError, what: str = ""
) -> Iterator[None]:
    """Convert exceptions in the `with` block to a `FileError` that names the file.

    `MemoryError` and `RecursionError`, which malicious files can cause, are also converted. A `FileError`
    passes unchanged, and so does another `ValueError` whose message begins with the path.

    Args:
        path: file that the block reads.
        raises: class of the error to raise.
        what: expected kind of file, such as `an image`. If the content of the file is invalid, the message
            says `is not an image`.

    Raises:
        FileError: if the block raises an exception.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise  # our own error, which names the file
        why = cause_of(error)
        code = "truncated" if isinstance(error, EOFError) or "truncated" in why else "unreadable"
        known = isinstance(error, (MemoryError, RecursionError)) or (
            isinstance(error, OSError) and error.errno
        )
        cause = f"is not {what} ({why})" if what and not known else f"cannot be read ({why})"
        raise raises(path, cause, code) from error


def cause_of(error: BaseException) -> str:
    """Return the cause of a library's exception as one line of text."""
    if isinstance(error, MemoryError):
        return "it needs more memory than is available"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return printable(first) or f"{type(error).__name__}"


def require_file(path: Path, raises: Callable[[Path, str, str], FileError] = FileError) -> os.stat_result:
    """Check that a path is a regular file and not empty, and return the result of `os.stat`.

    For example, the path must not be a named pipe, because reading from it could block forever.

    Raises:
        FileError: if the path is not such a file.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise raises(path, f"cannot be read ({cause_of(error)})", "unreadable") from None
    if stat.S_ISDIR(found.st_mode):
        raise raises(path, "is a folder, not a file", "unreadable")
    if not stat.S_ISREG(found.st_mode):
        raise raises(path, "is not a regular file", "unreadable")
    if not found.st_size:
        raise raises(path, "the file is empty", "unreadable")
    return found


# --- text and JSON ------------------------------------------------------------------------------------------


def read_text(path: Path, limit: Limit = limits.TEXT) -> str:
    """Read a text file of at most `limit` bytes, in UTF-8, UTF-16 or UTF-32; an empty file gives empty text.

    Raises:
        FileError: if the file cannot be read, is too large, or has another encoding.
    """
    with reading(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileError(path, "is not a regular file")
        if long := limit.exceeded(found.st_size, f"has {limits.as_size(found.st_size)} of text"):
            raise FileError(path, long)
        try:
            return decode_text(path.read_bytes())
        except UnicodeDecodeError:
            raise FileError(path, "is not UTF-8") from None


def parse_json(text: str) -> Any:
    """Parse JSON text of limited size and depth.

    Raises:
        json.JSONDecodeError: if the text is not valid JSON.
        ValueError: if the text is too long, is nested too deeply, or repeats a key of an object.
    """
    if long := limits.TEXT.exceeded(len(text), f"has {limits.as_size(len(text))} of JSON"):
        raise ValueError(long)
    depth = limits.nesting(_outside_strings(text))
    if deep := limits.DEPTH.exceeded(depth, f"is nested {depth} levels deep"):
        raise ValueError(deep)
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _outside_strings(text: str) -> str:
    """Return a JSON text without its strings."""
    parts = text.replace("\\\\", "").replace('\\"', "").split('"')
    return "".join(parts[::2])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"has the key `{printable(twice[:80], lines=False)}` twice in one object: keep one")
    return out


# --- archives -----------------------------------------------------------------------------------------------


def check_member(
    path: Path, member: zipfile.ZipInfo, raises: Callable[[Path, str, str], FileError] = FileError
) -> None:
    """Check a member of a zip archive before it is read, by the sizes that the archive declares.

    Args:
        path: the archive.
        member: the member to check.
        raises: class of the error to raise.

    Raises:
        FileError: if the member is encrypted, is larger than the archive, or expands too much.
    """
    if member.flag_bits & 1:
        raise raises(path, f"{member.filename} is encrypted", "unreadable")
    if member.compress_size > path.stat().st_size:
        size = limits.as_size(member.compress_size)
        raise raises(path, f"{member.filename} claims {size}, more than the file has", "truncated")
    if large := limits.expanded(member.file_size, member.compress_size, member.filename):
        raise raises(path, large, "unreadable")
