"""Writers of adapter files in the layouts of diffusers, ComfyUI and kohya, with verification of exports."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import METADATA_KEY, PEFT_WEIGHTS, WEIGHTS, Adapter
from inlaid.adapters.layers import base_layer, layer_shapes, row_norms, some_of
from inlaid.adapters.merge import effective_delta, layer_delta, merge_adapter
from inlaid.adapters.read import DORA_RULE_KEY, TENSOR_KEY, load_safetensors, read_adapter, split_block
from inlaid.files import atomic, save_file
from inlaid.networks.domain_embedding import EMBEDDING, NAME
from inlaid.networks.half_tokens import NOT_MERGEABLE

if TYPE_CHECKING:
    from inlaid.families import Family


Target = Literal["diffusers", "comfyui", "kohya", "merged"]

_CONFIG = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "lora_bias",
)


def write_diffusers(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a LoRA or DoRA file from which diffusers' `load_lora_weights` also restores LoRA alpha and ranks.

    The header contains only settings that change the output of the layers, because other releases of peft
    reject unknown settings.

    Args:
        folder: folder to write; created if missing.
        tensors: state dict from `get_peft_model_state_dict`.
        peft_config: `LoraConfig.to_dict()`.
        metadata: additional header entries.

    Returns:
        Path of the file, written atomically.

    Raises:
        ValueError: if there are no tensors, or diffusers cannot load a tensor.
        OSError: if the file cannot be written.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = TENSOR_KEY.fullmatch(key)
        if not match or match["part"] not in ("lora_A", "lora_B", "lora_magnitude_vector"):
            raise ValueError(f"`{key}` is no LoRA tensor: diffusers would reject the whole file")
        suffix = "" if match["part"] == "lora_magnitude_vector" else f".{match['leaf'] or 'weight'}"
        named[f"transformer.{match['module']}.{match['part']}{suffix}"] = tensor
    if not named:
        raise ValueError(f"{folder}: the adapter has no tensors; nothing was written")
    modules = {k.removeprefix("transformer.").split(".lora_")[0] for k in named}
    config = {k: peft_config[k] for k in _CONFIG if k in peft_config} | {"target_modules": sorted(modules)}
    assert bool(config.get("use_dora")) == any(k.endswith("_vector") for k in named), (
        "DoRA without magnitudes"
    )
    path = Path(folder) / WEIGHTS
    write_tensors(path, dict(sorted(named.items())), {**metadata, **adapter_header(config)})
    return path


def write_peft(
    folder: Path, tensors: Mapping[str, Tensor], peft_config: Mapping[str, Any], metadata: Mapping[str, str]
) -> Path:
    """Write an adapter that `peft.PeftModel.from_pretrained(network, folder)` loads.

    `load_adapter` of transformers (5.23) loads a LoRA from this folder, but ignores the magnitudes of a DoRA.

    Args:
        folder: folder to write; created if missing.
        tensors: state dict from `get_peft_model_state_dict`.
        peft_config: `LoraConfig.to_dict()`; only rank, LoRA alpha and `use_dora` are used.
        metadata: header entries of the weights file.

    Returns:
        Path of the weights file.
    """
    from peft import LoraConfig

    modules = sorted({k.split(".lora_")[0] for k in tensors})
    path = folder / PEFT_WEIGHTS
    named = {f"base_model.model.{k}": t for k, t in sorted(tensors.items())}
    write_tensors(path, named, metadata)
    config = {k: peft_config[k] for k in ("r", "lora_alpha", "use_dora")}
    made = LoraConfig(**config, inference_mode=True)
    made.target_modules = modules  # type: ignore[assignment]  # a set would be written in any order
    made.save_pretrained(str(folder))
    return path


def adapter_header(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the file header entry that contains a peft configuration in the form that diffusers reads."""
    packed = json.dumps({f"transformer.{k}": v for k, v in config.items()}, indent=2, sort_keys=True)
    return {METADATA_KEY: packed}


