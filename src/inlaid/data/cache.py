"""Content-addressed cache of latents and text embeddings, so that training loads no VAE or text encoder.

The name of a cached item is a hash of everything that determines its values: format version, model family,
encoder files, and the content and window of the clip. Therefore, items are never stale, runs can
share a cache folder, and an interrupted build can resume.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from inlaid.data import precomputed
from inlaid.data.probes import CachedProbes
from inlaid.families import Family
from inlaid.files import atomic, read_metadata, save_file

if TYPE_CHECKING:
    from inlaid.data.clips import Window


VERSION = 1
"""Format version of cached items. Increase it when the values or names of cached tensors change."""

T = TypeVar("T")


def identity(*parts: Any) -> str:
    """Return a name for a cached item: the first 40 hexadecimal digits of the SHA-256 of `parts` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, including their names, types and shapes."""
    out = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        out.update(f"{name}{t.dtype}{list(t.shape)}".encode())
        out.update(t.flatten().view(torch.uint8).numpy().data)
    return out.hexdigest()


@dataclass
class Cache:
    """Cache folder, with encoded media and text embeddings in separate subfolders."""

    folder: Path
    probes: CachedProbes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.probes = CachedProbes(self.folder)

    def path(self, kind: str, name: str) -> Path:
        """Return the path of a cached item; the file may not exist yet."""
        return self.folder / kind / name[:2] / f"{name}.safetensors"

    def has(self, kind: str, name: str) -> bool:
        """Return True if the file of a cached item has the expected length and names the item in its header.

        The values of the tensors are verified only by `read`.
        """
        path = self.path(kind, name)
        try:
            with path.open("rb") as file:
                head = file.read(8)
                size = int.from_bytes(head, "little")
                header = json.loads(file.read(size))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
            whole = path.stat().st_size == 8 + size + end
            return whole and header["__metadata__"]["item"] == f"{kind}/{name}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError):
            return False

    def write(self, kind: str, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a cached item atomically, with a hash of its tensors in the file header."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        about = {"inlaid_cache": str(VERSION), "item": f"{kind}/{name}", "digest": digest(tensors)}
        header = {**metadata, **about}
        with atomic(self.path(kind, name)) as temporary:
            save_file(tensors, temporary, metadata=header)

    def read(self, kind: str, name: str) -> dict[str, Tensor]:
        """Read and verify a cached item.

        Raises:
            ValueError: if the item is missing, truncated or modified, or if the file contains another item.
        """
        path = self.path(kind, name)
        try:
            with safe_open(path, "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
                header = read_metadata(file)
        except Exception as error:
            raise ValueError(
                f"{path}: cached item cannot be read ({error}): delete the file and run again"
            ) from None
        if header.get("item") != f"{kind}/{name}":
            raise ValueError(
                f"{path}: this file is the cached item {header.get('item', 'of an older version')}, not "
                f"{kind}/{name}: delete the file and run again"
            )
        if header.get("digest") != digest(tensors):
            raise ValueError(
                f"{path}: cached item was modified after it was written: delete the file and run again"
            )
        return tensors

    def content(self, path: Path) -> str:
        """Return the SHA-256 of a file's content, from the cache if the file is unchanged."""
        return self.probes.content(path)

    def remember(self) -> None:
        """Save content hashes, file properties and alpha statistics to the cache folder, for later runs."""
        self.probes.save()

    def encoder(self, family: Family, part: str) -> list[str]:
        """Return strings that identify an encoder, for cache keys.

        They contain the commit of a checkpoint on the Hugging Face Hub, or the hashes of local files.
        """
        if not isinstance(family.source, Path):
            return [family.source, family.commit(), part]
        files = [
            f for c in family.encoders[part] for f in sorted((family.source / c).rglob("*")) if f.is_file()
        ]
        return [
            f"{f.relative_to(family.source)}:{self.content(f)}" for f in files if not f.name.startswith(".")
        ]

    def media_names(self, family: Family, windows: Sequence[Window]) -> list[str]:
        """Return the name of the cached media item for each training example."""
        what = [VERSION, family.model.family, self.encoder(family, "media"), *family.images]
        what += family.media_key
        files = [w.clip.files for w in windows]
        return [identity(*what, w.key, *map(self.content, f)) for w, f in zip(windows, files, strict=True)]

    def text_names(self, family: Family, words: Sequence[str | Path], dtype: torch.dtype) -> list[str]:
        """Return the name of the cached item for each text.

        A string in `words` is a caption. A path in `words` is a file with a precomputed text embedding.
        """
        what, encoder = [VERSION, family.model.family], self.encoder(family, "text")
        return [
            identity(*what, encoder, str(dtype), w)
            if isinstance(w, str)
            else identity(*what, "precomputed", precomputed.READER, self.content(w))
            for w in words
        ]


