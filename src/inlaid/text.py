"""Text from users' files: decoding, invisible characters, and escapes for the terminal."""

from __future__ import annotations

import codecs
import re
import unicodedata

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and their encodings. UTF-32 comes before UTF-16, because its little-endian mark begins
with the mark of UTF-16."""

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters except tab and newline, characters that change the text direction, and unpaired
surrogates."""

_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode categories of control, format and space characters."""

_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u2800\u3164\uffa0\ufffc" + "".join(
    map(chr, range(0xFE00, 0xFE10))
)
"""Invisible characters of other Unicode categories: fillers, joiners and variation selectors."""


def printable(text: object, *, lines: bool = True) -> str:
    r"""Return text with control characters escaped, so that it cannot control a terminal.

    Args:
        text: any value; its `str` is used.
        lines: keep newlines and tabs; otherwise they become `\n` and `\t`.
    """
    out = _CONTROL.sub(_escape, str(text))
    return out if lines else out.replace("\n", "\\n").replace("\t", "\\t")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return {13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def is_blank(text: str) -> bool:
    """Return True if a text has no visible characters: only spaces, control or zero-width characters."""
    return all(
        unicodedata.category(c) in _INVISIBLE or c in _BLANK or "\ufe00" <= c <= "\ufe0f" for c in text
    )


def decode_text(raw: bytes) -> str:
    """Decode text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    UTF-16 text in mostly Latin characters is also recognized without a mark. Line ends become single
    newlines, as in files that Python opens in text mode.

    Raises:
        UnicodeDecodeError: if the bytes are in none of these encodings.
    """
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), None) or _unmarked(raw)
    return raw.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _unmarked(raw: bytes) -> str:
    """Guess the encoding of bytes without a byte order mark.

    In UTF-16 text in Latin characters, every second byte is zero.
    """
    head = raw[: 1 << 12]
    half = len(head) // 2
    if half < 2 or len(raw) % 2:
        return "utf-8"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if odd > 0.7 * half and even < 0.1 * half:
        return "utf-16-le"
    return "utf-16-be" if even > 0.7 * half and odd < 0.1 * half else "utf-8"
