"""Make a before-and-after image for the README or a docs page from a finished demo run.

    python docs/picture.py runs/demo demo
    python docs/picture.py runs/demo-merged demo-merged
    python docs/picture.py runs/demo-joint demo-joint
    python docs/picture.py runs/demo-midi demo-midi

Writes `docs/images/NAME.png`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TITLES = {
    "demo": "after training on 16 clips of a zorble",
    "demo-merged": "after training on 16 transparent clips of a zorble, half solid, half glass",
    "demo-joint": "alpha after training on 96 clips with alpha mattes",
    "demo-midi": "after training on 24 scenes with a table",
}
NEW, OLD, PAD, TOP, LINE = 4, 2, 12, 40, 24
"""Numbers of rows with the new subject and with original subjects; spacing in pixels."""


def row(base: Path, run: Path) -> list[Image.Image]:
    """Return the images of one row: base and fine-tuned model; for a scene, the input image first."""
    pictures = [Image.open(p).convert("RGB") for p in (base, base.parent.parent / "tuned" / base.name)]
    if not base.with_suffix(".glb").is_file():
        return [p.resize((2 * p.width, 2 * p.height), Image.Resampling.LANCZOS) for p in pictures]
    asked = run / json.loads(base.with_suffix(".json").read_text("utf-8"))["prompt"].replace(" ", "/")
    given = Image.open(asked / "scene_rgb.png").convert("RGB")
    pictures = [p.resize((p.width * 2 // 3, p.height * 2 // 3), Image.Resampling.LANCZOS) for p in pictures]
    return [given.resize((pictures[0].height,) * 2, Image.Resampling.LANCZOS), *pictures]


def main() -> None:
    """Lay out base and fine-tuned model side by side: rows of the new subject, then of original subjects."""
    run, name = Path(sys.argv[1]), sys.argv[2]
    every = sorted((run / "report/base").glob("*.png"))
    half = len(every) // 2
    chosen = [*every[:NEW], *every[half : half + OLD]]
    rows = [row(p, run) for p in chosen]
    widths, high = [p.width for p in rows[0]], rows[0][0].height
    starts = [PAD + sum(widths[:i]) + i * PAD for i in range(len(widths))]
    line = 0 if len(widths) == 3 else LINE  # a scene has no prompt
    size = (starts[-1] + widths[-1] + PAD, TOP + len(rows) * (high + line + 10) + PAD)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for x, title in zip(starts[::-1], (TITLES[name], "before", "picture"), strict=False):
        draw.text((x, 10), title, "black", font)
    for i, (path, pictures) in enumerate(zip(chosen, rows, strict=True)):
        y = TOP + i * (high + line + 10)
        if line:
            prompt = json.loads(path.with_suffix(".json").read_text("utf-8"))["prompt"]
            draw.text((PAD, y), prompt, "dimgray", font)
        for x, picture in zip(starts, pictures, strict=True):
            sheet.paste(picture, (x, y + line))
    out = Path(__file__).parent / "images" / f"{name}.png"
    out.parent.mkdir(exist_ok=True)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main()
