"""Charts as SVG text: no library, no script, every number also in a tooltip.

Shapes tell apart what colours do: points are patients, bars with a diamond are means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from organfast.page import text

__all__ = ["Point", "Strip", "heat_map", "reliability_diagram", "scatter", "strips"]

_BLUE, _ORANGE, _GREY, _INK = "#0072b2", "#d55e00", "#b9c2ca", "#1c2730"


@dataclass(frozen=True)
class Strip:
    """A row of :func:`strips`: an organ.

    Parameters
    ----------
    name : str
        Of the row.
    points : sequence of (value, name)
        Patients.
    mean, low, high : float or None
        With its interval.
    """

    name: str
    points: Sequence[tuple[float, str]]
    mean: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """A point of :func:`scatter`.

    Parameters
    ----------
    name : str
        Written beside it where there is room.
    x, y : float
        ``x`` is above 0, its axis is logarithmic.
    on_front : bool
        Whether no other point is better in both.
    """

    name: str
    x: float
    y: float
    on_front: bool


def strips(rows: Sequence[Strip], label: str, top: float | None = None) -> str:
    """Values of patients, organ by organ, on one axis from 0.

    Parameters
    ----------
    rows : sequence of Strip
        From top to bottom.
    label : str
        Of the axis, with its unit.
    top : float, optional
        Its end; by default a round number beyond all values.
    """
    values = [v for row in rows for v, _ in row.points] + [row.high or 0 for row in rows]
    end = top if top is not None else _round_up(max(values, default=1.0))
    left, width, height = 150, 300, 22
    bottom = 8 + height * len(rows)

    def x(value: float) -> float:
        return left + width * min(max(value / end, 0), 1)

    parts = []
    for n in range(6):
        at = x(end * n / 5)
        parts.append(_line(at, 8, at, bottom, "#e3e8ec"))
        parts.append(_text(at, bottom + 16, f"{end * n / 5:g}", "middle", 12))
    for n, row in enumerate(rows):
        y = 8 + height * (n + 0.5)
        parts.append(_text(left - 8, y + 4, row.name, "end", 12))
        for m, (value, name) in enumerate(sorted(row.points)):
            lift = (-4, 0, 4)[m % 3]
            parts.append(
                f'<circle cx="{x(value):.1f}" cy="{y + lift:.1f}" r="3.2" fill="{_BLUE}" '
                f'fill-opacity=".55"><title>{text(name)}: {value:.3g}</title></circle>'
            )
        if row.mean is not None:
            if row.low is not None and row.high is not None:
                parts.append(_line(x(row.low), y, x(row.high), y, _ORANGE, 2.5))
            at = x(row.mean)
            parts.append(
                f'<path d="M{at:.1f} {y - 6}l5 6l-5 6l-5-6z" fill="#fff" stroke="{_ORANGE}" '
                f'stroke-width="2"><title>mean {row.mean:.3g}</title></path>'
            )
    parts.append(_text(left + width / 2, bottom + 34, label, "middle", 13))
    return _svg(left + width + 14, bottom + 42, parts, label)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float | None]],
    counts: Sequence[Sequence[int]],
    label: str,
) -> str:
    """A confusion matrix: rows are truth, cells the share of the row, 3 % and more in figures.

    Parameters
    ----------
    rows, columns : sequence of str
        Names.
    shares : (n_rows, n_columns), float or None
        None where a row is empty.
    counts : (n_rows, n_columns) int
        For the tooltips.
    label : str
        What the picture is.
    """
    size, left, top = 29, 160, 150
    parts = []
    for c, name in enumerate(columns):
        at = left + size * (c + 0.5)
        parts.append(
            f'<text x="{at + 4}" y="{top - 6}" font-size="11" '
            f'transform="rotate(-60 {at + 4} {top - 6})">{text(name)}</text>'
        )
    for r, name in enumerate(rows):
        y = top + size * r
        parts.append(_text(left - 6, y + size / 2 + 4, name, "end", 11))
        for c, column in enumerate(columns):
            share = shares[r][c]
            tip = f"{text(name)} taken for {text(column)}: {counts[r][c]:,}"
            tip += "" if share is None else f", {share:.1%}"
            parts.append(
                f'<rect x="{left + size * c}" y="{y}" width="{size - 1}" height="{size - 1}" '
                f'fill="{_shade(share)}"><title>{tip}</title></rect>'
            )
            if share is not None and share >= 0.03:
                ink = "light" if share > 0.3 else "dark"
                parts.append(
                    f'<text x="{left + size * (c + 0.5) - 0.5}" y="{y + size / 2 + 4}" '
                    f'font-size="10.5" text-anchor="middle" class="{ink}">'
                    f"{100 * share:.0f}</text>"
                )
    return _svg(left + size * len(columns) + 12, top + size * len(rows) + 4, parts, label)


def reliability_diagram(
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
    counts: Sequence[int],
    label: str,
) -> str:
    """How often predictions are right, by how confident they are; bars below count them.

    Parameters
    ----------
    confidence, accuracy : sequence of float or None
        Means of each bin; None where it is empty.
    counts : sequence of int
        Predictions of each bin.
    label : str
        What was predicted.
    """
    left, side, most = 52, 260, max([*counts, 1])

    def x(value: float) -> float:
        return left + side * value

    def y(value: float) -> float:
        return 12 + side * (1 - value)

    parts = []
    for n in range(6):
        tick = n / 5
        parts += [
            _line(x(tick), 12, x(tick), y(0), "#e3e8ec"),
            _line(left, y(tick), x(1), y(tick), "#e3e8ec"),
        ]
        parts += [_text(x(tick), y(0) + 16, f"{tick:g}", "middle", 12)]
        parts += [_text(left - 7, y(tick) + 4, f"{tick:g}", "end", 12)]
    parts.append(f'<path d="M{x(0)} {y(0)}L{x(1)} {y(1)}" stroke="{_INK}" stroke-dasharray="5 4"/>')
    there = [
        (c, a, n)
        for c, a, n in zip(confidence, accuracy, counts, strict=True)
        if c is not None and a is not None
    ]
    path = "L".join(f"{x(c):.1f} {y(a):.1f}" for c, a, _ in there)
    if path:
        parts.append(f'<path d="M{path}" fill="none" stroke="{_BLUE}" stroke-width="2"/>')
    base = y(0) + 92
    for c, a, n in there:
        tip = f"<title>confidence {c:.2f}, right {a:.2f}, {n:,} predictions</title>"
        parts.append(
            f'<circle cx="{x(c):.1f}" cy="{y(a):.1f}" r="4.5" fill="{_BLUE}">{tip}</circle>'
        )
        tall = 42 * n / most
        parts.append(
            f'<rect x="{x(c) - 7:.1f}" y="{base - tall:.1f}" width="14" fill="{_GREY}" '
            f'height="{max(tall, 0.8):.1f}">{tip}</rect>'
        )
    parts.append(_line(left, base, x(1), base, _INK))
    parts.append(_text(x(0.5), y(0) + 35, "confidence", "middle", 13))
    parts.append(_text(x(0.5), base + 17, "predictions", "middle", 12))
    parts.append(
        f'<text x="14" y="{y(0.5)}" font-size="13" text-anchor="middle" '
        f'transform="rotate(-90 14 {y(0.5)})">share that is right</text>'
    )
    return _svg(left + side + 16, int(base + 26), parts, label)


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points over a logarithmic axis, those that none beats joined by a line.

    Parameters
    ----------
    points : sequence of Point
        ``y`` from 0 to 1.
    x_label, y_label : str
        Of the axes, with units.
    """
    left, width, height = 56, 460, 280
    least = math.floor(math.log10(min(p.x for p in points)) * 2) / 2
    most = max(math.ceil(math.log10(max(p.x for p in points)) * 2) / 2, least + 0.5)

    def x(value: float) -> float:
        return left + width * (math.log10(value) - least) / (most - least)

    def y(value: float) -> float:
        return 12 + height * (1 - value)

    parts = []
    for n in range(6):
        parts.append(_line(left, y(n / 5), left + width, y(n / 5), "#e3e8ec"))
        parts.append(_text(left - 7, y(n / 5) + 4, f"{n / 5:g}", "end", 12))
    for tick in (m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)):
        if least <= math.log10(tick) <= most:
            parts.append(_line(x(tick), 12, x(tick), y(0), "#e3e8ec"))
            parts.append(_text(x(tick), y(0) + 16, f"{tick:g}", "middle", 12))
    front = sorted((p for p in points if p.on_front), key=lambda p: p.x)
    if len(front) > 1:
        path = "L".join(f"{x(p.x):.1f} {y(p.y):.1f}" for p in front)
        parts.append(f'<path d="M{path}" fill="none" stroke="{_ORANGE}" stroke-width="2"/>')
    taken = [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6) for p in points]
    for p in sorted(points, key=lambda p: not p.on_front):
        fill, line = (_ORANGE, _ORANGE) if p.on_front else ("#fff", _BLUE)
        parts.append(
            f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="5" fill="{fill}" stroke="{line}" '
            f'stroke-width="2"><title>{text(p.name)}: {p.x:.3g}, {p.y:.3f}</title></circle>'
        )
        box = _room_for(p.name, x(p.x), y(p.y), taken, (left, 12, left + width, y(0)))
        if box is not None:
            taken.append(box)
            parts.append(_text(box[0], box[3] - 3, p.name, "start", 12))
    parts.append(_text(left + width / 2, y(0) + 36, x_label, "middle", 13))
    parts.append(
        f'<text x="14" y="{y(0.5)}" font-size="13" text-anchor="middle" '
        f'transform="rotate(-90 14 {y(0.5)})">{text(y_label)}</text>'
    )
    return _svg(left + width + 16, int(y(0) + 46), parts, f"{y_label} by {x_label}")


