"""Conversion of trained weights to the layouts of other programs, for `inlaid export`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlaid import config, families
from inlaid.adapters import lycoris, whole_model
from inlaid.adapters.layers import companions, layer_shapes
from inlaid.adapters.layouts import midi_folder
from inlaid.adapters.lycoris import KINDS
from inlaid.adapters.merge import merge_adapter
from inlaid.adapters.of_run import trained_folder
from inlaid.adapters.original_layers import folded
from inlaid.adapters.programs import PROGRAMS, canonical, loading, refusal, targets
from inlaid.adapters.read import read_adapter
from inlaid.adapters.write import export_adapter, write_network
from inlaid.alpha.opening import build_family
from inlaid.console import say
from inlaid.files import atomic
from inlaid.networks import rgba_vae_checkpoint, rgba_vae_published
from inlaid.runs.folder import Run, read_header


def export_run(
    run: Path,
    to: str,
    out: Path | None = None,
    checkpoint: str | None = None,
    then: Path | None = None,
    *,
    merge: bool = False,
    dtype: str | None = None,
    skip_missing: bool = False,
) -> Path:
    """Export the trained weights of a run to another program's layout, and verify the written file.

    Args:
        run: run folder.
        to: export target, such as `diffusers`, `comfyui`, `musubi` or `merged`. If the run trained an RGBA
            VAE: `wan-alpha` or `comfyui`.
        out: file or folder to write. Default: a path in the folder `export` of the run.
        checkpoint: name of a training checkpoint, such as `step-000500`. Default: the final weights.
        then: second LoRA, such as a step-distillation LoRA. It is merged after the trained weights, so it
            requires the export of a whole model. A DoRA is rejected, because it rescales rows of the weights
            and would have to be merged first.
        merge: merge the adapter into the model, and export the whole model in the layout `to`.
        dtype: dtype of a whole model: `float32`, `bfloat16` or `float16`. Default: that of the trained
            weights, or float32 for a merged adapter.
        skip_missing: leave out layers and parameters of `then` that the model lacks, and print a note.

    Returns:
        The path of the written file or folder.

    Raises:
        ValueError: if the target is unknown or cannot represent the weights, or if the output path exists.
    """
    place = Run(run)
    settings = place.config()
    if settings.rgba_vae is not None:
        return _export_rgba_vae(place, settings, to, out, checkpoint)
    if skip_missing and then is None:
        raise ValueError("--skip-missing: applies to the adapter of --then; leave it out")
    job = _Job.of(place, settings, to, merge=merge, dtype=dtype)
    if then is not None and (not job.whole or settings.tuner.kind not in ("lora", "dora")):
        raise ValueError(
            "--then: requires a LoRA or DoRA run, and a whole model (--to merged or --merge); export without "
            "--then"
        )
    folder = trained_folder(place, checkpoint, job.family)
    target = out or run / "export" / job.name(run.name)
    if target.exists():
        raise ValueError(f"{target} already exists; choose another path with --out")
    if not job.folder and target.suffix != job.suffix:
        if target.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            raise ValueError(
                f"--out: {to} reads a {job.suffix} file; choose a name that ends in {job.suffix}"
            )
        target = target / f"{to}{job.suffix}"
    written = _whole(job, folder, target, then, skip_missing) if job.whole else _adapter(job, folder, target)
    _explain(job, settings, written)
    return written


def export_targets(run: Path) -> str:
    """Return text that lists the export targets of a run, with and without `--merge`.

    Each line tells how to load the exported files, or why the export is not possible.
    """
    place = Run(run)
    settings = place.config()
    if settings.rgba_vae is not None:
        return "\n".join(f"  --to {to}: {text}" for to, text in rgba_vae_published.TARGETS.items())
    family, kind = build_family(settings), settings.tuner.kind
    lines = []
    for target in PROGRAMS:
        for merge in (False, True):
            if (merge and target == "merged") or (merge and kind == "full"):
                continue
            whole = merge or kind == "full" or target == "merged"
            reason = refusal(target, family, kind, whole=whole, joint=settings.alpha.kind == "joint")
            if reason and (merge or target not in targets(family)):
                continue
            job = _Job(family, kind, settings.model.expert, target, target, whole, None)
            path = Path("export", job.name(run.name))
            text = f"not possible: {reason}" if reason else loading(target, path, family, kind, whole=whole)
            lines.append(f"  --to {target}{' --merge' if merge else ''}: {text}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    """Settings of an export."""

    family: families.Family
    kind: str
    expert: str | None
    to: str
    target: str
    whole: bool
    dtype: torch.dtype | None

    @classmethod
    def of(cls, place: Run, settings: config.Config, to: str, *, merge: bool, dtype: str | None) -> _Job:
        """Check the options of an export, and return its settings.

        Raises:
            ValueError: if an option is invalid, or the target program cannot load the weights.
        """
        family, kind, target = build_family(settings), settings.tuner.kind, canonical(to)
        whole = merge or kind == "full" or target == "merged"
        joint = settings.alpha.kind == "joint"
        reason = refusal(to, family, kind, whole=whole, joint=joint)
        if reason:
            raise ValueError(f"--to: {reason}")
        if dtype is not None and (not whole or dtype not in DTYPES):
            what = f"`{dtype}` is not one of {', '.join(DTYPES)}" if whole else "adapters keep their dtype"
            raise ValueError(f"--dtype: {what}" + ("" if whole else "; use it with a whole model (--merge)"))
        return cls(
            family, kind, settings.model.expert, to, target, whole, None if dtype is None else DTYPES[dtype]
        )

    @property
    def folder(self) -> bool:
        """True if the export is a folder."""
        program = PROGRAMS[self.target]
        return program.whole_folder if self.whole else program.folder

    @property
    def suffix(self) -> str:
        """File suffix of the export. Not used if the export is a folder."""
        layout = self.family.joint_layout if self.target == "transpixeler" else None
        return ".pt" if layout and layout.torch_file else ".safetensors"

    def name(self, run: str) -> str:
        """Return the default name of the exported file or folder.

        If the network is one of two experts, a file name contains the expert, such as `high_noise`. Other
        programs look for it there.
        """
        expert = f"-{self.expert}_noise" if self.expert and f"{self.expert}_noise" not in run else ""
        if self.folder:
            return "merged" if self.whole and self.target == "diffusers" and self.kind != "full" else self.to
        return f"{run}{expert}-{self.to}{'-model' if self.whole else ''}{self.suffix}"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of an exported whole model."""


