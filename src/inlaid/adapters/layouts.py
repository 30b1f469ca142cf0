"""LoRA and DoRA files for other programs: conversion, writing and checks of the written file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.dora_scale import DORA_RULE_KEY
from inlaid.adapters.layers import base_layer, layer_shapes, row_norms, some_of
from inlaid.adapters.merge import effective_delta, layer_delta
from inlaid.adapters.names import split_block
from inlaid.adapters.original_layers import (
    SPELLINGS,
    Layer,
    original_layers,
    plain_layers,
)
from inlaid.files import load_torch, save_file, save_torch

if TYPE_CHECKING:
    from inlaid.families import Family
    from inlaid.families.original_names import Rename

    Model = type[Family] | Family


@dataclass(frozen=True)
class Layout:
    """Content of an exported file."""

    tensors: Mapping[str, Tensor]
    layers: Mapping[str, tuple[Rename, Layer]] = field(default_factory=dict)
    """Updates by original layer name, each with the mapping to its diffusers layers."""
    header: Mapping[str, str] = field(default_factory=dict)
    """File metadata in addition to that of the adapter."""
    torch_file: bool = False
    """True for a torch file that contains the tensors under `state_dict`."""


def _comfyui(adapter: Adapter, family: Model, base: nn.Module | None) -> Layout:
    if adapter.dora and base is None:
        raise ValueError(
            "DoRA for ComfyUI is relative to the weights of the base model: pass base, or export as merged"
        )
    layers = original_layers(adapter, family.original, base if adapter.dora else None)
    tensors = SPELLINGS["comfyui"].write({n: x for n, (_, x) in layers.items()})
    return Layout(tensors, layers, {DORA_RULE_KEY: "comfyui"} if adapter.dora else {})


def _diffsynth(adapter: Adapter, family: Model, base: nn.Module | None) -> Layout:
    layers = original_layers(adapter, family.original)
    _refuse("diffsynth", biases=_with_bias(layers), convolutions=_convolutions(layers))
    return Layout(SPELLINGS["diffsynth"].write({n: x for n, (_, x) in layers.items()}), layers)


def _musubi(adapter: Adapter, family: Model, base: nn.Module | None) -> Layout:
    """Return the layout of musubi-tuner; some untrained layers get factors of zero.

    The converters of diffusers and other programs do not accept all subsets of layers. In each block up to
    the last trained block, they require all layers of the first group in `kohya_layers`. If a layer of
    another group was trained, they also require all layers of that group in each of these blocks.
    """
    if adapter.dora:
        raise ValueError("no other program reads DoRA in the kohya layout: export as merged or comfyui")
    layers = original_layers(adapter, family.original)
    if _with_bias(layers):
        raise ValueError("the kohya layout has no biases: export as comfyui")
    _refuse("musubi", convolutions=_convolutions(layers))
    out: dict[str, Layer] = {}
    sizes = layer_shapes(base) if base is not None else {}
    blocks = {s for s, _ in map(split_block, adapter.modules) if s}
    stem = next(iter(blocks), "").rstrip("0123456789.")
    last = max((int(s.split(".")[-2]) for s in blocks), default=-1)
    trained = {split_block(m)[1] for m in adapter.modules}
    always, *others = family.kohya_layers
    wanted = [*always, *(leaf for group in others if trained & {*group} for leaf in group)]
    rank = Counter(adapter.rank.values()).most_common(1)[0][0]
    like = {split_block(m)[1]: size for m, size in adapter.shapes.items()}
    for i in range(last + 1):
        for leaf in wanted:
            module = f"{stem}.{i}.{leaf}"
            rename = family.original.of_diffusers(module)
            assert rename is not None
            if module in adapter.alpha:
                continue
            size = sizes.get(module) or like.get(leaf)
            if size is None:
                raise ValueError(
                    f"the kohya layout needs zeros for {module}, but its size is unknown: pass the base model"
                )
            out[rename.original] = Layer(torch.zeros(rank, size[1]), torch.zeros(size[0], rank))
    out |= {n: x for n, (_, x) in layers.items()}
    return Layout(SPELLINGS["musubi"].write(dict(sorted(out.items()))), layers)


def _wan_alpha(adapter: Adapter, family: Model, base: nn.Module | None) -> Layout:
    """Convert an adapter to the layout of Wan-Alpha, which requires DoRA magnitudes.

    For a LoRA, the magnitudes are set to the row norms of the updated weight, so the update stays the same.
    This requires `base`.
    """
    if not adapter.dora and base is None:
        raise ValueError("Wan-Alpha reads DoRA; the magnitudes of a LoRA require the base model: pass base")
    layers = original_layers(adapter, family.original, None if adapter.dora else base)
    _refuse("wan-alpha", biases=_with_bias(layers), convolutions=_convolutions(layers))
    if not adapter.dora:
        layers = {n: (r, _with_norms(x)) for n, (r, x) in layers.items()}
    return Layout(SPELLINGS["wan-alpha"].write({n: x for n, (_, x) in layers.items()}), layers)


def _with_norms(layer: Layer) -> Layer:
    assert layer.weight is not None
    norms = row_norms(layer.weight.flatten(1) + layer.delta)
    return Layer(layer.down, layer.up, layer.bias, norms, layer.weight)


def _genmo(adapter: Adapter, family: Model, base: nn.Module | None) -> Layout:
    """Return the layout of genmo's Mochi trainer.

    It contains attention layers only, in float32. All query-key-value layers have the same rank, and so do
    all output layers. Factors with a smaller rank are padded with zeros.
    """
    layers = original_layers(adapter, family.original)
    other = [n for n in layers if not re.fullmatch(r"blocks\.\d+\.attn\.(qkv|proj)_[xy]", n)]
    _refuse("genmo", biases=_with_bias(layers), **{"layers outside attention": other})
    ranks = {"qkv": 0, "proj": 0}
    for name, (_, layer) in layers.items():
        kind = "qkv" if ".qkv_" in name else "proj"
        ranks[kind] = max(ranks[kind], layer.rank)
    made = {}
    for name, (rename, layer) in layers.items():
        whole = layer.padded(ranks["qkv" if ".qkv_" in name else "proj"])
        made[name] = (rename, Layer(whole.down.float(), whole.up.float()))
    settings = {}
    for kind, prefix in (("qkv", "qkv_proj"), ("proj", "out_proj")):
        rank = ranks[kind] or 1
        settings |= {f"{prefix}_lora_rank": rank, f"{prefix}_lora_alpha": rank}
    return Layout(
        SPELLINGS["genmo"].write({n: x for n, (_, x) in made.items()}), made, {"kwargs": json.dumps(settings)}
    )


def _transpixeler(adapter: Adapter, family: Model, base: nn.Module | None) -> Layout:
    """Return the content of a TransPixeler file.

    It contains the query, key, value and output layer of each block, all with the same fixed rank. Updates of
    untrained layers are zero. TransPixeler scales each update by 1 / rank. The factor B is therefore
    multiplied by the rank.
    """
    spec = family.joint_layout
    assert spec is not None
    layers, problems = plain_layers(adapter), []
    outside = [m for m in layers if split_block(m)[1] not in spec.layers]
    large = [m for m, layer in layers.items() if layer.rank > spec.rank]
    if adapter.dora:
        problems.append("DoRA")
    if outside:
        problems.append(f"layers other than {', '.join(spec.layers)} ({some_of(outside)})")
    if large:
        problems.append(f"ranks above {spec.rank} ({layers[large[0]].rank} in {large[0]})")
    if _biased(layers):
        problems.append(f"trained biases ({some_of(_biased(layers))})")
    rule = adapter.header.get("inlaid_text_to_alpha")
    if rule != spec.rule:
        problems.append(f"alpha.text_to_alpha: {rule}; it applies `{spec.rule}`")
    if adapter.vector is not None and spec.vector is None:
        problems.append("a domain embedding; train with alpha.domain_embedding: false")
    if problems:
        raise ValueError(f"--to: transpixeler cannot represent {'; '.join(problems)}: use `diffusers`")
    if base is None:
        raise ValueError("transpixeler needs the layers of all blocks: pass base")
    sizes = layer_shapes(base)
    made: dict[str, Tensor] = {}
    for module, (rows, columns, *_) in sizes.items():
        stem, leaf = split_block(module)
        if not stem or leaf not in spec.layers:
            continue
        layer = layers.get(module) or Layer(torch.zeros(1, columns), torch.zeros(rows, 1))
        whole = layer.padded(spec.rank)
        block = stem.split(".")[-2]
        for factor, tensor in zip(
            spec.factors, (whole.down.float(), whole.up.float() * spec.rank), strict=True
        ):
            made[spec.key.format(block=block, layer=spec.layers[leaf], factor=factor)] = tensor
    if spec.vector is not None:
        width = next(iter(layers.values())).down.shape[1]
        vector = torch.zeros(width) if adapter.vector is None else adapter.vector.float()
        made[spec.vector] = vector.reshape(1, 1, -1)
    return Layout(made, torch_file=spec.torch_file)


LAYOUTS: Mapping[str, Callable[[Adapter, Any, nn.Module | None], Layout]] = {
    "comfyui": _comfyui,
    "musubi": _musubi,
    "diffsynth": _diffsynth,
    "wan-alpha": _wan_alpha,
    "genmo": _genmo,
    "transpixeler": _transpixeler,
}
"""Functions that return a file layout, by export target. Targets that are folders have none.

