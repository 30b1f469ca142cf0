"""Transparent video: what is written is what is read, and edges stay clean."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from inlaid import config
from inlaid.cli.composite import composite_file
from inlaid.media import compositing, rgba
from inlaid.media.kinds import MediaError
from inlaid.media.pixels import multiplied
from inlaid.media.rgba import _CODECS, CARRIERS
from inlaid.media.video import probe, read_frames, write_video
from support import commands
from support.slow import mostly_slow, slow

T, H, W = 9, 72, 96


def clip(kind: str) -> np.ndarray:
    """Procedural straight RGBA: uint8 (T, H, W, 4)."""
    y, x = np.mgrid[:H, :W].astype(np.float32)
    out = []
    for i in range(T):
        distance = np.hypot(x - 30 - 3 * i, y - H / 2)
        alpha = {
            "disc": (20 - distance).clip(0, 1),
            "soft": (1 - distance / 30).clip(0, 1),
            "glass": np.where(distance < 24, 0.4, 0) * np.ones_like(x),
            "ring": (1 - np.abs(distance - 18) / 4).clip(0, 1),
            "smoke": (0.5 + 0.5 * np.sin(x / 7 + i) * np.cos(y / 9)).clip(0, 1),
            "hair": np.where((x.astype(int) + i) % 6 == 0, (1 - y / H), 0),
        }[kind]
        color = np.stack([x / W, y / H, 0.5 + 0.4 * np.sin(x / 10)], -1)
        out.append(compositing.to_uint8(np.concatenate([color, alpha[..., None]], -1)))
    return np.stack(out)


KINDS = ("disc", "soft", "glass", "ring", "smoke", "hair")


def alpha_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a[..., 3].astype(int) - b[..., 3]).mean())


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ("soft", "hair").__contains__))
@pytest.mark.parametrize("suffix", list(CARRIERS))
def test_alpha_survives_every_container(kind: str, suffix: str, tmp_path: Path) -> None:
    pixels = clip(kind)
    path = rgba.write_rgba(tmp_path / f"a{suffix}", pixels, 16)
    there = rgba.read_rgba(path)
    assert there.shape == pixels.shape
    if CARRIERS[suffix] == 0:
        assert np.array_equal(there, pixels)
    else:
        assert alpha_error(there, pixels) <= CARRIERS[suffix]
        seen = pixels[..., 3] > 64
        assert np.abs(there[..., :3].astype(int) - pixels[..., :3])[seen].mean() < 6
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left"


def behind(kind: str, color: tuple[int, int, int]) -> np.ndarray:
    """A clip of one color, with another color behind the matte."""
    pixels = clip(kind)
    pixels[..., :3] = np.where(pixels[..., 3:] > 0, np.uint8(color), np.uint8([5, 250, 20]))
    return pixels


def soft_error(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Mean and maximum error of color where alpha is neither 0 nor 255."""
    off = np.abs(a[..., :3].astype(int) - b[..., :3])[(b[..., 3] > 0) & (b[..., 3] < 255)]
    return float(off.mean()), int(off.max())