Box = tuple[float, float, float, float]


def _room_for(name: str, x: float, y: float, taken: Sequence[Box], page: Box) -> Box | None:
    """Where a name fits beside its point; None where it would lie on something."""
    long = 6.6 * len(name) + 4
    corners = ((x + 8, y - 8), (x - 8 - long, y - 8), (x - long / 2, y - 24), (x - long / 2, y + 9))
    for left, top in corners:
        box = (left, top, left + long, top + 15)
        inside = page[0] <= box[0] and page[1] <= box[1] and box[2] <= page[2] and box[3] <= page[3]
        free = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken)
        if inside and free:
            return box
    return None


def _round_up(value: float) -> float:
    """The least of 1, 2, 5, 10, ... times a power of ten that is not below."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value)


def _shade(share: float | None) -> str:
    """White to dark blue, evenly in lightness."""
    if share is None:
        return "#f0f0f0"
    root = math.sqrt(min(max(share, 0), 1))
    red, green, blue = (round(a + (b - a) * root) for a, b in ((247, 8), (250, 69), (252, 120)))
    return f"rgb({red},{green},{blue})"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"/>'
    )


def _text(x: float, y: float, words: str, anchor: str, size: int) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{text(words)}</text>"
    )


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{text(label)}">{"".join(parts)}</svg>'
    )
