"""Diagrams as SVG text: curves over epochs, and differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from comparison.report import Comparison, signed

COLOURS = ("#3b6ea8", "#d1662b", "#3f8f4f", "#8a4fa3", "#b03a48", "#5b6b73", "#b8912a", "#2a9d9d")
"""Of the models in turn."""

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 46, 12, 12, 34
HEIGHT = 300


def colour(number: int) -> str:
    """Of the model ``number``, from 0."""
    return COLOURS[number % len(COLOURS)]


def curve_chart(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """mAP50-95 (points) over epochs: a thin line for each seed, a thick one for the mean of those that got there."""
    longest = max((len(line) for lines in curves.values() for line in lines), default=0)
    top = _round_up(max((value for lines in curves.values() for line in lines for value in line), default=1.0))

    def point(epoch: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (epoch / max(longest - 1, 1))
        return f"{x:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top):.1f}"

    parts = []
    for share in range(5):
        value = top * share / 4
        y = point(0, value).split(",")[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{value:g}</text>')
    for epoch in sorted({0, longest // 2, max(longest - 1, 0)}):
        x = point(epoch, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">epoch</text>')
    for number, lines in enumerate(curves.values()):
        for line in lines:
            parts.append(_line([point(i, v) for i, v in enumerate(line)], colour(number), 1, 0.4))
        parts.append(_line([point(i, v) for i, v in enumerate(_mean(lines))], colour(number), 2.5, 1))
    return _svg(parts, HEIGHT, "mAP50-95 on val after each epoch")


def _mean(lines: Sequence[Sequence[float]]) -> list[float]:
    longest = max((len(line) for line in lines), default=0)
    columns = [[line[i] for line in lines if len(line) > i] for i in range(longest)]
    return [sum(column) / len(column) for column in columns]


def _line(points: Sequence[str], paint: str, width: float, opacity: float) -> str:
    if len(points) == 1:  # a line of one point would not be seen
        x, y = points[0].split(",")
        return f'<circle cx="{x}" cy="{y}" r="{width + 1.5}" fill="{paint}" opacity="{opacity}"/>'
    style = f'fill="none" stroke="{paint}" stroke-width="{width}" opacity="{opacity}"'
    return f'<polyline points="{" ".join(points)}" {style}/>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8, 10 times a power of ten: quarters of it are short numbers."""
    if not value > 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * 0.9999)


def difference_chart(result: Comparison, model: str) -> str:
    """A dot with its interval for the difference of ``model`` to the first one, in each part of the deciding split."""
    rows = [(row, row.scores[model].gain) for row in result.splits[-1].rows if row.scores[model].gain]
    widest = max((abs(gain.mean) + (gain.half or gain.images_half) for _, gain in rows), default=1.0)
    widest, left, height = _round_up(widest), 190, 24
    right = WIDTH - 130
    middle, scale = (left + right) / 2, (right - left) / 2 / widest
    bottom = 8 + height * len(rows)
    parts = [f'<path d="M{middle} 4V{bottom}" stroke="#999"/>']
    for share in (-1, -0.5, 0.5, 1):
        x = middle + share * widest * scale
        parts.append(f'<path d="M{x:.1f} 4V{bottom}" stroke="#eee"/>')
    for share in (-1, -0.5, 0, 0.5, 1):
        x = middle + share * widest * scale
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{share * widest:+g}</text>')
    paint = colour(result.models.index(model))
    for number, (row, gain) in enumerate(rows):
        y, x = 8 + height * (number + 0.5), middle + gain.mean * scale
        dashes = ' stroke-dasharray="3 3"' if gain.half is None else ""  # the images' part alone
        reach = (gain.images_half if gain.half is None else gain.half) * scale
        bold = ' font-weight="bold"' if row.kind == "all" else ""
        name = row.name if len(row.name) <= 24 else f"{row.name[:23]}..."
        parts.append(f'<text x="{left - 8}" y="{y:.1f}" dy="4" text-anchor="end"{bold}>{escape(name)}</text>')
        parts.append(f'<path d="M{x - reach:.1f} {y:.1f}H{x + reach:.1f}" stroke="{paint}" stroke-width="2"{dashes}/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{paint}"/>')
        parts.append(f'<text x="{right + 12}" y="{y:.1f}" dy="4"{bold}>{escape(signed(gain))}</text>')
    return _svg(parts, bottom + 20, f"difference of mAP50-95, {model} less {result.models[0]}")


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    start = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
    return "\n".join([start, *parts, "</svg>"])
