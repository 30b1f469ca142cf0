"""Facts about a model for export to other programs: original layer names, and requirements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from inlaid.families.checkpoint import Checkpoint
from inlaid.families.original_names import OriginalNames

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class JointLayout:
    """File layout that TransPixeler's inference script requires for an adapter with joint alpha."""

    key: str
    """Format string of the tensor names, with the fields `block`, `layer` and `factor`."""
    layers: Mapping[str, str]
    """Layer names in the file, by their diffusers names inside a block. The file must contain all of them."""
    factors: tuple[str, str]
    """Names of the factors A and B."""
    rule: Literal["block", "bias"]
    """Rule of the script for how much text tokens attend to alpha tokens (`alpha.text_to_alpha`)."""
    vector: str | None
    """Tensor name of the domain embedding (1, 1, d), which must be in the file; None if there is none."""
    torch_file: bool
    """True if the script reads a torch file with an entry `state_dict`; otherwise a safetensors file."""
    width: int
    """Fixed width of the attention layers in the script."""

    rank: ClassVar[int] = 128
    """Fixed rank in the script; the LoRA alpha is 1."""


class OtherPrograms(Checkpoint):
    """Base class of `Family` with information for export to other programs, such as original layer names."""

    original: ClassVar[OriginalNames] = OriginalNames()
    """Layer names in the original code, for other programs; empty if they are the same as in diffusers."""
    programs: ClassVar[Sequence[str]] = ()
    """Targets of `inlaid export` that exist for this family, besides `diffusers` and `merged`."""
    joint_layout: ClassVar[JointLayout | None] = None
    """Layout of the export target `transpixeler`."""

    kohya_layers: ClassVar[Sequence[Sequence[str]]] = ()
    """Groups of layers inside a block, by diffusers name. Converters for files with kohya's names require all
    layers of the first group in each block, and all or none of each other group."""

    fixed_sizes: ClassVar[Mapping[str, int]] = {}
    """Values of the denoiser's configuration that other programs assume for a whole model."""

    def export_problem(self, target: str, whole: bool) -> str | None:
        """Return the reason why an export target does not support this checkpoint, or None.

        Args:
            target: target of `inlaid export`.
            whole: True for a whole model, False for an adapter.
        """
        return None

    def export_notes(self, target: str, whole: bool) -> Sequence[str]:
        """Return a note if other programs cannot build this network, because they assume other sizes."""
        if not whole or target not in self.programs:
            return ()
        config = self.read_config(self.component) or {}
        other = [
            f"{k} {config[k]} instead of {v}" for k, v in self.fixed_sizes.items() if config.get(k, v) != v
        ]
        if not other:
            return ()
        return [
            f"other programs assume the sizes of the published models; {self.name} has {', '.join(other)}"
        ]

    def comfyui_tensors(self) -> Mapping[str, Tensor]:
        """Return tensors that ComfyUI requires in the file of a whole model, but diffusers does not save.

        The keys are tensor names in the original code of the model.
        """
        return {}
