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
from typing import Any

from safetensors import SafetensorError

from inlaid import limits
from inlaid.reading import FileError, check_member, reading, require_file


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


class TorchFileError(FileError):
    """Error for a file that `torch.load` cannot load; `code` is `unreadable`, `truncated` or `pickle`."""


def load_torch(path: Path, *, mmap: bool = False) -> Any:
    """Load a torch file with `weights_only=True`, so that no code in the file is run.

    Args:
        path: file in the zip or the legacy format of `torch.save`.
        mmap: memory-map files in the zip format, so that a tensor is read when it is used.

    Raises:
        TorchFileError: if the file cannot be loaded, or if its tensors claim more than `limits.ARRAY`.
    """
    from pickle import UnpicklingError

    import torch

    with reading(path, TorchFileError):
        require_file(path, TorchFileError)
        is_zip = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04" and not is_zip:
            raise TorchFileError(path, "is truncated", "truncated")
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    check_member(path, member, TorchFileError)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
        except EOFError:
            raise TorchFileError(path, "is truncated", "truncated") from None
        except UnpicklingError as error:
            called = re.search(r"GLOBAL (\S+)", str(error))
            if not called and not head.startswith(b"\x80"):
                raise TorchFileError(path, "not a torch file") from None
            what = f"calls {called[1]}" if called else "runs code"
            raise TorchFileError(path, f"a pickle that {what}: not loaded", "pickle") from None
        _check_claims(path, found)
        return found


def _check_claims(path: Path, content: Any) -> None:
    """Check that the tensors of a loaded file are not larger in use than in the file.

    A tensor with stride 0 repeats a few stored values; converting it allocates all of them.
    """
    import torch

    rest, seen = [content], 0
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            stored = 0 if value.layout != torch.strided else value.untyped_storage().nbytes()
            claimed = value.numel() * value.element_size()
            large = limits.ARRAY.exceeded(claimed, f"a tensor has {limits.as_size(claimed)}")
            if large and claimed > stored:
                raise TorchFileError(path, large)
        elif isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value
        seen += 1
        if seen > 1_000_000:
            raise TorchFileError(path, "contains more than 1,000,000 values")