@pytest.mark.parametrize("suffix", [".webm", ".mov"])
@pytest.mark.parametrize("kind", ["soft", slow("ring")])
def test_color_behind_the_matte_stays_out_of_soft_edges(
    suffix: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = behind(kind, (230, 40, 190))
    mean, most = soft_error(rgba.read_rgba(rgba.write_rgba(tmp_path / f"a{suffix}", pixels, 16)), pixels)
    assert mean <= 2.5 and most <= 4
    hidden = rgba.read_rgba(tmp_path / f"a{suffix}")[pixels[..., 3] == 0][:, :3].astype(int)
    assert np.abs(hidden - (230, 40, 190)).max() <= 4, (
        "programs that scale straight color see no green either"
    )
    monkeypatch.setattr(rgba, "grow", lambda x: x)
    _, most = soft_error(rgba.read_rgba(rgba.write_rgba(tmp_path / f"b{suffix}", pixels, 16)), pixels)
    assert suffix == ".mov" or most > 100, "without growing it would be green"


def test_video_is_read_with_accurate_rounding_of_color(tmp_path: Path) -> None:
    pixels = behind("soft", (200, 60, 110))
    path = rgba.write_rgba(tmp_path / "a.webm", pixels, 16)
    with av.open(str(path)) as container:
        plain = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    seen = pixels[..., 3] == 255
    exact = np.abs(rgba.read_rgba(path)[seen][:, :3].astype(int) - (200, 60, 110)).mean()
    assert exact < 0.8 < np.abs(plain[seen].astype(int) - (200, 60, 110)).mean()


# --- pairs --------------------------------------------------------------------------------------------------

BACKGROUNDS = ((0, 0, 0), (255, 255, 255), (0, 200, 60))


@pytest.mark.parametrize("kind", ["soft", "glass", slow("ring"), slow("smoke")])
def test_a_pair_composites_as_the_straight_clip(kind: str, tmp_path: Path) -> None:
    pixels = clip(kind)
    for premultiplied in (True, False):
        color, matte = rgba.write_pair(tmp_path / "a.b", pixels, 16, premultiplied=premultiplied)
        assert (color.name, matte.name) == ("a.b_rgb.mp4", "a.b_alpha.mp4")
        there = rgba.read_pair(color, matte)
        assert np.abs(there[..., 3].astype(int) - pixels[..., 3]).mean() < 0.6
        for background in map(np.uint8, BACKGROUNDS):
            wanted = compositing.composite(pixels, background).astype(int)
            off = np.abs(compositing.composite(there, background, premultiplied=premultiplied) - wanted)
            assert off.mean() <= 1.5 and off[pixels[..., 3] > 0].mean() <= 1.5
        if kind != "glass":
            assert multiplied(there) == ("premultiplied" if premultiplied else "straight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b_alpha.mp4", "a.b_rgb.mp4"]


def test_a_pair_that_does_not_match_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    color, _ = rgba.write_pair(tmp_path / "a", clip("disc"), 16, premultiplied=True)
    _, matte = rgba.write_pair(tmp_path / "b", clip("disc")[:-1], 16, premultiplied=True)
    with pytest.raises(MediaError, match=r"9 frames of 72x96, and 8 frames of 72x96 in b_alpha\.mp4"):
        rgba.read_pair(color, matte)
    with pytest.raises(ValueError, match=r"c_rgb.mp4: transparent video is uint8"):
        rgba.write_pair(tmp_path / "c", clip("disc")[..., :3], 16, premultiplied=True)
    with pytest.raises(ValueError, match="even height"):
        rgba.write_pair(tmp_path / "c", clip("disc")[:, :71], 16, premultiplied=True)
    monkeypatch.setattr(rgba, "premultiply", lambda x: x)
    with pytest.raises(ValueError, match=r"c_rgb.mp4: the composite of the pair read back has a mean error"):
        rgba.write_pair(tmp_path / "c", behind("soft", (230, 40, 190)), 16, premultiplied=True)
    assert len(list(tmp_path.iterdir())) == 4, "nothing half-written is left"


# --- straight or premultiplied ------------------------------------------------------------------------------


def smoke(lowest: float, highest: float, shade: float, texture: float = 0.0) -> np.ndarray:
    """Smoke that is soft everywhere: alpha from `lowest` to `highest`, straight float (3, H, W, 4)."""
    y, x, t = np.meshgrid(np.arange(H), np.arange(W), np.arange(3), indexing="ij")
    waves = sum(np.sin(x * f / 19 + t / 3 + f) * np.cos(y * f / 23 - t / 4) / f for f in (1, 2, 4, 8))
    waves = (waves - waves.min()) / np.ptp(waves)
    alpha = lowest + (highest - lowest) * waves
    color = shade * (1 - texture * (0.5 + 0.5 * np.sin(x / 7) * np.cos(y / 5)))
    return np.stack([color, 0.7 * color, 0.4 * color, alpha], -1).transpose(2, 0, 1, 3).astype(np.float32)


def stored(straight: np.ndarray, how: str, folder: Path, *, premultiplied: bool) -> np.ndarray:
    """What is read back of smoke from a file that another program wrote."""
    made = compositing.to_uint8(compositing.premultiply(straight) if premultiplied else straight)
    if how in CARRIERS:
        rgba._write_video(folder / f"a{how}", made, 16, how)  # type: ignore[arg-type]
        return rgba.read_rgba(folder / f"a{how}")
    if how == "mp4":
        write_video(folder / "rgb.mp4", made[..., :3], 16, crf=23)
        write_video(folder / "alpha.mp4", made[..., 3:].repeat(3, -1), 16, crf=23)
        return rgba.read_pair(folder / "rgb.mp4", folder / "alpha.mp4")
    return made


@pytest.mark.parametrize("how", ["exact", slow(".mov"), slow(".webm"), "mp4"])
def test_smoke_without_opaque_pixels_is_straight_or_premultiplied(how: str, tmp_path: Path) -> None:
    for lowest, highest in ((0.0, 0.45), (0.03, 0.45), (0.1, 0.45)):
        for shade, texture in ((0.95, 0), (0.5, 0), (0.95, 0.7), (0.15, 0), (0.3, 0.8)):
            for premultiplied in (False, True):
                pixels = stored(
                    smoke(lowest, highest, shade, texture), how, tmp_path, premultiplied=premultiplied
                )
                found, wanted = multiplied(pixels), "premultiplied" if premultiplied else "straight"
                assert found in (wanted, "unclear"), (lowest, shade, texture, wanted)
                if lowest < 0.1 and shade >= 0.5:
                    assert found == wanted, (lowest, shade, texture)


def test_alpha_that_decides_nothing_is_unclear(tmp_path: Path) -> None:
    glass = smoke(0.4, 0.4, 0.3)
    for premultiplied in (False, True):
        pixels = stored(glass, "exact", tmp_path, premultiplied=premultiplied)
        stats = rgba.measure_alpha(pixels)
        assert stats.multiplied == "unclear" and stats.looks == "straight or premultiplied"
    assert multiplied(stored(smoke(0.4, 0.4, 0.9), "exact", tmp_path, premultiplied=False)) == "straight"
    black = stored(smoke(0.1, 0.4, 0.0), "exact", tmp_path, premultiplied=False)
    assert multiplied(black) == "straight", "black is the same in both"


def test_the_plain_vp9_decoder_would_have_lost_it(tmp_path: Path) -> None:
    path = rgba.write_rgba(tmp_path / "a.webm", clip("soft"), 16)
    with av.open(str(path)) as container:
        plain = np.stack([f.to_ndarray(format="rgba") for f in container.decode(video=0)])
    assert plain[..., 3].min() == 255, "this is why libvpx is asked"
    assert rgba.measure_alpha(rgba.read_rgba(path)).lowest == 0


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".jpg", ""])
def test_what_cannot_carry_alpha_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot carry alpha"):
        rgba.write_rgba(tmp_path / f"a{suffix}", clip("disc"), 16)
    assert not list(tmp_path.iterdir())