def export_adapter(
    adapter: Adapter,
    to: Target,
    out: str | Path,
    *,
    family: type[Family] | Family,
    base: nn.Module | None = None,
) -> Path:
    """Write an adapter for another program, and verify the result by reading it back.

    Args:
        adapter: adapter from `read_adapter`.
        to: `diffusers`: a folder with a LoRA or DoRA file. `comfyui`: a file with the original module names
            under `diffusion_model.`. `kohya`: a file with the module names of kohya and musubi-tuner, and
            zeros for untrained layers. `merged`: the whole network as a diffusers folder.
        out: file for `comfyui` and `kohya`, folder for `diffusers` and `merged`.
        family: model family that defines the module names.
        base: network without adapters; `merged` changes it in place. Required for `merged`, for a DoRA with
            `comfyui`, and for `kohya` if the sizes of untrained layers cannot be inferred.

    Returns:
        The path of the adapter file; for `merged`, the path of the folder.

    Raises:
        ValueError: if the target layout cannot represent the adapter, or `out` exists.
    """
    out = Path(out)
    if adapter.joint and to != "diffusers":
        raise ValueError(
            f"--to: {to} applies an adapter to all tokens. {NOT_MERGEABLE[0].upper()}{NOT_MERGEABLE[1:]}"
        )
    if to in ("comfyui", "kohya") and not family.original_names:
        name = (family if isinstance(family, type) else type(family)).__name__
        raise ValueError(f"--to: no {to} layout is known for {name}; use `diffusers` or `merged`")
    if to == "merged":
        if base is None:
            raise ValueError("merging requires the base model: pass base")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out}: already exists: choose a new folder")
        merge_adapter(base, adapter)
        return write_network(out, base)
    if to == "diffusers":
        taken = out.is_dir() and any(out.iterdir())  # the caller's temporary folder, with other parts
        with nullcontext(out) if taken else atomic(out) as folder:
            if adapter.vector is not None:
                write_tensors(folder / EMBEDDING, {NAME: adapter.vector}, adapter.header)
            path = write_diffusers(folder, adapter.tensors, adapter.peft_config(), adapter.header)
            _verify(adapter, read_adapter(path, family, base=base), base)
        return out / path.name
    path = out if out.suffix == ".safetensors" else out / f"{to}.safetensors"
    tensors = _comfyui(adapter, family, base) if to == "comfyui" else _kohya(adapter, family, base)
    rule = {DORA_RULE_KEY: "comfyui"} if adapter.dora else {}
    existed = path.parent.exists()
    try:
        with atomic(path) as part:
            write_tensors(part, tensors, {**adapter.header, **rule})
            _verify(adapter, read_adapter(part, family, base=base), base)
    except BaseException:
        if not existed:
            with suppress(OSError):
                path.parent.rmdir()
        raise
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and header metadata to a safetensors file, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    own = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    with atomic(path) as temporary:
        save_file(own, temporary, metadata={**header, "format": "pt"})


def _comfyui(adapter: Adapter, family: type[Family] | Family, base: nn.Module | None) -> dict[str, Tensor]:
    """Return an adapter's tensors for ComfyUI, with original module names and the LoRA alpha of each layer.

    ComfyUI multiplies W + s B A by dora_scale / ||W||, but DoRA multiplies it by m / ||W + s B A||. For equal
    results, dora_scale is m ||W|| / ||W + s B A||. The converters of diffusers support LoRA alpha only inside
    the transformer blocks. For layers outside the blocks, B is therefore multiplied by the scale s.
    """
    if adapter.dora and base is None:
        raise ValueError(
            "DoRA for ComfyUI is relative to the weights of the base model: pass base, or export as merged"
        )
    originals = {ours: original for original, ours in family.original_names}
    out: dict[str, Tensor] = {}
    for module in adapter.modules:
        stem, leaf = split_block(module)
        name, scale = f"diffusion_model.{stem}{originals.get(leaf, leaf)}", adapter.scale(module)
        a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        fold = not stem and scale != 1
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = a, b.float() * scale if fold else b
        if stem:
            out[f"{name}.alpha"] = torch.tensor(float(adapter.alpha[module]))
        if f"{module}.lora_B.bias" in adapter.tensors:
            out[f"{name}.diff_b"] = adapter.tensors[f"{module}.lora_B.bias"].float() * scale
        if adapter.dora and base is not None:
            weight = base_layer(base, module).weight.detach().float()
            magnitude = (
                adapter.tensors[f"{module}.lora_magnitude_vector"].to(weight.device).float().reshape(-1)
            )
            merged = weight + layer_delta(adapter, module).to(weight.device).reshape(weight.shape)
            out[f"{name}.dora_scale"] = (magnitude * row_norms(weight) / row_norms(merged)).unsqueeze(1)
    return out


