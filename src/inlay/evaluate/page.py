"""The report as one HTML file: everything inside it, nothing fetched, readable from a disk, a mail or a web server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from inlay import media
from inlay.evaluate import charts
from inlay.evaluate.report import Group, HeldOut, Pair, Report, Video, show, signed
from inlay.evaluate.video import METRICS

TINY = 160
"""Videos whose longer side has at most so many pixels are enlarged without smoothing."""
LARGE = 512
"""Videos with a longer side are made smaller for the page."""
SHEET = 1600
"""Contact sheets that are wider are made smaller for the page."""

OTHER_CURVES = (
    ("learning_rate", "Learning rate", "rate"),
    ("gradient_norm", "Gradient norm", "norm before clipping"),
    ("seconds_per_step", "Time per step", "seconds"),
)
"""Keys of `metrics.jsonl`, titles and units."""

TONES = {"good": "it learned", "unclear": "unclear", "bad": "not as wished"}


def render(report: Report, folder: Path) -> str:
    """The page.

    Args:
        report: what was found.
        folder: holds the report's videos, a PNG beside each, and `clips.png` with what the model saw, if there is any.
    """
    sections = {
        "videos": ("Videos", _videos(report, folder)),
        "numbers": ("Numbers", _numbers(report)),
        "curves": ("Curves", _curves(report)),
        "clips": ("Training clips", _clips(folder)),
        "settings": ("Settings", _settings(report)),
    }
    sections = {k: v for k, v in sections.items() if v[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items())
    body = [
        _header(report),
        f'<nav aria-label="Sections"><div><span class="links">{links}</span><button id="play" type="button" hidden></button></div></nav>',
        "<main>",
        *(
            f'<section id="{key}" aria-label="{title}">{text}</section>'
            for key, (title, text) in sections.items()
        ),
        "</main>",
        _footer(report),
    ]
    page = Template(Path(__file__).with_name("template.html").read_text("utf-8"))
    return page.substitute(
        title=escape(f"{report.run}: {report.verdict.headline}"), version=_version(), body="\n".join(body)
    )


def _version() -> str:
    try:
        return version("inlay")
    except PackageNotFoundError:
        return "from source"


# --- head and foot ------------------------------------------------------------------------------------------


def _header(report: Report) -> str:
    verdict = report.verdict
    reasons = "".join(f"<li>{_code(r)}</li>" for r in verdict.reasons)
    warnings = "".join(f"<li>{_code(w)}</li>" for w in verdict.warnings)
    box = (
        f'<div class="warnings" role="note"><strong>Look out</strong><ul>{warnings}</ul></div>'
        if warnings
        else ""
    )
    return f"""<header><div>
