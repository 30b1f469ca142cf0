"""Contact sheets: labeled rows of frames in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inlaid.files import atomic


@dataclass(frozen=True)
class SheetRow:
    """One clip on a contact sheet."""

    label: str
    caption: str
    frames: np.ndarray
    """uint8 (t, h, w, 3)."""
    note: str = ""
    """Gray text to the right of the label."""


WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf")

INK, GREY, PAPER, LINE = "#1d2128", "#6b7280", "#fafaf8", "#d9dade"


def contact_sheet(
    rows: Sequence[SheetRow], path: str | Path, *, title: str = "", columns: int = 6, width: int = 1440
) -> None:
    """Write a PNG with one strip of evenly spaced frames per clip, below its label and caption; atomic.

    Args:
        rows: the clips, at least one.
        path: ends in `.png`.
        title: header line.
        columns: maximum frames per strip.
        width: sheet width in pixels.
    """
    margin, gap, tallest = 32, 6, 240
    inner = width - 2 * margin
    head, body, small = _font(26, title), _font(18, "".join(r.label for r in rows)), _font(15, "")
    fonts = [_font(15, row.caption) for row in rows]
    strips = [_strip(row.frames, columns, inner, gap, tallest) for row in rows]
    texts = [_wrap(row.caption, font, inner, 2) for row, font in zip(rows, fonts, strict=True)]
    heights = [30 + 21 * len(text) + 8 + strip.height + 34 for text, strip in zip(texts, strips, strict=True)]
    top = margin + (58 if title else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + margin - 34), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin - 8), _wrap(title, head, inner, 1)[0], INK, font=head)
        draw.line((margin, margin + 36, width - margin, margin + 36), LINE, 2)
    for row, text, strip, font, height in zip(rows, texts, strips, fonts, heights, strict=True):
        note = draw.textlength(row.note, small)
        draw.text((margin, top), _wrap(row.label, body, inner - note - 24, 1)[0], INK, font=body)
        draw.text((width - margin - note, top + 3), row.note, GREY, font=small)
        for i, line in enumerate(text):
            draw.text((margin, top + 28 + 21 * i), line, GREY, font=font)
        sheet.paste(strip, (margin, top + 30 + 21 * len(text) + 8))
        top += height
    with atomic(Path(path)) as part:
        sheet.save(part, format="PNG")


def _strip(frames: np.ndarray, columns: int, width: int, gap: int, tallest: int) -> Image.Image:
    """Return evenly spaced frames side by side, without repeats, including the first and the last."""
    picked = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    scale = min((width - gap * (columns - 1)) / columns / frames.shape[2], tallest / frames.shape[1])
    w, h = max(1, int(frames.shape[2] * scale)), max(1, int(frames.shape[1] * scale))
    strip = Image.new("RGB", (width, h), PAPER)
    for i, k in enumerate(picked):
        strip.paste(Image.fromarray(frames[k]).resize((w, h), Image.Resampling.LANCZOS), (i * (w + gap), 0))
    return strip


def _font(size: int, text: str) -> Any:
    """Return Pillow's default font, or a system font for text beyond Latin letters."""
    if any(ord(c) > 0x24F for c in text):
        for name in (
            "NotoSansCJK-Regular.ttc",
            "msyh.ttc",
            "PingFang.ttc",
            "Arial Unicode.ttf",
            "DejaVuSans.ttf",
        ):
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: float, most: int) -> list[str]:
    """Wrap text to `width` pixels, breaking long words; an ellipsis marks text beyond `most` lines."""
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        wider = f"{lines[-1]} {word}".strip()
        if font.getlength(wider) <= width:
            lines[-1] = wider
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        lines = lines[:most]
        while lines[-1] and font.getlength(lines[-1] + " …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + " …"
    return lines
