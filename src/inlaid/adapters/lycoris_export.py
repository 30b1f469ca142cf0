"""LoKr and LoHa in the file layouts of ComfyUI and musubi-tuner.

peft always scales the update by alpha / rank. Other programs ignore alpha if neither LoKr factor is stored as
a product of two matrices. Here, the scale is multiplied into the first factor, and alpha is set to the rank.
The update is then the same in all programs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.layers import some_of
from inlaid.adapters.original_layers import SPELLINGS, Spelling, original_layers
from inlaid.files import atomic, save_file

if TYPE_CHECKING:
    from inlaid.families.original_names import OriginalNames, Rename

Parts = Mapping[str, Tensor]
"""Tensors of one layer by peft's names, such as `lokr_w1`."""


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the tensors of an adapter by layer."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        layers[module][part] = tensor
    return dict(layers)


def update(parts: Parts, scale: float) -> Tensor:
    """Return the update (out, in) of a layer in float32.

    It is `scale` times a product of two matrices: the Kronecker product for LoKr, the elementwise product for
    LoHa.
    """
    own = {name: t.float() for name, t in parts.items()}
    if "hada_w1_a" in own:
        return scale * (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    return scale * torch.kron(_product(own, "lokr_w1"), _product(own, "lokr_w2"))


def _product(parts: Parts, name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def as_lora(parts: Parts, scale: float) -> tuple[Tensor, Tensor]:
    """Convert a LoKr to LoRA factors A (r, in) and B (out, r) in float32, without approximation.

    If w2 = a b, the update is kron(w1, a) kron(I, b) = kron(I, a) kron(w1, b). The product with the lower
    rank r is chosen. If w2 has no factors a and b, or if r would not be below min(out, in), one LoRA factor
    is the identity and the other is the full update.
    """
    own = {name: t.float() for name, t in parts.items()}
    whole = update(parts, scale)
    if "lokr_w2_a" in own:
        w1, a, b = _product(own, "lokr_w1"), own["lokr_w2_a"], own["lokr_w2_b"]
        left, right = w1.shape
        if min(left, right) * a.shape[1] < min(whole.shape):
            if right <= left:
                return torch.kron(torch.eye(right), b), scale * torch.kron(w1, a)
            return torch.kron(w1, b), scale * torch.kron(torch.eye(left), a)
    rows, columns = whole.shape
    return (torch.eye(columns), whole) if columns <= rows else (whole, torch.eye(rows))


def _scaled(parts: Parts, scale: float) -> dict[str, Tensor]:
    """Multiply `scale` into the first factor of a LoKr or LoHa layer.

    The first factor of LoKr is w1. If w1 is a product of two matrices, the product is computed.
    """
    if "hada_w1_a" in parts:
        return {**parts, "hada_w1_a": parts["hada_w1_a"].float() * scale}
    second = {k: t for k, t in parts.items() if k.startswith("lokr_w2")}
    return {"lokr_w1": _product({k: t.float() for k, t in parts.items()}, "lokr_w1") * scale, **second}


def _swapped(parts: Parts, rename: Rename) -> dict[str, Tensor] | None:
    """Exchange the two halves of the output rows if the original code has them in the opposite order.

    For a LoKr, this is impossible if `lokr_w1` has an odd number of rows. The result is then None.
    """
    if not rename.swapped:
        return dict(parts)
    if "hada_w1_a" in parts:
        return {**parts, **{k: rename.swap(parts[k]) for k in ("hada_w1_a", "hada_w2_a")}}
    if parts["lokr_w1"].shape[0] % 2:
        return None
    return {**parts, "lokr_w1": rename.swap(parts["lokr_w1"])}


def _fused_loha(layers: list[Parts | None]) -> dict[str, Tensor]:
    """Return the LoHa factors of a layer that fuses several layers, such as query, key and value.

    The `a` factors form a block-diagonal matrix. The `b` factors are concatenated. A layer without an adapter
    is None; its factors are zero.
    """
    like = next(x for x in layers if x is not None)
    zero = {k: torch.zeros_like(t) for k, t in like.items()}
    own = [x or zero for x in layers]
    return {
        f"hada_w{i}_{x}": (torch.block_diag if x == "a" else lambda *t: torch.cat(t))(
            *(p[f"hada_w{i}_{x}"].float() for p in own)
        )
        for i in (1, 2)
        for x in "ab"
    }


def original_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], names: OriginalNames, target: str
) -> dict[str, Tensor]:
    """Convert a LoKr or LoHa adapter to the tensors of a file for ComfyUI or musubi-tuner.

    If the original code fuses several layers into one, their LoKr becomes an exact LoRA, because stacked
    Kronecker products are not a Kronecker product.

    Args:
        tensors: tensors of the adapter by diffusers name, from `lycoris.read`.
        config: peft configuration of the adapter.
        names: names of the layers in the family's original code.
        target: `comfyui` or `musubi`.

    Raises:
        ValueError: if a layer has no original name, or is a convolution.
    """
    layers, spelling = by_layer(tensors), SPELLINGS[target]
    convolutions = [m for m, parts in layers.items() if any(t.ndim != 2 for t in parts.values())]
    unknown = [m for m in layers if names.of_diffusers(m) is None]
    if convolutions or unknown:
        raise ValueError(
            f"--to: {target} cannot represent {some_of([*convolutions, *unknown])}: add --merge to export "
            "the whole model"
        )
    scale = float(config["alpha"]) / float(config["r"])
    out: dict[str, Tensor] = {}
    loras: dict[str, Tensor] = {}
    done: set[str] = set()
    for module, parts in layers.items():
        rename = names.of_diffusers(module)
        assert rename is not None
        if rename.original in done:
            continue
        done.add(rename.original)
        own = [layers.get(m) for m in rename.diffusers]
        found = _scaled(parts, scale)
        if len(own) > 1:
            is_loha = "hada_w1_a" in parts
            found = _fused_loha([x and _scaled(x, scale) for x in own]) if is_loha else None
        placed = found and _swapped(found, rename)
        if placed is None:
            for name in (m for m in rename.diffusers if m in layers):
                a, b = as_lora(layers[name], scale)
                loras |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            continue
        stem = spelling.name(rename.original)
        out |= {f"{stem}.{part}": t for part, t in placed.items()}
        rank = next((placed[k].shape[0] for k in ("lokr_w2_b", "hada_w1_b") if k in placed), config["r"])
        out[f"{stem}.alpha"] = torch.tensor(float(rank))
    if loras:
        modules = sorted({key.split(".lora_")[0] for key in loras})
        alpha = {m: float(loras[f"{m}.lora_A.weight"].shape[0]) for m in modules}
        joined = original_layers(Adapter(loras, alpha, "diffusers"), names)
        out |= spelling.write({n: layer for n, (_, layer) in joined.items()})
    return out


