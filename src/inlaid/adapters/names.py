"""Names of tensors in adapter files: their prefixes and suffixes, and the layers that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from inlaid.adapters.adapter import Layout

if TYPE_CHECKING:
    from inlaid.families import Family

_DOTTED: Mapping[str, Layout] = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "pipe.dit.": "original",
    "pipe.vace.": "original",
    "dit.": "original",
}
"""Layouts by prefix, for module names with dots. A name may have several prefixes."""

_FLAT: Mapping[str, Layout] = {
    "lora_unet__": "kohya",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "lycoris",
}
"""Layouts by prefix, for module names with underscores instead of dots. Longer prefixes come first."""

_FACTORS = (
    r"lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up"
    r"|lora_magnitude_vector|dora_scale|alpha|diff_b|diff_m|diff|w_norm|b_norm"
    r"|lokr_w1_a|lokr_w1_b|lokr_w1|lokr_w2_a|lokr_w2_b|lokr_w2|lokr_t1|lokr_t2"
    r"|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|hada_t1|hada_t2"
)

TENSOR_KEY = re.compile(
    rf"(?P<module>.+?)\.(?P<part>{_FACTORS})(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
"""Pattern of a tensor name without prefix: module, part, peft's adapter name, and `weight` or `bias`."""

_PARTS = {
    "lora_A": "A",
    "lora_down": "A",
    "lora.down": "A",
    "lora_linear_layer.down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora.up": "B",
    "lora_linear_layer.up": "B",
    "lora_magnitude_vector": "magnitude",
    "w_norm": "diff",
    "b_norm": "diff_b",
}

_BLOCK = re.compile(r"(\w*blocks\.\d+\.)?(.+)")


@dataclass(frozen=True)
class Key:
    """Parsed name of a tensor in an adapter file."""

    prefix: str
    flat: bool
    """True if the module name has underscores instead of dots."""
    rest: str
    """Name without prefix."""
    module: str | None
    """Name of the module in the file, without prefix; None if this is not the name of an adapter tensor."""
    part: str = ""
    """`A`, `B`, `bias` (of B), `alpha`, `magnitude`, `dora_scale`, or a name such as `diff` or `lokr_w1`."""
    adapter: str = ""
    """peft's adapter name, such as `default`; empty if the tensor name has none."""


def parse_key(key: str) -> Key:
    """Parse the name of a tensor."""
    rest, flat = key, False
    while prefix := next((p for p in _DOTTED if rest.startswith(p)), None):
        rest = rest.removeprefix(prefix)
    if prefix := next((p for p in _FLAT if rest.startswith(p)), None):
        rest, flat = rest.removeprefix(prefix), True
    whole = key.removesuffix(rest)
    match = TENSOR_KEY.fullmatch(rest)
    if not match or (match["leaf"] == "bias" and _PARTS.get(match["part"]) != "B"):
        return Key(whole, flat, rest, None)
    part = "bias" if match["leaf"] == "bias" else _PARTS.get(match["part"], match["part"])
    return Key(whole, flat, rest, match["module"], part, match["name"] or "")


def layout_of(prefix: str) -> Layout:
    """Return the name of the file format whose tensor names start with `prefix`; `bare` if it is empty."""
    found = [layout for p, layout in _FLAT.items() if prefix.endswith(p)]
    found += [layout for p, layout in _DOTTED.items() if prefix.startswith(p)]
    return found[0] if found else "bare"  # type: ignore[return-value]


def split_block(module: str) -> tuple[str, str]:
    """Split a module name into the prefix of its block and the rest.

    For example, `blocks.0.attn1.to_q` becomes `blocks.0.` and `attn1.to_q`. The prefix is empty for a module
    outside the blocks.
    """
    match = _BLOCK.fullmatch(module)
    assert match
    return match[1] or "", match[2]


@dataclass(frozen=True)
class Target:
    """Diffusers layer that a module in an adapter file adapts.

    A module may fuse several layers, such as query, key and value. Each layer is then a separate target.
    """

    module: str
    part: int = 0
    """Index of the layer among those that the module fuses."""
    parts: int = 1
    """Number of layers that the module fuses. It concatenates their output rows."""
    swapped: bool = False
    """True if the two halves of the output rows have the opposite order in diffusers."""

    def rows(self, tensor: Tensor) -> Tensor:
        """Return this layer's rows from a tensor of the module in the file.

        Rows are the first axis. If `swapped` is set, the two halves of the rows are exchanged.
        """
        own = tensor.chunk(self.parts)[self.part] if self.parts > 1 else tensor
        return torch.cat([*own.chunk(2)][::-1]) if self.swapped else own


@dataclass(frozen=True)
class Found:
    """Diffusers layers that a module name stands for."""

    targets: tuple[Target, ...]
    spelling: Literal["diffusers", "original"]


