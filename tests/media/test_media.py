"""Pixels in and out: which frames, which colors, which way up, and how a file can be broken."""

from __future__ import annotations

import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from inlaid.media.kinds import MediaError, Probe, available_frames, frames_on_show
from inlaid.media.video import probe as video_probe
from inlaid.media.video import read_frames
from support import videos
from support.frames import CONTAINERS, corner, expected
from support.slow import slow

RATES = [8, 16, 24, 30, Fraction(30000, 1001)]


# --- time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", RATES)
def test_nearest_is_exact_at_every_rate(fps):
    stamps = [k / Fraction(fps) for k in range(60)]
    wanted = [Fraction(k, 16) for k in range(25)]
    found = frames_on_show([float(s) for s in stamps], [float(w) for w in wanted], 16)
    assert found.tolist() == expected(stamps, wanted)


def test_nearest_takes_the_earlier_of_two():
    assert frames_on_show([0.0, 1.0, 2.0], [0.5, 1.5, 0.51, 1.49], 1).tolist() == [0, 1, 1, 1]
    assert frames_on_show([0.0], [5.0, -1.0], 16).tolist() == [0, 0]


def test_a_held_frame_stays_until_the_next_is_due():
    stamps = [0.0, 0.0625, 0.125, 4.0, 4.0625]
    wanted = [0.1, 2.0, 3.9, 3.96, 3.975, 4.04]
    assert frames_on_show(stamps, wanted, 16).tolist() == [2, 2, 2, 2, 3, 4]


def test_nearest_survives_millisecond_stamps():
    stamps = [round(k * 62.5) / 1000 for k in range(40)]
    assert frames_on_show(stamps, np.arange(40) / 16, 16).tolist() == list(range(40))
    floored = [int(s * 16) for s in stamps]
    assert floored != list(range(40)), "flooring would have been wrong here, which is why this test exists"


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "count"),
    [(48, 24, 16, 32), (49, 24, 16, 33), (49, 8, 16, 98), (49, 8, 8, 49), (1, 24, 16, 1), (81, 16, 16, 81)],
)
def test_available_counts_whole_frames_only(frames, rate, fps, count):
    interval = 1 / rate
    probe = Probe(frames, Fraction(rate), 8, 8, frames * interval, interval)
    assert available_frames(probe, fps) == count
    stamps = np.arange(frames) / rate
    assert (count - 1) / fps <= stamps[-1] + interval / 2 + 1e-3
    assert count / fps > stamps[-1] + interval / 2 - 1e-3


def test_frames_without_a_clock_are_counted_as_they_are():
    assert available_frames(Probe(81, None, 8, 8, 0.0), 16) == 81


# --- choosing frames in files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "suffix", "codec", "pix_fmt"),
    [(fps, *c) if c[0] == "mp4" or fps == RATES[-1] else slow(fps, *c) for fps in RATES for c in CONTAINERS],
)
def test_frames_are_chosen_by_time(tmp_path, suffix, codec, pix_fmt, fps):
    path = videos.write(tmp_path / f"a.{suffix}", 48, fps, codec=codec, pix_fmt=pix_fmt)
    probe = video_probe(path)
    assert probe.frames == 48
    assert float(probe.fps) == pytest.approx(float(fps), rel=0.003)
    assert not probe.variable
    count = available_frames(probe, 16)
    stamps = [k / Fraction(fps) for k in range(48)]
    if suffix == "gif":  # its clock ticks in hundredths, so the file itself says other times
        stamps = [Fraction(round(s * 100), 100) for s in stamps]
    for start in (0, Fraction(1, 4)):
        n = count if start == 0 else min(count - 4, 14)
        shown = videos.numbers(read_frames(path, float(start), n, 16, (32, 64)))
        exact = expected(stamps, [start + Fraction(k, 16) for k in range(n)])
        if suffix == "gif":
            assert np.abs(np.subtract(shown, exact)).max() <= 1
        else:
            assert shown == exact


