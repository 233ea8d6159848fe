"""Pictures of a scan with labels or a probability map over it, as matplotlib figures.

Every view is in radiological convention::

        axial             coronal           sagittal
          A                  S                  S
      R  (k)  L          R  (i)  L          A  (j)  P
          P                  I                  I

Slices are those of the working axes, at their true proportions in mm; no volume is copied.
Nothing here touches pyplot or its global state.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.files import written_whole
from organfast.segmentation import Labels
from organfast.volume import Volume

Colour = tuple[float, float, float]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["overlay_probability", "overlay_views", "save_png"]

WINDOW_HU = (-160, 240)
FILL_ALPHA = 0.3
PROBABILITY_ALPHA = 0.6
LOWEST_DRAWN = 0.05

_DPI = 100
_WIDTH = 1600  # px, as all lengths of the layout
_MARGIN = 20
_GAP = 16
_LINE = 28
_LARGEST_PANEL = 1200

_PAGE = "#111418"
_INK = "#f4f4f2"
_FAINT = "#c3c7cc"
_TEXT: dict[str, Any] = {"family": "DejaVu Sans", "parse_math": False}

_PLANES = ("Axial", "Coronal", "Sagittal")
_ENDS = ("SI", "AP", "RL")  # of the working axes k, i, j, as they are drawn: high end first
_FROM = ("the feet", "the back", "the left")
_OBLIQUE_DEGREES = 2.0
_LEGEND_COLUMNS = 5
_LONGEST_NAME = 28  # characters that fit a column
_SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100)
_BAR = 130
_TAG_PX = 10  # an organ at least twice as wide has its number inside
_LETTER_PX = 16  # from the edge of a panel
_PROBABILITY_COLOURS = "plasma"
_CONVENTION = (
    "Radiological convention: the patient's right (R) is on the left of axial and coronal views."
)


@dataclass(frozen=True, eq=False)
class _View:
    """One slice as it is drawn: first row on top, first column on the left."""

    hu: NDArray[np.int16]
    labels: Labels | None
    voxel_mm: tuple[float, float]  # row, column
    ends: tuple[str, str]  # letters of rows (top, bottom) and columns (left, right)
    title: str

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height, width."""
        rows, columns = self.hu.shape
        return rows * self.voxel_mm[0], columns * self.voxel_mm[1]


def overlay_views(
    volume: Volume,
    labels: Labels,
    classes: ClassTable,
    at_mm: Sequence[float] | None = None,
    title: str = "",
) -> Figure:
    """Axial, coronal and sagittal slice with the organs' outlines and translucent fill.

    Parameters
    ----------
    volume : Volume
        The scan.
    labels : (n_k, n_i, n_j) uint8 or uint16
        Label map in working order, on the grid of ``volume.working``.
    classes : ClassTable
        Names and colours; context classes are not drawn.
    at_mm : (x, y, z), optional, RAS+ mm
        Point that all three planes meet. Without it each plane is the slice that shows most of
        the organs: the largest sum of the roots of their areas.
    title : str
        Heading.

    Returns
    -------
    Figure
        1600 px wide.

    Raises
    ------
    ValueError
        The labels do not fit the volume, or the point lies outside it.
    """
    if labels.shape != volume.working.shape:
        raise ValueError(
            f"labels of shape {labels.shape} do not fit the scan's working shape "
            f"{volume.working.shape}; give the label map in working order (k, i, j)"
        )
    centre = (
        _informative_point(labels, classes)
        if at_mm is None
        else _index_of(np.asarray(at_mm, np.float64), volume)
    )
    views = [_view(volume, labels, axis, centre[axis]) for axis in range(3)]
    seen = {int(label) for view in views for label in np.unique(np.asarray(view.labels))}
    shown = [label for label in classes.organs if label in seen]
    entries = [
        (f"{label}  {_readable(classes.names[label])}", _colour(classes, label)) for label in shown
    ]
    notes = [] if shown else ["No organ of the class table is in these slices."]
    notes += [_CONVENTION, _where(volume, centre)]
    figure, panels = _page(views, title, entries, notes)
    for axes, view in zip(panels, views, strict=True):
        _draw_scan(axes, view)
        for label in shown:
            _draw_label(axes, view, label, _colour(classes, label))
        _draw_marks(axes, view, _bar_mm(views))
    return figure


