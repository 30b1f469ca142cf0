"""Measure how well each container preserves alpha and color when a file is written and read back.

    python benchmarks/containers.py [--media FOLDER] [--out benchmarks/results]

Six clips of 17 frames, 240x416: three of real footage (a press, twice; a hiker) with synthetic alpha (a soft
ellipse, a luma key of bright pixels, a luma key of dark pixels), and three procedural clips (glass, smoke,
hair). The first five containers are written by inlaid; the others are written here with typical encoder
settings. All are read with the reader that training uses. Errors are on a scale of 0 to 255: means over
the clips, and the maximum over all clips. Color is compared where alpha is above 0; in lossy formats, inlaid
replaces color where alpha is at most 2 of 255, which is part of the error. `ghosts` is the share of
transparent pixels that were read back with alpha above 0.

Without `--media` (a folder with `press` and `clips`), only the procedural clips are measured. Prints the
table and writes `containers.json` and `containers.md`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from inlaid import config
from inlaid.data import rgba_clips
from inlaid.media import compositing, rgba, video

FRAMES, SIZE, FPS = 17, (240, 416), 16


def real(folder: Path, frames: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return real footage with synthetic alpha."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    press = sorted((folder / "press").glob("*.mp4"))
    out = {}
    for name, path in {
        "press": press[0],
        "hot press": press[1],
        "hiker": folder / "clips/videos/hiker.mp4",
    }.items():
        colors = video.read_frames(path, 0.0, frames, FPS, size)
        light = colors.mean(-1) / 255
        if name == "press":
            far = np.hypot((x - width / 2) / width, (y - height / 2) / height)
            alpha = np.broadcast_to((0.45 - far) / 0.05, light.shape)
        else:
            alpha = (light - 0.45) / 0.15 if name == "hot press" else (0.4 - light) / 0.15
        out[name] = join(colors / 255, alpha)
    return out


def procedural(frames: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return three procedural clips with partial alpha and textured color."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    t = np.arange(frames, dtype=np.float32)[:, None, None]
    ring = np.hypot(x - width * 0.3 - 4 * t, y - height / 2) / height
    waves = np.sin(x / 17 + t / 3) * np.cos(y / 23 - t / 5) + np.sin((x + y) / 31 + t / 4)
    strands = (np.sin((x + 6 * np.sin(y / 40 + t / 6)) / 1.3) > 0.6) & (y > height * 0.2)
    color = np.stack([x / width, y / height, 0.5 + 0.4 * np.sin(x / 10)], -1)
    color = np.broadcast_to(color, (frames, *size, 3))
    glass = np.where(ring < 0.3, 0.35, 0) + (1 - np.abs(ring - 0.3) / 0.02).clip(0, 0.6)
    smoke = (waves / 2).clip(0, 1) * (1 - ring * 1.2).clip(0, 1)
    hair = strands * (1 - y / height)
    return {n: join(color, a) for n, a in {"glass": glass, "smoke": smoke, "hair": hair}.items()}


def join(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Convert color and alpha in [0, 1] to straight uint8 RGBA."""
    return compositing.to_uint8(np.concatenate([color, alpha[..., None].clip(0, 1)], -1).clip(0, 1))


# --- containers ---------------------------------------------------------------------------------------------


def encode(path: Path, pixels: np.ndarray, codec: str, pix_fmt: str, **options: str) -> None:
    """Encode frames with one codec and pixel format."""
    source = {1: "gray", 3: "rgb24", 4: "rgba"}[pixels.shape[-1]]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(FPS))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.options = pix_fmt, options
        for frame in pixels:
            pixels = np.ascontiguousarray(frame.squeeze())
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(pixels, format=source).reformat(format=pix_fmt))
            )
        container.mux(stream.encode())


def webp(path: Path, pixels: np.ndarray) -> None:
    """Write an animated WebP."""
    first, *rest = [Image.fromarray(f) for f in pixels]
    first.save(path, save_all=True, append_images=rest, duration=62, lossless=True)


def pair(path: Path, pixels: np.ndarray) -> None:
    """Write color and alpha matte as two H.264 files."""
    for end, part in (("_rgb", pixels[..., :3]), ("_alpha", pixels[..., 3:].repeat(3, -1))):
        encode(path.with_name(f"{path.stem}{end}.mp4"), part, "libx264", "yuv420p", crf="18")


Write = Callable[[Path, np.ndarray], Any]

WRITTEN = {
    "mov, ProRes 4444": ".mov",
    "webm, VP9 crf 12": ".webm",
    "png, zip of images": ".zip",
    "apng": ".apng",
    "mkv, FFV1": ".mkv",
}
"""File extensions of the containers written by inlaid, by name."""

READ: dict[str, tuple[str, Write]] = {
    "mov, PNG": ("a.mov", lambda p, x: encode(p, x, "png", "rgba")),
    "mov, QTRLE": ("a.mov", lambda p, x: encode(p, x, "qtrle", "argb")),
    "webm, VP8 crf 10": (
        "a.webm",
        lambda p, x: encode(p, x, "libvpx", "yuva420p", crf="10", b="4M", **{"auto-alt-ref": "0"}),
    ),
    "webp, animated, lossless": ("a.webp", webp),
    "mp4 pair, H.264 crf 18": ("a.mp4", pair),
}
"""File names and writers of the containers that inlaid only reads, by name."""

