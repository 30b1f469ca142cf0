"""Loading recipes: YAML, family defaults, overrides, validation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from inlaid.config.messages import explain
from inlaid.config.plugins import family_class
from inlaid.config.sections import Config
from inlaid.files import atomic


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; PyYAML silently uses the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate key `{key.value}`; keep one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; values of `over` take precedence, and lists are replaced, not merged."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Load a recipe, or the recipe of a run folder.

    Args:
        path: YAML file, or a run folder (its `config.yaml` is read, and `run` becomes the folder itself, so
            that runs can be moved).
        overrides: `section.key=value`, with the value in YAML.

    Raises:
        ValueError: listing all mistakes in the recipe, one per line.
    """
    path, moved = Path(path), {}
    if path.is_dir():
        path, moved = path / "config.yaml", {"run": str(path)}
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; `inlaid new FAMILY DATA` writes one")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a recipe, the file is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{path}: not valid YAML: {where}{what or ' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        found = "the file is empty" if raw is None else f"found {type(raw).__name__}"
        raise ValueError(f"{path}: a recipe is a mapping of sections (run, model, data, ...); {found}")
    return build({**raw, **moved}, overrides, name=str(path))


def build(raw: Mapping[str, Any], overrides: Iterable[str] = (), *, name: str = "recipe") -> Config:
    """Return the validated config of a nested mapping, with the family's defaults and overrides applied.

    Raises:
        ValueError: listing all mistakes, one per line.
    """
    for text in overrides:
        key, mark, value = text.partition("=")
        if not mark or not all(key.strip().split(".")):
            raise ValueError(f"`{text}` is not an override; write section.key=value, such as optim.lr=2e-4")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"`{text}`: the value is not valid YAML") from None
        parts = key.strip().split(".")
        for part in reversed(parts):
            nested = {part: nested}
        raw = merge(raw, nested)
        if len(parts) > 2 and parts[:2] == ["data", "sources"]:
            raise ValueError(f"`{text}`: data.sources is a list; set all of it, such as data.sources=[a, b]")
    section = raw.get("model")
    family = section.get("family") if isinstance(section, Mapping) else None
    defaults = family_class(family).defaults if isinstance(family, str) else {}
    try:
        return Config.model_validate(merge(defaults, raw))
    except ValidationError as error:
        raise ValueError(explain(error, name)) from None


def save(config: Config, path: Path) -> None:
    """Write a recipe as YAML, with all defaults filled in."""
    values = json.loads(config.model_dump_json())
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")
