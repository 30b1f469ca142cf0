"""`inlay export` and `inlay import`: adapters between a run folder and other programs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from inlay import alpha, config, families, formats, generate, lycoris
from inlay.files import atomic
from inlay.runtime import Run


def export(run: Path, to: str, out: Path | None = None, checkpoint: str | None = None) -> Path:
    """Writes what a run has trained in another program's layout, and verifies it by reading it back.

    Args:
        run: run folder.
        to: `diffusers`, `comfyui`, `kohya` or `merged`.
        out: file or folder. Default: `export/` in the run.
        checkpoint: `step-000500`. Default: the run's adapter.

    Raises:
        ValueError: when the target is unknown or cannot hold it.
    """
    if to not in get_args(formats.Target):
        raise ValueError(f"--to: `{to}` is not one of {', '.join(get_args(formats.Target))}")
    place = Run(run)
    settings = place.config()
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
    adapter = formats.read(
        folder, family, shapes=formats.shapes(family.load_denoiser(torch.float32, meta=True))
    )
    needed = to in ("merged", "kohya") or (to == "comfyui" and adapter.dora)
    base = family.load_denoiser(torch.float32) if needed else None
    return formats.export(adapter, to, target, family=family, base=base)  # type: ignore[arg-type]


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
        out: folder to write.
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
    base = (
        kind(config.Model(family=family, checkpoint=checkpoint)).load_denoiser(torch.float32)
        if checkpoint
        else None
    )
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"{out} exists and is not empty; name another folder")
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
