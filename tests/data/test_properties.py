"""Properties of readers by `hypothesis`: any manifest, header or array is read or refused in one sentence."""

from __future__ import annotations

import csv
import io
import json
import struct
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inlaid import config
from inlaid.adapters.read import read_adapter
from inlaid.data.captions import caption_problem, clean
from inlaid.data.layouts import Found, find_clips
from inlaid.families.wan import Wan
from inlaid.limits import nesting
from inlaid.media import meshes
from inlaid.media.arrays import load_array, probe_array
from inlaid.paths import Root
from inlaid.reading import FileError, _outside_strings, parse_json
from inlaid.text import decode_text, is_blank, printable

few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=30)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def find(name: str, content: bytes) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.mp4").write_bytes(b"not decoded here")
        (Path(folder) / name).write_bytes(content)
        return find_clips(config.Source(path=str(Path(folder) / name)), 0, None, 3)


def sound(found: Found) -> None:
    assert found.count >= len(found.clips)
    for problem in found.problems:
        shown = f"{problem.name}{problem.message}"
        assert not any(
            ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in shown.replace("\n", "").replace("\t", "")
        )
    for clip in found.clips:
        assert clip.path.name == "a.mp4" and clip.caption == clean(clip.caption)


@few
@given(st.binary(max_size=300), st.sampled_from(["m.csv", "m.tsv", "m.json", "m.jsonl"]))
def test_any_bytes_as_a_manifest(raw, name):
    sound(find(name, raw))


@few
@given(anything, st.sampled_from(["m.json", "m.jsonl"]))
def test_any_json_as_a_manifest(value, name):
    sound(find(name, json.dumps(value).encode()))


@few
@given(
    st.lists(st.fixed_dictionaries({"video": anything | st.just("a.mp4"), "caption": anything}), max_size=4)
)
def test_any_rows_as_a_manifest(rows):
    found = find("m.json", json.dumps(rows).encode())
    sound(found)
    assert not rows or found.count == len(rows) or any(p.code == "layout" for p in found.problems)


@few
@given(
    words, st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])
)
def test_captions_survive_every_table(text, mark, encoding):
    out = io.StringIO()
    rows = [["video", "caption"], ["a.mp4", text]]
    csv.writer(out, delimiter=mark, quoting=csv.QUOTE_ALL).writerows(rows)
    table = find("m.csv", out.getvalue().encode(encoding))
    objects = find("m.json", json.dumps({"a.mp4": text}, ensure_ascii=False).encode(encoding))
    for found in (table, objects):
        assert [c.caption for c in found.clips] == [clean(text)]
        assert bool(found.problems) == is_blank(text)


@few
@given(st.text(max_size=60))
def test_captions_are_clean_or_named(text):
    problem = caption_problem(text)
    if problem is None:
        assert clean(text) and clean(clean(text)) == clean(text) and not is_blank(clean(text))
    assert "\x1b" not in str(problem) and printable(printable(text)) == printable(text)


@few
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\r\n\t"), max_size=100))
def test_text_is_decoded_as_written(text):
    text = text.encode("utf-8", "replace").decode()
    plain = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert decode_text(text.encode(encoding)).removeprefix("\ufeff") == plain.removeprefix("\ufeff")


@few
@given(
    st.lists(
        st.sampled_from(["..", ".", "a", "b", "link", "out", "\u00e9", "e\u0301", "\\", "/"]), max_size=6
    )
)
def test_no_path_leads_out(parts):
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        (root / "a" / "b").mkdir(parents=True)
        (root / "link").symlink_to("a")
        (root / "a" / "out").symlink_to(place)
        (root / unicodedata.normalize("NFD", "\u00e9")).mkdir()
        try:
            found = Root(root).named("/".join(parts))
        except FileError:
            return
        assert found.resolve().is_relative_to(root.resolve())


@few
@given(anything)
def test_depth_is_measured(value):
    text = json.dumps(value)

    def depth(v: object) -> int:
        inner = list(v.values()) if isinstance(v, dict) else v if isinstance(v, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert nesting(_outside_strings(text)) == depth(value)
    assert json.dumps(parse_json(text)) == text


# --- arrays and adapters ------------------------------------------------------------------------------------

sizes = st.integers(-3, 70) | st.sampled_from([2**31, 2**62, 10**12])


@few
@given(
    st.lists(sizes, max_size=5),
    st.sampled_from(["|u1", "<f4", "|O", "<U9", "|b1", "<c16", "<M8[s]"]),
    st.booleans(),
    st.integers(0, 4000),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_any_array_header(shape, kind, fortran, available, how):
    head = f"{{'descr': '{kind}', 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    raw = b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + b"\x05" * available
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        with zipfile.ZipFile(path, "w", how) as archive:
            archive.writestr("frames.npy", raw)
            archive.writestr("surface_points.npy", raw)
        try:
            probe = probe_array(path, (4, 3))
            frames, _ = load_array(path, (4, 3))
            assert len(frames) == probe.frames and frames[0].shape[:2] == (probe.height, probe.width)
            assert all(np.all(frames[i] == 5) for i in range(len(frames)))
        except FileError as error:
            assert str(path) in str(error)
        for content in (path.read_bytes(), raw):
            (Path(folder) / "s.npy").write_bytes(content)
            with pytest.raises(FileError):  # points that are all equal are no surface
                meshes.read_surface(Path(folder) / "s.npy")


@few
@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "alpha_pattern", "peft_type", "use_dora", "target_modules", "x"]),
        anything,
        max_size=4,
    )
    | anything,
    st.lists(st.sampled_from(["blocks.0.attn1.to_q", "x", "..", "\x1b"]), max_size=3),
)
def test_any_adapter_header(values, names):
    tensors, at = {}, 0
    for name in dict.fromkeys(names):
        for part in "AB":
            key = f"transformer.{name}.lora_{part}.weight"
            tensors[key] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [at, at + 16]}
            at += 16
    head = json.dumps({"__metadata__": {"lora_adapter_metadata": json.dumps(values)}, **tensors}).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(head)) + head + struct.pack("<f", 0.5) * (at // 4))
        try:
            assert all(np.isfinite(a) for a in read_adapter(path, Wan).alpha.values())
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 2000
