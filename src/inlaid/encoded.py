"""Clips that another trainer has encoded: its `.pt` files become items of the cache without a VAE or T5.

What such a file holds is told by its names, whichever family it was made for: moments of the VAE as `ldist`
(finetrainers), as `mean` and `logvar` (genmo) or bare, and text as `prompt_embeds` with
`prompt_attention_mask`, as `y_feat` with `y_mask`, or bare. Where the files lie is `Family.encoded`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlaid.families.base import Family
from inlaid.media import MediaError, Trouble

if TYPE_CHECKING:
    from torch import Tensor

READER = 1
"""Version of what is made of the same files; part of the cache's identity."""

MOMENTS = (("ldist",), ("mean", "logvar"))
WIDTHS = ("text_dim", "text_embed_dim")
"""Keys of a network's configuration that hold the width of its text; T5-XXL's where it is silent."""
TEXTS = (("prompt_embeds", "prompt_attention_mask"), ("y_feat", "y_mask"))


def look(family: Family, latents: Sequence[Path], text: Path) -> tuple[int, int, int]:
    """Frames, height and width of an encoded clip, once it is sure that it can be used.

    Raises:
        MediaError: naming the file that is damaged or does not fit the checkpoint.
    """
    _text(family, text)
    return _size(family, latents[0], _clips(family, latents)[0])


def item(family: Family, latents: Sequence[Path]) -> dict[str, Tensor]:
    """An item as `encode_media` gives it, from the latents of a clip and of its images.

    Raises:
        MediaError: as `look`.
    """
    moments = _clips(family, latents)
    shapes = family.stored(
        *_size(family, latents[0], moments[0])
    )  # several encodings of an image are there once
    return {name: m.float().expand(shapes[name]).clone() for name, m in zip(shapes, moments, strict=True)}


def _clips(family: Family, latents: Sequence[Path]) -> list[Tensor]:
    """Moments of a clip and of its images; or of colour and alpha, from two files or joined in one."""
    clip, *others = (_moments(family, path) for path in latents)
    two = family.single is not family
    if two and not others:
        if clip.shape[1] % 2:
            raise _unfit(
                latents[0], f"its {clip.shape[1]} latent frames are not those of colour and of alpha"
            )
        return list(clip.chunk(2, 1))
    wanted = clip.shape if two else (clip.shape[0], 1, *clip.shape[2:])
    for path, found in zip(latents[1:], others, strict=True):
        if found.shape != wanted:
            whose = "those of its colour are" if two else "one frame of the clip has"
            raise _unfit(path, f"its latents are {_by(found.shape)}, {whose} {_by(wanted)}")
    return [clip, *others]


def words(family: Family, path: Path) -> dict[str, Tensor]:
    """An item as `encode_text` gives it: `text` (n, d).

    Raises:
        MediaError: as `look`.
    """
    import torch

    text = _text(family, path)
    if not torch.isfinite(text).all():
        raise MediaError(path, "holds numbers that are not finite")
    return {"text": text.clone()}


def _text(family: Family, path: Path) -> Tensor:
    """Embeddings (n, d), without those that are masked."""
    text, *mask = _parts(path, TEXTS, "an embedding of text")
    text = text[0] if text.ndim == 3 and len(text) == 1 else text
    settings = family.read_config(family.component) or {}
    width, most = next((settings[k] for k in WIDTHS if k in settings), 4096), family.text_length
    if text.ndim != 2 or text.shape[1] != width or not 0 < len(text) <= most:
        raise _unfit(path, f"its text is {_by(text.shape)}, the checkpoint reads at most {most} x {width}")
    if not mask and len(text) != most:
        raise _unfit(path, f"its text has {len(text)} of {most} tokens and no mask")
    if mask:
        flags = mask[0].flatten().bool()
        if len(flags) != len(text):
            raise _unfit(path, f"its mask has {len(flags)} places for {len(text)} tokens")
        text = text[flags]
    return text


def _moments(family: Family, path: Path) -> Tensor:
    """Means and log-variances (2 z, t, h, w)."""
    import torch

    parts = _parts(path, MOMENTS, "latents")
    parts = [p[0] if p.ndim == 5 and len(p) == 1 else p for p in parts]
    if len({p.shape for p in parts}) > 1:
        raise _unfit(path, f"its means are {_by(parts[0].shape)} and its variances {_by(parts[1].shape)}")
    moments = parts[0] if len(parts) == 1 else torch.cat(parts)
    channels = 2 * family.shapes(family.grid.offset, family.grid.spatial, family.grid.spatial)["latents"][0]
    if moments.ndim != 4 or moments.shape[0] != channels:
        raise _unfit(path, f"its latents are {_by(moments.shape)}, the checkpoint's have {channels} channels")
    return moments


def _size(family: Family, path: Path, moments: Tensor) -> tuple[int, int, int]:
    """The frames, height and width that latents stand for."""
    grid, family = family.grid, family.single
    _, there, *latent = moments.shape
    _, _, h, w = family.shapes(grid.offset, grid.spatial, grid.spatial)["latents"]
    height, width = (n * grid.spatial // unit for n, unit in zip(latent, (h, w), strict=True))
    lengths = (grid.offset + grid.temporal * k for k in range(there + 1))
    frames = next((n for n in lengths if family.shapes(n, height, width)["latents"][1] == there), None)
    if frames is None:
        raise _unfit(path, f"no clip has {there} latent frames: lengths are {grid.temporal}n+{grid.offset}")
    wrong = grid.problems(frames, height, width)
    if wrong:
        raise _unfit(path, wrong[0])
    return frames, height, width


def _parts(path: Path, known: Sequence[Sequence[str]], what: str) -> list[Tensor]:
    """The tensors of a file under one of the known sets of names, or the one that it is."""
    from torch import Tensor

    content = _load(path)
    if isinstance(content, Tensor):
        return [content]
    if not isinstance(content, Mapping):
        raise MediaError(path, f"is not {what}: it holds a {type(content).__name__}, not tensors")
    for names in known:
        if all(n in content for n in names):
            parts = [content[n] for n in names]
            parts = [p[0] if isinstance(p, (list, tuple)) and len(p) == 1 else p for p in parts]
            tensors = [p for p in parts if isinstance(p, Tensor)]
            if len(tensors) == len(names):
                return tensors
    there = ", ".join(map(str, content)) or "nothing"
    wanted = " or ".join(" + ".join(names) for names in known)
    raise MediaError(path, f"is not {what}: it holds {there}, not {wanted}")


def _load(path: Path) -> Any:
    """The content of a `.pt` file, which may hold tensors only."""
    from pickle import UnpicklingError

    import torch

    code: Trouble = "unreadable"
    try:
        whole = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            begun = file.read(4) == b"PK\x03\x04"
        if (begun and not whole) or not path.stat().st_size:
            raise MediaError(path, "is cut off", "truncated")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)  # a look reads little
    except UnpicklingError as error:
        text = str(error)
        refused = "GLOBAL" in text or "Unsupported" in text
        cause = "would run code when read, which is refused" if refused else "is not a file of torch.save"
    except EOFError:
        code, cause = "truncated", "is cut off"
    except (RuntimeError, OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, MediaError):
            raise
        cause = f"cannot be read ({(str(error).splitlines() or [type(error).__name__])[0][:120]})"
    raise MediaError(path, cause, code)


def _unfit(path: Path, cause: str) -> MediaError:
    return MediaError(path, cause, "unfitting")


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