def test_variable_rate_is_seen_and_followed(tmp_path):
    rng = np.random.default_rng(3)
    stamps = np.cumsum(rng.uniform(0.01, 0.09, 60))
    stamps -= stamps[0]
    probe = video_probe(path := videos.write(tmp_path / "v.mp4", 60, 24, stamps=stamps))
    assert probe.variable
    assert float(probe.fps) == pytest.approx(59 / stamps[-1], rel=0.03)
    n = available_frames(probe, 16)
    shown = videos.numbers(read_frames(path, 0.0, n, 16, (32, 64)))
    gaps = np.diff(stamps)
    due = stamps[1:] - np.minimum(gaps, 1 / 16) / 2
    earliest, latest = ([(due < k / 16 + off).sum() for k in range(n)] for off in (-1e-3, 1e-3))
    assert all(a <= b <= c for a, b, c in zip(earliest, shown, latest, strict=True)), "the file rounds times"


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_late_start_is_subtracted(tmp_path, suffix):
    path = videos.write(tmp_path / f"late.{suffix}", 48, 24, stamps=[1.5 + k / 24 for k in range(48)])
    probe = video_probe(path)
    assert probe.first == pytest.approx(1.5, abs=1e-3)
    assert probe.duration == pytest.approx(2.0, abs=2e-3)
    assert videos.numbers(read_frames(path, 0.5, 8, 24, (32, 64))) == list(range(12, 20))


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1"}, {"bf": "0"}])
def test_a_window_does_not_depend_on_where_decoding_began(tmp_path, options):
    path = videos.write(tmp_path / "g.mp4", 60, 24, gop=12, options=options)
    whole = read_frames(path, 0.0, 60, 24, (32, 64))
    for first in (1, 11, 12, 13, 35, 36):
        assert (read_frames(path, first / 24, 20, 24, (32, 64)) == whole[first : first + 20]).all()


def test_a_window_past_the_end_is_refused(tmp_path):
    path = videos.write(tmp_path / "s.mp4", 24, 24)
    with pytest.raises(MediaError, match="ends after") as error:
        read_frames(path, 0.5, 24, 24, (32, 64))
    assert error.value.code == "truncated"
    with pytest.raises(MediaError, match="ends after"):
        read_frames(path, 30.0, 4, 24, (32, 64))


def test_memory_does_not_grow_with_the_source(tmp_path):
    path = videos.write(tmp_path / "big.mp4", 60, 24, (1080, 1920), options={"preset": "ultrafast"})
    code = f"""
import resource
from inlaid.media import video
path, peak = {str(path)!r}, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
video.read_frames(path, 0.0, 2, 24, (64, 64))
before = peak()
video.probe(path)
video.read_frames(path, 0.0, 60, 24, (64, 64))
print(peak() - before)"""
    grown = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert grown < 120_000, f"{grown} KiB more for 58 more frames; they are 6 MB each at source size"


def test_one_core_decodes_720p_in_time(tmp_path):
    path = videos.write(tmp_path / "hd.mp4", 84, 16, (720, 1280), options={"preset": "ultrafast"})
    before = time.process_time()
    assert read_frames(path, 0.0, 81, 16, (480, 832)).shape == (81, 480, 832, 3)
    assert time.process_time() - before < 1.5


# --- geometry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rotation", "where"), [(0, (0, 0)), (-90, (0, 1)), (180, (1, 1)), (90, (1, 0))])
def test_phone_video_is_turned(tmp_path, rotation, where):
    path = videos.write(tmp_path / "r.mp4", 4, 24, (64, 128), draw=corner, rotation=rotation)
    probe = video_probe(path)
    turned = rotation in (90, -90)
    assert (probe.height, probe.width) == ((128, 64) if turned else (64, 128))
    frame = read_frames(path, 0.0, 1, 24, (probe.height, probe.width))[0]
    h, w = frame.shape[0] // 2, frame.shape[1] // 2
    means = [[frame[:h, :w].mean(), frame[:h, w:].mean()], [frame[h:, :w].mean(), frame[h:, w:].mean()]]
    assert means[where[0]][where[1]] > 240
    assert sorted(np.ravel(means))[2] < 15


def test_square_pixels(tmp_path):
    path = videos.write(tmp_path / "sar.mp4", 2, 24, (64, 96), sar=Fraction(4, 3), draw=disc)
    assert video_probe(path).width == 128
    frame = read_frames(path, 0.0, 1, 24, (64, 128))[0, ..., 0] > 127
    height, width = frame.any(1).sum(), frame.any(0).sum()
    assert width == pytest.approx(height * 4 / 3, abs=2), "a disc of storage pixels is an ellipse as shown"


