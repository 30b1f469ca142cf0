"""Captions and manifests as people have them: encodings, names, columns, lengths (edges.md, 2)."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inlaid import config
from inlaid.alpha.opening import build_family
from inlaid.check.scaffold import new_recipe
from inlaid.data.captions import caption_problem, clean, long_texts
from inlaid.data.plan import describe_plan, plan_dataset
from support import videos
from support.sources import GRID, SIZE, codes, message, plan

# --- captions that say nothing ------------------------------------------------------------------------------

INVISIBLE = {
    "null": "\0",
    "nulls and spaces": " \0 \0\n",
    "byte order mark": "\ufeff",
    "zero width": "\u200b\u200c\u200d\u2060",
    "marks": "\u200e\u202a\u202c",
    "soft hyphen": "\u00ad",
    "fillers": "\u3164\u2800\u115f",
    "variation selector": "\ufe0f",
    "escape": "\x1b",
    "wide space": "\u3000\u00a0",
}


@pytest.mark.parametrize("name", INVISIBLE)
@pytest.mark.parametrize("place", ["file", "csv", "jsonl", "lines", "mapping"])
def test_captions_of_invisible_characters_are_empty(clips, name, place):
    text = INVISIBLE[name]
    if place == "file":
        (clips / "a.txt").write_text(text, "utf-8")
        made = plan(str(clips))
    elif place == "lines":
        (clips / "prompts.txt").write_text(text.replace("\n", " ") + "\nb\n", "utf-8")
        (clips / "videos.txt").write_text("a.mp4\nc.mp4\n", "utf-8")
        made = plan({"path": str(clips), "layout": "lines"})
    else:
        file = clips / {"csv": "m.csv", "jsonl": "m.jsonl", "mapping": "m.json"}[place]
        rows = {
            "csv": f'video,caption\na.mp4,"{text}"\n',
            "jsonl": json.dumps({"video": "a.mp4", "caption": text}),
        }
        file.write_text(rows.get(place, json.dumps({"a.mp4": text})), "utf-8")
        made = plan(str(file))
    assert codes(made).get("empty-caption") == ["a.mp4"]
    assert all(w.clip.name != "a.mp4" for w in made.train)


@pytest.mark.parametrize("text", ["a\0b", "red \x1b[31m fox", "a\x9b5m", "half \ud800 pair"])
def test_captions_with_control_characters_are_named(clips, text):
    (clips / "m.json").write_text(json.dumps([{"video": "a.mp4", "caption": text}]))
    made = plan(str(clips / "m.json"))
    assert codes(made) == {"no-caption": ["a.mp4"]}
    shown = message(made)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in shown.replace("\n", ""))


def test_the_input_with_a_null(clips):
    (clips / "a.txt").write_bytes(b"a\0b")
    made = plan(str(clips))
    assert codes(made) == {"no-caption": ["a.mp4"]}
    assert "the character \\x00 in `a\\x00b`" in message(made)


def test_words_in_any_script_are_captions():
    for text in ("a", "犬", "🐕", "é", "a\u200db", "\ufeffword"):
        assert caption_problem(text) is None
    assert clean("\ufeffof  the\nsea") == "of the sea"
    assert clean("family 👨\u200d👩\u200d👧") == "family 👨\u200d👩\u200d👧"


# --- captions that say too much -----------------------------------------------------------------------------


class _Counts:
    """A family of which only the tokenizer matters; one token per word, and the end mark."""

    def __init__(self, most: int, known: bool = True) -> None:
        self.text_length, self.known, self.asked = most, known, 0

    def count_tokens(self, texts):
        self.asked += 1
        return [len(t.split()) + 1 for t in texts] if self.known else None


@pytest.mark.parametrize("most", [512, 226, 256])
def test_long_captions_are_counted(most):
    family = _Counts(most)
    fits, long = " ".join(["word"] * (most - 1)), " ".join(["word"] * most)
    found = long_texts(family, ["short", fits, long])
    assert found == {long: f"{most + 1} tokens, the model reads {most}: the end is cut off"}
    assert (
        long_texts(family, ["short"] * 9) == {} and family.asked == 1
    )  # nothing is loaded for short captions


def test_without_the_tokenizer_the_length_is_estimated():
    found = long_texts(_Counts(226, known=False), [" ".join(["word"] * 600)])
    assert list(found.values()) == ["about 780 tokens, the model reads 226: the end is cut off"]


@pytest.mark.parametrize(("name", "most"), [("wan", 512), ("cogvideox", 226), ("mochi", 256)])
def test_captions_longer_than_the_model_reads(clips, checkpoint, name, most):
    """With the real tokenizer of a checkpoint, in the plan of a run."""
    from inlaid.tiny import random

    variant = {"wan": "t2v", "cogvideox": "5b", "mochi": "t2v"}[name]
    raw = {"run": "x", "model": {**random.model(name, variant), "checkpoint": str(checkpoint(name, variant))}}
    settings = config.build({**raw, "data": {"sources": str(clips), "size": [32, 64], "frames": 1}})
    family = build_family(settings)
    (clips / "a.txt").write_text(" ".join(f"word{i}" for i in range(600)) + " ENDMARK")
    made = plan_dataset(
        config.Data(sources=[str(clips)], size=SIZE, frames=[9], validation=0), GRID, 16, 0, family=family
    )
    long = [p for p in made.problems if p.code == "long-caption"]
    assert [(p.name, p.severity) for p in long] == [("a.mp4", "warning")]
    count = int(long[0].message.split()[0])
    assert count > most and f"the model reads {most}" in long[0].message
    text = "\n".join(describe_plan(long, 3))
    assert "1 of 3 clips has a caption that is too long (a.mp4:" in text
    assert long_texts(family, ["short", (clips / "a.txt").read_text()])  # prompts go the same way


# --- names --------------------------------------------------------------------------------------------------


def test_capital_suffixes(clips):
    (clips / "a.mp4").rename(clips / "A.MP4")
    (clips / "a.txt").rename(clips / "A.TXT")
    made = plan(str(clips))
    assert made.problems == [] and {c.name: c.caption for c in made.clips}["A.MP4"] == "caption a"


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_in_other_normal_forms(clips, forms):
    video, text = (unicodedata.normalize(f, "caf\u00e9") for f in forms)
    (clips / "a.mp4").rename(clips / f"{video}.mp4")
    (clips / "a.txt").rename(clips / f"{text}.txt")
    made = plan(str(clips))
    assert codes(made) == {} and {c.caption for c in made.clips} >= {"caption a"}
    (clips / "m.csv").write_text(f"video,caption\n{text}.mp4,x\n", "utf-8")
    made = plan(str(clips / "m.csv"))
    assert [c.caption for c in made.clips] == ["x"] and made.problems == []


def test_folders_in_other_normal_forms(clips):
    (clips / unicodedata.normalize("NFD", "m\u00fcller")).mkdir()
    shutil.move(clips / "a.mp4", clips / unicodedata.normalize("NFD", "m\u00fcller") / "a.mp4")
    (clips / "m.json").write_text(json.dumps({"m\u00fcller/a.mp4": "x"}))
    assert plan(str(clips / "m.json")).problems == []


def test_absolute_paths_inside_the_root_are_read(clips, tmp_path):
    (tmp_path / "link").symlink_to(clips)
    for path in (clips / "a.mp4", tmp_path / "link" / "a.mp4", clips / "x" / ".." / "a.mp4"):
        (clips / "m.jsonl").write_text(json.dumps({"video": str(path), "caption": "x"}))
        made = plan(str(clips / "m.jsonl"))
        assert [c.name for c in made.clips] == ["a.mp4"] and made.problems == []
    (clips / "m.jsonl").write_text(json.dumps({"video": str(tmp_path / "else.mp4"), "caption": "x"}))
    assert codes(plan(str(clips / "m.jsonl"))) == {"outside": [str(tmp_path / "else.mp4")]}


def test_paths_of_windows(clips):
    (clips / "sub").mkdir()
    shutil.move(clips / "a.mp4", clips / "sub" / "a.mp4")
    (clips / "m.json").write_text(json.dumps([{"video": "sub\\a.mp4", "caption": "x"}]))
    made = plan(str(clips / "m.json"))
    assert [c.name for c in made.clips] == ["sub/a.mp4"] and made.problems == []


# --- encodings and tables -----------------------------------------------------------------------------------

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(clips, encoding):
    words = "a fox in the caf\u00e9, running"
    (clips / "a.txt").write_bytes(words.encode(encoding))
    (clips / "m.csv").write_bytes(f'video,caption\r\na.mp4,"{words}"\r\n'.encode(encoding))
    (clips / "m.json").write_bytes(json.dumps({"a.mp4": words}, ensure_ascii=False).encode(encoding))
    captions = {c.name: c.caption for c in plan({"path": str(clips), "layout": "folder"}).clips}
    assert captions["a.mp4"] == words
    for name in ("m.csv", "m.json"):
        made = plan(str(clips / name))
        assert [c.caption for c in made.clips] == [words] and made.problems == []


def test_line_lists_in_utf_16(clips):
    (clips / "prompts.txt").write_bytes("one ü\ntwo\n".encode("utf-16"))
    (clips / "videos.txt").write_bytes("a.mp4\nc.mp4\n".encode("utf-16"))
    made = plan({"path": str(clips), "layout": "lines"})
    assert [c.caption for c in made.clips] == ["one ü", "two"]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "header", ["video{}caption", "Video{}Caption", "id{} VIDEO {}PROMPT", "video_path{}text"]
)
def test_delimiters_and_headers(clips, mark, header):
    names = header.replace("{}", mark)
    first = f"7{mark}" if header.startswith("id") else ""
    (clips / "m.csv").write_text(f'{names}\n{first}a.mp4{mark}"one, two; three"\n{first}c.mp4{mark}four\n')
    made = plan(str(clips / "m.csv"))
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "one, two; three"), ("c.mp4", "four")]
    assert made.problems == []


def test_a_tsv(clips):
    (clips / "m.tsv").write_text("file name\tcaption\na.mp4\tone, two\n")
    made = plan({"path": str(clips), "layout": "csv"})
    assert [c.caption for c in made.clips] == ["one, two"]


def test_an_exact_column_precedes_one_in_other_case(clips):
    (clips / "m.csv").write_text("VIDEO,video,Caption,caption\nno.mp4,a.mp4,wrong,right\n")
    made = plan(str(clips / "m.csv"))
    assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "right")]
    assert plan({"path": str(clips / "m.csv"), "caption_column": "CAPTION"}).clips[0].caption == "wrong"


def test_captions_by_name(clips):
    """`{name: caption}`, with and without suffix, and objects by name."""
    for content in (
        {"a.mp4": "one", "c.mp4": "two"},
        {"a": "one", "c": "two"},
        {"a.mp4": {"caption": "one"}, "c.mp4": {"caption": "two", "fps": 8}},
    ):
        (clips / "m.json").write_text(json.dumps(content))
        made = plan(str(clips / "m.json"))
        assert [(c.name, c.caption) for c in made.clips] == [("a.mp4", "one"), ("c.mp4", "two")]
        assert made.problems == []


def test_a_key_that_is_there_twice(clips):
    (clips / "m.json").write_text('{"a.mp4": "one", "a.mp4": "two"}')
    assert "has the key `a.mp4` twice" in message(plan(str(clips / "m.json")))


def test_a_field_that_is_too_long(clips):
    (clips / "m.csv").write_text("video,caption\nc.mp4,x\na.mp4," + "y" * 131_073 + "\n")
    said = message(plan(str(clips / "m.csv")))
    assert (
        "m.csv: a field of more than 131,072 characters starts in line 3: look for an unclosed quote" in said
    )
    (clips / "m.csv").write_text('video,caption\na.mp4,"' + "lost quote\n" * 20_000)
    assert "starts in line 2" in message(plan(str(clips / "m.csv")))
    (clips / "m.csv").write_text("video,caption\nc.mp4," + "y" * 131_000 + "\n")
    assert codes(plan(str(clips / "m.csv"))) == {}


# --- folders ------------------------------------------------------------------------------------------------


def frames(
    folder: Path, name: str = "shot_014.{}.png", count: int = 12, first: int = 1001, alpha=None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        pixels = videos.numbered(k, SIZE)
        if alpha is not None:
            pixels = np.concatenate([pixels, np.full((*SIZE, 1), alpha, np.uint8)], -1)
        Image.fromarray(pixels).save(folder / name.format(first + k))


@pytest.mark.parametrize(
    "where", ["shot_014.txt", "shot_014.TXT", "shot_014/shot_014.txt", "shot_014/caption.txt"]
)
def test_an_image_sequence_is_one_clip(tmp_path, where):
    frames(tmp_path / "d" / "shot_014")
    (tmp_path / "d" / where).write_text("a shot")
    made = plan(str(tmp_path / "d"))
    assert [(c.name, c.caption, c.kind) for c in made.clips] == [("shot_014", "a shot", "frames")]
    assert codes(made) == {} and made.probes[made.clips[0].path].frames == 12
    assert videos.numbers(made.train[0].read()) == list(range(1, 10))


def test_sequences_by_other_names(tmp_path):
    for folder, name in (("x", "{}.png"), ("y", "frame_{}.jpg"), ("z", "Image{}.PNG")):
        frames(tmp_path / "d" / folder, name, first=ord(folder) * 10, count=10 + ord(folder) % 7)
        (tmp_path / "d" / f"{folder}.txt").write_text(folder)
    made = plan(str(tmp_path / "d"))
    assert [c.name for c in made.clips] == ["x", "y", "z"] and codes(made) == {}


def test_photos_are_no_sequence(tmp_path):
    frames(tmp_path / "d" / "photos", "IMG_{}.jpg", 3)
    assert codes(plan(str(tmp_path / "d"), frames=[1]))["no-caption"] == [
        f"photos/IMG_{n}.jpg" for n in (1001, 1002, 1003)
    ]
    for image in list((tmp_path / "d" / "photos").iterdir()):
        image.with_suffix(".txt").write_text(image.stem)
    made = plan(str(tmp_path / "d"), frames=[1])
    assert len(made.train) == 3 and codes(made) == {}


def test_a_sequence_in_a_manifest_with_alpha_and_gaps(tmp_path):
    frames(tmp_path / "d" / "s", alpha=128)
    (tmp_path / "d" / "s" / "shot_014.1005.png").unlink()
    (tmp_path / "d" / "m.jsonl").write_text(json.dumps({"video": "s", "caption": "x"}))
    made = plan(str(tmp_path / "d" / "m.jsonl"))
    assert codes(made) == {"gaps": ["s"], "transparent": ["s"]}
    assert "1 of 12 frame numbers" in made.problems[0].message
    top_left = made.train[0].read()[0]
    assert top_left.min() >= 120  # over white


def test_new_sees_a_sequence_as_one_clip(tmp_path, monkeypatch, tiny_wan):
    monkeypatch.chdir(tmp_path)
    for shot in ("shot_014", "shot_015"):
        frames(Path("d") / shot, shot + ".{}.png", 33)
        Path("d", f"{shot}.txt").write_text(f"about {shot}")
    text = new_recipe("wan", Path("d"), None, str(tiny_wan)).read_text()
    assert "2 clips in folder layout" in text and "about shot_014" in text


def test_a_folder_named_like_a_clip_is_named(clips):
    (clips / "b.mp4").mkdir()
    (clips / "b.txt").write_text("b")
    (clips / "z.mov").mkdir()
    made = plan(str(clips))
    assert codes(made) == {"unreadable": ["b.mp4", "z.mov"]}
    assert "b.mp4: is a folder, not a file" in message(made)


def test_linked_folders_are_followed_inside_the_root(clips, tmp_path):
    (clips / "deep").mkdir()
    for name in ("a.mp4", "a.txt"):
        shutil.move(clips / name, clips / "deep" / name)
    (clips / "link").symlink_to("deep")
    (clips / "deep" / "loop").symlink_to("..")
    made = plan(str(clips))
    assert {c.name for c in made.clips} == {"b.final.mp4", "c.mp4", "deep/a.mp4"}
    assert codes(made) == {}, "a folder is entered once"


def test_linked_folders_outside_are_named(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "other")
    (clips / "link").symlink_to(tmp_path / "other")
    made = plan(str(clips))
    assert codes(made) == {"outside": ["link"]}
    assert "copy the files into the source, or set `path` or `root`" in message(made)
    assert str(tmp_path / "other") in message(made)


def test_files_that_would_block(clips):
    os.mkfifo(clips / "pipe.mp4")
    (clips / "pipe.txt").write_text("x")
    os.mkfifo(clips / "b.final.mkv")
    made = plan(str(clips))
    assert codes(made)["unreadable"] == ["b.final.mkv", "pipe.mp4"] or set(codes(made)) == {"unreadable"}
    assert "is not a regular file" in message(made)