def file_update(tensors: Mapping[str, Tensor], name: str, spelling: Spelling) -> Tensor:
    """Return the update of a layer, (out, in), that ComfyUI and musubi-tuner compute from a file.

    Args:
        tensors: tensors of the file, by name.
        name: name of the layer in the original code.
        spelling: tensor names of the file layout.
    """
    stem = spelling.name(name)
    if f"{stem}{spelling.down}" in tensors:
        return spelling.effect(tensors, name, None)
    parts = {k.removeprefix(f"{stem}."): t for k, t in tensors.items() if k.startswith(f"{stem}.")}
    rank = next((parts[k].shape[0] for k in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if k in parts), None)
    scale = parts.pop("alpha").item() / rank if rank else 1.0
    return update({k: t for k, t in parts.items() if k != "alpha"}, scale)


def write_original(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: OriginalNames,
    target: str,
    header: Mapping[str, str],
) -> Path:
    """Write a LoKr or LoHa for ComfyUI or musubi-tuner, and compare the written file with the adapter."""
    from safetensors.torch import load_file

    made = original_tensors(tensors, config, names, target)
    own = {k: t.detach().cpu().clone().contiguous() for k, t in made.items()}
    scale, layers = float(config["alpha"]) / float(config["r"]), by_layer(tensors)
    with atomic(path) as part:
        save_file(own, part, metadata={**header, "format": "pt"})
        again = load_file(part)
        for module, parts in layers.items():
            rename = names.of_diffusers(module)
            assert rename is not None
            wanted = update(parts, scale)
            got = rename.split(file_update(again, rename.original, SPELLINGS[target]))
            difference = (got[rename.diffusers.index(module)] - wanted).abs().max()
            assert difference <= 1e-5 * wanted.abs().max() + 1e-12, f"{module} differs after export"
    return path
