"""Transparent clips in every form: found, paired, looked at, and read as the same straight pixels."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inlaid import config
from inlaid.data import rgba_clips
from inlaid.data.cache import Cache
from inlaid.data.plan import Plan, plan_dataset
from inlaid.data.probes import Probes
from inlaid.families.grid import Grid
from inlaid.media import compositing, rgba, rgba_images, video
from inlaid.media.kinds import READER
from support import rgba_clips as make
from support import videos

GRID = Grid(spatial=16, temporal=4)
SIZE = (make.H, make.W)
KEEP = {"background": "keep"}


def plan(*sources: Any, channels: int = 4, probes: Probes | None = None, **section: Any) -> Plan:
    """A plan of a transparent run that keeps pixels as they are."""
    section = {"size": SIZE, "frames": [make.T], "validation": 0, "matte": KEEP} | section
    family: Any = SimpleNamespace(
        channels=channels, text_length=0, precomputed=None, precomputed_in=lambda folder: None
    )
    return plan_dataset(
        config.Data(sources=list(sources), **section), GRID, 16, 0, family=family, probes=probes
    )


def codes(made: Plan) -> dict[str, list[str]]:
    """Names by code of problem."""
    out: dict[str, list[str]] = {}
    for problem in made.problems:
        out.setdefault(problem.code, []).append(problem.name)
    return out


def read(made: Plan) -> np.ndarray:
    """The pixels of the only window."""
    assert made.problems == [], made.problems
    (window,) = made.train
    return window.read()


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


def seen_error(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean errors of alpha, and of color where it can be seen well."""
    seen = b[..., 3] > 64
    off = np.abs(a.astype(int) - b)
    return float(off[..., 3].mean()), float(off[..., :3][seen].mean())


# --- one file -----------------------------------------------------------------------------------------------

CODECS: dict[str, tuple[str, dict[str, str], float]] = {
    "prores.mov": ("prores_ks", {"pix_fmt": "yuva444p10le", "profile": "4444"}, 2),
    "vp9.webm": ("libvpx-vp9", {"pix_fmt": "yuva420p", "crf": "10", "b": "0", "auto-alt-ref": "0"}, 4),
    "vp8.webm": ("libvpx", {"pix_fmt": "yuva420p", "crf": "4", "b": "4M", "auto-alt-ref": "0"}, 6),
    "png.mov": ("png", {"pix_fmt": "rgba"}, 0),
    "qtrle.mov": ("qtrle", {"pix_fmt": "argb"}, 0),
    "ffv1.mkv": ("ffv1", {"pix_fmt": "bgra"}, 0),
    "anim.apng": ("apng", {"pix_fmt": "rgba"}, 0),
}


@pytest.mark.parametrize("name", list(CODECS))
def test_files_with_alpha(clips: Path, name: str) -> None:
    codec, options, worst = CODECS[name]
    pixels = make.clip()
    make.video(clips / name, pixels, 16, codec, **options)
    (clips / name).with_suffix(".txt").write_text("a disc")
    made = plan(str(clips))
    assert set(codes(made)) <= ({"residue"} if worst else set()), "lossy codecs leave some"
    there = made.train[0].read()
    if worst == 0:
        assert np.array_equal(there, pixels)
    else:
        alpha, color = seen_error(there, pixels)
        assert alpha < 1.2 and color < worst
        assert there[..., 3].min() == 0, "the plain VP9 decoder would say 255 everywhere"


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.npz", "a.zip", "channels.npz"])
def test_images_and_arrays_with_alpha(clips: Path, name: str) -> None:
    pixels = make.clip()
    path = clips / name
    if name.endswith(".npz"):
        frames = pixels if name == "a.npz" else np.moveaxis(pixels, -1, 0)
        np.savez(path, frames=frames, fps=np.float32(16))
    elif name.endswith(".zip"):
        rgba.write_rgba(path, pixels, 16)
    else:
        make.animated(path, pixels, lossless=True) if name == "a.webp" else make.animated(path, pixels)
    path.with_suffix(".txt").write_text("a disc")
    there = read(plan(str(clips)))
    seen = pixels[..., 3] > 0
    assert np.array_equal(there[..., 3], pixels[..., 3]) and np.array_equal(there[seen], pixels[seen])


