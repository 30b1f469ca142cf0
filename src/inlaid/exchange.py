"""Commands `inlaid export` and `inlaid import`: adapters and RGBA VAEs to and from other programs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from inlaid import alpha, config, families, formats, generate, lycoris
from inlaid.alpha import codec
from inlaid.files import atomic
from inlaid.models import rgba_codec, rgba_files
from inlaid.runtime import Run


def export(
    run: Path, to: str, out: Path | None = None, checkpoint: str | None = None, then: Path | None = None
) -> Path:
    """Export the trained weights of a run to another program's layout, and verify them by reading them back.

    Args:
        run: run folder.
        to: `diffusers`, `comfyui`, `kohya` or `merged`; for an RGBA VAE `wan-alpha` or `comfyui`.
        out: file or folder. Default: `export/` in the run.
        checkpoint: checkpoint name such as `step-000500`. Default: the final weights of the run.
        then: LoRA to merge after the trained weights, such as a step-distillation LoRA; only for `merged`. A
            DoRA rescales the rows of the weights it is applied to, so it must come first.

    Raises:
        ValueError: if the target is unknown or cannot represent the weights.
    """
    place = Run(run)
    settings = place.config()
    if isinstance(settings.tuner, config.Codec):
        return _export_codec(place, settings, to, out, checkpoint)
    if to not in get_args(formats.Target):
        raise ValueError(f"--to: `{to}` is not one of {', '.join(get_args(formats.Target))}")
    if then is not None and (to != "merged" or settings.tuner.kind not in ("lora", "dora")):
        raise ValueError("--then: requires a LoRA or DoRA run and --to merged; export without --then")
    family = alpha.family(settings)
    folder = generate.trained(place, checkpoint, family)
    target = out or run / "export" / (f"{run.name}-{to}.safetensors" if to in ("comfyui", "kohya") else to)
    if target.exists():
        raise ValueError(f"{target} already exists; choose another path with --out")
    if settings.tuner.kind == "full":
        if to not in ("diffusers", "merged"):
            raise ValueError(f"--to: full fine-tuning has no adapter to export to {to}; use `merged`")
        with atomic(target) as temporary:
            shutil.copytree(folder, temporary)
        return target
    if settings.tuner.kind in lycoris.KINDS:
        base = family.load_denoiser(torch.float32) if to == "merged" else None
        return lycoris.export(folder, to, target, base)
    network = family.load_denoiser(torch.float32, meta=True)
    parts = formats.companions(network)
    if parts and to not in ("diffusers", "merged"):
        raise ValueError(f"--to: {to} cannot represent {', '.join(parts)}; use `diffusers` or `merged`")
    adapter = formats.read(folder, family, shapes=formats.shapes(network))
    needed = to in ("merged", "kohya") or (to == "comfyui" and adapter.dora)
    base = family.load_denoiser(torch.float32) if needed else None
    if then is not None and base is not None:
        formats.merge(base, adapter)
        adapter = formats.read(then, family, shapes=formats.shapes(base), base=base)
        if adapter.dora:
            raise ValueError(
                f"--then: {then} is a DoRA, which rescales the rows of the weights it is applied to and must "
                "come first; merge it into the base model, and train on the result"
            )
    if not parts:
        return formats.export(adapter, to, target, family=family, base=base)  # type: ignore[arg-type]
    own = {n: formats.read(folder / n, family, shapes=formats.shapes(p)) for n, p in parts.items()}
    with atomic(target) as whole:
        for name, part in own.items():
            if base is None:
                shutil.copytree(folder / name, whole / name)
                continue
            encoder: Any = base.get_submodule(name)
            formats.merge(encoder, part)
            encoder.save_pretrained(whole / name)
            delattr(base, name)
        main = whole / family.component if base is not None else whole
        formats.export(adapter, to, main, family=family, base=base)  # type: ignore[arg-type]
    return target


def _export_codec(
    place: Run, settings: config.Config, to: str, out: Path | None, checkpoint: str | None
) -> Path:
    """Export the RGBA VAE of a run in the published layouts."""
    family = alpha.family(settings)
    folder = (place.checkpoint(checkpoint) if checkpoint else place.folder) / "codec"
    target = out or place.folder / "export" / to
    if target.exists():
        raise ValueError(f"{target} already exists; choose another path with --out")
    trained = rgba_codec.load(folder, family.load("vae", torch.float32))
    return rgba_files.export(trained, to, target)


def convert(
    adapter: Path,
    out: Path,
    family: str,
    checkpoint: str | None = None,
    alpha: float | None = None,
    dora_scale: str | None = None,
) -> tuple[Path, Sequence[str]]:
    """Convert an adapter of any known layout to diffusers, or a published RGBA VAE to a folder.

    Args:
        adapter: file or folder.
        out: folder to write: an adapter, or an RGBA VAE if the file is one.
        family: name of a model family.
        checkpoint: base model; used to check shapes, and required if values in the file are relative to it.
        alpha: alpha for files that store none.
        dora_scale: `comfyui` or `merged`: the norm that the file's `dora_scale` is relative to.

    Returns:
        The written path, and notes for the user.

    Raises:
        ValueError: if the file is damaged or unknown, or if a tensor would be lost.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--alpha: {alpha:g} is not a finite number above 0")
    if dora_scale not in (None, *get_args(formats.DoraRule)):
        rules = " or ".join(get_args(formats.DoraRule))
        raise ValueError(f"--dora-scale: `{dora_scale}` is not {rules}")
    kind = families.get(family)
    if rgba_files.is_codec(adapter):
        return _convert_codec(adapter, out, family, checkpoint)
    base = (
        kind(config.Model(family=family, checkpoint=checkpoint)).load_denoiser(torch.float32)
        if checkpoint
        else None
    )
    _refuse_taken(out)
    found = formats.read(
        adapter,
        kind,
        alpha=alpha,
        shapes=formats.shapes(base) if base else None,
        base=base,
        dora_scale=dora_scale,  # type: ignore[arg-type]
    )
    path = formats.export(found, "diffusers", out, family=kind, base=base)
    layers = f"{len(found.modules)} layers, rank {', '.join(map(str, sorted(set(found.rank.values()))))}"
    return path, [
        f"{found.layout}: {layers}, {'DoRA' if found.dora else 'LoRA'}, alpha from {found.alpha_from}",
        *found.notes,
    ]


def _refuse_taken(out: Path) -> None:
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"{out} exists and is not empty; choose another folder")


def _convert_codec(path: Path, out: Path, family: str, checkpoint: str | None) -> tuple[Path, Sequence[str]]:
    """Convert the decoders or the whole VAE of a published RGBA VAE to a folder of inlaid."""
    if checkpoint is None:
        raise ValueError(
            f"{path}: an RGBA VAE, which extends the VAE of a checkpoint; pass it with --checkpoint, such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    _refuse_taken(out)
    base = families.get(family)(config.Model(family=family, checkpoint=checkpoint))
    codec.refuse(base)
    return out, rgba_files.convert(path, out, base.load("vae", torch.float32))
