"""Parsing and validation of a LoRA configuration, from a file header or from `adapter_config.json`."""

from __future__ import annotations

import json
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
}
"""Required types of the LoRA settings that inlaid reads; null is valid for every setting."""


def parse_config(path: Path, raw: str, origin: str) -> dict[str, Any]:
    """Parse and validate a LoRA configuration in JSON.

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
    config = {k.removeprefix("transformer."): v for k, v in config.items()}
    for key, kind in _CONFIG_TYPES.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise wrong(f"`{key}` is {type(config[key]).__name__}")
    targets = config.get("target_modules") or ()
    if not all(isinstance(t, str) for t in targets):
        raise wrong("`target_modules` has values that are no names")
    patterns = config.get("alpha_pattern") or {}
    alphas = {"lora_alpha": config.get("lora_alpha", 1), "alpha": config.get("alpha"), **patterns}
    for key, value in alphas.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and value and abs(value) < HUGE):
            raise wrong(f"alpha of `{key}` is {str(value)[:40]}, it must be a finite number other than 0")
    if "lora_alpha" in config and config["lora_alpha"] is None:
        del config["lora_alpha"]
    for key in patterns:
        if len(key) > 500 or _BACKTRACKING.search(key):
            raise wrong(f"`{key[:80]}` of alpha_pattern repeats a group, which can take forever to match")
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise wrong(f"`{key[:80]}` of alpha_pattern is not a regular expression: {error}") from None
    return config


_BACKTRACKING = re.compile(r"\)[*+{]|([*+}].*){4}|\(\?\(|\\\d")
"""Pattern of regular expressions that can take exponential time, such as expressions with repeated groups,
many repetitions, conditionals or back references."""
