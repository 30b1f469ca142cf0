"""LoRA or DoRA adapter in memory: diffusers module names, LoRA alpha per module, optional magnitudes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Layout = Literal["diffusers", "bare", "peft", "comfyui", "original", "kohya"]

WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name that `load_lora_weights(folder)` of diffusers loads."""

KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
"""Display names of the adapter kinds."""

PEFT_WEIGHTS = "adapter_model.safetensors"
"""File name that peft and transformers load."""

METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA in a form that is independent of the file layout."""

    tensors: Mapping[str, Tensor]
    """`<module>.lora_A.weight` (r, in), `.lora_B.weight` (out, r) and, if trained, `.lora_B.bias` (out) and
    `.lora_magnitude_vector` (out). Modules have diffusers names; factors of convolutions also have kernel
    axes."""
    alpha: Mapping[str, float]
    """LoRA alpha of each module; the update is scaled by alpha / rank."""
    layout: Layout
    """Layout of the source file."""
    alpha_from: str = "alpha argument"
    """Source of the LoRA alpha, as text."""
    notes: Sequence[str] = ()
    """Notes for the user about reading the file."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the file, without the LoRA configuration."""
    vector: Tensor | None = None
    """Domain embedding (d,) of joint alpha, which is added to the alpha tokens."""

    @property
    def joint(self) -> bool:
        """True if the adapter applies to the alpha tokens of joint alpha only (`alpha.joint`)."""
        return self.header.get("inlaid_alpha") == "joint"

    @property
    def modules(self) -> list[str]:
        """Names of the adapted layers."""
        return list(self.alpha)

    @property
    def rank(self) -> dict[str, int]:
        """Rank of each module."""
        return {m: self.tensors[f"{m}.lora_A.weight"].shape[0] for m in self.alpha}

    @property
    def dora(self) -> bool:
        """True if the adapter has magnitudes; then every module has one."""
        return f"{next(iter(self.alpha))}.lora_magnitude_vector" in self.tensors

    def scale(self, module: str) -> float:
        """Return the factor s of the update s B A."""
        return self.alpha[module] / self.tensors[f"{module}.lora_A.weight"].shape[0]

    def peft_config(self) -> dict[str, Any]:
        """Return the `peft.LoraConfig` arguments that represent this adapter exactly."""
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
