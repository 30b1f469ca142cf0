"""Mapping between module names in diffusers and in a model's original code.

ComfyUI also uses the original names. For most layers, only the name differs. In some models, one original
layer contains several diffusers layers (query, key and value, concatenated along the rows). In some layers,
the two halves of the rows are swapped. Each family lists these differences as `Rename` objects. All
conversions of weights and adapters use this list.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = re.compile(r"(\w*blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Rename:
    """Names of a layer or parameter in the original code and in diffusers; `*` stands for a block number."""

    original: str
    """Name in the original code, such as `blocks.*.attn.qkv_x`, without `.weight` or `.bias`."""
    diffusers: tuple[str, ...]
    """Name in diffusers; several names if the original layer contains several diffusers layers."""
    swapped: bool = False
    """True if the two halves of the rows are in the opposite order in the original code."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join tensors (rows, ...) of the diffusers layers into one tensor of the original code.

        `parts` has the order of the names in `diffusers`.
        """
        import torch

        whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return self.swap(whole)

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Split a tensor (rows, ...) of the original code into diffusers tensors with equally many rows."""
        return self.swap(whole).chunk(len(self.diffusers)) if len(self.diffusers) > 1 else (self.swap(whole),)

    def swap(self, rows: Tensor) -> Tensor:
        """Exchange the first and the second half of the rows if `swapped` is true."""
        return rows.roll(rows.shape[0] // 2, 0) if self.swapped else rows

    def _numbered(self, block: str | None) -> Rename:
        if block is None:
            return self
        names = tuple(n.replace("*", block, 1) for n in self.diffusers)
        return replace(self, original=self.original.replace("*", block, 1), diffusers=names)


class OriginalNames:
    """Map between the names of a model's layers in the original code and in diffusers.

    It can look up one name, or convert the weights of a whole network. An empty map evaluates to False.
    """

    def __init__(self, *pairs: tuple[str, str], fused: Sequence[Rename] = ()) -> None:
        """Create the map between the layer names in the original code and in diffusers.

        Args:
            pairs: (name in the original code, name in diffusers) of each layer that is only renamed.
            fused: renames of the other layers, which are fused or have swapped rows.
        """
        self.renames = (*(Rename(original, (name,)) for original, name in pairs), *fused)
        self._diffusers = {name: rename for rename in self.renames for name in rename.diffusers}
        self._original: dict[str, list[Rename]] = defaultdict(list)
        for rename in self.renames:
            self._original[rename.original].append(rename)

    def __bool__(self) -> bool:
        return bool(self.renames)

    def of_diffusers(self, name: str) -> Rename | None:
        """Return the `Rename` of a diffusers name such as `blocks.0.attn1.to_q`, or None if there is none."""
        pattern, block = _pattern(name)
        found = self._diffusers.get(pattern)
        return found and found._numbered(block)

    def of_original(self, name: str, present: Container[str] = ()) -> Rename | None:
        """Return the `Rename` of a name in the original code, or None if there is none.

        Args:
            name: layer or parameter, such as `blocks.0.self_attn.q`.
            present: names of the layers in the diffusers network. Only needed for a layer whose diffusers
                name depends on the block.
        """
        pattern, block = _pattern(name)
        found = [r._numbered(block) for r in self._original.get(pattern, ())]
        return next((r for r in found if all(n in present for n in r.diffusers)), found[0] if found else None)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the weights of a network from diffusers to the original code.

        Tensors are renamed. As in the original code, some layers are fused, and the rows of some are swapped.

        Raises:
            ValueError: if a tensor has no original name, or a part of a fused layer is missing.
        """
        out: dict[str, Tensor] = {}
        problems = []
        for key in state:
            rename, leaf = _with_leaf(key, self.of_diffusers)
            if rename is None:
                problems.append(f"{key} has no name in the original code")
                continue
            if rename.original + leaf in out:
                continue
            parts = [name + leaf for name in rename.diffusers]
            missing = [name for name in parts if name not in state]
            if missing:
                problems.append(f"{', '.join(missing)} is missing beside {key}")
                continue
            out[rename.original + leaf] = rename.join([state[name] for name in parts])
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return out

    def to_diffusers(self, state: Mapping[str, Tensor], present: Collection[str]) -> dict[str, Tensor]:
        """Convert weights of the model's original code to the names and row order of diffusers.

        Args:
            state: tensors by original name.
            present: names of the tensors in the diffusers network.

        Raises:
            ValueError: if a name is unknown.
        """
        layers = {*present, *(name.rpartition(".")[0] for name in present)}
        out: dict[str, Tensor] = {}
        unknown = []
        for key, tensor in state.items():
            rename, leaf = _with_leaf(key, lambda name: self.of_original(name, layers))
            if rename is None:
                unknown.append(key)
                continue
            out |= {n + leaf: part for n, part in zip(rename.diffusers, rename.split(tensor), strict=True)}
        if unknown:
            raise ValueError(
                f"no layer of the original code: {', '.join(unknown[:4])} ({len(unknown)} names)"
            )
        return out


def _pattern(name: str) -> tuple[str, str | None]:
    """Replace the block number in a name by `*`; return the result and the number (None without one)."""
    match = _BLOCK.fullmatch(name)
    return (f"{match[1]}.*.{match[3]}", match[2]) if match else (name, None)


def _with_leaf(key: str, find: Callable[[str], Rename | None]) -> tuple[Rename | None, str]:
    """Find the `Rename` of a tensor; return it (or None) and a suffix of the tensor's name.

    If `find` knows the whole name, the suffix is empty. Otherwise, the suffix is the last part of the name,
    such as `.weight`, and `find` gets the name without the suffix.
    """
    found = find(key)
    if found is not None:
        return found, ""
    module, _, leaf = key.rpartition(".")
    return find(module), f".{leaf}"
