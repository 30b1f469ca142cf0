"""inlaid: fine-tune diffusion transformers on a folder of clips.

The result is an adapter that diffusers and ComfyUI load. `Config`, `load`, `train`, `generate` and `evaluate`
are the public names. They are imported on first use, because importing torch and diffusers takes seconds.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlaid.config import Config, load
    from inlaid.evaluate import evaluate
    from inlaid.generate import generate
    from inlaid.train import train

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
        raise AttributeError(f"module `inlaid` has no attribute `{name}`")
    from importlib import import_module

    home = import_module(f"inlaid.{_HOMES[name]}")
    return home if name in _CALLABLE else getattr(home, name)


_CALLABLE = ("train", "generate", "evaluate")


class CallableModule(ModuleType):
    """Module that can be called like its function of the same name.

    Importing the module `inlaid.train` binds it over the public function `inlaid.train`. The three modules
    that share the name of their function use this class, so that the name can be called in both cases.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)
