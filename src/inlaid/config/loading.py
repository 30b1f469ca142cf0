"""Loading recipes: YAML, family defaults, overrides, validation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inlaid import limits
from inlaid.config.messages import explain
from inlaid.config.parse import (
    EMPTY,
    ParseError,
    dump,
    parse,
    parse_override,
    read_text,
    shorten,
)
from inlaid.config.plugins import family_class
from inlaid.config.sections import Config, Section
from inlaid.config.values import kinds
from inlaid.files import atomic


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; values of `over` take precedence, and lists are replaced, not merged."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Load a recipe from a YAML file or a run folder.

    Args:
        path: YAML file or run folder. From a run folder, `config.yaml` is loaded, and the key `run` is set to
            `path`, so that a run folder can be moved.
        overrides: texts of the form `section.key=value`, with the value in YAML.

    Raises:
        ValueError: if the recipe does not exist or is invalid. The message lists all mistakes, one per line.
    """
    path, moved = Path(path), {}
    if path.is_dir():
        path, moved = path / "config.yaml", {"run": str(path)}
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; `inlaid new FAMILY DATA` writes one")
    try:
        raw = parse(read_text(path), empty=EMPTY)
    except ParseError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        found = f"found {'text' if isinstance(raw, str) else type(raw).__name__}"
        found = "the file is empty" if raw is EMPTY or raw is None else found
        raise ValueError(f"{path}: a recipe is a mapping of sections (run, model, data, ...); {found}")
    return build({**raw, **moved}, overrides, name=str(path))


def build(raw: Mapping[str, Any], overrides: Iterable[str] = (), *, name: str = "recipe") -> Config:
    """Build and validate a recipe from a nested mapping.

    The order of precedence is: overrides, mapping, defaults of the model family, general defaults.

    Args:
        raw: nested mapping with the content of a recipe file.
        overrides: texts of the form `section.key=value`.
        name: name of the recipe in error messages.

    Raises:
        ValueError: listing all mistakes, one per line.
    """
    for text in overrides:
        keys, nested = _override(text)
        for key in reversed(keys):
            nested = {key: nested}
        raw = merge(raw, nested)
    raw = _filled(raw, Config)
    section = raw.get("model")
    family = section.get("family") if isinstance(section, Mapping) else None
    family = getattr(family, "text", family)
    defaults = family_class(family).defaults if isinstance(family, str) else {}
    optim = raw.get("optim")
    if isinstance(optim, Mapping) and optim.get("name") == "prodigy":
        defaults = merge(defaults, {"optim": {"lr": 1.0}})  # it adapts the rate: other values only scale it
    try:
        return Config.model_validate(merge(defaults, raw))
    except ValidationError as error:
        raise ValueError(explain(error, name)) from None


def _override(text: str) -> tuple[list[str], Any]:
    """Return the keys and the value of an override `section.key=value`.

    Raises:
        ValueError: if the text is not a valid override.
    """
    path, mark, value = text.partition("=")
    keys, shown = path.strip().split("."), shorten(text, 80)
    if not mark or not all(keys):
        raise ValueError(f"`{shown}` is not an override; write section.key=value, such as optim.lr=2e-4")
    if len(keys) > 2 and keys[:2] == ["data", "sources"]:
        raise ValueError(f"`{shown}`: data.sources is a list; set all of it, such as data.sources=[a, b]")
    if len(keys) > limits.RECIPE_DEPTH.value:
        raise ValueError(
            f"`{shown}`: unknown key; sections are nested at most twice, such as data.matte.snap"
        )
    try:
        return keys, parse_override(value, empty=EMPTY)
    except ParseError as error:
        raise ValueError(f"`{shown}`: the value is not valid YAML: {error}") from None


def _filled(raw: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """Return a copy of a section in which keys without a value (`key:` in YAML) are resolved.

    If the key takes a section, its value becomes an empty mapping. If the key takes a list or a mapping, it
    is removed. Both then get their defaults. Any other key without a value gets None.
    """
    out = {}
    for key, value in raw.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None
        found = list(kinds(field.annotation)) if field else []
        parts = [kind for kind in found if issubclass(kind, Section)]
        if value is EMPTY or (value is None and type(None) not in found):
            if list in found or dict in found:
                continue
            value = {} if parts else None
        nested = parts or [Section]
        if isinstance(value, Mapping):
            value = _filled(value, next((p for p in nested if {*value} <= {*p.model_fields}), nested[0]))
        elif isinstance(value, list):
            value = [
                _filled(v, nested[0]) if isinstance(v, Mapping) else None if v is EMPTY else v for v in value
            ]
        out[key] = value
    return out


def save(config: Config, path: Path) -> None:
    """Write a recipe as YAML, with all defaults filled in."""
    values = json.loads(config.model_dump_json())
    with atomic(path) as temporary:
        temporary.write_text(dump(values), "utf-8")
