"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`; on success it becomes `path`, on failure nothing is left.

    The temporary name keeps the suffix, for writers that choose a format by it. It may be made a file or a
    folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and str(error.filename or temporary).startswith(str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    except SafetensorError as error:  # it wraps the system's error in text
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    out = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            out.update(block)
    return out.hexdigest()
