"""Levels: box averages in the plane and across slices, and the window that slides along a scan."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import random_hu, zoo

from organfast.blocks import Block, Context
from organfast.grid import HU_TABLES, GridVolume, Pattern, hu_lookup
from organfast.levels import LevelWindow, levels_slab


@dataclass(frozen=True)
class Boxes:
    """A pattern of any boxes."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    reach: tuple[int, int, int]
    n_features = 1
    offsets = np.zeros((1, 4), np.int32)


def naive_slab(scan: GridVolume, pattern: Pattern, k0: int, k1: int) -> np.ndarray:
    volume = naive.through_table(scan.hu, scan.table, scan.air)
    boxes = zip(pattern.widths, pattern.depths, strict=True)
    return np.array(
        [naive.box_level(volume, *box, scan.air, pattern.reach, (k0, k1)) for box in boxes],
        np.int16,
    )


PATTERNS = [
    Boxes((1, 3), (3, 1), (2, 1, 4)),
    Boxes((5, 2, 1), (2, 4, 1), (4, 0, 1)),
    Boxes((4,), (7,), (0, 12, 13)),
    Context(9, (1, 3, 5), (9.0, 4.0, 8.0), spacing_mm=(1.0, 1.0, 2.0)),
    Block(1),
    Block(5),
    Block(3, (1, 2, 3)),
    Block(3, (4, 1), 3),
    Block(1, (7,), 5),
    Block(5, (20,)),
]