<div class="brand"><svg aria-hidden="true"><use href="#k-tuned"/></svg>
<span><strong>inlay</strong> evaluation of <span class="mono">{escape(report.run)}</span></span></div>
<span class="verdict {verdict.tone}"><svg aria-hidden="true"><use href="#i-{verdict.tone}"/></svg>{TONES[verdict.tone]}</span>
<h1>{escape(verdict.headline)}</h1>
<ul class="lead">{reasons}</ul>
{_tiles(report)}{box}
</div></header>"""


def _tiles(report: Report) -> str:
    """The few figures that everyone asks for."""
    tiles: list[tuple[str, str, str]] = []
    base, tuned = report.names
    if report.held_out:
        a, b = report.held_out.means
        tiles.append(
            ("Held-out loss", signed(report.held_out.change), f"{a:.4f} ({base}) to {b:.4f} ({tuned})")
        )
    total = report.total
    for group in sorted((g for g in report.groups if g.judged), key=lambda g: -abs(g.risen))[:2]:
        said = f"videos show what was asked; of {base}, {group.base_yes}"
        tiles.append((group.name or "As asked", f"{group.tuned_yes} of {group.judged}", said))
    if total:
        said = f"mean over {total.videos} pair{'s' * (total.videos != 1)}, of the brightness range"
        tiles.append((f"{base.capitalize()} and {tuned} differ by", f"{total.distance:.1%}", said))
    trained = report.adapter.get("trained", "")
    if trained:
        step = f"step {report.step:,}" if report.step is not None else ""
        tiles.append(("Trained", trained, ", ".join(x for x in (step, report.adapter.get("size", "")) if x)))
    cells = (
        f"<div><dt>{escape(t)}</dt><dd>{escape(v)}<small>{escape(n)}</small></dd></div>" for t, v, n in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else ""


def _footer(report: Report) -> str:
    took = f" It took {_duration(report.seconds)}." if report.seconds else ""
    made = f"Made by inlay {_version()}" + (f" on {escape(report.created)}" if report.created else "")
    files = "The videos in full quality, their settings and <code>report.json</code> lie beside this file."
    return f"<footer><div>{made}.{took} {files}</div></footer>"


# --- videos -------------------------------------------------------------------------------------------------


def _videos(report: Report, folder: Path) -> str:
    if not report.pairs:
        return ""
    base, tuned = (escape(n) for n in report.names)
    groups = report.groups
    judged = " <em>As asked</em> is the answer of a fixed rule that reads pixels, not of a network."
    judged = judged if any(g.judged for g in groups) else ""
    out = [
        "<h2>Side by side</h2>",
        f'<p class="soft">The same prompt and the same seed, so the same noise to begin with: {_key("base")} <strong>{base}</strong> '
        f"on the left, {_key('tuned')} <strong>{tuned}</strong> on the right.{judged}</p>",
    ]
    with TemporaryDirectory() as scratch:
        for group in groups:
            if len(groups) > 1 or group.name:
                out.append(_group_head(group, report.names))
            cards = [
                _card(p, report.names, folder, Path(scratch)) for p in report.pairs if p.group == group.name
            ]
            out.append(
                f'<div class="pairs" style="--card-width:{_card_width(report)}px">{"".join(cards)}</div>'
            )
    return "\n".join(out)


def _card_width(report: Report) -> int:
    height, width = report.sampling.get("size") or (1, 1)
    return 440 if width <= 1.2 * height else 560


def _group_head(group: Group, names: tuple[str, str]) -> str:
    said = f"{group.videos} pair{'s' * (group.videos != 1)}"
    if group.judged:
        said += f"; as asked: {names[0]} {group.base_yes}, {names[1]} {group.tuned_yes} of {group.judged}"
    return f'<div class="group"><h3>{escape(group.name or "Prompts of the recipe")}</h3><span class="soft">{escape(said)}</span></div>'


def _card(pair: Pair, names: tuple[str, str], folder: Path, scratch: Path) -> str:
    sides = zip(("base", "tuned"), names, (pair.base, pair.tuned), strict=True)
    figures = "".join(_side(role, name, video, pair, folder, scratch) for role, name, video in sides)
    return f"""<article class="pair"><p>{escape(pair.prompt)}</p><div class="sides">{figures}</div>
<footer><span>seed {pair.seed}</span><span>difference {pair.distance:.1%}</span>
<span>motion {show("motion", pair.base.metrics["motion"])} → {show("motion", pair.tuned.metrics["motion"])}</span>
<span>flicker {show("flicker", pair.base.metrics["flicker"])} → {show("flicker", pair.tuned.metrics["flicker"])}</span>
</footer></article>"""


def _side(role: str, name: str, video: Video, pair: Pair, folder: Path, scratch: Path) -> str:
    path = folder / video.file
    data, (height, width) = _video(path, scratch)
    tiny = " tiny" if max(height, width) <= TINY else ""
    answer = ""
    if video.yes is not None:
        word, icon = ("as asked", "good") if video.yes else ("not as asked", "bad")
        answer = f'<span class="answer"><svg class="key {icon}" aria-hidden="true"><use href="#i-{icon}"/></svg>{word}</span>'
    about = escape(f"{name}: {pair.prompt}", quote=True)
    strip = ""
    if path.with_suffix(".png").is_file():
        image = _uri(path.with_suffix(".png").read_bytes(), "image/png")
        strip = f'<img class="{tiny.strip()}" src="{image}" alt="Frames of the video, {about}">'
    return f"""<figure class="side"><figcaption class="is-{role}">{_key(role)}{escape(name)}{answer}</figcaption>
