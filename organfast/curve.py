"""What accuracy costs: ways to ask a model or to learn one, by mean Dice and scans per minute.

::

    mean Dice |  o accurate                  o  on the front: no other is both faster and better
              |   .  o balanced              .  no reason to use it
              |    .    .  o
              |  .   .      . o fast
              +----------------------> scans per minute

A curve is kept in a model file, which is not trusted: whatever is read is checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.errors import is_whole
from organfast.statistics import mean_intervals
from organfast.tables import table

__all__ = [
    "LOSSES",
    "Curve",
    "CurvePoint",
    "PointSettings",
    "Smallest",
    "choose_presets",
    "curve_csv",
    "curve_rows",
    "pareto_front",
    "smallest_as_good",
    "smallest_rows",
]

LOSSES = {"fast": 0.05, "balanced": 0.01, "accurate": 0.0}
"""Preset -> how much mean Dice it may lose against the best point; it is the fastest that loses no
more."""
TOLERANCE = 0.05
"""How much Dice, or recall, a smaller block may lose on average and still be as good."""

_MOST_POINTS = 4096
_MOST_STRIDE = 4096
_LONGEST_NAME = 200
_LARGEST = 1e300
_ROUNDING = 1e-9
_LEVEL = 0.95
_N_RESAMPLES = 10_000

Numbers = Mapping[str, float | None]


@dataclass(frozen=True)
class PointSettings:
    """What a point of a curve was measured with.

    Parameters
    ----------
    stride : (cols, rows, slices) int
        Voxels of the model grid between positions.
    margin : float or None
        Of coarse to fine; None asks at every position.
    disagreement : bool
        Of coarse to fine; see ``Refine``.
    trees : int or None
        First trees of the forest that were asked; None is all, or there is no forest.
    pattern : mapping or None
        What the classifier saw, where that differs from point to point, as JSON holds it.
    max_depth : int or None
        Most decisions between root and leaf, where that differs from point to point.

    Raises
    ------
    ValueError
        A value is out of range.
    """

    stride: tuple[int, int, int]
    margin: float | None = None
    disagreement: bool = True
    trees: int | None = None
    pattern: Mapping[str, Any] | None = None
    max_depth: int | None = None

    def __post_init__(self) -> None:
        strides = tuple(self.stride) if isinstance(self.stride, (tuple, list)) else ()
        if len(strides) != 3 or not all(is_whole(s, 1) and s <= _MOST_STRIDE for s in strides):
            raise ValueError(
                f"stride is {self.stride!r:.80}; give three whole numbers from 1 to {_MOST_STRIDE}"
            )
        object.__setattr__(self, "stride", strides)
        if self.margin is not None and not _is_number(self.margin, 0, math.inf):
            raise ValueError(f"margin is {self.margin!r:.80}; give a number from 0, or None")
        if not isinstance(self.disagreement, bool):
            raise ValueError(f"disagreement is {self.disagreement!r:.80}; give True or False")
        for name in ("trees", "max_depth"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1):
                raise ValueError(f"{name} is {value!r:.80}; give a whole number from 1, or None")
        if self.pattern is not None and not isinstance(self.pattern, Mapping):
            raise ValueError(f"pattern is {self.pattern!r:.80}; give a mapping, or None")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; ``stride``, ``refine`` and ``trees`` as in ``run.json``."""
        refine = {"margin": self.margin, "disagreement": self.disagreement}
        content: dict[str, Any] = {
            "stride": list(self.stride),
            "refine": None if self.margin is None else refine,
            "trees": self.trees,
        }
        if self.pattern is not None:
            content |= {"pattern": dict(self.pattern), "max_depth": self.max_depth}
        return content

    @staticmethod
    def from_dict(content: Any) -> PointSettings:
        """What :meth:`to_dict` described; ValueError for anything else."""
        optional = ("pattern", "max_depth")
        _check_keys("settings", content, ("stride", "refine", "trees"), optional)
        refine = content["refine"]
        if refine is not None:
            _check_keys("refine", refine, ("margin", "disagreement"))
            if refine["margin"] is None:
                raise ValueError("refine has no margin")
        return PointSettings(
            stride=content["stride"],
            trees=content["trees"],
            **(refine or {}),
            **{name: content[name] for name in optional if name in content},
        )


