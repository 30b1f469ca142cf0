"""Properties of recipes: values are read back as written, and any text is a recipe or a bounded message."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inlaid import config
from inlaid.config import parse
from support.pages import schema

BASE = {
    "run": "runs/x",
    "model": {"family": "wan", "checkpoint": "some/where"},
    "data": {"sources": "clips", "frames": [1]},
}
SIGNS = "0123456789eExo_+-.:#'\"\\ \n,[]{}&*!|>%@`~nulltrueyosfi=<\t"
TEXTS = st.one_of(st.text(), st.text(SIGNS))
SCALARS = st.one_of(
    TEXTS, st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False)
)
KEYS = st.text(max_size=6).filter(lambda key: key != "<<")
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)
PATHS = sorted(f"{section}.{key}".lstrip(".") for section, keys in schema().items() for key in keys)
PROPERTY = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


@PROPERTY
@given(VALUES)
def test_what_is_dumped_is_parsed(value: Any) -> None:
    assert parse.parse(parse.dump({"key": value})) == {"key": value}


def outcome(action: Callable[[], config.Config]) -> tuple[config.Config | None, str]:
    """A recipe, or the message of its refusal, which is bounded and there within a second."""
    start, error = time.process_time(), ""
    made = None
    try:
        made = action()
    except ValueError as refusal:
        error = str(refusal)
        kind = type(refusal)
    assert time.process_time() - start < 1
    if made is None:
        assert kind is ValueError, "not an UnicodeError or a ValidationError of a library"
        assert 0 < len(error) < 5000
        assert "Traceback" not in error
    return made, error


def build(raw: Any, *overrides: str) -> config.Config | None:
    return outcome(lambda: config.build(raw, overrides))[0]


@PROPERTY
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_of_any_key_is_read_or_refused(path: str, value: Any) -> None:
    nested: Any = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    raw = parse.parse(parse.dump(config.merge(BASE, nested)))
    build(raw)


@PROPERTY
@given(st.sampled_from(PATHS), st.one_of(TEXTS, SCALARS.map(str)))
def test_any_override_is_read_or_refused(path: str, text: str) -> None:
    made = build(BASE, f"{path}={text}")
    if made is not None:
        assert config.Config.model_validate_json(made.model_dump_json()) == made


@PROPERTY
@given(TEXTS.filter(lambda text: text.strip() and text.strip()[0] not in "[{\"'" and text.isprintable()))
def test_a_plain_override_of_text_is_the_whole_text(text: str) -> None:
    made = build(BASE, f"data.trigger={text}")
    if made is not None:
        assert made.data.trigger == text.strip()
    else:
        assert text.strip().lower() in ("null", "~", "true", "false")


@PROPERTY
@given(st.one_of(st.binary(max_size=200), TEXTS.map(lambda t: t.encode("utf-8", "surrogatepass"))))
def test_any_file_is_read_or_refused(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    made, error = outcome(lambda: config.load(path))
    assert made is not None or str(path) in error


@PROPERTY
@given(st.sampled_from(PATHS), st.one_of(TEXTS, SCALARS.map(str)))
def test_a_saved_recipe_is_loaded_equal(tmp_path_factory: Any, path: str, text: str) -> None:
    made = build(BASE, f"{path}={text}")
    if made is not None:
        file: Path = tmp_path_factory.getbasetemp() / "saved.yaml"
        config.save(made, file)
        assert config.load(file) == made
