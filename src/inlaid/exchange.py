"""`inlaid export` and `inlaid import`: adapters between a run folder and other programs."""

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
    """Writes what a run has trained in another program's layout, and verifies it by reading it back.

    Args:
        run: run folder.
        to: `diffusers`, `comfyui`, `kohya` or `merged`; of a codec `wan-alpha` or `comfyui`.
        out: file or folder. Default: `export/` in the run.
        checkpoint: `step-000500`. Default: the run's adapter.
        then: a LoRA merged on top of what was trained, such as one that distils steps; for `merged`. A DoRA
            rescales the rows of whatever it is applied to, so it always comes first.

    Raises:
        ValueError: when the target is unknown or cannot hold it.
    """
    place = Run(run)
    settings = place.config()
    if isinstance(settings.tuner, config.Codec):
        return _export_codec(place, settings, to, out, checkpoint)
    if to not in get_args(formats.Target):
        raise ValueError(f"--to: `{to}` is not one of {', '.join(get_args(formats.Target))}")
    if then is not None and (to != "merged" or settings.tuner.kind not in ("lora", "dora")):
        raise ValueError(
            "--then: only LoRA and DoRA runs that are exported with --to merged take another on top"
        )
    family = alpha.family(settings)
    folder = generate.trained(place, checkpoint, family)
    target = out or run / "export" / (f"{run.name}-{to}.safetensors" if to in ("comfyui", "kohya") else to)
    if target.exists():
        raise ValueError(f"{target} exists; name another with --out")
    if settings.tuner.kind == "full":
        if to not in ("diffusers", "merged"):
            raise ValueError(f"--to: a full fine-tune has no adapter to write for {to}; use `merged`")
        with atomic(target) as temporary:
            shutil.copytree(folder, temporary)
        return target
    if settings.tuner.kind in lycoris.KINDS:
        base = family.load_denoiser(torch.float32) if to == "merged" else None
        return lycoris.export(folder, to, target, base)
    network = family.load_denoiser(torch.float32, meta=True)
    parts = formats.companions(network)
    if parts and to not in ("diffusers", "merged"):
        raise ValueError(f"--to: {to} has no place for {', '.join(parts)}; use `diffusers` or `merged`")
    adapter = formats.read(folder, family, shapes=formats.shapes(network))
    needed = to in ("merged", "kohya") or (to == "comfyui" and adapter.dora)
    base = family.load_denoiser(torch.float32) if needed else None
    if then is not None and base is not None:
        formats.merge(base, adapter)
        adapter = formats.read(then, family, shapes=formats.shapes(base), base=base)
        if adapter.dora:
            raise ValueError(
                f"--then: {then} is a DoRA, which rescales the rows of what it is applied to and so comes "
                "first; merge it into the base, and train on that"
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
    """Writes the codec of a run that trained one in published layouts."""
    family = alpha.family(settings)
    folder = (place.checkpoint(checkpoint) if checkpoint else place.folder) / "codec"
    target = out or place.folder / "export" / to
    if target.exists():
        raise ValueError(f"{target} exists; name another with --out")
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
    """Rewrites an adapter of any known layout as one that diffusers loads.

    Args:
        adapter: file or folder.
        out: folder to write; of an RGBA VAE's file a codec.
        family: name of a model family.
        checkpoint: base network; checks the shapes, and is needed where a file's numbers are relative to it.
        alpha: where the file has none.
        dora_scale: `comfyui` or `merged`, what a file's `dora_scale` is relative to.

    Returns:
        The file and what a user should know about it.

    Raises:
        ValueError: when it is damaged or unknown, or when anything of it would be lost.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--alpha: {alpha:g} is not a number above 0")
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
        raise ValueError(f"{out} exists and is not empty; name another folder")


def _convert_codec(path: Path, out: Path, family: str, checkpoint: str | None) -> tuple[Path, Sequence[str]]:
    """Rewrites the decoders or the whole VAE of a published codec as a codec's folder."""
    if checkpoint is None:
        raise ValueError(
            f"{path}: an RGBA VAE's file, which belongs to a checkpoint's VAE; name it with --checkpoint, "
            "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    _refuse_taken(out)
    base = families.get(family)(config.Model(family=family, checkpoint=checkpoint))
    codec.refuse(base)
    return out, rgba_files.convert(path, out, base.load("vae", torch.float32))
