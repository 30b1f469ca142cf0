"""LoKr and LoHa adapters (Yeh et al. 2023, https://arxiv.org/abs/2309.14859): faster layers, and file I/O.

The pipelines of diffusers load neither LoKr nor LoHa. The method `load_lora_adapter` of a diffusers
transformer loads LoKr, but not LoHa. Both kinds of adapters are written in the file layout of this method.
The file name is `pytorch_lora_weights.safetensors`. The tensors have peft's names with the prefix
`transformer.`, and the header contains peft's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlaid.adapters.adapter import METADATA_KEY, WEIGHTS
from inlaid.adapters.lycoris_export import write_original
from inlaid.adapters.source import load_safetensors, open_adapter
from inlaid.adapters.write import adapter_header, write_tensors
from inlaid.files import atomic, read_metadata

if TYPE_CHECKING:
    from inlaid.families.original_names import OriginalNames

KINDS = ("lokr", "loha")
"""Values of `tuner.kind` that this module implements."""

_CONFIG: Mapping[str, tuple[str, ...]] = {
    "lokr": ("peft_type", "r", "alpha", "decompose_both", "decompose_factor", "use_effective_conv2d"),
    "loha": ("peft_type", "r", "alpha", "use_effective_conv2d"),
}
"""peft settings that change the output of a layer, by adapter kind. The file header stores only these."""


def factor(denoiser: nn.Module, name: str) -> None:
    """Make the LoKr and LoHa linear layers of an adapter faster; results stay equal up to rounding.

    `name` is peft's name of the adapter. peft computes the full update matrix (out, in) in float32 in every
    pass. LoKr does not need this matrix: the Kronecker factors are applied to the activations one after the
    other. LoHa needs the matrix, but applies it in the dtype of the activations. peft's option
    `module_dropout` is not supported, so that each layer compiles to one graph.
    """
    from peft.tuners.loha.layer import Linear as LoHaLinear
    from peft.tuners.lokr.layer import Linear as LoKrLinear

    class FactoredLoKr(LoKrLinear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            w1, rest = self.lokr_w1[name], x.to(self.lokr_w1[name].dtype).unflatten(-1, (-1, self.split))
            if name in self.lokr_w2:
                rest = F.linear(rest, self.lokr_w2[name])
            else:
                rest = F.linear(F.linear(rest, self.lokr_w2_b[name]), self.lokr_w2_a[name])
            update = (w1 @ rest).flatten(-2) * self.scaling[name]
            return self.base_layer(x, *args, **kwargs) + update.to(x.dtype)

        @property
        def split(self) -> int:
            """Number of columns of the second Kronecker factor."""
            return (self.lokr_w2 if name in self.lokr_w2 else self.lokr_w2_b)[name].shape[1]

    class FactoredLoHa(LoHaLinear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            first, second = (
                getattr(self, f"hada_w{i}_a")[name] @ getattr(self, f"hada_w{i}_b")[name] for i in (1, 2)
            )
            update = F.linear(x, (first * second * self.scaling[name]).to(x.dtype))
            return self.base_layer(x, *args, **kwargs) + update

    for module in denoiser.modules():
        if type(module) is LoKrLinear and name in module.lokr_w1:
            module.__class__ = FactoredLoKr
        elif type(module) is LoHaLinear and name in module.hada_w1_a:
            module.__class__ = FactoredLoHa


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a LoKr or LoHa adapter file and return its path.

    Args:
        folder: folder to write; created if missing.
        tensors: tensors by name, such as `<module>.lokr_w1`.
        peft_config: `LoKrConfig` or `LoHaConfig` as a mapping.
        metadata: additional header entries.

    Raises:
        OSError: if the file cannot be written.
    """
    kind = str(peft_config["peft_type"]).rsplit(".")[-1].lower()
    modules = sorted({key.rsplit(".", 1)[0] for key in tensors})
    config = {k: peft_config[k] for k in _CONFIG[kind]} | {
        "peft_type": kind.upper(),
        "target_modules": modules,
    }
    path = folder / WEIGHTS
    named = {f"transformer.{k}": tensors[k] for k in sorted(tensors)}
    write_tensors(path, named, {**metadata, **adapter_header(config)})
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the peft configuration of a LoKr or LoHa adapter; None for other adapters.

    Raises:
        ValueError: if the file is damaged, contains NaN or infinity, or stores no peft configuration.
    """
    tensors, config, file = open_adapter(path)
    if not any(mark in key for key in tensors for mark in ("lokr_", "hada_")):
        return None
    kind = str(config.get("peft_type", "")).rsplit(".")[-1].lower()
    if kind not in KINDS:
        raise ValueError(
            f"{file}: a LyCORIS adapter without peft's configuration in the header, so its alpha is unknown: "
            "merge it with LyCORIS"
        )
    invalid = [k for k, t in tensors.items() if not t.isfinite().all()]
    if invalid:
        raise ValueError(
            f"{file}: {len(invalid)} tensors contain NaN or infinity, such as {invalid[0]}: "
            "use another checkpoint"
        )
    return {k.removeprefix("transformer."): t for k, t in tensors.items()}, dict(config)


def load(denoiser: nn.Module, path: Path, name: str = "inlaid") -> bool:
    """Load a LoKr or LoHa adapter into a network and return True; return False for other adapters.

    If the network is on the meta device, the names and shapes of the tensors are checked, but no values are
    loaded.

    Raises:
        ValueError: if the file is damaged, or a tensor does not fit the network.
    """
    import peft
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    found = read(path)
    if found is None:
        return False
    tensors, config = found
    kind = config["peft_type"].rsplit(".")[-1].lower()
    options = {k: config[k] for k in (*_CONFIG[kind][1:], "target_modules") if k in config}
    make = peft.LoKrConfig if kind == "lokr" else peft.LoHaConfig
    missing = set(options["target_modules"]) - {n for n, _ in denoiser.named_modules()}
    if missing:
        raise ValueError(
            f"{path}: trained on another network: this one has no {', '.join(sorted(missing)[:4])}"
        )
    denoiser.add_adapter(make(**options), adapter_name=name)  # type: ignore[operator]
    mine = get_peft_model_state_dict(denoiser, adapter_name=name)
    wrong = sorted(tensors.keys() ^ mine.keys())
    wrong += [k for k in sorted(tensors.keys() & mine.keys()) if tensors[k].shape != mine[k].shape]
    if wrong:
        raise ValueError(
            f"{path}: trained on another network: {len(wrong)} tensors do not fit, such as {wrong[0]}"
        )
    if not next(iter(mine.values())).is_meta:
        set_peft_model_state_dict(denoiser, dict(tensors), adapter_name=name)
        factor(denoiser, name)
    return True


def export(
    path: Path,
    to: str,
    out: Path,
    names: OriginalNames,
) -> Path:
    """Export a LoKr or LoHa adapter.

    For `diffusers`, the file is copied. For other targets, the written file is compared with the adapter.

    Args:
        path: folder of the adapter.
        to: target: `diffusers`, `comfyui` or `musubi`.
        out: folder to write; for `comfyui` and `musubi`, a file.
        names: names of the layers in the family's original code.

    Returns:
        Path of the written file.

    Raises:
        ValueError: if the target cannot represent a layer.
    """
    found = read(path)
    assert found
    if to != "diffusers":
        with load_safetensors(path / WEIGHTS) as file:
            header = {k: v for k, v in read_metadata(file).items() if k not in (METADATA_KEY, "config")}
        return write_original(out, *found, names, to, header)
    with atomic(out) as folder:
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes())
    return out / WEIGHTS


@torch.no_grad()
def merge(base: nn.Module, path: Path) -> None:
    """Merge a LoKr or LoHa adapter into the weights of a float32 network, in place."""
    from peft.tuners.lycoris_utils import LycorisLayer

    load(base, path)
    for module in base.modules():
        if isinstance(module, LycorisLayer):
            module.merge()
    base.unload_lora()  # type: ignore[operator]
