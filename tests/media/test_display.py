"""Pixels as players display them: time, orientation, color, interlacing, premultiplication."""

from __future__ import annotations

import io
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image, ImageCms

from inlaid.data import rgba_clips
from inlaid.data.probes import CachedProbes
from inlaid.media import color, rgba, video
from inlaid.media.kinds import MediaError, Probe, available_frames
from support import marked
from support.marked import FRAMES, SIZE, numbers, off
from support.slow import slow


def read(path: Path, frames: int | None = None, fps: float = 16) -> np.ndarray:
    """All frames as displayed, or the first ones."""
    probe = video.probe(path)
    size = (probe.height, probe.width)
    count = frames or available_frames(probe, fps)
    return video.read_frames(path, 0.0, count, fps, size, premultiplied=probe.premultiplied)


# --- which frames (edges 1.1 to 1.3, 1.6, 1.13) -------------------------------------------------------------


@pytest.mark.parametrize(("start", "seconds"), [(2, 2), (0, 3), (2.5, 1), (4, 2)])
@pytest.mark.parametrize("suffix", ["mp4", slow("mov")])
def test_an_edit_list_shows_a_part(tmp_path: Path, suffix: str, start: float, seconds: float) -> None:
    path = marked.write(tmp_path / f"a.{suffix}", FRAMES, g=16, bf=2)
    marked.show_only(path, start, seconds)
    probe = video.probe(path)
    count = int(seconds * 16)
    assert (probe.frames, round(probe.duration, 3)) == (count, seconds)
    assert numbers(read(path)) == list(range(int(start * 16), int(start * 16) + count))


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mkv", "libx264", {"bf": 0}),
        ("webm", "libvpx-vp9", {"crf": 20, "b": 0}),
        ("mp4", "libx264", {"bf": 0}),
    ],
)
def test_the_last_frame_is_held(tmp_path: Path, suffix: str, codec: str, options: dict) -> None:
    path = tmp_path / f"a.{suffix}"
    marked.write(path, FRAMES[:33], codec=codec, ticks=[100 * i for i in range(33)], last=4800, **options)
    probe = video.probe(path)
    assert probe.duration == pytest.approx(5.0, abs=0.01) and probe.fps == 16
    shown = numbers(read(path))
    assert len(shown) == 80 and [shown[i] for i in range(0, 80, 7)] == [min(i, 32) for i in range(0, 80, 7)]


