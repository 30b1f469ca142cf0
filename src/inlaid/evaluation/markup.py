"""Builders for HTML and SVG text that escape plain text exactly once."""

from __future__ import annotations

from html import escape

VOID = ("img",)
"""Elements without an end tag."""


class Html(str):
    """Text that is already markup and is not escaped."""


def tag(name: str, *inside: str, **attributes: str | float | bool | None) -> Html:
    """Return an HTML or SVG element.

    Args:
        name: name of the element.
        inside: content; plain text is escaped, `Html` is not.
        attributes: `cls` becomes `class` and `_` becomes `-`; True writes the name alone, None and False omit
            the attribute.
    """
    parts = [name]
    for key, value in attributes.items():
        key = "class" if key == "cls" else key.replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False and not (key == "class" and value == ""):
            parts.append(f'{key}="{escape(str(value), quote=True)}"')
    head = f"<{' '.join(parts)}>"
    return Html(head if name in VOID else f"{head}{join(*inside)}</{name}>")


def join(*parts: str) -> Html:
    """Concatenate parts; plain text is escaped."""
    return Html("".join(p if isinstance(p, Html) else escape(p) for p in parts))


def code(text: str) -> Html:
    """Convert text to HTML, with backticked parts as `<code>`."""
    parts = text.split("`")
    return join(*(tag("code", p) if i % 2 else p for i, p in enumerate(parts)))