def test_a_folder_of_images_is_a_clip(clips: Path) -> None:
    pixels = make.clip()
    make.images(clips / "smoke", pixels)
    (clips / "smoke.txt").write_text("smoke")
    made = plan(str(clips))
    assert [(c.name, c.caption, c.kind) for c in made.clips] == [("smoke", "smoke", "frames")]
    assert made.probes[clips / "smoke"].fps is None, "frames have no clock: data.fps is theirs"
    assert np.array_equal(read(made), pixels)
    assert np.array_equal(read(plan(str(clips), fps=8)), pixels)
    for file in (clips / "smoke").iterdir():
        file.with_suffix(".txt").write_text("a picture of its own")
    made = plan(str(clips), frames=[1])
    assert len(made.train) == make.T and made.train[0].read().shape == (1, *SIZE, 4)


def test_equal_frames_that_were_stored_as_one_are_held(clips: Path) -> None:
    """Pillow merges them: what has 5 frames is 9 frames long."""
    few = np.stack([videos.numbered(k + 1, (32, 64)) for k in range(5)])
    pixels = np.concatenate([few, np.where(few[..., :1] > 0, 255, 0)], -1).astype(np.uint8)
    held = pixels[[0, 0, 0, 1, 2, 2, 3, 4, 4]]
    make.animated(clips / "a.webp", held, 62, lossless=True)
    (clips / "a.txt").write_text("numbers")
    made = plan(str(clips))
    assert made.probes[clips / "a.webp"].frames == 5
    there = made.train[0].read()
    assert videos.numbers(there[..., 3:].repeat(3, -1)) == [1, 1, 1, 2, 3, 3, 4, 5, 5]


def test_an_image_with_alpha_is_a_clip_of_one_frame(clips: Path) -> None:
    pixels = make.clip(frames=1)
    Image.fromarray(pixels[0]).save(clips / "a.png")
    (clips / "a.txt").write_text("a disc")
    assert np.array_equal(read(plan(str(clips), frames=[1, 9])), pixels)
    assert "image" in codes(plan(str(clips)))


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ends", [("_rgb", "_alpha"), ("_fgr", "_pha"), ("", "_seg"), ("", "_alpha"), ("", "_matte")]
)
def test_pairs(clips: Path, ends: tuple[str, str]) -> None:
    pixels = make.clip()
    make.pair(clips, "a.b", pixels, ends)
    made = plan(str(clips))
    assert [(c.name, c.caption) for c in made.clips] == [(f"a.b{ends[0]}.mkv", "caption a.b")]
    assert made.clips[0].matte == clips / f"a.b{ends[1]}.mkv"
    assert np.array_equal(read(made), pixels)


def test_pairs_in_folders(clips: Path) -> None:
    pixels = make.clip()
    for name, part in (("fgr_color_decon", pixels[..., :3]), ("pha", pixels[..., 3:])):
        (clips / name / "deep").mkdir(parents=True)
        make.video(clips / name / "deep/0001.mkv", part)
    (clips / "fgr_color_decon/deep/0001.txt").write_text("a disc")
    assert np.array_equal(read(plan(str(clips))), pixels)


def test_pairs_of_image_folders(clips: Path) -> None:
    pixels = make.clip()
    make.images(clips / "a_rgb", pixels[..., :3])
    make.images(clips / "a_alpha", pixels[..., 3:])
    (clips / "a.txt").write_text("a disc")
    assert np.array_equal(read(plan(str(clips))), pixels)
    for k, file in enumerate(rgba_images.frames_in(clips / "a_alpha")):
        Image.fromarray(pixels[k, ..., 3].astype(np.uint16) * 257).save(file)
    assert np.array_equal(read(plan(str(clips))), pixels), "16-bit gray is scaled, not cut off"


def manifest(clips: Path, suffix: str, rows: list[dict[str, str]]) -> str:
    path = clips / f"m{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    "row",
    [
        {"video_rgb": "x/a.mkv", "video_alpha": "y/b.mkv"},
        {"video_fgr": "x/a.mkv", "video_pha": "y/b.mkv"},
        {"rgb": "x/a.mkv", "alpha": "y/b.mkv"},
        {"video": "x/a.mkv", "matte": "y/b.mkv"},
        {"video": "c_rgb.mkv"},
        {"video": "c"},
    ],
)
def test_manifests_name_both_or_the_stem(clips: Path, suffix: str, row: dict[str, str]) -> None:
    pixels = make.clip()
    for folder, part in (("x", pixels[..., :3]), ("y", pixels[..., 3:])):
        (clips / folder).mkdir()
        make.video(clips / folder / ("a.mkv" if folder == "x" else "b.mkv"), part)
    make.pair(clips, "c", pixels)
    made = plan(manifest(clips, suffix, [row | {"prompt": "a disc"}]))
    assert np.array_equal(read(made), pixels)


