"""The curve by itself: the front beside its naive twin, presets, smallest blocks, what is read."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organfast.curve import (
    LOSSES,
    Curve,
    CurvePoint,
    PointSettings,
    Smallest,
    choose_presets,
    curve_csv,
    curve_rows,
    pareto_front,
    smallest_as_good,
    smallest_rows,
)
from organfast.curvefigure import curve_figure
from organfast.overlay import save_png

# Few values, so that points often tie.
PAIRS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12)


def point(name: str, speed: float, dice: float, **changed: Any) -> CurvePoint:
    usual: dict[str, Any] = {
        "dice": {"liver": dice, "spleen": None},
        "centre_mm": {"liver": 3.5, "spleen": None},
        "n_missed": 0,
        "settings": PointSettings((3, 3, 2), 0.2, trees=4),
    }
    return CurvePoint(name, speed, dice, **{**usual, **changed})


SMALL = Smallest(17, 0.8, 0.02, 0.06, 4, {9: 0.5, 17: 0.8, 33: 0.82})
CURVE = Curve(
    points=(
        point("slow", 1.0, 0.90),
        point("middle", 4.0, 0.895, settings=PointSettings((4, 4, 2), trees=8)),
        point("bad", 3.0, 0.5),
        point("quick", 20.0, 0.85, settings=PointSettings((9, 9, 4), trees=1)),
        point("useless", 90.0, 0.10, settings=PointSettings((60, 60, 9), trees=1)),
    ),
    n_patients=4,
    n_cases=5,
    n_timings=5,
    threads=2,
    smallest={"liver": SMALL, "spleen": None},
    smallest_by_recall={"liver": replace(SMALL, block_size=9), "spleen": None},
)


def naive_front(speeds: list[float], scores: list[float]) -> tuple[bool, ...]:
    pairs = list(zip(speeds, scores, strict=True))
    return tuple(
        not any(s >= a and d >= b and (s > a or d > b) for s, d in pairs) for a, b in pairs
    )


@given(PAIRS)
def test_the_front_is_what_no_other_point_beats(pairs: list[tuple[int, int]]) -> None:
    speeds, scores = [float(s) for s, _ in pairs], [d / 5 for _, d in pairs]
    front = pareto_front(speeds, scores)
    assert front == naive_front(speeds, scores)
    assert any(front)


@given(PAIRS)
def test_presets_are_the_fastest_points_that_lose_little(pairs: list[tuple[int, int]]) -> None:
    points = [point(str(n), s, 0.8 + d / 50) for n, (s, d) in enumerate(pairs)]
    best = max(p.mean_dice for p in points)
    front = naive_front([p.scans_per_minute for p in points], [p.mean_dice for p in points])
    chosen = choose_presets(points)
    speeds = []
    for preset, loss in LOSSES.items():
        taken = points[int(chosen[preset])]
        assert taken.mean_dice >= best - loss - 1e-9
        for other in points:
            if other.mean_dice >= best - loss:
                assert other.scans_per_minute <= taken.scans_per_minute
        assert front[int(chosen[preset])]
        speeds.append(taken.scans_per_minute)
    assert speeds == sorted(speeds, reverse=True)


def test_presets_of_a_curve() -> None:
    assert CURVE.presets == {"fast": "quick", "balanced": "middle", "accurate": "slow"}
    assert CURVE.front == (True, True, False, True, True)
    assert CURVE.preset("fast").settings.stride == (9, 9, 4)
    with pytest.raises(ValueError, match="use fast, balanced, accurate"):
        CURVE.preset("best")


# --- the smallest block ---------------------------------------------------------------------------

NAN = np.nan


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.5, 0.86, 0.9]], 17),  # one patient: the mean loss alone
        ([[0.5, 0.84, 0.9]], 33),
        ([[0.9, 0.9, 0.9]], 9),
        ([[0.8, 0.88, 0.9]] * 3, 17),
        # On average 0.04 is lost, but 0.12 by one of three patients.
        ([[0.1, 0.9, 0.9], [0.1, 0.9, 0.9], [0.1, 0.78, 0.9]], 33),
        # The same with two patients, of whom no interval says anything.
        ([[0.1, 0.9, 0.9], [0.1, 0.82, 0.9]], 17),
        ([[0.1, 0.9, NAN], [0.5, 0.86, 0.9]], 17),  # who is not known at every size is left out
        ([[0.0, 0.03, 0.05]], None),
        ([[NAN, NAN, NAN]], None),
    ],
)
def test_the_smallest_block_loses_little_against_the_best(
    values: list[list[float]], expected: int | None
) -> None:
    found = smallest_as_good((9, 17, 33), np.array(values))
    assert (None if found is None else found.block_size) == expected
    if found is not None:
        known = np.array([row for row in values if not np.isnan(row).any()])
        means = known.mean(axis=0)
        column = (9, 17, 33).index(found.block_size)
        np.testing.assert_allclose(found.value, means[column])
        np.testing.assert_allclose(found.loss, means.max() - means[column], atol=1e-12)
        assert found.n_patients == len(known)
        assert (found.loss_high is None) == (len(known) < 3)


# --- what is read ---------------------------------------------------------------------------------


def test_a_curve_survives_json() -> None:
    learned = PointSettings((3, 3, 2), pattern={"kind": "block", "size": 9}, max_depth=8)
    other = point("learned", 2.0, 0.3, settings=learned, block_recall={"liver": 0.5})
    for curve in (CURVE, replace(CURVE, points=(*CURVE.points, other), model="00ff", presets={})):
        told = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
        again = Curve.from_dict(told)
        assert again == curve
        assert again.to_dict() == told
    keys = {"name", "scans_per_minute", "mean_dice", "dice", "centre_mm", "on_front", "settings"}
    assert keys <= set(told["points"][0])
    assert told["smallest"]["liver"]["block_size"] == 17
    assert told["smallest"]["liver"]["dice"] == 0.8
    assert told["smallest"]["spleen"] is None
    assert told["points"][0]["settings"] == {
        "stride": [3, 3, 2],
        "refine": {"margin": 0.2, "disagreement": True},
        "trees": 4,
    }


def places_in(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from places_in(item, (*here, key))


JUNK = (None, True, -1, 0, 3, 10**400, 0.5, float("nan"), "", "x", "\x1b[2J", [], [1], {}, {"": 0})


def test_a_tampered_description_is_refused_and_never_crashes() -> None:
    told = CURVE.to_dict()
    n = read = 0
    for place in places_in(told):
        for junk in (*JUNK, KeyError):
            changed = copy.deepcopy(told)
            inside: Any = changed
            for key in place[:-1]:
                inside = inside[key]
            if not place:
                changed = junk
            elif junk is KeyError:
                del inside[place[-1]]
            else:
                inside[place[-1]] = junk
            n += 1
            try:
                curve = Curve.from_dict(changed)
            except ValueError:
                continue
            read += 1
            assert set(curve.presets) == set(LOSSES)
            curve_csv(curve)
            curve_rows(curve)
            curve.to_dict()
    assert 0 < read < n / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "unknown entry 'more'"),
        ({"presets": {}}, "presets must be fast, balanced, accurate"),
        ({"presets": {**CURVE.presets, "fast": "nothing"}}, "presets must be"),
        ({"threads": 0}, "threads is 0"),
        ({"n_patients": 1.5}, "n_patients is 1.5"),
        ({"points": []}, "a curve of 0 points"),
        ({"points": [CURVE.to_dict()["points"][0]] * 2}, "a curve of 2 points, 1 of them"),
        ({"smallest": {"liver": {"block_size": 9}}}, "has no dice"),
    ],
)
def test_what_is_wrong_with_a_curve_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve.from_dict({**CURVE.to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [0, 3, 2]}, "stride is"),
        ({"stride": [3, 3]}, "stride is"),
        ({"stride": [3.0, 3, 2]}, "stride is"),
        ({"stride": [5000, 3, 2]}, "stride is"),
        ({"trees": 0}, "trees is 0"),
        ({"trees": True}, "trees is True"),
        ({"refine": {"margin": -0.1, "disagreement": True}}, "margin is -0.1"),
        ({"refine": {"margin": None, "disagreement": True}}, "refine has no margin"),
        ({"refine": {"margin": 0.1}}, "refine has no disagreement"),
        ({"refine": {"margin": 0.1, "disagreement": 1}}, "disagreement is 1"),
        ({"eval": "x"}, "unknown entry 'eval'"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    content = {**CURVE.points[0].settings.to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        PointSettings.from_dict(content)


# --- for people and spreadsheets ------------------------------------------------------------------


def test_tables_show_the_front_and_the_smallest_blocks() -> None:
    rows = list(csv.DictReader(io.StringIO(curve_csv(CURVE))))
    assert [row["point"] for row in rows] == [p.name for p in CURVE.points]
    assert rows[0]["presets"] == "accurate"
    assert (rows[2]["on_front"], rows[3]["on_front"]) == ("false", "true")
    assert (rows[1]["liver_dice"], rows[1]["spleen_dice"]) == ("0.895", "")
    assert (rows[0]["stride"], rows[0]["margin"], rows[1]["margin"]) == ("3 3 2", "0.2", "")
    heads, shown = curve_rows(CURVE)
    assert [row[0] for row in shown] == ["useless", "quick", "middle", "slow"]
    assert all(len(row) == len(heads) for row in shown)
    heads, shown = smallest_rows(CURVE)
    assert all(len(row) == len(heads) for row in shown)
    assert shown[0][:6] == ("liver", "4", "17", "0.80", "0.02 [0.06]", "9")
    assert shown[1][:3] == ("spleen", "-", "none")


def test_a_curve_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(curve_figure(CURVE), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    figure = curve_figure(CURVE)
    points, sizes = figure.axes
    dominated, front = points.lines[:2]
    np.testing.assert_allclose(dominated.get_ydata(), [0.5])
    np.testing.assert_allclose(front.get_xdata(), [1, 4, 20, 90])
    assert [t.get_text() for t in sizes.get_xticklabels()] == ["9", "17", "33"]
    assert len(curve_figure(replace(CURVE, smallest={})).axes) == 1
    curve_figure(replace(CURVE, points=CURVE.points[:1], presets={}, smallest={}))