def test_a_codec_that_drops_alpha_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = _CODECS[".mov"]
    monkeypatch.setitem(_CODECS, ".mov", (codec[0], "yuv444p10le", *codec[2:]))
    with pytest.raises(ValueError, match="alpha read back"):
        rgba.write_rgba(tmp_path / "a.mov", clip("disc"), 16)
    assert not list(tmp_path.iterdir())


def test_identical_frames_are_kept(tmp_path: Path) -> None:
    still = clip("disc")[:1].repeat(5, 0)
    for suffix in CARRIERS:
        assert len(rgba.read_rgba(rgba.write_rgba(tmp_path / f"a{suffix}", still, 16))) == 5


def test_folders_and_animated_webp_are_read(tmp_path: Path) -> None:
    pixels = clip("ring")
    (tmp_path / "png").mkdir()
    for i, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / "png" / f"f{i + 5}.png")  # f10 comes after f9
    assert np.array_equal(rgba.read_rgba(tmp_path / "png"), pixels)
    images = [Image.fromarray(f) for f in pixels]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], lossless=True, duration=62)
    there = rgba.read_rgba(tmp_path / "a.webp")
    assert np.array_equal(there[..., 3], pixels[..., 3])
    seen = pixels[..., 3] > 0
    assert np.array_equal(there[seen], pixels[seen])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no")
    (tmp_path / "b.webp").write_bytes(b"no")
    (tmp_path / "c.mov").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for i in (1, 2):
        Image.new("RGBA", (8 * i, 8)).save(tmp_path / "sizes" / f"{i}.png")
    for name, says in {"a.zip": "read", "b.webp": "read", "c.mov": "read", "empty": "no frames"}.items():
        with pytest.raises(MediaError, match=says) as error:
            rgba.read_rgba(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(MediaError, match="differ in size"):
        rgba.read_rgba(tmp_path / "sizes")


def test_resizing_lets_no_hidden_color_into_edges() -> None:
    size = 256
    y, x = np.mgrid[:size, :size]
    alpha = (np.hypot(x - 128, y - 128) < 80).astype(np.float32)[..., None]
    red, green = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    straight = compositing.to_uint8(np.concatenate([np.where(alpha > 0, red, green), alpha], -1))[None]
    small = compositing.resize(straight, (32, 32))
    edge = (small[..., 3] > 8) & (small[..., 3] < 247)
    assert edge.sum() > 20
    assert np.abs(small[edge][:, :3].astype(int) - [255, 0, 0]).max() <= 1
    naive = np.asarray(Image.fromarray(straight[0]).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    assert naive[edge[0]][:, 1].max() > 60, "scaling color for itself fails this test"
    assert (small[0, :2, :2, 3] == 0).all() and small[0, 16, 16, 3] == 255
    assert compositing.resize(straight, (size, size)) is straight


def test_premultiplying_and_back() -> None:
    values = compositing.to_float(clip("soft"))
    back = compositing.unpremultiply(compositing.premultiply(values))
    seen = values[..., 3] > 0.01
    assert np.abs(back - values)[seen].max() < 1e-5
    under = np.full((*values.shape[:3], 3), 0.25, np.float32)
    clear = values[..., 3] == 0
    assert (compositing.unpremultiply(compositing.premultiply(values), under)[clear][:, :3] == 0.25).all()


def test_decontamination_takes_the_green_screen_out_of_edges() -> None:
    truth = clip("disc").copy()
    truth[..., :3] = (200, 40, 40)
    soft = truth[..., 3:].astype(np.float32) / 255
    shot = compositing.to_uint8(
        compositing.to_float(truth[..., :3]) * soft + np.array([0, 1.0, 0]) * (1 - soft)
    )
    dirty = np.concatenate([shot, truth[..., 3:]], -1)
    clean = compositing.decontaminate(dirty)
    edge = (truth[..., 3] > 20) & (truth[..., 3] < 235)
    error = [np.abs(x[edge][:, :3].astype(int) - (200, 40, 40)).mean() for x in (dirty, clean)]
    assert error[0] > 30 and error[1] < 1
    assert np.array_equal(clean[..., 3], dirty[..., 3])
    opaque = truth[..., 3] == 255
    assert np.array_equal(clean[opaque], dirty[opaque])
    nothing = np.zeros((1, 8, 8, 4), np.uint8)
    assert np.array_equal(compositing.decontaminate(nothing), nothing)


def test_grown_color_is_that_of_the_nearest_visible_pixels() -> None:
    pixels = np.zeros((1, 32, 32, 4), np.uint8)
    pixels[:, :, :8] = (250, 10, 10, 255)
    pixels[:, :, 24:] = (10, 10, 250, 255)
    grown = compositing.grow(pixels)[0, 16].astype(int)
    assert grown[9, 0] > 200 and grown[22, 2] > 200 and grown[9, 2] < 60
    assert (grown[8:24, 3] == 0).all() and abs(grown[16, 0] - grown[15, 2]) < 60
    blurred = compositing.blur_background(pixels, 3)
    assert np.array_equal(blurred[..., 3], pixels[..., 3])
    assert np.abs(blurred[0, :, :8].astype(int) - pixels[0, :, :8]).max() <= 1


def test_a_blurred_background_is_seen_in_no_composite() -> None:
    pixels = clip("smoke")
    blurred = compositing.blur_background(pixels)
    seen = pixels[..., 3] > 2
    assert np.array_equal(blurred[seen], pixels[seen]) and not np.array_equal(blurred, pixels)
    for color in ((0, 0, 0), (255, 255, 255)):
        over = [compositing.composite(x, np.array(color, np.uint8)).astype(int) for x in (blurred, pixels)]
        assert np.abs(over[0] - over[1]).max() <= 2


def test_premultiplied_color_is_divided_after_scaling() -> None:
    straight = np.zeros((1, 64, 64, 4), np.uint8)
    straight[..., :3] = (240, 120, 30)
    y, x = np.mgrid[:64, :64]
    straight[0, ..., 3] = (255 * (1 - np.hypot(x - 32, y - 32) / 30)).clip(0, 255)
    times = compositing.to_uint8(compositing.premultiply(compositing.to_float(straight)))
    for size in ((64, 64), (16, 16)):
        there = compositing.resize(times, size, premultiplied=True)
        seen = there[..., 3] > 64
        assert np.abs(there[seen][:, :3].astype(int) - (240, 120, 30)).max() <= 4
        assert np.abs(there[..., 3].astype(int) - compositing.resize(straight, size)[..., 3]).max() <= 1


def test_wide_pixels_become_square() -> None:
    pixels = np.zeros((1, 32, 32, 4), np.uint8)
    pixels[:, :, 8:24] = 255
    wide = compositing.resize(pixels, (32, 64), sar=2.0)[0, 16, :, 3] > 127
    assert wide.sum() == 32 and wide[16:48].all()


def test_repair_does_what_the_recipe_says() -> None:
    pixels = clip("disc")
    pixels[0, 0, 0, 3] = 2
    kept = config.Matte(background="keep")
    assert np.array_equal(rgba.fix_alpha(pixels, kept), pixels)
    snapped = rgba.fix_alpha(pixels, config.Matte(background="keep", snap=2))
    assert snapped[0, 0, 0, 3] == 0 and np.array_equal(snapped[..., 3], compositing.snap(pixels[..., 3]))
    assert np.array_equal(rgba.fix_alpha(pixels, config.Matte()), compositing.grow(pixels))
    clean = config.Matte(background="blur", decontaminate=True)
    assert np.array_equal(
        rgba.fix_alpha(pixels, clean), compositing.blur_background(compositing.decontaminate(pixels))
    )


def test_snap() -> None:
    assert compositing.snap(np.array([0, 1, 2, 3, 252, 253, 254, 255], np.uint8)).tolist() == [
        0, 0, 0, 3, 252, 255, 255, 255,
    ]  # fmt: skip


def test_compositing() -> None:
    pixels = clip("soft")
    white = np.array([255, 255, 255], np.uint8)
    over = compositing.composite(pixels, white)
    assert np.array_equal(over[pixels[..., 3] == 0], np.full_like(over[pixels[..., 3] == 0], 255))
    times = compositing.to_uint8(compositing.premultiply(compositing.to_float(pixels)))
    assert np.abs(compositing.composite(times, white, premultiplied=True).astype(int) - over).max() <= 1
    board = compositing.checkerboard(H, W)
    assert np.array_equal(compositing.composite(pixels, board)[0, 0, -1], board[0, -1])
    video = np.stack([board] * T)
    assert np.array_equal(compositing.composite(pixels, video), compositing.composite(pixels, board))
    half = np.zeros((1, 1, 1, 4), np.uint8)
    half[..., :3], half[..., 3] = 255, 128
    black = np.zeros(3, np.uint8)
    assert compositing.composite(half, black)[0, 0, 0, 0] == 128
    assert compositing.composite(half, black, linear=True)[0, 0, 0, 0] == 188, "half the light is code 188"
    opaque = clip("disc").copy()
    opaque[..., 3] = 255
    assert np.abs(compositing.composite(opaque, black, linear=True).astype(int) - opaque[..., :3]).max() <= 1


def test_measuring() -> None:
    plain = rgba.measure_alpha(clip("soft"))
    assert 0.05 < plain.coverage < 0.5 and plain.soft > 0.1 and plain.colored > 0.9
    assert not (plain.premultiplied or plain.inverted or plain.limited or plain.constant)
    times = compositing.to_uint8(compositing.premultiply(compositing.to_float(clip("soft"))))
    assert rgba.measure_alpha(times).premultiplied
    turned = clip("disc").copy()
    turned[..., 3] = 255 - turned[..., 3]
    assert rgba.measure_alpha(turned).inverted and not rgba.measure_alpha(clip("disc")).inverted
    squeezed = clip("disc").copy()
    squeezed[..., 3] = 16 + squeezed[..., 3] * (219 / 255)
    assert rgba.measure_alpha(squeezed).limited
    noisy = clip("disc").copy()
    noisy[..., 3] = np.maximum(noisy[..., 3], 1)
    assert rgba.measure_alpha(noisy).residue > 0.5
    assert rgba.measure_alpha(np.zeros((1, 4, 4, 4), np.uint8)).constant


def test_not_rgba_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        rgba.write_rgba(tmp_path / "a.mov", np.zeros((3, 8, 8, 3), np.uint8), 16)


def test_a_composite_plays_as_fast_as_its_foreground(tmp_path: Path) -> None:
    images = [Image.fromarray(f) for f in clip("disc")]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], lossless=True, duration=100)
    rgba.write_rgba(tmp_path / "a.apng", clip("disc"), 8)
    images[0].save(tmp_path / "a.png")
    for name, rate in {"a.webp": 10, "a.apng": 8, "a.png": 16}.items():
        out = composite_file(tmp_path / name, "red", tmp_path / "out.mp4")
        assert probe(out).fps == rate