def held_gif(path: Path, held: dict[int, int]) -> Path:
    pictures = [Image.fromarray(f).convert("P", palette=Image.Palette.ADAPTIVE) for f in FRAMES[:12]]
    durations = [held.get(i, 60) for i in range(12)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return path


def test_a_gif_with_held_frames(tmp_path: Path) -> None:
    path = held_gif(tmp_path / "a.gif", {5: 2000, 11: 3000})
    assert video.probe(path).duration == pytest.approx(10 * 0.06 + 5, abs=0.02)
    shown = numbers(read(path, fps=10))
    starts = np.cumsum([0, *([60] * 5), 2000, *([60] * 5)]) / 1000
    wanted = np.arange(len(shown)) / 10
    exact = [int((starts <= t + 1e-6).sum()) - 1 for t in wanted]
    assert len(shown) == 56 and np.abs(np.subtract(shown, exact)).max() <= 1
    assert all(shown[k] == 5 for k in range(4, 23)), "held for two seconds"


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_a_frame_is_held_in_the_middle(tmp_path: Path, suffix: str) -> None:
    ticks = [100 * i if i < 16 else 6400 + 100 * (i - 16) for i in range(48)]
    path = marked.write(tmp_path / f"a.{suffix}", FRAMES[:48], ticks=ticks, bf=0)
    shown = numbers(read(path))
    at = {
        0.0: 0,
        0.5: 8,
        0.9375: 15,
        1.0: 15,
        1.5: 15,
        2.0: 15,
        2.5: 15,
        3.0: 15,
        3.875: 15,
        4.0: 16,
        4.5: 24,
    }
    assert {t: shown[int(t * 16)] for t in at} == at and shown[-1] == 47
    assert float(video.probe(path).fps or 0) == pytest.approx(16, rel=0.002), (
        "a held frame does not make a clip slow"
    )


@pytest.mark.parametrize(
    ("name", "container", "codec"),
    [
        ("a.mp4", "mpegts", "libx264"),
        slow("a.ts", "mpegts", "libx264"),
        ("a.m2ts", "mpegts", "mpeg2video"),
        ("a.mpg", "mpeg", "mpeg2video"),
        ("a.flv", "flv", "libx264"),
        ("a.mkv", "mp4", "libx264"),
        slow("a.mp4", "matroska", "libx264"),
        slow("a.mov", "avi", "mpeg4"),
    ],
)
def test_the_format_is_that_of_the_content(tmp_path: Path, name: str, container: str, codec: str) -> None:
    options = {"g": 16} if codec == "libx264" else {"crf": None, "qscale": 2, "b": 8_000_000, "g": 16}
    fps = 16 if codec != "mpeg2video" else 25
    matrix = Colorspace.ITU601 if container == "avi" else Colorspace.ITU709  # which has no place for a tag
    path = tmp_path / name
    marked.write(path, FRAMES, fps=fps, codec=codec, container=container, matrix=matrix, **options)
    assert video.probe(path).frames == 96
    shown = read(path, 60, fps)
    assert numbers(shown) == list(range(60)) and off(shown[5]) <= (3 if codec == "libx264" else 6)
    late = video.read_frames(path, 40 / fps, 8, fps, SIZE)
    assert numbers(late) == list(range(40, 48))


def test_the_default_stream_is_read(tmp_path: Path) -> None:
    from av.stream import Disposition

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=16) for _ in range(2)]
        for stream, first in zip(streams, (50, 0), strict=True):
            stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
            stream.disposition = Disposition.default if first == 0 else Disposition(0)
        for stream, first in zip(streams, (50, 0), strict=True):
            for i in range(12):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(FRAMES[first + i], format="rgb24")))
            out.mux(stream.encode())
    assert numbers(read(path, 12)) == list(range(12))


# --- orientation (1.4, 1.13) --------------------------------------------------------------------------------

TURNS: dict[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]] = {
    (1, 0, 0, 1): lambda x: x,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x.swapaxes(0, 1), 2),
}
"""Display matrices (a, b, c, d) of ISO/IEC 14496-12: x' = ax + cy, y' = bx + dy with y downward."""


