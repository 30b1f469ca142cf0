"""Layout of line charts for the evaluation report.

The template `templates/_chart.html` writes the shapes as SVG; the CSS of the page sets their colors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Data series that is drawn as a line in a chart."""

    name: str
    points: Sequence[Point]
    style: str
    """CSS class of the line: `raw` (thin and pale), `main` (bold) or `base` (dashed, with a label)."""
    dots: bool = False
    """True to mark each point with a dot that shows its values on hover."""


@dataclass(frozen=True)
class Chart:
    """Line chart with labeled axes; width and height are in pixels."""

    title: str
    x: str
    """Label of the horizontal axis. The axis starts at 0."""
    y: str
    """Label of the vertical axis."""
    lines: Sequence[Line]
    width: int = 640
    height: int = 260
    mark: float | None = None
    """Position of a vertical marker on the horizontal axis, such as the evaluated training step. None for no
    marker."""
    mark_name: str = ""
    zero: bool = False
    """True to start the vertical axis at 0."""


@dataclass(frozen=True)
class _Frame:
    """Conversion from data coordinates to pixel positions in a chart."""

    x: Point
    """Lowest and highest x value of the data."""
    y: Point
    left: float
    right: float
    top: float
    bottom: float

    def at(self, x: float, y: float) -> Point:
        px = self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)
        py = self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)
        return round(px, 1), round(min(max(py, self.top - 6), self.bottom + 6), 1)


@dataclass(frozen=True)
class Text:
    """Text element of a drawing; `style` is its CSS class."""

    kind: ClassVar[str] = "text"
    text: str
    x: float
    y: float
    style: str
    anchor: str | None = None
    transform: str | None = None


@dataclass(frozen=True)
class Rule:
    """Straight line from (x1, y1) to (x2, y2) in a drawing."""

    kind: ClassVar[str] = "rule"
    x1: float
    y1: float
    x2: float
    y2: float
    style: str


@dataclass(frozen=True)
class Curve:
    """Line through a sequence of points in a drawing."""

    kind: ClassVar[str] = "curve"
    points: Sequence[Point]
    style: str


@dataclass(frozen=True)
class Dot:
    """Dot in a drawing. The dot shows `title` on hover."""

    kind: ClassVar[str] = "dot"
    x: float
    y: float
    title: str
    style: str


Shape = Text | Rule | Curve | Dot


@dataclass(frozen=True)
class Drawing:
    """Chart as a list of shapes in painting order, with positions in pixels."""

    width: int
    height: int
    label: str
    """Text summary of the chart for screen readers."""
    shapes: Sequence[Shape]


def layout(chart: Chart) -> Drawing | None:
    """Compute the positions of all elements of a chart. Points with non-finite values are left out.

    Returns:
        The drawing, or None if no points are left.
    """
    finite = (replace(n, points=[p for p in n.points if math.isfinite(p[1])]) for n in chart.lines)
    lines = [line for line in finite if line.points]
    if not lines:
        return None
    frame = _Frame(*_ranges(chart, lines), 58, chart.width - 14, 34, chart.height - 44)
    ends = "; ".join(f"{n.name}: {short(n.points[0][1])} to {short(n.points[-1][1])}" for n in lines)
    shapes = [
        Text(chart.title, frame.left, 16, "title"),
        *_axes(chart, frame),
        *_mark(chart, frame),
        *(shape for line in lines for shape in _line(chart, line, frame)),
        *_legend(lines, frame.right),
    ]
    return Drawing(chart.width, chart.height, f"{chart.title} over {chart.x}. {ends}", shapes)


def _text(
    text: str, x: float, y: float, style: str, anchor: str | None = None, transform: str | None = None
) -> Text:
    return Text(text, round(x, 1), round(y, 1), style, anchor, transform)


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> Rule:
    return Rule(round(x1, 1), round(y1, 1), round(x2, 1), round(y2, 1), style)


