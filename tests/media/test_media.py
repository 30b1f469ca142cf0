"""Pixels in and out: which frames, which colours, which way up, and how a file can be broken."""

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

from inlaid.media.contact_sheet import SheetRow, _font, _wrap, contact_sheet
from inlaid.media.kinds import IMAGES, MediaError, Probe, available_formats, nearest_frames
from inlaid.media.video import probe as video_probe
from inlaid.media.video import read_frames, write_video
from support import videos

RATES = [8, 16, 24, 30, Fraction(30000, 1001)]
CONTAINERS = [
    ("mp4", "libx264", "yuv420p"),
    ("mov", "libx264", "yuv420p"),
    ("m4v", "libx264", "yuv420p"),
    ("mkv", "libx264", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "libx264", "yuv420p"),
    ("gif", "gif", "rgb8"),
]


def expected(stamps: list[Fraction], wanted: list[Fraction]) -> list[int]:
    """The definition of choosing by time, in exact arithmetic."""
    return [min(range(len(stamps)), key=lambda i: (abs(stamps[i] - t), i)) for t in wanted]


def noise(k: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", RATES)
def test_nearest_is_exact_at_every_rate(fps):
    stamps = [k / Fraction(fps) for k in range(60)]
    wanted = [Fraction(k, 16) for k in range(25)]
    found = nearest_frames([float(s) for s in stamps], [float(w) for w in wanted])
    assert found.tolist() == expected(stamps, wanted)


def test_nearest_takes_the_earlier_of_two():
    assert nearest_frames([0.0, 1.0, 2.0], [0.5, 1.5, 0.51, 1.49]).tolist() == [0, 1, 1, 1]
    assert nearest_frames([0.0], [5.0, -1.0]).tolist() == [0, 0]


def test_nearest_survives_millisecond_stamps():
    stamps = [round(k * 62.5) / 1000 for k in range(40)]
    assert nearest_frames(stamps, np.arange(40) / 16).tolist() == list(range(40))
    floored = [int(s * 16) for s in stamps]
    assert floored != list(range(40)), "flooring would have been wrong here, which is why this test exists"


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "count"),
    [(48, 24, 16, 32), (49, 24, 16, 33), (49, 8, 16, 98), (49, 8, 8, 49), (1, 24, 16, 1), (81, 16, 16, 81)],
)
def test_available_counts_whole_frames_only(frames, rate, fps, count):
    interval = 1 / rate
    probe = Probe(frames, Fraction(rate), 8, 8, frames * interval, interval)
    assert available_formats(probe, fps) == count
    stamps = np.arange(frames) / rate
    assert (count - 1) / fps <= stamps[-1] + interval / 2 + 1e-3
    assert count / fps > stamps[-1] + interval / 2 - 1e-3


def test_frames_without_a_clock_are_counted_as_they_are():
    assert available_formats(Probe(81, None, 8, 8, 0.0), 16) == 81


# --- choosing frames in files ---------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "codec", "pix_fmt"), CONTAINERS)
@pytest.mark.parametrize("fps", RATES)
def test_frames_are_chosen_by_time(tmp_path, suffix, codec, pix_fmt, fps):
    path = videos.write(tmp_path / f"a.{suffix}", 48, fps, codec=codec, pix_fmt=pix_fmt)
    probe = video_probe(path)
    assert probe.frames == 48
    assert float(probe.fps) == pytest.approx(float(fps), rel=0.003)
    assert not probe.variable
    count = available_formats(probe, 16)
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
    assert float(probe.fps) == pytest.approx(59 / stamps[-1], rel=0.01)
    n = available_formats(probe, 16)
    shown = videos.numbers(read_frames(path, 0.0, n, 16, (32, 64)))
    assert shown == nearest_frames(stamps, np.arange(n) / 16).tolist()


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


# --- geometry -------------------------------------------------------------------------------------


