"""Hostile data sets: paths that lead out, headers that lie, bombs, codes for the terminal (edges.md, 5)."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inlaid import config
from inlaid.data import scenes
from inlaid.data.layouts import find_clips
from inlaid.data.plan import describe_plan
from inlaid.families.base import PrecomputedLayout
from inlaid.files import load_torch
from inlaid.media import mesh_files, meshes
from inlaid.media.arrays import load_array, load_arrays, probe_array
from inlaid.media.images import probe_image
from inlaid.media.kinds import MediaError
from inlaid.media.scene import read_image
from inlaid.paths import Root
from inlaid.reading import FileError, parse_json, read_text, reading
from support import videos
from support.sources import SIZE, codes, message, plan

# --- paths that lead out ------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody else, with a file for every purpose."""
    folder = tmp_path / "private"
    folder.mkdir()
    videos.write(folder / "v.mp4", 12, 16, SIZE)
    (folder / "t.txt").write_text("private words")
    (folder / "v.txt").write_text("private words")
    (folder / "prompts.txt").write_text("private words\nmore\n")
    (folder / "videos.txt").write_text("a.mp4\nc.mp4\n")
    (folder / "m.csv").write_text("video,caption\na.mp4,private words\n")
    (folder / "m.json").write_text('{"a.mp4": "private words"}')
    Image.fromarray(videos.numbered(1, SIZE)).save(folder / "p.png")
    np.save(folder / "s.npy", np.zeros((20, 6), np.float32))
    return folder


Way = Callable[[Path, Path], Any]


def linked(name: str, to: str) -> Way:
    """Make a file of the data set a link; the source is the folder."""

    def make(clips: Path, outside: Path) -> None:
        (clips / name).unlink(missing_ok=True)
        (clips / name).symlink_to(outside / to)

    return make


def listed(path: str) -> Way:
    """Name a path in a manifest."""

    def make(clips: Path, outside: Path) -> str:
        (clips / "m.jsonl").write_text(json.dumps({"video": path.format(outside=outside), "caption": "x"}))
        return "m.jsonl"

    return make


def lines(link: str, videos: str = "a.mp4\nc.mp4\n") -> Way:
    """Lists of prompts and clips, one of which may be a link; the source is the folder as `lines`."""

    def make(clips: Path, outside: Path) -> str:
        (clips / "prompts.txt").write_text("one\ntwo\n")
        (clips / "videos.txt").write_text(videos)
        if link:
            linked(link, link)(clips, outside)
        return "lines"

    return make


def after(first: Way, then: Way) -> Way:
    return lambda clips, outside: (first(clips, outside), then(clips, outside))[1]


def capital(clips: Path, outside: Path) -> None:
    (clips / "a.txt").unlink()
    linked("a.TXT", "t.txt")(clips, outside)


def chain(clips: Path, outside: Path) -> None:
    linked("x1", "v.mp4")(clips, outside)
    (clips / "a.mp4").unlink()
    (clips / "a.mp4").symlink_to("x1")


def sequence(clips: Path, outside: Path) -> None:
    (clips / "s").mkdir()
    (clips / "s.txt").write_text("x")
    for k in range(9):
        Image.fromarray(videos.numbered(k, SIZE)).save(clips / "s" / f"{k}.png")
    linked("s/3.png", "p.png")(clips, outside)


WAYS: dict[str, Way] = {
    "a linked clip": linked("a.mp4", "v.mp4"),
    "a linked caption": linked("a.txt", "t.txt"),
    "a linked caption in capitals": capital,
    "a linked folder": linked("deep", ""),
    "a link to a link": chain,
    "absolute in a manifest": listed("{outside}/v.mp4"),
    "upward in a manifest": listed("../private/v.mp4"),
    "only upward in a manifest": listed(".."),
    "upward after a detour": listed("x/../../private/v.mp4"),
    "upward by backslashes": listed("..\\private\\v.mp4"),
    "through a linked folder": after(linked("deep", ""), listed("deep/v.mp4")),
    "in the list of clips": lines("", "../private/v.mp4\nc.mp4\n"),
    "a linked list of prompts": lines("prompts.txt"),
    "a linked list of clips": lines("videos.txt"),
    "a linked table": after(linked("m.csv", "m.csv"), lambda *_: "csv"),
    "a linked mapping": after(linked("m.json", "m.json"), lambda *_: "jsonl"),
    "a frame of a sequence": sequence,
    "a linked sequence": linked("s", ""),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_outside_is_read(clips, outside, way):
    what = WAYS[way](clips, outside) or "folder"
    source = {"path": str(clips / what)} if "." in what else {"path": str(clips), "layout": what}
    made = plan(source, frames=[1, 9])
    text = "\n".join(describe_plan(made.problems, 9))
    assert "outside" in codes(made) or ("layout" in codes(made) and "is a link to" in text), codes(made)
    assert "private words" not in str(made)
    assert not any("private" in os.path.realpath(w.clip.path) for w in made.train)
    assert "copy the file" in text


def test_the_guard(tmp_path):
    root = Root(tmp_path / "root")
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "f").write_text("x")
    (tmp_path / "rooted").mkdir()
    (tmp_path / "root" / "loop").symlink_to("loop")
    (tmp_path / "root" / "in").symlink_to("deep/../f")
    for good in ("f", "deep", "in", "not there", "deep/../f", str(tmp_path / "root" / "f")):
        root.named(good)
    for bad in ("..", "../rooted", str(tmp_path / "rooted"), "/", "deep/../../rooted", "C:\\x", "\0"):
        with pytest.raises(FileError, match=r"copy the file|relative path|null character"):
            root.named(bad)