def test_composite_command(tmp_path: Path) -> None:
    front = rgba.write_rgba(tmp_path / "a.mov", clip("disc"), 12)
    back = tmp_path / "back.mp4"
    write_video(back, np.full((24, 48, 64, 3), 40, np.uint8), 24)
    still = tmp_path / "back.png"
    Image.new("RGB", (50, 40), (0, 0, 200)).save(still)
    for background, corner in {
        "#c80000": (200, 0, 0),
        str(still): (0, 0, 200),
        str(back): (40, 40, 40),
    }.items():
        out = tmp_path / "out.mp4"
        done = commands.inlaid("composite", front, background, "--out", out)
        assert done.code == 0 and done.out.strip() == str(out), done.output
        video = read_frames(out, 0, T, 12, (H, W))
        assert np.abs(video[:, :4, -4:].astype(int) - corner).max() < 12
    opaque = clip("disc").copy()
    opaque[..., 3] = 255
    rgba.write_rgba(tmp_path / "opaque.zip", opaque, 12)
    for args, says in {
        (front, "no-such-thing"): "neither a file nor a color",
        (tmp_path / "opaque.zip", "red"): "fully opaque",
        (tmp_path / "none.mov", "red"): "none.mov",
        (front, "red", "--out", tmp_path / "out.gif"): "written as .mp4",
    }.items():
        done = commands.inlaid("composite", *args)
        assert done.code == 2 and says in done.output and "Traceback" not in done.output, done.output


def test_composite_finds_the_matte_of_a_pair(tmp_path: Path) -> None:
    pixels, out = clip("soft"), tmp_path / "out.mp4"
    color, matte = rgba.write_pair(tmp_path / "a", pixels, 12, premultiplied=True)
    wanted = compositing.composite(pixels, np.uint8([200, 0, 0])).astype(int)
    off = {}
    for flags in ((), ("--premultiplied",)):
        done = commands.inlaid("composite", color, "#c80000", "--out", out, *flags)
        assert done.code == 0, done.output
        assert ("color looks premultiplied" in done.output) == (not flags)
        off[flags] = np.abs(read_frames(out, 0, T, 12, (H, W)).astype(int) - wanted).mean()
    assert off["--premultiplied",] < 3 < off[()]
    matte.unlink()
    done = commands.inlaid("composite", color, "red", "--out", out)
    assert done.code == 2 and "fully opaque" in done.output
