"""Messages for mistakes in a recipe, one line per mistake."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import ValidationError

from inlaid.config.sections import (
    Config,
    Full,
    Joint,
    LowRank,
    Matte,
    Merged,
    Opaque,
    RgbaVae,
    Section,
    Source,
)


def explain(error: ValidationError, name: str, section: str | None = None) -> str:
    """Return messages about the mistakes in a recipe, one per line.

    Args:
        error: validation error of `Config`, or of a single section.
        name: name of the recipe.
        section: name of the section, if the error is that of a single section.
    """
    found = [line for e in error.errors() for line in _mistake(e, [section] if section else []).splitlines()]
    return "\n".join([f"{name}: {len(found)} mistake{'s' if len(found) > 1 else ''}", *found])


_TAGS: dict[tuple[str, ...], type[Section]] = {
    (section, kind): part
    for section, parts in (("tuner", (LowRank, Full)), ("alpha", (Opaque, Joint, Merged)))
    for part in parts
    for kind in get_args(part.model_fields["kind"].annotation)
}
"""Section class of each (section, kind), for the sections with a `kind`."""


def _mistake(error: Any, within: list[str]) -> str:
    loc = [*within, *map(str, error["loc"])]
    where = [p for i, p in enumerate(loc) if i == 0 or (loc[i - 1], p) not in _TAGS]
    name, kind, given = ".".join(where), error["type"], repr(error["input"])
    if kind == "extra_forbidden":
        known = list(_TAGS[tuple(loc[:2])].model_fields) if tuple(loc[:2]) in _TAGS else _keys(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"  {name}: unknown key; {hint}"
    if not where:
        return "\n".join(f"  {line}" for line in str(error["ctx"]["error"]).splitlines())
    if kind == "missing":
        return f"  {name}: missing"
    if kind == "union_tag_invalid":
        kinds = [k for section, k in _TAGS if section == where[0]]
        return f"  {name}.kind: no kind `{error['ctx']['tag']}`; choose from: {', '.join(kinds)}"
    if kind in ("model_type", "model_attributes_type"):
        says = f"needs a mapping with keys ({', '.join(_keys(where))})"
    elif kind in ("tuple_type", "list_type"):
        says = "needs a list, such as [a, b]"
    else:
        says = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"  {name}: {says}" + (f" (got {given})" if len(given) <= 80 and "`" not in says else "")


def _keys(where: list[str]) -> list[str]:
    section: Any = {
        "": Config,
        "data.sources": Source,
        "data.matte": Matte,
        "tuner": LowRank,
        "alpha": Joint,
        "rgba_vae": RgbaVae,
    }.get(".".join(p for p in where if not p.isdigit()))
    if section is None:
        field = Config.model_fields.get(where[0])
        section = field.annotation if field else Config
    return list(section.model_fields)