def test_a_manifest_may_name_the_column(clips: Path) -> None:
    make.pair(clips, "a", make.clip(), ("", "_x"))
    path = manifest(clips, ".csv", [{"file": "a.mkv", "mask_path": "a_x.mkv", "caption": "a disc"}])
    assert read(plan({"path": path, "alpha_column": "mask_path"})).shape[-1] == 4
    assert codes(plan(path)) == {"no-alpha": ["a.mkv"]}
    assert "mask" in plan({"path": path, "alpha_column": "mask"}).problems[0].message
    opaque = plan({"path": path, "alpha_column": "mask_path"}, channels=3)
    assert codes(opaque) == {"matte": ["a_x.mkv"]} and opaque.train[0].read().shape[-1] == 3


def test_lines_name_the_stem(clips: Path) -> None:
    pixels = make.clip()
    make.pair(clips, "a", pixels)
    (clips / "prompts.txt").write_text("a disc")
    (clips / "videos.txt").write_text("a")
    assert np.array_equal(read(plan({"path": str(clips), "layout": "lines"})), pixels)


def test_grey_of_limited_range_is_read_as_full(clips: Path) -> None:
    pixels = make.clip()
    make.video(clips / "a.mkv", pixels[..., :3])
    make.video(clips / "a_alpha.mp4", pixels[..., 3:].repeat(3, -1), 16, "libx264", "yuv420p", qp="0")
    (clips / "a.txt").write_text("a disc")
    there = read(plan(str(clips)))
    assert seen_error(there, pixels)[0] < 0.5 and there[..., 3].max() == 255 and there[..., 3].min() == 0


# --- cut alike ----------------------------------------------------------------------------------------------


def test_color_and_matte_are_cut_by_the_same_frames(clips: Path) -> None:
    """Millisecond stamps on one side and exact ones on the other: chosen by time alone they would part."""
    videos.write(clips / "a.mkv", 60, 30, (64, 128), codec="libx264")
    videos.write(clips / "a_alpha.mp4", 60, 30, (64, 128))
    (clips / "a.txt").write_text("numbers")
    for fps in (15, 16, 24, 12.5, 7):
        made = plan(str(clips), size=(32, 64), frames=[5, 9], fps=fps, max_windows=3)
        for window in made.train:
            pixels = window.read()
            colors = videos.numbers(pixels[..., :3])
            assert colors == videos.numbers(pixels[..., 3:].repeat(3, -1))
            assert len(set(colors)) == len(colors)


def test_windows_strides_and_rates_of_every_form(clips: Path) -> None:
    frames = np.stack([videos.numbered(k + 1, (32, 64)) for k in range(40)])
    pixels = np.concatenate([frames, np.full_like(frames[..., :1], 200)], -1)
    pixels[:, :2] = 0
    rgba.write_rgba(clips / "a.mov", pixels, 32)
    make.pair(clips, "b", pixels)
    shutil.copy(clips / "b.txt", clips / "a.txt")
    make.images(clips / "c", pixels)
    (clips / "c.txt").write_text("c")
    made = plan(str(clips), frames=[5], max_windows=3, stride=4, fps=16)
    shown = {(w.clip.name, w.start): videos.numbers(w.read()[..., :3]) for w in made.train}
    assert shown["a.mov", 0.0] == [1, 3, 5, 7, 9], "32 fps at 16: every second frame"
    assert shown["b_rgb.mkv", 0.0] == [1, 2, 3, 4, 5]
    assert shown["c", 0.0] == [1, 2, 3, 4, 5]
    assert max(shown["c", s][-1] for n, s in shown if n == "c") == 40
    assert len(shown) == 9


def test_far_frames_are_sought(clips: Path) -> None:
    frames = np.stack([videos.numbered(k + 1, (32, 64)) for k in range(120)])
    path = make.video(clips / "a.mkv", np.concatenate([frames, frames[..., :1]], -1))
    wanted = [0, 3, 40, 41, 90, 119]
    there = np.stack([pixels for pixels, _ in rgba_clips._pick(path, wanted, gray=False)])
    assert videos.numbers(there[..., :3]) == [w + 1 for w in wanted]


