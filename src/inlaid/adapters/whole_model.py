"""Export of a whole model to one file, with the tensor names that the model's authors use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from inlaid.adapters.layers import some_of
from inlaid.adapters.source import load_safetensors
from inlaid.console import progress
from inlaid.files import atomic, save_file

if TYPE_CHECKING:
    from inlaid.families import Family


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read all tensors from the folder of a diffusers network. Their dtypes stay as stored.

    Raises:
        ValueError: if the folder has no tensors, or a file is damaged.
    """
    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with load_safetensors(shard) as file:
            state |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not state:
        raise ValueError(f"{folder}: no safetensors file of a network")
    return state


@torch.no_grad()
def write_original(
    out: Path,
    state: Mapping[str, Tensor],
    family: type[Family] | Family,
    *,
    extra: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    header: Mapping[str, str] | None = None,
) -> Path:
    """Write a network as one safetensors file with the tensor names of the original code; verify the file.

    Args:
        out: file to write.
        state: tensors of the network by diffusers name.
        family: model family that defines the names.
        extra: further tensors by original name, such as a table that diffusers computes.
        dtype: dtype of the file. Default: that of each tensor.
        header: metadata of the file.

    Raises:
        ValueError: if a tensor has no original name, or the file cannot be written.
    """
    names = family.original
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    added = {k: t if dtype is None else t.to(dtype) for k, t in (extra or {}).items()}
    tensors = {k: t.detach().cpu().contiguous() for k, t in {**names.to_original(state), **added}.items()}
    try:
        with atomic(out) as part:
            save_file(tensors, part, metadata={**(header or {}), "format": "pt"})
            left = set(state)
            with safe_open(part, "pt") as file, progress("comparing", len(tensors), "tensors") as advance:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key)
                    advance()
                    if key in added:
                        assert torch.equal(tensor, added[key]), f"{key} differs on disk"
                        continue
                    for name, mine in names.to_diffusers({key: tensor}, state).items():
                        assert torch.equal(mine, state[name].cpu()), f"{name} differs in the file"
                        left.discard(name)
            assert not left, f"not written: {some_of(left)}"
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror})") from None
    return out