def corner(k: int, size: tuple[int, int]) -> np.ndarray:
    out = np.zeros((*size, 3), np.uint8)
    out[: size[0] // 2, : size[1] // 2] = 255
    return out


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


# --- colour ---------------------------------------------------------------------------------------

COLOURS = [(200, 60, 30), (30, 180, 60), (40, 60, 220), (255, 255, 255), (0, 0, 0), (128, 128, 128)]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize(
    ("matrix", "height"), [(1, 64), (1, 720), (5, 64), (6, 64), (6, 720), (2, 64)], ids=lambda v: str(v)
)
def test_tags_are_trusted_and_small_untagged_video_is_601(tmp_path, colour, matrix, height):
    path = videos.write(
        tmp_path / "c.mp4", 1, 24, (height, 96), matrix=matrix, draw=lambda k, s: videos.still(s, colour)
    )
    assert video_probe(path).untagged == (matrix == 2)
    pixels = read_frames(path, 0.0, 1, 24, (height, 96))
    assert np.abs(pixels.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("colour", COLOURS)
def test_full_range_is_full(tmp_path, colour):
    path = videos.write(
        tmp_path / "j.mov",
        1,
        24,
        codec="mjpeg",
        pix_fmt="yuvj420p",
        draw=lambda k, s: videos.still(s, colour),
    )
    pixels = read_frames(path, 0.0, 1, 24, (64, 128))
    assert np.abs(pixels.astype(int) - colour).max() <= 4


def test_large_untagged_video_is_709(tmp_path):
    colour = (200, 60, 30)

    def encode(height: int) -> np.ndarray:
        path = tmp_path / f"{height}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(videos.still((height, 96), colour)), "rgb24"
            )
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=1)))
            container.mux(stream.encode())
        assert video_probe(path).untagged
        return np.abs(read_frames(path, 0.0, 1, 24, (height, 96)).astype(int) - colour)

    assert encode(720).max() <= 4
    assert encode(704).max() > 10, "under 720 lines the same file is taken for BT.601"