def _whole(job: _Job, folder: Path, target: Path, then: Path | None, skip_missing: bool) -> Path:
    """Export a whole model: the weights of full fine-tuning, or the base model with the adapter merged in."""
    family = job.family
    if job.kind == "full":
        if not job.folder:
            header = read_header(min(folder.glob("*.safetensors")))
            return _one_file(job, whole_model.read_folder(folder), target, header)
        if job.dtype is not None:
            return write_network(target, family.load_denoiser(job.dtype, folder=folder))
        with atomic(target) as temporary:
            shutil.copytree(folder, temporary)
        return target
    base = family.load_denoiser(torch.float32)
    header = read_header(min(folder.glob("*.safetensors")))
    if job.kind in KINDS:
        lycoris.merge(base, folder)
        return _written(job, base, target, header)
    parts = companions(base)
    adapter = read_adapter(folder, family, shapes=layer_shapes(base))
    own = {n: read_adapter(folder / n, family, shapes=layer_shapes(p)) for n, p in parts.items()}
    added = None
    if then is not None:  # read before merging: parts of it may be relative to the weights of the base model
        added = read_adapter(
            then,
            family,
            shapes=layer_shapes(base),
            base=base,
            expert=job.expert,
            merging=True,
            skip_missing=skip_missing,
        )
        if added.dora:
            raise ValueError(
                f"--then: {then} is a DoRA, which rescales the rows of the weights it is applied to and must "
                "come first; merge it into the base model, and train on the result"
            )
        for note in added.notes:
            say(f"note: {then.name}: {note}")
    merge_adapter(base, adapter)
    if added is not None:
        merge_adapter(base, added)
    if not own:
        return _written(job, base, target, header)
    with atomic(target) as whole:
        for name, part in own.items():
            encoder: Any = base.get_submodule(name)
            merge_adapter(encoder, part)
            encoder.save_pretrained(whole / name)
            delattr(base, name)
        _written(job, base, whole / family.component, header)
    return target


