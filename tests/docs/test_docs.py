"""The documentation is true: pages are current, links lead somewhere, names exist, and the tutorial runs.

A fenced block marked `bash run` or `python run` is executed, in order, in an empty folder. A comment
`<!-- quick: OLD -> NEW; ... -->` before a block names what makes the test quicker than the reader. A block
marked `text shows` must have been shown: its lines are looked for in the output, numbers and units aside.
`INLAID_DOCS_FULL=1` runs the tutorial as it is written.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import resource
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from inlaid import config
from inlaid.cli.main import app
from inlaid.data.problems import KINDS
from inlaid.evaluation import scene
from inlaid.evaluation.metrics import video
from inlaid.evaluation.metrics.alpha import METRICS, TRUTH
from inlaid.runs.folder import read_metrics
from support.commands import inlaid
from support.pages import BASE, DOCS, ROOT, blocks, inline, named, prose, rows, schema, script

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
TUTORIAL = DOCS / "tutorial/first-adapter.md"
SECONDS = 90
"""Of CPU time that the tutorial may take in its quick form."""
FULL = bool(os.environ.get("INLAID_DOCS_FULL"))

page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


# --- links and names ----------------------------------------------------------------------------------------

AWAITED = {ROOT / "docs/images/demo.png"}
"""Pictures that are made from a run of the demo."""


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as they are made on the web."""
    titles = re.findall(r"^#+ (.+)$", prose(path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() and path not in AWAITED:
            wrong.append(target)
        elif anchor and anchor not in anchors(path):
            wrong.append(f"{target}: {', '.join(sorted(anchors(path)))}")
    assert wrong == []


@page
def test_paths_exist(page: Path) -> None:
    """Paths of this repository in backticks; NAME in capitals stands for anything."""
    places = {
        "inlaid": ROOT / "src",
        **dict.fromkeys(("src", "tests", "recipes", "benchmarks", "docs"), ROOT),
    }
    named = [c for c in inline(page.read_text("utf-8")) if re.fullmatch(r"[\w./-]+/[\w./-]*", c)]
    known = [c for c in named if c.split("/")[0] in places and not re.search(r"[A-Z]{3}", c)]
    assert [c for c in known if not (places[c.split("/")[0]] / c).exists()] == []


@page
def test_named_tests_exist(page: Path) -> None:
    there = {
        n for f in (ROOT / "tests").rglob("test_*.py") for n in re.findall(r"def (test_\w+)", f.read_text())
    }
    named = {c for c in inline(page.read_text("utf-8")) if re.fullmatch(r"test_\w+", c)}
    assert named - there == set()


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every `inlaid` command in the shell blocks of a page."""
    for block in blocks(text):
        if block.language in ("bash", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for i, word in enumerate(words):
                    if word == "inlaid" and (i == 0 or words[i - 1] == "-m"):
                        yield words[i + 1 :]


GROUP: Any = typer.main.get_command(app)


@page
def test_commands_are_understood(page: Path) -> None:
    for words in commands(page.read_text("utf-8")):
        if words == ["--help"]:
            continue
        assert words[0] in GROUP.commands, f"no command `inlaid {words[0]}`"
        GROUP.commands[words[0]].make_context(f"inlaid {words[0]}", list(words[1:]))
        changes = [w for w in words[1:] if re.match(r"[a-z]+(\.[a-z_]+)?=", w)]
        if words[0] in ("check", "cache", "train"):
            config.build(BASE, changes)


OTHERS = (
    "--signal",
    "--lora_path",
    "--vae_lora_checkpoint",
    "--lora_weight",
    "--lora_weight_high_noise",
    "--lora_ratio",
    "--dit",
)
"""Options of other programs."""


@page
def test_options_in_prose_exist(page: Path) -> None:
    every = {o for command in GROUP.commands.values() for p in command.params for o in p.opts}
    every |= {"--help", *OTHERS}
    for code in inline(page.read_text("utf-8")):
        words = code.split()
        if words[0] == "inlaid" and len(words) > 1 and words[1] != "--help":
            assert words[1] in GROUP.commands, f"`{code}`"
            known = {o for p in GROUP.commands[words[1]].params for o in p.opts}
            used = {w for w in words if re.fullmatch(r"-{1,2}[a-z][a-z-]*", w)}
            assert used <= known | {"--help"}, f"`{code}`"
        elif re.match(r"--[a-z]", code):
            assert words[0].strip(",") in every, f"`{code}`"


@page
def test_keys_exist(page: Path) -> None:
    known = schema()
    for code in inline(page.read_text("utf-8")):
        found = re.fullmatch(r"([a-z]+)\.([a-z_0-9]+)(=.*)?", code)
        if found and found[1] in known and found[2] not in ("py", "md", "yaml", "json", "jsonl"):
            assert found[2] in known[found[1]], f"`{code}` is in no recipe"
            if found[3] and "NAME" not in found[3]:
                config.build(BASE, [code])


@page
def test_examples_are_valid(page: Path) -> None:
    """Parts of recipes are merged into a complete one; Python is parsed."""
    for block in blocks(page.read_text("utf-8")):
        if block.language == "yaml":
            config.build(config.merge(BASE, yaml.safe_load(block.text)))
        elif block.language == "python":
            ast.parse(block.text)


# --- the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.md", "cli.md"])
def test_generated_pages_are_current(name: str) -> None:
    assert (DOCS / "reference" / name).read_text("utf-8") == script("make").PAGES[name](), "run `make docs`"


def test_every_problem_of_a_clip_is_explained() -> None:
    found = [*rows(DOCS / "how-to/your-own-clips.md", "Deal with bad clips")]
    found += rows(DOCS / "how-to/train-midi.md", "Deal with bad scenes")
    stated = {r[0].strip("`"): r[1] for r in found}
    assert len(stated) == len(found), "each code once"
    assert stated == {code: kind.severity for code, kind in KINDS.items()}


def test_every_module_has_its_place() -> None:
    stated = named(DOCS / "explanation/design.md", "Where things are")
    source = ROOT / "src/inlaid"
    there = {p.name + "/" * p.is_dir() for p in source.iterdir() if not p.name.startswith("_")}
    assert stated == {n for n in there if n.endswith(("/", ".py"))}


def test_video_metrics_are_explained() -> None:
    stated = [r[0].strip("`") for r in rows(DOCS / "reference/metrics.md", "Video metrics")]
    assert stated == [*video.METRICS]
    stated = [r[0].strip("`") for r in rows(DOCS / "reference/metrics.md", "Scene metrics")]
    assert stated == [*scene.METRICS]
    stated = [r[0].strip("`") for r in rows(DOCS / "reference/metrics.md", "Alpha metrics")]
    assert stated == [*METRICS, *TRUTH]


def test_containers_are_those_that_were_measured() -> None:
    page = (DOCS / "how-to/transparent-video.md").read_text("utf-8")
    assert (ROOT / "benchmarks/results/containers.md").read_text("utf-8") in page
    found = json.loads((ROOT / "benchmarks/results/containers.json").read_text("utf-8"))
    assert found["plain_vp9_lowest_alpha"] == 255 and len(found["clips"]) == 6
    stated = {r[0].strip("`") for r in rows(DOCS / "how-to/transparent-video.md", "What is written")}
    assert stated == set(config.CARRIERS)


@pytest.mark.untraced
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi"])
def test_costs_are_those_of_check(
    name: str, estimated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = script("costs")
    monkeypatch.setattr(costs.estimate, "estimate_recipe", estimated)
    stated = list(re.finditer(costs.ROW, costs.PAGES[name].read_text("utf-8")))
    assert len(stated) >= 4
    for row in stated:
        assert costs.cells(name, row) == row[0], "run docs/costs.py"


# --- the tutorial -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TutorialResult:
    """What the tutorial left."""

    folder: Path
    run: Path
    output: str
    seconds: float


def cpu() -> float:
    """Seconds of this process and the children it waited for."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def shell(text: str) -> str:
    """Runs lines: `inlaid` in this process, anything else in a shell."""
    message = ""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["inlaid"]:
            done = inlaid(*words[1:])
            assert done.code == 0, f"{line}\n{done.out}{done.err}"
            message += done.out + done.err
        elif words:
            ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
            assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"
            message += ran.stdout + ran.stderr
    return message


def python(text: str) -> str:
    message = io.StringIO()
    with contextlib.redirect_stdout(message), contextlib.redirect_stderr(message):
        exec(compile(text, str(TUTORIAL), "exec"), {"__name__": "__main__"})
    return message.getvalue()


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> TutorialResult:
    """Runs the page from top to bottom in an empty folder."""
    folder, start, output = tmp_path_factory.mktemp("tutorial"), cpu(), ""
    with inside(folder):
        for block in blocks(TUTORIAL.read_text("utf-8")):
            text = block.text
            for old, new in block.quick:
                assert old in text, f"`{old}` is not in the block that follows its comment"
                text = text if FULL else text.replace(old, new)
            if block.mark == "run":
                output += {"bash": shell, "python": python}[block.language](text)
    runs = [*folder.glob("runs/*")]
    assert len(runs) == 1
    return TutorialResult(folder, runs[0], output, cpu() - start)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """As `contextlib.chdir` of Python 3.11."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def plain(line: str) -> str:
    """A line without what differs from run to run: numbers, units, signs, drawing characters."""
    line = re.sub(r"[━╸╺─│┃]+", " ", line)
    line = re.sub(r"[+\-−]?\d[\d,.:]*", "0", line)
    line = re.sub(r"\b(\w+)/s\b|\bs/(\w+)\b", "speed", line)  # a slow machine shows s/step
    line = re.sub(r"\b0 (B|KB|MB|GB|ms|s|min|h)\b", "0 unit", line)
    return " ".join(line.split())


@pytest.mark.slow
def test_tutorial_shows_what_it_says(tutorial: TutorialResult) -> None:
    shown = {plain(line) for line in tutorial.output.splitlines()}
    message = [
        line
        for block in blocks(TUTORIAL.read_text("utf-8"))
        if block.mark == "shows"
        for line in block.text.splitlines()
        if line.strip() and line.strip() != "..."
    ]
    assert len(message) > 20
    assert [line for line in message if plain(line) not in shown] == []


@pytest.mark.slow
@pytest.mark.skipif(FULL, reason="the reader's own time is not limited")
def test_tutorial_is_quick(tutorial: TutorialResult) -> None:
    assert tutorial.seconds < SECONDS


@pytest.mark.slow
def test_run_folder_is_described(tutorial: TutorialResult) -> None:
    """Every file of a run is in the table, and all of the table that is not conditional is in the run."""
    table = rows(DOCS / "reference/run-folder.md")
    patterns = [p for r in table for p in re.findall("`(.+?)`", r[0])]
    files = [p.relative_to(tutorial.run).as_posix() for p in tutorial.run.rglob("*") if p.is_file()]
    assert [f for f in files if not any(fnmatch(f, p) for p in patterns)] == []
    always = [r[0].strip("`") for r in table if " if " not in r[1]]
    assert [p for p in always if not any(fnmatch(f, p) for f in files)] == []


@pytest.mark.slow
def test_metrics_are_described(tutorial: TutorialResult) -> None:
    stated = named(DOCS / "reference/metrics.md", "metrics.jsonl")
    assert stated == {k for line in read_metrics(tutorial.run / "metrics.jsonl") for k in line}


@pytest.mark.slow
def test_report_is_described(tutorial: TutorialResult) -> None:
    stated = named(DOCS / "reference/metrics.md", "report.json")
    report = json.loads((tutorial.run / "report/report.json").read_text("utf-8"))
    assert stated | {"format"} == {*report}
