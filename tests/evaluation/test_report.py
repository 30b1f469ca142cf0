"""What the report says about known numbers, and that its page is whole, self-contained and accessible."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from inlaid.evaluation import page
from inlaid.evaluation.charts import Chart, Line, _ranges, layout, short, smooth, ticks
from inlaid.evaluation.evaluate import save_report
from inlaid.evaluation.metrics.video import measure
from inlaid.evaluation.page import _video
from inlaid.evaluation.report import FORMAT, Output, Pair, Report, ValidationLoss, summary_table
from inlaid.media import video
from inlaid.media.contact_sheet import SheetRow, contact_sheet, contact_strip

CALM = {"motion": 0.3, "flicker": 0.02, "consistency": 0.99, "sharpness": 200.0}


def losses(base: float, *tuned: float) -> ValidationLoss:
    """One row of five equal losses for each clip."""
    return ValidationLoss(
        [f"{i}.mp4" for i in range(len(tuned))],
        [0.1, 0.3, 0.5, 0.7, 0.9],
        [0.3, 0.6, 0.7, 0.8, 0.9],
        [[base] * 5] * len(tuned),
        [[t] * 5 for t in tuned],
    )


def pair(
    group: str = "",
    base: bool | None = None,
    tuned: bool | None = None,
    distance: float = 0.1,
    **changed: float,
) -> Pair:
    return Pair(
        "a prompt",
        group,
        42,
        Output("base/0.mp4", CALM, base),
        Output("tuned/0.mp4", {**CALM, **changed}, tuned),
        distance,
    )


def made(**parts: Any) -> Report:
    values: dict[str, Any] = {
        "run": "pets",
        "folder": Path("runs/pets/report"),
        "names": ("base", "tuned"),
        "step": 100,
        "pairs": [pair()],
        "validation": losses(0.5, 0.4, 0.4, 0.4),
        "training": CALM,
        "sampling": {"size": (32, 48), "frames": 9, "steps": 2},
        "settings": {
            "run": "runs/pets",
            "seed": 0,
            "model": {"family": "wan"},
            "data": {"sources": [{"path": "a", "root": None}]},
        },
        "environment": {"packages": {"torch": "2"}, "device": "cpu"},
        "adapter": {"trained": "LoRA, rank 4", "size": "1 MB"},
        "curves": [],
    }
    return Report(**{**values, **parts})


# --- in words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "tone", "says"),
    [
        ({}, "good", "Improved: validation loss fell 20.0%."),
        ({"validation": losses(0.5, 0.498, 0.499)}, "unclear", "hardly changed (−0.3%)"),
        ({"validation": losses(0.5, 0.52, 0.55)}, "bad", "validation loss rose 7.0%"),
        ({"validation": losses(0.5, 0.3, 0.51, 0.51)}, "unclear", "fell 12.0%, but not on most clips"),
        ({"validation": None}, "unclear", "there are no validation clips"),
        (
            {"pairs": [pair(distance=0.0)]},
            "bad",
            "Nothing changed: the videos of base and tuned are identical in every pixel",
        ),
        ({"pairs": [pair(distance=0.001)]}, "bad", "look identical"),
        (
            {"pairs": [pair("cat", False, True)] * 4},
            "good",
            "Improved cat: 4 of 4 videos match the prompt, 0 before training",
        ),
        ({"pairs": [pair("cat", True, False)] * 4}, "bad", "Worse: fewer videos"),
        (
            {"pairs": [pair("new", False, True), pair("old", True, False)]},
            "unclear",
            "Improved new, but other prompts got worse",
        ),
        ({"pairs": [pair("cat", False, True)], "validation": losses(0.5, 0.6)}, "unclear", "validation loss"),
        ({"pairs": []}, "good", "validation loss fell"),
    ],
)
def test_the_verdict_says_what_the_numbers_show(parts: dict, tone: str, says: str) -> None:
    verdict = made(**parts).verdict
    assert verdict.tone == tone and says in verdict.headline


def test_reasons_name_counts() -> None:
    verdict = made(pairs=[pair("cat", False, True)] * 3 + [pair("cat", True, False)]).verdict
    assert verdict.reasons == [
        "Cat: 3 of 4 tuned videos match the prompt, 1 of 4 base videos.",
        "Validation loss changed from 0.5000 to 0.4000 (−20.0%), lower on 3 of 3 clips.",
    ]


@pytest.mark.parametrize(
    ("parts", "warns"),
    [
        ({"validation": losses(0.5, 0.4)}, "Only 1 validation clip measured"),
        ({"pairs": [pair(flicker=0.5)]}, "flicker more than before: 0.02 to 0.50 %"),
        ({"pairs": [pair(motion=0.05)]}, "have much less motion than before: motion 0.30 to 0.05"),
        ({"pairs": [pair(sharpness=50)]}, "much blurrier than before: sharpness 200 to 50"),
        ({"pairs": [pair(consistency=0.7)]}, "Frames are less consistent"),
        (
            {"pairs": [pair("old", True, False)] * 2},
            "Worse on prompts “old”: 0 of 2 videos match the prompt, 2 before training",
        ),
        ({"notes": ["clips are gone"]}, "clips are gone"),
        (
            {"curves": [{"step": 50, "validation_loss": 0.3}, {"step": 100, "validation_loss": 0.4}]},
            "lowest at step 50 and has risen 33.3%",
        ),
        ({"curves": [{"step": 100, "validation_loss": 0.44}]}, "if the clips have changed since"),
    ],
)
def test_warnings(parts: dict, warns: str) -> None:
    assert any(warns in w for w in made(**parts).verdict.warnings)
    assert not made(
        curves=[{"step": 50, "validation_loss": 0.41}, {"step": 100, "validation_loss": 0.4}]
    ).verdict.warnings


def test_what_the_training_clips_do_too_is_no_warning() -> None:
    still = {**CALM, "motion": 0.04, "sharpness": 40.0, "flicker": 0.5, "consistency": 0.7}
    assert not made(pairs=[pair(**still)], training=still).verdict.warnings


def test_validation() -> None:
    found = losses(0.5, 0.4, 0.6, 0.3)
    assert found.means == pytest.approx((0.5, 1.3 / 3))
    assert found.better == 2 and found.change == pytest.approx(1.3 / 1.5 - 1)


def test_groups_are_means() -> None:
    found = made(
        pairs=[pair("a", True, True, 0.2, motion=1.0), pair("a", False, True, 0.4, motion=2.0), pair("b")]
    )
    a, b = found.groups
    assert (a.name, a.videos, a.judged, a.base_matches, a.tuned_matches, a.match_gain) == (
        "a",
        2,
        2,
        1,
        2,
        0.5,
    )
    assert a.distance == pytest.approx(0.3) and a.tuned["motion"] == 1.5 and a.base["motion"] == 0.3
    assert b.judged == 0 and b.match_gain == 0 and found.total and found.total.videos == 3


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: Path) -> Report:
    """A report with everything in it, and its files."""
    pairs = []
    for i, (group, text) in enumerate(
        (("cats & <dogs>", 'a "quoted" <script>alert(1)</script>'), ("", "clip `x`"))
    ):
        sides = []
        for k, side in enumerate(("base", "tuned")):
            frames = np.random.default_rng(i + 2 * k).integers(0, 255, (9, 64, 96, 3), np.uint8)
            path = tmp_path / side / f"{i}.mp4"
            video.write_video(path, frames, 16)
            contact_strip(frames).save(path.with_suffix(".png"))
            sides.append(Output(f"{side}/{i}.mp4", measure(frames), bool(k) if not i else None))
        pairs.append(Pair(text, group, 42, sides[0], sides[1], 0.3))
    rng = np.random.default_rng(0)
    curves: list[dict[str, float]] = []
    for step in range(5, 105, 5):
        curves.append(
            {"step": step, "loss": 0.5 + rng.normal() * 0.1, "learning_rate": 1e-4, "gradient_norm": 1.0}
        )
        if step % 25 == 0:
            curves.append(
                {
                    "step": step,
                    "validation_loss": 0.4,
                    **{f"validation_q{q:.1f}": 0.4 for q in (0.1, 0.3, 0.5, 0.7, 0.9)},
                }
            )
    contact_sheet([SheetRow("0.mp4", "a clip", np.zeros((9, 64, 96, 3), np.uint8))], tmp_path / "clips.png")
    return made(
        folder=tmp_path,
        pairs=pairs,
        curves=curves,
        notes=["look at `this`"],
        step=75,
        created="today",
        seconds=3725,
    )


class Page(HTMLParser):
    """Checks nesting while it reads, and remembers elements and text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> where {self.open[-3:]} is open"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