def empty_figure(width: float, height: float, dpi: int, colour: str) -> Figure:
    """A figure without a layout of its own.

    matplotlib is imported here. Where it can keep nothing in the home folder it says so, and draws
    all the same: only that is not passed on.

    Parameters
    ----------
    width, height : float
        In pixels.
    dpi : int
        Dots per inch, by which text has its size.
    colour : str
        Of the page.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor=colour)
    figure.set_layout_engine("none")
    return figure


def overlay_probability(
    volume: Volume, probability: NDArray[np.uint8], name: str, k: int | None = None
) -> Figure:
    """One organ's probability over an axial slice, beside the slice alone, with a colour bar.

    Probabilities below 0.05 are not drawn; the line is 0.5.

    Parameters
    ----------
    volume : Volume
        The scan.
    probability : (n_k, n_i, n_j) or (n_i, n_j) uint8
        The organ's map in working order or one axial slice of it, 255 = 1.
    name : str
        The organ.
    k : int, optional
        Working index of the slice: needed for a map of one slice; otherwise the slice with the
        largest sum of squared probabilities is drawn.

    Returns
    -------
    Figure
        1600 px wide.

    Raises
    ------
    ValueError
        The map does not fit the volume, or there is no such slice.
    """
    shape = volume.working.shape
    if probability.dtype != np.uint8 or probability.shape not in (shape, shape[1:]):
        raise ValueError(
            f"probability of shape {probability.shape}, {probability.dtype}, does not fit the "
            f"scan's working shape {shape}; give a uint8 map of it or of one slice"
        )
    if k is None:
        if probability.ndim == 2:
            raise ValueError("k is missing; say which slice the probability map belongs to")
        k = _fullest_slice(probability)
    if not 0 <= k < shape[0]:
        raise ValueError(f"k {k} is no slice of this scan; use 0..{shape[0] - 1}")
    view = _view(volume, None, 0, k)
    values = (probability[k] if probability.ndim == 3 else probability)[::-1, ::-1]
    notes = [
        _CONVENTION,
        f"Colour: probability at {PROBABILITY_ALPHA:.0%} opacity, below {LOWEST_DRAWN} not drawn; "
        f"line: 0.5. Window {WINDOW_HU[0]} to {WINDOW_HU[1]} HU.",
    ]
    figure, panels = _page([view, view], _readable(name), [], notes, bar=True)
    for axes in panels[:2]:
        _draw_scan(axes, view)
        _draw_marks(axes, view, _bar_mm([view]))
    _draw_probability(panels[1], view, values.astype(np.float32) / 255)
    _draw_bar(panels[2], f"probability of {_readable(name)}")
    return figure


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG; the same figure gives the same bytes.

    Parameters
    ----------
    figure : Figure
        Any matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    # The version of matplotlib would make equal pictures unequal files.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes.

    Parameters
    ----------
    figure : Figure
        Any matplotlib figure.
    path : str or PathLike
        File to write; replaced if it is there.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    with written_whole(path) as beside:
        beside.write_bytes(png_bytes(figure))


def _view(volume: Volume, labels: Labels | None, axis: int, index: int) -> _View:
    """The slice across one working axis, high end of both other axes first."""
    across = (slice(None),) * axis + (index,)
    row, column = (w for w in range(3) if w != axis)
    spacing = volume.working_spacing_mm
    return _View(
        hu=volume.working[across][::-1, ::-1],
        labels=None if labels is None else labels[across][::-1, ::-1],
        voxel_mm=(spacing[row], spacing[column]),
        ends=(_ENDS[row], _ENDS[column]),
        title=f"{_PLANES[axis]}, slice {index + 1} of {volume.working.shape[axis]} "
        f"from {_FROM[axis]}",
    )


def _informative_point(labels: Labels, classes: ClassTable) -> tuple[int, int, int]:
    """Per working axis the slice with the largest sum of the organs' diameters (roots of areas).

    Every few voxels are looked at: 128 along an axis show which slice is best.
    """
    n_classes = len(classes)
    steps = [max(1, n // 128) for n in labels.shape]
    sparse = labels[:: steps[0], :: steps[1], :: steps[2]].astype(np.int64)
    if sparse.max() >= n_classes:
        raise ValueError(f"a label is {sparse.max()}; the class table ends at {n_classes - 1}")
    organs = list(classes.organs)
    point = []
    for axis in range(3):
        n = sparse.shape[axis]
        positions = np.arange(n).reshape([-1 if w == axis else 1 for w in range(3)])
        pairs = (positions * n_classes + sparse).ravel()
        area = np.bincount(pairs, minlength=n * n_classes).reshape(n, n_classes)[:, organs]
        score = np.sqrt(area).sum(axis=1)
        best = int(np.argmax(score)) if score.any() else n // 2
        point.append(min(best * steps[axis], labels.shape[axis] - 1))
    return point[0], point[1], point[2]


def _index_of(at_mm: NDArray[np.float64], volume: Volume) -> tuple[int, int, int]:
    if at_mm.shape != (3,) or not np.isfinite(at_mm).all():
        raise ValueError(f"at_mm {at_mm.tolist()} is no point; give x, y, z in RAS+ mm")
    to_index = np.linalg.inv(volume.working_affine)
    index = np.rint(to_index[:3, :3] @ at_mm + to_index[:3, 3])
    if (index < 0).any() or (index >= volume.working.shape).any():
        raise ValueError(f"at_mm {at_mm.tolist()} lies outside the scan; give a point inside it")
    k, i, j = index.astype(int).tolist()
    return k, i, j


def _where(volume: Volume, centre: tuple[int, int, int]) -> str:
    affine = volume.working_affine
    x, y, z = affine[:3, :3] @ centre + affine[:3, 3]
    text = f"Planes meet at x {x:.1f}, y {y:.1f}, z {z:.1f} mm (RAS+)."
    cosines = np.diag(affine[:3, 2::-1]) / np.linalg.norm(affine[:3, 2::-1], axis=0)
    tilt = float(np.degrees(np.arccos(np.clip(cosines, -1, 1).min())))
    if tilt > _OBLIQUE_DEGREES:
        text += f" The scan is oblique by {tilt:.0f} degrees; planes follow its own axes."
    return text + f" Window {WINDOW_HU[0]} to {WINDOW_HU[1]} HU."


def _fullest_slice(probability: NDArray[np.uint8]) -> int:
    squares = np.arange(256) ** 2
    sums = [int(squares @ np.bincount(part.ravel(), minlength=256)) for part in probability]
    return int(np.argmax(sums))


def _page(
    views: Sequence[_View],
    title: str,
    entries: Sequence[tuple[str, Colour]],
    notes: Sequence[str],
    bar: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per view at one common scale, a legend of names and notes below.

    With ``bar`` a narrow panel for a colour bar comes last.
    """
    bar_width = _BAR if bar else 0
    room = _WIDTH - 2 * _MARGIN - _GAP * (len(views) - 1) - bar_width
    heights, widths = zip(*(view.size_mm for view in views), strict=True)
    scale = min(room / sum(widths), _LARGEST_PANEL / max(heights))
    n_legend_rows = -(-len(entries) // _LEGEND_COLUMNS)
    panel_top = _MARGIN + (_LINE if title else 0) + _LINE
    legend_top = panel_top + round(scale * max(heights)) + _GAP
    height = legend_top + (n_legend_rows + len(notes)) * _LINE + _MARGIN

    # Layout and origins are given, so that no matplotlibrc turns a picture round.
    figure = empty_figure(_WIDTH, height, _DPI, _PAGE)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0))
    page.set_axis_off()

    def add_panel(left: float, width_px: float, height_px: float) -> Axes:
        box = (left, height - panel_top - height_px, width_px, height_px)
        fractions = np.array(box) / (_WIDTH, height, _WIDTH, height)
        return figure.add_axes(tuple(fractions), facecolor="black", xticks=[], yticks=[])

    def write(x: float, y: float, text: str, size: float, colour: str) -> None:
        page.text(x, y, text, size=size, color=colour, va="center", **_TEXT)

    if title:
        write(_MARGIN, _MARGIN + _LINE / 2, title, 15, _INK)
    left = _MARGIN + (room - scale * sum(widths)) / 2
    panels = []
    for view in views:
        height_mm, width_mm = view.size_mm
        panel = add_panel(left, scale * width_mm, scale * height_mm)
        panel.set(xlim=(0, width_mm), ylim=(height_mm, 0))
        panel.spines[:].set_visible(False)
        panels.append(panel)
        write(left, panel_top - _LINE / 2, view.title, 12, _INK)
        left += scale * width_mm + _GAP
    if bar:
        panels.append(add_panel(left + _GAP, _BAR / 5, scale * heights[0]))
    for n, (name, colour) in enumerate(entries):
        row, column = divmod(n, _LEGEND_COLUMNS)
        x = _MARGIN + column * (_WIDTH - 2 * _MARGIN) / _LEGEND_COLUMNS
        y = legend_top + (row + 0.5) * _LINE
        page.plot([x + 2, x + 26], [y, y], color=colour, linewidth=9, solid_capstyle="butt")
        write(x + 36, y, name, 12, _INK)
    for n, note in enumerate(notes, start=n_legend_rows):
        write(_MARGIN, legend_top + (n + 0.5) * _LINE, note, 11, _FAINT)
    return figure, panels


