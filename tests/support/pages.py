"""What the pages of the documentation are made of."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlaid import config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BASE = {
    "run": "runs/any",
    "model": {"family": "wan", "checkpoint": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
    "data": {"sources": "data/any"},
}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    mark: str
    text: str
    quick: tuple[tuple[str, str], ...]


def blocks(text: str) -> Iterator[Block]:
    comment = r"(?:<!-- quick: (?P<quick>.+?) -->\s*)?"
    fence = r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$"
    for found in re.finditer(comment + fence, text, re.MULTILINE | re.DOTALL):
        language, _, mark = found["info"].partition(" ")
        pairs = (pair.split(" -> ") for pair in (found["quick"] or "").split("; ") if pair)
        yield Block(language, mark, found["text"], tuple((old, new) for old, new in pairs))


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^(`{3,})[^\n`]*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline(text: str) -> set[str]:
    """What stands in backticks."""
    return {" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))}


def schema() -> dict[str, set[str]]:
    """Keys of each section."""
    fields = config.Config.model_fields
    sections = {name: {*getattr(field.annotation, "model_fields", {})} for name, field in fields.items()}
    sections["tuner"] = {*config.LowRank.model_fields, *config.Full.model_fields}
    return {name: keys for name, keys in sections.items() if keys}


def script(name: str) -> Any:
    """A script of the docs, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path, heading: str = "") -> list[list[str]]:
    """Cells of the tables under a heading, without header rows."""
    text = path.read_text("utf-8")
    if heading:
        start = re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
        assert start, f"{path.name} has no heading {heading!r}"
        text = re.split(r"^#+ ", text[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("|-: ")]
    body = [line for i, line in enumerate(lines) if i not in rules and i + 1 not in rules]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def named(path: Path, heading: str) -> set[str]:
    """What stands in backticks in the first column."""
    return {name for row in rows(path, heading) for name in re.findall("`(.+?)`", row[0])}
