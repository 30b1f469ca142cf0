"""Contact strips (frames in a row) and contact sheets (labeled strips in one image)."""

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
    """Row of a contact sheet: one clip with its label and caption."""

    label: str
    caption: str
    frames: np.ndarray
    """Frames of the clip, uint8 (t, h, w, 3)."""
    note: str = ""
    """Gray text at the right end of the label's line."""


WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf")

INK, GRAY, PAPER, LINE = "#1d2128", "#6b7280", "#fafaf8", "#d9dade"


def contact_sheet(
    rows: Sequence[SheetRow], path: str | Path, *, title: str = "", columns: int = 6, width: int = 1440
) -> None:
    """Write a contact sheet as a PNG file, atomically.

    Each clip gets a label, a caption, and a strip of evenly spaced frames.

    Args:
        rows: the clips, at least one.
        path: output file, which ends in `.png`.
        title: heading of the sheet; no heading if empty.
        columns: maximum number of frames per strip.
        width: sheet width in pixels.
    """
    margin, gap, tallest = 32, 6, 240
    inner = width - 2 * margin
    head, body, small = _font(26, title), _font(18, "".join(r.label for r in rows)), _font(15, "")
    fonts = [_font(15, row.caption) for row in rows]
    box = ((inner - gap * (columns - 1)) / columns, tallest)
    strips = [contact_strip(row.frames, columns, box=box, gap=gap, enlarge=True) for row in rows]
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
        draw.text((width - margin - note, top + 3), row.note, GRAY, font=small)
        for i, line in enumerate(text):
            draw.text((margin, top + 28 + 21 * i), line, GRAY, font=font)
        sheet.paste(strip, (margin, top + 30 + 21 * len(text) + 8), strip)
        top += height
    with atomic(Path(path)) as part:
        sheet.save(part, format="PNG", compress_level=1)  # level 6 takes five times as long


def contact_strip(
    frames: np.ndarray,
    count: int = 6,
    *,
    box: tuple[float, float] = (160, 160),
    gap: int | None = None,
    enlarge: bool = False,
) -> Image.Image:
    """Return a row of evenly spaced frames of a clip, with transparent gaps.

    The first and the last frame are included.

    Args:
        frames: uint8 (t, h, w, 3).
        count: maximum number of frames.
        box: maximum width and height of a frame in pixels.
        gap: pixels between frames. Default: 1/24 of a frame's width.
        enlarge: scale small frames up to `box`; otherwise, small frames keep their size.
    """
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
    height, width = frames.shape[1:3]
    scale = min(box[0] / width, box[1] / height)
    scale = scale if enlarge else min(1.0, scale)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    gap = max(1, size[0] // 24) if gap is None else gap
    row = Image.new("RGBA", ((size[0] + gap) * len(chosen) - gap, size[1]), (0, 0, 0, 0))
    for i, frame in enumerate(chosen):
        image = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
        row.paste(image, (i * (size[0] + gap), 0))
    return row


def _font(size: int, text: str) -> Any:
    """Return Pillow's default font, or an installed system font if `text` contains non-Latin letters."""
    if any(ord(c) > 0x24F for c in text):
        for name in WIDE_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: float, most: int) -> list[str]:
    """Wrap text to lines of `width` pixels, and break long words.

    Text that does not fit into `most` lines is replaced by an ellipsis.
    """
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
