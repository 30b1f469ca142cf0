"""Elements of HTML and SVG as text in which nothing is ever escaped twice or not at all."""

from __future__ import annotations

from html import escape

VOID = ("img",)
"""Elements without an end tag."""


class Html(str):
    """Text that is markup already."""


def tag(name: str, *inside: str, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        name: of the element.
        inside: its content; plain text is escaped, `Html` is not.
        attributes: `cls` is `class`, `_` is `-`; True has no value, None and False are left out.
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
    """Parts one after another; plain text is escaped."""
    return Html("".join(p if isinstance(p, Html) else escape(p) for p in parts))


def code(text: str) -> Html:
    """Text in which what stands in backticks is code."""
    parts = text.split("`")
    return join(*(tag("code", p) if i % 2 else p for i, p in enumerate(parts)))