`base` is required for `transpixeler`, for DoRA in `comfyui` and for LoRA in `wan-alpha`. `musubi` requires it
only if layer sizes cannot be inferred. For `transpixeler` and `musubi`, it may be on the meta device.
"""


def write(layout: Layout, path: Path, header: Mapping[str, str]) -> None:
    """Write the tensors of a layout to a file, and assert that the file contains exactly these tensors.

    `header` is the file header of the adapter. A torch file is written without a header.
    """
    own = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in layout.tensors.items()}
    if layout.torch_file:
        save_torch(own, path, under="state_dict")
        again = load_torch(path)["state_dict"]
    else:
        about = {k: v for k, v in header.items() if k != "config"}  # ComfyUI would override its detection
        save_file(own, path, metadata={**about, **layout.header, "format": "pt"})
        again = load_file(path)
    assert again.keys() == own.keys(), "tensors are missing in the file"
    assert all(torch.equal(again[k], own[k]) for k in own), "tensors differ in the file"


def check(layout: Layout, target: str, adapter: Adapter, base: nn.Module | None) -> None:
    """Assert that exported tensors change the weights in the same way as the adapter.

    A layer of the original code can contain several diffusers layers. Its change must equal the changes of
    these layers, concatenated in the original row order. The updates of untrained layers must be zero.
    """
    spelling, covered = SPELLINGS[target], set()
    for name, (rename, layer) in layout.layers.items():
        covered |= set(rename.diffusers)
        got = spelling.effect(layout.tensors, name, layer.weight)
        parts = len(rename.diffusers)
        weights = base if layer.weight is not None else None
        wanted = rename.join([_change(adapter, m, weights, got, parts) for m in rename.diffusers])
        if layer.magnitude is not None and layer.weight is None:  # equal factors and equal magnitudes
            own = [adapter.tensors[f"{m}.lora_magnitude_vector"].reshape(-1) for m in rename.diffusers]
            assert torch.equal(rename.join(own).float(), layer.magnitude), f"{name} differs after export"
        scale = max(
            wanted.abs().max().item(), 0.0 if layer.weight is None else layer.weight.abs().max().item()
        )
        assert (got - wanted).abs().max().item() <= 1e-5 * scale + 1e-12, f"{name} differs after export"
    assert covered >= set(adapter.modules), "layers are missing in the export"
    ours = {spelling.name(n) for n in layout.layers}
    extra = [k for k in layout.tensors if k.endswith(spelling.up) and k.removesuffix(spelling.up) not in ours]
    assert not any(layout.tensors[k].any() for k in extra), "an untrained layer is not zero"


def _change(adapter: Adapter, module: str, base: nn.Module | None, like: Tensor, parts: int) -> Tensor:
    """Return the weight change (rows, in) that an adapter makes to one diffusers layer.

    It is zero if the adapter does not contain the layer. A layer in the model's original code concatenates
    `parts` diffusers layers. `like` is the weight change of this original layer.
    """
    if module not in adapter.alpha:
        return like.new_zeros(like.shape[0] // parts, like.shape[1])
    if not adapter.dora or base is None:
        return layer_delta(adapter, module).cpu()
    weight = base_layer(base, module).weight.detach().float().cpu()
    return effective_delta(adapter, module, weight).flatten(1)


def midi_folder(
    folder: Path, adapter: Adapter, companions: Mapping[str, Adapter], header: Mapping[str, str]
) -> str:
    """Write an adapter for MIDI's own loader, and return the text of the `LoraConfig` that the loader needs.

    The loader accepts only one rank for all layers. Factors of lower rank are therefore padded with zeros.
    The scale is multiplied into the factors.

    Args:
        folder: folder to write `lora_weights.safetensors` and `lora_weights.pth` to.
        adapter: adapter of the transformer.
        companions: adapters of image encoders by name.
        header: metadata of the safetensors file.
    """
    parts = {"transformer": adapter, **companions}
    layers = {f"{name}.{m}": layer for name, part in parts.items() for m, layer in plain_layers(part).items()}
    rank = max(layer.rank for layer in layers.values())
    tensors = SPELLINGS["midi-3d"].write({n: layer.padded(rank) for n, layer in layers.items()})
    for name, part in parts.items():
        for module in part.modules:
            got = SPELLINGS["midi-3d"].effect(
                {k: t for k, t in tensors.items() if "magnitude" not in k}, f"{name}.{module}", None
            )
            assert torch.allclose(got, layer_delta(part, module), atol=1e-6), f"{module} differs after export"
    folder.mkdir(parents=True, exist_ok=True)
    write(Layout(tensors), folder / "lora_weights.safetensors", header)
    save_torch(tensors, folder / "lora_weights.pth")
    again = load_torch(folder / "lora_weights.pth")
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k].cpu()) for k in tensors)
    dora = ", use_dora=True" if adapter.dora else ""
    bias = ", lora_bias=True" if any(layer.bias is not None for layer in layers.values()) else ""
    return f"LoraConfig(r={rank}, lora_alpha={rank}{dora}{bias}, target_modules=...)"


def _with_bias(layers: Mapping[str, tuple[Rename, Layer]]) -> list[str]:
    return _biased({n: layer for n, (_, layer) in layers.items()})


def _biased(layers: Mapping[str, Layer]) -> list[str]:
    return [n for n, layer in layers.items() if layer.bias is not None]


def _convolutions(layers: Mapping[str, tuple[Rename, Layer]]) -> list[str]:
    return [n for n, (_, layer) in layers.items() if layer.convolution]


def _refuse(target: str, **found: Iterable[str]) -> None:
    """Raise an error if an export target cannot represent all layers.

    Args:
        target: name of the target.
        found: names of the unsupported layers, by kind of problem, such as `biases`.

    Raises:
        ValueError: if `found` contains a layer.
    """
    problems = [f"{what} ({some_of(names)})" for what, names in found.items() if names]
    if problems:
        raise ValueError(f"--to: {target} cannot represent {'; '.join(problems)}: use `merged` or --merge")