# --- alpha ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [("webm", "libvpx-vp9", "yuva420p"), ("mov", "qtrle", "argb"), ("mkv", "ffv1", "bgra")],
)
def test_transparent_video_is_put_on_white(tmp_path, suffix, codec, pix_fmt):
    def half(k: int, size: tuple[int, int]) -> np.ndarray:
        out = np.zeros((*size, 4), np.uint8)
        out[:, size[1] // 2 :] = (200, 40, 40, 255)
        return out

    path = videos.write(tmp_path / f"a.{suffix}", 3, 24, draw=half, codec=codec, pix_fmt=pix_fmt)
    assert video_probe(path).transparent
    pixels = read_frames(path, 0.0, 2, 24, (64, 128)).astype(int)
    assert pixels[:, :, :56].min() > 245
    assert np.abs(pixels[:, :, 72:] - (200, 40, 40)).max() < 12


def test_transparent_image_is_put_on_white(tmp_path):
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:16] = (0, 0, 255, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert video_probe(tmp_path / "a.png").transparent
    pixels = read_frames(tmp_path / "a.png", 0.0, 1, 16, (32, 32))[0]
    assert pixels[0, 0].tolist() == [127, 127, 255]
    assert pixels[31, 31].tolist() == [255, 255, 255]


def test_opaque_files_are_not_called_transparent(tmp_path):
    Image.fromarray(noise(0, (8, 8))).save(tmp_path / "a.png")
    assert not video_probe(tmp_path / "a.png").transparent
    assert not video_probe(videos.write(tmp_path / "a.mp4", 2, 24)).transparent


def test_one_frame_is_a_clip_too(tmp_path):
    path = videos.write(tmp_path / "one.mp4", 1, 24)
    probe = video_probe(path)
    assert (probe.frames, probe.fps, available_formats(probe, 16)) == (1, 24, 1)
    assert read_frames(path, 0.0, 1, 16, (32, 64)).shape == (1, 32, 64, 3)


# --- images and arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", IMAGES)
def test_images_are_one_frame(tmp_path, suffix):
    Image.fromarray(np.array(videos.still((40, 60)))).save(tmp_path / f"a{suffix}")
    probe = video_probe(tmp_path / f"a{suffix}")
    assert (probe.frames, probe.fps, probe.height, probe.width) == (1, None, 40, 60)
    pixels = read_frames(tmp_path / f"a{suffix}", 0.0, 1, 16, (20, 30))
    assert pixels.shape == (1, 20, 30, 3)
    assert np.abs(pixels.astype(int) - (200, 60, 30)).max() < 8
    with pytest.raises(MediaError, match="ends after 1 frames"):
        read_frames(tmp_path / f"a{suffix}", 0.0, 5, 16, (20, 30))


def test_images_are_turned_by_their_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(corner(0, (32, 64))).save(tmp_path / "e.png", exif=exif)
    probe = video_probe(tmp_path / "e.png")
    assert (probe.height, probe.width) == (64, 32)
    pixels = read_frames(tmp_path / "e.png", 0.0, 1, 16, (64, 32))[0]
    assert pixels[:30, 18:].min() == 255
    assert pixels[:30, :14].max() == 0


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_image_modes(tmp_path, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(tmp_path / f"m{suffix}")
    assert read_frames(tmp_path / f"m{suffix}", 0.0, 1, 16, (16, 16)).min() > 250


def test_deep_images_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(MediaError, match="more than 8 bits"):
        video_probe(tmp_path / "deep.png")


def test_animated_images_are_refused(tmp_path):
    frames = [Image.fromarray(noise(k, (16, 16))) for k in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(MediaError, match="animated WEBP"):
        video_probe(tmp_path / "a.webp")


def test_cut_off_image(tmp_path):
    Image.fromarray(noise(0, (64, 64))).save(tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(MediaError) as error:
        video_probe(tmp_path / "b.jpg")
    assert error.value.code == "truncated"


@pytest.mark.parametrize("axis", [3, 0, 1])
@pytest.mark.parametrize("packed", [True, False])
def test_arrays_in_any_order_of_axes(tmp_path, axis, packed):
    frames = np.stack([videos.numbered(k, (32, 64)) for k in range(9)])
    save = np.savez_compressed if packed else np.savez
    save(tmp_path / "a.npz", frames=np.moveaxis(frames, -1, axis), other=np.zeros(3))
    probe = video_probe(tmp_path / "a.npz")
    assert (probe.frames, probe.fps, probe.height, probe.width) == (9, None, 32, 64)
    assert (read_frames(tmp_path / "a.npz", 0.0, 9, 16, (32, 64)) == frames).all()
    assert videos.numbers(read_frames(tmp_path / "a.npz", 2 / 16, 5, 16, (16, 32))) == [2, 3, 4, 5, 6]


def test_arrays_with_a_rate_are_sampled_by_time(tmp_path):
    frames = np.stack([videos.numbered(k, (32, 64)) for k in range(24)])
    np.savez(tmp_path / "a.npz", frames=frames, fps=24)
    probe = video_probe(tmp_path / "a.npz")
    assert (probe.fps, probe.duration) == (24, 1.0)
    n = available_formats(probe, 16)
    wanted = [Fraction(k, 16) for k in range(n)]
    exact = expected([Fraction(k, 24) for k in range(24)], wanted)
    assert videos.numbers(read_frames(tmp_path / "a.npz", 0.0, n, 16, (32, 64))) == exact


@pytest.mark.parametrize(
    ("arrays", "cause"),
    [
        ({"video": np.zeros((2, 8, 8, 3), np.uint8)}, "no array `frames`; its arrays are: video"),
        ({"frames": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
        ({"frames": np.zeros((8, 8, 3), np.uint8)}, "it must be uint8 and"),
        ({"frames": np.zeros((2, 8, 8, 4), np.uint8)}, "it must be uint8 and"),
        ({"frames": np.zeros((0, 8, 8, 3), np.uint8)}, "it must be uint8 and"),
        ({"frames": np.array([{"a": 1}], dtype=object)}, "object"),
        ({"frames": np.zeros((2, 8, 8, 3), np.uint8), "fps": np.float32(0)}, "`fps` is 0"),
        ({"frames": np.zeros((2, 8, 8, 3), np.uint8), "fps": np.array(["a"])}, "not an npz clip"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, cause):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(MediaError, match=cause):
        video_probe(tmp_path / "a.npz")


def test_damaged_array(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, frames=np.stack([noise(k, (32, 32)) for k in range(4)]))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(MediaError, match="is damaged"):
        read_frames(path, 0.0, 4, 16, (32, 32))


# --- broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"hello\n" * 200, "cannot be read"),
        ("zeros.mkv", bytes(4000), "cannot be read"),
        ("a.png", b"nothing", "is not an image"),
        ("a.npz", b"PK\x03\x04....", "not an npz clip"),
        ("a.flv", b"FLV", "`.flv` files are not read"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=cause) as error:
        video_probe(tmp_path / name)
    assert error.value.code == "unreadable"
    assert name in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        video_probe(tmp_path / "gone.mp4")


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "s.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="has no video stream"):
        video_probe(tmp_path / "s.mp4")


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"), [c for c in CONTAINERS if c[0] not in ("mov", "m4v")]
)
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_cut_off_video(tmp_path, suffix, codec, pix_fmt, share):
    path = videos.write(tmp_path / f"a.{suffix}", 48, 24, codec=codec, pix_fmt=pix_fmt, draw=noise)
    video_probe(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(MediaError) as error:
        video_probe(path)
    assert error.value.code == "truncated"


def test_cut_off_video_with_its_index_first(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.stack([noise(k, (64, 64)) for k in range(48)]), 24)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * 0.7)])
    with pytest.raises(MediaError, match="of 48 frames can be decoded") as error:
        video_probe(path)
    assert error.value.code == "truncated"


def test_damage_in_the_middle_stops_reading(tmp_path):
    texture = np.asarray(Image.fromarray(noise(0, (60, 150))).resize((600, 240), Image.Resampling.BICUBIC))
    path = videos.write(
        tmp_path / "a.mp4", 48, 24, (240, 320), draw=lambda k, s: texture[: s[0], 3 * k : 3 * k + s[1]]
    )
    with av.open(str(path)) as container:
        at = [p.pos for p in container.demux(video=0) if p.is_keyframe][2] + 300
    raw = bytearray(path.read_bytes())
    raw[at : at + 200] = np.random.default_rng(1).integers(0, 256, 200, dtype=np.uint8).tobytes()
    path.write_bytes(raw)
    with pytest.raises(MediaError, match="is damaged"):
        read_frames(path, 0.0, 32, 16, (64, 64))
    with pytest.raises(MediaError, match="is damaged"):
        read_frames(path, 1.1, 3, 16, (64, 64))
    assert read_frames(path, 1.5, 8, 16, (64, 64)).shape == (8, 64, 64, 3), (
        "windows that it does not touch are fine"
    )


def test_hdr_is_seen(tmp_path):
    assert video_probe(videos.write(tmp_path / "h.mp4", 2, 24, trc=16)).hdr
    assert not video_probe(videos.write(tmp_path / "s.mp4", 2, 24, trc=1)).hdr


def test_odd_sizes_are_read(tmp_path):
    path = videos.write(tmp_path / "odd.mkv", 3, 24, (65, 127), codec="ffv1", pix_fmt="yuv444p")
    assert (video_probe(path).height, video_probe(path).width) == (65, 127)
    assert read_frames(path, 0.0, 3, 24, (32, 64)).shape == (3, 32, 64, 3)


# --- writing --------------------------------------------------------------------------------------


def test_written_video_comes_back(tmp_path):
    frames = np.stack([videos.numbered(k, (64, 128)) // 2 + np.uint8(60) for k in range(17)])
    frames[..., 0] //= 2
    path = tmp_path / "new" / "out.mp4"
    write_video(path, frames, 16)
    probe = video_probe(path)
    assert (probe.frames, probe.fps, probe.height, probe.width) == (17, 16, 64, 128)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert (context.name, context.pix_fmt, tags) == ("h264", "yuv420p", (1, 1, 1, 1))
    back = read_frames(path, 0.0, 17, 16, (64, 128))
    assert np.abs(back.astype(int) - frames).mean() < 2
    raw = path.read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat"), "players start before the whole file is there"
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]


def test_exact_rates_are_kept(tmp_path):
    frames = np.zeros((30, 16, 16, 3), np.uint8)
    write_video(tmp_path / "n.mp4", frames, Fraction(30000, 1001))
    assert video_probe(tmp_path / "n.mp4").fps == Fraction(30000, 1001)


@pytest.mark.parametrize(
    ("frames", "name", "cause"),
    [
        (np.zeros((2, 15, 16, 3), np.uint8), "a.mp4", "crop to 14x16"),
        (np.zeros((2, 16, 17, 3), np.uint8), "a.mp4", "crop to 16x16"),
        (np.zeros((2, 16, 16, 3), np.float32), "a.mp4", "float32"),
        (np.zeros((16, 16, 3), np.uint8), "a.mp4", "a video is uint8"),
        (np.zeros((0, 16, 16, 3), np.uint8), "a.mp4", "a video is uint8"),
        (np.zeros((2, 16, 16, 3), np.uint8), "a.webm", "written as .mp4"),
    ],
)
def test_impossible_videos(tmp_path, frames, name, cause):
    with pytest.raises(ValueError, match=cause):
        write_video(tmp_path / name, frames, 16)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((2, 16, 16, 3), np.uint8), 16)
    before = path.read_bytes()
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_video(path, np.zeros((2, 16, 16, 3), np.uint8), 16)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_contact_sheet_shows_first_and_last_frames(tmp_path):
    frames = np.stack([np.full((32, 48, 3), k * 10, np.uint8) for k in range(21)])
    rows = [SheetRow("a.mp4", "a caption", frames, "21 frames"), SheetRow("b", "", frames[:1])]
    contact_sheet(rows, tmp_path / "sheet.png", title="A run", columns=5)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert sheet.shape[1] == 1440
    strip = [x for x in sheet.reshape(-1, 3).tolist() if x[0] == x[1] == x[2]]
    shades = {x[0] for x in strip}
    assert {0, 50, 100, 150, 200} <= shades
    assert not {k * 10 for k in range(21)} - {0, 50, 100, 150, 200} & {10, 30, 70, 190} & shades
    assert (sheet[:20] == (250, 250, 248)).all(), "light margin"
    assert sheet[:70].min() < 60, "dark title"


def test_contact_sheet_cuts_long_captions(tmp_path):
    frames = np.zeros((1, 16, 16, 3), np.uint8)

    def height(caption: str) -> int:
        contact_sheet([SheetRow("a", caption, frames)], tmp_path / "s.png")
        return Image.open(tmp_path / "s.png").height

    one, two = height("short"), height("word " * 60)
    assert two > one
    assert height("word " * 2000) == two
    assert height("x" * 5000) == two, "a word without spaces is broken"
    assert height("Кошка 一只猫 " * 400) == two


def test_wrap_keeps_the_words():
    font = _font(15, "")
    lines = _wrap("the quick brown fox jumps over the lazy dog", font, 120, 9)
    assert " ".join(lines) == "the quick brown fox jumps over the lazy dog"
    assert all(font.getlength(line) <= 120 for line in lines)
    cut = _wrap("the quick brown fox jumps over the lazy dog", font, 120, 2)
    assert len(cut) == 2
    assert cut[1].endswith("…")
    assert font.getlength(cut[1]) <= 120


# --- the real files -------------------------------------------------------------------------------


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