def test_the_page_is_whole_and_needs_nothing_else(full: Report) -> None:
    save_report(full, full.folder)
    text = full.path.read_text("utf-8")
    found = Page(text)
    assert not found.open, "everything is closed"
    for _, attributes in found.elements:
        for name in ("src", "href", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value[:60]
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "<script src" not in text
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {str(a.get("href"))[1:] for t, a in found.elements if t in ("a", "use")}
    assert targets <= set(ids), targets - set(ids)


def test_the_page_is_accessible_and_safe(full: Report) -> None:
    found = Page(page.render(full, full.folder))
    assert all(a.get("alt") for a in found.all("img")) and len(found.all("img")) == 5
    assert all(
        a.get("aria-label") and "muted" in a and "loop" in a and "controls" in a for a in found.all("video")
    )
    assert all(a.get("aria-label") for a in found.all("svg") if a.get("role") == "img")
    assert found.all("html")[0]["lang"] == "en" and len(found.all("h1")) == 1
    assert all(a.get("scope") for a in found.all("th"))
    assert len(found.all("script")) == 1, "prompts are text, never markup"
    assert "<script>alert(1)</script>" in found.text and "cats & <dogs>" in found.text
    assert "look at this" in found.text and "1 h 2 min" in found.text


HOSTILE = '</title></script><script>alert(1)</script><img src=x onerror="alert(2)"> `</code><b>` & \'"'


def test_hostile_text_is_escaped_wherever_it_comes_from(full: Report) -> None:
    clip = full.pairs[0]
    parts = {
        "run": HOSTILE,
        "names": (f"base {HOSTILE}", f"tuned {HOSTILE}"),
        "pairs": [dataclasses.replace(clip, prompt=HOSTILE, group=HOSTILE)],
        "notes": [HOSTILE],
        "sampling": {HOSTILE: HOSTILE},
        "settings": {"data": {HOSTILE: [{"path": HOSTILE}]}},
        "environment": {"packages": {HOSTILE: HOSTILE}},
        "adapter": {"trained": HOSTILE, "size": HOSTILE},
        "created": HOSTILE,
    }
    values = {f.name: getattr(full, f.name) for f in dataclasses.fields(full) if f.init}
    found = Page(page.render(Report(**{**values, **parts}), full.folder))
    assert not found.open and len(found.all("script")) == 1 and not found.all("b")
    assert not any("onerror" in attributes for _, attributes in found.elements)
    assert found.text.count(HOSTILE) > 8, "text stays as it is written"
    assert HOSTILE in str(found.all("video")[0]["aria-label"])


def test_the_page_shows_all_there_is(full: Report) -> None:
    text = page.render(full, full.folder)
    found = Page(text)
    assert len(found.all("video")) == 4 and text.count("data:video/mp4;base64,") == 4
    labels = [str(a.get("aria-label")) for a in found.all("svg") if a.get("role") == "img"]
    assert [x.split(" over ")[0] for x in labels] == [
        "Training loss",
        "Validation loss, mean",
        *(f"at noise level {t:.2f}" for t in (0.3, 0.6, 0.7, 0.8, 0.9)),
        "Learning rate",
        "Gradient norm",
    ]
    assert "base: 0.5 to 0.5; validation loss: 0.5 to 0.4" in labels[1], "the curve begins at the base"
    assert 'class="mark"' in text, "step 75 of 100 was evaluated"
    for word in (
        "matches the prompt",
        "does not match",
        "Training clips, for reference",
        "Frames of training clips",
        "LoRA, rank 4",
        "torch",
    ):
        assert word in found.text, word


@pytest.mark.parametrize(
    "parts",
    [{"pairs": []}, {"validation": None}, {"curves": []}, {"training": None, "adapter": {}, "step": None}],
)
def test_the_page_leaves_out_what_is_missing(full: Report, parts: dict) -> None:
    values = {f.name: getattr(full, f.name) for f in dataclasses.fields(full) if f.init}
    found = Page(page.render(Report(**{**values, **parts}), full.folder))
    assert not found.open
    if parts.get("pairs") == []:
        assert not found.all("video") and "Side by side" not in found.text
    if parts.get("curves") == []:
        assert "Curves" not in found.text


def test_large_videos_are_made_smaller_for_the_page(tmp_path: Path) -> None:
    video.write_video(tmp_path / "a.mp4", np.zeros((5, 360, 640, 3), np.uint8), 16)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    data, size = _video(tmp_path / "a.mp4", scratch)
    assert size == (288, 512) and data.startswith("data:video/mp4;base64,")
    assert video.probe(tmp_path / "a.mp4").width == 640, "the file keeps its size"


def test_the_json_holds_the_numbers(full: Report) -> None:
    save_report(full, full.folder)
    values = json.loads((full.folder / "report.json").read_text("utf-8"))
    assert values["format"] == FORMAT and values["names"] == {"base": "base", "tuned": "tuned"}
    assert values["validation"]["change"] == pytest.approx(-0.2) and values["validation"]["base_mean"] == 0.5
    assert [g["name"] for g in values["groups"]] == ["cats & <dogs>", "", "all"]
    assert (
        values["pairs"][0]["base"]["matches_prompt"] is False
        and values["verdict"]["headline"] == full.verdict.headline
    )


def test_the_summary_fits_a_terminal(full: Report) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(full))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        full.verdict.headline,
        "cats & <dogs> (1)",
        "prompts (1)",
        "all (2)",
        "1 of 1",
        "training clips",
        "30.0%",
        "look at `this`",
    ):
        assert word in text, word


