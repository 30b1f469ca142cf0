"""Conversion of adapters to and from the layouts of other programs: `inlaid export` and `inlaid import`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from inlaid import config, families
from inlaid.adapters import lycoris
from inlaid.adapters.layers import companions, layer_shapes
from inlaid.adapters.lycoris import KINDS
from inlaid.adapters.merge import merge_adapter
from inlaid.adapters.of_run import trained_folder
from inlaid.adapters.read import DoraRule, read_adapter
from inlaid.adapters.sources import local_source
from inlaid.adapters.write import Target, export_adapter
from inlaid.alpha.opening import build_family
from inlaid.alpha.rgba_vae import require_wan_vae
from inlaid.files import atomic
from inlaid.networks import rgba_vae_checkpoint, rgba_vae_published
from inlaid.runs.folder import Run


def export_run(
    run: Path, to: str, out: Path | None = None, checkpoint: str | None = None, then: Path | None = None
) -> Path:
    """Export the trained weights of a run in the layout of another program.

    Converted files are read back and verified. Fully fine-tuned networks, and LoKr and LoHa files for the
    target `diffusers`, are copied without conversion.

    Args:
        run: run folder.
        to: `diffusers`, `comfyui`, `kohya` or `merged`; for an RGBA VAE `wan-alpha` or `comfyui`.
        out: file or folder to write. Default: a path in the folder `export` of the run.
        checkpoint: name of a training checkpoint, such as `step-000500`. Default: the final weights.
        then: second LoRA, such as a step-distillation LoRA, which is merged after the trained weights. Valid
            only with `merged`. A DoRA is rejected, because it rescales the rows of the merged weights and
            must therefore be merged first.

    Returns:
        The path of the written file or folder.

    Raises:
        ValueError: if the target is unknown or cannot represent the weights, or `out` exists.
    """
    place = Run(run)
    settings = place.config()
    if settings.rgba_vae is not None:
        return _export_rgba_vae(place, settings, to, out, checkpoint)
    if to not in get_args(Target):
        raise ValueError(f"--to: `{to}` is not one of {', '.join(get_args(Target))}")
    if then is not None and (to != "merged" or settings.tuner.kind not in ("lora", "dora")):
        raise ValueError("--then: requires a LoRA or DoRA run and --to merged; export without --then")
    family = build_family(settings)
    folder = trained_folder(place, checkpoint, family)
    target = out or run / "export" / (f"{run.name}-{to}.safetensors" if to in ("comfyui", "kohya") else to)
    if target.exists():
        raise ValueError(f"{target} already exists; choose another path with --out")
    if settings.tuner.kind == "full":
        if to not in ("diffusers", "merged"):
            raise ValueError(f"--to: full fine-tuning has no adapter to export to {to}; use `merged`")
        with atomic(target) as temporary:
            shutil.copytree(folder, temporary)
        return target
    if settings.tuner.kind in KINDS:
        base = family.load_denoiser(torch.float32) if to == "merged" else None
        return lycoris.export(folder, to, target, base)
    network = family.load_denoiser(torch.float32, meta=True)
    parts = companions(network)
    if parts and to not in ("diffusers", "merged"):
        raise ValueError(f"--to: {to} cannot represent {', '.join(parts)}; use `diffusers` or `merged`")
    adapter = read_adapter(folder, family, shapes=layer_shapes(network))
    needed = to in ("merged", "kohya") or (to == "comfyui" and adapter.dora)
    base = family.load_denoiser(torch.float32) if needed else None
    if then is not None and base is not None:
        merge_adapter(base, adapter)
        adapter = read_adapter(then, family, shapes=layer_shapes(base), base=base)
        if adapter.dora:
            raise ValueError(
                f"--then: {then} is a DoRA, which rescales the rows of the weights it is applied to and must "
                "come first; merge it into the base model, and train on the result"
            )
    if not parts:
        return export_adapter(adapter, to, target, family=family, base=base)  # type: ignore[arg-type]
    own = {n: read_adapter(folder / n, family, shapes=layer_shapes(p)) for n, p in parts.items()}
    with atomic(target) as whole:
        for name, part in own.items():
            if base is None:
                shutil.copytree(folder / name, whole / name)
                continue
            encoder: Any = base.get_submodule(name)
            merge_adapter(encoder, part)
            encoder.save_pretrained(whole / name)
            delattr(base, name)
        main = whole / family.component if base is not None else whole
        export_adapter(adapter, to, main, family=family, base=base)  # type: ignore[arg-type]
    return target


def _export_rgba_vae(
    place: Run, settings: config.Config, to: str, out: Path | None, checkpoint: str | None
) -> Path:
    """Export the RGBA VAE that a run trained, in a layout of published RGBA VAEs."""
    family = build_family(settings)
    folder = (place.checkpoint(checkpoint) if checkpoint else place.folder) / rgba_vae_checkpoint.FOLDER
    target = out or place.folder / "export" / to
    if target.exists():
        raise ValueError(f"{target} already exists; choose another path with --out")
    trained = rgba_vae_checkpoint.load(folder, family.load("vae", torch.float32))
    return rgba_vae_published.export(trained, to, target)


def import_adapter(
    adapter: Path,
    out: Path,
    family: str,
    checkpoint: str | None = None,
    alpha: float | None = None,
    dora_scale: str | None = None,
) -> tuple[Path, Sequence[str]]:
    """Convert an adapter of another trainer to the diffusers layout, or import a published RGBA VAE.

    Args:
        adapter: file or folder of an adapter or RGBA VAE.
        out: folder to write.
        family: name of a model family.
        checkpoint: base model, to check shapes. Required for an RGBA VAE, and for a `dora_scale`, which is
            relative to the weights of the base model.
        alpha: LoRA alpha for files that store none.
        dora_scale: `comfyui` or `merged`, the definition of the file's `dora_scale` (see `read_adapter`).

    Returns:
        The written path, and messages for the user.

    Raises:
        ValueError: if the file is damaged, has an unknown layout, or has tensors that cannot be converted.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--alpha: {alpha:g} is not a finite number above 0")
    if dora_scale not in (None, *get_args(DoraRule)):
        rules = " or ".join(get_args(DoraRule))
        raise ValueError(f"--dora-scale: `{dora_scale}` is not {rules}")
    kind = families.get(family)
    _refuse_taken(out)
    if checkpoint is None and not adapter.exists() and rgba_vae_published.named_like(adapter.name):
        raise ValueError(_NEEDS_BASE.format(adapter))  # before the download
    adapter = local_source(adapter)
    if rgba_vae_published.is_rgba_vae(adapter):
        return _import_rgba_vae(adapter, out, family, checkpoint)
    base = (
        kind(config.Model(family=family, checkpoint=checkpoint)).load_denoiser(torch.float32)
        if checkpoint
        else None
    )
    found = read_adapter(
        adapter,
        kind,
        alpha=alpha,
        shapes=layer_shapes(base) if base else None,
        base=base,
        dora_scale=dora_scale,  # type: ignore[arg-type]
    )
    path = export_adapter(found, "diffusers", out, family=kind, base=base)
    layers = f"{len(found.modules)} layers, rank {', '.join(map(str, sorted(set(found.rank.values()))))}"
    return path, [
        f"{found.layout}: {layers}, {'DoRA' if found.dora else 'LoRA'}, alpha from {found.alpha_from}",
        *found.notes,
    ]


_NEEDS_BASE = (
    "{}: an RGBA VAE, which extends the VAE of a checkpoint; pass it with --checkpoint, such as "
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
)


def _refuse_taken(out: Path) -> None:
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"{out} exists and is not empty; choose another folder")


def _import_rgba_vae(
    path: Path, out: Path, family: str, checkpoint: str | None
) -> tuple[Path, Sequence[str]]:
    """Convert a published RGBA VAE, or its decoders alone, from a file to the folder layout of inlaid."""
    if checkpoint is None:
        raise ValueError(_NEEDS_BASE.format(path))
    base = families.get(family)(config.Model(family=family, checkpoint=checkpoint))
    require_wan_vae(base)
    return out, rgba_vae_published.convert(path, out, base.load("vae", torch.float32))