<video class="{tiny.strip()}" src="{data}" width="{width}" height="{height}" style="height:auto" autoplay loop muted playsinline controls
 aria-label="Video, {about}"></video>{strip}</figure>"""


def _key(role: str) -> str:
    return f'<svg class="key is-{role}" aria-hidden="true"><use href="#k-{role}"/></svg>'


def _video(path: Path, scratch: Path) -> tuple[str, tuple[int, int]]:
    """A video as a data URI, with height and width; large ones are made smaller first."""
    seen = media.probe(path)
    size = (seen.height, seen.width)
    scale = LARGE / max(size)
    if scale < 1:
        size = (max(2, round(seen.height * scale / 2) * 2), max(2, round(seen.width * scale / 2) * 2))
        fps = float(seen.fps or 16)
        small = scratch / path.name
        media.write_video(small, media.read(path, 0, seen.frames, fps, size), fps, crf=23)
        path = small
    return _uri(path.read_bytes(), "video/mp4"), size


def strip(frames: np.ndarray, count: int = 6, wide: int = 160) -> Image.Image:
    """Some frames of a clip, evenly chosen, in a row with transparent gaps."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
    height, width = frames.shape[1:3]
    scale = min(1.0, wide / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    gap = max(1, size[0] // 24)
    row = Image.new("RGBA", ((size[0] + gap) * len(chosen) - gap, size[1]), (0, 0, 0, 0))
    for i, frame in enumerate(chosen):
        image = Image.fromarray(frame)
        row.paste(
            image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS), (i * (size[0] + gap), 0)
        )
    return row


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# --- numbers and curves -------------------------------------------------------------------------------------


def _numbers(report: Report) -> str:
    out = ["<h2>Numbers</h2>"]
    if report.pairs:
        out += [_table(report), _meanings()]
    if report.held_out:
        out.append(_losses(report.held_out, report.names))
    return "\n".join(out) if len(out) > 1 else ""


def _table(report: Report) -> str:
    base, tuned = (escape(n) for n in report.names)
    groups, total, training = report.groups, report.total, report.training
    assert total
    judged = total.judged > 0
    heads = ["<th scope='col'>Group</th><th scope='col'>Videos</th>"]
    heads += ["<th scope='col'>As asked<small>videos</small></th>"] if judged else []
    heads += [f"<th scope='col'>{m.name.capitalize()}<small>{m.unit}</small></th>" for m in METRICS.values()]
    heads.append("<th scope='col'>Difference<small>of the two videos</small></th>")
    rows = [_row(g, judged) for g in groups]
    foot = [_row(total, judged, "All")] if len(groups) != 1 else []
    if training:
        cells = "".join(f"<td>{show(k, training[k])}</td>" for k in METRICS)
        gaps = "<td></td>" * (2 if judged else 1)
        foot.append(
            f'<tr class="yardstick"><th scope="row">Training clips, to compare</th>{gaps}{cells}<td></td></tr>'
        )
    caption = f"{_key('base')} <span class='was'>{base}</span> → {_key('tuned')} <span class='is'>{tuned}</span>, means over the videos"
    return (
        f'<p class="soft">{caption}</p><div class="scroll" tabindex="0" role="region" aria-label="Metrics by group"><table>'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot>{''.join(foot)}</tfoot></table></div>"
    )


def _row(group: Group, judged: bool, name: str | None = None) -> str:
    cells = [
        f'<th scope="row">{escape(name or group.name or "Prompts of the recipe")}</th><td>{group.videos}</td>'
    ]
    if judged:
        of = f'<span class="soft"> of {group.judged}</span>'
        cells.append(
            f"<td>{_both(str(group.base_yes), str(group.tuned_yes)) + of if group.judged else ''}</td>"
        )
    cells += [f"<td>{_both(show(k, group.base[k]), show(k, group.tuned[k]))}</td>" for k in METRICS]
    return f"<tr>{''.join(cells)}<td>{group.distance:.1%}</td></tr>"


def _both(base: str, tuned: str) -> str:
    return f'<span class="was">{base}</span><span class="to">→</span><span class="is">{tuned}</span>'


def _meanings() -> str:
    out = []
    for m in METRICS.values():
        better = f" {m.better.capitalize()} is better." if m.better else ""
        out.append(f"<div><dt>{m.name.capitalize()}</dt><dd>{escape(m.meaning)}{better}</dd></div>")
    told = "Mean absolute difference of the two videos' pixels; 0 means that the adapter changed nothing."
    out.append(f"<div><dt>Difference</dt><dd>{told}</dd></div>")
    return f'<dl class="means">{"".join(out)}</dl>'


def _losses(loss: HeldOut, names: tuple[str, str]) -> str:
    base, tuned = (np.asarray(x).mean(axis=0) for x in (loss.base, loss.tuned))
    rows = [
        f'<tr><th scope="row">{t:.3f}</th><td>{q:.0%}</td><td class="is-base">{a:.4f}</td><td class="is-tuned">{b:.4f}</td>'
        f"<td>{signed(b / a - 1)}</td></tr>"
        for q, t, a, b in zip(loss.quantiles, loss.levels, base, tuned, strict=True)
    ]
    a, b = loss.means
    foot = f'<tr><th scope="row">mean</th><td></td><td>{a:.4f}</td><td>{b:.4f}</td><td>{signed(loss.change)}</td></tr>'
    clips = f"{len(loss.clips)} clip{'s' * (len(loss.clips) != 1)}"
    heads = (
        "Noise level<small>0 data, 1 noise</small>",
        "Quantile<small>of training's levels</small>",
        *map(escape, names),
        "Change",
    )
    cells = "".join(f"<th scope='col'>{h}</th>" for h in heads)
    said = (
        f"Loss on {clips} that training never saw, with the same noise for both, so that the two columns differ by the adapter alone. "
        "Low noise levels tell about detail, high ones about layout and motion."
    )
    return (
        f'<h3 style="margin-top:2.2rem">Held-out loss by noise level</h3><p class="soft">{said}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Held-out loss by noise level"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot></table></div>"
    )


def _curves(report: Report) -> str:
    lines = report.curves
    last = max((int(x["step"]) for x in lines), default=0)
    mark = (
        {"mark": float(report.step), "mark_name": "evaluated"}
        if report.step is not None and report.step < last
        else {}
    )

    def points(key: str) -> list[charts.Point]:
        return [(float(x["step"]), float(x[key])) for x in lines if key in x]

    raw = points("loss")
    steady = len(raw) >= 10
    training = [charts.Line("as logged", raw, "raw" if steady else "main", dots=not steady)]
    training += [charts.Line("smoothed", charts.smooth(raw, 0.1), "main")] if steady else []
    wide = charts.render(
        charts.Chart("Training loss", "step", "loss", training, width=1000, height=280, **mark)
    )
    small = [charts.render(c) for c in _held_out_charts(report, points, mark)]
    for key, title, unit in OTHER_CURVES:
        style = charts.Line(title, points(key), "main")
        small.append(
            charts.render(
                charts.Chart(title, "step", unit, [style], width=340, height=220, zero=True, **mark)
            )
        )
    small = [f"<figure>{s}</figure>" for s in small if s]
    if not wide and not small:
        return ""
    said = "Training loss is noisy by nature: each step draws other noise levels. Held-out loss, with fixed noise, is the one to read."
    dashes = " Dashed: the base." if report.held_out and report.names[0] == "base" else ""
    head = f'<h2>Curves</h2><p class="soft">{said}{dashes}</p>'
    wide = f'<figure class="wide" tabindex="0">{wide}</figure>' if wide else ""
    return f'{head}{wide}<div class="charts">{"".join(small)}</div>'


def _held_out_charts(report: Report, points: Any, mark: Mapping[str, Any]) -> Iterable[charts.Chart]:
    """One small chart for the mean and one for each quantile, with the base as step 0 and as a dashed line."""
    keys = list(dict.fromkeys(k for x in report.curves for k in x if k.startswith("held_out_q")))
    loss = report.held_out
    known = loss is not None and report.names[0] == "base"
    levels = {f"held_out_q{q:.1f}": i for i, q in enumerate(loss.quantiles)} if loss else {}
    for key in ["held_out_loss", *keys]:
        curve = points(key)
        if not curve:
            continue
        title, base = "Held-out loss, mean", loss.means[0] if loss else None
        if key != "held_out_loss":
            title, base = f"at quantile {key.removeprefix('held_out_q')}", None
        if loss and key in levels:
            i = levels[key]
            title, base = f"at noise level {loss.levels[i]:.2f}", float(np.mean(loss.base, axis=0)[i])
        lines = [charts.Line("held out", curve, "main", dots=len(curve) <= 40)]
        if known and base is not None:
            begun = charts.Line("held out", [(0, base), *curve], "main", dots=len(curve) <= 40)
            lines = [charts.Line("base", [(0, base), (curve[-1][0], base)], "base"), begun]
        yield charts.Chart(title, "step", "loss", lines, width=340, height=220, **mark)


# --- clips, settings ----------------------------------------------------------------------------------------


def _clips(folder: Path) -> str:
    path = folder / "clips.png"
    if not path.is_file():
        return ""
    with Image.open(path) as image:
        tiny = "tiny" if image.height <= TINY else ""
        if image.width > SHEET:
            image = image.resize((SHEET, round(image.height * SHEET / image.width)), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "PNG", optimize=True)
    source = _uri(data.getvalue(), "image/png")
    said = '<p class="soft">Frames of training clips as the model sees them: chosen by time, scaled and cropped.</p>'
    sheet = f'<img class="{tiny}" src="{source}" alt="Contact sheet of training clips">'
    return f'<h2>What the model saw</h2>{said}<div class="sheet">{sheet}</div>'


def _settings(report: Report) -> str:
    packages = report.environment.get("packages", {})
    machine = {k: v for k, v in report.environment.items() if k != "packages"}
    recipe = {k: v for k, v in report.settings.items() if isinstance(v, Mapping)}
    top = {k: v for k, v in report.settings.items() if not isinstance(v, Mapping)}
    adapter = _facts({"Adapter": report.adapter}) if report.adapter else ""
    parts = [
        ("What was trained", adapter, True),
        ("How the videos were drawn", _facts({"Sampling": report.sampling}), False),
        ("Recipe", _facts({"run": top, **recipe}), False),
        ("Environment", _facts({"Packages": packages, "Machine": machine}), False),
    ]
    details = (
        f"<details{' open' * opened}><summary>{title}</summary>{text}</details>"
        for title, text, opened in parts
        if text
    )
    return f"<h2>Settings</h2>{''.join(details)}"


def _facts(blocks: Mapping[str, Mapping[str, Any]]) -> str:
    out = []
    for title, values in blocks.items():
        rows = "".join(
            f"<dt>{escape(str(k))}</dt><dd>{escape(_value(v))}</dd>"
            for k, v in values.items()
        )
        out.append(f"<div><h3>{escape(title)}</h3><dl>{rows}</dl></div>" if rows else "")
    return f'<div class="facts">{"".join(out)}</div>' if any(out) else ""


def _value(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "\N{EN DASH}"
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and not any(isinstance(v, (Mapping, list)) for v in value)
    ):
        return (
            " x ".join(map(str, value))
            if len(value) == 2 and all(isinstance(v, int) for v in value)
            else ", ".join(map(str, value))
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = [{k: w for k, w in v.items() if w is not None} if isinstance(v, Mapping) else v for v in value]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _code(text: str) -> str:
    """Escaped text, what stands in backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )
