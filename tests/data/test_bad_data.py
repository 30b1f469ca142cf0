"""Problems of clips and their captions are found, named and counted."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from inlaid import config
from inlaid.data import windows
from inlaid.data.plan import describe_plan, require_usable
from inlaid.data.problems import Problem
from support import videos
from support.sources import SIZE, codes, message, plan

# --- problems of clips --------------------------------------------------------------------------------------

HALF = (200, 60, 30, 128)
"""A color with alpha."""


def test_captions_that_are_not_there(clips):
    (clips / "a.txt").unlink()
    (clips / "c.txt").write_text(" \n ")
    made = plan(str(clips))
    assert codes(made) == {"no-caption": ["a.mp4"], "empty-caption": ["c.mp4"]}
    assert message(made).splitlines() == [
        "1 of 3 clips has no caption (a.mp4): add a .txt beside each",
        "1 of 3 clips has an empty caption (c.mp4): describe the clip",
    ]
    (clips / "c.txt").write_bytes(b"\xe9t\xe9 caption")
    made = plan(str(clips))
    assert codes(made) == {"no-caption": ["a.mp4", "c.mp4"]}
    assert "c.mp4: c.txt is not UTF-8): add a caption to each, as UTF-8 text" in message(made)
    assert sum(s.clips for s in made.sources) == 3


def test_files_that_cannot_be_read(clips):
    raw = (clips / "a.mp4").read_bytes()
    (clips / "a.mp4").write_bytes(raw[: len(raw) // 2])
    (clips / "c.mp4").write_bytes(b"<html>")
    made = plan(str(clips))
    assert codes(made) == {"unreadable": ["c.mp4"], "truncated": ["a.mp4"]}
    assert "1 of 3 clips is truncated (a.mp4: is incomplete: its index (moov) is missing)" in message(made)
    assert [w.clip.name for w in made.train] == ["b.final.mp4"]


def test_a_missing_and_a_foreign_file(clips):
    rows = [{"video": v, "caption": "x"} for v in ("gone.mp4", "notes.pdf", "a.mp4")]
    (clips / "notes.pdf").write_bytes(b"%PDF")
    (clips / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert codes(plan(str(clips / "m.jsonl"))) == {"missing": ["gone.mp4"], "unreadable": ["notes.pdf"]}


def test_captioned_files_are_not_passed_over(clips):
    (clips / "d.swf").write_bytes(b"FLV")
    (clips / "d.txt").write_text("somebody wrote this")
    (clips / "notes.txt").write_text("no clip of this name")
    made = plan(str(clips))
    assert codes(made) == {"unreadable": ["d.swf"]}
    assert "1 of 4 clips cannot be read (d.swf: `.swf` files are not supported)" in message(made)


def test_too_short_says_by_how_much(clips):
    made = plan(str(clips), frames=[13, 33])
    assert codes(made) == {"too-short": ["a.mp4"]}
    assert "a.mp4: 13 frames at 16 fps need 0.81 s, it has 0.75 s" in message(made)
    assert sorted({w.extent.frames for w in made.train}) == [13]


def test_images_need_a_bucket_of_one_frame(clips):
    Image.fromarray(videos.numbered(5, SIZE)).save(clips / "p.png")
    (clips / "p.txt").write_text("a picture")
    made = plan(str(clips))
    assert codes(made) == {"image": ["p.png"]}
    assert "add 1 to data.frames" in message(made)
    made = plan(str(clips), frames=[1, 9])
    assert made.problems == []
    assert {w.clip.name: w.extent.frames for w in made.train} == {
        "a.mp4": 9,
        "b.final.mp4": 9,
        "c.mp4": 9,
        "p.png": 1,
    }
    assert videos.numbers(next(w for w in made.train if w.extent.frames == 1).read()) == [5]


def test_warnings_do_not_stop(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    rng = np.random.default_rng(0)
    stamps = np.cumsum(rng.uniform(0.02, 0.09, 30))
    videos.write(folder / "copy.mp4", 12, 16, SIZE)
    shutil.copy(folder / "copy.mp4", folder / "copy2.mp4")
    videos.write(folder / "odd.mkv", 12, 16, (33, 65), codec="ffv1", pix_fmt="yuv444p")
    videos.write(folder / "vary.mp4", 30, 24, SIZE, stamps=stamps - stamps[0])
    videos.write(folder / "slow.mp4", 12, 8, SIZE)
    videos.write(folder / "small.mp4", 12, 16, (16, 32))
    videos.write(folder / "tall.mp4", 12, 16, (128, 64))
    videos.write(folder / "hdr.mp4", 12, 16, SIZE, trc=18)
    videos.write(
        folder / "clear.mkv",
        12,
        16,
        SIZE,
        codec="ffv1",
        pix_fmt="bgra",
        draw=lambda k, s: videos.still(s, HALF),
    )
    videos.write(folder / "solid.mkv", 12, 16, SIZE, codec="ffv1", pix_fmt="bgra")
    for clip in folder.iterdir():
        clip.with_suffix(".txt").write_text(clip.stem)
    made = plan(str(folder))
    assert codes(made) == {
        "duplicate": ["copy2.mp4"],
        "odd-size": ["odd.mkv"],
        "variable-rate": ["vary.mp4"],
        "slow": ["slow.mp4"],
        "upscaled": ["small.mp4"],
        "cropped": ["tall.mp4"],
        "transparent": ["clear.mkv"],
        "hdr": ["hdr.mp4"],
    }
    assert {p.severity for p in made.problems} == {"warning"}
    assert require_usable(made, "stop") == []
    texts = "\n".join(describe_plan(made.problems, 9))
    assert "copy2.mp4: same content as copy.mp4" in texts
    assert "slow.mp4: 8 fps of 16: frames are repeated" in texts
    assert "small.mp4: 32x16 by 2.0" in texts
    assert "tall.mp4: 75% of 64x128" in texts


def test_a_row_listed_twice_is_a_copy(clips):
    (clips / "m.csv").write_text("video,caption\na.mp4,x\na.mp4,y\n")
    made = plan(str(clips / "m.csv"))
    assert codes(made) == {"duplicate": ["a.mp4"]}
    assert made.problems[0].message == "listed twice"
    assert [w.caption for w in made.train] == ["x", "y"]


def test_all_mistakes_come_at_once(clips, tmp_path):
    (clips / "a.txt").unlink()
    (clips / "c.mp4").write_bytes(b"no")
    made = plan(str(clips), str(tmp_path / "nowhere"))
    lines = message(made).splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        f"{tmp_path / 'nowhere'}: no such file or folder",
        "1 of 3 clips has no caption",
        "1 of 3 clips cannot be read",
    ]


def test_long_lists_are_cut():
    problems = [Problem("error", "no-caption", f"{i:02d}.mp4", "") for i in range(12)]
    names = "00.mp4, 01.mp4, 02.mp4, 03.mp4, 04.mp4 and 7 more"
    assert describe_plan(problems, 40) == [
        f"12 of 40 clips have no caption ({names}): add a .txt beside each"
    ]


def test_quarantine_goes_on_without_bad_clips(clips):
    (clips / "a.txt").unlink()
    made = plan(str(clips))
    left_out = require_usable(made, "quarantine")
    assert [(p.code, p.name) for p in left_out] == [("no-caption", "a.mp4")]
    assert [w.clip.name for w in made.train] == ["b.final.mp4", "c.mp4"]


def test_quarantine_does_not_cure_a_broken_source(clips, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        require_usable(plan(str(clips), str(tmp_path / "nowhere")), "quarantine")
    for caption in clips.glob("*.txt"):
        caption.unlink()
    with pytest.raises(ValueError, match="3 of 3 clips have no caption"):
        require_usable(plan(str(clips)), "quarantine")


def test_progress_is_reported(clips):
    seen = []
    plan(str(clips), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- captions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trigger", "prefix", "text", "out"),
    [
        ("", "", "a cat", "a cat"),
        ("ohwx", "", "a cat", "ohwx a cat"),
        ("ohwx", "", "an OHWX cat", "an OHWX cat"),
        ("cat", "", "a category", "cat a category"),
        ("c++", "", "learn c++ now", "learn c++ now"),
        ("", "video of ", "a cat", "video of a cat"),
        ("ohwx", "ohwx style,", "a cat", "ohwx style, a cat"),
        ("ohwx", "photo,", "a cat", "ohwx photo, a cat"),
    ],
)
def test_caption_has_prefix_and_trigger(trigger, prefix, text, out):
    section = config.Data(sources=["x"], trigger=trigger, caption_prefix=prefix)
    assert windows.caption(text, section) == out


def test_windows_carry_the_final_caption(clips):
    made = plan(str(clips), trigger="ohwx")
    assert {w.caption for w in made.train} == {"ohwx caption a", "ohwx caption b.final", "ohwx caption c"}
    assert made.clips[0].caption == "caption a"
