"""Conversion of adapters from other programs to the diffusers layout: `inlaid import`."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from inlaid import config, families
from inlaid.adapters import lycoris
from inlaid.adapters.adapter import KINDS, PEFT_WEIGHTS
from inlaid.adapters.dora_scale import DoraRule
from inlaid.adapters.factors import for_peft, update_of
from inlaid.adapters.hub_files import local_source
from inlaid.adapters.layers import layer_shapes, some_of
from inlaid.adapters.read import Lycoris, lora_of, read_any
from inlaid.adapters.source import Expert, locate, open_experts
from inlaid.adapters.write import export_adapter
from inlaid.alpha.rgba_vae import require_wan_vae
from inlaid.files import atomic
from inlaid.networks import rgba_vae_published
from inlaid.reading import reading


def import_adapter(
    adapter: Path,
    out: Path,
    family: str,
    checkpoint: str | None = None,
    alpha: float | None = None,
    dora_scale: str | None = None,
    expert: str | None = None,
    skip_missing: bool = False,
) -> tuple[Path, Sequence[str]]:
    """Convert an adapter in any known layout to the diffusers layout, or a published RGBA VAE to a folder.

    Args:
        adapter: file or folder of an adapter or RGBA VAE; or `OWNER/NAME` or `OWNER/NAME/FILE` on the Hugging
            Face Hub.
        out: folder to write. Adapters of two experts are written to its subfolders `high` and `low`.
        family: name of a model family.
        checkpoint: base model. If given, the shapes of the adapter are checked. Required for an RGBA VAE, and
            for an adapter whose update depends on the base model's weights. Such an adapter contains
            `dora_scale`, or complete biases or layers instead of changes to them.
        alpha: LoRA alpha for a file that does not store it.
        dora_scale: definition of `dora_scale` in the program that wrote the file: `comfyui` or `merged` (see
            `read_adapter`).
        expert: `high` or `low`: expert to import, if the file or the checkpoint has two experts.
        skip_missing: leave out layers that the checkpoint lacks, and return a note.

    Returns:
        The written path, and notes for the user.

    Raises:
        ValueError: if an option is invalid, if the file is damaged or has an unknown layout, or if a tensor
            cannot be converted.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--alpha: {alpha:g} is not a finite number above 0")
    for option, value, allowed in (
        ("--dora-scale", dora_scale, get_args(DoraRule)),
        ("--expert", expert, get_args(Expert)),
    ):
        if value not in (None, *allowed):
            raise ValueError(f"{option}: `{value}` is not {' or '.join(allowed)}")
    if skip_missing and checkpoint is None:
        raise ValueError(
            "--skip-missing: needs --checkpoint, whose layers are compared with those of the file"
        )
    kind = families.get(family)
    if checkpoint is None and not adapter.exists() and rgba_vae_published.named_like(adapter.name):
        raise ValueError(_NEEDS_BASE.format(adapter))  # before the download
    _refuse_taken(out)
    adapter = local_source(adapter)
    if rgba_vae_published.is_rgba_vae(adapter):
        return _import_rgba_vae(adapter, out, family, checkpoint)
    with reading(Path(adapter)):
        stated = [*open_experts(Path(adapter), alpha)]
    if expert is not None and checkpoint is None and stated == [None]:
        raise ValueError(
            "--expert: the file names no expert, so it only selects the one of a --checkpoint with two: pass "
            "that, or omit --expert"
        )
    found = [e for e in stated if expert is None or e in (None, expert)]
    options: dict[str, Any] = {"alpha": alpha, "dora_scale": dora_scale, "skip_missing": skip_missing}
    if len(found) < 2:
        one = found[0] if found else None
        return _import_one(Path(adapter), out, kind, checkpoint, expert or one, options)
    notes: list[str] = []
    with atomic(out) as folder:
        folder.mkdir()
        for each in found:
            _, more = _import_one(Path(adapter), folder / str(each), kind, checkpoint, each, options)
            notes += [f"{each}: {note}" for note in more]
    return out, [f"adapters of two experts, in the folders {' and '.join(map(str, found))}", *notes]


_NEEDS_BASE = (
    "{}: an RGBA VAE, which extends the VAE of a checkpoint; pass it with --checkpoint, such as "
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
)