def test_playlists_named_like_clips(clips, outside):
    texts = {
        "a.mp4": f"#EXTM3U\n#EXTINF:1\n{outside}/v.mp4\n",
        "c.mp4": f"ffconcat version 1.0\nfile '{outside}/v.mp4'\n",
    }
    for name, text in texts.items():
        (clips / name).write_text(text)
    made = plan(str(clips))
    assert codes(made) == {"unreadable": ["a.mp4", "c.mp4"]}
    assert "is a playlist" in message(made)


def test_mattes_and_precomputed_latents_outside(clips, outside, tmp_path):
    (clips / "a_alpha.mp4").symlink_to(outside / "v.mp4")
    found = find_clips(config.Source(path=str(clips)), 0, None, 4)
    assert [(p.code, p.name) for p in found.problems] == [("outside", "a_alpha.mp4")]
    folder = tmp_path / "latents"
    for name in ("v", "t"):
        (folder / name).mkdir(parents=True)
    torch.save(torch.zeros(1), outside / "x.pt")
    shutil.copy(outside / "x.pt", folder / "v" / "1.pt")
    (folder / "t" / "1.pt").symlink_to(outside / "x.pt")
    found = find_clips(config.Source(path=str(folder)), 0, PrecomputedLayout(("v/*.pt",), "t/*.pt"), 3)
    assert [(p.code, p.name) for p in found.problems] == [("outside", "v/1.pt")]
    shutil.rmtree(folder / "t")
    (folder / "t").symlink_to(outside)
    found = find_clips(config.Source(path=str(folder)), 0, PrecomputedLayout(("v/*.pt",), "t/*.pt"), 3)
    assert {p.code for p in found.problems} <= {"outside", "half"} and not found.clips


@pytest.mark.parametrize("name", ["surface_1.npy", "scene_rgb.png", "seg.png", "folder"])
def test_scenes_outside(make_scenes, outside, name):
    folder = make_scenes((1, 1))
    if name == "folder":
        (folder / "other").symlink_to(outside)
    else:
        place = folder / "scene_0001" / name
        place.unlink()
        place.symlink_to(outside / ("s.npy" if name.endswith("npy") else "p.png"))
    found = scenes.find_scenes(folder)
    assert [f.code for f in found.findings] == ["outside"] and "copy the file" in found.findings[0].message
    assert len(found.scenes) == (2 if name == "folder" else 1)


FRONT = {
    "number": (7, "7 is not the name"),
    "absolute": ("{outside}", "is not the name"),
    "upward": ("../../private", "is not the name"),
    "null": ("a\0b", "is not the name"),
    "empty": ("", "is not the name"),
    "list": ([], "is not the name"),
    "none": (None, "is not the name"),
}


