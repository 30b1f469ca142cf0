"""Conversion of adapters from the original trainers of Mochi and CogVideoX to the usual tensor names.

Mochi's trainer (genmo) stores the ranks and LoRA alphas as JSON in the header. CogVideoX's trainer (SAT)
stores no LoRA alpha. It writes a whole checkpoint, in which query, key and value are numbered: the name
`query_key_value.matrix_A.0` stands for a factor of the query. This module is based on the layout of the
files, not on the authors' code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from inlaid.adapters.lora_config import HUGE
from inlaid.reading import FileError, parse_json

GENMO_KEY = "kwargs"
"""Key of the settings of genmo's Mochi trainer, in the file header or in a torch file."""

_GENMO = {"qkv_proj": r"qkv_[xy]", "out_proj": r"proj_[xy]"}
"""Patterns of module names, by layer name in genmo's settings."""

_SAT = re.compile(r"(?:.+\.)?layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d+)")

_SAT_LAYERS = {"query_key_value": ("to_q", "to_k", "to_v"), "dense": ("to_out.0",)}


@dataclass(frozen=True)
class Published:
    """LoRA from Mochi's or CogVideoX's original trainer, with tensors named as in other LoRA files."""

    tensors: Mapping[str, Tensor]
    name: str
    """Model and trainer, for messages."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Configuration under peft's names; empty if the file stores none."""
    ask_alpha: str = ""
    """If not empty, the reason why the user has to pass LoRA alpha."""
    notes: Sequence[str] = ()


def recognize(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Published | None:
    """Convert an adapter of Mochi's trainer (genmo) or CogVideoX's trainer (SAT).

    Args:
        path: path of the file, for error messages.
        tensors: tensors of the file.
        header: metadata of the file.

    Returns:
        The converted adapter, or None for other files.

    Raises:
        ValueError: if it is such a file, but its settings are invalid, its settings disagree with its
            tensors, or a factor belongs to an unknown layer.
    """
    if any(re.search(r"\.matrix_[AB]\.", k) for k in tensors):
        return _sat(path, tensors)
    if GENMO_KEY in header and any(re.search(r"\.(qkv|proj)_[xy]\.", k) for k in tensors):
        return _genmo(path, tensors, header[GENMO_KEY])
    return None


def _sat(path: Path, tensors: Mapping[str, Tensor]) -> Published:
    named, others, wrong = {}, 0, []
    for key, tensor in tensors.items():
        match = _SAT.fullmatch(key)
        layers = _SAT_LAYERS[match[2]] if match else ()
        if match and int(match[4]) < len(layers):
            layer = layers[int(match[4])]
            named[f"transformer.transformer_blocks.{match[1]}.attn1.{layer}.lora_{match[3]}.weight"] = tensor
        elif ".matrix_" in key:
            wrong.append(key)
        else:
            others += 1
    if wrong:
        some = ", ".join(wrong[:3])
        raise FileError(path, f"{len(wrong)} factors of unknown layers of CogVideoX (SAT), such as {some}")
    notes = [f"{others} other tensors of the checkpoint are not part of the LoRA: not used"] if others else []
    ask = (
        "files of CogVideoX's own trainer (SAT) store no LoRA alpha: pass --alpha. Its published settings "
        "have alpha 1 (--alpha 1, scale 1 / rank)"
    )
    return Published(named, "CogVideoX (SAT)", ask_alpha=ask, notes=notes)


def _genmo(path: Path, tensors: Mapping[str, Tensor], raw: Any) -> Published:
    """Return an adapter of genmo's trainer, with the LoRA alphas from the trainer's settings.

    Args:
        path: the adapter file, for error messages.
        tensors: tensors of the file.
        raw: the settings as JSON text, from the metadata of the file.

    Raises:
        FileError: if the settings are invalid, or if their ranks differ from those of the tensors.
    """

    def wrong(why: str) -> FileError:
        return FileError(path, f"`{GENMO_KEY}` does not hold the LoRA settings of genmo's trainer ({why})")

    try:
        settings = parse_json(raw)
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise wrong(str(error)[:200]) from None
    if not isinstance(settings, dict):
        raise wrong(f"found {type(settings).__name__}")
    alphas: dict[str, float] = {}
    for layer, pattern in _GENMO.items():
        ranks = {
            t.shape[0] for k, t in tensors.items() if re.search(rf"\.{pattern}\.lora_(A|down)", k) and t.ndim
        }
        if not ranks:
            continue
        rank, alpha = (settings.get(f"{layer}_lora_{x}") for x in ("rank", "alpha"))
        if not _is_number(rank) or not _is_number(alpha):
            raise wrong(f"rank and alpha of {layer} are {rank} and {alpha}")
        if ranks != {rank}:
            raise wrong(f"it has rank {rank} for {layer}, the tensors have {sorted(ranks)}")
        alphas[pattern] = float(alpha)
    if not alphas:
        raise wrong("no layer with settings")
    config = {"lora_alpha": next(iter(alphas.values())), "alpha_pattern": alphas}
    return Published(tensors, f"the settings of genmo's trainer ({GENMO_KEY})", config)


def _is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number above 0 and below `HUGE`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < HUGE