def ahead(jobs: Iterable[Callable[[], T]], workers: int) -> Iterator[T | Exception]:
    """Run jobs in background threads; yield the result or exception of each job, in order.

    Up to `workers` jobs run before the caller asks for their results. With 0 workers, each job runs in
    the calling thread.
    """

    def caught(job: Callable[[], T]) -> T | Exception:
        try:
            return job()
        except Exception as error:
            return error

    if workers == 0:
        yield from (caught(job) for job in jobs)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[T | Exception]] = []
        for job in jobs:
            waiting.append(pool.submit(caught, job))
            if len(waiting) > workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


@dataclass
class Built:
    """Result of filling the cache: numbers of new and reused items, and error messages by clip path."""

    made: int = 0
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)


Advance = Callable[[int], None]


def build_media(
    cache: Cache,
    family: Family,
    windows: Sequence[Window],
    names: Sequence[str],
    *,
    device: torch.device,
    workers: int,
    advance: Advance,
) -> Built:
    """Encode the training windows that are not in the cache.

    Latents are stored as float16, which is more precise than bfloat16; integer pixels are stored unchanged.
    Clips that cannot be read or encoded are recorded in `Built.failed`.

    Raises:
        ValueError: if the cache cannot be written. Items already written stay valid; run again to continue.
    """
    missing = [i for i, name in enumerate(names) if not cache.has("media", name)]
    built = Built(reused=len(names) - len(missing))
    advance(built.reused)
    if not missing:
        return built
    pixels = ahead((windows[i].read for i in missing if not windows[i].clip.embedding), workers)
    encoder = None
    for i in missing:
        window = windows[i]
        try:
            if window.clip.embedding:
                item = precomputed.read_item(family, window.clip.latents)
            else:
                frames = next(pixels)
                if isinstance(frames, Exception):
                    raise frames
                encoder = encoder or family.load_media_encoder(device)
                item = family.encode_media(encoder, frames)
            wrong = [k for k, v in item.items() if not torch.isfinite(v).all()]
            if wrong:
                raise ValueError(f"NaN or infinite values in {', '.join(wrong)}")
        except (OSError, ValueError) as error:
            built.failed[str(window.clip.path)] = str(error)
        else:
            item = {k: v.half() if v.is_floating_point() else v for k, v in item.items()}
            about = {
                "clip": window.clip.name,
                "window": json.dumps(window.key, default=str),
                "checkpoint": family.model.checkpoint,
            }
            with _writing(cache.folder, built, len(names)):
                cache.write("media", names[i], item, about)
        advance(1)
    return built


def build_text(
    cache: Cache,
    family: Family,
    words: Sequence[str | Path],
    names: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    advance: Advance,
) -> Built:
    """Encode the captions that are not in the cache, and store the text embeddings.

    Args:
        cache: cache that stores the embeddings.
        family: model family of the text encoder.
        words: captions, or paths of files with precomputed text embeddings.
        names: names of the cached items, one per entry of `words`.
        device: device of the text encoder.
        dtype: dtype of the text encoder.
        advance: function that is called with the number of newly finished items.

    Raises:
        ValueError: if the cache cannot be written. Items already written stay valid; run again to continue.
    """
    missing = [i for i, name in enumerate(names) if not cache.has("text", name)]
    built = Built(reused=len(names) - len(missing))
    advance(built.reused)
    if not missing:
        return built
    files, captions = ([i for i in missing if isinstance(words[i], kind)] for kind in (Path, str))
    encoder = family.load_text_encoder(device, dtype) if captions else None
    chunks = [captions[i : i + 8] for i in range(0, len(captions), 8)]
    for chunk in [*chunks, *([i] for i in files)]:
        given = [words[i] for i in chunk]
        texts = [w for w in given if isinstance(w, str)]
        paths = [w for w in given if isinstance(w, Path)]
        items = (
            family.encode_text(encoder, texts)
            if texts
            else [precomputed.read_text_item(family, p) for p in paths]
        )
        for i, word, item in zip(chunk, given, items, strict=True):
            about = {"caption": str(word), "checkpoint": family.model.checkpoint}
            with _writing(cache.folder, built, len(names)):
                cache.write("text", names[i], item, about)
        advance(len(chunk))
    return built


@contextmanager
def _writing(folder: Path, built: Built, total: int) -> Iterator[None]:
    """Count the item that the `with` block writes, and convert a write error to a ValueError.

    The error message states how many items are cached.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ValueError(
            f"{folder}: {'the disk is full' if full else 'cannot be written'} ({error.strerror}); "
            f"{built.made + built.reused} of {total} items are cached and kept. "
            f"{'Free space, or point' if full else 'Point'} data.cache to another disk, and run again"
        ) from None
    built.made += 1
