"""Line charts as SVG text: no script, no fonts, no files beside it, so that a report is one file.

Colours are CSS classes of the page (``train``, ``val``, ``grid``, ``tick``), which has a light and a dark set.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 26  # margins
MOST_POINTS = 500  # of a line: more would be finer than a pixel
ENOUGH_TO_SMOOTH = 20
SMOOTHING = 0.05  # the smoothed line's window, as a share of the points
_QUANTILE = 0.98


@dataclass(frozen=True)
class Line:
    """``kind`` is the CSS class: train (many noisy points, smoothed) or val (few, drawn with dots)."""

    name: str
    kind: str
    points: Points


@dataclass(frozen=True)
class Band:
    """A part of the x axis with a name: one stage of several in a chart."""

    name: str
    first: float
    last: float


def chart(lines: Sequence[Line], *, title: str, width: int = WIDTH, height: int = HEIGHT, bands: Sequence[Band] = (),
          level: tuple[str, float] | None = None, x_unit: str = "steps") -> str:
    """One chart; "" without points. ``level``: a named horizontal line, left out where it would flatten the lines.

    Points that are not finite are left out.
    """
    lines = [Line(line.name, line.kind, finite(line.points)) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    every = [point for line in lines for point in line.points]
    if level is not None and _far(level[1], [y for _, y in every]):
        level = None
    x_low, x_high = min(0.0, min(x for x, _ in every)), max(x for x, _ in every)
    y_low, y_high = y_range(lines, level)
    frame = _Frame(x_low, max(x_high, x_low + 1), y_low, y_high, width, height)
    parts = [*frame.axes(x_unit), *(frame.band(band, index) for index, band in enumerate(bands))]
    if level is not None:
        parts.append(frame.level(*level))
    for line in lines:
        parts += frame.line(line)
    label = html.escape(title, quote=True)
    return (f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">' + "".join(parts)
            + "</svg>")


def _far(value: float, among: Sequence[float]) -> bool:
    """Whether ``value`` lies farther from the others than they are apart."""
    low, high = min(among), max(among)
    reach = max(high - low, 0.2 * abs(high))
    return not low - reach <= value <= high + reach


def finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def y_range(lines: Sequence[Line], level: tuple[str, float] | None) -> tuple[float, float]:
    """What holds every val point and all but the upward spikes of the rest, with a margin; never an empty range."""
    values: list[float] = [] if level is None else [level[1]]
    for line in lines:
        ordered = sorted(y for _, y in line.points)
        if line.kind == "train" and len(ordered) >= ENOUGH_TO_SMOOTH:
            cut = math.ceil(len(ordered) * _QUANTILE)
            start = line.points[0][1]  # the start is no spike: a loss falls from there
            values += [*ordered[:cut], start]
        else:
            values += ordered
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * (abs(high) or 1.0)
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers within the range."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(math.floor(high / step + 1e-9) - first + 1)]


def short(value: float) -> str:
    """12.5k, 0.00025, 0.25: what fits beside an axis."""
    size = abs(value)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale:
            return f"{value / scale:.4g}{unit}"
    return "0" if size < 1e-300 else f"{value:.2g}" if size < 1e-3 else f"{value:.4g}"


def smooth(points: Points) -> list[tuple[float, float]]:
    """Centred moving average, its window cut off at both ends alike, so that a steep start is not bent."""
    half = max(1, round(len(points) * SMOOTHING / 2))
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    found = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, max(len(points) - 1 - index, half // 2))
        first, last = index - reach, min(index + reach, len(points) - 1)
        found.append((x, (total[last + 1] - total[first]) / (last + 1 - first)))
    return found


def thin(points: Points) -> Points:
    """At most ``MOST_POINTS``, first and last among them."""
    if len(points) <= MOST_POINTS:
        return points
    pace = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(i * pace)] for i in range(MOST_POINTS)]


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int
    height: int

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (min(max(value, self.y_low), self.y_high) - self.y_low) / (self.y_high - self.y_low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def axes(self, x_unit: str) -> list[str]:
        left, right, floor = LEFT, self.width - RIGHT, self.height - BOTTOM
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
        xs = [value for value in ticks(self.x_low, self.x_high, 5) if self.x(value) < right - 46]
        for value in xs:
            parts.append(f'<text class="tick" x="{self.x(value):.1f}" y="{floor + 15}" text-anchor="middle">'
                         f"{short(value)}</text>")
        parts.append(f'<text class="tick" x="{right}" y="{floor + 15}" text-anchor="end">{html.escape(x_unit)}</text>'
                     f'<line class="axis" x1="{left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
        return parts

    def band(self, band: Band, index: int) -> str:
        first, last = self.x(band.first), self.x(band.last)
        wide, high = max(last - first, 0), self.height - TOP - BOTTOM
        shade = f'<rect class="band" x="{first:.1f}" y="{TOP}" width="{wide:.1f}" height="{high}"/>' * (index % 2 == 0)
        return (f'{shade}<text class="name" x="{(first + last) / 2:.1f}" y="{TOP + 13}" text-anchor="middle">'
                f"{html.escape(band.name)}</text>")

    def level(self, name: str, value: float) -> str:
        y, right = self.y(value), self.width - RIGHT
        return (f'<line class="level" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{right}" y="{y - 4:.1f}" text-anchor="end">{html.escape(name)}</text>')

    def path(self, points: Points, css: str) -> str:
        steps = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in thin(points))
        return f'<polyline class="{css}" points="{steps}"/>'

    def line(self, line: Line) -> list[str]:
        kind, many = html.escape(line.kind, quote=True), len(line.points) >= ENOUGH_TO_SMOOTH
        if line.kind == "train" and many:
            return [self.path(line.points, f"{kind} faint"), self.path(smooth(line.points), kind)]
        parts = [self.path(line.points, kind)] if len(line.points) > 1 else []
        if many:
            return parts
        name = html.escape(line.name)
        return parts + [f'<circle class="{kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="2.8">'
                        f"<title>{name} {short(y)} at {short(x)}</title></circle>" for x, y in line.points]
