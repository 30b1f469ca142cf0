"""Optional packages, imported only when a recipe uses them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

PACKAGES = {
    "adamw8bit": ("bitsandbytes.optim", "inlaid[bnb]"),
    "adamw4bit": ("torchao.optim", "inlaid[torchao]"),
    "int8": ("torchao.quantization", "inlaid[torchao]"),
    "float8": ("torchao.quantization", "inlaid[torchao]"),
    "nf4": ("bitsandbytes.nn", "inlaid[bnb]"),
    "prodigy": ("prodigyopt", "inlaid[prodigy]"),
    "deepspeed": ("deepspeed", "inlaid[deepspeed]"),
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "trackio": ("trackio", "inlaid[trackio]"),
    "wandb": ("wandb", "inlaid[wandb]"),
}
"""Optional features by their name in recipes. The values are the module to import and the argument of
`pip install`."""


def require_package(key: str, name: str) -> Any:
    """Import the module of an optional feature, and return it.

    Args:
        key: recipe key that selects the feature, for the error message.
        name: name of the feature in recipes.

    Raises:
        ValueError: if the package is not installed.
    """
    module, install = PACKAGES[name]
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{key}: `{name}` needs a package that is not installed ({error}): pip install '{install}'"
        ) from None