def _import_one(
    path: Path,
    out: Path,
    kind: type[families.Family],
    checkpoint: str | None,
    expert: str | None,
    options: Mapping[str, Any],
) -> tuple[Path, Sequence[str]]:
    """Convert the adapter of one network, and return the written path and notes for the user."""
    shapes, load = _network(kind, checkpoint, expert)
    found = read_any(path, kind, shapes=shapes, base=load, expert=expert, **options)
    notes = list(found.notes)
    if expert is not None:
        how = ": load it with load_into_transformer_2=True" if expert == "low" else ""
        notes.append(f"adapter of the {expert}-noise expert{how}")
    if isinstance(found, Lycoris):
        names = sorted({f.kind for f in found.layers.values()})
        written = _write_lycoris(found, out, kind, shapes)
        what = f"{some_of(KINDS[n] for n in names)}, {len(found.layers)} layers"
        if written is not None:
            return written, [f"{found.layout}: {what}, alpha from {found.alpha_from}", *notes]
        notes.append(f"{what}: peft cannot represent these layers in one adapter")
        found = lora_of(found, shapes)
        notes.append(found.notes[-1])
    if not found.modules:
        raise ValueError(f"{path}: no layer with factors")
    written = export_adapter(found, "diffusers", out, family=kind)
    notes += _copy_companions(path, out)
    layers = f"{len(found.modules)} layers, rank {some_of(sorted(set(found.rank.values())), 6)}"
    first = f"{found.layout}: {layers}, {'DoRA' if found.dora else 'LoRA'}, alpha from {found.alpha_from}"
    return written, [first, *notes]


def _network(
    kind: type[families.Family], checkpoint: str | None, expert: str | None
) -> tuple[dict[str, tuple[int, ...]] | None, Callable[[], nn.Module] | None]:
    """Return the layer shapes of a checkpoint, and a function that loads its network.

    The function loads the network only once. Both results are None if `checkpoint` is None.
    """
    if checkpoint is None:
        return None, None
    name = next(n for n in families.names() if families.get(n) is kind)
    try:
        family = kind(config.Model(family=name, checkpoint=checkpoint, expert=expert))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error).replace("model.expert: ", "--expert: ")) from None
    shapes = layer_shapes(family.load_denoiser(torch.float32, meta=True))
    return shapes, cache(lambda: family.load_denoiser(torch.float32))


def _write_lycoris(
    found: Lycoris, out: Path, kind: type[families.Family], shapes: Mapping[str, tuple[int, ...]] | None
) -> Path | None:
    """Write a LoKr or LoHa adapter for peft and diffusers; return None if peft cannot represent it."""
    kinds = {f.kind for f in found.layers.values()}
    convolution = any(
        len((shapes or {}).get(m, ())) > 2 or any(re.fullmatch(c, m) for c in kind.convolutions)
        for m in found.layers
    )
    if len(kinds) > 1 or kinds == {"lora"} or convolution:
        return None
    made = for_peft(found.layers, next(iter(kinds)))  # type: ignore[arg-type]
    if made is None:
        return None
    with atomic(out) as folder:
        path = lycoris.write(folder, *made, metadata=found.header)
        again = read_any(path, kind, shapes=shapes)
        assert isinstance(again, Lycoris) and again.layers.keys() == found.layers.keys(), "layers were lost"
        for module, factors in found.layers.items():
            one, two = update_of(factors), update_of(again.layers[module])
            limit = 1e-5 * one.abs().max().item()
            assert (one - two).abs().max().item() <= limit, f"{module} differs after writing"
    return out / path.name


def _copy_companions(path: Path, out: Path) -> list[str]:
    """Copy the subfolders that contain adapters of image encoders, and return notes for the user."""
    names = sorted(p.parent.name for p in locate(path).parent.glob(f"*/{PEFT_WEIGHTS}"))
    for name in names:
        with atomic(out / name) as folder:
            shutil.copytree(locate(path).parent / name, folder)
    return [f"copied the adapters of {some_of(names)} unchanged"] if names else []


def _refuse_taken(out: Path) -> None:
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"{out} exists and is not empty; choose another folder")


def _import_rgba_vae(
    path: Path, out: Path, family: str, checkpoint: str | None
) -> tuple[Path, Sequence[str]]:
    """Convert a published RGBA VAE (decoders or whole VAE) to a folder in inlaid's layout."""
    if checkpoint is None:
        raise ValueError(_NEEDS_BASE.format(path))
    base = families.get(family)(config.Model(family=family, checkpoint=checkpoint))
    require_wan_vae(base)
    return out, rgba_vae_published.convert(path, out, base.load("vae", torch.float32))
