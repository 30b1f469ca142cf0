"""YAML parser of recipes and their command-line overrides.

PyYAML converts scalars by YAML 1.1, in which `16:9` is 969, `010` is 8, `1e3` is text and `on` is true. This
module follows the YAML 1.2 core schema instead. It takes events from PyYAML's parser, and builds the values
itself. It can therefore refuse tags, and limit nesting and aliases.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml import events

from inlaid import limits

TOO_DEEP = "too many nested lists or mappings"

MAX_DIGITS = 400
"""Maximum number of characters of a number; a longer scalar stays text."""

_PARSER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE, _FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF, _NAN = re.compile(r"[-+]?\.(inf|Inf|INF)"), re.compile(r"\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"


class Integer(int):
    """Integer that keeps its spelling in the recipe.

    A key that accepts text receives this spelling, such as `007` instead of `7`.
    """

    text: str


class Decimal(float):
    """Floating-point number that keeps its spelling in the recipe."""

    text: str


def scalar(text: str) -> Any:
    """Return the value of an unquoted scalar in the YAML 1.2 core schema."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return bool(_TRUE.fullmatch(text))
    number: Integer | Decimal
    if len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = Integer(text, base)
    elif _FLOAT.fullmatch(text):
        number = Decimal(text)
    elif _INF.fullmatch(text) or _NAN.fullmatch(text):
        number = Decimal(text.replace(".", ""))
    else:
        return text
    number.text = text
    return number


class ParseError(ValueError):
    """Error in YAML text: invalid syntax, several documents, or text that is too long or too deeply nested.

    The message contains the cause and, if known, the line and column.
    """


EMPTY: Any = type("Empty", (), {"__repr__": lambda self: "null"})()
"""Placeholder for the missing value in `sample:`, to distinguish it from the null in `sample: null`."""


class _MistakeError(Exception):
    """Internal error for a mistake in a YAML document, with its cause and its position (a PyYAML mark)."""

    def __init__(self, cause: str, mark: Any = None) -> None:
        super().__init__(cause)
        self.mark = mark


def parse(text: str, *, empty: Any = None) -> Any:
    """Parse a YAML document of at most `limits.RECIPE` characters, and return its value.

    Args:
        text: the document.
        empty: value of an empty document, and of keys and list items without a value.

    Raises:
        ParseError: if the text is not exactly one valid document; the message has line, column and cause.
    """
    return _parse(text, empty).root


def _parse(text: str, empty: Any) -> _Builder:
    if large := limits.RECIPE.exceeded(len(text), f"{len(text):,} characters"):
        raise ParseError(large)
    try:
        return _build(yaml.parse(text, _PARSER), empty)
    except _MistakeError as error:
        mark, cause = error.mark, str(error)
    except UnicodeEncodeError:
        mark, cause = None, "not valid Unicode text"
    except yaml.reader.ReaderError as error:
        mark, cause = None, f"control character U+{_code(error):04X}: remove it"
    except yaml.MarkedYAMLError as error:
        mark, cause = error.problem_mark, _cause(error, text)
    except yaml.YAMLError as error:
        mark, cause = None, " ".join(str(error).split())
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    raise ParseError(where + cause) from None


