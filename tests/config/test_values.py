"""Recipes are read as meant, or refused with the cause, in under a second."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from inlaid import config
from inlaid.config import parse

BASE = {
    "run": "runs/x",
    "model": {"family": "wan", "checkpoint": "some/where"},
    "data": {"sources": "clips", "frames": [1]},
}
TEXT = "run: runs/x\nmodel: {family: wan, checkpoint: some/where}\n"


def at(made: Any, key: str) -> Any:
    for part in key.split("."):
        made = made[int(part)] if isinstance(made, list) else getattr(made, part)
    return made


def loaded(path: Path, text: str | bytes) -> config.Config:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    start = time.process_time()
    try:
        return config.load(path)
    finally:
        assert time.process_time() - start < 1


MEANT = [
    ("run=runs/test #2", "run", "runs/test #2"),
    ("run=007", "run", "007"),
    ("run=1e3", "run", "1e3"),
    ("run=C:\\new\\table", "run", "C:\\new\\table"),
    ("run=on", "run", "on"),
    ("run=2024-01-01", "run", "2024-01-01"),
    ("data.trigger=sks: dog", "data.trigger", "sks: dog"),
    ("data.trigger=*star @home", "data.trigger", "*star @home"),
    ("data.trigger='it''s'", "data.trigger", "it's"),
    ("data.sources=2024", "data.sources.0.path", "2024"),
    ("data.sources=[2024, 'b #2']", "data.sources.1.path", "b #2"),
    ("data.aspects=[16:9, 9:16, 2.35:1]", "data.aspects", ["16:9", "9:16", "2.35:1"]),
    ("data.frames=[5, 1, 5]", "data.frames", [1, 5]),
    ("data.frames=[]", "data.frames", None),
    ("seed=010", "seed", 10),
    ("seed=0x10", "seed", 16),
    ("seed=1_000", "seed", 1000),
    ("train.steps=1e3", "train.steps", 1000),
    ("train.steps=2.", "train.steps", 2),
    ("optim.lr=1e-4", "optim.lr", 1e-4),
    ("optim.lr=.5", "optim.lr", 0.5),
    ("optim.clip=null", "optim.clip", None),
    ("optim.clip=~", "optim.clip", None),
    ("optim.clip=", "optim.clip", None),
    ("model.revision=123e4567", "model.revision", "123e4567"),
    ("memory.offload_optimizer=off", "memory.offload_optimizer", False),
    ("memory.gradient_checkpointing=no", "memory.gradient_checkpointing", False),
    ("data.matte.premultiplied=yes", "data.matte.premultiplied", True),
    ("tuner.targets=[blocks\\.\\d+\\.attn1\\.to_q]", "tuner.targets", [r"blocks\.\d+\.attn1\.to_q"]),
    (
        "model.options={text: short, n: 1e3, flag: true}",
        "model.options",
        {"text": "short", "n": 1000.0, "flag": True},
    ),
    ("sample.prompts=[7, null-ish, on]", "sample.prompts", ["7", "null-ish", "on"]),
    ("sample=", "sample.steps", 30),
    ("rgba_vae=", "rgba_vae.rank", 128),
    ("sample.prompts=", "sample.prompts", []),
]


@pytest.mark.parametrize(
    ("override", "key", "value"), [m for m in MEANT if m[2] is not None or "clip" in m[0]]
)
def test_an_override_is_read_as_meant(override: str, key: str, value: Any) -> None:
    found = at(config.build(BASE, [override]), key)
    assert found == value
    assert type(found) in (int, float, str, bool, list, dict, type(None))


REFUSED = [
    ("optim.lr=true", "optim.lr: should be a number (got true)"),
    ("train.steps=false", "train.steps: should be a number (got false)"),
    ("data.frames=[true]", "data.frames.0: should be a number (got true)"),
    ("optim.betas=[true, 0.9]", "optim.betas.0: should be a number"),
    ("train.steps=1.5", "train.steps: should be a valid integer"),
    ("train.batch=", "train.batch: is empty: set a value, or remove the key"),
    ("run=", "run: is empty"),
    ("data.trigger=true", "data.trigger: should be a valid string (got true); put it in quotes"),
    ("optim.clip=off", "optim.clip: write null for no value (got 'off')"),
    ("optim.ema=None", "optim.ema: write null for no value (got 'None')"),
    ("memory.quantize=none", "memory.quantize: write null for no value (got 'none')"),
    ("data.cache=None", "data.cache: write null for no value"),
    ("seed=1e30", "seed: should be less than 9223372036854775808 (got 1e30)"),
    (f"seed={10**30}", "seed: should be less than 9223372036854775808"),
    ("optim.lr=1e-4 # higher", "optim.lr: should be a valid number"),
    ("data.sources=[a #1, b]", "` #` starts a comment in YAML: put the text in quotes"),
    ("data.sources=[a] # b", "`# b` follows the value: put all of it in quotes"),
    ('tuner.targets=["blocks\\.\\d+"]', "use single quotes for regular expressions"),
    ('tuner.targets=["\\bto_q"]', "tuner.targets.0: contains the control character '\\x08'"),
    ('run="C:\\new"', "run: contains the control character '\\n'"),
    ("optim={lr:1e-4}", "optim.lr:1e-4: unknown key; write a space after the colon"),
    ("data.frames=[81, abc]", "data.frames.1: should be a valid integer"),
    ("data.frames=[[1]]", "data.frames.0"),
    ("data.aspects=[²:1]", "data.aspects: `²:1` is not an aspect ratio"),
    (f"data.aspects=[{'9' * 400}:1]", "is not an aspect ratio"),
    ("data.frames=[]", "needs at least one length"),
    (".".join("a" * 5000) + "=1", "unknown key"),
    ("x" * 100_000, "is not an override"),
    ("model.family=" + "x" * 100_000, "no family `xxx"),
    ("run=" + "[" * 3000, "the value is not valid YAML"),
    ("data.trigger=[" + "a, " * 30_000 + "]", "data.trigger: should be a valid string"),
]


@pytest.mark.parametrize(("override", "words"), REFUSED, ids=[r[0][:40] for r in REFUSED])
def test_an_override_is_refused_with_the_cause(override: str, words: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        config.build(BASE, [override])
    assert time.process_time() - start < 1
    assert words in str(error.value)
    assert len(str(error.value)) < 3000


EMPTY = """
sample:
  # every: 100
