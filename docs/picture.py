"""Makes the README's picture from a finished demo: `python docs/picture.py runs/demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROWS, SCALE, PAD, TOP = 6, 2, 12, 40
"""Prompts, enlargement of the videos' frames, and space around them, in pixels."""


def main() -> None:
    """Puts frames of base and tuned side by side: prompts of the new subject, then two of the old world."""
    report = Path(sys.argv[1]) / "report"
    pairs = [(p, report / "tuned" / p.name) for p in sorted((report / "base").glob("*.png"))]
    half = len(pairs) // 2
    chosen = [*pairs[: ROWS - 2], *pairs[half : half + 2]]
    wide, high = (SCALE * n for n in Image.open(chosen[0][0]).size)
    sheet = Image.new("RGB", (2 * wide + 3 * PAD, TOP + len(chosen) * (high + 34) + PAD), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for x, title in ((PAD, "before"), (2 * PAD + wide, "after training on 16 clips of a zorble")):
        draw.text((x, 10), title, "black", font)
    for i, (base, tuned) in enumerate(chosen):
        y = TOP + i * (high + 34)
        prompt = json.loads(base.with_suffix(".json").read_text("utf-8"))["prompt"]
        draw.text((PAD, y), prompt, "dimgray", font)
        for x, path in ((PAD, base), (2 * PAD + wide, tuned)):
            sheet.paste(
                Image.open(path).convert("RGB").resize((wide, high), Image.Resampling.LANCZOS), (x, y + 24)
            )
    out = Path(__file__).parent / "images" / "demo.png"
    out.parent.mkdir(exist_ok=True)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main()
