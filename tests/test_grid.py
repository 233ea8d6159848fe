"""The model grid: HU tables, resampling."""

from __future__ import annotations

import itertools
import json
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import random_hu, zoo
from test_volume import ORIENTATIONS, _affine

from organfast.grid import (
    HU_TABLES,
    GridVolume,
    ModelGrid,
    hu_lookup,
    resample_labels,
    resampled,
    to_model_grid,
)
from organfast.volume import Volume
from organfast.workers import Workers


def as_volume(working: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
    """A volume whose working view is the array; spacing along (x, y, z)."""
    return Volume(working.transpose(2, 1, 0), np.diag([*spacing_mm, 1.0]))


# --- the model grid and its tables ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing_mm": (1.5, 1.5)}, "spacing_mm is"),
        ({"spacing_mm": (1.5, 1.5, 0.0)}, "spacing_mm is"),
        ({"spacing_mm": (1.5, 1.5, float("nan"))}, "spacing_mm is"),
        ({"spacing_mm": (1.5, 1.5, 1e9)}, "from 0.1 to 100 mm"),
        ({"spacing_mm": 1.5}, "spacing_mm is"),
        ({"spacing_mm": "abc"}, "spacing_mm is"),
        ({"hu_table": "soft"}, "hu_table is 'soft'; use one of identity, piecewise"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelGrid(**arguments)


@pytest.mark.parametrize("grid", [ModelGrid(), ModelGrid((1.5, 1.5, 3.0), "piecewise")])
def test_a_grid_survives_json(grid: ModelGrid) -> None:
    assert ModelGrid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"spacing_mm": None},
        {"spacing_mm": "15", "hu_table": "identity"},
        {"spacing_mm": [[1], 1, 1], "hu_table": "identity"},
        {"spacing_mm": [1, 1, 1], "hu_table": ["identity"]},
        {"spacing_mm": [1, 1, 1], "hu_table": "identity", "more": 0},
    ],
)
def test_a_tampered_grid_is_a_value_error(content: Any) -> None:
    with pytest.raises(ValueError, match=r"model grid|spacing_mm"):
        ModelGrid.from_dict(content)


def test_the_identity_only_turns_padding_into_air() -> None:
    table = hu_lookup("identity")
    np.testing.assert_array_equal(table[: 32768 - 1024], -1024)
    np.testing.assert_array_equal(table[32768 - 1024 :], np.arange(-1024, 32768))


def test_the_piecewise_table_compresses_by_its_slopes_and_keeps_each_hu_apart() -> None:
    table = hu_lookup("piecewise").astype(int)
    slopes = np.diff(table)
    at = np.arange(-32768, 32767)  # slope from this HU to the next, in eighths
    np.testing.assert_array_equal(slopes[at < -1024], 0)
    np.testing.assert_array_equal(slopes[(at >= -1024) & (at < -160)], 1)
    np.testing.assert_array_equal(slopes[(at >= -160) & (at < 240)], 8)
    np.testing.assert_array_equal(slopes[(at >= 240) & (at < 15663)], 2)
    assert (slopes[at >= 15663] >= 0).all()
    assert table[32768] == 0
    assert table.max() == 32767


@pytest.mark.parametrize("name", HU_TABLES)
def test_a_table_is_shared_and_cannot_be_written(name: str) -> None:
    assert hu_lookup(name) is hu_lookup(name)
    assert not hu_lookup(name).flags.writeable


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="hu_table is 'none'"):
        hu_lookup("none")


# --- to the model grid ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [ModelGrid(), ModelGrid((0.7, 0.8, 2.5)), ModelGrid((0.70001, 0.8, 2.5))]
)
def test_the_scan_s_own_pixels_are_not_copied(grid: ModelGrid) -> None:
    volume = as_volume(random_hu((4, 6, 5)), (0.7, 0.8, 2.5))
    scan = to_model_grid(volume, grid)
    assert np.shares_memory(scan.hu, volume.hu)
    assert scan.step == (1.0, 1.0, 1.0)
    assert scan.offset == (0.0, 0.0, 0.0)
    assert scan.table is hu_lookup("identity")
    np.testing.assert_allclose(scan.spacing_mm, (2.5, 0.8, 0.7))


