"""Finding clips in every layout, every problem of a clip, windows, buckets and what is held out."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from inlaid import config
from inlaid.data.sampler import make_sampler
from support import videos
from support.slow import slow
from support.sources import SIZE, codes, message, plan


def test_looking_at_data_needs_no_torch():
    code = "import sys, inlaid.data, inlaid.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- layouts ------------------------------------------------------------------------------------------------


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


def test_lines_by_names_that_are_given(clips):
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
        ({}, "has none of the columns video, file_name, file, path, image, frames_path, video_path"),
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


# --- paths --------------------------------------------------------------------------------------------------


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
    (clips.parent / "other.txt").write_text("secret")
    (clips / "a.txt").unlink()
    (clips / "a.txt").symlink_to(clips.parent / "other.txt")
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


# --- sources ------------------------------------------------------------------------------------------------


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


# --- the real files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "layout", "first"),
    [
        slow({"path": "press"}, "folder", "A large metal cylinder is seen compressing colorful clay"),
        slow(
            {"path": "clips", "layout": "lines"},
            "lines",
            "A hiker standing at the top of a mountain, triumphantly, high",
        ),
        (
            {"path": "clips/metadata.csv"},
            "csv",
            'A hiker standing at the top of a mountain, triumphantly, "high quality"',
        ),
        slow(
            {"path": "clips", "layout": "csv"},
            "csv",
            'A hiker standing at the top of a mountain, triumphantly, "high',
        ),
        slow({"path": "clips/train.jsonl"}, "jsonl", "A hiker standing at the top of a mountain"),
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