@pytest.mark.parametrize("name", FRONT)
@pytest.mark.parametrize("place", ["room", "furniture"])
def test_ids_of_three_d_front(tmp_path, outside, name, place):
    value, says = FRONT[name]
    value = value.format(outside=outside) if isinstance(value, str) else value
    root = tmp_path / "front"
    root.mkdir()
    rooms, furniture = (["r"], [["a"]]) if place == "furniture" else ([value], [["a"]])
    furniture = [[value]] if place == "furniture" else furniture
    (root / "midi_room_ids.json").write_text(json.dumps(rooms))
    (root / "midi_furniture_ids.json").write_text(json.dumps(furniture))
    found = scenes.find_scenes(root)
    assert not found.scenes and [f.code for f in found.findings] == ["names"]
    assert says in found.findings[0].message
    for wrong in ("{}", "[1", "[" * 3000, '"x"'):
        (root / "midi_room_ids.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"midi_room_ids\.json"):
            scenes.find_scenes(root)


def test_meshes_read_only_beside_themselves(tmp_path, outside):
    pytest.importorskip("trimesh")
    (tmp_path / "m").mkdir()
    gltf = {
        "asset": {"version": "2.0"},
        "buffers": [{"uri": "../private/t.txt", "byteLength": 13}],
        "bufferViews": [{"buffer": 0, "byteLength": 12}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 1, "type": "VEC3"}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
    }
    (tmp_path / "m" / "x.gltf").write_text(json.dumps(gltf))
    with pytest.raises(FileError, match="is outside"):
        mesh_files.read_objects(tmp_path / "m" / "x.gltf")


# --- sizes that are claimed ---------------------------------------------------------------------------------


def header(shape: tuple[int, ...], kind: str = "|u1", *, fortran: bool = False) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": fortran, "shape": shape})
    return out.getvalue()


def zipped(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refused(call: Callable[[], Any], path: Path, match: str = "") -> str:
    """The message of a refusal, which takes little time and memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(FileError, match=match) as error:
        call()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert time.process_time() - start < 5 and used < 400_000, f"{used} kB"
    assert str(path) in str(error.value)
    return str(error.value)


HUGE = [(10**6, 10**4, 10**4, 3), (3, 10**9, 10, 10), (2**62, 4, 4, 3), (5, 10**6, 10**6, 3)]


@pytest.mark.parametrize("shape", HUGE)
def test_npz_headers_that_promise_too_much(tmp_path, shape):
    path = zipped(tmp_path / "a.npz", {"frames.npy": header(shape) + b"\0" * 100})
    refused(lambda: probe_array(path), path, "but the file has|above the limit")


def test_other_lies_of_npz_headers(tmp_path):
    good = header((9, 4, 4, 3)) + b"\0" * (9 * 4 * 4 * 3)
    cases = {
        "fps of terabytes": {"frames.npy": good, "fps.npy": header((10**12,), "<f8")},
        "fps that is no number": {
            "frames.npy": good,
            "fps.npy": header((), "<f8") + struct.pack("<d", np.nan),
        },
        "fps of objects": {"frames.npy": good, "fps.npy": header((), "|O") + b"\x80\x04."},
        "fps beyond reason": {"frames.npy": good, "fps.npy": header((), "<f8") + struct.pack("<d", 1e300)},
        "negative": {"frames.npy": header((9, -4, -4, 3)) + b"\0" * 500},
        "nested header": {"frames.npy": b"\x93NUMPY\x01\0" + struct.pack("<H", 9000) + b"(" * 9000},
        "other version": {"frames.npy": b"\x93NUMPY\x09\0" + good[8:]},
        "no header": {"frames.npy": b""},
        "objects": {"frames.npy": header((9, 4, 4, 3), "|O")},
    }
    for name, members in cases.items():
        path = zipped(tmp_path / f"{name}.npz", members)
        refused(lambda p=path: probe_array(p), path)


@pytest.mark.slow
def test_an_npz_bomb_is_bounded(tmp_path, monkeypatch):
    """1.5 MB that were 1.94 GB and 52 s."""
    path = tmp_path / "bomb.npz"
    shape = (1200, 720, 750, 3)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("frames.npy", "w") as file:
        file.write(header(shape))
        for _ in range(shape[0]):
            file.write(b"\0" * (720 * 750 * 3))
    assert path.stat().st_size < 2.5e6
    said = refused(lambda: probe_array(path), path, "expands")
    assert "set INLAID_MAX_EXPANSION to allow more" in said
    monkeypatch.setenv("INLAID_MAX_EXPANSION", "2000")
    assert probe_array(path).frames == 1200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_array(path)[0][40].shape == (720, 750, 3)  # streamed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("order", ["t h w c", "t c h w", "c t h w", "fortran"])
def test_frames_are_streamed_and_equal(tmp_path, order):
    frames = np.stack([videos.numbered(k, SIZE) for k in range(9)])
    stored = {"t h w c": frames, "t c h w": np.moveaxis(frames, -1, 1), "c t h w": np.moveaxis(frames, -1, 0)}
    np.savez_compressed(tmp_path / "a.npz", frames=stored.get(order, np.asfortranarray(frames)))
    found, _ = load_array(tmp_path / "a.npz")
    assert len(found) == 9
    for k in (0, 1, 1, 5, 2, 8, -1):
        assert np.array_equal(found[k], frames[k])
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(raw[: len(raw) // 2] + b"\xff" * 40 + raw[len(raw) // 2 + 40 :])
    with pytest.raises(MediaError):
        [load_array(tmp_path / "b.npz")[0][k] for k in range(9)]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("shape", [(10**12, 6), (10**5, 10**7, 6), (2**40, 2**20, 6)])
def test_surfaces_that_promise_too_much(tmp_path, suffix, shape):
    path = tmp_path / f"surface_1{suffix}"
    content = header(shape, "<f4") + b"\0" * 240
    path.write_bytes(content) if suffix == ".npy" else zipped(path, {"surface_points.npy": content})
    refused(lambda: meshes.read_surface(path), path, "its header claims")


def test_encrypted_and_strange_archives(tmp_path):
    path = zipped(tmp_path / "a.npz", {"frames.npy": header((1, 2, 2, 3)) + b"\0" * 12})
    raw = bytearray(path.read_bytes())
    at = raw.find(b"PK\x01\x02")
    raw[at + 8] |= 1
    path.write_bytes(raw)
    refused(lambda: probe_array(path), path, "is encrypted")
    raw[at + 8] &= 0xFE
    raw[at + 10] = 99
    path.write_bytes(raw)
    refused(lambda: probe_array(path), path)
    path.write_bytes(b"PK\x05\x06" + b"\0" * 18)
    refused(lambda: load_arrays(path) or probe_array(path), path)


def test_images_that_claim_too_much(tmp_path, monkeypatch):
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png(width: int, height: int) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")

    for width, height in ((20_000, 20_000), (2**30, 2**30), (200_000_000, 1)):
        path = tmp_path / "a.png"
        path.write_bytes(png(width, height))
        for read in (probe_image, read_image, meshes.read_ids):
            assert "INLAID_MAX_MEGAPIXELS" in refused(lambda r=read, p=path: r(p), path, "pixels")
    zipped(tmp_path / "f.zip", {"0.png": png(20_000, 20_000)})
    from inlaid.data.rgba_clips import inspect_clip

    refused(lambda: inspect_clip(tmp_path / "f.zip"), tmp_path / "f.zip", r"0\.png has far too many pixels")
    monkeypatch.setenv("INLAID_MAX_MEGAPIXELS", "1")
    Image.new("RGB", (1100, 1000)).save(tmp_path / "b.png")
    refused(lambda: probe_image(tmp_path / "b.png"), tmp_path / "b.png", "above the limit of 1:")
    monkeypatch.setenv("INLAID_MAX_MEGAPIXELS", "much")
    with pytest.raises(ValueError, match="INLAID_MAX_MEGAPIXELS=much: not a positive number"):
        probe_image(tmp_path / "b.png")


def test_frame_zips_that_expand(tmp_path):
    from inlaid.data.rgba_clips import inspect_clip

    path = zipped(tmp_path / "f.zip", {"0.png": b"\0" * 300_000_000})
    refused(lambda: inspect_clip(path), path, "expands")


def test_torch_files_that_claim_too_much(tmp_path):
    torch.save(torch.zeros(1).expand(10**12), tmp_path / "a.pt")
    refused(lambda: load_torch(tmp_path / "a.pt"), tmp_path / "a.pt", "a tensor has 4 TB")
    torch.save({"x": [torch.zeros(2, 1).expand(2, 10**10)]}, tmp_path / "b.pt")
    refused(lambda: load_torch(tmp_path / "b.pt"), tmp_path / "b.pt", "a tensor has")


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
@pytest.mark.parametrize("text", ["[" * 3000, '{"a":' * 3000, "[" * 200_000, '[{"video": ' + "[" * 5000])
def test_deep_json(clips, name, text):
    (clips / name).write_text(text)
    start = time.process_time()
    said = message(plan(str(clips / name)))
    assert time.process_time() - start < 1
    assert name in said and ("nested" in said) and "INLAID_MAX_DEPTH" in said


def test_brackets_in_captions_are_no_nesting(clips):
    (clips / "m.json").write_text(json.dumps({"a.mp4": "[" * 500 + '\\"' + "{" * 500}))
    assert plan(str(clips / "m.json")).problems == []
    assert parse_json(json.dumps(["[" * 300])) == ["[" * 300]


def test_manifests_and_captions_of_many_bytes(clips, monkeypatch):
    with (clips / "m.json").open("wb") as file:
        file.truncate(10**11)
    said = message(plan(str(clips / "m.json")))
    assert "has 100 GB of text" in said and "INLAID_MAX_TEXT_MB" in said
    (clips / "m.json").unlink()
    with (clips / "a.txt").open("wb") as file:
        file.truncate(10**11)
    assert "has 100 GB of text" in message(plan(str(clips)))
    monkeypatch.setenv("INLAID_MAX_TEXT_MB", "0.00001")
    (clips / "m.json").write_text('{"a.mp4": "x"}')
    assert "above the limit of 1e-05" in message(plan(str(clips / "m.json")))


def test_numbers_of_many_digits(clips):
    (clips / "m.json").write_text('[{"video": "a.mp4", "caption": ' + "9" * 10_000 + "}]")
    assert "m.json" in message(plan(str(clips / "m.json")))


# --- whatever a library raises ------------------------------------------------------------------------------

RAISED = [
    MemoryError(),
    RecursionError("maximum recursion depth exceeded"),
    KeyError("codec"),
    AttributeError("'NoneType' object has no attribute 'thread_count'"),
    struct.error("unpack requires a buffer of 4 bytes"),
    IndexError(),
    TypeError("x"),
    AssertionError(),
    OverflowError(34, "Numerical result out of range"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    StopIteration(),
    NotImplementedError(),
    ZeroDivisionError("division by zero"),
    PermissionError(13, "Permission denied"),
    SystemError("error return without exception set"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_one_exit(clips, error, monkeypatch):
    with pytest.raises(MediaError) as caught, reading(clips / "a.mp4", MediaError):
        raise error
    assert str(clips / "a.mp4") in str(caught.value) and len(str(caught.value)) > len(str(clips)) + 20
    from inlaid.media import video

    def broken(path):
        if path.name == "a.mp4":
            raise error
        return real(path)

    real = video.probe
    monkeypatch.setattr(video, "probe", broken)
    made = plan(str(clips))
    assert codes(made) == {"unreadable": ["a.mp4"]} and len(made.train) == 2


def test_errors_that_name_the_file_pass_unchanged(tmp_path):
    with pytest.raises(ValueError, match="first"), reading(tmp_path):
        raise ValueError(f"{tmp_path}: first")
    with pytest.raises(MediaError, match="second"), reading(tmp_path):
        raise MediaError(tmp_path, "second")
    with pytest.raises(KeyboardInterrupt), reading(tmp_path):
        raise KeyboardInterrupt


def test_streams_without_codec(clips):
    """A video stream whose codec FFmpeg does not know."""
    raw = (clips / "a.mp4").read_bytes()
    (clips / "a.mp4").write_bytes(raw.replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
    assert codes(plan(str(clips))) == {"unreadable": ["a.mp4"]}


# --- control characters -------------------------------------------------------------------------------------

NASTY = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\rx\nerror: fake"


def clear(text: str) -> bool:
    return not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c == "\u202e" for c in text)


def test_names_and_captions_of_clips(clips):
    (clips / "a.mp4").rename(clips / f"{NASTY.replace('/', '')}.mp4")
    (clips / "c.txt").write_text(NASTY)
    made = plan(str(clips))
    text = message(made)
    assert clear(text) and "\\x1b[2J" in text
    assert not any(line.startswith("error: fake") for line in text.splitlines())
    for name in ("m.csv", "m.jsonl"):
        rows = {
            "m.csv": f'video,caption\n"no {NASTY}.mp4",x\n',
            "m.jsonl": json.dumps({"video": "no" + NASTY, "caption": "x"}),
        }
        (clips / name).write_text(rows[name])
        assert clear(message(plan(str(clips / name))))


def test_console_and_echo(capsys, tmp_path):
    from rich.table import Table
    from rich.text import Text

    from inlaid.cli.app import echo
    from inlaid.console import _SafeConsole, progress, say

    echo(f"error: {NASTY}")
    say(f"note: {NASTY}")
    shown = io.StringIO()
    console = _SafeConsole(file=shown, force_terminal=False, width=200)
    table = Table()
    table.add_column(NASTY)
    table.add_row(Text(NASTY))
    console.print(table)
    console.print(Text(NASTY, "red"))
    with progress(NASTY, 2, "clip") as advance:
        advance(note=NASTY)
    out = capsys.readouterr()
    assert clear(out.err + out.out) and clear(shown.getvalue()) and "\\x1b" in shown.getvalue()
    colored = io.StringIO()
    _SafeConsole(file=colored, force_terminal=True).print(Text("red", "red"))
    assert "\x1b[31mred" in colored.getvalue()  # the console's own codes work


def test_text_files_and_errors(tmp_path):
    path = tmp_path / "a\x1b[31m.json"
    assert clear(str(MediaError(path, NASTY)))
    with pytest.raises(FileError, match=r"a\\x1b") as error:
        read_text(path)
    assert clear(str(error.value))
