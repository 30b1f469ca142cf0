"""Files: atomic writing, hashing, and safe loading of torch files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` on success and deleted on failure.

    The caller creates a file or a folder at the temporary path, which is in the same folder as `path` and has
    the same suffix, because some writers derive the format from the suffix.

    Raises:
        OSError: if the file cannot be written (disk full, read-only, no permission); the error names `path`.
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
    except SafetensorError as error:  # contains the operating system's error only as text
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
    """Return the SHA-256 of a file's content in hexadecimal."""
    out = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            out.update(block)
    return out.hexdigest()


class TorchFileError(ValueError):
    """Error for a file that `torch.load` cannot load, with the cause and a code."""

    def __init__(
        self, path: Path, cause: str, code: Literal["unreadable", "truncated", "pickle"] = "unreadable"
    ) -> None:
        super().__init__(f"{path}: {cause}")
        self.cause, self.code = cause, code


def load_torch(path: Path, *, mmap: bool = False) -> Any:
    """Load a torch file with `weights_only=True`, so that no code in the file is run.

    Args:
        path: file in the zip or the legacy format of `torch.save`.
        mmap: memory-map files in the zip format, so that a tensor is read when it is used.

    Raises:
        TorchFileError: if the file cannot be loaded.
    """
    from pickle import UnpicklingError

    import torch

    try:
        is_zip = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            head = file.read(4)
        if not head or (head == b"PK\x03\x04" and not is_zip):
            raise EOFError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except EOFError:
        raise TorchFileError(path, "is truncated", "truncated") from None
    except UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        if not called and not head.startswith(b"\x80"):
            raise TorchFileError(path, "not a torch file") from None
        what = f"calls {called[1]}" if called else "runs code"
        raise TorchFileError(path, f"a pickle that {what}: not loaded", "pickle") from None
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise TorchFileError(path, f"cannot be read ({cause})") from None