@dataclass(frozen=True)
class CurvePoint:
    """One way to ask a model, or to learn one, measured. Means are over patients.

    Parameters
    ----------
    name : str
        What tells it from the others.
    scans_per_minute : float
        By the median scan: classified, enlarged, cleaned and measured, but not read.
    mean_dice : float
        Of each patient's organs first, then of the patients.
    dice : mapping of str to float or None
        By organ; None where no patient has it. A missed organ counts as 0.
    centre_mm : mapping of str to float or None
        By organ, distance of the centres where both are there.
    n_missed : int
        Organs, of all cases, of which no voxel was found.
    settings : PointSettings
        What it was measured with.
    block_recall : mapping of str to float or None, optional
        By organ, share of its blocks that were named rightly one by one.

    Raises
    ------
    ValueError
        A value is out of range.
    """

    name: str
    scans_per_minute: float
    mean_dice: float
    dice: Numbers
    centre_mm: Numbers
    n_missed: int
    settings: PointSettings
    block_recall: Numbers | None = None

    def __post_init__(self) -> None:
        _check_name("the name of a point", self.name)
        if not _is_number(self.scans_per_minute, 0, math.inf) or not self.scans_per_minute > 0:
            raise ValueError(
                f"scans_per_minute is {self.scans_per_minute!r:.80}; give a number above 0"
            )
        if not _is_number(self.mean_dice, 0, 1):
            raise ValueError(f"mean_dice is {self.mean_dice!r:.80}; give a number from 0 to 1")
        _check_numbers("dice", self.dice, 1)
        _check_numbers("centre_mm", self.centre_mm, math.inf)
        if self.block_recall is not None:
            _check_numbers("block_recall", self.block_recall, 1)
        if not is_whole(self.n_missed, 0):
            raise ValueError(f"n_missed is {self.n_missed!r:.80}; give a whole number")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        content: dict[str, Any] = {
            "name": self.name,
            "scans_per_minute": self.scans_per_minute,
            "mean_dice": self.mean_dice,
            "dice": dict(self.dice),
            "centre_mm": dict(self.centre_mm),
            "n_missed": self.n_missed,
            "settings": self.settings.to_dict(),
        }
        if self.block_recall is not None:
            content["block_recall"] = dict(self.block_recall)
        return content

    @staticmethod
    def from_dict(content: Any) -> CurvePoint:
        """What :meth:`to_dict` described; ValueError for anything else."""
        plain = ("name", "scans_per_minute", "mean_dice", "dice", "centre_mm", "n_missed")
        _check_keys("a point", content, (*plain, "settings"), ("block_recall",))
        return CurvePoint(
            **{name: content[name] for name in plain},
            settings=PointSettings.from_dict(content["settings"]),
            block_recall=content.get("block_recall"),
        )


@dataclass(frozen=True)
class Smallest:
    """The smallest block that is as good for an organ as the best one.

    Parameters
    ----------
    block_size : int
        Its side, voxels of the model grid.
    value : float
        Its mean score over the patients.
    loss : float
        Mean over the patients of the best size's score less its own.
    loss_high : float or None
        Upper end of the 95 % interval of the loss; None with fewer than three patients.
    n_patients : int
        Patients with the organ.
    by_size : mapping of int to float
        Mean score of each size.

    Raises
    ------
    ValueError
        A value is out of range.
    """

    block_size: int
    value: float
    loss: float
    loss_high: float | None
    n_patients: int
    by_size: Mapping[int, float]

    def __post_init__(self) -> None:
        losses = [self.loss, *([] if self.loss_high is None else [self.loss_high])]
        are_sizes = isinstance(self.by_size, Mapping) and all(is_whole(s, 1) for s in self.by_size)
        if (
            not are_sizes
            or not is_whole(self.block_size)
            or self.block_size not in self.by_size
            or not is_whole(self.n_patients, 1)
            or not all(_is_number(x, 0, 1) for x in (self.value, *self.by_size.values()))
            or not all(_is_number(x, -1, 1) for x in losses)
        ):
            raise ValueError("the smallest block of an organ is described by other values")

    def to_dict(self, score: str) -> dict[str, Any]:
        """As JSON holds it, the value under the name of the score."""
        return {
            "block_size": self.block_size,
            score: self.value,
            "loss": self.loss,
            "loss_high": self.loss_high,
            "n_patients": self.n_patients,
            "by_size": {str(size): value for size, value in self.by_size.items()},
        }

    @staticmethod
    def from_dict(content: Any, score: str) -> Smallest:
        """What :meth:`to_dict` described; ValueError for anything else."""
        names = ("block_size", score, "loss", "loss_high", "n_patients", "by_size")
        _check_keys("the smallest block", content, names)
        block_size, value, loss, loss_high, n_patients, by_size = (content[n] for n in names)
        if not isinstance(by_size, Mapping) or not all(
            isinstance(s, str) and s.isascii() and s.isdigit() and len(s) < 9 for s in by_size
        ):
            raise ValueError("by_size names other things than sizes")
        sizes = {int(size): mean for size, mean in by_size.items()}
        return Smallest(block_size, value, loss, loss_high, n_patients, sizes)


