"""A curve as a picture: mean Dice against scans per minute, and Dice by block size.

Nothing here touches pyplot or its global state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from organfast.curve import LOSSES, Curve
from organfast.overlay import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curve_figure"]

_DPI = 100
_WIDTH, _HEIGHT = 1000, 620  # px, of the curve
_ROW, _COLUMN, _NAMES = 26, 64, 190  # px, of the table of sizes
_INK, _FAINT, _FRONT = "#1b1f24", "#9aa3ad", "#1f6fb2"
_COLOURS = {"fast": "#c2571a", "balanced": "#7b3fa0", "accurate": "#1c7c54"}
_TEXT: dict[str, Any] = {"family": "DejaVu Sans", "parse_math": False}
# Labels of presets beside their points, px: the fast one lies to the right, the others more left.
_ASIDE = {"fast": (-12, -26), "balanced": (-12, -30), "accurate": (12, 14)}


def curve_figure(curve: Curve) -> Figure:
    """Every point, the front as a line, the presets named; below it Dice by organ and block size.

    Parameters
    ----------
    curve : Curve
        What to draw; the table of sizes only where sizes were compared.

    Returns
    -------
    Figure
        1000 px wide.
    """
    known = [organ for organ, found in curve.smallest.items() if found is not None]
    table_px = _ROW * (len(known) + 3) if known else 0
    height = _HEIGHT + table_px
    figure = empty_figure(_WIDTH, height, _DPI, "white")
    bottom = (table_px + 70) / height
    axes = figure.add_axes((0.08, bottom, 0.89, 1 - bottom - 62 / height), facecolor="white")
    _draw_points(axes, curve)
    patients = f"{curve.n_patients} patient{'s' if curve.n_patients > 1 else ''}"
    figure.text(
        0.08,
        1 - 24 / height,
        f"Accuracy against throughput: {patients}, {curve.n_cases} scans, each point timed "
        f"{curve.n_timings} times with {curve.threads} thread{'s' if curve.threads > 1 else ''}",
        size=12,
        color=_INK,
        va="center",
        **_TEXT,
    )
    if known:
        left, width = _NAMES / _WIDTH, _COLUMN * len(curve.smallest[known[0]].by_size) / _WIDTH  # type: ignore[union-attr]  # known
        box = (left, _ROW / height, width, _ROW * len(known) / height)
        _draw_sizes(figure.add_axes(box), curve, known)
    return figure


def _draw_points(axes: Axes, curve: Curve) -> None:
    speeds = np.array([point.scans_per_minute for point in curve.points])
    dice = np.array([point.mean_dice for point in curve.points])
    on_front = np.array(curve.front)
    # Given, so that no matplotlibrc changes the picture.
    axes.set_xscale("log")
    low, high = speeds.min(), speeds.max()
    room = max((high / low) ** 0.08, 1.1)
    axes.set_xlim(low / room, high * room)
    span = max(float(np.ptp(dice)), 0.02)
    axes.set_ylim(dice.min() - 0.12 * span, dice.max() + 0.16 * span)
    axes.plot(
        speeds[~on_front], dice[~on_front], "o", color=_FAINT, markersize=5, label="dominated"
    )
    order = np.flatnonzero(on_front)[np.argsort(speeds[on_front], kind="stable")]
    axes.plot(
        speeds[order],
        dice[order],
        "-o",
        color=_FRONT,
        linewidth=1.8,
        markersize=7,
        label="front: no point is both faster and better",
    )
    for name in curve.presets.values():
        point = next(p for p in curve.points if p.name == name)
        presets = [p for p in LOSSES if curve.presets[p] == name]
        colour, aside = _COLOURS[presets[-1]], _ASIDE[presets[-1]]
        x, y = point.scans_per_minute, point.mean_dice
        axes.plot([x], [y], "o", color=colour, markersize=13, fillstyle="none", markeredgewidth=2)
        is_right = x > np.sqrt(low * high)
        axes.annotate(
            f"{', '.join(presets)}: {name}",
            (x, y),
            (-aside[0] if is_right and aside[0] > 0 else aside[0], aside[1]),
            textcoords="offset points",
            ha="right" if is_right else "left",
            size=10,
            color=colour,
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5},
            **_TEXT,
        )
    ticks = _log_ticks(low / room, high * room)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], color=_INK)
    axes.minorticks_off()
    axes.grid(visible=True, color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("scans per minute (segmented; reading the file not counted)", color=_INK)
    axes.set_ylabel("mean Dice over organs and patients", color=_INK)
    axes.legend(loc="lower left", frameon=False, fontsize=9, labelcolor=_INK)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... within the range, or both ends where none is."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return ticks if len(ticks) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]


def _draw_sizes(axes: Axes, curve: Curve, organs: list[str]) -> None:
    """Dice by organ and size; the smallest size that is as good as the best has a frame."""
    from matplotlib.patches import Rectangle

    found = [curve.smallest[organ] for organ in organs]
    sizes = list(found[0].by_size) if found[0] is not None else []
    values = np.array([[s.by_size[size] for size in sizes] for s in found if s is not None])
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.2, aspect="auto", origin="upper")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes], color=_INK)
    axes.set_yticks(
        range(len(organs)), [organ.replace("_", " ") for organ in organs], color=_INK, size=9
    )
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            size=9,
            color="white" if value > 0.75 else _INK,
            **_TEXT,
        )
    for row, smallest in enumerate(found):
        if smallest is not None:
            column = sizes.index(smallest.block_size)
            frame = Rectangle(
                (column - 0.46, row - 0.43), 0.92, 0.86, fill=False, edgecolor="#c2571a", lw=2.2
            )
            axes.add_patch(frame)
    axes.set_xlabel(
        "Dice by block side in voxels; framed: the smallest that still recognises the organ",
        color=_INK,
        size=10,
        loc="left",
    )
    axes.xaxis.set_label_position("top")
