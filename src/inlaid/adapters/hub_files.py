"""Files that `inlaid import` reads: local paths, and files of repositories on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from inlaid.families import hub
from inlaid.networks.rgba_vae_published import HALVES

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of weight files."""

LISTED = 8
"""Maximum number of files that an error message lists."""


def local_source(path: Path) -> Path:
    """Return the local path of an adapter or RGBA VAE, after downloading it from the Hub if necessary.

    Size and license are printed before the download. For an RGBA VAE in ComfyUI's layout, both of its files
    are downloaded.

    Args:
        path: local path, or path on the Hub: `OWNER/NAME/FILE` or `OWNER/NAME`. An existing local path takes
            precedence. Without FILE, the repository must have exactly one file of weights.

    Returns:
        The local path. A path that cannot name a Hub repository is returned as it is, even if it does not
        exist.

    Raises:
        ValueError: if the repository or the file does not exist or cannot be downloaded, or if `path`
            contains no FILE and the repository does not have exactly one file of weights.
    """
    owner, *rest = path.as_posix().split("/")
    if path.exists() or not rest or owner in ("", ".", "..", "~") or Path(owner).is_dir():
        return path
    if len(rest) == 1 and rest[0].endswith(WEIGHTS):
        return path  # a missing file in a missing folder
    name, file = f"{owner}/{rest[0]}", "/".join(rest[1:])
    if file and all(hub.cached(name, None, part) for part in _parts(file)):
        return hub.fetch_file(name, file)
    files = {n: size for n, size in hub.repository(name, None, file).sizes.items() if n.endswith(WEIGHTS)}
    if file not in files:
        if file or len(files) != 1:
            raise ValueError(_choice(name, file, files))
        file = next(iter(files))
    *others, file = (part for part in _parts(file) if part in files)
    for other in others:
        hub.fetch_file(name, other)
    return hub.fetch_file(name, file)


def _parts(file: str) -> list[str]:
    """Return the names of the files to download; the last one is `file`.

    In ComfyUI's layout, an RGBA VAE consists of a color file and an alpha file. If `file` is one of these,
    the other one is also returned.
    """
    return [*(file.replace(a, b) for a, b in (HALVES, HALVES[::-1]) if a in file), file]


def _choice(name: str, file: str, files: dict[str, int]) -> str:
    """Return the error message for a file that does not exist in a repository, or that was not named.

    The message lists the files with weights.

    Args:
        name: owner and name of the repository.
        file: the requested file; empty if no file was named.
        files: sizes of the files with weights, by name.
    """
    if not files:
        return f"{name}: no weights in this repository (suffixes {', '.join(WEIGHTS)})"
    listed = [f"{name}/{n} ({hub.as_text(size)})" for n, size in sorted(files.items())[:LISTED]]
    more = f", and {len(files) - LISTED} more" if len(files) > LISTED else ""
    missing = f"has no file `{file}`" if file else f"has {len(files)} files of weights"
    return f"{name} {missing}: name one of {', '.join(listed)}{more}"