def test_a_working_grid_says_where_its_voxels_lie() -> None:
    volume = as_volume(random_hu((10, 40, 30)), (0.75, 0.5, 1.5))
    scan = to_model_grid(volume, ModelGrid((1.5, 1.5, 3.0), "piecewise"))
    assert scan.step == (2.0, 3.0, 2.0)
    assert scan.offset == (0.5, 1.0, 0.5)
    assert scan.shape == (5, 13, 15)
    assert scan.table is None
    assert scan.air == hu_lookup("piecewise")[32768 - 1024]
    assert scan.spacing_mm == (3.0, 1.5, 1.5)
    assert scan.hu.flags.c_contiguous


STEPS = [(1.0, 2.13, 2.13), (0.5, 0.5, 0.4), (1.7, 1.0, 3.0), (9.0, 7.5, 0.3), (1.0, 1.0, 1.3)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [(5, 12, 11), (1, 1, 1), (2, 1, 9)])
@pytest.mark.parametrize("name", HU_TABLES)
def test_resampling_equals_its_twin_in_every_layout(
    step: tuple[float, float, float], shape: tuple[int, int, int], name: str
) -> None:
    hu = random_hu(shape)
    values = hu_lookup(name)[hu.astype(int) + 32768].astype(float)
    planes = [naive.slice_resampled(plane, step[1], step[2]) for plane in values]
    exact = naive.slices_blended(planes, step[0])
    for same in zoo(hu):
        out = resampled(same, hu_lookup(name), step)
        assert out.shape == exact.shape
        # Rounded half up; float32 sums of int16 may stray by a hundredth.
        assert (out - exact).max() <= 0.51
        assert (out - exact).min() > -0.51


def test_resampling_rounds_half_up() -> None:
    hu = np.array([-3, -2, 0, 1], np.int16).reshape(1, 1, 4)
    # Half a step: each output lies a quarter of the way from one voxel to the next.
    out = resampled(hu, hu_lookup("identity"), (1.0, 1.0, 0.5))
    exact = [-3, -2.75, -2.25, -1.5, -0.5, 0.25, 0.75, 1]
    np.testing.assert_array_equal(out.ravel(), np.floor(np.array(exact) + 0.5))


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    step=st.tuples(*[st.floats(0.3, 4.0)] * 3),
    value=st.integers(-1024, 3071),
    threads=st.integers(1, 7),
)
@settings(max_examples=40, deadline=None)
def test_a_constant_scan_stays_constant(
    shape: tuple[int, int, int], step: tuple[float, float, float], value: int, threads: int
) -> None:
    with Workers(threads) as workers:
        out = resampled(np.full(shape, value, np.int16), hu_lookup("identity"), step, workers)
    np.testing.assert_array_equal(out, value)


@given(step=st.floats(0.4, 5.0), axis=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_a_ramp_stays_a_ramp_at_the_stated_coordinates(step: float, axis: int) -> None:
    shape = [3, 3, 3]
    shape[axis] = 60
    hu = np.broadcast_to(
        (10 * np.arange(60)).reshape([-1 if n == axis else 1 for n in range(3)]), shape
    ).astype(np.int16)
    spacing = np.ones(3)
    spacing[axis] = step
    scan = to_model_grid(as_volume(hu, (1.0, 1.0, 1.0)), ModelGrid(tuple(spacing[::-1])))
    line = np.moveaxis(scan.hu, axis, -1)[0, 0].astype(float)
    at = scan.offset[axis] + scan.step[axis] * np.arange(len(line))
    inside = (at > 2 * step) & (at < 59 - 2 * step)
    # A triangle sampled at whole voxels is not quite symmetric about a centre between them.
    np.testing.assert_allclose(line[inside], 10 * at[inside], atol=0.51 + 10 * 0.13)


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_do_not_change_the_result(threads: int) -> None:
    hu = random_hu((11, 20, 21))
    table = hu_lookup("piecewise")
    for step in STEPS:
        with Workers(threads) as workers:
            found = resampled(hu, table, step, workers)
        np.testing.assert_array_equal(found, resampled(hu, table, step))


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::5])
def test_the_model_grid_does_not_depend_on_storage(
    order: tuple[int, ...], signs: tuple[float, ...]
) -> None:
    working = random_hu((6, 7, 8))
    affine = _affine(order, signs)
    plain = Volume(np.zeros((1, 1, 1), np.int16), affine)
    stored = np.empty([working.shape[plain.orientation.axes.index(n)] for n in range(3)], np.int16)
    plain.orientation.working(stored)[...] = working
    volume = Volume(stored, affine)
    expected = resampled(
        working,
        hu_lookup("identity"),
        tuple(5.0 / s for s in volume.working_spacing_mm),  # type: ignore[arg-type]
    )
    np.testing.assert_array_equal(to_model_grid(volume, ModelGrid((5.0, 5.0, 5.0))).hu, expected)


