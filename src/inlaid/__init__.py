"""inlaid: fine-tune diffusion transformers on a folder of clips.

The usual result is an adapter that diffusers and ComfyUI load. The public names are `Config`, `load`,
`train`, `generate` and `evaluate`. Each name is imported on first use, because importing torch and diffusers
takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlaid.config import Config, load
    from inlaid.evaluation.evaluate import evaluate
    from inlaid.generation.generate import generate
    from inlaid.training.loop import train

__all__ = ["Config", "evaluate", "generate", "load", "train"]
__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "load": "config",
    "train": "training.loop",
    "generate": "generation.generate",
    "evaluate": "evaluation.evaluate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `inlaid` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(f"inlaid.{_HOMES[name]}"), name)