@dataclass(frozen=True)
class Curve:
    """Points, which of them are presets, and on whom they were measured.

    Parameters
    ----------
    points : tuple of CurvePoint
        All of them measured on the same cases.
    n_patients, n_cases : int
        Whom they were measured on.
    n_timings : int
        How often each point was timed, over all cases.
    threads : int
        That segmented.
    model : str or None
        Digest of the model that was asked; None where models were learned.
    smallest : mapping of str to Smallest or None
        By organ, the smallest block by Dice; None where none recognises the organ. Empty where
        sizes were not compared.
    smallest_by_recall : mapping of str to Smallest or None
        The same by the share of the organ's blocks that are named rightly.
    presets : mapping of str to str
        "fast", "balanced" and "accurate" -> name of a point; by default :func:`choose_presets`.

    Raises
    ------
    ValueError
        The parts do not fit each other.
    """

    points: tuple[CurvePoint, ...]
    n_patients: int
    n_cases: int
    n_timings: int
    threads: int
    model: str | None = None
    smallest: Mapping[str, Smallest | None] = field(default_factory=dict)
    smallest_by_recall: Mapping[str, Smallest | None] = field(default_factory=dict)
    presets: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        if not 1 <= len(names) <= _MOST_POINTS or len(set(names)) != len(names):
            raise ValueError(
                f"a curve of {len(names)} points, {len(set(names))} of them with names of their "
                f"own; give 1 to {_MOST_POINTS} different ones"
            )
        for name in ("n_patients", "n_cases", "n_timings", "threads"):
            if not is_whole(getattr(self, name), 1):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}; give a number from 1")
        if self.model is not None:
            _check_name("the model of a curve", self.model)
        if not self.presets:
            object.__setattr__(self, "presets", choose_presets(self.points))
        if set(self.presets) != set(LOSSES) or not set(self.presets.values()) <= set(names):
            raise ValueError(f"presets must be {', '.join(LOSSES)}, each the name of a point")

    @property
    def front(self) -> tuple[bool, ...]:
        """Whether each point is on the Pareto front."""
        return pareto_front(
            [point.scans_per_minute for point in self.points],
            [point.mean_dice for point in self.points],
        )

    def preset(self, name: str) -> CurvePoint:
        """The point that a preset takes its settings from.

        Parameters
        ----------
        name : str
            "fast", "balanced" or "accurate".

        Raises
        ------
        ValueError
            There is no such preset.
        """
        if name not in self.presets:
            raise ValueError(f"preset {name!r} is unknown; use {', '.join(LOSSES)}")
        return next(point for point in self.points if point.name == self.presets[name])

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "points": [
                {**point.to_dict(), "on_front": on_front}
                for point, on_front in zip(self.points, self.front, strict=True)
            ],
            "smallest": _by_organ(self.smallest, "dice"),
            "smallest_by_recall": _by_organ(self.smallest_by_recall, "recall"),
            "presets": dict(self.presets),
            "n_patients": self.n_patients,
            "n_cases": self.n_cases,
            "n_timings": self.n_timings,
            "threads": self.threads,
            "model": self.model,
        }

    @staticmethod
    def from_dict(content: Any) -> Curve:
        """The curve that :meth:`to_dict` described.

        Parameters
        ----------
        content : mapping
            As read from JSON.

        Raises
        ------
        ValueError
            The content, which may come from a tampered file, describes no curve.
        """
        counts = ("n_patients", "n_cases", "n_timings", "threads", "model")
        names = ("points", "smallest", "smallest_by_recall", "presets", *counts)
        _check_keys("a curve", content, names)
        rows, presets = content["points"], content["presets"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("the points of a curve are no list of points")
        if not isinstance(presets, dict) or not all(isinstance(p, str) for p in presets.values()):
            raise ValueError(f"presets must be {', '.join(LOSSES)}, each the name of a point")
        curve = Curve(
            points=tuple(
                CurvePoint.from_dict({k: v for k, v in row.items() if k != "on_front"})
                for row in rows
            ),
            **{name: content[name] for name in counts},
            smallest=_from_organs(content["smallest"], "dice"),
            smallest_by_recall=_from_organs(content["smallest_by_recall"], "recall"),
            presets=presets or {"": ""},  # none at all is not "by default"
        )
        for row, on_front in zip(rows, curve.front, strict=True):
            if row.get("on_front") is not on_front:
                raise ValueError("on_front of a point is not what the points say")
        return curve


# --- choosing -------------------------------------------------------------------------------------


def pareto_front(speeds: Sequence[float], scores: Sequence[float]) -> tuple[bool, ...]:
    """Whether each point is on the front: none is at least as good in both and better in one.

    O(n log n). Points that are equal in both are on the front together.

    Parameters
    ----------
    speeds, scores : sequence of float
        Of each point; more is better.

    >>> pareto_front([1, 2, 2, 3], [0.9, 0.9, 0.5, 0.7])
    (False, True, False, True)
    """
    order = sorted(range(len(speeds)), key=lambda n: (-speeds[n], -scores[n]))
    on_front = [False] * len(speeds)
    best, speed_of_best = -math.inf, math.inf
    for n in order:  # from the fastest on; of equally fast ones the best comes first
        if scores[n] > best:
            best, speed_of_best = scores[n], speeds[n]
            on_front[n] = True
        elif scores[n] == best and speeds[n] == speed_of_best:
            on_front[n] = True
    return tuple(on_front)


def choose_presets(points: Sequence[CurvePoint]) -> dict[str, str]:
    """The fastest point that loses no more mean Dice against the best than ``LOSSES`` allow.

    Of equally fast ones it is the better one: always a point of the front.

    Parameters
    ----------
    points : sequence of CurvePoint
        At least one.

    Returns
    -------
    dict of str to str
        Preset -> name of the point.
    """
    best = max(point.mean_dice for point in points)
    chosen = {}
    for preset, loss in LOSSES.items():
        enough = [point for point in points if point.mean_dice >= best - loss - _ROUNDING]
        chosen[preset] = max(enough, key=lambda p: (p.scans_per_minute, p.mean_dice)).name
    return chosen


def smallest_as_good(
    sizes: Sequence[int], values: NDArray[np.float64], tolerance: float = TOLERANCE, seed: int = 0
) -> Smallest | None:
    """The smallest block size that is as good for an organ as the best one.

    The best is the size with the greatest mean; of equal ones the smallest. A size is as good if
    the patients lose at most the tolerance on average and, from three patients on, at most twice
    the tolerance at the upper end of the 95 % bootstrap interval of that loss.

    Parameters
    ----------
    sizes : sequence of int
        Ascending.
    values : (n_patients, n_sizes) float64
        Dice, or recall; patients without a value for some size are left out.
    tolerance : float
        Mean loss that is none.
    seed : int
        Of the bootstrap.

    Returns
    -------
    Smallest or None
        None where no patient has the organ, or where even the best size's mean is within the
        tolerance of 0: it recognises nothing.
    """
    known = values[~np.isnan(values).any(axis=1)]
    if not len(known):
        return None
    means = known.mean(axis=0)
    best = int(means.argmax())
    if means[best] <= tolerance:
        return None
    losses = known[:, best : best + 1] - known
    high = mean_intervals(losses, seed, _N_RESAMPLES, _LEVEL).high
    has_interval = len(known) >= 3
    loss = losses.mean(axis=0)
    for n, size in enumerate(sizes):
        is_close = loss[n] <= tolerance + _ROUNDING
        if is_close and (not has_interval or high[n] <= 2 * tolerance + _ROUNDING):
            return Smallest(
                block_size=int(size),
                value=float(means[n]),
                loss=float(loss[n]),
                loss_high=float(high[n]) if has_interval else None,
                n_patients=len(known),
                by_size={int(s): float(m) for s, m in zip(sizes, means, strict=True)},
            )
    raise AssertionError("the best size loses nothing against itself")


# --- for people and spreadsheets ------------------------------------------------------------------


def curve_csv(curve: Curve) -> str:
    """A row for each point: settings, speed, mean Dice, then Dice and centre error by organ.

    Parameters
    ----------
    curve : Curve
        What to write.
    """
    organs = sorted({organ for point in curve.points for organ in point.dice})
    head = ("point", "stride", "margin", "trees", "scans_per_minute", "mean_dice", "n_missed")
    per_organ = [f"{organ}{ending}" for ending in ("_dice", "_centre_mm") for organ in organs]
    rows: list[list[Any]] = [[*head, "on_front", "presets", *per_organ]]
    for point, on_front in zip(curve.points, curve.front, strict=True):
        settings = point.settings
        numbers = [*map(point.dice.get, organs), *map(point.centre_mm.get, organs)]
        rows.append(
            [
                point.name,
                " ".join(map(str, settings.stride)),
                "" if settings.margin is None else f"{settings.margin:g}",
                "" if settings.trees is None else settings.trees,
                f"{point.scans_per_minute:.6g}",
                f"{point.mean_dice:.6g}",
                point.n_missed,
                "true" if on_front else "false",
                " ".join(_presets_at(curve, point)),
                *("" if x is None else f"{x:.6g}" for x in numbers),
            ]
        )
    return table(rows)


def curve_rows(curve: Curve) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the table that people read: the front and the presets, fastest first.

    Parameters
    ----------
    curve : Curve
        What to show.
    """
    heads = ("point", "scans/min", "mean Dice", "centre off mm", "missed", "preset")
    shown = [
        point
        for point, on_front in zip(curve.points, curve.front, strict=True)
        if on_front or point.name in curve.presets.values()
    ]
    rows: list[tuple[str, ...]] = []
    for point in sorted(shown, key=lambda p: (-p.scans_per_minute, -p.mean_dice)):
        off = [mm for mm in point.centre_mm.values() if mm is not None]
        rows.append(
            (
                point.name,
                f"{point.scans_per_minute:.3g}",
                f"{point.mean_dice:.3f}",
                f"{sum(off) / len(off):.1f}" if off else "-",
                str(point.n_missed),
                " ".join(_presets_at(curve, point)) or "-",
            )
        )
    return heads, rows


def smallest_rows(curve: Curve) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows: for each organ the smallest block that still recognises it.

    Parameters
    ----------
    curve : Curve
        What to show.
    """
    heads: tuple[str, ...] = ("organ", "patients", "smallest", "Dice", "loss [to]", "by blocks")
    known = [found for found in curve.smallest.values() if found is not None]
    sizes = list(known[0].by_size) if known else []
    heads = (*heads, *(f"at {size}" for size in sizes))
    rows: list[tuple[str, ...]] = []
    for organ, found in curve.smallest.items():
        by_recall = curve.smallest_by_recall.get(organ)
        recalled = "-" if by_recall is None else str(by_recall.block_size)
        if found is None:
            rows.append((organ, "-", "none", "-", "-", recalled, *("-" for _ in sizes)))
            continue
        to = "" if found.loss_high is None else f" [{found.loss_high:.2f}]"
        rows.append(
            (
                organ,
                str(found.n_patients),
                str(found.block_size),
                f"{found.value:.2f}",
                f"{found.loss:.2f}{to}",
                recalled,
                *(f"{found.by_size[size]:.2f}" for size in sizes),
            )
        )
    return heads, rows


def _presets_at(curve: Curve, point: CurvePoint) -> list[str]:
    return [preset for preset in LOSSES if curve.presets[preset] == point.name]


# --- what a description must be -------------------------------------------------------------------


def _by_organ(found: Mapping[str, Smallest | None], score: str) -> dict[str, Any]:
    return {organ: None if s is None else s.to_dict(score) for organ, s in found.items()}


def _from_organs(content: Any, score: str) -> dict[str, Smallest | None]:
    if not isinstance(content, dict):
        raise ValueError("the smallest blocks are not given by organ")
    for organ in content:
        _check_name("an organ", organ)
    return {o: None if s is None else Smallest.from_dict(s, score) for o, s in content.items()}


def _check_keys(
    what: str, content: Any, needed: Sequence[str], optional: Sequence[str] = ()
) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} is {content!r:.40}, no mapping")
    for name in needed:
        if name not in content:
            raise ValueError(f"{what} has no {name}")
    for name in content:
        if name not in needed and name not in optional:
            raise ValueError(f"{what} has an unknown entry {name!r:.40}")


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"{what} is {name!r:.40}; give a short text")


def _check_numbers(what: str, numbers: Any, most: float) -> None:
    if not isinstance(numbers, Mapping):
        raise ValueError(f"{what} is {numbers!r:.40}; give a number for each organ")
    for organ, number in numbers.items():
        _check_name("an organ", organ)
        if number is not None and not _is_number(number, 0, most):
            raise ValueError(f"{what} of {organ} is {number!r:.40}")


def _is_number(value: Any, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < _LARGEST and least <= value <= most
