"""Every mistake with transparent clips ends in one clear message and exit code 2, without a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from inlaid import config
from inlaid.alpha import opening
from inlaid.media import rgba, video
from support import rgba_clips as make
from support.commands import inlaid
from support.slow import mostly_slow

SIZE = (32, 32)


@pytest.fixture
def ground(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """A folder of three good pairs, and a recipe that works."""
    monkeypatch.setattr(opening, "COMPOSED", {config.Joint: make.Glass})
    return tmp_path / "rgba_clips", make.transparent(recipe(data__validation=0), tmp_path / "rgba_clips", 3)


def solid(value: int) -> np.ndarray:
    pixels = make.clip(size=SIZE)
    pixels[..., 3] = value
    return pixels


def lone_color(clips: Path) -> None:
    (clips / "01_alpha.mkv").unlink()


def lone_matte(clips: Path) -> None:
    (clips / "01_rgb.mkv").unlink()


def shorter(clips: Path) -> None:
    make.video(clips / "01_alpha.mkv", make.clip(size=SIZE)[:7, ..., 3:])


def smaller(clips: Path) -> None:
    make.video(clips / "01_alpha.mkv", make.clip(size=(16, 16))[..., 3:])


def faster(clips: Path) -> None:
    make.video(clips / "01_alpha.mkv", make.clip(size=SIZE)[..., 3:], 30)


def two_mattes(clips: Path) -> None:
    shutil.copy(clips / "01_alpha.mkv", clips / "01_seg.mkv")


def opaque(clips: Path) -> None:
    make.video(clips / "01_alpha.mkv", solid(255)[..., 3:])


def empty(clips: Path) -> None:
    make.video(clips / "01_alpha.mkv", solid(0)[..., 3:])


def damaged(clips: Path) -> None:
    path = clips / "01_alpha.mkv"
    path.write_bytes(path.read_bytes()[:200])


def nothing(clips: Path) -> None:
    (clips / "01_alpha.mkv").write_bytes(b"")


def no_alpha_inside(clips: Path) -> None:
    video.write_video(clips / "plain.mp4", make.clip(size=SIZE)[..., :3], 16)
    (clips / "plain.txt").write_text("plain")


def dropped_by_the_pixel_format(clips: Path) -> None:
    make.video(clips / "vp9.webm", make.clip(size=SIZE), 16, "libvpx-vp9", "yuv420p", crf="20", b="0")
    (clips / "vp9.txt").write_text("VP9")


def sizes_differ(clips: Path) -> None:
    folder = make.images(clips / "smoke", make.clip(size=SIZE))
    Image.new("RGBA", (40, 32)).save(folder / "f99.png")
    (clips / "smoke.txt").write_text("smoke")


def broken_image(clips: Path) -> None:
    folder = make.images(clips / "smoke", make.clip(size=SIZE))
    (folder / "f7.png").write_bytes(b"no")
    (clips / "smoke.txt").write_text("smoke")


def opaque_images(clips: Path) -> None:
    make.images(clips / "smoke", make.clip(size=SIZE)[..., :3])
    (clips / "smoke.txt").write_text("smoke")


def broken_zip(clips: Path) -> None:
    (clips / "a.zip").write_bytes(b"PK no")
    (clips / "a.txt").write_text("zip")


def wrong_array(clips: Path) -> None:
    np.savez(clips / "a.npz", frames=np.zeros((9, 32, 32, 2), np.uint8))
    (clips / "a.txt").write_text("array")


def cut_off_webp(clips: Path) -> None:
    path = make.animated(clips / "a.webp", make.clip(size=SIZE), 62, lossless=True)
    path.write_bytes(path.read_bytes()[:600])
    path.with_suffix(".txt").write_text("webp")


def no_caption(clips: Path) -> None:
    (clips / "01.txt").unlink()


def too_short(clips: Path) -> None:
    make.pair(clips, "01", make.clip(frames=3, size=SIZE))


BAD: dict[Callable[[Path], None], str] = {
    lone_color: "1 of 3 clips has no alpha (01_rgb.mkv: no alpha channel",
    lone_matte: "has no alpha (01_alpha.mkv: an alpha matte without color file: 01_rgb or 01 is missing",
    shorter: "not match its alpha matte (01_rgb.mkv: 9 frames and 7 in 01_alpha.mkv): trim and scale both",
    smaller: "does not match its alpha matte (01_rgb.mkv: 32x32 and 16x16 in 01_alpha.mkv)",
    faster: "does not match its alpha matte (01_rgb.mkv: 16 fps and 30 in 01_alpha.mkv)",
    two_mattes: "has several alpha mattes (01_alpha.mkv and 01_seg.mkv): keep one, or use a manifest",
    opaque: "has constant alpha (01_rgb.mkv: alpha is 255 of 255 in every pixel (opaque))",
    empty: "has constant alpha (01_rgb.mkv: alpha is 0 of 255 in every pixel (transparent))",
    damaged: "01_rgb.mkv",
    nothing: "cannot be read (01_rgb.mkv: its alpha matte 01_alpha.mkv: the file is empty)",
    no_alpha_inside: "has no alpha (plain.mp4: no alpha channel (h264 yuv420p) and no alpha matte such as",
    dropped_by_the_pixel_format: "has no alpha (vp9.webm: no alpha channel (vp9 yuv420p)",
    sizes_differ: "smoke: its images differ in size (32x32 and 40x32)",
    broken_image: "smoke: image f7.png cannot be read",
    opaque_images: "has no alpha (smoke: no alpha channel (frames)",
    broken_zip: "a.zip: cannot be read",
    wrong_array: "`frames` is uint8 (9, 32, 32, 2); it must be uint8 and (t, h, w, 4)",
    cut_off_webp: "a.webp: ",
    no_caption: "1 of 3 clips has no caption (01_rgb.mkv)",
    too_short: "is too short (01_rgb.mkv: 9 frames at 16 fps need 0.56 s, it has 0.19 s)",
}

OFTEN = (lone_color, two_mattes, damaged)
"""What every run of the tests does; of the others, test_rgba_clips.py shows the most without the commands."""


@pytest.mark.parametrize("spoil", mostly_slow(BAD, OFTEN.__contains__), ids=lambda f: f.__name__)
def test_bad_clips_are_named_before_anything_is_encoded(
    ground: tuple[Path, dict[str, Any]], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    clips, raw = ground
    spoil(clips)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), "utf-8")
    for command in ("check", "train"):
        done = inlaid(command, path)
        assert done.code == 2 and "Traceback" not in done.output, done.output
        assert BAD[spoil] in done.output, done.output
    assert not list((tmp_path / "run/cache").glob("media/*/*")), "nothing was encoded"


COLUMNS: dict[str, tuple[dict[str, str], str]] = {
    "a matte that is not there": (
        {"rgb": "00_rgb.mkv", "alpha": "no.mkv"},
        "does not exist (no.mkv: line 2)",
    ),
    "a matte from elsewhere": (
        {"rgb": "00_rgb.mkv", "alpha": "../x.mkv"},
        "is outside of its source (../x.mkv",
    ),
    "a stem of nothing": ({"video": "nobody"}, "does not exist (nobody: line 2)"),
    "a matte of another suffix": ({"rgb": "00_rgb.mkv", "alpha": "00.txt"}, "`.txt` files are not supported"),
    "a matte of another length": ({"rgb": "00_rgb.mkv", "alpha": "long.mkv"}, "9 frames and 12 in long.mkv"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_bad_manifests(ground: tuple[Path, dict[str, Any]], tmp_path: Path, case: str) -> None:
    clips, raw = ground
    make.video(clips / "long.mkv", make.clip(frames=12, size=SIZE)[..., 3:])
    row, says = COLUMNS[case]
    header = [*row, "caption"]
    (clips / "m.csv").write_text(",".join(header) + "\n" + ",".join([*row.values(), "a disc"]) + "\n")
    raw["data"]["sources"] = str(clips / "m.csv")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), "utf-8")
    done = inlaid("check", path)
    assert done.code == 2 and says in done.output and "Traceback" not in done.output, done.output


@pytest.mark.parametrize(
    ("change", "says"),
    {
        "sample.transparent=[mp4]": "sample.transparent: `mp4` cannot carry alpha; choose from: mov, webm",
        "data.matte.premultiplied=maybe": "data.matte.premultiplied",
        "data.matte.snap=300": "data.matte.snap",
        "data.matte.background=white": "data.matte.background",
        "data.matte.grow=true": "data.matte.grow: unknown key",
        "data.matte=auto": "data.matte: needs a mapping with keys (premultiplied, invert, limited",
        "alpha.kind=merged": "alpha.vae: missing",
    }.items(),
)
def test_bad_recipes(ground: tuple[Path, dict[str, Any]], tmp_path: Path, change: str, says: str) -> None:
    _, raw = ground
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), "utf-8")
    done = inlaid("check", path, change)
    assert done.code == 2 and says in done.output and "Traceback" not in done.output, done.output


def test_bad_composites(tmp_path: Path) -> None:
    pixels = make.clip(size=SIZE)
    front = rgba.write_rgba(tmp_path / "a.mov", pixels, 16)
    video.write_video(tmp_path / "opaque.mp4", pixels[..., :3], 16)
    video.write_video(tmp_path / "short.mp4", pixels[:3, ..., :3], 16)
    (tmp_path / "broken.mov").write_bytes(b"no")
    for arguments, says in {
        (tmp_path / "opaque.mp4", "red"): "opaque.mp4: is fully opaque",
        (tmp_path / "nobody.mov", "red"): "nobody.mov",
        (tmp_path / "broken.mov", "red"): "broken.mov",
        (front, "nocolor"): "`nocolor` is neither a file nor a color",
        (front, tmp_path / "short.mp4"): "short.mp4: has 3 frames at 16 fps, but",
        (front, "red", "--out", tmp_path / "a.gif"): "videos are written as .mp4",
        (front, "red", "--fps", "0"): "--fps: 0 is not positive",
    }.items():
        done = inlaid("composite", *arguments)
        assert done.code == 2 and says in done.output and "Traceback" not in done.output, done.output


def test_bad_outputs(ground: tuple[Path, dict[str, Any]], tmp_path: Path, recipe: Any) -> None:
    _, raw = ground
    run = Path(raw["run"])
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(raw))), "utf-8")
    done = inlaid("generate", run, "a disc", "--checkpoint", "base", "--transparent", "mov,mp4")
    assert done.code == 2 and "sample.transparent: `mp4` cannot carry alpha" in done.output, done.output
    plain = {k: v for k, v in raw.items() if k != "alpha"}
    (run / "config.yaml").write_text(yaml.safe_dump(plain), "utf-8")
    done = inlaid("generate", run, "a disc", "--checkpoint", "base", "--transparent", "mov")
    assert done.code == 2 and "has alpha.kind: opaque, so its videos have no alpha" in done.output, (
        done.output
    )
