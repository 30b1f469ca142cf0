"""Captions: what counts as one, and captions that are longer than the model's maximum number of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlaid import limits
from inlaid.reading import read_text
from inlaid.text import is_blank, printable

if TYPE_CHECKING:
    from inlaid.families import Family

_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters that are not white space, and unpaired surrogates, which no tokenizer accepts."""

TOKENS_PER_WORD, BYTES_PER_TOKEN = 1.3, 4
"""Averages of T5's vocabulary, to estimate the number of tokens without the tokenizer."""


def read_caption(path: Path) -> str:
    """Read a caption file in UTF-8 or UTF-16.

    Raises:
        FileError: if it cannot be read, is too large or has another encoding.
    """
    return read_text(path, limits.CAPTION)


def clean(caption: str) -> str:
    """Return a caption on one line, without byte order marks; empty if nothing of it is visible."""
    text = " ".join(caption.replace("\ufeff", "").split())
    return "" if is_blank(text) else text


def caption_problem(caption: Any) -> tuple[str, str] | None:
    """Return the problem code of a caption and details, or None if it can be used."""
    if caption is None:
        return "no-caption", ""
    if not isinstance(caption, str):
        return "no-caption", f"{type(caption).__name__}, not text"
    if is_blank(caption):
        return "empty-caption", ""
    if wrong := _CONTROL.search(caption):
        pair = "\ud800" <= wrong[0] <= "\udfff"
        kind = "invalid Unicode" if pair else f"the character {printable(wrong[0])}"
        return "no-caption", f"{kind} in `{printable(caption[:40], lines=False)}`"
    return None


# --- length -------------------------------------------------------------------------------------------------


def long_texts(family: Family, texts: Iterable[str]) -> dict[str, str]:
    """Return the texts that the text encoder cuts off, each with a message about its length.

    Only the tokenizer is loaded, and only if a text has enough bytes to be too long. If the tokenizer of a
    Hub checkpoint is not on this machine yet, the number of tokens is estimated.
    """
    most = family.text_length
    candidates = [t for t in dict.fromkeys(texts) if len(t.encode("utf-8", "replace")) > most - 2]
    if not most or not candidates:
        return {}
    counts = family.count_tokens(candidates)
    about = ""
    if counts is None:
        about = "about "
        counts = [round(max(len(t.split()) * TOKENS_PER_WORD, len(t) / BYTES_PER_TOKEN)) for t in candidates]
    return {
        text: f"{about}{count} tokens, the model reads {most}: the end is cut off"
        for text, count in zip(candidates, counts, strict=True)
        if count > most
    }
