"""Conversion of recipe values to the types that their keys accept.

Invalid values are refused with a reason.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator

from inlaid.config.parse import Decimal, Integer

MAX_INTEGER = 2**63
"""Limit on integers in a recipe; their absolute value must be smaller."""


@dataclass(frozen=True)
class Refused:
    """Placeholder for a recipe value that is a mistake. No type accepts it, so validation reports `why`."""

    value: Any
    why: str


def read_values(section: type[BaseModel], values: Mapping[Any, Any], prose: frozenset[str]) -> dict[Any, Any]:
    """Convert the values of a section to the types that its keys accept.

    A value that is probably a mistake becomes an instance of `Refused`.

    Args:
        section: class of the section.
        values: values from YAML or from Python.
        prose: keys whose texts may contain tabs and line breaks.
    """
    return {
        key: _read(value, *_accepted(section, key), key in prose) if key in section.model_fields else value
        for key, value in values.items()
    }


def kinds(annotation: Any) -> Iterator[type]:
    """Yield every type in an annotation, except the key types of dictionaries.

    These include the members of unions, containers and their elements, and the types of literal values.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from map(type, parts)
    elif origin is Annotated:
        yield from kinds(parts[0])
    elif origin in (Union, types.UnionType):
        for part in parts:
            yield from kinds(part)
    elif origin is not None:
        yield origin
        for part in parts[1:] if origin is dict else parts:
            yield from kinds(part)
    elif isinstance(annotation, type):
        yield annotation


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _literals(part)


@cache
def _accepted(section: type[BaseModel], key: str) -> tuple[frozenset[type], frozenset[Any]]:
    """Return the types and the literal values that a key of a recipe section accepts."""
    annotation = section.model_fields[key].annotation
    return frozenset(kinds(annotation)), frozenset(_literals(annotation))


_EPOCHS = re.compile(r"(\d{1,6}(?:\.\d{1,4})?) ?epochs?", re.ASCII)


def read_every(value: Any) -> Any:
    """Check an interval and return it in a standard form.

    The result is a number of steps (at least 1), or a number of epochs as text such as `2 epochs`.

    Raises:
        ValueError: if the value is neither.
    """
    if isinstance(value, Refused):
        raise ValueError(value.why)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        found = _EPOCHS.fullmatch(value.strip())
        if found and float(found[1]):
            return f"{float(found[1]):g} epoch{'s' * (float(found[1]) != 1)}"
        value = int(value) if value.strip().isdecimal() and len(value) < 19 else value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("should be a number of steps of at least 1, or of epochs, such as `2 epochs`")


Every = Annotated[int | str, BeforeValidator(read_every)]
"""Interval in steps, or in epochs such as `2 epochs`."""


def epochs(every: int | str) -> float | None:
    """Return the number of epochs in an interval such as `2 epochs`; None if the interval is in steps."""
    return float(every.split()[0]) if isinstance(every, str) else None


def _read(value: Any, accepted: frozenset[type], literals: frozenset[Any], several_lines: bool) -> Any:
    if any(issubclass(kind, BaseModel) for kind in accepted):
        return value
    if isinstance(value, list):
        return [_read(v, accepted, literals, several_lines) for v in value]
    if isinstance(value, dict):
        return {k: _read(v, accepted, literals, several_lines) for k, v in value.items()}
    if value is None and type(None) not in accepted:
        return Refused(value, "is empty: set a value, or remove the key")
    if isinstance(value, bool):
        if bool not in accepted and accepted & {int, float}:
            return Refused(value, "should be a number")
    elif isinstance(value, int | float):
        return _number(value, accepted)
    elif isinstance(value, str):
        why = _unmeant(value, accepted, literals, several_lines)
        return Refused(value, why) if why else value
    return value


def _number(value: float, accepted: frozenset[type]) -> Any:
    if isinstance(value, Integer | Decimal) and str in accepted and not accepted & {int, float}:
        return value.text
    whole = isinstance(value, int) or (int in accepted and float not in accepted)
    if whole and abs(value) >= MAX_INTEGER:
        return Refused(value, f"should be less than {MAX_INTEGER}")
    return int(value) if isinstance(value, int) else float(value)


def _unmeant(value: str, accepted: frozenset[type], literals: frozenset[Any], several_lines: bool) -> str:
    """Return the reason why a string value is probably a mistake, or an empty string.

    Mistakes are control characters, and words such as `none` instead of null.
    """
    kept = "\t\n\r" if several_lines else ""
    wrong = next((c for c in value if (c < " " or c == "\x7f") and c not in kept), None)
    if wrong:
        return (
            f"contains the control character {wrong!r}: in double quotes, `\\` starts an escape: use single "
            "quotes for regular expressions and paths"
        )
    if value in literals or type(None) not in accepted or bool in accepted:
        return ""
    nothing = ("none",) if str in accepted and not literals else ("none", "off", "no", "nil", "disabled")
    return "write null for no value" if value.lower() in nothing else ""
