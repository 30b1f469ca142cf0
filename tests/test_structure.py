"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import inlaid

SOURCE = Path(inlaid.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def definitions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield f"{file.relative_to(SOURCE)}:{node.lineno} {node.name}", node


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def test_nothing_is_too_long_to_read() -> None:
    long = [n for n, d in definitions() if length(d) > (300 if isinstance(d, ast.ClassDef) else 90)]
    assert long == []
    loop = next(d for n, d in definitions() if n.startswith("train.py") and d.name == "train")
    assert length(loop) < 70


def test_only_families_know_families() -> None:
    named = re.compile(r"family\s*(==|!=|in\b)\s*[\"'(\[]|isinstance\([^)]*\bWan\b")
    outside = [f for f in FILES if "families" not in f.parts and "twins" not in f.parts]
    assert [str(f) for f in outside if named.search(f.read_text("utf-8"))] == []


def test_no_pickle_is_written_and_none_is_read_unguarded() -> None:
    for file in FILES:
        text = file.read_text("utf-8")
        assert "torch.save(" not in text, file
        assert "import pickle" not in text, file
        for call in re.findall(r"torch\.load\(([^)]*)\)", text):
            assert "weights_only=True" in call, file
        for call in re.findall(r"np\.load\(([^)]*)\)", text):
            assert "allow_pickle=True" not in call, file


@pytest.mark.parametrize("module", ["inlaid", "inlaid.cli", "inlaid.config", "inlaid.media", "inlaid.data"])
def test_help_and_data_need_no_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers")
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_lazy_and_complete() -> None:
    assert sorted(inlaid.__all__) == ["Config", "evaluate", "generate", "load", "train"]
    assert all(callable(getattr(inlaid, name)) for name in inlaid.__all__)
    with pytest.raises(ValueError, match="no such recipe"):
        inlaid.load("nowhere.yaml")
    for first in ("import inlaid", "import inlaid.generate", "from inlaid import generate"):
        code = (
            f"{first}; import inlaid\ntry: inlaid.generate('nowhere', ['x'])\nexcept ValueError as e: print(e)"
        )
        said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        assert "not a run folder" in said
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        _ = inlaid.nothing


def test_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert inlaid.__version__ == version("inlaid")