@pytest.mark.parametrize("matrix", TURNS, ids=str)
def test_every_display_matrix(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = marked.write(tmp_path / "a.mp4", FRAMES[:8])
    marked.display(path, matrix)
    wanted = TURNS[matrix](FRAMES[3])
    probe = video.probe(path)
    assert (probe.height, probe.width) == wanted.shape[:2]
    assert bool(probe.orientation) == (matrix != (1, 0, 0, 1)) == bool(probe.conversions)
    for shown in (read(path)[3], next(video.native_frames(path, np.array([3 / 16])))[0]):
        assert np.abs(shown.astype(int) - wanted).mean() < 4, "quarters and number are where they belong"


def test_an_oblique_display_matrix_is_refused(tmp_path: Path) -> None:
    path = marked.write(tmp_path / "a.mp4", FRAMES[:8])
    marked.display(path, (1, 1, -1, 1))
    with pytest.raises(MediaError, match="at an angle of 45 degrees"):
        video.probe(path)


def test_a_matte_that_is_not_turned_with_its_color_is_refused(tmp_path: Path) -> None:
    color_file = marked.write(tmp_path / "a_rgb.mp4", FRAMES[:8])
    matte = marked.write(tmp_path / "a_alpha.mp4", FRAMES[:8])
    marked.display(color_file, (-1, 0, 0, -1))
    with pytest.raises(MediaError, match=r"rotated by 180 degrees, and a_alpha.mp4 is not rotated") as error:
        rgba_clips.inspect_clip(color_file, matte)
    assert error.value.code == "pair"
    marked.display(matte, (-1, 0, 0, -1))
    assert rgba_clips.inspect_clip(color_file, matte).probe.orientation == "rotated by 180 degrees"


# --- color (1.5, 1.7, 1.8, 1.10) ----------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "name"), [(8, "YCgCo"), (10, "BT.2020 constant luminance"), (14, "ICtCp")])
def test_a_matrix_that_cannot_be_converted_is_named(tmp_path: Path, code: int, name: str) -> None:
    path = marked.write(tmp_path / "a.mp4", FRAMES[:8], tags=(code, 1, 1, 1))
    with pytest.raises(MediaError, match=f"YUV matrix {name} cannot be converted") as error:
        video.probe(path)
    assert error.value.code == "unreadable"


def linear(x: np.ndarray) -> np.ndarray:
    x = x / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return np.where(x <= 0.0031308, x * 12.92, 1.055 * x ** (1 / 2.4) - 0.055)


TO_P3 = np.array([[0.82246, 0.17754, 0], [0.03319, 0.96681, 0], [0.01708, 0.07240, 0.91052]])
TO_2020 = np.array([[0.62740, 0.32928, 0.04331], [0.06910, 0.91954, 0.01136], [0.01639, 0.08801, 0.89560]])


@pytest.mark.parametrize(
    ("primaries", "transfer", "gamut"),
    [(12, 1, TO_P3), (12, 13, TO_P3), (9, 14, TO_2020), (9, 1, TO_2020), (9, 15, TO_2020)],
)
@pytest.mark.parametrize("alpha", [False, True])
def test_wide_gamut_video(
    tmp_path: Path, primaries: int, transfer: int, gamut: np.ndarray, alpha: bool
) -> None:
    wide = [(255 * encoded(linear(f) @ gamut.T)).round().astype(np.uint8) for f in FRAMES[:4]]
    if alpha:
        wide = [np.concatenate([f, np.full((*SIZE, 1), 255, np.uint8)], -1) for f in wide]
    how = {"codec": "ffv1", "pix_fmt": "bgra", "crf": None} if alpha else {}
    path = marked.write(
        tmp_path / f"a.{'mkv' if alpha else 'mp4'}", wide, tags=(1, primaries, transfer, 1), **how
    )
    assert off(read(path)[2]) <= 3
    assert "converted to sRGB" in video.probe(path).conversions


def pq(nits: np.ndarray) -> np.ndarray:
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(display: np.ndarray) -> np.ndarray:
    """Codes of light on a display of 1000 cd/m2; 1 is SDR white of 203 cd/m2."""
    light = display * 203 / 1000
    luma = light @ np.array([0.2627, 0.6780, 0.0593])
    scene = light * np.maximum(luma, 1e-9)[..., None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: int) -> None:
    dark = [(f * 0.6).round().astype(np.uint8) for f in FRAMES[:4]]
    light = [linear(f) @ TO_2020.T for f in dark]
    codes = [pq(203 * x) if transfer == 16 else hlg(x) for x in light]
    path = marked.write(
        tmp_path / "a.mp4",
        [(65535 * x.clip(0, 1)).round().astype(np.uint16) for x in codes],
        source="rgb48le",
        pix_fmt="yuv420p10le",
        tags=(9, 9, transfer, 1),
        matrix=9,
    )
    wanted = {k: tuple(round(0.6 * v) for v in c) for k, c in marked.COLORS.items()}
    assert off(read(path)[2], wanted) <= 3, "what SDR can show stays as it is"
    probe = video.probe(path)
    assert probe.hdr and "(HDR) converted to sRGB" in probe.conversions


def test_tone_mapping_is_monotone_and_ends_at_white() -> None:
    nits = np.array([0, 1, 10, 50, 100, 203, 400, 700, 1000])
    gray = np.repeat((65535 * pq(np.maximum(nits, 1e-9))).round().astype(np.uint16)[None, :, None], 3, -1)
    out = color.to_srgb(gray, 9, 16)[0, :, 0].astype(int)
    assert (np.diff(out)[:-1] > 0).all() and out[0] == 0 and out[-1] == 255
    assert 200 < out[5] < 245, "SDR white is a little darker, to leave room for highlights"


def profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """A matrix ICC profile, primaries in XYZ (D50)."""

    def fixed(v: float) -> bytes:
        return struct.pack(">i", round(v * 65536))

    def xyz(v: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, v))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 79,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz((0.9642, 1, 0.8249)),
        **dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=True)),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    at, table, data = 132 + 12 * len(tags), b"", b""
    for key, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += key + struct.pack(">II", at + len(data), len(value))
        data += value
    date = struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    head = struct.pack(">II", at + len(data), 0) + struct.pack(">I", 0x02400000) + b"mntrRGB XYZ " + date
    head += b"acsp" + b"\0" * 28 + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


