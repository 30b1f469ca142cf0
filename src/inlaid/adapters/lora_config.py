"""Parsing and validation of a LoRA configuration, from a file header or from `adapter_config.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlaid.reading import FileError, parse_json

HUGE = 1e30
"""Limit for LoRA alpha and for the values of an update, far above real values; float32 overflows at 3e38."""

_CONFIG_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "peft_type": str,
    "r": int,
    "use_dora": bool,
    "use_rslora": bool,
    "alpha_pattern": dict,
    "rank_pattern": dict,
    "target_modules": (str, list),
    "init_lora_weights": (bool, str),
    "bias": str,
}
"""Required types of the LoRA settings that inlaid reads; null is valid for every setting."""


_COMPONENTS = ("transformer", "transformer_2")
"""Names of the networks in a pipeline. diffusers uses them as prefixes of configuration keys."""


def parse_config(path: Path, raw: str, origin: str, component: str = "transformer") -> dict[str, Any]:
    """Parse and validate an adapter configuration, whose settings have peft's names.

    Args:
        path: adapter file, for messages.
        raw: JSON text.
        origin: where the text was found, for messages.
        component: network whose settings are returned. Settings of other networks are left out.

    Raises:
        ValueError: if the text is not JSON or is nested too deeply, or if a value has a wrong type, is out of
            range, or is a regular expression that can take exponential time.
    """

    def wrong(why: str) -> ValueError:
        return FileError(path, f"{origin} is not a LoRA configuration in JSON ({why})")

    try:
        config = parse_json(raw)
    except json.JSONDecodeError as error:
        raise wrong(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise wrong(str(error)) from None
    if not isinstance(config, dict):
        raise wrong(f"found {type(config).__name__}")
    others = tuple(f"{name}." for name in _COMPONENTS if name != component)
    config = {k.removeprefix(f"{component}."): v for k, v in config.items() if not k.startswith(others)}
    for key, kind in _CONFIG_TYPES.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise wrong(f"`{key}` is {type(config[key]).__name__}")
    targets = config.get("target_modules") or ()
    if not all(isinstance(t, str) for t in targets):
        raise wrong("`target_modules` has values that are no names")
    saved = config.get("modules_to_save") or ()
    if not isinstance(saved, list | tuple) or not all(isinstance(n, str) for n in saved):
        raise wrong("`modules_to_save` is no list of names")
    patterns = config.get("alpha_pattern") or {}
    alphas = {"lora_alpha": config.get("lora_alpha", 1), "alpha": config.get("alpha"), **patterns}
    for key, value in alphas.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and value and abs(value) < HUGE):
            raise wrong(f"alpha of `{key}` is {str(value)[:40]}, it must be a finite number other than 0")
    if "lora_alpha" in config and config["lora_alpha"] is None:
        del config["lora_alpha"]
    for name in ("alpha_pattern", "rank_pattern"):
        for key in config.get(name) or {}:
            if len(key) > 500 or _BACKTRACKING.search(key):
                raise wrong(f"`{key[:80]}` of {name} repeats a group, which can take forever to match")
            try:
                re.compile(key)
            except (re.error, RecursionError, OverflowError) as error:
                raise wrong(f"`{key[:80]}` of {name} is not a regular expression: {error}") from None
    for key, value in {"r": config.get("r"), **(config.get("rank_pattern") or {})}.items():
        if value is not None and (type(value) is not int or not 0 < value < HUGE):
            raise wrong(f"rank of `{key[:80]}` is {str(value)[:40]}, it must be a number above 0")
    return config


def find_pattern(patterns: Mapping[str, Any], module: str) -> str | None:
    """Return the first pattern that applies to a module by peft's rule, or None.

    A pattern is a regular expression. It must match the whole module name, or everything after one of its
    dots.
    """
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float | None:
    """Return the LoRA alpha that a configuration states for a module, or None.

    With `use_rslora`, peft's scale is alpha / sqrt(rank). The returned value is then alpha * sqrt(rank), so
    that dividing it by the rank gives this scale.

    Args:
        config: configuration from `parse_config`.
        module: name of the module in the file.
        rank: rank of the module.
    """
    default = config.get("alpha" if peft_type(config) in ("LOKR", "LOHA") else "lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    key = find_pattern(patterns, module)
    value = default if key is None else patterns[key]
    if value is None:
        return None
    return float(value) * (math.sqrt(rank) if config.get("use_rslora") else 1)


def peft_type(config: Mapping[str, Any]) -> str:
    """Return the `peft_type` of a configuration, in capitals. The default is `LORA`."""
    return str(config.get("peft_type") or "LORA").rsplit(".")[-1].upper()


_BACKTRACKING = re.compile(r"\)[*+{]|([*+}].*){4}|\(\?\(|\\\d")
"""Matches regular expressions that can take exponential time, such as those with repeated groups, many
repetitions, conditionals or back references."""
