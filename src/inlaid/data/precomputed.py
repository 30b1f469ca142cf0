"""Precomputed latents from other trainers: convert `.pt` files to cache items, without a VAE or text encoder.

The keys in a file determine its format; the model family does not matter. Latents are stored as the mean and
log-variance of the VAE posterior: under the key `ldist` (finetrainers), under the keys `mean` and `logvar`
(genmo), or as a bare tensor. A text embedding has the keys `prompt_embeds` and `prompt_attention_mask`, or
the keys `y_feat` and `y_mask`, or is a bare tensor. `Family.precomputed` defines where the files are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlaid.families.base import Family
from inlaid.files import TorchFileError, load_torch
from inlaid.media.kinds import MediaError

if TYPE_CHECKING:
    from torch import Tensor


READER = 1
"""Version of the conversion, which is part of cache keys. Increase it when the same files give different
tensors."""

MOMENTS = (("ldist",), ("mean", "logvar"))

WIDTHS = ("text_dim", "text_embed_dim")
"""Configuration keys for the width of text embeddings. If a checkpoint has neither, the width is 4096
(T5-XXL)."""

TEXTS = (("prompt_embeds", "prompt_attention_mask"), ("y_feat", "y_mask"))


def inspect_item(family: Family, latents: Sequence[Path], text: Path) -> tuple[int, int, int]:
    """Validate precomputed latents and return the frames, height and width of the clip.

    Raises:
        MediaError: if a file is damaged or does not fit the checkpoint; the message names the file.
    """
    _text(family, text)
    return _size(family, latents[0], _clips(family, latents)[0])


def read_item(family: Family, latents: Sequence[Path]) -> dict[str, Tensor]:
    """Convert the precomputed latents of a clip to the tensors that `encode_media` would return.

    Args:
        family: model family.
        latents: latent files of the clip, as in `Clip.latents`.

    Raises:
        MediaError: if a file is damaged or does not fit the checkpoint; the message names the file.
    """
    moments = _clips(family, latents)
    shapes = family.stored(
        *_size(family, latents[0], moments[0])
    )  # repeated encodings of an image are stored once
    return {name: m.float().expand(shapes[name]).clone() for name, m in zip(shapes, moments, strict=True)}


def _clips(family: Family, latents: Sequence[Path]) -> list[Tensor]:
    """Return the VAE moments (means and log-variances) of a training example.

    Without joint alpha, these are the moments of the clip, followed by those of each conditioning image. With
    joint alpha, color and alpha are two clips, and the moments of both are returned. Color and alpha are
    stored in two files, or concatenated along time in one file.
    """
    clip, *others = (_moments(family, path) for path in latents)
    two = family.single is not family
    if two and not others:
        if clip.shape[1] % 2:
            raise _unfit(
                latents[0], f"has {clip.shape[1]} latent frames: color and alpha need an even number"
            )
        return list(clip.chunk(2, 1))
    wanted = clip.shape if two else (clip.shape[0], 1, *clip.shape[2:])
    for path, found in zip(latents[1:], others, strict=True):
        if found.shape != wanted:
            whose = "the color latents are" if two else "one frame of the clip is"
            raise _unfit(path, f"latents are {_by(found.shape)}, but {whose} {_by(wanted)}")
    return [clip, *others]


def read_text_item(family: Family, path: Path) -> dict[str, Tensor]:
    """Convert a precomputed text embedding to the tensor `text` (n, d) that `encode_text` would return.

    Raises:
        MediaError: if the file is damaged, does not fit the checkpoint, or contains NaN or infinite values.
    """
    import torch

    text = _text(family, path)
    if not torch.isfinite(text).all():
        raise MediaError(path, "contains NaN or infinite values")
    return {"text": text.clone()}


def _text(family: Family, path: Path) -> Tensor:
    """Read a text embedding (n, d), without the tokens that its mask excludes."""
    text, *mask = _parts(path, TEXTS, "a text embedding")
    text = text[0] if text.ndim == 3 and len(text) == 1 else text
    settings = family.read_config(family.component) or {}
    width, most = next((settings[k] for k in WIDTHS if k in settings), 4096), family.text_length
    if text.ndim != 2 or text.shape[1] != width or not 0 < len(text) <= most:
        raise _unfit(
            path, f"text embedding is {_by(text.shape)}, the checkpoint accepts at most {most} x {width}"
        )
    if not mask and len(text) != most:
        raise _unfit(path, f"text embedding has {len(text)} of {most} tokens and no mask")
    if mask:
        flags = mask[0].flatten().bool()
        if len(flags) != len(text):
            raise _unfit(path, f"mask has {len(flags)} entries for {len(text)} tokens")
        text = text[flags]
    return text


def _moments(family: Family, path: Path) -> Tensor:
    """Read the means and log-variances of the VAE posterior: (2 * z, t, h, w)."""
    import torch

    parts = _parts(path, MOMENTS, "latents")
    parts = [p[0] if p.ndim == 5 and len(p) == 1 else p for p in parts]
    if len({p.shape for p in parts}) > 1:
        raise _unfit(path, f"means are {_by(parts[0].shape)}, but variances {_by(parts[1].shape)}")
    moments = parts[0] if len(parts) == 1 else torch.cat(parts)
    channels = 2 * family.shapes(family.grid.offset, family.grid.spatial, family.grid.spatial)["latents"][0]
    if moments.ndim != 4 or moments.shape[0] != channels:
        raise _unfit(path, f"latents are {_by(moments.shape)}, the checkpoint needs {channels} channels")
    return moments


def _size(family: Family, path: Path, moments: Tensor) -> tuple[int, int, int]:
    """Return the number of frames, height and width of a clip, computed from the shape of its latents."""
    grid, family = family.grid, family.single
    _, there, *latent = moments.shape
    _, _, h, w = family.shapes(grid.offset, grid.spatial, grid.spatial)["latents"]
    height, width = (n * grid.spatial // unit for n, unit in zip(latent, (h, w), strict=True))
    lengths = (grid.offset + grid.temporal * k for k in range(there + 1))
    frames = next((n for n in lengths if family.shapes(n, height, width)["latents"][1] == there), None)
    if frames is None:
        raise _unfit(
            path, f"no clip has {there} latent frames: clip lengths are {grid.temporal}n+{grid.offset}"
        )
    wrong = grid.problems(frames, height, width)
    if wrong:
        raise _unfit(path, wrong[0])
    return frames, height, width


def _parts(path: Path, known: Sequence[Sequence[str]], what: str) -> list[Tensor]:
    """Read tensors from a torch file, which contains either one tensor or a mapping from keys to tensors.

    Args:
        path: torch file.
        known: alternative lists of keys. The first list whose keys are all in the file is used.
        what: expected content of the file, for messages.

    Raises:
        MediaError: if the file contains neither a tensor nor all keys of one list.
    """
    from torch import Tensor

    content = _load(path)
    if isinstance(content, Tensor):
        return [content]
    if not isinstance(content, Mapping):
        raise MediaError(path, f"is not {what}: it contains a {type(content).__name__}, not tensors")
    for names in known:
        if all(n in content for n in names):
            parts = [content[n] for n in names]
            parts = [p[0] if isinstance(p, (list, tuple)) and len(p) == 1 else p for p in parts]
            tensors = [p for p in parts if isinstance(p, Tensor)]
            if len(tensors) == len(names):
                return tensors
    there = ", ".join(map(str, content)) or "nothing"
    wanted = " or ".join(" + ".join(names) for names in known)
    raise MediaError(path, f"is not {what}: it contains {there}, expected {wanted}")


def _load(path: Path) -> Any:
    """Load a torch file with memory mapping, because some callers need only the shapes of the tensors."""
    try:
        return load_torch(path, mmap=True)
    except TorchFileError as error:
        raise MediaError(
            path, error.cause, "truncated" if error.code == "truncated" else "unreadable"
        ) from None


def _unfit(path: Path, cause: str) -> MediaError:
    return MediaError(path, cause, "unfitting")


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
