"""Adapter layers under the names of a model's original code, and the tensor names that programs expect.

Layers follow the row order of the original code. The scale alpha / rank is always multiplied into the second
factor, and alpha is set to the rank. Programs that read alpha and programs that ignore it then apply the same
update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.layers import base_layer, low_rank_product, row_norms, some_of

if TYPE_CHECKING:
    from inlaid.families.original_names import OriginalNames, Rename


@dataclass(frozen=True)
class Layer:
    """Low-rank update of one layer. The scale alpha / rank is already multiplied into `up`."""

    down: Tensor
    """First factor (r, in); for convolutions (r, in, kernel ...)."""
    up: Tensor
    """Second factor (rows, r); for convolutions (rows, r, 1 ...)."""
    bias: Tensor | None = None
    """Update of the bias (rows,)."""
    magnitude: Tensor | None = None
    """DoRA magnitudes (rows,): row norms of the updated weight."""
    weight: Tensor | None = None
    """Weight of the base model (rows, in, ...) in float32, if available."""

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.shape[0]

    @property
    def delta(self) -> Tensor:
        """Product (rows, in) of the factors in float32; `in` includes the kernel size."""
        return low_rank_product(self.down, self.up, 1.0)

    @property
    def convolution(self) -> bool:
        """True for a convolution: its factors have kernel axes."""
        return self.down.ndim > 2

    def dora_scale(self) -> Tensor:
        """Return the `dora_scale` that ComfyUI reads, (rows, 1) or, for convolutions, (rows, 1, 1, ...).

        ComfyUI multiplies W + s B A by dora_scale / ||W||. DoRA multiplies it by m / ||W + s B A||, where m
        is the magnitude. The result is therefore m ||W|| / ||W + s B A||.
        """
        assert self.magnitude is not None and self.weight is not None
        merged = self.weight.flatten(1) + self.delta
        scale = self.magnitude * row_norms(self.weight) / row_norms(merged)
        return scale.reshape(-1, *[1] * (self.weight.ndim - 1))

    def padded(self, rank: int) -> Layer:
        """Return the same update with a larger rank; the additional rows and columns are zero."""
        more = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])])
        up = torch.cat([self.up, self.up.new_zeros(self.up.shape[0], more, *self.up.shape[2:])], dim=1)
        return Layer(down, up, self.bias, self.magnitude, self.weight)


def folded(adapter: Adapter) -> Adapter:
    """Return an equivalent adapter with scale 1: the LoRA alpha of each layer equals its rank."""
    tensors = dict(adapter.tensors)
    for module in adapter.modules:
        scale = adapter.scale(module)
        for name in (f"{module}.lora_B.weight", f"{module}.lora_B.bias"):
            if name in tensors and scale != 1:
                tensors[name] = tensors[name].float() * scale
        if scale != 1:
            tensors[f"{module}.lora_A.weight"] = tensors[f"{module}.lora_A.weight"].float()
    alpha = {module: float(rank) for module, rank in adapter.rank.items()}
    return Adapter(
        tensors, alpha, adapter.layout, adapter.alpha_from, adapter.notes, adapter.header, adapter.vector
    )


def original_layers(
    adapter: Adapter, names: OriginalNames, base: nn.Module | None = None
) -> dict[str, tuple[Rename, Layer]]:
    """Convert an adapter to the layers of the family's original code.

    Diffusers layers that the original code fuses become one layer. If all of them have the same first factor,
    their second factors are stacked. Otherwise, the first factors are stacked, the second factor is
    block-diagonal, and the ranks add up.

    Args:
        adapter: the adapter.
        names: names of the layers in the original code.
        base: network without adapters, for the weights of the layers.

    Returns:
        By original layer name: the mapping to the diffusers layers, and the low-rank update.

    Raises:
        ValueError: if a layer has no original name, or if DoRA layers are fused and `base` is None.
    """
    adapter = folded(adapter)
    found: dict[str, Rename] = {}
    unknown = []
    for module in adapter.modules:
        rename = names.of_diffusers(module)
        if rename is None:
            unknown.append(module)
        else:
            found[rename.original] = rename
    if unknown:
        raise ValueError(f"no name in the original code is known for {some_of(unknown)}")
    return {original: (r, _joined(adapter, r, base)) for original, r in found.items()}


def plain_layers(adapter: Adapter, base: nn.Module | None = None) -> dict[str, Layer]:
    """Return the layers of an adapter by diffusers name. Their factors include the LoRA scale.

    `base` is the network without adapters, for the weights of the layers.
    """
    adapter = folded(adapter)
    return {module: _layer(adapter, module, base) for module in adapter.modules}


def _layer(adapter: Adapter, module: str, base: nn.Module | None) -> Layer:
    get = adapter.tensors.get
    a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    magnitude = get(f"{module}.lora_magnitude_vector")
    weight = None if base is None else base_layer(base, module).weight.detach().float().cpu()
    bias = get(f"{module}.lora_B.bias")
    flat = None if magnitude is None else magnitude.float().reshape(-1)
    return Layer(a, b, bias, flat, weight)


def _joined(adapter: Adapter, rename: Rename, base: nn.Module | None) -> Layer:
    """Combine the updates of the diffusers layers that form one layer in the original code."""
    own = {m: _layer(adapter, m, base) for m in rename.diffusers if m in adapter.alpha}
    like = next(iter(own.values()))
    if len(rename.diffusers) == 1:
        rows = [
            None if t is None else rename.swap(t) for t in (like.up, like.bias, like.magnitude, like.weight)
        ]
        assert rows[0] is not None
        return Layer(like.down, *rows)  # type: ignore[arg-type]
    layers = [own.get(m) for m in rename.diffusers]
    shared = len(own) == len(layers) and all(torch.equal(x.down, like.down) for x in own.values())
    down = like.down if shared else torch.cat([x.down for x in own.values()])
    up, column = [], 0
    for layer in layers:
        if layer is None:
            up.append(like.up.new_zeros(like.up.shape[0], down.shape[0]))
        elif shared:
            up.append(layer.up)
        else:
            after = down.shape[0] - column - layer.rank
            up.append(nn.functional.pad(layer.up, (column, after)))
            column += layer.rank
    weight = None
    if base is not None:
        weight = rename.join([base_layer(base, m).weight.detach().float().cpu() for m in rename.diffusers])
    joined = Layer(down, rename.join(up), None, None, weight)
    bias = [x.bias for x in own.values() if x.bias is not None]
    if bias:
        parts = [torch.zeros_like(bias[0]) if x is None or x.bias is None else x.bias for x in layers]
        joined = Layer(down, joined.up, rename.join(parts), None, weight)
    if any(x.magnitude is not None for x in own.values()):
        if weight is None:
            raise ValueError("joining layers of a DoRA requires the base model: pass base")
        norms = row_norms(weight.flatten(1) + joined.delta).chunk(len(layers))
        parts = [
            n if x is None or x.magnitude is None else x.magnitude for x, n in zip(layers, norms, strict=True)
        ]
        joined = Layer(down, joined.up, joined.bias, torch.cat(parts), weight)
    return joined


@dataclass(frozen=True)
class Spelling:
    """Tensor names of a file layout."""

    name: Callable[[str], str]
    """Function that returns the prefix of a layer's tensor names."""
    down: str
    up: str
    alpha: str | None = None
    bias: str | None = None
    magnitude: str | None = None
    """Suffix of the DoRA magnitudes in peft's definition."""
    dora_scale: str | None = None
    """Suffix of the DoRA magnitudes in ComfyUI's definition."""

    def write(self, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        """Return the tensors of layers, by their names in a file of this layout."""
        out: dict[str, Tensor] = {}
        for name, layer in layers.items():
            stem = self.name(name)
            out[f"{stem}{self.down}"], out[f"{stem}{self.up}"] = layer.down, layer.up
            if self.alpha and ".blocks." in f".{name}":  # diffusers' converters accept it in blocks only
                out[f"{stem}{self.alpha}"] = torch.tensor(float(layer.rank))
            if layer.bias is not None:
                assert self.bias is not None
                out[f"{stem}{self.bias}"] = layer.bias
            if layer.magnitude is not None and self.dora_scale:
                out[f"{stem}{self.dora_scale}"] = layer.dora_scale()
            elif layer.magnitude is not None:
                assert self.magnitude is not None
                out[f"{stem}{self.magnitude}"] = layer.magnitude
        return out

    def effect(self, tensors: Mapping[str, Tensor], name: str, weight: Tensor | None) -> Tensor:
        """Return the weight change (rows, in) that the program computes for a layer from an adapter file.

        Args:
            tensors: content of the file.
            name: name of the layer.
            weight: base weight (rows, in, ...) in float32. Without it, the magnitudes of a DoRA are ignored.
        """
        stem = self.name(name)
        down, up = tensors[f"{stem}{self.down}"], tensors[f"{stem}{self.up}"]
        alpha = tensors.get(f"{stem}{self.alpha}") if self.alpha else None
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        delta = low_rank_product(down, up, scale)
        relative, absolute = (
            tensors.get(f"{stem}{part}") if part else None for part in (self.dora_scale, self.magnitude)
        )
        if weight is None or (relative is None and absolute is None):
            return delta
        flat = weight.flatten(1)
        if relative is not None:
            return (flat + delta) * (relative.reshape(-1, 1) / row_norms(flat)[:, None]) - flat
        assert absolute is not None
        return (flat + delta) * (absolute.reshape(-1, 1) / row_norms(flat + delta)[:, None]) - flat


def flat_name(name: str) -> str:
    """Return the name of a layer in kohya's format, such as `lora_unet_blocks_0_self_attn_q`."""
    return "lora_unet_" + name.replace(".", "_")


SPELLINGS: Mapping[str, Spelling] = {
    "comfyui": Spelling(
        lambda name: f"diffusion_model.{name}",
        ".lora_A.weight",
        ".lora_B.weight",
        ".alpha",
        ".diff_b",
        dora_scale=".dora_scale",
    ),
    "diffsynth": Spelling(
        lambda name: f"diffusion_model.{name}", ".lora_A.weight", ".lora_B.weight", ".alpha"
    ),
    "musubi": Spelling(flat_name, ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "wan-alpha": Spelling(
        lambda name: f"diffusion_model.{name}",
        ".lora_A.weight",
        ".lora_B.weight",
        magnitude=".lora_magnitude_vector.weight",
    ),
    "genmo": Spelling(str, ".lora_A", ".lora_B"),
    "midi-3d": Spelling(
        str,
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        bias=".lora_B.default.bias",
        magnitude=".lora_magnitude_vector.default.weight",
    ),
}
"""Tensor names of LoRA and DoRA files, by export target."""