@pytest.mark.parametrize("name", HU_TABLES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_levels_equal_their_twin_in_every_layout(name: str, pattern: Pattern) -> None:
    hu = random_hu((3, 9, 8))
    table = hu_lookup(name)
    expected = naive_slab(GridVolume(hu, table=table, hu_table=name), pattern, 0, 3)
    for same in zoo(hu):
        scan = GridVolume(same, table=table, hu_table=name)
        np.testing.assert_array_equal(levels_slab(scan, pattern, 0, 3), expected)
    applied = table[hu.astype(int) + 32768]
    for same in zoo(applied):  # as a working grid holds them
        scan = GridVolume(same, hu_table=name)
        np.testing.assert_array_equal(levels_slab(scan, pattern, 0, 3), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 6), (2, 5, 1)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_levels_of_the_smallest_volumes(shape: tuple[int, int, int], pattern: Pattern) -> None:
    scan = GridVolume(random_hu(shape), table=hu_lookup("identity"))
    expected = naive_slab(scan, pattern, 0, shape[0])
    np.testing.assert_array_equal(levels_slab(scan, pattern, 0, shape[0]), expected)


@given(
    pattern=st.sampled_from(PATTERNS),
    cuts=st.sets(st.integers(1, 6), max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_levels_do_not_depend_on_how_the_volume_is_cut(
    pattern: Pattern, cuts: set[int], seed: int
) -> None:
    scan = GridVolume(
        random_hu((7, 6, 9), seed), table=hu_lookup("piecewise"), hu_table="piecewise"
    )
    whole = levels_slab(scan, pattern, 0, 7)
    pk = pattern.reach[0]
    edges = [0, *sorted(cuts), 7]
    for k0, k1 in itertools.pairwise(edges):
        part = levels_slab(scan, pattern, k0, k1)
        np.testing.assert_array_equal(part, whole[:, k0 : k1 + 2 * pk])


@pytest.mark.parametrize("width", [2, 3, 126, 127])
@pytest.mark.parametrize("value", [-1024, -1023, 0, 32766, 32767])
def test_boxes_are_exact_at_the_ends_of_int16(width: int, value: int) -> None:
    hu = np.full((1, 130, 131), value, np.int16)
    hu[0, 0, 0] = 32767 if value < 32767 else 0
    scan = GridVolume(hu, table=hu_lookup("identity"))
    level = levels_slab(scan, Block(1, (width,)), 0, 1)[0, 0]
    sums = np.zeros((131 + width, 132 + width), np.int64)
    padded = np.full((130 + width, 131 + width), -1024, np.int64)
    padded[width // 2 : width // 2 + 130, width // 2 : width // 2 + 131] = hu[0]
    sums[1:, 1:] = padded.cumsum(0).cumsum(1)
    box = sums[width:, width:] - sums[:-width, width:] - sums[width:, :-width]
    box = (box + sums[:-width, :-width])[:130, :131]
    np.testing.assert_array_equal(level, (2 * box + width**2) // (2 * width**2))


def test_half_is_rounded_up_below_zero_too() -> None:
    hu = np.array([[-3, -2, -3, -3, 3, 2]], np.int16).repeat(2, 0)[None]
    level = levels_slab(GridVolume(hu, table=hu_lookup("identity")), Block(1, (2,)), 0, 1)
    # [c - 1, c + 1): -2.5 -> -2, -2.5 -> -2, -3, 0, 2.5 -> 3
    np.testing.assert_array_equal(level[0, 0, 1, 1:], [-2, -2, -3, 0, 3])


@pytest.mark.parametrize("width", [2, 6, 14, 28])
def test_an_exact_half_is_not_lost_to_the_reciprocal_of_the_box(width: int) -> None:
    """(m + 1/2) * 196 times the float64 nearest to 1/196 falls short of m + 1/2 for most m."""
    scan_slices = np.arange(-1024, 3000, 7)
    columns = np.arange(2 * width) % 2
    hu = (scan_slices[:, None, None] + columns).repeat(2 * width, 1).astype(np.int16)
    scan = GridVolume(hu, table=hu_lookup("identity"))
    level = levels_slab(scan, Block(1, (width,)), 0, len(hu))[0, :, width, width]
    np.testing.assert_array_equal(level, scan_slices + 1)


def test_beyond_the_sides_is_air_and_beyond_the_ends_the_end_slice() -> None:
    hu = np.stack([np.full((4, 4), 100 * k, np.int16) for k in range(3)])
    slab = levels_slab(GridVolume(hu, table=hu_lookup("identity")), Block(3, slices=5), 0, 3)
    assert slab.shape == (1, 7, 6, 6)
    np.testing.assert_array_equal(slab[0, :, 2, 2], [0, 0, 0, 100, 200, 200, 200])
    rim = np.ones((6, 6), bool)
    rim[1:-1, 1:-1] = False
    assert (slab[0][:, rim] == -1024).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n_slices", [1, 2, 5, 40])
def test_a_sliding_window_holds_the_same_levels(pattern: Pattern, n_slices: int) -> None:
    scan = GridVolume(random_hu((23, 6, 5), 3), table=hu_lookup("piecewise"), hu_table="piecewise")
    whole = naive_slab(scan, pattern, 0, 23)
    pk = pattern.reach[0]
    window = LevelWindow(scan, pattern, n_slices)
    for k0 in (0, 1, 2, 9, 10, 22):  # overlapping, adjacent and far apart
        k1 = min(k0 + window.n_slices, 23)
        for run in reversed(window.move(k0, k1)):  # in any order
            window.fill(run)
        np.testing.assert_array_equal(window.slab(k0, k1), whole[:, k0 : k1 + 2 * pk])
        np.testing.assert_array_equal(window.slab(k1 - 1, k1), whole[:, k1 - 1 : k1 + 2 * pk])


def test_a_slab_shares_its_padding_and_cannot_be_written() -> None:
    scan = GridVolume(np.zeros((9, 20, 20), np.int16))
    pattern = Context(50, (1, 5), (60.0, 60.0, 9.0))
    slab = levels_slab(scan, pattern, 4, 5)
    memory = LevelWindow.bytes_per_slice(scan, pattern) * slab.shape[1]
    assert memory < 0.5 * slab.size * 2
    with pytest.raises(ValueError, match="read-only"):
        slab[0, 0, 0, 0] = 1


@pytest.mark.parametrize(
    ("k0", "k1", "message"),
    [(0, 4, "slices 0 to 4 are not in a volume of 3"), (2, 2, "slices 2 to 2"), (-1, 2, "-1 to 2")],
)
def test_the_door_of_levels(k0: int, k1: int, message: str) -> None:
    scan = GridVolume(np.zeros((3, 4, 4), np.int16), table=hu_lookup("identity"))
    with pytest.raises(ValueError, match=message):
        levels_slab(scan, Block(1), k0, k1)
    with pytest.raises(ValueError, match=message):
        LevelWindow(scan, Block(1), 3).move(k0, k1)


def test_a_window_only_moves_on_and_shows_what_was_made() -> None:
    scan = GridVolume(np.zeros((9, 4, 4), np.int16))
    window = LevelWindow(scan, Block(3, slices=3), 2)
    with pytest.raises(ValueError, match="not in the window"):
        window.slab(0, 1)
    for run in window.move(4, 6):
        window.fill(run)
    with pytest.raises(ValueError, match="not in the window"):
        window.slab(6, 7)
    with pytest.raises(ValueError, match="only moves on"):
        window.move(3, 5)
    with pytest.raises(ValueError, match="more than the window's 2"):
        window.move(4, 7)
    with pytest.raises(ValueError, match="holds at least one"):
        LevelWindow(scan, Block(1), 0)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (Boxes((0,), (1,), (0, 0, 0)), "0 voxels wide"),
        (Boxes((128,), (1,), (0, 0, 0)), "128 voxels wide"),
        (Boxes((127,), (5,), (0, 0, 0)), "holds more than 65536"),
    ],
)
def test_boxes_whose_sums_would_not_fit_are_refused(boxes: Boxes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        levels_slab(GridVolume(np.zeros((3, 4, 4), np.int16)), boxes, 0, 1)


@pytest.mark.parametrize("value", [-2144, 0, 32767])
def test_the_deepest_boxes_are_exact(value: int) -> None:
    hu = np.full((50, 41, 41), value, np.int16)
    hu[25, 20, 20] = 31000
    scan = GridVolume(hu, hu_table="piecewise")
    box = Boxes((40,), (40,), (0, 0, 0))
    total = (40**3 - 1) * value + 31000
    level = levels_slab(scan, box, 24, 25)[0, 0, 20, 20]
    assert level == (2 * total + 40**3) // (2 * 40**3)
