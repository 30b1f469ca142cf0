"""Access to repositories on the Hugging Face Hub: availability, cached files and downloads.

All other modules use this one to access the Hub. It reports a failure within seconds; huggingface_hub alone
would repeat requests for half a minute. The message names the repository, the file and a solution.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from inlaid.console import once

TIMEOUT = 5.0
"""Time in seconds after which the Hub counts as unreachable if it has not responded."""


class HubError(ValueError):
    """Failure to read from the Hub; the message is a sentence for the user."""


class UnreachableError(HubError):
    """Failure because the Hub cannot be reached or reports a server error; cached files can still be used."""


@dataclass(frozen=True)
class Repository:
    """Commit hash and file list of a Hub repository."""

    commit: str
    sizes: Mapping[str, int]
    """Size in bytes of each file, by file name."""
    license: str = ""
    """License that the repository states, such as `apache-2.0`; empty if it states none."""


def repository(name: str, revision: str | None = None, probe: str = "model_index.json") -> Repository:
    """Return the commit and file list of a Hub repository.

    The result is cached, so each process sends the request only once.

    Args:
        name: Hub ID.
        revision: branch, tag or commit.
        probe: file that is requested to test access. The file list alone does not show whether access is
            granted, because a gated repository lists its files for everybody.

    Raises:
        HubError: if there is no such repository or access is denied.
        UnreachableError: if the Hub cannot be reached.
    """
    found = _asked(name, revision, probe)
    if isinstance(found, HubError):
        raise found
    return found


@cache
def _asked(name: str, revision: str | None, probe: str) -> Repository | HubError:
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    file = None
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
        if probe in sizes:
            file = probe
            get_hf_file_metadata(hf_hub_url(name, probe, revision=revision), timeout=TIMEOUT)
        tags = [t.removeprefix("license:") for t in info.tags or () if t.startswith("license:")]
        stated = getattr(info.card_data, "license", None) or (tags[0] if tags else "")
        return Repository(info.sha or "", sizes, ", ".join([stated] if isinstance(stated, str) else stated))
    except Exception as error:
        return explain(error, name, revision, file)


def explain(error: Exception, name: str, revision: str | None, file: str | None) -> HubError:
    """Convert an exception during a request or a download to a HubError with a message for the user."""
    from huggingface_hub import constants, errors

    what = f"`{file}` of {name}" if file else name
    status = getattr(getattr(error, "response", None), "status_code", None)
    number = next((e.errno for e in _chain(error) if isinstance(e, OSError) and e.errno), None)
    if isinstance(error, errors.HFValidationError):
        return HubError(f"`{name}` is not a Hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return HubError(
            f"access to {what} is denied: accept its terms at {constants.ENDPOINT}/{name} and run "
            "`hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{name} has no revision `{revision}` on the Hub: correct model.revision")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"{name} has no file `{file}` on the Hub: check the name")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return HubError(
            f"there is no `{name}` on the Hub ({constants.ENDPOINT}), or it is private: check the name, or "
            "run `hf auth login`"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return HubError(f"no disk space for {what} in {constants.HF_HUB_CACHE}: free space, or set HF_HOME")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HubError(f"{constants.HF_HUB_CACHE} cannot be written, for {what}: set HF_HOME")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UnreachableError(f"{what} cannot be downloaded: unset HF_HUB_OFFLINE, or use a local folder")
    cause = f"answers with error {status}" if status else f"does not answer ({type(error).__name__})"
    if file and not status:
        cause = f"stopped answering ({type(error).__name__})"
    return UnreachableError(
        f"{what} cannot be downloaded, the Hub ({constants.ENDPOINT}) {cause}: check the network and run "
        "again, finished files are kept; or use a local folder"
    )


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# --- what is cached -----------------------------------------------------------------------------------------


def cached(name: str, revision: str | None, file: str) -> Path | None:
    """Return the path of a file in the local Hub cache, or None if the file is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _cached_index(name: str, revision: str | None) -> dict[str, Any] | None:
    """Return the cached `model_index.json`, which lists a checkpoint's components; None if not cached."""
    path = cached(name, revision, "model_index.json")
    return json.loads(path.read_text("utf-8")) if path else None


