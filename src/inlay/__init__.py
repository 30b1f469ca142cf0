"""inlay teaches diffusion transformers a new subject.

From a folder of clips to an adapter that diffusers and ComfyUI load. `Config`, `load`, `train`, `generate`
and `evaluate` are the public names; they are imported when first used, because torch and diffusers take
seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.config import Config, load
    from inlay.evaluate import evaluate
    from inlay.generate import generate
    from inlay.train import train

__all__ = ["Config", "evaluate", "generate", "load", "train"]
__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "load": "config",
    "train": "train",
    "generate": "generate",
    "evaluate": "evaluate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `inlay` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(f"inlay.{_HOMES[name]}"), name)
