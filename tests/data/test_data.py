"""Finding clips in every layout, every problem of a clip, windows, buckets and what is held out."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inlaid import config
from inlaid.data import windows
from inlaid.data.plan import Plan, describe_plan, plan_dataset, require_usable
from inlaid.data.problems import Problem
from inlaid.data.sampler import make_sampler
from inlaid.data.windows import sizes, spread
from inlaid.families.grid import Grid
from inlaid.media.kinds import nearest_frames
from support import videos

GRID = Grid(spatial=16, temporal=4)
SIZE = (32, 64)


def plan(*sources: Any, seed: int = 0, fps: float = 16, progress: Any = None, **section: Any) -> Plan:
    """A plan with small sizes and nothing held out."""
    section = {"size": SIZE, "frames": [9], "validation": 0} | section
    return plan_dataset(config.Data(sources=list(sources), **section), GRID, fps, seed, progress)


def codes(made: Plan) -> dict[str, list[str]]:
    """Names by code of problem."""
    out: dict[str, list[str]] = {}
    for problem in made.problems:
        out.setdefault(problem.code, []).append(problem.name)
    return out


def message(made: Plan) -> str:
    """What `require` says."""
    with pytest.raises(ValueError) as error:
        require_usable(made, "stop")
    return str(error.value)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with three good clips, each with its caption, of different content."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, name in enumerate(["a", "b.final", "c"]):
        videos.write(folder / f"{name}.mp4", 12 + i, 16, SIZE)
        (folder / f"{name}.txt").write_text(f"caption {name}\n", "utf-8")
    return folder


def test_looking_at_data_needs_no_torch():
    code = "import sys, inlaid.data, inlaid.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- layouts ----------------------------------------------------------------------------------------


def test_folder_with_captions_beside(clips):
    (clips / "deep" / "er").mkdir(parents=True)
    shutil.move(clips / "c.mp4", clips / "deep" / "er" / "C.MP4")
    (clips / "deep" / "er" / "C.txt").write_bytes("﻿of  the\nsea ü".encode())
    (clips / "c.txt").unlink()
    (clips / ".hidden.mp4").write_bytes(b"no")
    (clips / ".cache").mkdir()
    (clips / ".cache" / "x.mp4").write_bytes(b"no")
    (clips / "readme.md").write_text("no clip")
    made = plan(str(clips))
    assert [(c.name, c.caption) for c in made.clips] == [
        ("a.mp4", "caption a"),
        ("b.final.mp4", "caption b.final"),
        ("deep/er/C.MP4", "of the sea ü"),
    ]
    assert made.problems == []
    assert made.sources[0].layout == "folder"
    assert "3 clips, 3 with a .txt beside" in made.sources[0].why
    assert [w.read().shape for w in made.train] == [(9, *SIZE, 3)] * 3


def test_lines(clips):
    (clips / "prompts.txt").write_text("one, with a comma\r\ntwo\r\n", "utf-8")
    (clips / "videos.txt").write_text("a.mp4\nc.mp4\n\n", "utf-8")
    made = plan({"path": str(clips), "layout": "lines"})
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "one, with a comma"), ("c.mp4", "two")]
    assert made.problems == []


def test_lines_of_unequal_number(clips):
    (clips / "prompts.txt").write_text("one\ntwo\nthree\n")
    (clips / "videos.txt").write_text("a.mp4\nc.mp4\n")
    made = plan({"path": str(clips), "layout": "lines"})
    assert "prompts.txt has 3 lines and videos.txt has 2" in message(made)
    assert not made.train


def test_lines_with_a_gap(clips):
    (clips / "prompts.txt").write_text("one\n\nthree\n")
    (clips / "videos.txt").write_text("a.mp4\nb.final.mp4\nc.mp4\n")
    assert codes(plan({"path": str(clips), "layout": "lines"})) == {"empty-caption": ["b.final.mp4"]}
    (clips / "prompts.txt").write_text("one\ntwo\nthree\n")
    (clips / "videos.txt").write_text("a.mp4\n\nc.mp4\n")
    assert codes(plan({"path": str(clips), "layout": "lines"})) == {"row": ["line 2"]}


@pytest.mark.parametrize("name", ["prompts.txt", "prompt.txt", "captions.txt"])
@pytest.mark.parametrize("layout", ["auto", "lines"])
def test_lines_by_the_names_that_scripts_use(clips, name, layout):
    for text in clips.glob("*.txt"):
        text.unlink()  # what lies beside could be meant too
    (clips / name).write_text("one\ntwo\n", "utf-8")
    (clips / "videos.txt").write_text("a.mp4\nc.mp4\n", "utf-8")
    made = plan({"path": str(clips), "layout": layout})
    assert made.sources[0].layout == "lines" and made.problems == []
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "one"), ("c.mp4", "two")]


def test_lines_by_names_that_are_told(clips):
    """`--caption_column words.txt --video_column list.txt`: there, columns were names of files."""
    (clips / "words.txt").write_text("one\ntwo\n", "utf-8")
    (clips / "list.txt").write_text("a.mp4\nc.mp4\n", "utf-8")
    stated = {"caption_column": "words.txt", "video_column": "list.txt"}
    made = plan({"path": str(clips), "layout": "lines", **stated})
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "one"), ("c.mp4", "two")]
    assert made.sources[0].why == "words.txt and list.txt" and made.problems == []


def test_blank_lines_are_skipped_where_the_counts_then_match(clips):
    (clips / "prompts.txt").write_text("one\n\n\ntwo\n\n", "utf-8")
    (clips / "videos.txt").write_text("a.mp4\n\nc.mp4", "utf-8")
    made = plan({"path": str(clips), "layout": "lines"})
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "one"), ("c.mp4", "two")]
    assert made.problems == []
    (clips / "prompts.txt").write_text("one\n\ntwo\n", "utf-8")
    made = plan({"path": str(clips), "layout": "lines"})
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "one"), ("c.mp4", "two")]
    assert made.problems == []


def test_dataset_file_under_a_data_root(clips, tmp_path):
    """`--data_root ROOT --dataset_file FILE --caption_column text --video_column video`."""
    (tmp_path / "meta.csv").write_text(
        'id,text,video\n1,"a ""red"" fox, running",a.mp4\n2,two,c.mp4\n', "utf-8"
    )
    source = {"path": str(tmp_path / "meta.csv"), "root": str(clips)}
    made = plan({**source, "caption_column": "text", "video_column": "video"})
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", 'a "red" fox, running'), ("c.mp4", "two")]
    assert made.problems == []


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "﻿"])
def test_csv(clips, end, mark):
    rows = ["id,video,caption,subject", '1,a.mp4,"quoted ""words"", and commas",cat', '2,c.mp4,"two\nlines",']
    (clips / "metadata.csv").write_bytes((mark + end.join(rows) + end).encode())
    made = plan({"path": str(clips / "metadata.csv"), "group_column": "subject"})
    assert [(c.name, c.caption, c.group) for c in made.clips] == [
        ("a.mp4", 'quoted "words", and commas', "cat"),
        ("c.mp4", "two lines", ""),
    ]
    assert made.problems == []
    assert made.sources[0].layout == "csv"


def test_csv_with_named_columns(clips):
    with (clips / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["caption", "clip", "text de"], ["wrong", "a.mp4", "right"]])
    made = plan({"path": str(clips / "m.csv"), "video_column": "clip", "caption_column": "text de"})
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "right")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"video_column": "movie"}, "has no column `movie`; its columns are clip, words: set `video_column`"),
        (
            {"video_column": "clip", "caption_column": "x"},
            "no column `x`; its columns are clip, words: set `caption_column`",
        ),
        ({}, "has none of the columns video, file_name, file, path, image, frames_path; its columns are"),
        ({"video_column": "clip"}, "has none of the columns caption, prompt, text; its columns are"),
        ({"video_column": "clip", "caption_column": "words", "group_column": "g"}, "no column `g`"),
    ],
)
def test_missing_columns_list_those_there(clips, change, says):
    (clips / "m.csv").write_text("clip,words\na.mp4,hello\n")
    (clips / "m.jsonl").write_text('{"clip": "a.mp4", "words": "hello"}\n')
    for name in ("m.csv", "m.jsonl"):
        assert says in message(plan({"path": str(clips / name)} | change))


def test_csv_that_lost_its_quotes(clips):
    (clips / "m.csv").write_text("video,caption\na.mp4,a cat, black\nc.mp4,fine\n")
    made = plan(str(clips / "m.csv"))
    assert codes(made) == {"row": ["line 2"]}
    assert "3 cells for 2 columns" in message(made)
    assert [c.name for c in made.clips] == ["c.mp4"]


def test_csv_with_short_rows(clips):
    (clips / "m.csv").write_text("video,caption\na.mp4\nc.mp4,fine\n,lost\n\n")
    assert codes(plan(str(clips / "m.csv"))) == {"no-caption": ["a.mp4"], "row": ["line 4"]}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.csv", b"", "m.csv is empty"),
        ("m.csv", b'video,caption\na.mp4,"open\n', "unexpected end of data"),
        ("m.csv", b"video,caption\na.mp4,\xff\xfe\n", "m.csv is not UTF-8"),
        ("m.csv", b"video,caption\n", "contains no clips"),
        ("m.jsonl", b'{"video": "a.mp4", "caption": "x"}\n{oops}\n', "m.jsonl, line 2: not valid JSON"),
        ("m.jsonl", b"[1, 2]\n", "m.jsonl, line 1: expected an object"),
        ("m.jsonl", b"\n\n", "m.jsonl is empty"),
        ("m.json", b'[{"video": "a.mp4",\n "caption" "x"}]', "m.json, line 2: not valid JSON"),
        ("m.json", b"3", "m.json, line 1: not a JSON list"),
        ("m.json", b'{"video": "a.mp4"}', "m.json, entry 1: expected an object"),
        ("m.yaml", b"", "is neither a folder nor a manifest"),
    ],
)
def test_broken_manifests(clips, name, content, says):
    (clips / name).write_bytes(content)
    assert says in message(plan(str(clips / name)))


def test_jsonl_and_json(clips):
    rows = [
        {"file_name": "a.mp4", "prompt": "one ü", "extra": 1},
        {"file_name": "b.final.mp4", "prompt": 7},
        {"file_name": "c.mp4"},
        {"prompt": "lost"},
    ]
    (clips / "m.jsonl").write_text("\n\n".join(json.dumps(r) for r in rows), "utf-8")
    (clips / "m.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8-sig")
    for name, where in (("m.jsonl", "line 7"), ("m.json", "entry 4")):
        made = plan(str(clips / name))
        assert [(c.name, c.caption) for c in made.clips if c.caption] == [("a.mp4", "one ü")]
        assert codes(made) == {"no-caption": ["b.final.mp4", "c.mp4"], "row": [where]}
        assert "int, not text" in message(made)


def test_json_beside_a_clip_is_no_manifest(clips):
    (clips / "a.json").write_text("{}")
    assert plan(str(clips)).sources[0].layout == "folder"


def test_arrays_with_a_manifest(tmp_path):
    frames = np.stack([videos.numbered(k, SIZE) for k in range(9)])
    np.savez(tmp_path / "x.npz", frames=frames)
    np.savez(tmp_path / "y.npz", frames=np.moveaxis(frames[::-1], -1, 0))
    rows = [{"frames_path": f"{n}.npz", "caption": n} for n in "xy"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = plan(str(tmp_path))
    assert made.problems == []
    assert [videos.numbers(w.read()) for w in made.train] == [list(range(9)), list(range(8, -1, -1))]


def test_a_root_elsewhere(clips, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.csv").write_text("video,caption\nclips/a.mp4,x\n")
    assert codes(plan(str(tmp_path / "lists" / "m.csv"))) == {"missing": ["clips/a.mp4"]}
    made = plan({"path": str(tmp_path / "lists" / "m.csv"), "root": str(tmp_path)})
    assert [c.name for c in made.clips] == ["clips/a.mp4"]
    assert made.problems == []
    assert "is not a folder" in message(plan({"path": str(tmp_path / "lists" / "m.csv"), "root": "nowhere"}))
    assert "`root` is only for manifests" in message(plan({"path": str(clips), "root": str(tmp_path)}))


def test_auto_says_when_it_cannot_tell(clips):
    (clips / "metadata.csv").write_text("video,caption\na.mp4,x\n")
    (clips / "prompts.txt").write_text("x\n")
    (clips / "videos.txt").write_text("a.mp4\n")
    text = message(plan(str(clips)))
    assert "is ambiguous" in text
    assert all(n in text for n in ("prompts.txt and videos.txt", "metadata.csv", "3 with a .txt beside"))
    for layout, count in (("folder", 3), ("csv", 1), ("lines", 1)):
        made = plan({"path": str(clips), "layout": layout})
        assert (made.sources[0].layout, made.sources[0].clips) == (layout, count)
        assert made.problems == []


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("jsonl", "contains no .jsonl or .json"),
        ("csv", "contains no .csv"),
        ("lines", "contains no prompts.txt and videos.txt"),
    ],
)
def test_a_named_layout_that_is_not_there(clips, layout, says):
    assert says in message(plan({"path": str(clips), "layout": layout}))


def test_nothing_there(tmp_path, clips):
    assert "no such file or folder" in message(plan(str(tmp_path / "nowhere")))
    (tmp_path / "bare").mkdir()
    assert "contains no clips" in message(plan(str(tmp_path / "bare")))
    assert "contains no clips" in message(plan({"path": str(tmp_path / "bare"), "layout": "folder"}))
    (clips / "m.csv").write_text("video,caption\n")
    assert "is csv, but `layout` is jsonl" in message(plan({"path": str(clips / "m.csv"), "layout": "jsonl"}))


def test_two_manifests_in_a_folder(clips):
    for name in ("train.csv", "test.csv"):
        (clips / name).write_text("video,caption\na.mp4,x\n")
    assert "test.csv; train.csv" in message(plan({"path": str(clips), "layout": "csv"}))


# --- paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "../outside.mp4",
        "/etc/passwd",
        "x/../../outside.mp4",
        "C:\\clips\\a.mp4",
        "link.mp4",
    ],
)
def test_paths_stay_inside(clips, name):
    videos.write(clips.parent / "outside.mp4", 12, 16, SIZE)
    (clips / "link.mp4").symlink_to(clips.parent / "outside.mp4")
    rows = [{"video": "a.mp4", "caption": "x"}, {"video": name, "caption": "x"}]
    (clips / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = plan(str(clips / "m.jsonl"))
    assert codes(made) == {"outside": [name]}
    assert [c.name for c in made.clips] == ["a.mp4"]
    assert f"1 of 2 clips is outside of its source ({name}: line 2)" in message(made)


def test_links_that_leave_a_folder(clips):
    (clips.parent / "secret.txt").write_text("secret")
    (clips / "a.txt").unlink()
    (clips / "a.txt").symlink_to(clips.parent / "secret.txt")
    videos.write(clips.parent / "outside.mp4", 12, 16, SIZE)
    (clips / "d.mp4").symlink_to(clips.parent / "outside.mp4")
    (clips / "e.mp4").symlink_to(clips / "b.final.mp4")
    (clips / "e.txt").write_text("a link that stays inside")
    made = plan(str(clips))
    assert codes(made) == {"outside": ["a.txt", "d.mp4"], "duplicate": ["e.mp4"]}
    assert "secret" not in str(made)


def test_detours_inside_are_fine(clips):
    (clips / "m.jsonl").write_text(json.dumps({"video": "x/../a.mp4", "caption": "x"}))
    assert [c.name for c in plan(str(clips / "m.jsonl")).clips] == ["a.mp4"]


# --- problems of clips ------------------------------------------------------------------------------


def test_captions_that_are_not_there(clips):
    (clips / "a.txt").unlink()
    (clips / "c.txt").write_text(" \n ")
    made = plan(str(clips))
    assert codes(made) == {"no-caption": ["a.mp4"], "empty-caption": ["c.mp4"]}
    assert message(made).splitlines() == [
        "1 of 3 clips has no caption (a.mp4): add a .txt beside each",
        "1 of 3 clips has an empty caption (c.mp4): describe the clip",
    ]
    (clips / "c.txt").write_bytes(b"\xff\xfe caption")
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
    (clips / "d.flv").write_bytes(b"FLV")
    (clips / "d.txt").write_text("somebody wrote this")
    (clips / "notes.txt").write_text("no clip of this name")
    made = plan(str(clips))
    assert codes(made) == {"unreadable": ["d.flv"]}
    assert "1 of 4 clips cannot be read (d.flv: `.flv` files are not supported)" in message(made)


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
    videos.write(folder / "clear.mkv", 12, 16, SIZE, codec="ffv1", pix_fmt="bgra")
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


def test_progress_is_told(clips):
    seen = []
    plan(str(clips), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- captions ---------------------------------------------------------------------------------------


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


# --- windows and buckets ----------------------------------------------------------------------------


def test_spread_is_even_apart_and_inside():
    for there in range(5, 60):
        for length in (1, 5, 9):
            for stride in (1, 3, 9):
                for most in (1, 2, 5):
                    if length > there:
                        continue
                    starts = spread(there, length, stride, most)
                    assert 1 <= len(starts) <= most
                    assert starts[0] >= 0
                    assert starts[-1] + length <= there
                    gaps = np.diff(starts)
                    assert (gaps >= stride).all()
                    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
                    room = there - length
                    assert len(starts) == min(most, room // stride + 1), "as many as fit"
    assert spread(127, 81, 81, 1) == [23], "a single window is in the middle"
    assert spread(200, 81, 81, 2) == [0, 119], "several reach from end to end"


def test_windows_of_a_long_clip(tmp_path):
    videos.write(tmp_path / "long.mp4", 120, 24, SIZE)
    (tmp_path / "long.txt").write_text("x")
    made = plan(str(tmp_path), max_windows=4, frames=[9, 17])
    assert [(w.start, w.extent.frames, w.fps) for w in made.train] == [
        (s / 16, 17, 16.0) for s in (0, 21, 42, 63)
    ]
    stamps = np.arange(120) / 24
    for window in made.train:
        wanted = window.start + np.arange(17) / 16
        assert videos.numbers(window.read()) == nearest_frames(stamps, wanted).tolist()
    assert len(plan(str(tmp_path), max_windows=4, stride=40).train) == 2
    assert len(plan(str(tmp_path), max_windows=99, stride=8).train) == 9


def test_each_clip_takes_the_longest_length_that_it_fills(tmp_path):
    for n in (9, 16, 17, 40):
        videos.write(tmp_path / f"{n:02d}.mp4", n, 16, SIZE)
        (tmp_path / f"{n:02d}.txt").write_text("x")
    made = plan(str(tmp_path), frames=[9, 17, 33])
    assert [w.extent.frames for w in made.train] == [9, 9, 17, 33]


def test_fps_of_the_recipe_wins(tmp_path):
    videos.write(tmp_path / "a.mp4", 24, 24, SIZE)
    (tmp_path / "a.txt").write_text("x")
    assert plan(str(tmp_path), frames=[17]).problems[0].code == "too-short"
    window = plan(str(tmp_path), frames=[17], fps=24.0).train
    assert [w.fps for w in window] == [24.0]
    made = plan_dataset(
        config.Data(sources=[str(tmp_path)], size=SIZE, frames=[17], fps=24, validation=0), GRID, 16, 0
    )
    assert [w.fps for w in made.train] == [24.0]


def test_slow_clips_repeat_or_keep_their_frames(tmp_path):
    videos.write(tmp_path / "a.mp4", 12, 8, SIZE)
    (tmp_path / "a.txt").write_text("x")
    repeat, keep = (plan(str(tmp_path), slow=s).train[0] for s in ("repeat", "keep"))
    assert (repeat.fps, keep.fps) == (16.0, 8.0)
    assert len(set(videos.numbers(repeat.read()))) == 5
    assert len(set(videos.numbers(keep.read()))) == 9
    assert codes(plan(str(tmp_path), slow="keep", frames=[13])) == {"too-short": ["a.mp4"], "slow": ["a.mp4"]}
    assert codes(plan(str(tmp_path), slow="repeat", frames=[13])) == {"slow": ["a.mp4"]}


def test_buckets_keep_the_area_and_lie_on_the_grid():
    section = config.Data(sources=["x"], size=(480, 832), aspects=["16:9", "1:1", "9:16", "4:3"])
    made = sizes(section, GRID)
    assert made == [(480, 848), (624, 624), (848, 480), (544, 736)]
    assert all(abs(h * w / (480 * 832) - 1) < 0.03 for h, w in made)
    assert sizes(config.Data(sources=["x"], size=(480, 832)), GRID) == [(480, 832)]
    assert sizes(config.Data(sources=["x"], size=(64, 64), aspects=["1:1", "1:1.02"]), GRID) == [(64, 64)]


def test_clips_go_to_the_nearest_aspect(tmp_path):
    for name, size in {"wide": (36, 64), "tall": (64, 36), "square": (50, 48), "turned": (36, 64)}.items():
        videos.write(tmp_path / f"{name}.mp4", 10, 16, size, rotation=90 if name == "turned" else 0)
        (tmp_path / f"{name}.txt").write_text(name)
    made = plan(str(tmp_path), size=(48, 48), aspects=["16:9", "1:1", "9:16"])
    found = {w.clip.name.split(".")[0]: w.extent[1:] for w in made.train}
    assert found == {"wide": (32, 64), "tall": (64, 32), "square": (48, 48), "turned": (64, 32)}
    assert {w.read().shape for w in made.train} == {(9, *s, 3) for s in found.values()}


def test_key_holds_all_that_decides_pixels(clips):
    base = plan(str(clips)).train[0]
    assert base.key == plan(str(clips), trigger="x").train[0].key, "captions do not change pixels"
    others = [
        plan(str(clips), size=(32, 32)).train[0],
        plan(str(clips), frames=[5]).train[0],
        plan(str(clips), fps=15.0).train[0],
        plan(str(clips), frames=[5], max_windows=2).train[0],
    ]
    assert len({base.key, *(w.key for w in others)}) == 5
    hash(base)


# --- held out ---------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twelve clips, among them three copies of one."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(12):
        name = folder / f"{i:02d}.mp4"
        if i in (4, 9):
            shutil.copy(folder / "01.mp4", name)
        else:
            videos.write(name, 30 + i, 16, SIZE)
        name.with_suffix(".txt").write_text(f"clip {i}")
    return folder


@pytest.mark.parametrize(
    ("wanted", "count"), [(0, 0), (0.1, 1), (0.25, 3), (0.04, 0), (3, 3), (1, 1), (5, 5)]
)
def test_validation_count(many, wanted, count):
    names = {w.clip.name for w in plan(str(many), validation=wanted).validation}
    assert count <= len(names) <= count + 2, "copies come together, so a few more may be held out"
    if "01.mp4" not in names:
        assert len(names) == count


def test_validation_is_a_function_of_seed_and_name(many):
    for seed in range(6):
        made = plan(str(many), validation=4, seed=seed, max_windows=3)
        train, held = ({w.clip.name for w in part} for part in (made.train, made.validation))
        assert not train & held, "no clip is on both sides"
        copies = {"01.mp4", "04.mp4", "09.mp4"}
        assert copies <= train or copies <= held, "copies stay together"
        assert train | held == {f"{i:02d}.mp4" for i in range(12)}
        again = plan(str(many), validation=4, seed=seed, frames=[17])
        assert {w.clip.name for w in again.validation} == held, "windows do not matter"
    picks = {
        tuple(sorted(w.clip.name for w in plan(str(many), validation=2, seed=s).validation)) for s in range(8)
    }
    assert len(picks) > 3


def test_validation_changes_little_when_clips_come(many):
    before = {w.clip.name for w in plan(str(many), validation=0.3).validation}
    videos.write(many / "99.mp4", 60, 16, SIZE)
    (many / "99.txt").write_text("new")
    after = {w.clip.name for w in plan(str(many), validation=0.3).validation}
    assert len(before - after) <= 1


def test_one_clip_must_stay_to_train_on(clips):
    made = plan(str(clips), validation=3)
    assert codes(made) == {"validation": ["data.validation"]}
    assert "data.validation=3 of 3 clips leaves none to train on" in message(made)
    with pytest.raises(ValueError, match="leaves none"):
        require_usable(made, "quarantine")
    assert len(plan(str(clips), validation=2).train) == 1


# --- sources ----------------------------------------------------------------------------------------


def test_sources_are_mixed_and_counted(clips, many):
    made = plan(str(clips), {"path": str(many), "repeats": 3, "weight": 0.5}, validation=2, max_windows=2)
    first, second = made.sources
    assert (first.clips, first.usable, second.clips, second.usable) == (3, 3, 12, 12)
    assert (second.repeats, second.weight) == (3, 0.5)
    assert first.windows + second.windows == len(made.train)
    assert first.validation + second.validation == len(made.validation)
    assert second.seconds == pytest.approx(
        sum(made.probes[c.path].duration for c in made.clips if c.source == 1)
    )
    assert {w.clip.source for w in made.train} == {0, 1}


def test_sampler_of_a_plan_has_one_shape_per_batch(clips):
    made = plan(str(clips), {"path": str(clips), "repeats": 2}, frames=[5, 13])
    sampler = make_sampler(
        made.train, config.Data(sources=[str(clips), {"path": str(clips), "repeats": 2}]).sources, 2, 0
    )
    for k in range(len(sampler)):
        assert len({made.train[i].extent for i in sampler.batch(k)}) == 1
    shown = [made.train[i].clip.source for k in range(len(sampler)) for i in sampler.batch(k)]
    assert (shown.count(0), shown.count(1)) == (3, 6)


# --- the real files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "layout", "first"),
    [
        ({"path": "press"}, "folder", "A large metal cylinder is seen compressing colorful clay"),
        (
            {"path": "clips", "layout": "lines"},
            "lines",
            "A hiker standing at the top of a mountain, triumphantly, high",
        ),
        (
            {"path": "clips/metadata.csv"},
            "csv",
            'A hiker standing at the top of a mountain, triumphantly, "high quality"',
        ),
        (
            {"path": "clips", "layout": "csv"},
            "csv",
            'A hiker standing at the top of a mountain, triumphantly, "high',
        ),
        ({"path": "clips/train.jsonl"}, "jsonl", "A hiker standing at the top of a mountain"),
    ],
)
def test_real_layouts(media_root, source, layout, first):
    made = plan({**source, "path": str(media_root / source["path"])}, size=(480, 832), frames=[81])
    assert made.sources[0].layout == layout
    assert made.errors == []
    assert [w.extent for w in made.train] == [(81, 480, 832)] * 2
    assert made.clips[0].caption.startswith(first)
    assert made.train[0].read().std() > 10


def test_real_folder_with_all_layouts_is_ambiguous(media_root):
    text = message(plan(str(media_root / "clips")))
    assert all(
        n in text for n in ("prompts.txt and videos.txt", "metadata.csv", "train.jsonl", "Set `path` to")
    )


def test_real_images(media_root, tmp_path):
    for name in ("bedroom_rgb.png", "cartoon01_rgb.png", "bedroom_seg.png"):
        shutil.copy(media_root / "scenes" / name, tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    made = plan(str(tmp_path), size=(64, 64), frames=[1, 9])
    assert made.errors == []
    assert [w.read().shape for w in made.train] == [(1, 64, 64, 3)] * 3
