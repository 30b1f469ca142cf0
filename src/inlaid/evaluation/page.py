"""Evaluation report as a single self-contained HTML file.

This module computes plain values. The Jinja templates in `templates` contain the markup and escape the
values.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from inlaid.evaluation.charts import Chart, Drawing, Line, Point, layout, smooth
from inlaid.evaluation.report import (
    Group,
    Output,
    Pair,
    Report,
    ValidationLoss,
    count_of,
    format_value,
    signed,
)
from inlaid.media.video import probe, read_frames, write_video

SMALL = 160
"""Maximum longer side of videos that the page enlarges without smoothing, in pixels."""

LARGE = 512
"""Maximum longer side of videos in the page, in pixels; larger videos are downscaled."""

SHEET = 1600
"""Maximum width of the contact sheet in the page, in pixels; a wider contact sheet is downscaled."""

UNNAMED = "Prompts of the recipe"
"""Heading of the prompt group without a name."""

OTHER_CURVES = (
    ("learning_rate", "Learning rate", "rate"),
    ("gradient_norm", "Gradient norm", "norm before clipping"),
    ("seconds_per_step", "Time per step", "seconds"),
)
"""Additional charts of the training run: key in `metrics.jsonl`, chart title and unit."""

TONES = {"good": "model improved", "unclear": "unclear", "bad": "not improved"}

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(report: Report, folder: Path) -> str:
    """Render the HTML page of a report.

    Args:
        report: results of the evaluation.
        folder: folder with the report's videos and a PNG preview of each video. It may also contain
            `clips.png`, the contact sheet of training clips.
    """
    return TEMPLATES.get_template("report.html").render(page_values(report, folder))


def page_values(report: Report, folder: Path) -> dict[str, Any]:
    """Return the variables of `templates/report.html`; the value of a section without content is None."""
    sections = {
        "videos": (f"{report.makes.capitalize()}s", _videos(report, folder)),
        "numbers": ("Numbers", _numbers(report)),
        "curves": ("Curves", _curves(report)),
        "clips": ("Training clips", _clips(folder)),
        "settings": ("Settings", _settings(report)),
    }
    base, tuned = report.names
    return {
        "version": _version(),
        "run": report.run,
        "makes": report.makes,
        "names": {"base": base, "tuned": tuned},
        "verdict": report.verdict,
        "tone": TONES[report.verdict.tone],
        "tiles": _tiles(report),
        "judged": any(g.judged for g in report.groups),
        "transparent": "coverage" in report.metrics,
        "created": report.created,
        "duration": _duration(report.seconds) if report.seconds else "",
        "sections": [{"id": key, "title": title} for key, (title, content) in sections.items() if content],
        **{key: content for key, (_, content) in sections.items()},
    }


def _version() -> str:
    try:
        return version("inlaid")
    except PackageNotFoundError:
        return "from source"


def _tiles(report: Report) -> list[dict[str, str]]:
    """Return the title, value and note of each key figure at the top of the page."""
    tiles: list[tuple[str, str, str]] = []
    base, tuned = report.names
    if report.validation:
        a, b = report.validation.means
        note = f"{a:.4f} ({base}) to {b:.4f} ({tuned})"
        tiles.append(("Validation loss", signed(report.validation.change), note))
    for group in sorted((g for g in report.groups if g.judged), key=lambda g: -abs(g.match_gain))[:2]:
        note = f"{report.makes}s match the prompt; {base}: {group.base_matches}"
        tiles.append((group.name or "Prompt matched", f"{group.tuned_matches} of {group.judged}", note))
    total = report.total
    if total:
        unit = "of the value range" if report.makes == "video" else "of the surfaces"
        note = f"mean over {count_of(total.videos, 'pair')}, {unit}"
        tiles.append((f"{base.capitalize()} and {tuned}: difference", f"{total.distance:.1%}", note))
    trained = report.adapter.get("trained", "")
    if trained:
        step = f"step {report.step:,}" if report.step is not None else ""
        note = ", ".join(x for x in (step, report.adapter.get("size", "")) if x)
        tiles.append(("Trained", trained, note))
    return [{"title": title, "value": value, "note": note} for title, value, note in tiles]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# --- videos -------------------------------------------------------------------------------------------------


def _videos(report: Report, folder: Path) -> dict[str, Any] | None:
    if not report.pairs:
        return None
    groups = report.groups
    height, width = report.sampling.get("size") or (1, 1)
    content = []
    with TemporaryDirectory(prefix="inlaid-") as scratch:
        for group in groups:
            note = count_of(group.videos, "pair")
            if group.judged:
                counts = zip(report.names, (group.base_matches, group.tuned_matches), strict=True)
                matches = ", ".join(f"{name} {count}" for name, count in counts)
                note += f"; prompt matched: {matches} of {group.judged}"
            pairs = [p for p in report.pairs if p.group == group.name]
            content.append(
                {
                    "title": (group.name or UNNAMED) if len(groups) > 1 or group.name else "",
                    "note": note,
                    "pairs": [_pair(p, report.names, folder, Path(scratch)) for p in pairs],
                }
            )
    return {"groups": content, "card_width": 440 if width <= 1.2 * height else 560}


def _pair(pair: Pair, names: tuple[str, str], folder: Path, scratch: Path) -> dict[str, Any]:
    sides = zip(("base", "tuned"), names, (pair.base, pair.tuned), strict=True)
    facts = [f"seed {pair.seed}", f"difference {pair.distance:.1%}"]
    base, tuned = pair.base.metrics, pair.tuned.metrics
    for name in list(base)[:2] + ["coverage"] * ("coverage" in base):
        facts.append(f"{name} {format_value(name, base[name])} → {format_value(name, tuned[name])}")
    return {
        "prompt": pair.prompt,
        "sides": [_side(role, name, output, folder, scratch) for role, name, output in sides],
        "facts": facts,
    }


def _side(role: str, name: str, output: Output, folder: Path, scratch: Path) -> dict[str, Any]:
    path = folder / output.file
    preview = path.with_suffix(".png")
    side = {
        "role": role,
        "name": name,
        "matches_prompt": output.matches_prompt,
        "image": _uri(preview.read_bytes(), "image/png") if preview.is_file() else "",
        "viewer": "",
    }
    if path.suffix != ".mp4":
        return {**side, "viewer": Path(output.file).with_suffix(".html").as_posix()}
    data, (height, width) = _video(path, scratch)
    pixelated = max(height, width) <= SMALL
    return {**side, "video": data, "height": height, "width": width, "pixelated": pixelated}


def _video(path: Path, scratch: Path) -> tuple[str, tuple[int, int]]:
    """Return a video as a data URI, with its height and width.

    A video is downscaled if its longer side exceeds `LARGE` pixels.
    """
    properties = probe(path)
    size = (properties.height, properties.width)
    scale = LARGE / max(size)
    if scale < 1:
        size = (max(2, round(size[0] * scale / 2) * 2), max(2, round(size[1] * scale / 2) * 2))
        fps = float(properties.fps or 16)
        small = scratch / path.name
        write_video(small, read_frames(path, 0, properties.frames, fps, size), fps, crf=23)
        path = small
    return _uri(path.read_bytes(), "video/mp4"), size


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# --- numbers ------------------------------------------------------------------------------------------------


def _numbers(report: Report) -> dict[str, Any] | None:
    if not report.pairs and not report.validation:
        return None
    return {
        "metrics": _metrics(report) if report.pairs else None,
        "loss": _losses(report.validation, report.names) if report.validation else None,
    }


def _metrics(report: Report) -> dict[str, Any]:
    groups, total, metrics = report.groups, report.total, report.metrics
    assert total
    made = f"{report.makes}s"
    heads = [("Group", ""), (made.capitalize(), "")]
    heads += [("Prompt matched", made)] if total.judged else []
    heads += [(m.name.capitalize(), m.unit) for m in metrics.values()]
    heads.append(("Difference", "of each pair"))
    known = report.training or {}
    return {
        "heads": heads,
        "groups": [_group(g, g.name or UNNAMED) for g in groups],
        "total": _group(total, "All") if len(groups) != 1 else None,
        "training": [format_value(k, known[k]) if k in known else "" for k in metrics] if known else None,
        "meanings": _meanings(report),
    }


def _group(group: Group, title: str) -> dict[str, Any]:
    return {
        "title": title,
        "count": group.videos,
        "judged": group.judged,
        "base_matches": group.base_matches,
        "tuned_matches": group.tuned_matches,
        "metrics": [(format_value(k, v), format_value(k, group.tuned[k])) for k, v in group.base.items()],
        "difference": f"{group.distance:.1%}",
    }


def _meanings(report: Report) -> list[dict[str, str]]:
    meanings = {
        m.name: f"{m.meaning} {m.better.capitalize()} is better." if m.better else m.meaning
        for m in report.metrics.values()
    }
    difference = "Mean absolute pixel difference of the two videos"
    if report.makes != "video":
        difference = "Share of both surfaces that is not close to the other surface"
    meanings["difference"] = f"{difference}; 0 means that training changed nothing."
    return [{"name": name.capitalize(), "text": text} for name, text in meanings.items()]


def _losses(loss: ValidationLoss, names: tuple[str, str]) -> dict[str, Any]:
    def row(level: str, quantile: str, base: float, tuned: float, change: float) -> dict[str, str]:
        values = {"base": f"{base:.4f}", "tuned": f"{tuned:.4f}", "change": signed(change)}
        return {"level": level, "quantile": quantile, **values}

    base, tuned = (np.asarray(x).mean(axis=0) for x in (loss.base, loss.tuned))
    columns = zip(loss.quantiles, loss.levels, base, tuned, strict=True)
    heads = [("Noise level", "0 data, 1 noise"), ("Quantile", "of training noise levels")]
    return {
        "clips": count_of(len(loss.clips), loss.noun),
        "heads": [*heads, *((name, "") for name in names), ("Change", "")],
        "rows": [row(f"{t:.3f}", f"{q:.0%}", a, b, b / a - 1) for q, t, a, b in columns],
        "mean": row("mean", "", *loss.means, loss.change),
    }


# --- curves -------------------------------------------------------------------------------------------------


def _curves(report: Report) -> dict[str, Any] | None:
    last = max((int(x["step"]) for x in report.curves), default=0)
    mark: dict[str, Any] = {}
    if report.step is not None and report.step < last:
        mark = {"mark": float(report.step), "mark_name": "evaluated"}

    def points(key: str) -> list[Point]:
        return [(float(x["step"]), float(x[key])) for x in report.curves if key in x]

    raw = points("loss")
    steady = len(raw) >= 10
    training = [Line("as logged", raw, "raw" if steady else "main", dots=not steady)]
    training += [Line("smoothed", smooth(raw, 0.1), "main")] if steady else []
    wide = layout(Chart("Training loss", "step", "loss", training, width=1000, height=280, **mark))
    charts = list(_validation_charts(report, points))
    for key, title, unit in OTHER_CURVES:
        charts.append(Chart(title, "step", unit, [Line(title, points(key), "main")], zero=True))
    sized = (Chart(c.title, c.x, c.y, c.lines, 340, 220, zero=c.zero, **mark) for c in charts)
    small: list[Drawing] = [drawing for drawing in map(layout, sized) if drawing]
    if not wide and not small:
        return None
    has_base = report.validation is not None and report.names[0] == "base"
    return {"wide": wide, "small": small, "has_base": has_base}


def _validation_charts(report: Report, points: Callable[[str], list[Point]]) -> Iterable[Chart]:
    """Yield a chart of the mean validation loss, and a chart for each quantile of the noise level.

    A dashed line shows the loss of the base model.
    """
    keys = list(dict.fromkeys(k for x in report.curves for k in x if k.startswith("validation_q")))
    loss = report.validation
    known = {} if loss is None else {f"validation_q{q:.1f}": i for i, q in enumerate(loss.quantiles)}
    for key in ["validation_loss", *keys]:
        curve = points(key)
        if not curve:
            continue
        title = (
            "Validation loss, mean"
            if key == "validation_loss"
            else f"at quantile {key.removeprefix('validation_q')}"
        )
        base = loss.means[0] if loss and key == "validation_loss" else None
        if loss and key in known:
            title = f"at noise level {loss.levels[known[key]]:.2f}"
            base = float(np.mean(loss.base, axis=0)[known[key]])
        begin = [] if base is None or report.names[0] != "base" else [(0.0, base)]
        lines = [Line("base", [(0, y), (curve[-1][0], y)], "base") for _, y in begin]
        lines.append(Line("validation loss", [*begin, *curve], "main", dots=len(curve) <= 40))
        yield Chart(title, "step", "loss", lines)


# --- clips and settings -------------------------------------------------------------------------------------


def _clips(folder: Path) -> str | None:
    """Return the contact sheet of training clips as a data URI, or None if there is no contact sheet."""
    path = folder / "clips.png"
    if not path.is_file():
        return None
    with Image.open(path) as image:
        if image.width > SHEET:
            size = (SHEET, round(image.height * SHEET / image.width))
            image = image.resize(size, Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "PNG", optimize=True)
    return _uri(data.getvalue(), "image/png")


def _settings(report: Report) -> list[dict[str, Any]]:
    machine = {k: v for k, v in report.environment.items() if k != "packages"}
    sections = {k: v for k, v in report.settings.items() if isinstance(v, Mapping)}
    top = {k: v for k, v in report.settings.items() if k not in sections}
    parts = {
        "Trained weights": {"Adapter": report.adapter},
        "Sampling settings": {"Sampling": report.sampling},
        "Recipe": {"top level": top, **sections},
        "Environment": {"Packages": report.environment.get("packages", {}), "Machine": machine},
    }
    content = []
    for i, (title, blocks) in enumerate(parts.items()):
        filled = [
            {"title": name, "rows": [(k, _value(v)) for k, v in values.items()]}
            for name, values in blocks.items()
            if values
        ]
        if filled:
            content.append({"title": title, "open": i == 0, "blocks": filled})
    return content


def _value(value: Any) -> str:
    """Format the value of a setting as text."""
    if value is None or value in ("", [], {}):
        return "\N{EN DASH}"
    if not isinstance(value, list | tuple):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if any(isinstance(v, Mapping | list | tuple) for v in value):
        known = [
            {k: w for k, w in v.items() if w is not None} if isinstance(v, Mapping) else v for v in value
        ]
        return json.dumps(known, ensure_ascii=False)
    if len(value) == 2 and all(isinstance(v, int) for v in value):
        return f"{value[0]} x {value[1]}"
    return ", ".join(map(str, value))