def _cached_component(name: str, revision: str | None, component: str) -> Path | None:
    """Return the folder of a pipeline component in the Hugging Face cache.

    The result is None if the folder or one of its weights files is not in the cache.
    """
    index = cached(name, revision, "model_index.json")
    folder = index.parent / component if index else None
    if folder is None or not folder.is_dir():
        return None
    needed = {
        shard
        for file in folder.glob("*.index.json")
        for shard in json.loads(file.read_text("utf-8")).get("weight_map", {}).values()
    }
    if (folder / "config.json").is_file() and not needed:  # of a network, which has weights
        needed = {
            next((f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")), "no weights")
        }
    return folder if all((folder / shard).exists() for shard in needed) else None


# --- downloads ----------------------------------------------------------------------------------------------


def fetch(name: str, revision: str | None, file: str) -> Path | None:
    """Return the local path of a file in a Hub repository. The file is downloaded if it is not cached.

    Returns:
        The path, or None if the repository does not have the file.

    Raises:
        HubError: if the file can neither be downloaded nor found in the cache.
    """
    try:
        known = repository(name, revision)
    except UnreachableError:
        path, index = cached(name, revision, file), _cached_index(name, revision)
        if path is None and (index is None or file.split("/")[0] in (*index, file)):
            raise
        return path
    return _download(name, revision, [file], known) if file in known.sizes else None


def fetch_component(name: str, revision: str | None, component: str) -> Path:
    """Return the local folder of a component, after downloading the files that are not cached.

    Raises:
        HubError: if the files can neither be downloaded nor found in the cache.
    """
    try:
        known = repository(name, revision)
    except UnreachableError:
        folder = _cached_component(name, revision, component)
        if folder is None:
            raise
        return folder
    files = needed_files(known.sizes, component)
    if not files:
        raise HubError(f"{name} has no `{component}` on the Hub: use a checkpoint in diffusers layout")
    return _download(name, revision, files, known).parent


def fetch_file(name: str, file: str) -> Path:
    """Return the local path of one file from any Hub repository, after downloading it if needed.

    Used for files outside checkpoints, such as weights of a perceptual network.

    Raises:
        HubError: if the file can neither be downloaded nor found in the cache.
    """
    path = cached(name, None, file)
    return path or _download(name, None, [file], repository(name, None, file), announced=0)


ANNOUNCED = 1_000_000
"""Minimum size in bytes of a download that is announced. A configuration file alone is smaller."""


def _download(
    name: str, revision: str | None, files: Iterable[str], known: Repository, announced: int = ANNOUNCED
) -> Path:
    """Download the files that are not cached, and return the local path of the last file.

    Before a download of at least `announced` bytes, its size and the repository's license are printed.
    """
    from huggingface_hub import constants, hf_hub_download

    files = list(files)
    missing = [f for f in files if cached(name, revision, f) is None]
    size = sum(known.sizes.get(f, 0) for f in missing)
    if missing and size > (free := free_space()):
        raise HubError(
            f"{name}: {size / 1e9:.1f} GB to download and {free / 1e9:.1f} GB are free in "
            f"{constants.HF_HUB_CACHE}: free space, or set HF_HOME"
        )
    if missing and size >= announced:
        what = f"{name}/{missing[0]}" if len(missing) == 1 else f"{len(missing)} files of {name}"
        license = f"license {known.license}" if known.license else "no license stated"
        once(f"downloading {what}: {as_text(size)}, {license} ({constants.ENDPOINT}/{name})")
    path = cached(name, revision, files[-1])
    for file in missing:
        try:
            path = Path(hf_hub_download(name, file, revision=revision, etag_timeout=TIMEOUT))
        except Exception as error:
            raise explain(error, name, revision, file) from error
    assert path
    return path


def free_space() -> int:
    """Return the free space in bytes on the disk of the Hub cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


_OTHER = (".onnx", ".onnx_data", ".msgpack", ".h5", ".tflite", ".pb", ".xml", ".gguf", ".md")
"""Suffixes of repository files that are never loaded."""


def needed_files(names: Iterable[str], component: str) -> list[str]:
    """Return the files that are loaded for a component: its configuration, and its weights in one format.

    Variants such as `model.fp16.safetensors` are left out if there are weights without a variant. Pickled
    weights are left out if there are safetensors.
    """
    prefix = f"{component}/"
    own = [n for n in names if n.startswith(prefix) and n.count("/") == 1 and not n.endswith(_OTHER)]
    plain = [n for n in own if re.fullmatch(r"[^.]+\.(safetensors|bin)(\.index\.json)?", n)]
    weights = [n for n in own if re.search(r"\.(safetensors|bin|pt|pth|ckpt)$|\.index\..*json$", n)]
    safe = [n for n in plain if ".safetensors" in n]
    chosen = safe or plain or weights
    return [n for n in own if n not in weights or n in chosen]


# --- reports ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Availability:
    """Result of checking whether components of a Hub checkpoint can be read."""

    text: str
    severity: Literal["note", "warning", "error"]
    """`note` if the components can be read, `warning` if the Hub cannot be reached now, `error` if access is
    denied, disk space is missing, or HF_HUB_OFFLINE is set and a component is not cached."""


def availability(name: str, revision: str | None, components: Iterable[str]) -> Availability:
    """Return whether components can be read from the Hub, and the size of the download.

    No weights are downloaded.
    """
    from huggingface_hub import constants

    components = list(dict.fromkeys(components))
    try:
        sizes = repository(name, revision).sizes
    except UnreachableError as error:
        index = _cached_index(name, revision)
        listed = [c for c in components if index is None or c in index]
        absent = [c for c in listed if _cached_component(name, revision, c) is None]
        if not absent:
            return Availability(f"{name}: all files are cached in {constants.HF_HUB_CACHE}", "note")
        severity = "error" if constants.HF_HUB_OFFLINE else "warning"
        return Availability(f"{error}; not in the cache: {', '.join(absent)}", severity)
    except HubError as error:
        return Availability(str(error), "error")
    left = {
        part: sum(sizes[f] for f in needed_files(sizes, part) if cached(name, revision, f) is None)
        for part in components
    }
    left = {part: size for part, size in left.items() if size}
    total = sum(left.values())
    if not total:
        return Availability(f"{name}: reachable on the Hub, nothing to download", "note")
    parts = ", ".join(f"{part} {as_text(size)}" for part, size in sorted(left.items(), key=lambda x: -x[1]))
    text = f"{name}: reachable on the Hub, {as_text(total)} to download ({parts})"
    if total > (free := free_space()):
        where = f"{as_text(free)} are free in {constants.HF_HUB_CACHE}"
        return Availability(f"{text}, but {where}: free space, or set HF_HOME", "error")
    return Availability(text, "note")


def as_text(n: float) -> str:
    """Return a number of bytes as text, such as `0.8 GB`."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def local_options(revision: str | None) -> dict[str, Any]:
    """Return `from_pretrained` arguments that load downloaded files without requests to the Hub."""
    return {"revision": revision, "local_files_only": True}