def test_a_scan_is_not_changed_by_resampling() -> None:
    volume = as_volume(random_hu((4, 9, 9)), (1.0, 1.0, 1.0))
    before = volume.hu.copy()
    to_model_grid(volume, ModelGrid((2.0, 2.0, 2.0), "piecewise"))
    np.testing.assert_array_equal(volume.hu, before)


def test_an_absurd_spacing_is_refused_before_memory_is_taken() -> None:
    volume = as_volume(random_hu((40, 50, 50)), (1e3, 1e3, 1e3))
    with pytest.raises(ValueError, match="check the spacing of the scan"):
        to_model_grid(volume, ModelGrid((1.5, 1.5, 3.0)))


def test_threads_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        Workers(0)


# --- labels on the model grid ---------------------------------------------------------------------


def test_labels_take_the_nearest_voxel() -> None:
    volume = as_volume(random_hu((6, 12, 10)), (1.0, 1.0, 1.0))
    labels = np.random.default_rng(0).integers(0, 5, (6, 12, 10)).astype(np.uint8)
    scan = to_model_grid(volume, ModelGrid((2.5, 3.0, 2.0)))
    on_grid = resample_labels(labels, scan)
    assert on_grid.shape == scan.shape
    for index in itertools.product(*(range(n) for n in scan.shape)):
        at = [o + s * n for o, s, n in zip(scan.offset, scan.step, index, strict=True)]
        nearest = tuple(
            min(int(np.floor(a + 0.5)), n - 1) for a, n in zip(at, labels.shape, strict=True)
        )
        assert on_grid[index] == labels[nearest]


def test_labels_of_the_scan_s_own_pixels_are_not_copied() -> None:
    labels = np.zeros((3, 4, 5), np.uint16)
    scan = to_model_grid(as_volume(random_hu((3, 4, 5)), (1.0, 1.0, 1.0)), ModelGrid())
    assert resample_labels(labels, scan) is labels


@pytest.mark.parametrize("step", [1.0, 0.5, 3.0])
def test_labels_of_another_grid_are_refused(step: float) -> None:
    volume = as_volume(random_hu((12, 12, 12)), (1.0, 1.0, 1.0))
    scan = to_model_grid(volume, ModelGrid((step, step, step)))
    for shape in [(12, 12, 15), (9, 12, 12), (12, 12)]:
        with pytest.raises(ValueError, match="not on the grid"):
            resample_labels(np.zeros(shape, np.uint8), scan)


@given(n=st.tuples(*[st.integers(1, 40)] * 3), step=st.tuples(*[st.floats(0.2, 12.0)] * 3))
@settings(max_examples=60, deadline=None)
def test_labels_of_a_scan_always_fit_its_model_grid(
    n: tuple[int, int, int], step: tuple[float, float, float]
) -> None:
    shape = tuple(max(1, round(a / s)) for a, s in zip(n, step, strict=True))
    offset = tuple((s - 1) / 2 for s in step)
    scan = GridVolume(np.zeros(shape, np.int16), step, offset)  # type: ignore[arg-type]
    assert resample_labels(np.zeros(n, np.uint8), scan).shape == shape


def test_a_grid_volume_holds_int16_and_the_table_it_names() -> None:
    hu = np.zeros((2, 2, 2), np.int16)
    with pytest.raises(ValueError, match="hu is float32"):
        GridVolume(hu.astype(np.float32))
    with pytest.raises(ValueError, match="non-empty"):
        GridVolume(hu[:0])
    with pytest.raises(ValueError, match="table is not the HU table 'piecewise'"):
        GridVolume(hu, table=hu_lookup("identity"), hu_table="piecewise")
