"""Charts of a comparison as SVG files: points with intervals, and lines. No library, no network."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.ui.charts import nice_ticks

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5aa8", "#c77d1e", "#3aa6a0", "#7a7a7a", "#a8324a", "#5b6b1e")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 330, 56, 34, 44
LEGEND = 230


@dataclass(frozen=True, slots=True)
class Mark:
    """One or more points of a name: (x, y, half of y's interval); joined by a line where there are several."""

    name: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    title: str
    across: str
    up: str
    marks: Sequence[Mark]


def figure(panels: Sequence[Panel]) -> str:
    """The panels side by side, with one legend: a name has one colour in all of them."""
    names = list(dict.fromkeys(mark.name for panel in panels for mark in panel.marks))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    width = WIDTH * len(panels) + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{HEIGHT}" fill="white"/>'
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number * WIDTH} 0)">{_panel(panel, colours)}</g>')
    for number, name in enumerate(names):
        y = TOP + 8 + 20 * number
        parts.append(f'<circle cx="{width - LEGEND + 14}" cy="{y}" r="5" fill="{colours[name]}"/>')
        parts.append(f'<text x="{width - LEGEND + 26}" y="{y + 4}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>\n"])


def _panel(panel: Panel, colours: dict[str, str]) -> str:
    points = [point for mark in panel.marks for point in mark.points]
    columns = nice_ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))
    rows = nice_ticks(min(y - e for _, y, e in points), max(y + e for _, y, e in points))
    right, bottom = WIDTH - 14, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - columns[0]) / (columns[-1] - columns[0]) * (right - LEFT)

    def down(y: float) -> float:
        return bottom - (y - rows[0]) / (rows[-1] - rows[0]) * (bottom - TOP)

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{html.escape(panel.title)}</text>']
    for y in rows:
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in columns:
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:.4g}</text>')
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(panel.across)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(panel.up)}</text>"
    )
    for mark in panel.marks:
        colour = colours[mark.name]
        if len(mark.points) > 1:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y, _ in mark.points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            continue
        for x, y, e in mark.points:
            centre = f"{across(x):.1f}"
            parts.append(
                f'<line x1="{centre}" x2="{centre}" y1="{down(y - e):.1f}" y2="{down(y + e):.1f}" stroke="{colour}" '
                f'stroke-width="1.5"/><circle cx="{centre}" cy="{down(y):.1f}" r="4.5" fill="{colour}"/>'
            )
    return "".join(parts)
