"""Import and export of RGBA VAEs in the file layouts of Wan-Alpha.

An RGBA VAE extends a Wan VAE with a merge block and two low-rank updates of the decoder. The merge block
computes one latent from color and alpha. The decoder decodes color with one update, and alpha with the other.

The supported layouts are:

- `decoder.bin`: only the two updates. Tensor names start with `vae_fgr.` for color and `vae_pha.` for alpha.
- Whole VAE: the base weights, the merge block (prefix `middle.`) and the two updates. The updates are
  separate tensors or merged into the decoder weights.
- ComfyUI: two VAE files with merged updates and Wan's original tensor names. One file name contains
  `rgb_channel`, the other `alpha_channel`.

ComfyUI files are recognized by file name, the other layouts by tensor names. If a tensor of an update or of
the merge block is unknown, the import fails and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlaid.config.sections import ALPHA_EPS
from inlaid.files import TorchFileError, atomic, load_torch, save_torch
from inlaid.networks import rgba_vae_checkpoint
from inlaid.networks.rgba_vae import DecoderLora, RgbaVae, convolutions, merge_name, vae_name
from inlaid.networks.rgba_vae_checkpoint import FILES

GROUPS = {"vae_fgr": "rgb", "vae_pha": "alpha", "middle": "merge"}
"""Parts of an RGBA VAE, by prefix of the tensor names in published files."""

HALVES = ("rgb_channel", "alpha_channel")
"""Substrings that identify the two files for ComfyUI by name: the color VAE and the alpha VAE."""

RANK = 128
"""Largest rank of an update that is extracted from a merged decoder, equal to the rank of published
updates."""

VERSION_2 = re.compile(r"wan-alpha-v2[^/]*$|/models--[^/]*wan-alpha-v2[^/]*/", re.IGNORECASE)
"""Regular expression for paths of Wan-Alpha v2 files: the file name, or the repository in the Hub cache. The
tensors of v1 and v2 have the same names and shapes, so only the path tells them apart."""

NOISE_SHIFT = 0.05
"""Mean of the noise outside the subject, in training and sampling with Wan-Alpha v2."""

FOLDED_LEFT = 0.02
"""Largest accepted relative error of a layer when low-rank updates are extracted from merged weights.
Rounding to bfloat16 alone causes an error of 0.003."""


@dataclass(frozen=True)
class Found:
    """Contents of a file in a layout of Wan-Alpha, with the tensor names of `rgba_vae_checkpoint`."""

    layout: str
    parts: Mapping[str, Mapping[str, Tensor]]
    """Tensors by part and name. The parts `rgb` and `alpha` contain low-rank factors or merged decoder
    weights."""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the base VAE by diffusers name; empty if the file does not contain the base VAE."""
    notes: Sequence[str] = ()


def named_like(name: str) -> bool:
    """Return True if a file name looks like that of a published RGBA VAE; the file is not read."""
    return bool(re.search(r"^decoder\.bin$|wan.?alpha.*vae", name, re.IGNORECASE)) or any(
        half in name for half in HALVES
    )


def is_rgba_vae(path: Path) -> bool:
    """Return True if a file or folder looks like a published RGBA VAE.

    Only names are checked: the tensor names of a file, or the names of `.safetensors` files in a folder. An
    ordinary Wan VAE with the original tensor names also matches.
    """
    if path.is_dir():
        return any(half in p.name for half in HALVES for p in path.glob("*.safetensors"))
    if not path.is_file():
        return False
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except Exception:
            return False
    else:
        try:
            names = list(_state(path))
        except ValueError:
            return False
    return any(_group(n)[0] for n in names) or _folded(names)


def read(path: Path, residuals: int = 2) -> Found:
    """Read a published RGBA VAE.

    Args:
        path: published file; for ComfyUI, one of the two files or their folder.
        residuals: number of residual blocks per stage of the VAE.

    Raises:
        ValueError: if a file cannot be read, a decoder is missing, or a tensor is unexpected.
    """
    if path.is_dir() or any(half in path.name for half in HALVES):
        return _comfyui(path, residuals)
    state = _state(path)
    if _folded(list(state)):
        raise ValueError(
            f"{path}: a single merged decoder in the layout for ComfyUI, which has two files: put both into "
            "one folder, with `rgb_channel` and `alpha_channel` in their names, and import the folder"
        )
    return _grouped(path, state, residuals)