def _draw_scan(axes: Axes, view: _View) -> None:
    height, width = view.size_mm
    axes.imshow(
        np.clip(view.hu, *WINDOW_HU),
        cmap="gray",
        vmin=WINDOW_HU[0],
        vmax=WINDOW_HU[1],
        extent=(0, width, height, 0),
        origin="upper",
        aspect="auto",
        interpolation="bilinear",
    )


def _draw_label(axes: Axes, view: _View, label: int, colour: Colour) -> None:
    """Translucent fill, outline and number of one organ; outlines run midway between voxels."""
    from scipy.ndimage import distance_transform_edt

    mask = np.asarray(view.labels) == label
    if not mask.any():
        return
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    # One voxel more on each side, so that outlines close at the border of the view.
    mask = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    y = (np.arange(rows[0] - 1, rows[-1] + 2) + 0.5) * view.voxel_mm[0]
    x = (np.arange(columns[0] - 1, columns[-1] + 2) + 0.5) * view.voxel_mm[1]
    part = mask.astype(np.float32)
    axes.contourf(x, y, part, levels=[0.5, 1.5], colors=[colour], alpha=FILL_ALPHA)
    axes.contour(x, y, part, levels=[0.5], colors=[colour], linewidths=1.4)

    depth_mm = distance_transform_edt(mask, sampling=view.voxel_mm)
    px_per_mm = _px_per_mm(axes, view)
    border_mm = 2 * _LETTER_PX / px_per_mm
    for axis, centres in enumerate((y, x)):
        near = np.minimum(centres, view.size_mm[axis] - centres) < border_mm
        np.moveaxis(depth_mm, axis, 0)[near] /= 4
    row, column = np.unravel_index(int(np.argmax(depth_mm)), mask.shape)
    if depth_mm[row, column] * px_per_mm >= _TAG_PX:
        _outlined(axes, x[column], y[row], str(label), size=11)
    else:
        beside = x[np.flatnonzero(mask[row])[-1]] + 1.5 * _TAG_PX / px_per_mm
        _outlined(axes, beside, y[row], str(label), size=9)


