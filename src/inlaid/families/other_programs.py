"""Facts about a model that exports to other programs need: original names, and what these programs accept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from inlaid.families.original_names import OriginalNames

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class JointLayout:
    """File layout in which TransPixeler's inference script reads the adapter of this model (joint alpha)."""

    key: str
    """Tensor name, with the fields `block`, `layer` and `factor`."""
    layers: Mapping[str, str]
    """Names of the layers in the file, by diffusers name inside a block. All must be in the file."""
    factors: tuple[str, str]
    """Names of the factors A and B."""
    rule: Literal["block", "bias"]
    """How the script restricts the attention of text tokens to alpha tokens (`alpha.text_to_alpha`)."""
    vector: str | None
    """Tensor name of the domain embedding (1, 1, d), which must be in the file; None if there is none."""
    torch_file: bool
    """True if the script reads a torch file with an entry `state_dict`; otherwise a safetensors file."""
    width: int
    """Width of the attention layers in the script, which is fixed."""

    rank: ClassVar[int] = 128
    """Rank in the script, which is fixed; the LoRA alpha is 1."""


class OtherPrograms:
    """What other programs know about a model family; a base class of `Family`."""

    original: ClassVar[OriginalNames] = OriginalNames()
    """Names of all layers in the original code, which other programs use; empty if they equal diffusers'."""
    programs: ClassVar[Sequence[str]] = ()
    """Targets of `inlaid export` that exist for this family, besides `diffusers` and `merged`."""
    joint_layout: ClassVar[JointLayout | None] = None
    """Layout of the export target `transpixeler`."""

    kohya_layers: ClassVar[Sequence[Sequence[str]]] = ()
    """Groups of layers inside a block, by diffusers name. Converters of files with kohya's names require all
    layers of the first group in each block, and all or none of each other group."""

    def export_problem(self, target: str, whole: bool) -> str | None:
        """Return the reason why a program cannot use weights for this checkpoint, or None if it can.

        Args:
            target: target of `inlaid export`.
            whole: True for a whole model, False for an adapter.
        """
        return None

    def export_notes(self, target: str, whole: bool) -> Sequence[str]:
        """Return notes about sizes of this checkpoint that a program assumes to be others."""
        return ()

    def comfyui_tensors(self) -> Mapping[str, Tensor]:
        """Return tensors that a whole model for ComfyUI needs besides the weights, by original name."""
        return {}