def _code(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(error.character)


def parse_override(text: str, *, empty: Any = None) -> Any:
    """Parse the value of a command-line override.

    Text that starts with a bracket or a quote is parsed as YAML. Any other text is one scalar, even if it
    contains ` #` or `: `. The value of empty text is `empty`.

    Raises:
        ParseError: if the YAML is not valid, or other text follows the value; the message has the cause.
    """
    text = text.strip()
    if not text:
        return empty
    if text[:1] not in ("[", "{", '"', "'"):
        return scalar(text)
    try:
        built = _parse(text, empty)
    except ParseError as error:
        hint = "; ` #` starts a comment in YAML: put the text in quotes" if " #" in text else ""
        raise ParseError(f"{error}{hint}") from None
    if built.stop < len(text):
        raise ParseError(
            f"`{shorten(text[built.stop :].strip(), 40)}` follows the value: put all of it in quotes"
        )
    return built.root


def shorten(text: str, most: int) -> str:
    """Return printable text for a message. If it has over `most` characters, its middle is left out."""
    if len(text) > most:
        half = (most - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_HINTS = (
    (
        r"escape",
        "in double quotes `\\` starts an escape: use single quotes for regular expressions and paths",
    ),
    (r"mapping values are not allowed", "put text that contains `: ` in quotes"),
    (r"undefined alias|alphabetic or numeric", "put text that starts with `*`, `&` or `!` in quotes"),
)


def _cause(error: yaml.MarkedYAMLError, text: str) -> str:
    """Return the problem that PyYAML found, and how to fix it."""
    problem, mark = error.problem or "not valid", error.problem_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    character = line[mark.column : mark.column + 1] if mark else ""
    if character == "\t" or ("\t" in line[: len(line) - len(line.lstrip())]):
        return "a tab (`'\\t'`): indent with spaces"
    if "cannot start any token" in problem and character:
        return f"a value cannot start with {character!r}: put the text in quotes"
    if "nesting" in problem:
        return TOO_DEEP
    hints = [hint for pattern, hint in _HINTS if re.search(pattern, problem)]
    return ": ".join([problem, *hints[:1]])


@dataclass
class _Open:
    """List or mapping that is being built."""

    value: Any
    mark: Any
    anchor: str | None
    size: int = 1
    """Number of values, with aliases expanded."""
    key: str | None = None
    merged: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Builder:
    """Builder that makes the value of one YAML document from parser events, without recursion."""

    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)
    empty: Any = None
    root: Any = None
    stop: int = 0
    """Index of the first character after the document's value."""

    def add(self, value: Any, size: int, mark: Any) -> None:
        """Add a finished value to the innermost list or mapping that is still open.

        In a mapping, keys and values are added in turn. If nothing is open, the value is the whole document.
        """
        if not self.stack:
            self.root = value
            return
        top = self.stack[-1]
        top.size += size
        if large := limits.RECIPE_VALUES.exceeded(top.size, "too many values, with aliases expanded"):
            raise _MistakeError(large, mark)
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.key is None:
            self._key(top, value, mark)
        elif top.key == "<<":
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                raise _MistakeError("`<<` needs a mapping, or a list of mappings", mark)
            top.merged += parts
            top.key = None
        else:
            top.value[top.key], top.key = value, None

    def _key(self, top: _Open, value: Any, mark: Any) -> None:
        if not isinstance(value, str):
            raise _MistakeError("a key must be text", mark)
        if value in top.value:
            raise _MistakeError(f"duplicate key `{shorten(value, 60)}`; keep one", mark)
        top.key = value

    def start(self, value: Any, event: Any) -> None:
        """Start a list or mapping; `value` is the empty list or dict, and `event` is the parser event."""
        if deep := limits.RECIPE_DEPTH.exceeded(len(self.stack) + 1, TOO_DEEP):
            raise _MistakeError(deep, event.start_mark)
        if event.tag not in (None, "!", f"{_TAG}{'seq' if isinstance(value, list) else 'map'}"):
            raise _MistakeError(f"tag `{event.tag[:60]}` is not supported", event.start_mark)
        self.stack.append(_Open(value, event.start_mark, event.anchor))

    def end(self) -> None:
        """Close the innermost list or mapping."""
        done = self.stack.pop()
        if done.merged:
            own = dict(done.value)
            done.value.clear()
            for part in reversed(done.merged):
                done.value.update(part)
            done.value.update(own)
        if done.anchor:
            self.anchors[done.anchor] = (done.value, done.size)
        self.add(done.value, done.size, done.mark)

    def scalar(self, event: Any) -> None:
        """Add a scalar; an unquoted scalar that is not a key is converted to a number, a boolean or null."""
        tag, mark = event.tag, event.start_mark
        key = bool(self.stack) and isinstance(self.stack[-1].value, dict) and self.stack[-1].key is None
        resolved = (f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null"))
        if tag not in (None, "!", f"{_TAG}str", *resolved):
            raise _MistakeError(f"tag `{tag[:60]}` is not supported", mark)
        plain = (event.implicit[0] and tag is None) or tag not in (None, "!", f"{_TAG}str")
        value = scalar(event.value) if plain and not key else event.value
        if value is None and not event.value:
            value = self.empty
        if event.anchor:
            self.anchors[event.anchor] = (value, 1)
        self.add(value, 1, mark)

    def alias(self, event: Any) -> None:
        """Add the value that an alias (`*name`) refers to."""
        if any(part.anchor == event.anchor for part in self.stack):
            raise _MistakeError(f"alias `*{event.anchor[:60]}` contains itself", event.start_mark)
        if event.anchor not in self.anchors:
            raise _MistakeError(
                f"undefined alias `*{event.anchor[:60]}`: put text that starts with `*` in quotes",
                event.start_mark,
            )
        self.add(*self.anchors[event.anchor], event.start_mark)


def _build(stream: Iterator[Any], empty: Any) -> _Builder:
    """Build the value of a YAML document from parser events.

    Args:
        stream: parser events of the document.
        empty: value of an empty document, and of keys and list items without a value.

    Returns:
        The builder; its attribute `root` is the value.

    Raises:
        _MistakeError: if there are several documents, or if the document exceeds a limit or uses unsupported
            YAML.
    """
    builder, documents = _Builder(empty=empty, root=empty), 0
    for event in stream:
        if isinstance(event, events.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _MistakeError("a second document starts (`---`); keep one", event.start_mark)
        elif isinstance(event, events.AliasEvent):
            builder.alias(event)
        elif isinstance(event, events.ScalarEvent):
            builder.scalar(event)
        elif isinstance(event, events.SequenceStartEvent):
            builder.start([], event)
        elif isinstance(event, events.MappingStartEvent):
            builder.start({}, event)
        elif isinstance(event, events.CollectionEndEvent):
            builder.end()
        if isinstance(event, (events.ScalarEvent, events.CollectionEndEvent)):
            builder.stop = event.end_mark.index
    return builder


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        ValueError: if the file is larger than `limits.RECIPE` or is not text.
    """
    with path.open("rb") as file:
        data = file.read(int(limits.RECIPE.value) + 1)
    if large := limits.RECIPE.exceeded(len(data), f"{path}: not a recipe, the file is large"):
        raise ValueError(large)
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}: not a recipe, the file is not UTF-8 text (line {line}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path}: not a recipe, the file contains NUL characters; save it as UTF-8 text")
    return text


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes every text that YAML 1.1 or 1.2 reads as a number."""


_Dumper.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern in (("int", _INT), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(
        f"{_TAG}{_tag}", re.compile(f"^(?:{_pattern.pattern})$"), [*"-+.0123456789"]
    )


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if value.isprintable() else '"'  # PyYAML writes U+0085 and U+2028 as line breaks elsewhere
    return dumper.represent_scalar(f"{_TAG}str", value, style=style)


_Dumper.add_representer(str, _text)


def dump(values: Any) -> str:
    """Convert plain Python values to YAML text that YAML 1.1 and 1.2 parsers read as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