def _kohya(adapter: Adapter, family: type[Family] | Family, base: nn.Module | None) -> dict[str, Tensor]:
    """Return an adapter's tensors for kohya, with factors of zero for untrained layers.

    The result covers all default target layers of every block up to the last trained block, because the
    converters of diffusers fail if one of these layers is missing.
    """
    if adapter.dora:
        raise ValueError("no other program reads DoRA in the kohya layout: export as merged or comfyui")
    if any(k.endswith(".bias") for k in adapter.tensors):
        raise ValueError("the kohya layout has no biases: export as comfyui")
    stem = next((s for s, _ in map(split_block, adapter.modules) if s), "")
    originals = {
        ours: original
        for original, ours in family.original_names
        if any(re.fullmatch(t, stem + ours) for t in family.targets)
    }
    blocks = stem.rstrip("0123456789.")
    last = max((int(s.split(".")[-2]) for s, _ in map(split_block, adapter.modules) if s), default=0)
    wanted = [f"{blocks}.{i}.{leaf}" for i in range(last + 1) for leaf in originals]
    outside = [m for m in adapter.modules if m not in wanted]
    if outside:
        raise ValueError(f"the kohya layout cannot represent {some_of(outside)}: export as comfyui")
    rank = Counter(adapter.rank.values()).most_common(1)[0][0]
    like = {split_block(m)[1]: _size(adapter, m) for m in adapter.modules}
    layers = layer_shapes(base) if base is not None else {}
    out: dict[str, Tensor] = {}
    for module in wanted:
        stem, leaf = split_block(module)
        name = f"lora_unet_{stem}{originals[leaf]}".replace(".", "_")
        if module in adapter.alpha:
            a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        else:
            size = layers.get(module) or like.get(leaf)
            if size is None:
                raise ValueError(
                    f"the kohya layout needs zeros for {module}, but its size is unknown: pass the base model"
                )
            a, b = torch.zeros(rank, size[1]), torch.zeros(size[0], rank)
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = a, b
        out[f"{name}.alpha"] = torch.tensor(float(adapter.alpha.get(module, rank)))
    return out


def _size(adapter: Adapter, module: str) -> tuple[int, int]:
    """Return the weight shape (out, in) of a layer, computed from its low-rank factors.

    For a convolution, `in` is the number of input channels times the kernel size.
    """
    a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    return b.shape[0], math.prod(a.shape[1:])


def write_network(out: Path, base: nn.Module) -> Path:
    """Write a whole network as a diffusers folder with shards of at most 5 GB, and verify the written files.

    Raises:
        ValueError: if the folder cannot be written.
    """
    try:
        with atomic(out) as folder:
            base.save_pretrained(folder, max_shard_size="5GB")  # type: ignore[operator]
            left = base.state_dict()
            for shard in folder.glob("*.safetensors"):
                with load_safetensors(shard) as file:
                    for key in file.keys():  # noqa: SIM118
                        assert torch.equal(file.get_tensor(key), left.pop(key).cpu()), (
                            f"{key} differs on disk"
                        )
            assert not left, f"not written: {some_of(left)}"
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror})") from None
    return out


def _verify(wanted: Adapter, got: Adapter, base: nn.Module | None) -> None:
    """Assert that two adapters have the same effect: the original `wanted`, and `got`, read from its export.

    Layers that only `got` has must have an update of zero.
    """
    assert (wanted.vector is None) == (got.vector is None), "the domain embedding was lost in export"
    assert wanted.vector is None or torch.equal(wanted.vector, got.vector), "the domain embedding differs"  # type: ignore[arg-type]
    for module in got.modules:
        if module not in wanted.alpha:
            assert not got.tensors[f"{module}.lora_B.weight"].any(), f"{module} is not part of the adapter"
    for module in wanted.modules:
        names = [f"{module}.lora_{x}" for x in ("A.weight", "B.weight", "B.bias", "magnitude_vector")]
        old, new = ([x.tensors.get(n) for n in names] for x in (wanted, got))
        assert [t is None for t in old] == [t is None for t in new], f"{module} lost a part in export"
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a is not None and b is not None]
        if all(torch.equal(a, b) for a, b in pairs) and wanted.scale(module) == got.scale(module):
            continue  # equal factors: no need to compute the products
        assert base is not None or not wanted.dora, f"magnitudes of {module} differ after export"
        weight = torch.zeros(_size(wanted, module)) if base is None else base_layer(base, module).weight
        one, two = effective_delta(wanted, module, weight), effective_delta(got, module, weight)
        limit = 1e-5 * max(one.abs().max().item(), weight.abs().max().item())
        assert (one - two).abs().max().item() <= limit, f"{module} differs after export"
        if old[2] is not None and new[2] is not None:
            before, after = old[2].float() * wanted.scale(module), new[2].float() * got.scale(module)
            assert torch.allclose(before, after), f"bias of {module} differs after export"
