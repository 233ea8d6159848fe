"""Altered copies: twins of the kernels, what each option does and what it must leave alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate1d

from organfast.anatomy import ClassTable
from organfast.augmentation import (
    Augmentation,
    _bending,
    _Organs,
    _Placing,
    _taps,
    _units,
    altered_copy,
    jittered,
)
from organfast.grid import GridVolume, ModelGrid, hu_lookup, resample_labels, to_model_grid
from organfast.kernels import augmentation as kernel

DATA = Path(__file__).parents[2] / "shared" / "data"
TABLE = ClassTable.default()
OFF = Augmentation.off()
NO_ORGANS = _Organs(*(np.zeros((0, 3)) for _ in range(4)))
BEND = {"elastic_mm": 5.0, "elastic_grain_mm": 40.0}
PLACE = {"scale": (0.8, 1.2), "stretch": 0.05, "rotation_deg": 8.0}
COLOUR = {"recolour_hu": 20.0, "recolour_contrast": 0.2, "shift_hu": 5.0, "gain": 0.05}
SCANNER = {"blur_mm": 3.0, "noise_hu": 10.0}
EVERYTHING = replace(OFF, crop_mm=20.0, mirror=0.5, **BEND, **PLACE, **COLOUR, **SCANNER)
SPACING = (4.0, 3.0, 3.5)


def _scan(
    shape: tuple[int, int, int] = (9, 22, 25), seed: int = 0, hu_table: str = "piecewise"
) -> tuple[GridVolume, np.ndarray]:
    """Cubes of air, context and organs, each of an HU of its own, with noise."""
    random = np.random.default_rng(seed)
    coarse = random.choice([0, 2, 2, 3, 4, 10, 15, 16, 19], [s // 4 + 1 for s in shape])
    labels = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)[: shape[0], : shape[1], : shape[2]]
    middle = np.zeros(23)
    middle[[0, 2, 3, 4, 10, 15, 16, 19]] = [-1000, -100, 90, 60, -850, 110, 110, 50]
    hu = np.rint(middle[labels] + random.normal(0, 9, shape)).astype(int).clip(-1024, 3000)
    grid_volume = GridVolume(hu_lookup(hu_table)[hu + 32768], hu_table=hu_table, spacing_mm=SPACING)
    return grid_volume, np.ascontiguousarray(labels.astype(np.uint8))


def _hu(grid_volume: GridVolume) -> np.ndarray:
    return _units(grid_volume.hu_table).hu_of[grid_volume.hu.astype(int) + 32768]


# --- twins ----------------------------------------------------------------------------------------


@given(st.floats(-1100, 3100), st.tuples(*[st.floats(-60, 60)] * 2, st.floats(-900, 300)))
@settings(max_examples=60, deadline=None)
def test_changes_of_hu_equal_their_twins(hu: float, look: tuple[float, float, float]) -> None:
    row = np.array([look[0], look[1] / 200, look[2]], np.float32)
    found = kernel.organ_change(hu, row)
    np.testing.assert_allclose(found, naive.organ_change(hu, row), atol=1e-4)
    unit_of = _units("piecewise").unit_of
    np.testing.assert_allclose(kernel.in_units(hu, unit_of), naive.in_units(hu, unit_of), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 5), (5, 1, 7), (3, 4, 1), (5, 9, 8)])
def test_recolouring_equals_its_twin(shape: tuple[int, int, int]) -> None:
    random = np.random.default_rng(2)
    hu = random.integers(-2144, 3000, shape).astype(np.int16)
    organs = (random.integers(0, 4, shape) * (random.random(shape) < 0.4)).astype(np.uint16)
    organs[:, : shape[1] // 2] = 2  # an inside, and a border
    look = np.zeros((4, 3), np.float32)
    look[1:] = np.stack([random.uniform(-80, 80, 3), random.uniform(-0.3, 0.3, 3), [20, 90, 0]], 1)
    units = _units("piecewise")
    hu_of = units.hu_of * np.float32(1.05) + np.float32(3)
    clipped = np.maximum(hu_of, -1024)
    plain = np.floor(np.interp(clipped, np.arange(-32768, 32768), units.unit_of) + 0.5)
    out = np.empty(shape, np.int16)
    tables = (hu_of, units.unit_of, plain.astype(np.int16))
    kernel.recolour_slices(hu, organs, 0, shape[0], look, tables, out)
    for k in range(shape[0]):
        expected = naive.recolour_slice(hu, organs, k, look, hu_of, units.unit_of)
        np.testing.assert_allclose(out[k], expected, atol=1)  # a unit at .5, an eighth of a HU

    counts, expected = np.zeros((4, 40), np.int64), np.zeros((4, 40), np.int64)
    kernel.organ_histograms(hu, organs, 0, shape[0], units.hu_of, counts)
    naive.organ_histograms(hu, organs, units.hu_of, expected)
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 5), (4, 1, 7), (3, 4, 1), (5, 9, 8)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_deformation_equals_its_twin(shape: tuple[int, int, int], dtype: type) -> None:
    random = np.random.default_rng(3)
    hu = random.integers(-2144, 3000, shape).astype(np.int16)
    labels = random.integers(0, 200, shape).astype(dtype)
    hu.flags.writeable = labels.flags.writeable = False
    placement = np.column_stack([np.eye(3), [-0.6, 0.3, -0.7]])
    placement[:, :3] += random.normal(0, 0.08, (3, 3))
    lattice = random.normal(0, 0.8, (3, 4, 5, 3)).astype(np.float32)
    result = (shape[1] + 3, shape[2] + 2)
    pitch = np.array([2.0, 3.0, 4.0]) / [shape[0], *result]
    line, page = np.empty((5, 3), np.float32), np.empty(result, np.float32)
    found = np.empty(result, dtype)
    for k in range(shape[0]):
        where = (k, placement, lattice, pitch)
        kernel.deform_slice(hu, labels, *where, np.float32(-2144), 255, line, page, found)
        expected = naive.deform_slice(hu, labels, *where, -2144, 255, result)
        np.testing.assert_allclose(page, expected[0], atol=0.05)
        np.testing.assert_array_equal(found, expected[1])


@pytest.mark.parametrize("noise_hu", [0.0, 7.0])
def test_finishing_equals_its_twin(noise_hu: float) -> None:
    page = np.random.default_rng(4).uniform(-2144, 3000, (5, 7)).astype(np.float32)
    units, out = _units("piecewise"), np.empty((5, 7), np.int16)
    kernel.finish_page(page, 3, noise_hu, np.uint64(2**63 + 9), units.hu_of, units.unit_of, out)
    expected = naive.finish_page(page, 3, noise_hu, 2**63 + 9, units.hu_of, units.unit_of)
    np.testing.assert_allclose(out, expected, atol=0 if noise_hu == 0 else 1)
    assert (out == expected).mean() > 0.9  # only a unit at .5 may go the other way


def test_blur_follows_its_axes() -> None:
    random = np.random.default_rng(5)
    hu = random.integers(-900, 900, (2, 9, 8)).astype(np.int16)
    labels, units = np.zeros_like(hu, np.uint8), _units("identity")
    scan = (hu, labels, np.float32(-1024), 255)
    where = (np.eye(3, 4), np.zeros((2, 2, 2, 3), np.float32), np.full(3, 0.1))
    for rows, columns in (([0.5, 0.25], [1]), ([1], [0.4, 0.2, 0.1]), ([0.8, 0.1], [0.5, 0.25])):
        taps = [np.array(t, np.float32) for t in (rows, columns)]
        scanner = (*taps, 0.0, np.uint64(0), units.hu_of, units.unit_of)
        out = np.empty_like(hu)
        kernel.alter_slices(scan, 0, where, scanner, out, np.empty_like(labels))
        expected = hu.astype(float)
        for axis, t in enumerate((rows, columns), start=1):
            expected = correlate1d(expected, [*t[:0:-1], *t], axis, mode="nearest")
        np.testing.assert_allclose(out, expected, atol=0.51)


def test_random_numbers_are_about_normal() -> None:
    drawn = np.array([kernel.random_normal(np.uint64(7), np.uint64(n)) for n in range(20_000)])
    np.testing.assert_allclose(drawn[:9], [naive.random_normal(7, n) for n in range(9)], atol=1e-6)
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 1], atol=0.03)
    np.testing.assert_allclose((np.abs(drawn) < 1).mean(), 0.68, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(drawn[:-1], drawn[1:])[0, 1], 0, atol=0.03)


# --- laws -----------------------------------------------------------------------------------------


def test_nothing_altered_is_the_case_itself() -> None:
    grid_volume, labels = _scan()
    copy, copied = altered_copy(grid_volume, labels, TABLE, OFF, 0)
    assert copy is grid_volume
    assert copied is labels


@pytest.mark.parametrize("hu_table", ["piecewise", "identity"])
@pytest.mark.parametrize(
    "option", [{"elastic_mm": 1e-9}, {"noise_hu": 1e-9}, {"recolour_hu": 1e-9}, {"gain": 1e-12}]
)
def test_next_to_nothing_is_the_case_bit_for_bit(hu_table: str, option: dict[str, float]) -> None:
    grid_volume, labels = _scan(hu_table=hu_table)
    copy, copied = altered_copy(grid_volume, labels, TABLE, replace(OFF, **option), 0)
    assert copy is not grid_volume
    np.testing.assert_array_equal(copy.hu, grid_volume.hu)
    np.testing.assert_array_equal(copied, labels)
    assert (copy.hu_table, copy.spacing_mm) == (hu_table, SPACING)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_makes_the_same_copy(threads: int) -> None:
    grid_volume, labels = _scan()
    grid_volume.hu.flags.writeable = labels.flags.writeable = False
    before = grid_volume.hu.copy(), labels.copy()
    for seed in (0, (3, 1, 2)):
        one = altered_copy(grid_volume, labels, TABLE, EVERYTHING, seed)
        many = altered_copy(grid_volume, labels, TABLE, EVERYTHING, seed, threads=threads)
        np.testing.assert_array_equal(one[0].hu, many[0].hu)
        np.testing.assert_array_equal(one[1], many[1])
    np.testing.assert_array_equal(grid_volume.hu, before[0])
    np.testing.assert_array_equal(labels, before[1])
    other = altered_copy(grid_volume, labels, TABLE, EVERYTHING, 1)
    assert other[0].hu.shape != one[0].hu.shape or (other[0].hu != one[0].hu).mean() > 0.5


@given(st.integers(0, 2**32), st.sampled_from([np.uint8, np.uint16]))
@settings(max_examples=15, deadline=None)
def test_labels_stay_labels_and_ends_are_unknown(seed: int, dtype: type) -> None:
    grid_volume, labels = _scan()
    labels = labels.astype(dtype)
    copy, copied = altered_copy(grid_volume, labels, TABLE, EVERYTHING, seed)
    assert copy.shape == copied.shape
    assert copied.dtype == dtype
    partners = {4, 11, 15, 16, 20}  # of the labels below, when mirrored
    assert set(np.unique(copied)) <= {*np.unique(labels), *partners, np.iinfo(dtype).max}


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_a_constant_scan_stays_constant(seed: int) -> None:
    labels = np.full((7, 20, 24), 3, np.uint8)
    hu = np.full(labels.shape, 720, np.int16)
    alone = replace(OFF, blur_mm=4.0, **BEND, **PLACE)
    copy, copied = altered_copy(
        GridVolume(hu, hu_table="piecewise", spacing_mm=SPACING), labels, TABLE, alone, seed
    )
    inside = np.zeros(copied.shape, bool)
    inside[:, 10:-10, 10:-10] = True  # beyond the reach of the air at the sides
    np.testing.assert_array_equal(copy.hu[inside], 720)
    assert set(np.unique(copied[inside])) <= {3, 255}


def test_beyond_the_sides_is_air_and_beyond_the_ends_the_end_slice() -> None:
    hu = np.arange(1, 6, dtype=np.int16)[:, None, None] * np.ones((1, 30, 30), np.int16) * 100
    labels = np.full(hu.shape, 3, np.uint8)
    grid_volume = GridVolume(hu, spacing_mm=(4.0, 2.0, 2.0))
    copy, copied = altered_copy(grid_volume, labels, TABLE, replace(OFF, rotation_deg=40.0), 8)
    assert set(np.unique(copied)) == {0, 3, 255}
    # Near the axis of rotation nothing comes from a side.
    np.testing.assert_allclose(copy.hu[2, 14:16, 14:16], 300, atol=20)
    assert copy.hu[copied == 255].max() in (100, 500)
    assert (copy.hu[copied == 0] == -1024).mean() > 0.5
    assert copy.hu.min() == -1024
    assert copy.hu.max() == 500


def test_sides_change_places_with_their_names() -> None:
    grid_volume, labels = _scan()
    swapped = replace(OFF, mirror=1.0)
    copy, copied = altered_copy(grid_volume, labels, TABLE, swapped, 0)
    np.testing.assert_array_equal(copy.hu, grid_volume.hu[:, :, ::-1])
    for name, partner in (("kidney_right", "kidney_left"), ("lung_right", "lung_left")):
        there = labels[:, :, ::-1] == TABLE.index(name)
        np.testing.assert_array_equal(copied == TABLE.index(partner), there)
    assert (copied == TABLE.index("liver")).sum() == (labels == TABLE.index("liver")).sum()
    again, twice = altered_copy(copy, copied, TABLE, swapped, 1)
    np.testing.assert_array_equal(again.hu, grid_volume.hu)
    np.testing.assert_array_equal(twice, labels)


def test_structures_beside_the_table_change_sides_and_colours_too() -> None:
    beside = ("rib_left", "rib_right", "heart_atrium_left", "stomach", "gland_right", "gland_left")
    n = len(TABLE)
    labels = np.repeat(np.arange(n, n + 7, dtype=np.uint8), 6)[None, None] * np.ones(
        (3, 9, 1), np.uint8
    )
    labels[labels == n + 6] = 254  # neither a class nor beside
    grid_volume = GridVolume(np.full(labels.shape, 45, np.int16))
    mirrored = replace(OFF, mirror=1.0)
    _, copied = altered_copy(grid_volume, labels, TABLE, mirrored, 0, beside=beside)
    expected = np.array([254, n + 4, n + 5, n + 3, n + 2, n, n + 1])
    np.testing.assert_array_equal(copied[0, 0, ::6], expected)
    copy, _ = altered_copy(
        grid_volume, labels, TABLE, replace(OFF, recolour_hu=20.0), 0, beside=beside
    )
    ribs, _, heart, stomach, right, left, rest = copy.hu[1, 4, 3::6]
    assert ribs == rest == 45
    assert right == left
    assert len({int(hu) for hu in (heart, stomach, right, rest)}) == 4


def test_without_its_partner_an_organ_keeps_its_name() -> None:
    one_sided = TABLE.keep(["kidney_right"])
    grid_volume, labels = _scan()
    _, copied = altered_copy(grid_volume, labels % 2, one_sided, replace(OFF, mirror=1.0), 0)
    np.testing.assert_array_equal(copied, labels[:, :, ::-1] % 2)


@pytest.mark.parametrize("hu_table", ["piecewise", "identity"])
def test_organs_move_and_their_surroundings_stay(hu_table: str) -> None:
    labels = np.full((9, 30, 40), 2, np.uint8)
    labels[2:7, 5:25, 4:16] = 3
    labels[2:7, 5:25, 20:28] = 15
    labels[2:7, 5:25, 30:36] = 16
    hu = np.where(labels == 2, -100, 90).astype(np.int16)
    hu += np.random.default_rng(0).integers(-8, 9, hu.shape, np.int16)
    grid_volume = GridVolume(
        hu_lookup(hu_table)[hu.astype(int) + 32768], hu_table=hu_table, spacing_mm=SPACING
    )
    colour = replace(OFF, recolour_hu=20.0, recolour_contrast=0.3)
    moves = []
    for seed in range(4):
        copy, copied = altered_copy(grid_volume, labels, TABLE, colour, seed)
        assert copied is labels
        moved = _hu(copy) - hu
        np.testing.assert_array_equal(moved[:, :3], 0)  # a voxel further than a border is wide
        np.testing.assert_array_equal(moved[:, 5:25, 38:], 0)
        inside = [moved[3:6, 6:24, a:b].mean() for a, b in ((5, 15), (21, 27), (31, 35))]
        np.testing.assert_allclose(inside[1], inside[2], atol=1.0)  # both kidneys alike
        border = moved[4, 10:20, 16].mean() / inside[0]
        if abs(inside[0]) > 5:
            np.testing.assert_allclose(border, 0.25, atol=0.15)
        moves.append(inside)
    assert np.std(moves, axis=0).min() > 2
    assert np.abs(moves).max() <= 45


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_the_order_of_hu_within_an_organ_is_kept(seed: int) -> None:
    hu = np.arange(-1024, 1500, dtype=np.int16)[None, None]
    labels = np.full(hu.shape, 3, np.uint8)
    most = replace(OFF, recolour_hu=50.0, recolour_contrast=0.3, shift_hu=30.0, gain=0.2)
    copy, _ = altered_copy(GridVolume(hu), labels, TABLE, most, seed)
    steps = np.diff(copy.hu[0, 0].astype(int))
    assert steps.min() >= 0
    np.testing.assert_array_equal(copy.hu[0, 0, :24], hu[0, 0, :24])  # gas stays gas


def test_a_fluid_stays_a_fluid() -> None:
    bladder = TABLE.index("gallbladder")
    labels = np.full((3, 9, 9), bladder, np.uint8)
    grid_volume = GridVolume(np.full(labels.shape, 10, np.int16))
    for seed in range(6):
        copy, _ = altered_copy(grid_volume, labels, TABLE, replace(OFF, recolour_hu=50.0), seed)
        assert -3 <= copy.hu.min() <= copy.hu.max() <= 25


def test_muscles_do_not_move_alone() -> None:
    labels = np.full((3, 9, 9), TABLE.index("psoas_major_left"), np.uint8)
    grid_volume = GridVolume(np.full(labels.shape, 60, np.int16))
    copy, _ = altered_copy(grid_volume, labels, TABLE, replace(OFF, recolour_hu=50.0), 0)
    np.testing.assert_array_equal(copy.hu, 60)


def test_a_crop_is_a_run_of_slices() -> None:
    grid_volume, labels = _scan((30, 8, 8))
    runs = set()
    for seed in range(12):
        copy, copied = altered_copy(grid_volume, labels, TABLE, replace(OFF, crop_mm=50.0), seed)
        n = len(copy.hu)
        starts = [k for k in range(31 - n) if np.array_equal(copy.hu, grid_volume.hu[k : k + n])]
        assert len(starts) == 1
        np.testing.assert_array_equal(copied, labels[starts[0] : starts[0] + n])
        assert n >= 13  # 50 mm in slices of 4 mm
        runs.add((starts[0], n))
    assert len(runs) > 8
    whole, _ = altered_copy(grid_volume, labels, TABLE, replace(OFF, crop_mm=500.0), 0)
    assert whole is grid_volume


def test_options_draw_apart() -> None:
    grid_volume, labels = _scan()
    alone = replace(OFF, **BEND, **PLACE)
    both = replace(alone, **COLOUR)
    np.testing.assert_array_equal(
        altered_copy(grid_volume, labels, TABLE, alone, 5)[1],
        altered_copy(grid_volume, labels, TABLE, both, 5)[1],
    )


@given(st.integers(0, 2**32), st.floats(1, 30), st.floats(30, 200))
@settings(max_examples=10, deadline=None)
def test_nothing_folds(seed: int, elastic_mm: float, grain_mm: float) -> None:
    augmentation = replace(
        OFF, elastic_mm=elastic_mm, elastic_grain_mm=grain_mm, scale=(1.5, 2), rotation_deg=20
    )
    rng = np.random.default_rng(seed)
    grid_volume = GridVolume(np.zeros((12, 20, 22), np.int16), spacing_mm=(9.0, 7.0, 8.0))
    placing = _Placing.draw(grid_volume, augmentation, rng)
    lattice, pitch = _bending(placing, augmentation, NO_ORGANS, rng)
    # At each corner of each cell: the map from result voxels to the scan keeps its handedness.
    shape = np.array(lattice.shape[:3]) - 1
    for corner in np.ndindex(2, 2, 2):
        columns = []
        for axis in range(3):
            change = np.diff(lattice.astype(float), axis=axis) * pitch[axis]
            for other in {0, 1, 2} - {axis}:
                change = change.take(np.arange(shape[other]) + corner[other], other)
            columns.append(change)
        jacobian = placing.matrix[:, :3] + np.stack(columns, axis=-1)
        assert np.linalg.det(jacobian).min() > 0


def test_displacements_have_the_strength_asked_for() -> None:
    grid_volume = GridVolume(np.zeros((100, 100, 100), np.int16), spacing_mm=(4.0, 5.0, 6.0))
    augmentation = replace(OFF, elastic_mm=3.0, elastic_grain_mm=60.0)
    rng = np.random.default_rng(0)
    placing = _Placing.draw(grid_volume, augmentation, rng)
    lattice, pitch = _bending(placing, augmentation, NO_ORGANS, rng)
    moved_mm = lattice * grid_volume.spacing_mm
    np.testing.assert_allclose(moved_mm.std(axis=(0, 1, 2)), 3.0, rtol=0.1)
    np.testing.assert_allclose(pitch * 60 / 4, grid_volume.spacing_mm)
    apart = (moved_mm[4:] * moved_mm[:-4]).mean() / 9  # 4 nodes are a grain
    np.testing.assert_allclose(apart, np.exp(-1), atol=0.1)


def test_blur_and_noise() -> None:
    grid_volume, labels = _scan((5, 40, 40))
    np.testing.assert_allclose(2 * _taps(1.3).sum() - _taps(1.3)[0], 1, rtol=1e-6)
    assert len(_taps(0.05)) == 1
    n = np.arange(len(_taps(1.3)))
    np.testing.assert_allclose(2 * (_taps(1.3) * n**2).sum(), 1.3**2, rtol=0.15)
    blurred, same = altered_copy(grid_volume, labels, TABLE, replace(OFF, blur_mm=5.0), 1)
    np.testing.assert_array_equal(same, labels)
    assert np.abs(np.diff(blurred.hu, axis=2)).mean() < np.abs(np.diff(grid_volume.hu)).mean()

    flat = GridVolume(np.full((20, 40, 40), 50, np.int16))
    unlabelled = np.zeros(flat.shape, np.uint8)
    deviations = []
    for seed in range(8):
        noisy, _ = altered_copy(flat, unlabelled, TABLE, replace(OFF, noise_hu=20.0), seed)
        np.testing.assert_allclose(noisy.hu.mean(), 50, atol=0.6)
        deviations.append(noisy.hu.std())
    assert 0 < min(deviations) < 10 < max(deviations) < 20.5


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 3), (7, 1, 2), (5, 6, 1)])
@pytest.mark.parametrize("layout", ["c", "f", "flipped"])
def test_any_shape_and_layout(shape: tuple[int, int, int], layout: str) -> None:
    grid_volume, labels = _scan(shape)
    expected = altered_copy(grid_volume, labels, TABLE, EVERYTHING, 3)
    hu = grid_volume.hu
    if layout == "f":
        hu, labels = np.asfortranarray(hu), np.asfortranarray(labels)
    elif layout == "flipped":
        hu, labels = hu[::-1].copy()[::-1], labels[:, ::-1].copy()[:, ::-1]
    found = altered_copy(replace(grid_volume, hu=hu), labels, TABLE, EVERYTHING, 3)
    np.testing.assert_array_equal(found[0].hu, expected[0].hu)
    np.testing.assert_array_equal(found[1], expected[1])


def test_native_pixels_are_altered_in_hu() -> None:
    grid_volume, labels = _scan(hu_table="identity")
    hu = grid_volume.hu.copy()
    hu[:, :3] = -3024  # padding
    native = GridVolume(hu, table=hu_lookup("piecewise"), hu_table="piecewise", spacing_mm=SPACING)
    padded = GridVolume(np.maximum(hu, -1024), spacing_mm=SPACING)
    copy, copied = altered_copy(native, labels, TABLE, EVERYTHING, 2)
    expected = altered_copy(padded, labels, TABLE, EVERYTHING, 2)
    np.testing.assert_array_equal(copy.hu, expected[0].hu)
    np.testing.assert_array_equal(copied, expected[1])
    assert copy.table is not None


# --- offsets --------------------------------------------------------------------------------------


def test_offsets_are_turned_and_scaled_about_the_position() -> None:
    offsets = np.array([[0, 0, 0, 0], [1, 5, 30, 0], [2, -8, 0, -30], [1, 10, 100, 100]], np.int32)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(jittered(offsets, rng, OFF, (10, 110, 110)), offsets)
    turned = replace(OFF, jitter_deg=20.0)
    for _ in range(5):
        found = jittered(offsets, rng, turned, (10, 110, 110))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found[:, :2], offsets[:, :2])
        np.testing.assert_allclose(np.hypot(*found[:3, 2:].T), [0, 30, 30], atol=0.8)
        angles = np.rad2deg(np.arctan2(found[1:3, 3], found[1:3, 2]))
        np.testing.assert_allclose(np.diff(angles) % 360, 270, atol=3)
        assert 0 < abs(angles[0]) <= 42
        assert np.abs(found[3, 2:]).max() <= 110
    scaled = [jittered(offsets, rng, replace(OFF, jitter_scale=0.5), (9, 99, 99)) for _ in range(9)]
    assert max(s[1, 2] for s in scaled) > 33
    assert min(s[1, 2] for s in scaled) < 27
    assert max(s[3, 1] for s in scaled) == 9
    assert max(s[3, 2] for s in scaled) == 99


# --- errors and record ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("copies", -1, "copies is -1; give a whole number from 0"),
        ("copies", True, "copies is True"),
        ("elastic_mm", -1.0, "elastic_mm is -1.0; give 0 to 30 mm"),
        ("elastic_mm", float("nan"), "elastic_mm is nan"),
        ("elastic_grain_mm", 0.0, "elastic_grain_mm is 0.0; give 20 to 1000 mm"),
        ("scale", (1.2, 0.9), "scale is "),
        ("scale", 1.1, "scale is 1.1; give .low, high. from 0.5 to 2"),
        ("rotation_deg", "5", "rotation_deg is '5'; give 0 to 45 degrees"),
        ("mirror", 1.5, "mirror is 1.5; give 0 to 1 .a probability."),
        ("crop_mm", 0.0, "crop_mm is 0.0; give 1 to 10000 mm, or None"),
    ],
)
def test_wrong_options_are_named(name: str, value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Augmentation(**{name: value})  # type: ignore[arg-type]


def test_wrong_arguments_are_named() -> None:
    grid_volume, labels = _scan()
    with pytest.raises(ValueError, match="scan's shape"):
        altered_copy(grid_volume, labels[1:], TABLE, OFF, 0)
    with pytest.raises(ValueError, match="int64"):
        altered_copy(grid_volume, labels.astype(np.int64), TABLE, OFF, 0)
    with pytest.raises(ValueError, match="threads is 0"):
        altered_copy(grid_volume, labels, TABLE, OFF, 0, threads=0)
    large = ClassTable.from_names(f"organ_{n}" for n in range(254))
    with pytest.raises(ValueError, match="256 classes leave no free label in uint8"):
        altered_copy(grid_volume, labels, large, OFF, 0)


def test_the_record_is_json() -> None:
    assert json.loads(json.dumps(Augmentation().to_dict()))["scale"] == [1.0, 1.0]
    assert Augmentation(**Augmentation().to_dict()) == Augmentation()


@pytest.mark.real_data
def test_a_real_scan_is_still_a_ct() -> None:
    from organfast.nifti import read_labels, read_scan

    path = DATA / "labelled" / "abdomen.nii.gz"
    if not path.exists():
        pytest.skip("the real scans are not beside this checkout")
    volume = read_scan(path).volume
    stored, _ = read_labels(path.with_name("abdomen_labels.nii.gz"))
    grid_volume = to_model_grid(volume, ModelGrid((3.0, 3.0, 6.0), "piecewise"))
    fine = resample_labels(volume.orientation.working(stored.astype(np.uint8)), grid_volume)
    labels = np.zeros_like(fine)
    for label, name in ((5, "liver"), (1, "spleen"), (2, "kidney_right"), (3, "kidney_left")):
        labels[fine == label] = TABLE.index(name)
    usual = replace(Augmentation(), elastic_mm=6.0, scale=(0.9, 1.12), stretch=0.05, noise_hu=12.0)
    for seed in range(3):
        copy, copied = altered_copy(grid_volume, labels, TABLE, usual, seed)
        for name in ("liver", "spleen", "kidney_right", "kidney_left"):
            here, there = labels == TABLE.index(name), copied == TABLE.index(name)
            assert 0.4 < there.sum() / here.sum() < 2.2
            np.testing.assert_allclose(
                np.median(_hu(copy)[there]), np.median(_hu(grid_volume)[here]), atol=50
            )
        right, left = (
            np.argwhere(copied == TABLE.index(f"kidney_{side}"))[:, 2].mean()
            for side in ("right", "left")
        )
        assert right > left + 20  # columns run to the patient's right


# --- organs that move and grow --------------------------------------------------------------------


def _ball(at: tuple[int, int, int], radius: float, shape: tuple[int, int, int]) -> np.ndarray:
    apart = np.stack(np.indices(shape)) - np.array(at)[:, None, None, None]
    return np.asarray((apart**2).sum(axis=0) <= radius**2)


def _two_organs() -> tuple[GridVolume, np.ndarray]:
    """A liver and a spleen 30 voxels apart in context."""
    shape = (48, 48, 90)
    labels = np.full(shape, TABLE.context, np.uint8)
    labels[_ball((24, 24, 25), 12, shape)] = TABLE.index("liver")
    labels[_ball((24, 24, 65), 8, shape)] = TABLE.index("spleen")
    return GridVolume(np.zeros(shape, np.int16), spacing_mm=(3.0, 3.0, 3.0)), labels


def _middle_and_size(labels: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    where = np.nonzero(labels == TABLE.index(name))
    return np.mean(where, axis=1), len(where[0])


@pytest.mark.parametrize("seed", range(4))
def test_an_organ_moves_by_what_was_drawn_for_it(seed: int) -> None:
    volume, labels = _two_organs()
    how = replace(OFF, organ_mm=6.0)
    moved = altered_copy(volume, labels, TABLE, how, seed)[1]
    shifts = []
    for name in ("liver", "spleen"):
        (before, size), (after, new_size) = (_middle_and_size(m, name) for m in (labels, moved))
        shifts.append((after - before) * 3.0)
        assert new_size == pytest.approx(size, rel=0.25)
    assert max(np.abs(s).max() for s in shifts) > 1.0
    assert np.abs(shifts[0] - shifts[1]).max() > 1.0  # each its own way
    corner = moved[:6, :6, :6]
    np.testing.assert_array_equal(corner, labels[:6, :6, :6])


def test_an_organ_grows_along_each_axis_by_its_own_share() -> None:
    volume, labels = _two_organs()
    sizes = []
    for seed in range(6):
        grown = altered_copy(volume, labels, TABLE, replace(OFF, organ_size=0.2), seed)[1]
        middle, size = _middle_and_size(grown, "liver")
        assert np.abs(middle - _middle_and_size(labels, "liver")[0]).max() < 1.0
        sizes.append(size / _middle_and_size(labels, "liver")[1])
    assert min(sizes) < 0.9
    assert max(sizes) > 1.1
