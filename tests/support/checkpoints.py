"""Checkpoints of runs, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from inlaid.training.checkpoints import load_tensors, verify


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, which is verified, and the values of its `state.json`."""
    values = verify(folder)
    return load_tensors(folder), values