def test_turned_and_wide_pixels_are_turned_alike(clips: Path) -> None:
    for name, way in (("a.mov", 90), ("a_alpha.mov", 90)):
        videos.write(clips / name, 9, 16, (32, 64), rotation=way)
    (clips / "a.txt").write_text("x")
    made = plan(str(clips), size=(64, 32))
    pixels = read(made)
    assert made.probes[clips / "a.mov"].height == 64
    assert np.abs(pixels[..., 0].astype(int) - pixels[..., 3]).max() < 6


def test_resizing_weighs_color_with_alpha(clips: Path) -> None:
    big = make.clip(size=(128, 256))
    big[..., :3] = np.where(big[..., 3:] > 0, (250, 20, 20), (0, 255, 0))
    make.pair(clips, "a", big)
    pixels = read(plan(str(clips)))
    soft = (pixels[..., 3] > 8) & (pixels[..., 3] < 247)
    assert soft.sum() > 50 and np.abs(pixels[soft][:, :3].astype(int) - (250, 20, 20)).max() <= 2
    assert np.array_equal(pixels, compositing.resize(big, SIZE))


# --- what is wrong ------------------------------------------------------------------------------------------


def test_pairs_that_do_not_match_are_distinguished(clips: Path) -> None:
    pixels = make.clip()
    make.pair(clips, "long", pixels)
    make.video(clips / "long_alpha.mkv", pixels[:-1, ..., 3:])
    make.pair(clips, "small", pixels)
    make.video(clips / "small_alpha.mkv", pixels[:, :16, :32, 3:])
    make.pair(clips, "fast", pixels)
    make.video(clips / "fast_alpha.mkv", pixels[..., 3:], 24)
    make.pair(clips, "twice", pixels)
    shutil.copy(clips / "twice_alpha.mkv", clips / "twice_pha.mkv")
    made = plan(str(clips))
    says = {p.name: p.message for p in made.problems}
    assert {p.code for p in made.problems} == {"pair"} and not made.train
    assert says["long_rgb.mkv"] == "9 frames and 8 in long_alpha.mkv"
    assert says["small_rgb.mkv"] == "64x32 and 32x16 in small_alpha.mkv"
    assert says["fast_rgb.mkv"] == "16 fps and 24 in fast_alpha.mkv"
    assert "twice_alpha.mkv and twice_pha.mkv" in says["twice_rgb.mkv"]


def test_halves_are_named(clips: Path) -> None:
    make.pair(clips, "a", make.clip())
    make.pair(clips, "b", make.clip(1))
    (clips / "a_alpha.mkv").unlink()
    (clips / "b_rgb.mkv").unlink()
    says = {p.name: p.message for p in plan(str(clips)).problems if p.code == "no-alpha"}
    assert "a_alpha.mp4" in says["a_rgb.mkv"] and "b_rgb or b is missing" in says["b_alpha.mkv"]


def test_alpha_that_is_the_same_everywhere_is_refused(clips: Path) -> None:
    for name, value in (("full", 255), ("none", 0)):
        pixels = make.clip()
        pixels[..., 3] = value
        make.video(clips / f"{name}.mkv", pixels)
        (clips / f"{name}.txt").write_text(name)
    rare = make.clip(frames=40)
    rare[..., 3] = 255
    rare[1] = make.clip(frames=1)[0]  # not among the frames that are looked at first
    make.video(clips / "rare.mkv", rare)
    (clips / "rare.txt").write_text("once")
    made = plan(str(clips))
    assert codes(made)["constant-alpha"] == ["full.mkv", "none.mkv"]
    assert [w.clip.name for w in made.train] == ["rare.mkv"]


