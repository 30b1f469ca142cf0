"""LoRA or DoRA adapter in memory, with diffusers module names and the LoRA alpha of each module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Layout = Literal["diffusers", "bare", "peft", "comfyui", "original", "kohya", "lycoris"]

WEIGHTS = "pytorch_lora_weights.safetensors"
"""Name of the adapter file that `load_lora_weights(folder)` of diffusers loads."""

KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
"""Display names of the adapter kinds."""

PEFT_WEIGHTS = "adapter_model.safetensors"
"""Name of the adapter file that peft and transformers load."""

METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA adapter in memory, in a form that does not depend on the layout of its file."""

    tensors: Mapping[str, Tensor]
    """Tensors by name: `<module>.lora_A.weight` (r, in), `<module>.lora_B.weight` (out, r) and, if trained,
    `<module>.lora_B.bias` (out) and `<module>.lora_magnitude_vector` (out). Module names are the names in
    diffusers. For convolutions, A and B also have kernel axes."""
    alpha: Mapping[str, float]
    """LoRA alpha by module name; the update is scaled by alpha / rank."""
    layout: Layout
    """Layout of the file that the adapter was read from."""
    alpha_from: str = "alpha argument"
    """Text that names the source of the LoRA alpha, for messages."""
    notes: Sequence[str] = ()
    """Messages for the user about how the file was read."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Metadata from the file header, without the LoRA configuration."""
    vector: Tensor | None = None
    """Domain embedding (d,): trained vector that is added to the alpha channel's tokens; None if absent."""
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    """Changes to parameters without low-rank factors, such as norms, by name. They can only be merged."""

    @property
    def joint(self) -> bool:
        """True if the adapter applies only to alpha tokens, which represent the alpha channel."""
        return self.header.get("inlaid_alpha") == "joint"

    @property
    def modules(self) -> list[str]:
        """Names of the layers that the adapter changes."""
        return list(self.alpha)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each module's update, by module name: (out, in), then the kernel size of a convolution."""
        pairs = {m: [self.tensors[f"{m}.lora_{x}.weight"].shape for x in "AB"] for m in self.alpha}
        return {m: (b[0], *a[1:]) for m, (a, b) in pairs.items()}

    @property
    def rank(self) -> dict[str, int]:
        """Rank of the low-rank update by module name."""
        return {m: self.tensors[f"{m}.lora_A.weight"].shape[0] for m in self.alpha}

    @property
    def dora(self) -> bool:
        """True for a DoRA, in which every module has a magnitude vector; False for a LoRA."""
        return any(f"{module}.lora_magnitude_vector" in self.tensors for module in self.alpha)

    def scale(self, module: str) -> float:
        """Return the scale s = alpha / rank of a module's low-rank update s B A."""
        return self.alpha[module] / self.tensors[f"{module}.lora_A.weight"].shape[0]

    def peft_config(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig` that describe this adapter exactly."""
        rank, alpha = self.rank, {m: int(a) if float(a).is_integer() else a for m, a in self.alpha.items()}
        r, a = (Counter(values.values()).most_common(1)[0][0] for values in (rank, alpha))
        return {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": a,
            "rank_pattern": {f"^{re.escape(m)}": v for m, v in rank.items() if v != r},
            "alpha_pattern": {f"^{re.escape(m)}": v for m, v in alpha.items() if v != a},
            "target_modules": sorted(rank),
            "use_dora": self.dora,
            "lora_bias": any(k.endswith(".lora_B.bias") for k in self.tensors),
        }