KEEP = config.Matte(background="keep", premultiplied=False)


def back(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Read a clip with the reader that training uses."""
    matte = None
    if not path.is_file():
        matte, path = (path.with_name(f"{path.stem}{end}.mp4") for end in ("_alpha", "_rgb"))
    return rgba_clips.read_rgba_clip(path, matte, 0.0, len(pixels), FPS, pixels.shape[1:3], KEEP)


def compare(found: np.ndarray, pixels: np.ndarray) -> dict[str, float]:
    """Return the errors of one clip."""
    off = np.abs(found.astype(np.int16) - pixels)
    clear, hidden = pixels[..., 3] == 0, off[..., :3][pixels[..., 3] == 0]
    return {
        "alpha": float(off[..., 3].mean()),
        "alpha_max": float(off[..., 3].max()),
        "ghosts": float((found[..., 3][clear] > 0).mean()) if clear.any() else 0.0,
        "color": float(off[..., :3][~clear].mean()),
        "hidden": float(hidden.mean()) if clear.any() else 0.0,
    }


def measure(clips: dict[str, np.ndarray]) -> dict[str, Any]:
    """Measure every container on every clip."""
    rows: dict[str, Any] = {}
    makers: dict[str, tuple[str, Write]] = {
        n: (f"a{s}", lambda p, x: rgba.write_rgba(p, x, FPS)) for n, s in WRITTEN.items()
    }
    for name, (file, make) in (makers | READ).items():
        each = {}
        for clip, pixels in clips.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / file
                make(path, pixels)
                size = sum(f.stat().st_size for f in Path(folder).iterdir())
                each[clip] = compare(back(path, pixels), pixels) | {"kilobytes": size / 1000}
        mean = {k: float(np.mean([e[k] for e in each.values()])) for k in next(iter(each.values()))}
        mean["alpha_max"] = max(e["alpha_max"] for e in each.values())
        rows[name] = {"written": name in WRITTEN, "mean": mean, "clips": each}
        print(row(name, rows[name]), flush=True)
    return rows


def plain_vp9(pixels: np.ndarray) -> int:
    """Return the lowest alpha that FFmpeg's native VP9 decoder returns for a file with alpha down to 0."""
    with tempfile.TemporaryDirectory() as folder:
        path = rgba.write_rgba(Path(folder) / "a.webm", pixels, FPS)
        with av.open(str(path)) as container:
            return int(min(f.to_ndarray(format="rgba")[..., 3].min() for f in container.decode(video=0)))


HEAD = """\
| container | alpha, mean | alpha, max | ghosts | color, mean | RGB at alpha 0 | kB |
|---|---|---|---|---|---|---|"""


def row(name: str, found: dict[str, Any]) -> str:
    """Format a row of the table."""
    m = found["mean"]
    exact = m["alpha_max"] == 0 and m["color"] == 0
    under = "kept" if m["hidden"] < 8 else "replaced" if found["written"] else "lost"
    numbers = f"{m['alpha']:.3f} | {m['alpha_max']:.0f} | {m['ghosts']:.2%} | {m['color']:.2f} | {under}"
    return f"| {name}{' (exact)' if exact else ''} | {numbers} | {m['kilobytes']:,.0f} |"


def keep(folder: Path, clips: dict[str, np.ndarray]) -> None:
    """Write clips with captions, cycling through the formats that training reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, pixels) in enumerate(clips.items()):
        path = folder / name.replace(" ", "-")
        path.with_suffix(".txt").write_text(f"{name}, isolated background", "utf-8")
        if i % 3 == 0:
            pair(path, pixels)
        elif i % 3 == 1:
            times = compositing.to_uint8(compositing.premultiply(compositing.to_float(pixels)))
            made = times if i == 1 else pixels
            encode(
                path.with_suffix(".mov"), made, "prores_ks", "yuva444p10le", profile="4444", alpha_bits="8"
            )
        else:
            path.mkdir(exist_ok=True)
            for k, frame in enumerate(pixels):
                Image.fromarray(frame).save(path / f"{k:03d}.png")


def main() -> None:
    """Run the benchmark, print the table and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--media", type=Path, help="folder with `press` and `clips`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--toy", action="store_true", help="a few small frames, for tests")
    parser.add_argument("--clips", type=Path, help="only write the clips to this folder, in several formats")
    options = parser.parse_args()
    frames, size = (3, (48, 64)) if options.toy else (FRAMES, SIZE)
    clips = real(options.media, frames, size) if options.media else {}
    clips |= procedural(frames, size)
    if options.clips:
        keep(options.clips, clips)
        return
    print(HEAD)
    rows = measure(clips)
    found = {
        "frames": frames,
        "size": size,
        "clips": list(clips),
        "av": av.__version__,
        "plain_vp9_lowest_alpha": plain_vp9(clips["glass"]),
        "containers": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "containers.json").write_text(json.dumps(found, indent=2), "utf-8")
    table = "\n".join([HEAD, *(row(n, r) for n, r in rows.items())])
    (options.out / "containers.md").write_text(table + "\n", "utf-8")
    print(f"\nFFmpeg's native VP9 decoder: alpha is {found['plain_vp9_lowest_alpha']} or more everywhere")


if __name__ == "__main__":
    main()
