"""What people do wrong with clips: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import videos
from support.commands import files, inlaid
from support.ground import Evil, Ground, cut, refused
from support.slow import mostly_slow

# --- clips --------------------------------------------------------------------------------------------------


def captioned(name: str, data: bytes) -> Callable[[Path], Any]:
    """Puts a file and its caption among the clips."""

    def put(folder: Path) -> None:
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("something", "utf-8")

    return put


def manifest(name: str, text: str) -> Callable[[Path], Any]:
    """Puts a manifest in place of the captions."""

    def put(folder: Path) -> None:
        for caption in folder.glob("*.txt"):
            caption.unlink()
        (folder / name).write_text(text, "utf-8")

    return put


def lines(prompts: str, clips: str) -> Callable[[Path], Any]:
    def put(folder: Path) -> None:
        manifest("prompts.txt", prompts)(folder)
        (folder / "videos.txt").write_text(clips, "utf-8")

    return put


def array(**arrays: Any) -> Callable[[Path], Any]:
    """Puts an npz clip and its manifest."""

    def put(folder: Path) -> None:
        np.savez(folder / "a.npz", **arrays)
        manifest("m.jsonl", '{"frames_path": "a.npz", "caption": "x"}')(folder)

    return put


def link(name: str, target: str) -> Callable[[Path], Any]:
    def put(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        if name.endswith(".mp4"):
            (folder / name).with_suffix(".txt").write_text("something", "utf-8")

    return put


def shortened(folder: Path) -> None:
    clip = folder / "0.mp4"
    clip.write_bytes(clip.read_bytes()[:-20])


def picture(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "9.png")
    (folder / "9.txt").write_text("a square", "utf-8")


CSV = "video,caption\n0.mp4,hello\n"

CLIPS: dict[str, tuple[Callable[[Path], Any], Any, list[str]]] = {
    "unreadable": (
        captioned("9.mp4", b"this is no video" * 50),
        "d",
        ["1 of 3 clips cannot be read (9.mp4:", "convert or remove the file"],
    ),
    "empty file": (captioned("9.mp4", b""), "d", ["1 of 3 clips cannot be read (9.mp4: the file is empty"]),
    "truncated": (
        shortened,
        "d",
        ["1 of 2 clips is truncated (0.mp4:", "bytes are missing at its end", "copy the file again"],
    ),
    "too short": (
        lambda d: videos.write(d / "0.mp4", 3, 16, (32, 32)),
        "d",
        ["1 of 2 clips is too short (0.mp4: 9 frames at 16 fps need 0.56 s", "data.frames"],
    ),
    "an image": (picture, "d", ["1 of 3 clips is an image (9.png): add 1 to data.frames"]),
    "no caption": (
        lambda d: (d / "0.txt").unlink(),
        "d",
        ["1 of 2 clips has no caption (0.mp4): add a .txt beside each"],
    ),
    "empty caption": (
        lambda d: (d / "0.txt").write_text(" \n"),
        "d",
        ["1 of 2 clips has an empty caption (0.mp4): describe the clip"],
    ),
    "caption in another encoding": (
        lambda d: (d / "0.txt").write_bytes("Käse".encode("latin-1")),
        "d",
        ["1 of 2 clips has no caption (0.mp4: 0.txt is not UTF-8)", "UTF-8 text"],
    ),
    "several things at once": (
        lambda d: [(d / "0.txt").unlink(), captioned("9.mp4", b"no video")(d)],
        "d",
        ["1 of 3 clips has no caption (0.mp4)", "1 of 3 clips cannot be read (9.mp4"],
    ),
    "empty folder": (
        lambda d: [f.unlink() for f in d.iterdir()],
        "d",
        ["d: contains no clips"],
    ),
    "clip of another kind": (
        captioned("9.swf", b"something"),
        "d",
        ["1 of 3 clips cannot be read (9.swf: `.swf` files are not supported)", "convert or remove the file"],
    ),
    "no such folder": (lambda d: None, "nowhere", ["nowhere: no such file or folder"]),
    "not a manifest": (lambda d: None, "d/0.txt", ["d/0.txt: is neither a folder nor a manifest (.csv"]),
    "no such root": (
        manifest("m.csv", CSV),
        {"path": "d/m.csv", "root": "nowhere"},
        ["d/m.csv: `root` nowhere is not a folder"],
    ),
    "two layouts": (
        lambda d: (d / "m.csv").write_text(CSV),
        "d",
        ["d: is ambiguous: it contains m.csv; 2 clips", "Set `path` to the manifest, or set `layout`"],
    ),
    "layout that is not there": (
        lambda d: None,
        {"path": "d", "layout": "lines"},
        ["d: contains no prompts.txt and videos.txt"],
    ),
    "missing file": (
        manifest("m.csv", CSV + "gone.mp4,bye\n"),
        "d/m.csv",
        ["1 of 2 clips does not exist (gone.mp4: line 3): correct the manifest or `root`"],
    ),
    "escape in CSV": (
        manifest("m.csv", CSV + "../../etc/passwd,root\n"),
        "d/m.csv",
        ["1 of 2 clips is outside of its source (../../etc/passwd: line 3)", "`root`"],
    ),
    "escape in JSONL": (
        manifest("m.jsonl", '{"video": "../../etc/passwd", "caption": "root"}\n'),
        "d/m.jsonl",
        ["is outside of its source (../../etc/passwd: line 1)", "`root`"],
    ),
    "escape in lines": (
        lines("one\ntwo", "0.mp4\n../../etc/passwd"),
        "d",
        ["is outside of its source (../../etc/passwd: line 2)", "`root`"],
    ),
    "absolute path": (
        manifest("m.csv", CSV + "/etc/passwd,root\n"),
        "d/m.csv",
        ["is outside of its source (/etc/passwd: line 3)"],
    ),
    "drive of Windows": (
        manifest("m.csv", CSV + "C:\\clips\\0.mp4,root\n"),
        "d/m.csv",
        ["is outside of its source (C:\\clips\\0.mp4: line 3)"],
    ),
    "link out of the folder": (
        link("9.mp4", "/etc/passwd"),
        "d",
        ["is outside of its source (9.mp4: is a link to"],
    ),
    "links in a circle": (link("9.mp4", "9.mp4"), "d", ["1 of 3 clips does not exist (9.mp4)"]),
    "name that is no text": (
        lambda d: captioned(os.fsdecode(b"\xff.mp4"), b"")(d),
        "d",
        ["1 of 3 clips cannot be read (\\udcff.mp4: the file name is not UTF-8, rename the file)"],
    ),
    "half of a character": (
        manifest("m.jsonl", '{"video": "0.mp4", "caption": "a \\ud83d cat"}\n'),
        "d/m.jsonl",
        ["1 of 1 clips has no caption (0.mp4: line 1: invalid Unicode in `a \\ud83d cat`)"],
    ),
    "path with a null": (
        manifest("m.jsonl", '{"video": "0\\u0000.mp4", "caption": "x"}\n'),
        "d/m.jsonl",
        ["1 of 1 clips does not exist (0\\x00.mp4: line 1)"],
    ),
    "endless path": (
        manifest("m.csv", f"video,caption\n{'a' * 5000}.mp4,x\n"),
        "d/m.csv",
        ["1 of 1 clips does not exist (aaaa", "line 2)"],
    ),
    "caption linked out": (
        link("0.txt", "/etc/passwd"),
        "d",
        ["is outside of its source (0.txt: is a link to"],
    ),
    "unequal lines": (
        lines("one\ntwo\nthree", "0.mp4\n1.mp4"),
        "d",
        ["d: prompts.txt has 3 lines and videos.txt has 2"],
    ),
    "empty manifest": (manifest("m.csv", ""), "d/m.csv", ["d/m.csv: m.csv is empty"]),
    "manifest without rows": (
        manifest("m.csv", "video,caption\n"),
        "d/m.csv",
        ["d/m.csv: contains no clips"],
    ),
    "unknown columns": (
        manifest("m.csv", "clip,words\n0.mp4,hello\n"),
        "d/m.csv",
        ["none of the columns video, file_name", "its columns are clip, words: set `video_column`"],
    ),
    "no such column": (
        manifest("m.csv", CSV),
        {"path": "d/m.csv", "caption_column": "text"},
        ["d/m.csv: has no column `text`; its columns are video, caption: set `caption_column`"],
    ),
    "comma without quotes": (
        manifest("m.csv", "video,caption\n0.mp4,hello, world\n"),
        "d/m.csv",
        ["has a broken row (line 2: 3 cells for 2 columns: quote texts that contain commas)"],
    ),
    "open quotation mark": (
        manifest("m.csv", 'video,caption\n0.mp4,"hello\n1.mp4,bye\n'),
        "d/m.csv",
        ["d/m.csv: m.csv is not valid CSV", "look for an unclosed quote"],
    ),
    "broken JSONL": (
        manifest("m.jsonl", '{"video": "0.mp4", "caption": "x"}\n{"video": \n'),
        "d/m.jsonl",
        ["m.jsonl, line 2: not valid JSON (column 11:"],
    ),
    "JSONL of lists": (
        manifest("m.jsonl", '["0.mp4", "x"]\n'),
        "d/m.jsonl",
        ["m.jsonl, line 1: expected an object with a path and a caption"],
    ),
    "JSONL of other types": (
        manifest("m.jsonl", '{"video": "0.mp4", "caption": 5}\n{"video": 7, "caption": "x"}\n'),
        "d/m.jsonl",
        ["line 2: `video` is not a file name", "0.mp4: line 1: int, not text"],
    ),
    "npz with pickled objects": (
        array(frames=np.array([Evil()], object)),
        "d/m.jsonl",
        ["1 of 1 clips cannot be read (a.npz: `frames` is object (1,); it must be uint8"],
    ),
    "npz of another shape": (
        array(frames=np.zeros((9, 32, 32), np.uint8)),
        "d/m.jsonl",
        ["a.npz: `frames` is uint8 (9, 32, 32); it must be uint8 and (t, h, w, 3)"],
    ),
    "npz of another type": (
        array(frames=np.zeros((9, 32, 32, 3), np.float32)),
        "d/m.jsonl",
        ["a.npz: `frames` is float32 (9, 32, 32, 3); it must be uint8"],
    ),
    "npz without frames": (
        array(video=np.zeros((9, 32, 32, 3), np.uint8)),
        "d/m.jsonl",
        ["a.npz: has no array `frames`; its arrays are: video"],
    ),
    "truncated npz": (
        lambda d: [array(frames=np.zeros((9, 32, 32, 3), np.uint8))(d), cut(d / "a.npz")],
        "d/m.jsonl",
        ["1 of 1 clips cannot be read (a.npz: is not an npz clip"],
    ),
    "nothing left to train on": (
        lambda d: None,
        "d",
        ["data.validation=2 of 2 clips leaves none to train on"],
    ),
}


ELSEWHERE = (
    *("empty file", "truncated", "too short", "an image", "no caption", "empty caption"),
    *("caption in another encoding", "clip of another kind", "nothing left to train on"),
    *("escape in CSV", "escape in lines", "absolute path", "drive of Windows"),
    *("link out of the folder", "caption linked out"),
)
"""What every run of the tests shows of the plan of the data alone (test_bad_data.py, test_data.py)."""


@pytest.mark.parametrize("case", mostly_slow(CLIPS, lambda case: case not in ELSEWHERE))
def test_clips(ground: Ground, case: str) -> None:
    damage, source, words = CLIPS[case]
    Path("d").mkdir()
    for name in ("0.mp4", "0.txt", "1.mp4", "1.txt"):
        shutil.copy(ground.clips / name, "d")
    damage(Path("d"))
    clips = files(Path("d"))
    changes = {"data__validation": 2} if case == "nothing left to train on" else {}
    recipe = ground.write(data__sources=[source], data__cache="cache", **changes)
    refused(inlaid("cache", recipe), *words)
    assert not Path("cache").exists(), "nothing is encoded before all is well"
    checked = inlaid("check", recipe)
    assert checked.code == 2 and "not ready: " in checked.output
    assert all(word in checked.output for word in words), checked.output
    assert files(Path("d")) == clips, "the clips are only read"
    assert not Path("opened").exists(), "nothing of a pickle is run"


UNEVEN = [k / 16 + 0.02 * (k % 2) for k in range(14)]

WARNINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "duplicate": (
        lambda d: captioned("9.mp4", (d / "0.mp4").read_bytes())(d),
        "1 of 3 clips is a copy (9.mp4: same content as 0.mp4): keep one copy, or set `repeats`",
    ),
    "odd size": (
        lambda d: [Image.new("RGB", (33, 31)).save(d / "9.png"), (d / "9.txt").write_text("a square")],
        "1 of 3 clips has an odd size (9.png: 33x31): nothing to do, clips are scaled and cropped",
    ),
    "variable frame rate": (
        lambda d: videos.write(d / "0.mp4", 14, 16, (32, 32), stamps=UNEVEN),
        "1 of 2 clips has a variable frame rate (0.mp4: 15.64 fps apart from held frames): nothing to do",
    ),
}


@pytest.mark.parametrize("case", mostly_slow(WARNINGS, "variable frame rate".__eq__))
def test_what_is_only_worth_a_warning(ground: Ground, case: str) -> None:
    damage, words = WARNINGS[case]
    Path("d").mkdir()
    for name in ("0.mp4", "0.txt", "1.mp4", "1.txt"):
        shutil.copy(ground.clips / name, "d")
    damage(Path("d"))
    recipe = ground.write(data__sources="d", data__frames=[1, 9])
    done = inlaid("check", recipe)
    assert done.code == 0 and f"warning: {words}" in done.output and "ready to train: 0 errors" in done.output
    assert inlaid("cache", recipe, "data.cache=cache").code == 0


def test_quarantine_names_what_is_left_out(ground: Ground) -> None:
    shutil.copytree(ground.clips, "d")
    captioned("9.mp4", b"this is no video")(Path("d"))
    done = inlaid("cache", ground.write(data__sources="d", data__bad_clips="quarantine"))
    assert done.code == 0 and "excluded 1 clip(s) with errors; run/quarantine.json lists" in done.output
    assert "cannot be read" in json.loads(Path("run/quarantine.json").read_text("utf-8"))["9.mp4"]