class AmbiguousError(ValueError):
    """Error for an ambiguous module name: its underscores can be read as dots in more than one way."""


class Names:
    """Lookup of a family's layers by the module names in adapter files.

    A layer has a name in the model's original code and a name in diffusers; both are found. The parts of a
    name are separated by dots or underscores.
    """

    def __init__(self, family: type[Family] | Family, layers: Iterable[str] = ()) -> None:
        """Collect the layer names of a family.

        Args:
            family: model family.
            layers: diffusers names of all layers of the network. Without them, only layers that the family
                declares are found.
        """
        self.family = (family if isinstance(family, type) else type(family)).__name__
        self.layers = set(layers)
        self._more_blocks = family.more_blocks
        self._declared = (*family.targets, *family.adaptable)
        self._patterns: dict[str, list[Found]] = {}
        for rename in family.original.renames:
            many = len(rename.diffusers)
            targets = tuple(Target(n, i, many, rename.swapped) for i, n in enumerate(rename.diffusers))
            self._patterns.setdefault(rename.original, []).append(Found(targets, "original"))
        for rename in family.original.renames:
            for name in rename.diffusers:
                self._patterns[name] = [Found((Target(name),), "diffusers")]
        self._flat: dict[str, list[Found]] = {}
        for pattern, found in self._patterns.items():
            self._flat.setdefault(pattern.replace(".", "_"), []).extend(found)
        self._flat_layers: dict[str, list[str]] = {}
        for name in self.layers:
            self._flat_layers.setdefault(name.replace(".", "_"), []).append(name)

    def find(self, module: str, flat: bool) -> Found | None:
        """Return the layers that a module name stands for, or None if the name is unknown.

        Args:
            module: name of a module in an adapter file, without prefix.
            flat: True if the name has underscores instead of dots.

        Raises:
            AmbiguousError: if the name can stand for different layers, and the layer names of the network do
                not decide between them.
        """
        if flat and module in self._flat_layers:
            return self._choose(module, [Found((Target(n),), "diffusers") for n in self._flat_layers[module]])
        block = (_FLAT_BLOCK if flat else _DOTTED_BLOCK).fullmatch(module)
        dot = "_" if flat else "."
        known = self._flat if flat else self._patterns
        if block is None:
            found = [*known.get(module, ())]
        else:
            number, leaf = block[2], block[3]
            found = [_numbered(f, number) for f in known.get(f"{block[1]}{dot}*{dot}{leaf}", ())]
            if not found and block[1] in self._more_blocks:
                same = (_numbered(f, number) for f in known.get(f"blocks{dot}*{dot}{leaf}", ()))
                found = [_moved(f, f"blocks.{number}.", f"{block[1]}.{number}.") for f in same]
        if not found and not flat and (module in self.layers or self._matches(module)):
            return Found((Target(module),), "diffusers")
        return self._choose(module, found)

    def parameters(self, name: str, flat: bool) -> tuple[Target, ...]:
        """Return the layers or parameters that a name in an adapter file stands for.

        An unknown name with dots is returned unchanged, so the caller must check that the network has it. For
        an unknown name with underscores (`flat`), the result is empty.
        """
        found = self.find(name, flat)
        if found:
            return found.targets
        return () if flat else (Target(name),)

    def knows(self, name: str) -> bool:
        """Return whether `name` is an original or diffusers name of a layer or parameter of the family."""
        return self.find(name, False) is not None

    def _matches(self, module: str) -> bool:
        return any(re.fullmatch(pattern, module) for pattern in self._declared)

    def _choose(self, module: str, found: list[Found]) -> Found | None:
        """Return one of the candidates `found` for the layers of a module, or None if there are none.

        Of several different candidates, the one whose layers all exist in the network is returned.

        Raises:
            AmbiguousError: if more than one candidate remains.
        """
        different = list({f.targets: f for f in found}.values())
        if len(different) > 1:
            there = [f for f in different if all(t.module in self.layers for t in f.targets)]
            different = there or different
        if len(different) > 1:
            names = sorted({" + ".join(t.module for t in f.targets) for f in different})
            raise AmbiguousError(
                f"`{module}` stands for {' or '.join(names)}: pass the base model "
                "(inlaid import --checkpoint)"
            )
        return different[0] if different else None


_DOTTED_BLOCK = re.compile(r"(\w*blocks)\.(\d+)\.(.+)")
_FLAT_BLOCK = re.compile(r"(\w*?blocks)_(\d+)_(.+)")


def _numbered(found: Found, block: str) -> Found:
    targets = tuple(replace(t, module=t.module.replace("*", block, 1)) for t in found.targets)
    return Found(targets, found.spelling)


def _moved(found: Found, old: str, new: str) -> Found:
    return Found(
        tuple(replace(t, module=t.module.replace(old, new, 1)) for t in found.targets), found.spelling
    )