def _state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = load_torch(path)
    except Exception as error:
        cause = error.cause if isinstance(error, TorchFileError) else str(error).split("\n")[0][:120]
        raise ValueError(f"{path} cannot be read ({cause}); download it again") from None
    for key in ("state_dict", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a mapping of names to tensors, so it is no RGBA VAE file")
    return dict(state)


def _group(name: str) -> tuple[str, str]:
    """Split a tensor name after `vae_fgr`, `vae_pha` or `middle`; return this component and the rest.

    Text before the component is dropped. `middle` counts only if `block` follows. If the name has no such
    component, return "" and the whole name.
    """
    found = re.search(r"(?:^|\.)(vae_fgr|vae_pha|middle)\.(.+)$", name)
    if not found or (found[1] == "middle" and not found[2].startswith("block.")):
        return "", name
    return found[1], found[2]


def _folded(names: Sequence[str]) -> bool:
    return "decoder.conv1.weight" in names and "decoder.head.2.weight" in names


def _grouped(path: Path, state: Mapping[str, Tensor], residuals: int) -> Found:
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in GROUPS.values()}
    base: dict[str, Tensor] = {}
    whole: dict[str, dict[str, Tensor]] = {"rgb": {}, "alpha": {}}
    other, lost = [], []
    for name, tensor in state.items():
        group, rest = _group(name)
        if not group:
            other.append(name)
            continue
        if group == "middle":
            own = merge_name(rest)
        elif ".lora_" in rest:
            own = _factor_name(rest, residuals)
            tensor = tensor.flatten(1) if own and own.endswith("_B") else tensor
        else:
            own = vae_name(rest.replace(".conv3D", "").replace(".base_layer", ""), residuals)
            if own and own.startswith("decoder."):
                whole[GROUPS[group]][own.removeprefix("decoder.")] = tensor
            if own:
                base[own] = tensor
                continue
        if own is None:
            lost.append(name)
        else:
            parts[GROUPS[group]][own] = tensor.float()
    if lost:
        raise ValueError(f"{path}: {len(lost)} tensors match no part of an RGBA VAE, such as {lost[0]}")
    for part, weights in whole.items():
        if weights and not parts[part]:
            parts[part] = weights  # the update is merged into the weights
    groups = [g for g, part in GROUPS.items() if parts[part]]
    for one, two in (("vae_fgr", "vae_pha"), ("vae_pha", "vae_fgr")):
        if one not in groups:
            raise ValueError(
                f"{path}: a decoder is missing: it has {', '.join(groups) or 'no group that is known'}, but "
                f"no tensors {one}.*, and an RGBA VAE needs both decoders; download it again"
                if two in groups or parts["merge"]
                else f"{path}: no decoders (vae_fgr., vae_pha.); first tensor: {next(iter(state), 'nothing')}"
            )
    notes = [f"groups found: {', '.join(groups)}"]
    notes += [f"{len(other)} other tensors were ignored, such as {other[0]}"] if other else []
    if not parts["merge"]:
        notes.append(
            "no merge block (middle.): this RGBA VAE can decode; to encode, train a merge block with "
            "rgba_vae: {train: merge, init_from: THIS FOLDER}"
        )
    folded = whole["rgb"] is parts["rgb"]
    return Found("whole VAE" if parts["merge"] else "decoder.bin", parts, {} if folded else base, notes)


def _factor_name(rest: str, residuals: int) -> str | None:
    """Convert the name of a low-rank factor from Wan-Alpha's files to the name in `rgba_vae_checkpoint`.

    For example, `decoder.conv1.conv3D.lora_A.default.weight` becomes `conv_in.lora_A`. The result is None if
    the name is unknown.
    """
    found = re.fullmatch(r"decoder\.(.+?)(?:\.conv3D)?\.lora_([AB])(?:\.\w+)?\.weight", rest)
    own = vae_name(f"decoder.{found[1]}", residuals) if found else None
    return f"{own.removeprefix('decoder.')}.lora_{found[2]}" if own and found else None


