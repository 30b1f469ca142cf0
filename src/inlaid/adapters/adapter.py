"""An adapter in canonical form: diffusers module names, alpha per module, optional DoRA magnitudes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Layout = Literal["diffusers", "bare", "peft", "comfyui", "original", "kohya"]

WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name that `load_lora_weights(folder)` loads."""

KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
"""Display names of the adapter kinds."""

PEFT_WEIGHTS = "adapter_model.safetensors"
"""File name that peft and transformers load."""

METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA in the internal form, independent of the file layout."""

    tensors: Mapping[str, Tensor]
    """`<module>.lora_A.weight` (r, in), `.lora_B.weight` (out, r) and, if trained, `.lora_B.bias` (out) and
    `.lora_magnitude_vector` (out). Modules have diffusers names; convolutions keep their kernel axes."""
    alpha: Mapping[str, float]
    """Alpha of each module; the update is scaled by alpha / rank."""
    layout: Layout
    """Layout of the source file."""
    alpha_from: str = "alpha argument"
    """Source of alpha."""
    notes: Sequence[str] = ()
    """Notes for the user about the import."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Remaining metadata of the file."""
    vector: Tensor | None = None
    """Domain embedding of joint transparency, added to the alpha tokens, (d,)."""

    @property
    def joint(self) -> bool:
        """True if the adapter applies to the alpha tokens only (`alpha.joint`)."""
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
        """Return the arguments of `peft.LoraConfig` that restore this adapter exactly."""
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
