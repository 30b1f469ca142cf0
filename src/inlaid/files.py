"""Files: atomic writing, temporary files, hashing, and safe loading of torch files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from inlaid import limits
from inlaid.reading import FileError, check_member, reading, require_file

if TYPE_CHECKING:
    from torch import Tensor

# --- processes and their temporaries ------------------------------------------------------------------------

HOST = socket.gethostname()
"""Host name of this machine, used in locks and messages."""

_HOST_TAG = hashlib.sha256(HOST.encode()).hexdigest()[:4]
_TEMPORARY = re.compile(r"\.tmp-(\d+)(?:\.([0-9a-f]{4}))?-")
_FOREIGN_AGE = 24 * 3600
"""Age in seconds after which a temporary file of another machine is deleted. Processes on other machines
cannot be looked up."""
_swept: set[tuple[int, Path]] = set()


def process_start(pid: int) -> str | None:
    """Return the start time of the process `pid` on this machine, or None if it is not running.

    Operating systems reuse process IDs, so only the ID and the start time together identify a process.
    Without `/proc`, as on macOS, the start time is `unknown`.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        state, *fields = text[text.rindex(")") + 2 :].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"  # no /proc, such as on macOS


def temporary_path(path: Path) -> Path:
    """Return the temporary path at which this process writes a file before renaming it to `path`.

    It has the folder and suffix of `path`, and its name has at most 255 bytes.
    """
    prefix = f".tmp-{os.getpid()}.{_HOST_TAG}-"
    name = os.fsencode(path.name)[-(255 - len(prefix)) :].decode("utf-8", "ignore")
    return path.with_name(prefix + name)


def sweep(folder: Path, *, deep: bool = True) -> None:
    """Delete the temporary files and folders of processes that have ended.

    Temporary files of other machines are kept for a day.

    Args:
        folder: folder to search.
        deep: also search subfolders.
    """
    for base, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            found = _TEMPORARY.match(name)
            if not found:
                continue
            path = Path(base, name)
            if found[2] not in (None, _HOST_TAG):
                with suppress(OSError):
                    if time.time() - path.lstat().st_mtime > _FOREIGN_AGE:
                        _delete(path)
            elif process_start(int(found[1])) is None:
                _delete(path)
        folders[:] = [n for n in folders if deep and not _TEMPORARY.match(n)]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a folder. If the process is killed meanwhile, `path` is either complete or gone."""
    aside = temporary_path(path)
    os.replace(path, aside)
    _delete(aside)


# --- writing ------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` on success and deleted on failure.

    The caller creates a file or a folder at the temporary path. The temporary path is in the same folder as
    `path`. It has the same suffix, because some libraries choose the file format by the suffix. The result
    has the permissions that the umask allows. Content is synced to disk before the rename, so that a power
    failure leaves either the old or the new content.

    Raises:
        OSError: if the file cannot be written (disk full, read-only, no permission); the error names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if (os.getpid(), path.parent) not in _swept:
        sweep(path.parent, deep=False)
        _swept.add((os.getpid(), path.parent))
    temporary = temporary_path(path)
    try:
        with naming(path, temporary):
            yield temporary
            _finish(temporary)
            _put(temporary, path)
    finally:
        _delete(temporary)


def _put(temporary: Path, path: Path) -> None:
    """Rename a finished temporary file or folder to its final path.

    An existing folder at the final path is first moved aside. It is deleted after the rename, or restored if
    the rename fails.
    """
    aside = None
    if path.is_dir():
        aside = temporary_path(path.with_name(f"old-{path.name}"))
        os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except OSError:
        if aside:
            os.replace(aside, path)
        raise
    if aside:
        _delete(aside)
    sync(path.parent)


def _finish(path: Path) -> None:
    """Set the permissions of a file, or of a folder and everything in it, and sync the content to disk."""
    allowed = ~umask()
    for part in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if part.is_symlink():
            continue
        found = part.stat().st_mode
        wanted = (0o777 if stat.S_ISDIR(found) else 0o666) & allowed
        if found & 0o777 != wanted:
            with suppress(PermissionError):  # a file system without modes
                part.chmod(wanted | found & 0o7000)
        sync(part)


def sync(path: Path) -> None:
    """Write the content of a file or folder from the cache of the operating system to disk (fsync)."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders on Windows, files that the umask hides from their owner
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(number)