def _line(chart: Chart, line: Line, frame: _Frame) -> list[Shape]:
    shapes: list[Shape] = [Curve([frame.at(*p) for p in _thin(line.points)], line.style)]
    if line.style == "base":
        x, y = frame.at(*line.points[-1])
        shapes.append(_text(line.name, x, y - 5, "note is-base", "end"))
    for p in line.points if line.dots else ():
        title = f"{line.name}, {chart.x} {p[0]:g}: {p[1]:.5g}"
        shapes.append(Dot(*frame.at(*p), title, line.style))
    return shapes


def _mark(chart: Chart, frame: _Frame) -> list[Shape]:
    if chart.mark is None or not frame.x[0] <= chart.mark <= frame.x[1]:
        return []
    x = frame.at(chart.mark, frame.y[0])[0]
    to_left = x > (frame.left + frame.right) / 2
    anchor, offset = ("end", -4) if to_left else ("start", 4)
    name = _text(chart.mark_name, x + offset, frame.top - 4, "note", anchor)
    return [_rule(x, frame.top, x, frame.bottom, "mark"), name]


def _legend(lines: Sequence[Line], right: float) -> list[Shape]:
    """Return the elements of the legend: the name and line style of each line.

    Lines of style `base` are left out, because they have labels in the chart. If fewer than two lines are
    left, there is no legend.
    """
    named = [line for line in lines if line.style != "base"]
    shapes: list[Shape] = []
    x = right
    for line in reversed(named if len(named) > 1 else []):
        x -= 6.4 * len(line.name)
        shapes += [_text(line.name, x, 16, "note"), _rule(x - 26, 12, x - 5, 12, line.style)]
        x -= 40
    return shapes


def _axes(chart: Chart, frame: _Frame) -> list[Shape]:
    left, right, bottom = frame.left, frame.right, frame.bottom
    shapes: list[Shape] = []
    for value in ticks(*frame.y, max(2, chart.height // 60)):
        y = frame.at(0, value)[1]
        shapes += [_rule(left, y, right, y, "grid"), _text(short(value), left - 7, y + 3.5, "tick", "end")]
    for value in ticks(*frame.x, max(2, chart.width // 110)):
        x = frame.at(value, 0)[0]
        shapes.append(_rule(x, bottom, x, bottom + 4, "grid"))
        shapes.append(_text(short(value), x, bottom + 17, "tick", "middle"))
    middle = (frame.top + bottom) / 2
    shapes.append(_rule(left, bottom, right, bottom, "axis"))
    shapes.append(_text(chart.x, right, bottom + 34, "label", "end"))
    return [*shapes, _text(chart.y, 13, middle, "label", "middle", f"rotate(-90 13 {middle})")]


def _ranges(chart: Chart, lines: Sequence[Line]) -> tuple[Point, Point]:
    """Return the ranges of the horizontal and the vertical axis.

    If a few values are much larger than the 98th percentile, the vertical axis ends near that percentile.
    """
    x = np.array([p[0] for line in lines for p in line.points])
    y = np.array([p[1] for line in lines for p in line.points])
    low, high = float(y.min()), float(y.max())
    calm = float(np.percentile(y, 98))
    high = calm if len(y) > 50 and high - low > 2.5 * (calm - low) > 0 else high
    low = min(low, 0.0) if chart.zero else low
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    first, last = min(0.0, float(x.min())), float(x.max())
    bottom = low if chart.zero and low == 0 else low - room
    return (first, last if last > first else first + 1), (bottom, high + room)


def _thin(points: Sequence[Point], most: int = 1200) -> list[Point]:
    """Return at most `most` evenly spaced points, because a chart cannot show more detail."""
    if len(points) <= most:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, most).round().astype(int)]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return the values of axis ticks in [low, high], at most `most` + 1.

    The distance between ticks is 1, 2 or 5 times a power of ten.
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """Format a number as a short axis label, such as `12k` or `3e-5`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value / 1000:g}k" if size >= 10000 and value % 100 == 0 else f"{value:.4g}"


def smooth(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Return the moving average of a curve over a window of `share` times the number of points.

    The window is shorter at the ends of the curve.
    """
    half = max(1, round(len(points) * share / 2))
    x, y = (np.array([p[i] for p in points], np.float64) for i in (0, 1))
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return list(zip(x.tolist(), ((total[high] - total[low]) / (high - low)).tolist(), strict=True))
