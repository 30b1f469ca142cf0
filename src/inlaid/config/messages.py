"""Messages for mistakes in a recipe, one line per mistake."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, get_args

from pydantic import ValidationError

from inlaid.config.parse import Decimal, Integer, shorten
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
from inlaid.config.values import Refused


def explain(error: ValidationError, name: str, section: str | None = None) -> str:
    """Return messages about the mistakes in a recipe, one per line.

    Args:
        error: validation error of `Config`, or of a single section.
        name: name of the recipe.
        section: name of the section, if the error comes from a single section.
    """
    errors = error.errors(include_url=False)
    within = [section] if section else []
    found = [line for e in errors[:MOST] for line in _mistake(e, within).splitlines()]
    more = max(len(errors) - MOST, 0)
    title = f"{name}: {len(found) + more:,} mistake{'s' if len(found) > 1 else ''}"
    return "\n".join(
        [title, *(shorten(line, 600) for line in found), *([f"  and {more:,} more"] if more else [])]
    )


MOST = 20
"""Maximum number of mistakes listed in a message."""

_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 6
_REPR.maxstring, _REPR.maxother, _REPR.maxlong, _REPR.maxlevel = 80, 80, 80, 3


def shown(value: Any) -> str:
    """Return a recipe value as text of limited length for a message.

    Null, true and false are written as in YAML, numbers as in the recipe, and other values as their `repr`.
    """
    if isinstance(value, Integer | Decimal):
        return shorten(value.text, 80)
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else _REPR.repr(value)


_TAGS: dict[tuple[str, ...], type[Section]] = {
    (section, kind): part
    for section, parts in (("tuner", (LowRank, Full)), ("alpha", (Opaque, Joint, Merged)))
    for part in parts
    for kind in get_args(part.model_fields["kind"].annotation)
}
"""Section classes, by section name and value of the key `kind`."""


def _mistake(error: Any, within: list[str]) -> str:
    loc = [*within, *(shorten(str(part), 60) for part in error["loc"])]
    where = [p for i, p in enumerate(loc) if i == 0 or (loc[i - 1], p) not in _TAGS]
    name, kind, value = ".".join(where), error["type"], error["input"]
    if isinstance(value, Refused):
        value, error = value.value, {**error, "msg": value.why}
        kind = "refused"
    given = shown(value)
    if kind == "extra_forbidden":
        known = list(_TAGS[tuple(loc[:2])].model_fields) if tuple(loc[:2]) in _TAGS else _keys(where[:-1])
        key, mark, _ = where[-1].partition(":")
        if mark and key in known:
            return f"  {name}: unknown key; write a space after the colon"
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"  {name}: unknown key; {hint}"
    if not where:
        return "\n".join(f"  {line}" for line in str(error["ctx"]["error"]).splitlines())
    if kind == "missing":
        return f"  {name}: missing"
    if kind == "union_tag_invalid":
        kinds = [k for section, k in _TAGS if section == where[0]]
        return f"  {name}.kind: no kind `{shorten(error['ctx']['tag'], 60)}`; choose from: {', '.join(kinds)}"
    if kind in ("model_type", "model_attributes_type"):
        says = f"needs a mapping with keys ({', '.join(_keys(where))})"
    elif kind in ("tuple_type", "list_type"):
        says = "needs a list, such as [a, b]"
    else:
        says = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = f" (got {given})" if len(given) <= 80 and "`" not in says else ""
    return f"  {name}: {says}{got}{_hint(kind, value)}"


def _hint(kind: str, value: Any) -> str:
    """Return a hint on how to write a value that YAML misinterprets; empty if there is no hint."""
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes to use it as text"
    if kind == "string_type" and isinstance(value, dict):
        return "; put text that contains `: ` in quotes"
    if kind in ("model_type", "model_attributes_type") and isinstance(value, str) and ":" in value:
        return "; write a space after the colon"
    return ""


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
