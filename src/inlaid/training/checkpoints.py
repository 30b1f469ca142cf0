"""Save, verify and load the training state of a checkpoint: tensors as safetensors, other values as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inlaid.files import save_file, sha256
from inlaid.runs.packages import require_package
from inlaid.training.fingerprint import Fingerprint

SUBCLASSES = ("OptimState4bit",)
"""Names of the torchao tensor subclasses that `pack_state` splits into their component tensors."""


def pack_state(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Split a nested optimizer state into tensors and JSON values.

    Each tensor is added to `tensors`. Its key is `prefix` followed by the path of the tensor in the state.
    The returned JSON values contain this key in place of the tensor.
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
    """Rebuild an optimizer state from the JSON values and the tensors that `pack_state` produced."""
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


DATA = "data.json"
"""Name of the checkpoint file that contains the fingerprint of the data (`Fingerprint`)."""


def save_state(
    folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], data: Fingerprint | None = None
) -> None:
    """Write the training state to a checkpoint folder that already contains the trained weights.

    Three files are written: `trainer.safetensors` with the tensors, `data.json` with the fingerprint of the
    data, and `state.json` with the other values. `state.json` also contains the SHA-256 of every other file
    in the folder, and the SHA-256 of its own values.
    """
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "trainer.safetensors")
    (folder / DATA).write_text(
        json.dumps(data or {"sources": [], "excluded": []}, ensure_ascii=False), "utf-8"
    )
    files = {f.relative_to(folder).as_posix(): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    own = {**values, "files": files}
    (folder / "state.json").write_text(json.dumps({**own, "digest": _digest(own)}), "utf-8")


def _digest(values: Mapping[str, Any]) -> str:
    """Serialize a mapping as JSON with sorted keys, and return the SHA-256 of the text."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """Verify the hashes of all files in a checkpoint, and return the values of its `state.json`.

    Raises:
        ValueError: if a file is missing, truncated or changed; the message names the newest earlier
            checkpoint that is not damaged, if there is one.
    """
    try:
        return _verified(folder)
    except ValueError as error:
        raise ValueError(f"{folder}: this checkpoint is damaged ({error}); {_way_out(folder)}") from None


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Load the tensors in `trainer.safetensors` of a checkpoint; call `verify` first.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        return load_file(folder / "trainer.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: this checkpoint is damaged ({error}); {_way_out(folder)}") from None


def load_fingerprint(folder: Path) -> Fingerprint:
    """Load the fingerprint of the training data (`Fingerprint`) from a checkpoint folder.

    The file is not verified here; call `verify` first.
    """
    return json.loads((folder / DATA).read_text("utf-8"))


def _verified(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint, and return the values of its `state.json`.

    Raises:
        ValueError: if the checkpoint is damaged; the message describes the damage.
    """
    try:
        values = json.loads((folder / "state.json").read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"state.json: {error.strerror}") from None
    except RecursionError:
        raise ValueError("state.json: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"state.json: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("state.json: not a mapping")
    absent = [key for key in ("step", "per_step", "optimizer", "files", "digest") if key not in values]
    if absent:
        raise ValueError(f"missing: {', '.join(f'{key} in state.json' for key in absent)}")
    if values.pop("digest") != _digest(values):
        raise ValueError("state.json was changed after it was written")
    number = re.fullmatch(r"step-(\d+)", folder.name)
    for key in ("step", "per_step"):
        value = values[key]
        if type(value) is not int or value < 1:
            raise ValueError(f"state.json: {key} is {str(value)[:40]!r}, not a number above 0")
    if number and int(number[1]) != values["step"]:
        raise ValueError(f"state.json: it is that of step {values['step']}")
    files = values["files"]
    if not isinstance(files, dict) or "trainer.safetensors" not in files:
        raise ValueError("state.json: no hashes of files")
    bad = [n for n, digest in files.items() if not (folder / n).is_file() or sha256(folder / n) != digest]
    if bad:
        raise ValueError(f"missing, truncated or changed: {', '.join(bad)}")
    return values


def _way_out(folder: Path) -> str:
    """Return advice for the error message about a damaged checkpoint: how to continue the run."""
    number = re.fullmatch(r"step-(\d+)", folder.name)
    others = [p for p in folder.parent.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    earlier = [p for p in others if number and int(p.name[5:]) < int(number[1])]
    for other in sorted(earlier, key=lambda p: int(p.name[5:]), reverse=True):
        with suppress(ValueError):
            _verified(other)
            return f"delete the folder to resume from the previous one, {other.name}"
    return "delete the folder to start again from step 0: no earlier checkpoint is usable"
