"""Line charts as SVG text that takes its colours from the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    style: str
    """CSS class: `raw` (thin and pale), `main` (strong) or `base` (dashed)."""
    dots: bool = False
    """Mark each point and tell its values when pointed at."""


@dataclass(frozen=True)
class Chart:
    """A chart with labelled axes."""

    title: str
    x: str
    """Label of the horizontal axis."""
    y: str
    lines: Sequence[Line]
    width: int = 640
    height: int = 260
    mark: float | None = None
    """A place on the horizontal axis to mark, such as the step that was evaluated."""
    mark_name: str = ""
    zero: bool = False
    """Whether the vertical axis begins at 0."""


def render(chart: Chart) -> str:
    """The chart as `<svg>`; empty when there is nothing to draw."""
    lines = [line for line in chart.lines if line.points]
    if not lines:
        return ""
    xs, ys = _ranges(chart, lines)
    left, right, top, bottom = 58, chart.width - 14, 34, chart.height - 44

    def at(x: float, y: float) -> tuple[float, float]:
        px = left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left)
        py = bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top)
        return round(px, 1), round(min(max(py, top - 6), bottom + 6), 1)

    said = "; ".join(f"{n.name}: {short(n.points[0][1])} to {short(n.points[-1][1])}" for n in lines)
    out = [
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'aria-label="{escape(f"{chart.title} over {chart.x}. {said}")}">',
        f'<text class="title" x="{left}" y="16">{escape(chart.title)}</text>',
    ]
    out += _axes(chart, xs, ys, at, (left, right, top, bottom))
    if chart.mark is not None and xs[0] <= chart.mark <= xs[1]:
        x = at(chart.mark, ys[0])[0]
        out.append(f'<line class="mark" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}"/>')
        anchor = "end" if x > (left + right) / 2 else "start"
        shift = -4 if anchor == "end" else 4
        out.append(
            f'<text class="note" x="{x + shift}" y="{top + 9}" text-anchor="{anchor}">{escape(chart.mark_name)}</text>'
        )
    for line in lines:
        path = " ".join(f"{x},{y}" for x, y in (at(*p) for p in _thin(line.points)))
        out.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.style == "base":
            x, y = at(*line.points[-1])
            out.append(
                f'<text class="note is-base" x="{x}" y="{y - 5}" text-anchor="end">{escape(line.name)}</text>'
            )
        for p in line.points if line.dots else ():
            x, y = at(*p)
            told = escape(f"{line.name}, {chart.x} {p[0]:g}: {p[1]:.5g}")
            out.append(f'<circle class="{line.style}" cx="{x}" cy="{y}" r="3"><title>{told}</title></circle>')
    return "\n".join([*out, _legend(lines, right), "</svg>"])


def _legend(lines: Sequence[Line], right: int) -> str:
    """Names beside a sample of each line, from the right; a line alone needs none, a base line carries its own."""
    named = [line for line in lines if line.style != "base"]
    out, x = [], float(right)
    for line in reversed(named if len(named) > 1 else []):
        x -= 6.4 * len(line.name)
        out.append(f'<text class="note" x="{x:.1f}" y="16">{escape(line.name)}</text>')
        out.append(f'<line class="{line.style}" x1="{x - 26:.1f}" y1="12" x2="{x - 5:.1f}" y2="12"/>')
        x -= 40
    return "".join(out)


def _axes(chart: Chart, xs: Point, ys: Point, at, box: tuple[int, int, int, int]) -> list[str]:
    left, right, top, bottom = box
    out = []
    for value in ticks(*ys, max(2, chart.height // 60)):
        y = at(xs[0], value)[1]
        out.append(f'<line class="grid" x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>')
        out.append(f'<text class="tick" x="{left - 7}" y="{y + 3.5}" text-anchor="end">{short(value)}</text>')
    for value in ticks(*xs, max(2, chart.width // 110)):
        x = at(value, ys[0])[0]
        out.append(f'<line class="grid" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 4}"/>')
        out.append(f'<text class="tick" x="{x}" y="{bottom + 17}" text-anchor="middle">{short(value)}</text>')
    middle = (top + bottom) / 2
    out.append(f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    out.append(
        f'<text class="label" x="{right}" y="{bottom + 34}" text-anchor="end">{escape(chart.x)}</text>'
    )
    out.append(
        f'<text class="label" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(chart.y)}</text>'
    )
    return out


def _ranges(chart: Chart, lines: Sequence[Line]) -> tuple[Point, Point]:
    """What the axes span; a few wild values of a raw line do not flatten the rest."""
    x = np.array([p[0] for line in lines for p in line.points])
    y = np.array([p[1] for line in lines for p in line.points if math.isfinite(p[1])] or [0.0])
    low, high = float(y.min()), float(y.max())
    calm = float(np.percentile(y, 98))
    high = calm if len(y) > 50 and high - low > 2.5 * (calm - low) > 0 else high
    low = min(low, 0.0) if chart.zero else low
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    first, last = min(0.0, float(x.min())), float(x.max())
    bottom = low if chart.zero and low == 0 else low - room
    return (first, last if last > first else first + 1), (bottom, high + room)


def _thin(points: Sequence[Point], most: int = 1200) -> list[Point]:
    """At most so many finite points, evenly chosen, the last included: more would be finer than a pixel."""
    kept = [p for p in points if math.isfinite(p[1])]
    if len(kept) <= most:
        return kept
    return [kept[i] for i in np.linspace(0, len(kept) - 1, most).round().astype(int)]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values inside an interval, about `most` of them: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value / 1000:g}k" if size >= 10000 and value % 100 == 0 else f"{value:.4g}"


def smooth(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """The mean over a window of `share` of all points around each, shorter at the ends; needs no padding."""
    half = max(1, round(len(points) * share / 2))
    x, y = (np.array([p[i] for p in points], np.float64) for i in (0, 1))
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return list(zip(x.tolist(), ((total[high] - total[low]) / (high - low)).tolist(), strict=True))
