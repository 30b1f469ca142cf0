"""Lock of a run folder: only one process at a time may train in it or fill its cache."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from inlaid.files import HOST, process_start

NAME = "run.lock"
"""Name of the lock file in a run folder. It contains the ID, host name and start time of the
process that holds the lock."""

RENEWED = 20.0
"""Seconds between updates of the lock file's timestamp. Processes on other machines rely on the timestamp,
because they cannot look up the process that holds the lock."""

EXPIRES = 300.0
"""Seconds without an update after which the lock of a process on another machine counts as stale."""

PATIENCE = 2.0
"""Seconds to wait until another process releases the lock. It may be about to end, for example because it
has just been killed."""

_mine: set[tuple[int, Path]] = set()
"""Locks that this process holds, as (process ID, path). The process ID is included because a forked process
inherits this set."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Context manager that holds the lock of a run folder. It creates a missing folder.

    The lock of a process that has ended is taken over. A process on this machine is looked up directly. A
    process on another machine is assumed to have ended if it has not updated its lock for `EXPIRES` seconds.

    Raises:
        ValueError: if another process holds the lock, or the folder cannot be written.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    path = folder / NAME
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file: delete it, and run again")
    key = (os.getpid(), path.resolve())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        values = _take(path, key)
    except OSError as error:
        raise unwritable(folder, error) from None
    _mine.add(key)
    done = threading.Event()
    threading.Thread(target=_renew, args=(path, done), name="lock", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        _mine.discard(key)
        with suppress(OSError), _opened(path) as file:
            if (_read(file) or values).items() >= values.items():
                path.unlink()
        with suppress(OSError):  # remove the folders of a run that was refused before it wrote a file
            for parent in missing:
                parent.rmdir()


def _take(path: Path, key: tuple[int, Path]) -> dict[str, Any]:
    """Write the lock file and return its content. If another process holds the lock, wait a few seconds.

    Raises:
        ValueError: if the other process still holds the lock.
    """
    until = time.monotonic() + PATIENCE
    while True:
        with _opened(path) as file:
            owner = _read(file)
            if not owner or not _runs(owner, key):
                since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
                start = process_start(os.getpid())
                values = {"pid": os.getpid(), "host": HOST, "start": start, "since": since}
                file.truncate(0)
                json.dump(values, file)
                return values
        if time.monotonic() > until:
            raise ValueError(_refusal(path, owner))
        time.sleep(0.05)


def unwritable(folder: Path, error: OSError) -> ValueError:
    """Return the error to raise if files cannot be written to a run folder."""
    cause = f"the run folder cannot be written ({error.strerror or error})"
    return ValueError(f"{folder}: {cause}; choose another folder (run=...), or free disk space")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Context manager that opens a lock file and locks it, if the file system supports file locks.

    If another process has deleted or replaced the file in the meantime, the file is opened again.
    """
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except (ImportError, OSError):  # Windows; some network file systems: the content alone decides
                pass
            with suppress(OSError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    yield file
                    return
        # the file was deleted before it was locked: its owner has just ended


def _read(file: TextIO) -> dict[str, Any] | None:
    """Return the process that a lock file names, and the time when the file was last updated.

    The result is None if the file is not a valid lock.
    """
    file.seek(0)
    try:
        owner = json.load(file)
        kept = {k: owner[k] for k in ("pid", "host", "start", "since")}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return {**kept, "renewed": os.fstat(file.fileno()).st_mtime} if isinstance(kept["pid"], int) else None


def _runs(owner: dict[str, Any], key: tuple[int, Path]) -> bool:
    """Return True if the process that holds a lock is still running.

    A process on another machine counts as ended if it has not updated its lock file for `EXPIRES` seconds.

    Args:
        owner: content of the lock file.
        key: process ID of the holder, and path of the lock. If that is the ID of the current process, the
            holder counts as running only if the current process really holds the lock.
    """
    if owner["host"] != HOST:
        return time.time() - owner["renewed"] < EXPIRES
    if owner["pid"] == os.getpid():
        return key in _mine
    start = process_start(owner["pid"])
    return start is not None and start in (owner["start"], "unknown")


def _refusal(path: Path, owner: dict[str, Any]) -> str:
    text = (
        f"{path.parent}: this run is in use by process {owner['pid']} on {owner['host']}, started "
        f"{owner['since']}: wait until it has ended, or choose another folder (run=...)"
    )
    if owner["host"] == HOST:
        return text
    return f"{text}; if that process has ended, wait {EXPIRES / 60:.0f} minutes or delete {path}"


def _renew(path: Path, done: threading.Event) -> None:
    """Update the timestamp of the lock file regularly until `done` is set."""
    while not done.wait(RENEWED):
        with suppress(OSError):
            os.utime(path)
