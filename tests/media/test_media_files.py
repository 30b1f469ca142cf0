"""Images, arrays, transparent and broken files are read; videos are written."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from inlaid.media.contact_sheet import SheetRow, _font, _wrap, contact_sheet
from inlaid.media.kinds import IMAGES, MediaError, available_frames
from inlaid.media.rgba_images import read_animated
from inlaid.media.scene import read_image
from inlaid.media.video import probe as video_probe
from inlaid.media.video import read_frames, write_video
from support import videos
from support.frames import CONTAINERS, corner, expected
from support.slow import slow


def noise(k: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)


# --- alpha --------------------------------------------------------------------------------------------------


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
    assert (probe.frames, probe.fps, available_frames(probe, 16)) == (1, 24, 1)
    assert read_frames(path, 0.0, 1, 16, (32, 64)).shape == (1, 32, 64, 3)


# --- images and arrays --------------------------------------------------------------------------------------


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


def test_scene_images_and_16_bit_mattes_are_turned_by_their_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(corner(0, (32, 64))).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").shape == (64, 32, 3)
    Image.fromarray(np.full((32, 64), 40000, np.uint16)).save(tmp_path / "matte.png", exif=exif)
    (matte,) = read_animated(tmp_path / "matte.png", [0], gray=True)
    assert matte.shape == (64, 32, 1)


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
    n = available_frames(probe, 16)
    wanted = [Fraction(k, 16) for k in range(n)]
    exact = expected([Fraction(k, 24) for k in range(24)], wanted)
    assert videos.numbers(read_frames(tmp_path / "a.npz", 0.0, n, 16, (32, 64))) == exact


@pytest.mark.parametrize(
    ("arrays", "cause"),
    [
        ({"video": np.zeros((2, 8, 8, 3), np.uint8)}, "no array `frames`; its arrays are: video"),
        ({"frames": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
        ({"frames": np.zeros((8, 8, 3), np.uint8)}, "it must be uint8 and"),
        ({"frames": np.zeros((2, 8, 8, 5), np.uint8)}, "it must be uint8 and"),
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


# --- broken files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"hello\n" * 200, "cannot be read"),
        ("zeros.mkv", bytes(4000), "cannot be read"),
        ("a.png", b"nothing", "is not an image"),
        ("a.npz", b"PK\x03\x04....", "not an npz clip"),
        ("a.swf", b"FWS", "`.swf` files are not read"),
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
    ("suffix", "codec", "pix_fmt"),
    [slow(*c) if c[0] == "webm" else c for c in CONTAINERS if c[0] not in ("mov", "m4v")],
)
@pytest.mark.parametrize("share", [slow(0.4), 0.8])
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
    with pytest.raises(MediaError, match=r"\d+ bytes are missing at its end") as error:
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


# --- writing ------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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
