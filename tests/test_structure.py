"""House rules that a machine can check: sizes, layers, words."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import inlaid

ROOT = Path(__file__).parent.parent
SOURCE = Path(inlaid.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


@cache
def picture() -> Any:
    """The script that draws the imports, as a module."""
    spec = importlib.util.spec_from_file_location("docs_imports", ROOT / "docs/imports.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def definitions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    return [
        (f"{file.relative_to(SOURCE)}:{node.lineno} {node.name}", node)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other (strongly connected, by reachability)."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, stack = set(), [start]
        while stack:
            for following in graph.get(stack.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in graph if a in reach[a]}
    return [sorted(g) for g in groups]


def test_sizes_layers_and_cycles() -> None:
    functions = [(length(d), n) for n, d in definitions() if not isinstance(d, ast.ClassDef)]
    classes = [(length(d), n) for n, d in definitions() if isinstance(d, ast.ClassDef)]
    files = [(len(f.read_text("utf-8").splitlines()), str(f.relative_to(SOURCE))) for f in FILES]
    loop = next(length(d) for n, d in definitions() if n.startswith("training/loop.py") and d.name == "train")
    script = picture()
    graph = script.imports()
    rank = {name: i for i, layer in enumerate(script.LAYERS) for name in layer}
    top = {m: m.split(".")[1] for m in graph if m.count(".") and m.split(".")[1] in rank}
    assert {m for m in graph if m not in top} == {"inlaid", "inlaid.__main__"}
    edges = [(a, b) for a in top for b in graph[a] if b in top and top[a] != top[b]]
    upward = [f"{a} -> {b}" for a, b in edges if rank[top[a]] >= rank[top[b]]]
    found = cycles(graph)
    packages = {f.parent.relative_to(SOURCE) for f in FILES if f.name == "__init__.py"}
    print(
        f"\n{len(packages)} packages, {len(FILES)} modules; longest file {max(files)}, function "
        f"{max(functions)}, class {max(classes)}; train() {loop}; {len(found)} import cycles; "
        f"{len(upward)} imports against the layers"
    )
    assert [x for x in files if x[0] > 600] == []
    assert [x for x in functions if x[0] > 90] == []
    assert [x for x in classes if x[0] > 300] == []
    assert loop < 70
    assert found == []
    assert upward == []


def test_the_picture_of_the_imports_is_current() -> None:
    script = picture()
    assert script.PICTURE.read_text("utf-8") == script.draw(script.between()), "run python docs/imports.py"


def test_no_module_replaces_its_class_and_no_class_is_made_at_run_time_for_alpha() -> None:
    for file in FILES:
        text = file.read_text("utf-8")
        assert not re.search(r"sys\.modules\[.*__class__", text), file
        if "alpha" in file.parts:
            assert not re.search(r"\btype\(f?\"|__mro__", text), file


# --- words --------------------------------------------------------------------------------------------------

OLD_WORDS = (
    r"\binlay\b",
    r"\bmediums?\b",
    r"\bcut-?outs?\b",
    r"\btwins?\b",
    r"\bheld[-_]out|held_out",
    r"\btold\b",
    r"\bforgiv(e|es|ing)\b",
    r"\brecomput(e|es|ing) (blocks|all)\b",
    r"\bspoken of\b",
    r"\bby heart\b",
    r"\banew\b",
    r"\bas they come\b",
    r"\bpreserve: \d|\"preserve\"|sources\.preserve\b",
    r"\bkind: codec\b|\brgba codec\b|\bcodec_id\b|\balpha\.codec\b",
    r"\bmatte_(error|flicker|regions)\b",
)
"""Words of the private vocabulary that the field's terms have replaced (see CONTRIBUTING.md)."""

EXCEPT = {
    r"\binlay\b": ("README.md",),  # one sentence explains the name
    r"\bmediums?\b": ("world.py", "test_world.py"),  # a size of shapes in the tiny models' captions
}


def texts() -> list[Path]:
    kinds = {".py", ".md", ".yaml", ".html", ".toml", ".sh", ".sbatch", ".json"}
    places = ("src", "tests", "docs", "recipes", "benchmarks", "tools")
    found = [p for d in places for p in (ROOT / d).rglob("*") if p.suffix in kinds and p.is_file()]
    own = [ROOT / n for n in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "Makefile")]
    return sorted({*found, *own} - {Path(__file__)})


@pytest.mark.parametrize("word", OLD_WORDS)
def test_no_old_word_is_left(word: str) -> None:
    found = []
    for path in texts():
        if path.name in EXCEPT.get(word, ()):
            continue
        text = path.read_text("utf-8")
        if not re.search(word, text, re.IGNORECASE):
            continue
        for i, line in enumerate(text.splitlines(), 1):
            if re.search(word, line, re.IGNORECASE):
                found.append(f"{path.relative_to(ROOT)}:{i}: {line.strip()[:80]}")
    assert found == []


def test_the_name_is_explained_once() -> None:
    assert len(re.findall(r"\binlay\b", (ROOT / "README.md").read_text("utf-8"))) == 1


def test_only_families_know_families() -> None:
    named = re.compile(r"family\s*(==|!=|in\b)\s*[\"'(\[]|isinstance\([^)]*\bWan\b")
    outside = [f for f in FILES if "families" not in f.parts and "tiny" not in f.parts]
    assert [str(f) for f in outside if named.search(f.read_text("utf-8"))] == []


def test_no_pickle_is_written_and_none_is_read_unguarded() -> None:
    for file in FILES:
        text = file.read_text("utf-8")
        assert text.count("torch.save(") == (file.name == "files.py"), f"{file}: use files.save_torch"
        if "save_torch(" in text:  # of tensors, for named foreign layouts
            assert file.name in ("files.py", "layouts.py", "rgba_vae_published.py", "dataset_formats.py")
        assert not re.search(r"import pickle\b|from pickle import (?!UnpicklingError$)", text, re.M), file
        for call in re.findall(r"torch\.load\(([^)]*)\)", text):
            assert "weights_only=True" in call, file
        for call in re.findall(r"np\.load\(([^)]*)\)", text):
            assert "allow_pickle=True" not in call, file


LIGHT = ["inlaid", "inlaid.cli.main", "inlaid.config", "inlaid.media.video", "inlaid.data.plan"]


@pytest.mark.parametrize("module", LIGHT)
def test_help_and_data_need_no_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers")
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_lazy_and_complete() -> None:
    assert sorted(inlaid.__all__) == ["Config", "evaluate", "generate", "load", "train"]
    assert all(callable(getattr(inlaid, name)) for name in inlaid.__all__)
    with pytest.raises(ValueError, match="no such recipe"):
        inlaid.load("nowhere.yaml")
    with pytest.raises(ValueError, match="not a run folder"):
        inlaid.generate("nowhere", ["x"])
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        _ = inlaid.nothing


def test_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert inlaid.__version__ == version("inlaid")