def test_what_looks_wrong_is_reported(clips: Path) -> None:
    truth = make.clip()
    times = compositing.to_uint8(compositing.premultiply(compositing.to_float(truth)))
    turned = truth.copy()
    turned[..., 3] = 255 - turned[..., 3]
    squeezed = truth.copy()
    squeezed[..., 3] = (16 + squeezed[..., 3] * (219 / 255)).round()
    noisy = truth.copy()
    noisy[..., 3] = np.maximum(noisy[..., 3], np.arange(make.W) % 2 * 2)
    cases = {
        "premultiplied": (times, {"premultiplied": True}),
        "inverted": (turned, {"invert": True}),
        "limited": (squeezed, {"limited": True}),
        "residue": (noisy, {"snap": 2}),
    }
    for code, (pixels, cure) in cases.items():
        shutil.rmtree(clips)
        clips.mkdir()
        make.video(clips / "a.mkv", pixels)
        (clips / "a.txt").write_text("a disc")
        assert code in codes(plan(str(clips))), code
        mended = plan(str(clips), matte=KEEP | cure)
        assert code not in codes(mended)
        there = mended.train[0].read()
        assert np.abs(there[..., 3].astype(int) - truth[..., 3]).max() <= 2
        seen = truth[..., 3] > 128
        assert np.abs(there[seen].astype(int) - truth[seen]).max() <= 3
    assert codes(plan(str(clips), matte=KEEP | {"snap": 2})) == {}


def test_auto_divides_what_looks_premultiplied_and_only_that(clips: Path) -> None:
    truth = make.clip()
    make.video(clips / "a.mkv", compositing.to_uint8(compositing.premultiply(compositing.to_float(truth))))
    make.video(clips / "b.mkv", truth)
    for name in "ab":
        (clips / f"{name}.txt").write_text(name)
    made = plan(str(clips))
    a, b = (w.read() for w in made.train)
    assert codes(made) == {"premultiplied": ["a.mkv"]}
    seen = truth[..., 3] > 128
    assert np.array_equal(b, truth) and np.abs(a[seen].astype(int) - b[seen]).max() <= 2
    stated = plan(str(clips), matte=KEEP | {"premultiplied": False})
    assert stated.train[0].read()[seen].mean() < a[seen].mean() and codes(stated) == {}


def test_generated_pairs_are_read_back_and_their_previews_are_not(clips: Path) -> None:
    truth = make.clip()
    color, matte = rgba.write_pair(clips / "a", truth, 16, premultiplied=True)
    (clips / "a.txt").write_text("a disc")
    made = plan(str(clips))
    assert [(w.clip.path, w.clip.matte) for w in made.train] == [(color, matte)]
    assert codes(made) == {"premultiplied": ["a_rgb.mp4"]}
    found, seen = made.train[0].read(), truth[..., 3] > 128
    assert np.abs(found[seen].astype(int) - truth[seen]).mean() < 3, "color is divided by alpha"
    over = compositing.composite(truth, np.uint8([0, 0, 0]))
    video.write_video(clips / "a.mp4", over, 16)
    again = plan(str(clips))
    assert [(w.clip.path, w.clip.matte) for w in again.train] == [(color, matte)]
    assert codes(again)["no-alpha"] == ["a.mp4"], "the matte is that of a_rgb.mp4"


def test_color_that_may_be_either_is_asked_about(clips: Path) -> None:
    glass = make.clip()
    glass[..., 3] = np.where(glass[..., 3] > 0, 100, 0)
    glass[..., :3] = np.where(glass[..., 3:] > 0, 60, 0)
    make.video(clips / "a.mkv", glass)
    (clips / "a.txt").write_text("glass")
    made = plan(str(clips))
    assert codes(made) == {"unclear-color": ["a.mkv"]}
    there = {False: made.train[0].read()}
    for stated in (True, False):
        made = plan(str(clips), matte=KEEP | {"premultiplied": stated})
        assert codes(made) == {}
        there[stated] = made.train[0].read()
    seen = glass[..., 3] > 0
    assert (there[False][seen][:, 0] == 60).all() and (there[True][seen][:, 0] == 153).all()


def test_the_odd_one_out(clips: Path) -> None:
    for i in range(11):
        pixels = make.clip(i)
        if i == 3:
            pixels[..., 3] = np.maximum(pixels[..., 3], 250)
        make.video(clips / f"{i:02d}.mkv", pixels)
        (clips / f"{i:02d}.txt").write_text("a disc")
    assert codes(plan(str(clips))) == {"odd-alpha": ["03.mkv"]}


# --- identity -----------------------------------------------------------------------------------------------