def _comfyui(path: Path, residuals: int) -> Found:
    folder = path if path.is_dir() else path.parent
    parts: dict[str, dict[str, Tensor]] = {"merge": {}}
    for half, part in zip(HALVES, ("rgb", "alpha"), strict=True):
        files = sorted(p for p in folder.glob("*.safetensors") if half in p.name)
        if not path.is_dir():
            other = HALVES[1 - HALVES.index(half)]
            files = [p for p in files if p.name in (path.name, path.name.replace(other, half))]
        if len(files) != 1:
            what = "is missing" if not files else f"exists {len(files)} times"
            raise ValueError(
                f"{folder}: the file with `{half}` in its name {what}; an RGBA VAE needs both decoders, "
                "in one folder"
            )
        weights, lost = {}, []
        for name, tensor in _state(files[0]).items():
            own = vae_name(name, residuals)
            if own is None:
                lost.append(name)
            elif own.startswith("decoder."):
                weights[own.removeprefix("decoder.")] = tensor
        if lost or not weights:
            raise ValueError(
                f"{files[0]}: not a VAE under the original Wan names: unknown tensor {(lost or ['?'])[0]}"
            )
        parts[part] = weights
    note = (
        "no merge block in this layout: this RGBA VAE can decode; to encode, train a merge block with "
        "rgba_vae: {train: merge, init_from: THIS FOLDER}"
    )
    return Found("decoders for ComfyUI", parts, {}, [note])


def assemble(found: Found, vae: Any, where: str) -> tuple[RgbaVae, list[str]]:
    """Create an RGBA VAE from a published file and its base VAE.

    Returns:
        The RGBA VAE, and notes for the user.

    Raises:
        ValueError: if the shapes or ranks of the tensors are wrong, or `vae` is not the base VAE.
    """
    notes, own = list(found.notes), vae.state_dict()
    for name, tensor in found.base.items():
        if name not in own or own[name].numel() != tensor.numel():
            raise ValueError(
                f"{where}: made for another VAE: {name} has shape {list(tensor.shape)}; "
                "use another --checkpoint"
            )
        mine, given = own[name].float().flatten(), tensor.float().flatten()
        if (mine - given).norm() > 0.02 * mine.norm().clamp_min(1e-6):
            raise ValueError(
                f"{where}: made for another VAE: {name} is not the checkpoint's; use another --checkpoint"
            )
    if found.base:
        notes.append(f"{len(found.base)} weights of the base VAE are equal to those of the checkpoint")
    loras = {}
    for part, what in (("rgb", "color"), ("alpha", "alpha")):
        weights, label = found.parts[part], f"{where}: the {what} decoder"
        if any(n.endswith((".lora_A", ".lora_B")) for n in weights):
            loras[part] = rgba_vae_checkpoint.read_factors(vae.decoder, weights, label)
        else:
            loras[part], left = _apart(vae.decoder, weights, label)
            notes.append(
                f"the {what} decoder is merged: extracted an update of rank {RANK}, largest error {left:.2%}"
            )
    merge = rgba_vae_checkpoint.read_merge(vae, found.parts["merge"], f"{where}: the merge block")
    return RgbaVae(vae, merge, loras["rgb"], loras["alpha"]), notes


@torch.no_grad()
def _apart(decoder: nn.Module, weights: Mapping[str, Tensor], where: str) -> tuple[DecoderLora, float]:
    """Extract a low-rank update of a decoder from merged weights.

    Returns:
        The update, and its largest relative error over all layers.

    Raises:
        ValueError: if the tensors do not fit the decoder, or the error is too large.
    """
    own = decoder.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        what = [f"{len(missing)} tensors are missing, such as {missing[0]}"] if missing else []
        what += [f"{len(extra)} are unexpected, such as {extra[0]}"] if extra else []
        raise ValueError(f"{where} does not fit: {' and '.join(what)}")
    layers = {n: m.weight for n, m in convolutions(decoder)}
    rank = min(RANK, max(min(w.shape[0], w[0].numel()) for w in layers.values()))
    lora, worst = DecoderLora({n: w.shape for n, w in layers.items()}, rank), 0.0
    for name, tensor in weights.items():
        if tensor.numel() != own[name].numel():
            raise ValueError(
                f"{where}: {name} has shape {list(tensor.shape)}, this VAE needs {list(own[name].shape)}"
            )
        layer = name.removesuffix(".weight")
        if layer not in layers or not name.endswith(".weight"):
            mine, given = own[name].float().flatten(), tensor.float().flatten()
            if (mine - given).norm() > 0.02 * mine.norm().clamp_min(1e-6):
                raise ValueError(
                    f"{where}: {name} differs from the checkpoint's VAE, but updates do not change it: use "
                    "another --checkpoint"
                )
            continue
        i, goal = lora.names.index(layer), tensor.float().flatten(1)
        u, s, v = torch.linalg.svd(goal - own[name].float().flatten(1), full_matrices=False)
        k = min(rank, len(s))
        worst = max(worst, float(s[k:].norm() / goal.norm().clamp_min(1e-6)))
        root = (s[:k] * rank).sqrt()
        lora.a[i].zero_()
        lora.b[i].zero_()
        lora.a[i].flatten(1)[:k] = root[:, None] * v[:k]
        lora.b[i][:, :k] = u[:, :k] * root
    if worst > FOLDED_LEFT:
        raise ValueError(
            f"{where}: the merged weights are no update of rank {RANK} of the checkpoint's VAE (relative "
            f"error of a layer {worst:.0%}): use another --checkpoint"
        )
    return lora, worst


