"""Writers of adapter files for diffusers, peft and other programs, with verification of exports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import METADATA_KEY, PEFT_WEIGHTS, WEIGHTS, Adapter
from inlaid.adapters.layers import base_layer, layer_shapes, some_of
from inlaid.adapters.layouts import LAYOUTS, check, midi_folder
from inlaid.adapters.layouts import write as write_layout
from inlaid.adapters.merge import effective_delta, merge_adapter
from inlaid.adapters.names import TENSOR_KEY
from inlaid.adapters.programs import canonical, refusal
from inlaid.adapters.read import read_adapter
from inlaid.adapters.source import load_safetensors
from inlaid.console import say
from inlaid.files import atomic, save_file
from inlaid.networks.domain_embedding import EMBEDDING, NAME

if TYPE_CHECKING:
    from inlaid.families import Family


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
    """Write a LoRA or DoRA file for diffusers' `load_lora_weights`, with LoRA alpha and ranks in the header.

    Of the peft configuration, the header contains only settings that change the output of the layers. Other
    releases of peft may reject further settings as unknown.

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
    """Return a peft configuration as an entry of the file header, in the form that diffusers reads."""
    packed = json.dumps({f"transformer.{k}": v for k, v in config.items()}, indent=2, sort_keys=True)
    return {METADATA_KEY: packed}


def export_adapter(
    adapter: Adapter,
    to: str,
    out: str | Path,
    *,
    family: type[Family] | Family,
    base: nn.Module | None = None,
    notes: Callable[[str], object] = say,
) -> Path:
    """Write an adapter for another program, and verify the written file.

    Args:
        adapter: adapter from `read_adapter`.
        to: name of the target. `diffusers` and `midi-3d` write a folder with adapter files, `merged` writes
            the whole network as a diffusers folder, and all other targets write one file.
        out: folder or file to write. If the target is a file, a path without suffix is its folder.
        family: model family that defines the module names.
        base: network without adapters. Required for `merged`, `transpixeler`, `comfyui` with DoRA and
            `wan-alpha` with LoRA. `merged` changes the network in place. `transpixeler` and `musubi` need
            only the layer sizes, so the network may be on the meta device. Without `base`, `musubi` infers
            the layer sizes where possible.
        notes: function that prints a note for the user.

    Returns:
        Path of the folder for `merged` and `midi-3d`, and of the adapter file for other targets.

    Raises:
        ValueError: if the target cannot represent the adapter, if `base` is required and missing, or if the
            target is `merged` and `out` is a file or a folder that is not empty.
    """
    out, target = Path(out), canonical(to)
    reason = refusal(to, family, "dora" if adapter.dora else "lora", joint=adapter.joint)
    if reason:
        raise ValueError(f"--to: {reason}")
    if target == "merged":
        if base is None:
            raise ValueError("merging requires the base model: pass base")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out}: already exists: choose a new folder")
        merge_adapter(base, adapter)
        return write_network(out, base)
    if target == "midi-3d":
        with atomic(out) as folder:
            notes(f"settings for init_custom_adapter: {midi_folder(folder, adapter, {}, adapter.header)}")
        return out
    if target == "diffusers":
        taken = out.is_dir() and any(out.iterdir())  # the caller's temporary folder, with other parts
        with nullcontext(out) if taken else atomic(out) as folder:
            if adapter.vector is not None:
                write_tensors(folder / EMBEDDING, {NAME: adapter.vector}, adapter.header)
            path = write_diffusers(folder, adapter.tensors, adapter.peft_config(), adapter.header)
            _verify(adapter, read_adapter(path, family, shapes=adapter.shapes), base)
        return out / path.name
    layout = LAYOUTS[target](adapter, family, base)
    suffix = ".pt" if layout.torch_file else ".safetensors"
    path = out if out.suffix == suffix else out / f"{to}{suffix}"
    existed = path.parent.exists()
    try:
        with atomic(path) as part:
            write_layout(layout, part, adapter.header)
            if layout.layers:
                check(layout, target, adapter, base)
            else:
                _verify(adapter, read_adapter(part, family, shapes=layer_shapes(base) if base else None))
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


def _verify(wanted: Adapter, got: Adapter, base: nn.Module | None = None) -> None:
    """Assert that an exported adapter has the same effect as the original adapter.

    Layers that are only in the exported adapter must have a zero update.

    Args:
        wanted: original adapter.
        got: exported adapter, read back from its file.
        base: base model. Required for a DoRA whose tensors changed, because its effect depends on the base
            weights.
    """
    one, two = (torch.zeros(1) if x.vector is None else x.vector for x in (wanted, got))
    assert torch.equal(one.expand_as(two), two), "the domain embedding differs after export"
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
        weight = torch.zeros(wanted.shapes[module]) if base is None else base_layer(base, module).weight
        one, two = effective_delta(wanted, module, weight), effective_delta(got, module, weight)
        limit = 1e-5 * max(one.abs().max().item(), weight.abs().max().item())
        assert (one - two).abs().max().item() <= limit, f"{module} differs after export"
        if old[2] is not None and new[2] is not None:
            before, after = old[2].float() * wanted.scale(module), new[2].float() * got.scale(module)
            assert torch.allclose(before, after), f"bias of {module} differs after export"