# --- charts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "most", "wanted"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 600, 6, [0, 100, 200, 300, 400, 500, 600]),
        (-0.3, 0.3, 3, [-0.2, 0, 0.2]),
        (0.0001, 0.00032, 4, [0.0001, 0.0002, 0.0003]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, wanted: list[float]) -> None:
    assert ticks(low, high, most) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0001, "1e-4"), (0.00025, "2.5e-4"), (0.25, "0.25"), (12000, "12k"), (1500, "1500")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_smoothing_keeps_a_line_and_calms_noise() -> None:
    line = [(float(i), 2.0 * i) for i in range(50)]
    assert np.allclose(smooth(line)[5:-5], line[5:-5])
    noise = [(float(i), v) for i, v in enumerate(np.random.default_rng(0).normal(size=400))]
    assert np.std([y for _, y in smooth(noise)]) < 0.35
    assert smooth([(1.0, 3.0)]) == [(1.0, 3.0)]


@pytest.mark.parametrize(
    "points", [[(5, 1.0)], [(0, 1.0), (9, 1.0)], [(0, 0.0), (1, 0.0)], [(1, 1.0), (2, math.nan), (3, 2.0)]]
)
def test_charts_of_few_points(points: list[tuple[float, float]]) -> None:
    chart = layout(Chart("loss", "step", "loss", [Line("loss", points, "main", dots=True)]))
    text = page.TEMPLATES.get_template("_chart.html").render(chart=chart)
    assert "nan" not in text and not Page(text).open
    assert len(Page(text).all("circle")) == sum(math.isfinite(y) for _, y in points)


def test_no_points_no_chart() -> None:
    assert layout(Chart("loss", "step", "loss", [Line("loss", [], "main")])) is None


def test_a_wild_value_does_not_flatten_the_rest() -> None:
    points = [(float(i), 1.0 + 0.1 * math.sin(i)) for i in range(200)] + [(200.0, 1000.0)]
    assert _ranges(Chart("", "", "", []), [Line("", points, "raw")])[1][1] < 2