def convert(path: Path, out: Path, vae: Any) -> list[str]:
    """Convert a published RGBA VAE to the layout of inlaid, and write it to the folder `out`.

    Returns:
        Notes for the user.

    Raises:
        ValueError: if the file is incomplete or does not fit the base VAE `vae`.
    """
    found = read(path, vae.config.num_res_blocks)
    rgba_vae, notes = assemble(found, vae, str(path))
    parts = [part for part in FILES if found.parts[part]]
    about: dict[str, Any] = {"imported": {"layout": found.layout, "file": path.name}, "parts": parts}
    if VERSION_2.search(path.absolute().as_posix()):
        about["noise_shift"] = NOISE_SHIFT
        notes.append(
            f"Wan-Alpha v2: alpha.noise_shift is {NOISE_SHIFT} by default in recipes with this RGBA VAE, as "
            "in the published training"
        )
    name = rgba_vae_checkpoint.save(rgba_vae, out, alpha_eps=ALPHA_EPS, about=about)
    sizes = {p: sum(t.numel() for t in found.parts[p].values()) for p in parts}
    said = ", ".join(f"{p} {n:,} values" for p, n in sizes.items())
    return [f"{found.layout}: {said}; RGBA VAE {name}", *notes]


# --- export -----------------------------------------------------------------------------------------------


def original_names(residuals: int, stages: int) -> dict[str, str]:
    """Return a mapping from diffusers names to original names for the modules of a Wan VAE.

    Args:
        residuals: number of residual blocks per stage.
        stages: number of stages.
    """
    inside = [
        *(f"residual.{i}" for i in (0, 2, 3, 6)),
        "shortcut",
        "norm",
        "to_qkv",
        "proj",
        "resample.1",
        "time_conv",
    ]
    found = ["conv1", "conv2"]
    for part, block in (("encoder", "downsamples"), ("decoder", "upsamples")):
        found += [f"{part}.{n}" for n in ("conv1", "head.0", "head.2")]
        found += [f"{part}.middle.{i}.{n}" for i, n in product(range(3), inside)]
        found += [f"{part}.{block}.{i}.{n}" for i, n in product(range(stages * (residuals + 2)), inside)]
    return {own: name for name in found if (own := vae_name(name, residuals))}


