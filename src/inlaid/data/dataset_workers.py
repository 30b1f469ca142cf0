"""Writing of a prepared dataset: worker processes write clips, and the main process writes latents."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from inlaid.data.dataset_formats import (
    Cut,
    Target,
    Written,
    failed,
    latent_files,
    save_latents,
    save_text,
    write_cut,
)

if TYPE_CHECKING:
    from inlaid import config
    from inlaid.families.base import Family

TEXTS = 8
"""Number of captions that the text encoder encodes at once."""


def write_cuts(cuts: Sequence[Cut], out: Path, target: Target, crf: int, workers: int) -> Iterator[Written]:
    """Write cuts (windows of clips) in worker processes, and yield each result when it is finished.

    A worker process can die because a decoder crashes or memory is exhausted. The cuts in progress are then
    repeated one at a time. A cut during which a process dies again is reported as unreadable.

    Args:
        cuts: the windows to write.
        out: output folder.
        target: output format.
        crf: constant rate factor of color videos.
        workers: number of processes; 0 writes in this process.
    """
    if not workers:
        for cut in cuts:
            yield write_cut(cut, out, target, crf)
        return
    rest = {cut.name: cut for cut in cuts}
    while rest:
        suspects: list[Cut] = []
        for result in _pooled(list(rest.values()), out, target, crf, min(workers, len(rest)), suspects):
            del rest[result.name]
            yield result
        for cut in suspects:
            again: list[Cut] = []
            yield from _pooled([cut], out, target, crf, 1, again)
            if again:
                yield Written(cut.name, {}, "the process that read it died")
            del rest[cut.name]


def _pooled(
    cuts: Sequence[Cut], out: Path, target: Target, crf: int, workers: int, lost: list[Cut]
) -> Iterator[Written]:
    """Write cuts in a process pool, and yield each result when it is finished.

    A cut is a window of a clip that is to be written to files. If a worker process dies, the submitted cuts
    without a result are added to `lost`, and no more cuts are written.
    """
    cut: Cut | None
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin)
    waiting: dict[Future[Written], Cut] = {}
    todo = iter(cuts)
    try:
        while True:
            while len(waiting) < 2 * workers and (cut := next(todo, None)) is not None:
                waiting[pool.submit(write_cut, cut, out, target, crf)] = cut
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                result = future.result()
                del waiting[future]
                yield result
    except BrokenProcessPool:
        lost += list(waiting.values()) or ([cut] if cut else [])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Prepare a worker process: it ignores Ctrl-C, and exits when its parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode_cuts(
    settings: config.Config, family: Family, cuts: Sequence[Cut], out: Path, workers: int
) -> Iterator[Written]:
    """Write precomputed latents and text embeddings; yield each result when it is finished.

    Clips are read in threads, and encoded on the device that the recipe selects.

    Args:
        settings: recipe with model and device.
        family: model family. For joint alpha, color latents and alpha latents are concatenated along time.
        cuts: the windows to write.
        out: output folder.
        workers: number of threads that read clips.
    """
    import torch

    from inlaid.data.cache import ahead
    from inlaid.runs.launch import Devices, resolve_devices

    layout = family.single.precomputed
    assert layout is not None
    if not cuts:
        return
    place = resolve_devices(settings, Devices.here())
    device = torch.device(place.device)
    dtype = place.precision if device.type == "cuda" else torch.float32
    texts = list(dict.fromkeys(c.window.caption for c in cuts))
    encoder = family.load_text_encoder(device, dtype)
    words = {}
    for i in range(0, len(texts), TEXTS):
        chunk = texts[i : i + TEXTS]
        words |= dict(zip(chunk, (e["text"].cpu() for e in family.encode_text(encoder, chunk)), strict=True))
    del encoder
    vae = family.load_media_encoder(device)
    for cut, frames in zip(cuts, ahead((cut.read for cut in cuts), workers), strict=True):
        try:
            if isinstance(frames, Exception):
                raise frames
            item = family.encode_media(vae, frames)
            moments = torch.cat(list(item.values()), 1)
            if not torch.isfinite(moments).all():
                raise ValueError("the VAE returned NaN or infinite values")
        except (OSError, ValueError) as error:
            yield failed(cut, error)
            continue
        latents, text, _ = latent_files(out, layout, cut.name)
        save_text(text, layout, words[cut.window.caption], family.text_length)
        save_latents(latents, layout, moments)
        yield Written(cut.name, {p.relative_to(out).as_posix(): p.stat().st_size for p in (latents, text)})
