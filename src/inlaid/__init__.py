"""inlaid teaches diffusion transformers a new subject.

From a folder of clips to an adapter that diffusers and ComfyUI load. `Config`, `load`, `train`, `generate`
and `evaluate` are the public names; they are imported when first used, because torch and diffusers take
seconds.
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
    """A module that is also its function of the same name.

    Importing `inlaid.train` binds the module over the public function `inlaid.train`; so that both always mean
    the same, the three modules that share their function's name take this class.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)