def test_matte_and_options_are_part_of_what_is_cached(clips: Path, tmp_path: Path) -> None:
    make.pair(clips, "a", make.clip())
    store, family = (
        Cache(tmp_path / "cache"),
        SimpleNamespace(images=(), model=SimpleNamespace(family="x"), media_key=()),
    )
    store.encoder = lambda *_: []  # type: ignore[method-assign]

    def name(**how: Any) -> str:
        return store.media_names(family, plan(str(clips), matte=KEEP | how).train)[0]  # type: ignore[arg-type]

    first = name()
    assert first == name() and len({first, name(snap=3), name(invert=True), name(background="grow")}) == 4
    other = make.clip()
    other[..., 3] //= 2
    make.video(clips / "a_alpha.mkv", other[..., 3:])
    assert name() != first, "the matte's content counts"


def test_copies_of_a_pair_stay_on_one_side(clips: Path) -> None:
    for i in range(3):
        make.pair(clips, f"{i}", make.clip(i))
        for end in ("_rgb.mkv", "_alpha.mkv", ".txt"):
            shutil.copy(clips / f"{i}{end}", clips / f"{i + 3}{end}")
    same = make.clip(0)
    same[..., 3] //= 2
    make.pair(clips, "half", same)
    made = plan(str(clips), validation=2)
    assert codes(made) == {"duplicate": ["3_rgb.mkv", "4_rgb.mkv", "5_rgb.mkv"]}
    held = {w.clip.name for w in made.validation}
    assert {f"{(int(n[0]) + 3) % 6}_rgb.mkv" for n in held} == held


def test_looks_are_remembered(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.pair(clips, "a", make.clip())
    make.images(clips / "b", make.clip(1))
    (clips / "b.txt").write_text("b")
    looked = []
    real = rgba_clips.inspect_clip
    monkeypatch.setattr(rgba_clips, "inspect_clip", lambda *a: looked.append(a) or real(*a))
    store = Cache(tmp_path / "cache")
    first = plan(str(clips), probes=store.probes)
    store.remember()
    again = plan(str(clips), probes=Cache(tmp_path / "cache").probes)
    assert len(looked) == 2 and again.probes == first.probes and again.alphas == first.alphas
    make.video(clips / "a_alpha.mkv", make.clip(2)[..., 3:])
    plan(str(clips), probes=Cache(tmp_path / "cache").probes)
    assert len(looked) == 3, "a matte that changed is looked at again"


# --- opaque runs --------------------------------------------------------------------------------------------


def test_opaque_runs_see_what_they_saw(clips: Path) -> None:
    rgba.write_rgba(clips / "a.mov", make.clip(), 16)
    (clips / "a.txt").write_text("a disc")
    make.pair(clips, "b", make.clip())
    made = plan(str(clips), channels=3)
    assert codes(made) == {"transparent": ["a.mov"], "matte": ["b_alpha.mkv"]}
    assert [w.read().shape for w in made.train] == [(make.T, *SIZE, 3)] * 2
    assert made.train[0].read()[0, 0, -1].tolist() == [255, 255, 255]
    assert made.train[0].key == ("window", READER, "video", 0.0, make.T, 16.0, *SIZE)
    (clips / "b_alpha.txt").write_text("a clip in its own right")
    assert len(plan(str(clips), channels=3).train) == 3


def test_paths_stay_in_their_folder(clips: Path, tmp_path: Path) -> None:
    make.pair(tmp_path / "out", "a", make.clip())
    shutil.copy(tmp_path / "out/a_rgb.mkv", clips / "a_rgb.mkv")
    (clips / "a.txt").write_text("a")
    (clips / "a_alpha.mkv").symlink_to(tmp_path / "out/a_alpha.mkv")
    assert "outside" in codes(plan(str(clips)))
    rows = [{"rgb": "a_rgb.mkv", "alpha": "../out/a_alpha.mkv", "prompt": "x"}]
    assert codes(plan(manifest(clips, ".csv", rows)))["outside"] == ["../out/a_alpha.mkv"]


def test_rgba_arrays_in_an_opaque_run_are_put_over_white(tmp_path: Path) -> None:
    for frames in (3, 9):
        pixels = make.clip(frames=frames)
        np.savez(tmp_path / "a.npz", frames=pixels, fps=np.float32(16))
        probe = video.probe(tmp_path / "a.npz")
        assert (probe.frames, probe.height, probe.width) == (frames, 32, 64) and probe.transparent
        there = video.read_frames(tmp_path / "a.npz", 0, frames, 16, (32, 64))
        over = compositing.composite(pixels, np.full(3, 255, np.uint8))
        assert np.abs(there.astype(int) - over).max() <= 1