PROFILES = {
    "Display P3": profile(
        ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)), 2.2
    ),
    "Adobe RGB": profile(((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)), 2.2),
}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(
    ("suffix", "mode"), [("jpg", "RGB"), ("png", "RGB"), ("png", "RGBA"), ("webp", "RGB")]
)
def test_pictures_with_a_profile(tmp_path: Path, name: str, suffix: str, mode: str) -> None:
    icc = PROFILES[name]
    wide = ImageCms.profileToProfile(
        Image.fromarray(FRAMES[5]),
        ImageCms.createProfile("sRGB"),
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
    )
    assert wide is not None and off(np.asarray(wide)) > 10, "the file's own numbers are others"
    path = tmp_path / f"a.{suffix}"
    how = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    wide.convert(mode).save(path, icc_profile=icc, **how)
    assert off(video.read_frames(path, 0, 1, 1, SIZE)[0]) <= 3
    assert off(rgba.read_rgba(path)[0][..., :3]) <= 3 if suffix != "jpg" else True
    assert video.probe(path).conversions == "ICC profile wide converted to sRGB"


def test_a_gray_picture_with_a_profile_and_a_broken_profile(tmp_path: Path) -> None:
    gray = Image.fromarray(FRAMES[5]).convert("L")
    gray.save(tmp_path / "a.png", icc_profile=b"no profile at all")
    with pytest.raises(MediaError, match="its ICC profile cannot be"):
        video.probe(tmp_path / "a.png")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(FRAMES[5]).save(tmp_path / "s.png", icc_profile=srgb)
    assert video.probe(tmp_path / "s.png").conversions == ""
    assert (video.read_frames(tmp_path / "s.png", 0, 1, 1, SIZE)[0] == FRAMES[5]).all()


def test_a_phone_s_jpeg_has_further_pictures(tmp_path: Path) -> None:
    main, small = Image.fromarray(FRAMES[5]), Image.fromarray(FRAMES[6]).resize((80, 48))
    main.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[small])
    shown = video.read_frames(tmp_path / "a.jpg", 0, 1, 1, SIZE)[0]
    assert marked.number(shown) == 5 and off(shown) <= 4


PLAYERS = {(534, 1280): Colorspace.ITU709, (720, 960): Colorspace.ITU709, (576, 720): Colorspace.ITU601}


@pytest.mark.parametrize(
    ("alpha", "size", "matrix"),
    [(False, *c) for c in PLAYERS.items()]
    + [(True, *c) if c[1] == Colorspace.ITU601 else slow(True, *c) for c in PLAYERS.items()],
)
def test_an_untagged_matrix_is_that_of_players(
    tmp_path: Path, size: tuple[int, int], matrix: Colorspace, alpha: bool
) -> None:
    frames = [marked.frame(i, size) for i in range(2)]
    how: dict = {}
    if alpha:
        frames = [np.concatenate([f, np.full((*size, 1), 255, np.uint8)], -1) for f in frames]
        how = {"codec": "ffv1", "pix_fmt": "yuva444p", "crf": None}
    path = tmp_path / "a.mkv"
    marked.write(path, frames, tags=(2, 2, 2, 1), matrix=matrix, **how)
    assert off(read(path, 1)[0]) <= 3
    assert off(next(video.native_frames(path, np.zeros(1)))[0][..., :3]) <= 3
    assert video.probe(path).untagged