def umask() -> int:
    """Return the umask of this process: the permission bits that are removed from new files."""
    with suppress(OSError):
        found = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
        if found:
            return int(found[1], 8)
    old = os.umask(0o077)
    os.umask(old)
    return old


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers (`errno`) of a full disk and of an exceeded disk quota."""


class _NamedError(OSError):
    """Error whose message already names the file. If the disk is full, it also states the space needed."""


@contextmanager
def naming(path: Path, temporary: Path | None = None, size: int = 0) -> Iterator[None]:
    """Context manager: if writing a file or folder fails, raise an error that names its final path.

    Args:
        path: final path of the file or folder.
        temporary: path to which the `with` block writes first. Default: `path`.
        size: number of bytes to write, for the message about a full disk. Default: the number of bytes
            written before the error.

    Raises:
        OSError: if the operating system reports an error about this file or folder. If the disk is full, the
            message also says how much space the file needs and how much is free.
    """
    place = temporary or path
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, cause = getattr(error, "errno", None), str(error)
        if not number:  # shutil and safetensors give the number only as text
            found = re.search(r"(?:os error|Errno) (\d+)", cause)
            if not found:
                raise
            number = int(found[1])
        name = os.fsdecode(getattr(error, "filename", None) or place)
        if name != str(place) and not name.startswith(f"{place}{os.sep}"):
            raise
        text = error.strerror if isinstance(error, _NamedError) else os.strerror(number)
        if number in FULL and not isinstance(error, _NamedError):
            text = f"{text} ({_space(place, size)})"
        raise _NamedError(number, text, f"{path}{name[len(str(place)) :]}") from None


def _space(place: Path, size: int) -> str:
    """Return the needed and the free disk space as text, for the message about a full disk."""
    needs = f"it needs {megabytes(size)}"
    if not size:
        parts = place.rglob("*") if place.is_dir() else [place]
        with suppress(OSError):
            needs = f"it needs more than {megabytes(sum(p.stat().st_size for p in parts if p.is_file()))}"
    free = next(shutil.disk_usage(p).free for p in place.parents if p.exists())
    return f"{needs}, {megabytes(free)} are free"


def megabytes(size: float) -> str:
    """Return a number of bytes as text, such as `1.5 MB`."""
    unit = next((u for u in ("GB", "MB") if size >= {"GB": 1e9, "MB": 1e5}[u]), "kB")
    return f"{size / {'GB': 1e9, 'MB': 1e6, 'kB': 1e3}[unit]:.1f} {unit}"


def append(path: Path, text: str) -> None:
    """Append text to a file.

    Raises:
        OSError: if the file cannot be written; the error names the file.
    """
    with naming(path, size=len(text)), path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_metadata(file: Any) -> dict[str, str]:
    """Return the metadata of an open safetensors file, sorted by key.

    The library returns the metadata in random order.
    """
    return dict(sorted((file.metadata() or {}).items()))


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; equal tensors and metadata give equal bytes.

    `safetensors.torch.save_file` writes the metadata entries in a different order in every process. Here,
    the entries are sorted.

    Raises:
        OSError: if the file cannot be written. The message names the file. If the disk is full, it also
            states how many bytes the file needs.
    """
    from safetensors import torch as safetensors

    with naming(path, size=sum(t.numel() * t.element_size() for t in tensors.values())):
        safetensors.save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
        if not metadata or len(metadata) < 2:
            return
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            about = header.pop("__metadata__")
            ordered = {"__metadata__": dict(sorted(about.items())), **header}
            text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(text) <= size, "the header has grown"
            file.seek(8)
            file.write(text.ljust(size))


def save_torch(content: Tensor | Mapping[str, Tensor], path: Path, *, under: str | None = None) -> None:
    """Write a tensor, or tensors by name, to a torch file, atomically.

    A torch file is a pickle. It is written only for programs that read no other format.

    Args:
        content: the tensors. Views are copied, so the file contains only their own values.
        path: file to write.
        under: key of the file that holds the tensors, such as `state_dict`. Default: none.
    """
    import torch

    held = {"": content} if isinstance(content, torch.Tensor) else dict(content)
    assert all(isinstance(tensor, torch.Tensor) for tensor in held.values()), "tensors only"
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in held.items()}
    value = own[""] if isinstance(content, torch.Tensor) else own
    with atomic(path) as part:
        torch.save(value if under is None else {under: value}, part)


# --- reading ------------------------------------------------------------------------------------------------


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
        mmap: memory-map files in the zip format, so that a tensor is read from disk only when it is used.

    Raises:
        TorchFileError: if the file cannot be loaded, or if its content is too large. A tensor may exceed
            `limits.ARRAY` bytes only if the file stores all of its values.
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
    """Reject a loaded tensor that is larger than both `limits.ARRAY` and its stored data.

    A tensor with stride 0 repeats a few stored values. Its conversion would allocate memory for all
    repetitions.

    Raises:
        TorchFileError: if a tensor is too large, or if the file contains more than 1,000,000 values.
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