def _original(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        out[f"{names[module]}.{kind}"] = tensor.detach().contiguous()
    return out


_MERGE = {
    **{f"res.{i}": f"block.middle.{2 * i}.residual" for i in range(3)},
    **{f"att.{i}": f"block.middle.{2 * i + 1}" for i in range(2)},
}

_INNER = {"norm1": "0", "conv1": "2", "norm2": "3", "conv2": "6"}


def _released(name: str) -> str:
    """Return the name of a `MergeBlock` parameter in Wan-Alpha's files, without the prefix `middle.`."""
    for own, released in (
        ("conv_in", "block.conv1"),
        ("norm_out", "block.head.0"),
        ("conv_out", "block.head.2"),
    ):
        if name.startswith(f"{own}."):
            return released + name[len(own) :]
    block, inner, kind = re.fullmatch(r"(\w+\.\d)\.(\w+)\.(\w+)", name).groups()  # type: ignore[union-attr]
    return f"{_MERGE[block]}.{_INNER.get(inner, inner)}.{kind}"


def decoder_layout(rgba_vae: RgbaVae) -> dict[str, Tensor]:
    """Return the low-rank updates of the color decoder and the alpha decoder, by tensor name.

    The names are those of Wan-Alpha's published file `decoder.bin`.
    """
    config: Any = rgba_vae.vae.config
    names = original_names(config.num_res_blocks, len(config.dim_mult))
    kinds = dict(convolutions(rgba_vae.vae.decoder))
    out = {}
    for group, lora in (("vae_fgr", rgba_vae.rgb), ("vae_pha", rgba_vae.alpha)):
        for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
            three = isinstance(kinds[name], nn.Conv3d)
            path = f"{group}.{names[f'decoder.{name}']}{'.conv3D' if three else ''}"
            out[f"{path}.lora_A.default.weight"] = a.detach().clone()
            out[f"{path}.lora_B.default.weight"] = b.detach().clone().view(*b.shape, *[1] * (a.ndim - 2))
    return out


def whole_layout(rgba_vae: RgbaVae) -> dict[str, Tensor]:
    """Return the tensors of an RGBA VAE in Wan-Alpha's layout for a whole VAE.

    The low-rank updates are not merged into the base weights. The base weights are stored twice, with the
    prefixes `vae_fgr.` (color) and `vae_pha.` (alpha). The merge block has the prefix `middle.`.
    """
    config: Any = rgba_vae.vae.config
    names = original_names(config.num_res_blocks, len(config.dim_mult))
    base = _original(rgba_vae.vae.state_dict(), names)
    out = {f"{group}.{n}": t.clone() for group in ("vae_fgr", "vae_pha") for n, t in base.items()}
    out |= decoder_layout(rgba_vae)
    return out | {
        f"middle.{_released(n)}": t.detach().clone() for n, t in rgba_vae.merge.state_dict().items()
    }


def folded_layout(rgba_vae: RgbaVae) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of two VAEs for ComfyUI: one decodes color, the other decodes alpha.

    The low-rank updates are merged into the decoders. The tensors have Wan's original names. The keys of the
    result are `rgb_channel` and `alpha_channel`.
    """
    config: Any = rgba_vae.vae.config
    names = original_names(config.num_res_blocks, len(config.dim_mult))
    out = {}
    for half, lora in zip(HALVES, (rgba_vae.rgb, rgba_vae.alpha), strict=True):
        changed = {f"decoder.{n}": t for n, t in lora.weights(rgba_vae.vae.decoder).items()}
        out[half] = _original({**rgba_vae.vae.state_dict(), **changed}, names)
    return out


TARGETS = {
    "wan-alpha": "Wan-Alpha's inference script: `--vae_lora_checkpoint decoder.bin`",
    "comfyui": "ComfyUI: copy both files to models/vae; two nodes Load VAE, one for color and one for alpha",
}
"""Values of the option `--to` that export an RGBA VAE."""


def export(rgba_vae: RgbaVae, to: str, out: Path) -> Path:
    """Export an RGBA VAE to a folder in a published layout, and verify the files by reading them back.

    Target `wan-alpha` writes the low-rank updates of both decoders to `decoder.safetensors`, and the whole
    RGBA VAE to `vae.safetensors`. It also writes the updates to `decoder.bin`, a torch file, because
    Wan-Alpha's script loads safetensors files only with newer versions of torch. Target `comfyui` writes two
    VAEs in bfloat16, one for color and one for alpha; the updates are merged into their decoders.

    Raises:
        ValueError: if the target is unknown.
    """
    from safetensors.torch import load_file, save_file

    if to not in TARGETS:
        raise ValueError(f"--to: an RGBA VAE can be exported to {' or '.join(TARGETS)}, not to `{to}`")
    if to == "comfyui":
        files = {
            f"vae_{half}": {n: t.bfloat16().contiguous() for n, t in tensors.items()}
            for half, tensors in folded_layout(rgba_vae).items()
        }
    else:
        files = {"decoder": decoder_layout(rgba_vae), "vae": whole_layout(rgba_vae)}
    with atomic(out) as folder:
        folder.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(tensors, folder / f"{name}.safetensors")
            again = load_file(folder / f"{name}.safetensors")
            assert again.keys() == tensors.keys() and all(
                torch.equal(again[n], t) for n, t in tensors.items()
            )
        if to == "wan-alpha":
            own = files["decoder"]
            save_torch(own, folder / "decoder.bin")
            again = load_torch(folder / "decoder.bin")
            assert again.keys() == own.keys() and all(torch.equal(again[n], t) for n, t in own.items())
    return out