def _draw_probability(axes: Axes, view: _View, values: NDArray[np.floating[Any]]) -> None:
    height, width = view.size_mm
    axes.imshow(
        np.ma.masked_less(values, LOWEST_DRAWN),
        cmap=_PROBABILITY_COLOURS,
        vmin=0,
        vmax=1,
        extent=(0, width, height, 0),
        origin="upper",
        aspect="auto",
        interpolation="nearest",
        alpha=PROBABILITY_ALPHA,
    )
    if values.max() >= 0.5 > values.min() and min(values.shape) > 1:
        y = (np.arange(values.shape[0]) + 0.5) * view.voxel_mm[0]
        x = (np.arange(values.shape[1]) + 0.5) * view.voxel_mm[1]
        axes.contour(x, y, values, levels=[0.5], colors=[_INK], linewidths=1.4)


def _draw_bar(axes: Axes, text: str) -> None:
    axes.imshow(
        np.linspace(0, 1, 256)[:, None],
        cmap=_PROBABILITY_COLOURS,
        extent=(0, 1, 0, 1),
        origin="lower",
        aspect="auto",
        alpha=PROBABILITY_ALPHA,
    )
    axes.set_facecolor("0.5")  # as soft tissue shines through the map
    for tick in (0, 0.25, 0.5, 0.75, 1):
        axes.text(1.3, tick, f"{tick:g}", size=12, color=_INK, va="center", **_TEXT)
    axes.text(3.6, 0.5, text, size=12, color=_INK, va="center", rotation=90, **_TEXT)