def disc(k: int, size: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    inside = (y - size[0] / 2 + 0.5) ** 2 + (x - size[1] / 2 + 0.5) ** 2 < (size[0] * 0.4) ** 2
    return np.repeat(255 * inside.astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("size", [(64, 64), (32, 128), (48, 80), (128, 64)])
def test_covers_and_crops_the_middle(tmp_path, size):
    path = videos.write(tmp_path / "d.mp4", 2, 24, (96, 160), draw=disc)
    video = read_frames(path, 0.0, 1, 24, size)[0]
    image = tmp_path / "d.png"
    Image.fromarray(disc(0, (96, 160))).save(image)
    still = read_frames(image, 0.0, 1, 24, size)[0]
    assert video.shape == still.shape == (*size, 3)
    assert np.abs(video.astype(int) - still).mean() < 4
    scale = max(size[0] / 96, size[1] / 160)
    seen = (video[..., 0] > 127).any(0).sum()
    assert seen == pytest.approx(min(96 * 0.8 * scale, size[1]), abs=2), "the disc keeps its aspect"
    middle = (
        np.nonzero((still[..., 0] > 127).any(0))[0].mean(),
        np.nonzero((video[..., 0] > 127).any(0))[0].mean(),
    )
    assert middle == pytest.approx(((size[1] - 1) / 2,) * 2, abs=0.6), "the crop is central"


def test_downscaling_is_antialiased(tmp_path):
    def checks(k: int, size: tuple[int, int]) -> np.ndarray:
        y, x = np.mgrid[: size[0], : size[1]]
        return np.repeat((255 * ((y + x) % 2)).astype(np.uint8)[..., None], 3, -1)

    path = videos.write(tmp_path / "c.mp4", 1, 24, (256, 256), draw=checks, options={"crf": "0"})
    assert read_frames(path, 0.0, 1, 24, (48, 48))[0, 4:-4, 4:-4].std() < 12, "bilinear taps would give moire"


def test_absurd_shapes_are_refused(tmp_path):
    path = videos.write(tmp_path / "thin.mp4", 1, 24, (16, 4096), draw=videos.numbered)
    with pytest.raises(MediaError, match="too extreme a shape"):
        read_frames(path, 0.0, 1, 24, (2048, 16))


# --- color -------------------------------------------------------------------------------------------------


COLORS = [(200, 60, 30), (30, 180, 60), (40, 60, 220), (255, 255, 255), (0, 0, 0), (128, 128, 128)]


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(
    ("matrix", "height"), [(1, 64), (1, 720), (5, 64), (6, 64), (6, 720), (2, 64)], ids=lambda v: str(v)
)
def test_tags_are_trusted_and_small_untagged_video_is_601(tmp_path, color, matrix, height):
    path = videos.write(
        tmp_path / "c.mp4", 1, 24, (height, 96), matrix=matrix, draw=lambda k, s: videos.still(s, color)
    )
    assert video_probe(path).untagged == (matrix == 2)
    pixels = read_frames(path, 0.0, 1, 24, (height, 96))
    assert np.abs(pixels.astype(int) - color).max() <= 4


@pytest.mark.parametrize("color", COLORS)
def test_full_range_is_full(tmp_path, color):
    path = videos.write(
        tmp_path / "j.mov",
        1,
        24,
        codec="mjpeg",
        pix_fmt="yuvj420p",
        draw=lambda k, s: videos.still(s, color),
    )
    pixels = read_frames(path, 0.0, 1, 24, (64, 128))
    assert np.abs(pixels.astype(int) - color).max() <= 4


def test_large_untagged_video_is_709(tmp_path):
    color = (200, 60, 30)

    def encode(height: int) -> np.ndarray:
        path = tmp_path / f"{height}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(videos.still((height, 96), color)), "rgb24"
            )
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=1)))
            container.mux(stream.encode())
        assert video_probe(path).untagged
        return np.abs(read_frames(path, 0.0, 1, 24, (height, 96)).astype(int) - color)

    assert encode(720).max() <= 4
    assert encode(704).max() > 10, "under 720 lines the same file is taken for BT.601"


# --- the real files -----------------------------------------------------------------------------------------


def test_real_clips(media_root: Path):
    press = video_probe(media_root / "press" / "034.mp4")
    assert (press.frames, press.fps, press.height, press.width) == (127, 16, 480, 832)
    hiker = video_probe(media_root / "clips" / "videos" / "hiker.mp4")
    assert (hiker.frames, hiker.fps, hiker.height, hiker.width) == (49, 8, 480, 720)
    doubled = read_frames(media_root / "clips" / "videos" / "hiker.mp4", 0.0, 9, 16, (48, 64))
    assert (doubled[1] == doubled[0]).all(), "16 fps from 8: every frame twice, the earlier at ties"
    assert (doubled[2] != doubled[1]).any()
    frames = read_frames(media_root / "press" / "034.mp4", 0.0, 81, 16, (480, 832))
    assert frames.shape == (81, 480, 832, 3)
    assert frames.std() > 20