def _written(job: _Job, base: Any, target: Path, header: Mapping[str, str]) -> Path:
    """Write a network to a folder or a file, as the target requires."""
    if not job.folder:
        return _one_file(job, base.state_dict(), target, header)
    return write_network(target, base if job.dtype is None else base.to(job.dtype))


def _one_file(job: _Job, state: Mapping[str, Tensor], target: Path, header: Mapping[str, str]) -> Path:
    """Write a whole network to one safetensors file, with the tensor names of the model's original code."""
    extra = job.family.comfyui_tensors() if job.target == "comfyui" else {}
    kept = {k: v for k, v in header.items() if k.startswith("inlaid_")}
    return whole_model.write_original(target, state, job.family, extra=extra, dtype=job.dtype, header=kept)


def _adapter(job: _Job, folder: Path, target: Path) -> Path:
    """Export an adapter."""
    family = job.family
    network = family.load_denoiser(torch.float32, meta=True)
    parts = companions(network)
    if parts and job.target not in ("diffusers", "midi-3d"):
        raise ValueError(f"--to: {job.to} cannot represent {', '.join(parts)}; use `diffusers` or `merged`")
    if job.kind in KINDS:
        return lycoris.export(folder, job.target, target, family.original)
    adapter = folded(read_adapter(folder, family, shapes=layer_shapes(network)))
    own = {n: folded(read_adapter(folder / n, family, shapes=layer_shapes(p))) for n, p in parts.items()}
    weights = (adapter.dora and job.target == "comfyui") or (not adapter.dora and job.target == "wan-alpha")
    base = family.load_denoiser(torch.float32) if weights else network
    if job.target == "midi-3d":
        with atomic(target) as whole:
            say(f"settings for init_custom_adapter: {midi_folder(whole, adapter, own, adapter.header)}")
        return target
    if not parts:
        return export_adapter(adapter, job.to, target, family=family, base=base)
    with atomic(target) as whole:
        for name in own:
            shutil.copytree(folder / name, whole / name)
        export_adapter(adapter, job.to, whole, family=family)
    return target


def _explain(job: _Job, settings: config.Config, written: Path) -> None:
    """Print how to load the export in the target program, and which other files the program needs."""
    place = written.parent if job.folder and written.is_file() else written
    say(loading(job.to, place, job.family, job.kind, whole=job.whole))
    for note in job.family.export_notes(job.target, job.whole):
        say(f"note: {note}")
    if isinstance(settings.alpha, config.Merged) and job.target in ("comfyui", "wan-alpha"):
        vae = settings.alpha.vae
        files = {
            "comfyui": "both VAE files of `inlaid export VAE_RUN --to comfyui` (models/vae)",
            "wan-alpha": "the file `decoder.bin` of `inlaid export VAE_RUN --to wan-alpha` "
            "(--vae_lora_checkpoint)",
        }
        say(f"note: the latents are those of the RGBA VAE {vae}; to decode them, load {files[job.target]}")


def _export_rgba_vae(
    place: Run, settings: config.Config, to: str, out: Path | None, checkpoint: str | None
) -> Path:
    """Export the RGBA VAE of a run in the layout of a published RGBA VAE."""
    family = build_family(settings)
    folder = (place.checkpoint(checkpoint) if checkpoint else place.folder) / rgba_vae_checkpoint.FOLDER
    target = out or place.folder / "export" / to
    if target.exists():
        raise ValueError(f"{target} already exists; choose another path with --out")
    trained = rgba_vae_checkpoint.load(folder, family.load("vae", torch.float32))
    return rgba_vae_published.export(trained, to, target)
