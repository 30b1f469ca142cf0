"""Captions: reading, cleaning, finding problems, and estimating the length in tokens."""

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
"""Characters that a caption must not contain: control characters other than white space, and unpaired Unicode
surrogates."""

TOKENS_PER_WORD, BYTES_PER_TOKEN = 1.3, 4
"""Averages for the T5 tokenizer, to estimate the number of tokens of a text without loading the tokenizer."""


def read_caption(path: Path) -> str:
    """Read a caption file in UTF-8, UTF-16 or UTF-32.

    Raises:
        FileError: if the file cannot be read, is too large or has another encoding.
    """
    return read_text(path, limits.CAPTION)


def clean(caption: str) -> str:
    """Return a caption as one line without byte order marks, or an empty text if no character is visible."""
    text = " ".join(caption.replace("\ufeff", "").split())
    return "" if is_blank(text) else text


def caption_problem(caption: Any) -> tuple[str, str] | None:
    """Return the problem code and details of an unusable caption, or None if the caption is valid."""
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
    """Return the texts with too many tokens for the text encoder, each with a message about its length.

    The tokenizer is loaded only if a text has enough bytes to be too long. If the tokenizer belongs to a
    checkpoint on the Hugging Face Hub and is not on this machine yet, the number of tokens is estimated.
    """
    most = family.text_length
    candidates = [t for t in dict.fromkeys(texts) if len(t.encode("utf-8", "replace")) > most - 2]
    if not most or not candidates:
        return {}
    counts = family.count_tokens(candidates)
    about = ""
    if counts is None:
        about = "about "
        counts = [
            round(max(len(t.split()) * TOKENS_PER_WORD, len(t.encode()) / BYTES_PER_TOKEN))
            for t in candidates
        ]
    return {
        text: f"{about}{count} tokens, the model reads {most}: the end is cut off"
        for text, count in zip(candidates, counts, strict=True)
        if count > most
    }