def _draw_marks(axes: Axes, view: _View, length: int) -> None:
    """Letters of the patient's sides, and a scale bar of ``length`` mm where there is room."""
    height, width = view.size_mm
    px_per_mm = _px_per_mm(axes, view)
    edge = _LETTER_PX / px_per_mm
    marks = zip(
        (
            (width / 2, edge),
            (width / 2, height - edge),
            (edge, height / 2),
            (width - edge, height / 2),
        ),
        (*view.ends[0], *view.ends[1]),
        strict=True,
    )
    for (x, y), letter in marks:
        _outlined(axes, x, y, letter, size=15)
    if height * px_per_mm < 8 * _LETTER_PX:
        return
    x, y = edge, height - edge
    axes.plot([x, x + length], [y, y], color="black", linewidth=5, solid_capstyle="butt")
    axes.plot([x, x + length], [y, y], color=_INK, linewidth=2.5, solid_capstyle="butt")
    _outlined(axes, x + length / 2, y - edge, f"{length} mm", size=11)


def _px_per_mm(axes: Axes, view: _View) -> float:
    return float(axes.get_window_extent().width) / view.size_mm[1]


def _bar_mm(views: Sequence[_View]) -> int:
    """A round length, at most 30 % of the narrowest view."""
    narrowest = min(view.size_mm[1] for view in views)
    return max((n for n in _SCALE_BARS_MM if n <= 0.3 * narrowest), default=_SCALE_BARS_MM[0])


def _outlined(axes: Axes, x: float, y: float, text: str, size: float) -> None:
    """Light text with a dark rim, readable on air and on bone."""
    from matplotlib.patheffects import withStroke

    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        size=size,
        color=_INK,
        weight="bold",
        path_effects=[withStroke(linewidth=3, foreground="black")],
        **_TEXT,
    )


def _colour(classes: ClassTable, label: int) -> Colour:
    red, green, blue = classes.structures[label].rgb
    return red / 255, green / 255, blue / 255


def _readable(name: str) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