# --- interlacing (1.9) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["tff", "bff"])
def test_interlaced_video_has_no_combs(tmp_path: Path, first: str) -> None:
    bars = []
    for i in range(40):
        bar = np.full((*SIZE, 3), 30, np.uint8)
        bar[:, i * 4 % 120 : i * 4 % 120 + 30] = 220
        bars.append(bar)
    woven = []
    for early, late in zip(bars[::2], bars[1::2], strict=True):
        both = early.copy()
        rows = slice(1, None, 2) if first == "tff" else slice(0, None, 2)
        both[rows] = late[rows]
        woven.append(both)
    path = marked.write(tmp_path / "a.mp4", woven, fps=25, x264_params=f"{first}=1")

    def combs(clip: np.ndarray) -> float:
        rows = clip.astype(int)
        return float(np.abs(rows[:, 2:] - 2 * rows[:, 1:-1] + rows[:, :-2]).mean())

    shown = read(path, fps=25)
    assert len(shown) == 20 and combs(np.stack(woven)) > 10 and combs(shown) < 2
    assert (np.abs(np.diff(shown.astype(int), axis=0)).reshape(19, -1).mean(1) > 1).all(), (
        "each frame its own"
    )
    assert video.probe(path).conversions == "deinterlaced"
    again = video.read_frames(path, 10 / 25, 5, 25, SIZE)
    assert np.abs(again.astype(int) - shown[10:15]).mean() < 1


# --- premultiplication and transparency (1.11 to 1.13) ------------------------------------------------------


def disc() -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.clip((44 - np.hypot(y - 48, x - 80)) / 12, 0, 1)[..., None]


@pytest.mark.parametrize("premultiplied", [True, False])
def test_alpha_over_white_is_the_same_premultiplied_or_straight(tmp_path: Path, premultiplied: bool) -> None:
    alpha = disc()
    frames = [
        np.concatenate([f * alpha if premultiplied else f + 0 * alpha, 255 * alpha], -1)
        .round()
        .astype(np.uint8)
        for f in FRAMES[:6]
    ]
    path = tmp_path / "a.mov"
    marked.write(path, frames, codec="prores_ks", pix_fmt="yuva444p10le", crf=None, profile="4444")
    assert video.probe(path).premultiplied == premultiplied
    wanted = FRAMES[2] * alpha + 255 * (1 - alpha)
    assert np.abs(read(path)[2] - wanted).mean() < 2.5


def test_smoke_without_an_opaque_pixel() -> None:
    rng = np.random.default_rng(0)
    alpha = np.clip(disc() * 0.5 * rng.uniform(0.5, 1, (*SIZE, 1)), 0, 1)
    for shade in (250, 180, 90):
        straight = np.concatenate([np.full((*SIZE, 3), shade) + 0 * alpha, 255 * alpha], -1)[None]
        times = np.concatenate([np.full((*SIZE, 3), shade) * alpha, 255 * alpha], -1)[None]
        assert rgba.measure_alpha(times.round().astype(np.uint8)).premultiplied, shade
        assert not rgba.measure_alpha(straight.round().astype(np.uint8)).premultiplied, shade


def test_an_opaque_gif_is_not_transparent(tmp_path: Path) -> None:
    probe = video.probe(held_gif(tmp_path / "a.gif", {}))
    assert probe.opaque, "its pixel format has alpha, its pixels do not use it"


# --- memos (1.14) -------------------------------------------------------------------------------------------


def test_a_replaced_file_with_the_same_size_and_time_is_probed_again(tmp_path: Path) -> None:
    path, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    marked.write(path, FRAMES[:20])
    marked.write(other, FRAMES[:33])
    size = max(p.stat().st_size for p in (path, other)) + 64
    for p in (path, other):
        pad = size - p.stat().st_size
        p.write_bytes(p.read_bytes() + struct.pack(">I", pad) + b"free" + bytes(pad - 8))
        os.utime(p, (1.7e9, 1.7e9))
    known = CachedProbes(tmp_path / "cache")
    assert known.probe(path).frames == 20
    shutil.copy2(other, path)
    assert (path.stat().st_size, path.stat().st_mtime) == (size, 1.7e9)
    assert known.probe(path).frames == 33
    assert isinstance(known.probe(path), Probe)
