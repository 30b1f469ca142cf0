"""Evaluation report as a single self-contained HTML file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from inlaid.evaluation import charts
from inlaid.evaluation.charts import Chart, Line, Point, smooth
from inlaid.evaluation.markup import Html, code, join, tag
from inlaid.evaluation.report import Group, Pair, Report, ValidationClip, Video, show, signed
from inlaid.media.video import probe, read_frames, write_video

TINY = 160
"""Videos with a longer side of at most this many pixels are enlarged without smoothing."""

LARGE = 512
"""Videos with a longer side above this many pixels are downscaled for the page."""

SHEET = 1600
"""Contact sheets wider than this many pixels are downscaled for the page."""

UNNAMED = "Prompts of the recipe"
"""Heading of the unnamed group."""

OTHER_CURVES = (
    ("learning_rate", "Learning rate", "rate"),
    ("gradient_norm", "Gradient norm", "norm before clipping"),
    ("seconds_per_step", "Time per step", "seconds"),
)
"""Keys of `metrics.jsonl`, chart titles and units."""

TONES = {"good": "model improved", "unclear": "unclear", "bad": "not improved"}


def render(report: Report, folder: Path) -> str:
    """Render the HTML page.

    Args:
        report: results of the evaluation.
        folder: folder with the report's videos, a PNG for each, and optionally `clips.png`, the contact sheet
            of training clips.
    """
    made = {
        "videos": (f"{report.makes.capitalize()}s", _videos(report, folder)),
        "numbers": ("Numbers", _numbers(report)),
        "curves": ("Curves", _curves(report)),
        "clips": ("Training clips", _clips(folder)),
        "settings": ("Settings", _settings(report)),
    }
    sections = {key: value for key, value in made.items() if value[1]}
    links = [tag("a", title, href=f"#{key}") for key, (title, _) in sections.items()]
    button = tag("button", id="play", type="button", hidden=True)
    body = join(
        _header(report),
        tag("nav", tag("div", tag("span", *links, cls="links"), button), aria_label="Sections"),
        tag("main", *(tag("section", text, id=k, aria_label=t) for k, (t, text) in sections.items())),
        _footer(report),
    )
    page = Template((Path(__file__).with_name("templates") / "report.html").read_text("utf-8"))
    title = join(f"{report.run}: {report.verdict.headline}")
    return page.substitute(title=title, version=_version(), body=body)


def _version() -> str:
    try:
        return version("inlaid")
    except PackageNotFoundError:
        return "from source"


def _icon(name: str, cls: str = "") -> Html:
    return tag("svg", tag("use", href=f"#{name}"), cls=cls, aria_hidden="true")


def _key(role: str) -> Html:
    """Return the icon of `base` or `tuned`; the icons differ in shape as well as in color."""
    return _icon(f"k-{role}", f"key is-{role}")


def _soft(*inside: str) -> Html:
    return tag("p", *inside, cls="soft")


# --- header, footer -----------------------------------------------------------------------------------------


def _header(report: Report) -> Html:
    verdict = report.verdict
    name = tag("span", tag("strong", "inlaid"), " evaluation of ", tag("span", report.run, cls="mono"))
    warnings = tag("ul", *(tag("li", code(w)) for w in verdict.warnings))
    box = tag("div", tag("strong", "Warnings for this run"), warnings, cls="warnings", role="note")
    return tag(
        "header",
        tag(
            "div",
            tag("div", _icon("k-tuned"), name, cls="brand"),
            tag("span", _icon(f"i-{verdict.tone}"), TONES[verdict.tone], cls=f"verdict {verdict.tone}"),
            tag("h1", verdict.headline),
            tag("ul", *(tag("li", code(r)) for r in verdict.reasons), cls="lead"),
            _tiles(report),
            box if verdict.warnings else "",
        ),
    )


def _tiles(report: Report) -> Html:
    """Return the key figures."""
    tiles: list[tuple[str, str, str]] = []
    base, tuned = report.names
    if report.validation:
        a, b = report.validation.means
        tiles.append(
            ("Validation loss", signed(report.validation.change), f"{a:.4f} ({base}) to {b:.4f} ({tuned})")
        )
    for group in sorted((g for g in report.groups if g.judged), key=lambda g: -abs(g.risen))[:2]:
        said = f"{report.makes}s match the prompt; {base}: {group.base_yes}"
        tiles.append((group.name or "Prompt matched", f"{group.tuned_yes} of {group.judged}", said))
    total = report.total
    if total:
        said = f"mean over {_count(total.videos, 'pair')}, of the value range"
        tiles.append((f"{base.capitalize()} and {tuned}: difference", f"{total.distance:.1%}", said))
    trained = report.adapter.get("trained", "")
    if trained:
        step = f"step {report.step:,}" if report.step is not None else ""
        tiles.append(("Trained", trained, ", ".join(x for x in (step, report.adapter.get("size", "")) if x)))
    cells = [tag("div", tag("dt", t), tag("dd", v, tag("small", n))) for t, v, n in tiles]
    return tag("dl", *cells, cls="tiles") if cells else Html("")


def _footer(report: Report) -> Html:
    took = f" Duration: {_duration(report.seconds)}." if report.seconds else ""
    made = f"Created by inlaid {_version()}{f' on {report.created}' if report.created else ''}.{took} "
    full = "full-quality videos" if report.makes == "video" else f"{report.makes}s"
    files = code(f"The {full}, their settings and `report.json` are in the same folder as this file.")
    return tag("footer", tag("div", made, files))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


# --- videos -------------------------------------------------------------------------------------------------


def _videos(report: Report, folder: Path) -> Html:
    if not report.pairs:
        return Html("")
    base, tuned = report.names
    groups = report.groups
    judged = any(g.judged for g in groups)
    reads = "reads pixels" if report.makes == "video" else "compares surfaces"
    rule = join(" ", tag("em", "Matches the prompt"), f" is decided by a fixed rule that {reads}.")
    out = [
        tag("h2", "Side by side"),
        _soft(
            "Same prompt, seed and initial noise: ",
            *(_key("base"), " ", tag("strong", base), " on the left, "),
            *(_key("tuned"), " ", tag("strong", tuned), " on the right."),
            rule if judged else "",
        ),
    ]
    if "coverage" in report.metrics:
        files = "Transparent pixels show a checkerboard; files with alpha are beside each video."
        out.append(_soft(files))
    height, width = report.sampling.get("size") or (1, 1)
    card = 440 if width <= 1.2 * height else 560
    with TemporaryDirectory(prefix="inlaid-") as scratch:
        for group in groups:
            if len(groups) > 1 or group.name:
                out.append(_group_head(group, report.names))
            cards = [
                _card(p, report.names, folder, Path(scratch)) for p in report.pairs if p.group == group.name
            ]
            out.append(tag("div", *cards, cls="pairs", style=f"--card-width:{card}px"))
    return join(*out)


def _group_head(group: Group, names: tuple[str, str]) -> Html:
    said = _count(group.videos, "pair")
    if group.judged:
        said += (
            f"; prompt matched: {names[0]} {group.base_yes}, {names[1]} {group.tuned_yes} of {group.judged}"
        )
    return tag("div", tag("h3", group.name or UNNAMED), tag("span", said, cls="soft"), cls="group")


def _card(pair: Pair, names: tuple[str, str], folder: Path, scratch: Path) -> Html:
    sides = zip(("base", "tuned"), names, (pair.base, pair.tuned), strict=True)
    facts = [f"seed {pair.seed}", f"difference {pair.distance:.1%}"]
    for name in list(pair.base.metrics)[:2] + ["coverage"] * ("coverage" in pair.base.metrics):
        facts.append(f"{name} {show(name, pair.base.metrics[name])} → {show(name, pair.tuned.metrics[name])}")
    return tag(
        "article",
        tag("p", pair.prompt),
        tag("div", *(_side(r, n, v, pair.prompt, folder, scratch) for r, n, v in sides), cls="sides"),
        tag("footer", *(tag("span", f) for f in facts)),
        cls="pair",
    )


def _side(role: str, name: str, video: Video, prompt: str, folder: Path, scratch: Path) -> Html:
    path = folder / video.file
    answer, image = Html(""), Html("")
    if video.yes is not None:
        word, sign = ("matches the prompt", "good") if video.yes else ("does not match", "bad")
        answer = tag("span", _icon(f"i-{sign}", f"key {sign}"), word, cls="answer")
    strip = path.with_suffix(".png")
    head = tag("figcaption", _key(role), name, answer, cls=f"is-{role}")
    if path.suffix != ".mp4":
        picture = tag("img", src=_uri(strip.read_bytes(), "image/png"), alt=f"Turntable, {role}: {prompt}")
        turn = tag("a", "open 3D view", href=Path(video.file).with_suffix(".html").as_posix())
        return tag("figure", head, picture, turn, cls="side")
    data, (height, width) = _video(path, scratch)
    tiny = "tiny" if max(height, width) <= TINY else ""
    if strip.is_file():
        source = _uri(strip.read_bytes(), "image/png")
        image = tag("img", cls=tiny, src=source, alt=f"Frames of the video, {name}: {prompt}")
    flags = dict.fromkeys(("autoplay", "loop", "muted", "playsinline", "controls"), True)
    size = {"width": width, "height": height, "style": "height:auto"}
    return tag(
        "figure",
        head,
        tag("video", cls=tiny, src=data, **size, **flags, aria_label=f"Video, {name}: {prompt}"),
        image,
        cls="side",
    )


def _video(path: Path, scratch: Path) -> tuple[str, tuple[int, int]]:
    """Return a video as a data URI with its height and width; videos larger than `LARGE` are downscaled."""
    seen = probe(path)
    size = (seen.height, seen.width)
    scale = LARGE / max(size)
    if scale < 1:
        size = (max(2, round(seen.height * scale / 2) * 2), max(2, round(seen.width * scale / 2) * 2))
        fps = float(seen.fps or 16)
        small = scratch / path.name
        write_video(small, read_frames(path, 0, seen.frames, fps, size), fps, crf=23)
        path = small
    return _uri(path.read_bytes(), "video/mp4"), size


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# --- numbers ------------------------------------------------------------------------------------------------


def _numbers(report: Report) -> Html:
    pairs = [_metrics(report), _meanings(report)] if report.pairs else []
    loss = [_losses(report.validation, report.names)] if report.validation else []
    return join(tag("h2", "Numbers"), *pairs, *loss) if pairs or loss else Html("")


def _table(name: str, heads: Iterable[tuple[str, str]], rows: Iterable[Html], foot: Iterable[Html]) -> Html:
    """Return a table that scrolls if it is too wide; each head is a title and a small subtitle."""
    cells = [tag("th", title, tag("small", under) if under else "", scope="col") for title, under in heads]
    table = tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *rows), tag("tfoot", *foot))
    return tag("div", table, cls="scroll", tabindex=0, role="region", aria_label=name)


def _metrics(report: Report) -> Html:
    base, tuned = report.names
    groups, total = report.groups, report.total
    assert total
    judged = total.judged > 0
    made, metrics = f"{report.makes}s", report.metrics
    heads = [("Group", ""), (made.capitalize(), "")]
    heads += [("Prompt matched", made)] if judged else []
    heads += [(m.name.capitalize(), m.unit) for m in metrics.values()]
    heads.append(("Difference", f"between the {made}"))
    foot = [_row(total, judged, "All")] if len(groups) != 1 else []
    if report.training:
        known = report.training
        values = [tag("td", show(k, known[k]) if k in known else "") for k in metrics]
        gaps = [tag("td")] * (2 if judged else 1)
        title = tag("th", "Training clips, for reference", scope="row")
        foot.append(tag("tr", title, *gaps, *values, tag("td"), cls="yardstick"))
    caption = _soft(_key("base"), f" {base} → ", _key("tuned"), f" {tuned}, means over the {made}")
    return join(caption, _table("Metrics by group", heads, [_row(g, judged) for g in groups], foot))


def _row(group: Group, judged: bool, name: str | None = None) -> Html:
    name = name or group.name or UNNAMED
    cells = [tag("th", name, scope="row"), tag("td", str(group.videos))]
    if judged:
        of = tag("span", f" of {group.judged}", cls="soft")
        yes = join(_both(str(group.base_yes), str(group.tuned_yes)), of) if group.judged else ""
        cells.append(tag("td", yes))
    cells += [tag("td", _both(show(k, group.base[k]), show(k, group.tuned[k]))) for k in group.base]
    return tag("tr", *cells, tag("td", f"{group.distance:.1%}"))


def _both(base: str, tuned: str) -> Html:
    return join(tag("span", base, cls="was"), tag("span", "→", cls="to"), tag("span", tuned, cls="is"))


def _meanings(report: Report) -> Html:
    told = {
        m.name: f"{m.meaning} {m.better.capitalize()} is better." if m.better else m.meaning
        for m in report.metrics.values()
    }
    what = "Mean absolute pixel difference of the two videos"
    if report.makes != "video":
        what = "Share of both surfaces that is not close to the other surface"
    told["difference"] = f"{what}; 0 means that training changed nothing."
    cells = [tag("div", tag("dt", name.capitalize()), tag("dd", text)) for name, text in told.items()]
    return tag("dl", *cells, cls="means")


def _losses(loss: ValidationClip, names: tuple[str, str]) -> Html:
    base, tuned = (np.asarray(x).mean(axis=0) for x in (loss.base, loss.tuned))

    def row(level: str, quantile: str, a: float, b: float, change: float) -> Html:
        numbers = [
            tag("td", f"{a:.4f}", cls="is-base"),
            tag("td", f"{b:.4f}", cls="is-tuned"),
            tag("td", signed(change)),
        ]
        return tag("tr", tag("th", level, scope="row"), tag("td", quantile), *numbers)

    columns = zip(loss.quantiles, loss.levels, base, tuned, strict=True)
    rows = [row(f"{t:.3f}", f"{q:.0%}", a, b, b / a - 1) for q, t, a, b in columns]
    heads = [
        ("Noise level", "0 data, 1 noise"),
        ("Quantile", "of training noise levels"),
        *((n, "") for n in names),
    ]
    said = (
        f"Loss on {_count(len(loss.clips), loss.one)} not used for training, with the same noise for both "
        "models: differences come from training alone. Low noise levels measure detail, high ones layout."
    )
    name = "Validation loss by noise level"
    foot = [row("mean", "", *loss.means, loss.change)]
    return join(tag("h3", name, cls="later"), _soft(said), _table(name, [*heads, ("Change", "")], rows, foot))


# --- curves -------------------------------------------------------------------------------------------------


def _curves(report: Report) -> Html:
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
    wide = charts.render(Chart("Training loss", "step", "loss", training, width=1000, height=280, **mark))
    small = list(_validation_charts(report, points))
    for key, title, unit in OTHER_CURVES:
        small.append(Chart(title, "step", unit, [Line(title, points(key), "main")], zero=True))
    sized = (Chart(c.title, c.x, c.y, c.lines, 340, 220, zero=c.zero, **mark) for c in small)
    drawn = [tag("figure", text) for text in map(charts.render, sized) if text]
    if not wide and not drawn:
        return Html("")
    said = (
        "Training loss is noisy because each step samples new noise levels. Use the validation loss, which "
        "has fixed noise, to judge progress."
    )
    dashes = " Dashed: the base model." if report.validation and report.names[0] == "base" else ""
    head = join(tag("h2", "Curves"), _soft(said + dashes))
    return join(
        head, tag("figure", wide, cls="wide", tabindex=0) if wide else "", tag("div", *drawn, cls="charts")
    )


def _validation_charts(report: Report, points: Callable[[str], list[Point]]) -> Iterable[Chart]:
    """Yield a chart of the mean loss and of each quantile; the base model is step 0 and a dashed line."""
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


def _clips(folder: Path) -> Html:
    path = folder / "clips.png"
    if not path.is_file():
        return Html("")
    with Image.open(path) as image:
        if image.width > SHEET:
            size = (SHEET, round(image.height * SHEET / image.width))
            image = image.resize(size, Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "PNG", optimize=True)
    sheet = tag("img", src=_uri(data.getvalue(), "image/png"), alt="Contact sheet of training clips")
    said = _soft("Frames of training clips as passed to the model, after sampling, scaling and cropping.")
    return join(tag("h2", "Training clips"), said, tag("div", sheet, cls="sheet"))


def _settings(report: Report) -> Html:
    machine = {k: v for k, v in report.environment.items() if k != "packages"}
    sections = {k: v for k, v in report.settings.items() if isinstance(v, Mapping)}
    top = {k: v for k, v in report.settings.items() if k not in sections}
    parts = {
        "Trained weights": _facts({"Adapter": report.adapter}),
        "Sampling settings": _facts({"Sampling": report.sampling}),
        "Recipe": _facts({"top level": top, **sections}),
        "Environment": _facts({"Packages": report.environment.get("packages", {}), "Machine": machine}),
    }
    first = next(iter(parts))
    details = [tag("details", tag("summary", t), text, open=t == first) for t, text in parts.items() if text]
    return join(tag("h2", "Settings"), *details) if details else Html("")


def _facts(blocks: Mapping[str, Mapping[str, Any]]) -> Html:
    out = []
    for title, values in blocks.items():
        rows = [part for k, v in values.items() for part in (tag("dt", k), tag("dd", _value(v)))]
        out += [tag("div", tag("h3", title), tag("dl", *rows))] if rows else []
    return tag("div", *out, cls="facts") if out else Html("")


def _value(value: Any) -> str:
    """Format a setting as text."""
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
