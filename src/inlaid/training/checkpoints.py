"""Training state on disk: tensors in safetensors, other values in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlaid.files import sha256
from inlaid.runs.packages import require_package

SUBCLASSES = ("OptimState4bit",)
"""Names of torchao's tensor subclasses that consist of several plain tensors."""


def pack_state(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested optimizer state to `tensors`, and return the rest as JSON values.

    The key of a tensor is `prefix` followed by its path in the state.
    """
    if type(state).__name__ in SUBCLASSES:
        parts, rest = state.__tensor_flatten__()
        kept = {n: pack_state(getattr(state, n), f"{prefix}.{n}", tensors) for n in parts}
        signed, shape, dtype = rest
        kept |= {"signed": signed, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        return {"__subclass__": type(state).__name__, "parts": kept}
    if isinstance(state, Tensor):
        tensors[prefix] = state.detach()
        return {"__tensor__": prefix}
    if isinstance(state, Mapping):
        return {"__map__": [[k, pack_state(v, f"{prefix}.{k}", tensors)] for k, v in state.items()]}
    if isinstance(state, (list, tuple)):
        values = [pack_state(v, f"{prefix}.{i}", tensors) for i, v in enumerate(state)]
        return {"__tuple__": values} if isinstance(state, tuple) else values
    assert state is None or isinstance(state, (bool, int, float, str)), (
        f"{prefix}: {type(state).__name__} in optimizer state"
    )
    return state


def unpack_state(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild an optimizer state from the result of `pack_state` and its tensors."""
    if isinstance(state, dict) and "__tensor__" in state:
        return tensors[state["__tensor__"]]
    if isinstance(state, dict) and "__subclass__" in state:
        kept = {n: unpack_state(v, tensors) for n, v in state["parts"].items()}
        signed, shape, dtype = (kept.pop(k) for k in ("signed", "shape", "dtype"))
        kind = getattr(require_package("optim.name", "adamw4bit").subclass_4bit, state["__subclass__"])
        return kind.__tensor_unflatten__(kept, [signed, torch.Size(shape), getattr(torch, dtype)])
    if isinstance(state, dict) and "__map__" in state:
        return {k: unpack_state(v, tensors) for k, v in state["__map__"]}
    if isinstance(state, dict):
        return tuple(unpack_state(v, tensors) for v in state["__tuple__"])
    return [unpack_state(v, tensors) for v in state] if isinstance(state, list) else state


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `trainer.safetensors`, and `state.json` with the SHA-256 of every file in the folder."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "trainer.safetensors")
    files = {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    (folder / "state.json").write_text(json.dumps({**values, "files": files}), "utf-8")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify a checkpoint; return its tensors and the values of its `state.json`.

    Raises:
        ValueError: if a file is missing, truncated or changed.
    """
    out = f"{folder}: this checkpoint is damaged (%s); delete the folder to resume from the previous one"
    try:
        values = json.loads((folder / "state.json").read_text("utf-8"))
        bad = [
            n
            for n, digest in values["files"].items()
            if not (folder / n).is_file() or sha256(folder / n) != digest
        ]
        bad += [f"{key} in state.json" for key in ("step", "per_step", "optimizer") if key not in values]
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ValueError(out % f"state.json: {cause}") from None
    if bad:
        raise ValueError(out % f"missing, truncated or changed: {', '.join(bad)}")
    try:
        return load_file(folder / "trainer.safetensors"), values
    except (SafetensorError, OSError) as error:
        raise ValueError(out % error) from None
