"""Line charts and stacked shares as inline SVG, drawn here so that a page needs no network and no library."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 190
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 12, 24
TICKS = 4


@dataclass(frozen=True, slots=True)
class Series:
    """A line: (step, value) points in the order of the steps, its name, and the CSS class that gives its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    css: str


def line_chart(title: str, series: Sequence[Series]) -> str:
    """A figure with one or a few lines; points that are not finite leave a gap. An empty string without any point."""
    points = [point for line in series for point in line.points if math.isfinite(point[1])]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]

    def across(x: float) -> float:
        share = 0.5 if right == left else (x - left) / (right - left)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in ticks:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.4g}</text>')
    for x, anchor in ((left, "start"), (right, "end")):
        parts.append(f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{x:.0f}</text>')
    for line in series:
        for run in _runs(line.points):
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in run)
            if len(run) == 1:
                x, y = run[0]
                parts.append(f'<circle class="{line.css}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.5"/>')
            else:
                parts.append(f'<polyline class="{line.css}" points="{path}"/>')
    parts.append("</svg>")
    legend = _legend(series) if len(series) > 1 or series[0].css != "a" else ""
    return f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>{''.join(parts)}</figure>"


def share_chart(title: str, layers: Sequence[Series]) -> str:
    """A figure of shares that add up to 1 at each step, one coloured band a layer, the first at the bottom.

    All layers have the same steps. An empty string without any point; one point is drawn as wide as the figure.
    """
    if not layers or not layers[0].points:
        return ""
    steps = [x for x, _ in layers[0].points]
    left, right = steps[0], steps[-1]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    places = [LEFT + (x - left) / (right - left) * width for x in steps] if right > left else [LEFT, LEFT + width]
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    below = [0.0] * len(places)
    for layer in layers:
        values = [y for _, y in layer.points] * (1 if right > left else 2)
        above = [low + share for low, share in zip(below, values, strict=True)]
        edge = [*zip(places, above, strict=True), *reversed([*zip(places, below, strict=True)])]
        path = " ".join(f"{x:.1f},{TOP + (1 - share) * height:.1f}" for x, share in edge)
        parts.append(f'<polygon class="{layer.css}" points="{path}"/>')
        below = above
    for tick in (0.0, 0.5, 1.0):
        y = TOP + (1 - tick) * height
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.4g}</text>')
    for x, place, anchor in ((left, places[0], "start"), (right, places[-1], "end")):
        parts.append(f'<text class="tick" x="{place:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{x:.0f}</text>')
    parts.append("</svg>")
    return f"<figure><figcaption>{html.escape(title)}{_legend(layers)}</figcaption>{''.join(parts)}</figure>"


def nice_ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers, evenly spaced, that enclose low and high; at least two, also when low equals high."""
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches of finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend(series: Sequence[Series]) -> str:
    return "".join(f'<span class="key {line.css}">{html.escape(line.name)}</span>' for line in series)