train:
data:
  sources: clips
  aspects:
  frames:
  matte:
tuner:
  kind: dora
  targets:
"""


def test_empty_sections_and_lists_have_their_defaults(tmp_path: Path) -> None:
    made = loaded(tmp_path / "r.yaml", TEXT + EMPTY)
    assert made.tuner.kind == "dora"
    assert made.tuner.targets == []
    assert made.data.frames == config.build(BASE | {"data": {"sources": "clips"}}).data.frames
    assert made.sample == config.build(BASE).sample  # with the defaults of the family
    assert made.rgba_vae is None


def test_an_empty_rgba_vae_section_trains_an_rgba_vae_and_null_does_not(tmp_path: Path) -> None:
    data = "data: {sources: clips}\n"
    assert loaded(tmp_path / "a.yaml", f"{TEXT}{data}rgba_vae:\n").rgba_vae == config.RgbaVae()
    assert loaded(tmp_path / "b.yaml", f"{TEXT}{data}rgba_vae: null\n").rgba_vae is None


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le-mark", "utf-16-be-mark"]
)
def test_encodings_with_a_mark(tmp_path: Path, encoding: str) -> None:
    text = TEXT + "data: {sources: clips, trigger: größe}\r\n"
    mark = "\ufeff" if encoding.endswith("-mark") else ""
    made = loaded(tmp_path / "r.yaml", (mark + text).encode(encoding.removesuffix("-mark")))
    assert made.data.trigger == "größe"


def bomb(first: str, level: str, n: int = 20) -> str:
    return first + "\n".join(
        level.format(i=i, j=i - 1, nine=", ".join([f"*a{i - 1}"] * 9)) for i in range(1, n)
    )


FILES: dict[str, tuple[str | bytes, str]] = {
    "aliases in lists": (
        bomb("a0: &a0 [x, x]\n", "a{i}: &a{i} [{nine}]"),
        "too many values, with aliases expanded, above the limit of 50,000",
    ),
    "aliases in mappings": (
        bomb("a0: &a0 {x: 1}\n", "a{i}: &a{i} {{b: *a{j}, c: *a{j}, d: *a{j}, e: *a{j}}}"),
        "too many values, with aliases expanded, above the limit of 50,000",
    ),
    "a small bomb": ("run: &a [x, x, x]\nmodel: [*a, *a]\ndata: {sources: *a}", "mistakes"),
    "an alias in itself": ("a: &a [*a]", "alias `*a` contains itself"),
    "no such alias": ("a: *b", "undefined alias `*b`"),
    "brackets": ("a: " + "[" * 3000, "nested lists or mappings"),
    "braces": ("{a: " * 3000, "nested lists or mappings"),
    "dashes": ("- " * 3000, "nested lists or mappings"),
    "indentation": ("\n".join(" " * i + "a:" for i in range(500)), "nested lists or mappings"),
    "a huge file": (
        b"# " + b"x" * 3_000_000,
        "not a recipe, the file is large, above the limit of 2: set INLAID_MAX_RECIPE_MB",
    ),
    "many values": (
        "run:\n" + "- a\n" * 100_000,
        "too many values, with aliases expanded, above the limit of 50,000",
    ),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(20_000)), "and 19,983 more"),
    "a huge text": ("run: x\nmodel: " + "y" * 1_000_000, "model: needs a mapping"),
    "a huge key": ("run: x\n? " + "y" * 1_000_000 + "\n: 1", "yyyy: unknown key"),
    "a huge number": (TEXT + "seed: " + "9" * 100_000, "seed: Unable to parse"),
    "a tab": ("run: x\nmodel:\n\tfamily: wan", "line 3, column 1: a tab (`'\\t'`): indent with spaces"),
    "duplicate keys": (
        "run: x\ntrain: {steps: 1, steps: 2}",
        "line 2, column 19: duplicate key `steps`; keep one",
    ),
    "duplicates of two kinds": ("1: a\n'1': b", "duplicate key `1`"),
    "a regular expression": ('tuner: {targets: ["\\d+"]}', "use single quotes for regular expressions"),
    "two documents": ("run: x\n---\nrun: y", "line 2, column 1: a second document starts"),
    "a tag": ("run: !!python/object:os.system x", "tag `tag:yaml.org,2002:python/object:os.system`"),
    "text with a colon": ("run: a: b", "put text that contains `: ` in quotes"),
    "a prompt with a colon": (
        TEXT + "data: {sources: x}\nsample:\n  prompts:\n    - a cat: sitting",
        "sample.prompts.0: should be a valid string (got {'a cat': 'sitting'}); put text that contains `: `",
    ),
    "text with a sign": ("run: @home", "a value cannot start with '@': put the text in quotes"),
    "no space": ("run: x\ntrain:\n  steps:5\n", "(got 'steps:5'); write a space after the colon"),
    "a list as key": ("? [a]\n: b", "a key must be text"),
    "Latin-1": (
        "run: x\ndata: größe".encode("latin-1"),
        "the file is not UTF-8 text (line 2); save it as UTF-8",
    ),
    "UTF-16 without a mark": ("run: x".encode("utf-16-le"), "contains NUL characters; save it as UTF-8"),
    "a control character": ("run: a\x01", "control character U+0001"),
    "an escaped NUL": (TEXT + 'data: {sources: "a\\0b"}', "control character"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused_with_the_cause(tmp_path: Path, case: str) -> None:
    text, words = FILES[case]
    with pytest.raises(ValueError) as error:
        loaded(tmp_path / "r.yaml", text)
    message = str(error.value)
    assert words in message
    assert message.startswith(str(tmp_path / "r.yaml"))
    assert len(message) < 5000
    assert all(c.isprintable() or c == "\n" for c in message)


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    text = "data:\n  sources:\n  - &a {path: x, repeats: 2}\n  - {<<: *a, path: y}\n"
    sources = loaded(tmp_path / "r.yaml", TEXT + text).data.sources
    assert [(s.path, s.repeats) for s in sources] == [("x", 2), ("y", 2)]


def test_the_parser_without_libyaml_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: [16:9, 010, 1e3, on, 'x', \"\\t\", null, ~, .inf]\nb: {c: , d: &x {e: 1}, f: *x}\n"
    fast = parse.parse(text)
    monkeypatch.setattr(parse, "_PARSER", yaml.SafeLoader)
    assert parse.parse(text) == fast
    for hostile in ("[" * 3000, "{a: " * 3000, "- " * 3000):
        start = time.process_time()
        with pytest.raises(ValueError, match="nested"):
            parse.parse(hostile)
        assert time.process_time() - start < 1


def test_texts_that_yaml_reads_otherwise_survive_saving(tmp_path: Path) -> None:
    texts = [
        "1e3",
        "010",
        "16:9",
        "yes",
        "null",
        "0o7",
        "a\u2028b",
        "\x85",
        "a # b",
        "- a",
        "a: b",
        "'",
        '"',
        "=",
        "<<",
    ]
    made = config.build(BASE | {"sample": {"prompts": [f"x{t}" for t in texts] + texts[:6]}, "run": "1e3"})
    config.save(made, tmp_path / "r.yaml")
    assert config.load(tmp_path / "r.yaml") == made


def test_shared_modules_are_no_families() -> None:
    from inlaid import families

    assert set(families.names()) >= {"cogvideox", "midi", "mochi", "wan"}
    for name in families.names():
        assert issubclass(families.get(name), families.Family)
