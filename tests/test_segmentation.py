"""Label statistics and cleaning: kernels against twins, then laws."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast import segmentation
from organfast.anatomy import ClassTable, Structure
from organfast.kernels.runs import (
    enclosing_labels,
    encode_runs,
    join_pieces,
    join_runs,
    piece_origins,
    piece_sizes,
    rewrite_runs,
    surrounding_labels,
)
from organfast.segmentation import Cleaning, clean, keep_labels, measure_labels

# Two context classes, of which the second stands for the inside of the body; three organs.
TABLE = ClassTable(
    (
        Structure("background", role="background"),
        Structure("wall", role="context"),
        Structure("inside", role="context"),
        Structure("liver"),
        Structure("spleen"),
        Structure("colon"),
    )
)
WALL, INSIDE, LIVER, SPLEEN, COLON = range(1, 6)

SHAPES = [(1, 1, 1), (1, 7, 1), (2, 3, 5), (4, 9, 17), (3, 8, 64)]


def blobs(shape: tuple[int, ...], n_labels: int, seed: int) -> NDArray[np.uint8]:
    """Labels in runs and lumps, with single voxels between them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, n_labels, [-(-n // 2) for n in shape], dtype=np.uint8)
    labels = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)[tuple(map(slice, shape))]
    noise = rng.random(shape) < 0.1
    labels[noise] = rng.integers(0, n_labels, np.count_nonzero(noise))
    return labels


def f_order(array: NDArray[Any]) -> NDArray[Any]:
    return np.asfortranarray(array)


def strided(array: NDArray[Any]) -> NDArray[Any]:
    wide = np.zeros([2 * n for n in array.shape], array.dtype)
    wide[::2, 1::2, ::2] = array
    return wide[::2, 1::2, ::2]


def flipped(array: NDArray[Any]) -> NDArray[Any]:
    return array[::-1, :, ::-1].copy()[::-1, :, ::-1]


def permuted(array: NDArray[Any]) -> NDArray[Any]:
    return array.transpose(2, 0, 1).copy().transpose(1, 2, 0)


def sponge(shape: tuple[int, ...], seed: int) -> NDArray[np.uint8]:
    """Two organs side by side, with voids of every label that is no organ and a few islands."""
    rng = np.random.default_rng(seed)
    labels = np.full(shape, LIVER, np.uint8)
    labels[:, :, shape[2] // 2 :] = SPLEEN
    void = rng.random(shape) < 0.22
    labels[void] = rng.integers(0, LIVER, np.count_nonzero(void))
    labels[rng.random(shape) < 0.01] = COLON
    return labels


LAYOUTS = [np.ascontiguousarray, f_order, strided, flipped, permuted]


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_label_statistics_equal_their_twin(
    dtype: type, layout: Callable[[NDArray[Any]], NDArray[Any]], shape: tuple[int, ...]
) -> None:
    labels = layout(blobs(shape, 6, seed=1).astype(dtype))
    confidence = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    labels.flags.writeable = confidence.flags.writeable = False
    measured = measure_labels(labels, 7, confidence)
    counts, sums, boxes, confidence_sums = naive.label_statistics(labels, confidence, 7)
    np.testing.assert_array_equal(measured.counts, counts)
    np.testing.assert_array_equal(measured.sums, sums)
    np.testing.assert_array_equal(measured.boxes, boxes)
    np.testing.assert_array_equal(measured.confidence_sums, confidence_sums)
    np.testing.assert_array_equal(measure_labels(labels, 7).counts, counts)


def test_a_map_without_voxels_has_no_labels() -> None:
    measured = measure_labels(np.zeros((0, 3, 2), np.uint8), 2)
    np.testing.assert_array_equal(measured.counts, [0, 0])
    np.testing.assert_array_equal(measured.boxes, np.zeros((2, 3, 2)))
    assert measured.confidence_sums is None


def test_labels_beyond_the_table_are_refused_not_written_out_of_range() -> None:
    labels = np.zeros((2, 3, 40), np.uint16)
    labels[1, 1, 3:7] = 65_535
    with pytest.raises(ValueError, match="4 voxels have a label of 3 or more"):
        measure_labels(labels, 3)


@pytest.mark.parametrize("labels", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 2), np.int64)])
def test_what_is_no_label_map_is_refused(labels: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="a label map is a 3-D uint8 or uint16 array"):
        measure_labels(labels, 3)
    with pytest.raises(ValueError, match="a label map is a 3-D uint8 or uint16 array"):
        clean(labels, TABLE, Cleaning(), 0.001)


@pytest.mark.parametrize("confidence", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 2))])
def test_confidence_must_fit_the_labels(confidence: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="does not fit labels of shape"):
        measure_labels(np.zeros((2, 2, 2), np.uint8), 3, confidence)


# --- runs -----------------------------------------------------------------------------------------

ORGANS = np.array([0, 0, 0, 1, 1, 1], np.uint8)
VOIDS = np.array([1, 0, 0, 0, 0, 0], np.uint8)
# What labels are taken for when either is sought.
THEMSELVES = np.arange(6, dtype=np.uint16)
NOTHING = np.array([0, 0, 0, 3, 4, 5], np.uint16)


def encoded(
    planes: NDArray[Any], taken_for: NDArray[np.uint16]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]:
    """stops, labels, rows and the rows of a plane"""
    stops, labels = np.empty(planes.size, np.int32), np.empty(planes.size, np.uint16)
    rows = np.empty(planes.shape[0] * planes.shape[1] + 1, np.int32)
    n = encode_runs(planes, taken_for, stops, labels, rows)
    return stops[:n], labels[:n], rows, planes.shape[1]


def joined(runs: tuple[Any, ...], sought: NDArray[np.uint8]) -> tuple[NDArray[np.int32], int]:
    pieces = np.empty(len(runs[0]), np.int32)
    return pieces, join_runs(*runs, sought, sought is ORGANS, pieces)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_encoded_runs_equal_their_twin(
    dtype: type, layout: Callable[[NDArray[Any]], NDArray[Any]], shape: tuple[int, ...]
) -> None:
    planes = layout(blobs(shape, 6, seed=3).astype(dtype) * dtype(51))
    planes.flags.writeable = False
    for taken_for in (np.arange(256, dtype=np.uint16), np.arange(256, dtype=np.uint16) // 60 + 300):
        expected = naive.encode_runs(planes, taken_for)
        for got, wanted in zip(encoded(planes, taken_for)[:3], expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 10, 16, 17, 18, 31])
def test_a_run_stops_wherever_the_label_changes(dtype: type, n: int) -> None:
    # Row r changes at column r; the other byte of a uint16 changes in every second row.
    planes = np.zeros((1, n, n), dtype)
    for r in range(n):
        planes[0, r, r:] = 256 if dtype is np.uint16 and r % 2 else 1
    taken_for = np.arange(257, dtype=np.uint16)
    expected = naive.encode_runs(planes, taken_for)
    for got, wanted in zip(encoded(planes, taken_for)[:3], expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("sought", "taken_for"), [(ORGANS, THEMSELVES), (VOIDS, NOTHING)])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 1, 9), (9, 10, 1)])
@pytest.mark.parametrize("make", [blobs, lambda shape, n, seed: sponge(shape, seed)])
def test_pieces_equal_their_twins(
    sought: NDArray[np.uint8],
    taken_for: NDArray[np.uint16],
    shape: tuple[int, ...],
    make: Callable[..., NDArray[np.uint8]],
) -> None:
    planes = make(shape, 6, 5)
    runs = encoded(planes, taken_for)
    planes = taken_for[planes]
    stops, _, rows, n_rows = runs
    pieces, n = joined(runs, sought)
    np.testing.assert_array_equal(pieces, naive.join_runs(planes, sought, sought is ORGANS))
    assert n == pieces.max(initial=-1) + 1
    voxels = naive.decoded(stops, rows, pieces, shape)
    for first in (0, 1):
        sizes = np.zeros(n, np.int64)
        piece_sizes(stops, rows, n_rows, first, pieces, sizes)
        np.testing.assert_array_equal(sizes, naive.piece_sizes(voxels, first, n))
        votes = np.zeros((n, 2), np.int64)
        columns = np.array([1, 0, -1, 1, -1, 0], np.int32)
        surrounding_labels(*runs, first, pieces, columns, votes)
        expected = naive.surrounding_labels(planes, voxels, first, columns, (n, 2))
        np.testing.assert_array_equal(votes, expected)
    for order in ((0, 100, 10, 1), (50, -1, 70, -8)):
        owners, earliest = np.zeros(n, np.uint16), np.full(n, 10**6)
        piece_origins(*runs, pieces, order, owners, earliest)
        expected = naive.piece_origins(planes, voxels, order, n)
        np.testing.assert_array_equal([owners, earliest], expected)
    for ends in ((True, True), (True, False), (False, True), (False, False)):
        lowest, highest = np.full(n, 65_535, np.uint16), np.zeros(n, np.uint16)
        enclosing_labels(*runs, pieces, ends, lowest, highest)
        expected = naive.enclosing_labels(planes, voxels, ends, n)
        np.testing.assert_array_equal([lowest, highest], expected)


@pytest.mark.parametrize("sought", [ORGANS, VOIDS])
def test_rows_may_share_any_number_of_runs(sought: NDArray[np.uint8]) -> None:
    planes = np.zeros((2, 2, 2400), np.uint8)
    planes[:, :, ::2] = LIVER
    planes[1, 1, 700:1700:3] = SPLEEN
    pieces, _ = joined(encoded(planes, THEMSELVES), sought)
    np.testing.assert_array_equal(pieces, naive.join_runs(planes, sought, sought is ORGANS))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [0, 1])
def test_rewritten_runs_equal_their_twin(
    dtype: type, layout: Callable[[NDArray[Any]], NDArray[Any]], first: int
) -> None:
    planes = layout(blobs((4, 9, 17), 6, seed=6).astype(dtype))
    runs = encoded(planes, THEMSELVES)
    pieces, n = joined(runs, ORGANS)
    becomes = np.random.default_rng(7).integers(-1, 3, n, dtype=np.int32)
    voxels = naive.decoded(runs[0], runs[2], pieces, planes.shape)
    expected = naive.rewrite_runs(planes, voxels, first, becomes)
    rewrite_runs(runs[0], runs[2], first, pieces, becomes, planes)
    np.testing.assert_array_equal(planes, expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=14))
def test_joined_pieces_equal_their_twin(pairs: list[tuple[int, int]]) -> None:
    parents = np.arange(12, dtype=np.int32)
    join_pieces(np.array(pairs, np.int32).reshape(-1, 2), parents)
    np.testing.assert_array_equal(parents, naive.join_pieces(pairs, 12))


# --- cleaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["largest", "parts", "dust", "none"])
@pytest.mark.parametrize("fill_holes", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 9, 17), (13, 12, 11)])
@pytest.mark.parametrize("slab_runs", [1, 300, 10**6])
def test_cleaning_equals_its_twin_however_the_map_is_cut_into_slabs(
    keep: Any,
    fill_holes: bool,
    shape: tuple[int, ...],
    slab_runs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segmentation, "_SLAB_RUNS", slab_runs)
    for labels in (blobs(shape, 6, 0), np.maximum(blobs(shape, 6, 1), blobs(shape, 4, 2))):
        expected = naive.clean(labels, TABLE, keep, 5, fill_holes)
        record = clean(labels, TABLE, Cleaning(keep, 5 * 0.027, fill_holes), 0.027)
        np.testing.assert_array_equal(labels, expected)
        assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("keep", ["largest", "parts", "dust", "none"])
@pytest.mark.parametrize("slab_runs", [1, 300, 10**6])
def test_filling_equals_its_twin_however_the_map_is_cut_into_slabs(
    keep: Any, slab_runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "_SLAB_RUNS", slab_runs)
    for seed in range(3):
        labels = np.full((14, 13, 16), INSIDE, np.uint8)
        labels[1:-2, 2:-1, 1:-1] = sponge((11, 10, 14), seed)
        expected = naive.clean(labels, TABLE, keep, 5, True)
        unfilled = naive.clean(labels, TABLE, keep, 5, False)
        record = clean(labels, TABLE, Cleaning(keep, 5 * 0.027), 0.027)
        np.testing.assert_array_equal(labels, expected)
        filled = [np.count_nonzero((labels == o) & (unfilled != o)) for o in (LIVER, SPLEEN, COLON)]
        assert [c["filled_voxels"] for c in record["organs"].values()] == filled
        assert min(filled[:2]) > 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cleaning_writes_in_place_in_any_memory_order(
    dtype: type, layout: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    labels = layout(blobs((9, 14, 13), 6, seed=7).astype(dtype))
    expected = naive.clean(np.ascontiguousarray(labels), TABLE, "largest", 0, True)
    clean(labels, TABLE, Cleaning(), 0.001)
    np.testing.assert_array_equal(labels, expected)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 8), st.integers(1, 12)),
    share=st.sampled_from([0.02, 0.2, 0.6]),
    seed=st.integers(0, 10**6),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    slab_runs=st.sampled_from([1, 40, 10**6]),
    keep=st.sampled_from(["largest", "parts", "dust"]),
)
def test_cleaning_equals_its_twin_whatever_the_map(
    shape: tuple[int, ...],
    share: float,
    seed: int,
    layout: Callable[[NDArray[Any]], NDArray[Any]],
    dtype: type,
    slab_runs: int,
    keep: Any,
) -> None:
    # Few organs among much else have many components of equal size, much organ has many voids.
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, LIVER, shape).astype(dtype)
    labels[rng.random(shape) < share] = LIVER
    labels[rng.random(shape) < share / 4] = SPLEEN
    expected = naive.clean(labels, TABLE, keep, 3, True)
    labels = layout(labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "_SLAB_RUNS", slab_runs)
        clean(labels, TABLE, Cleaning(keep, 3 * 0.027), 0.027)
    np.testing.assert_array_equal(labels, expected)


def test_the_record_counts_what_happened() -> None:
    labels = np.full((9, 9, 9), INSIDE, np.uint8)
    labels[1:6, 1:6, 1:6] = LIVER
    labels[3, 3, 3] = WALL
    labels[8, 8, 7:9] = LIVER
    labels[8, 0, 0] = LIVER
    record = clean(labels, TABLE, Cleaning(), 0.001)
    assert record == {
        "keep": "largest",
        "dust_ml": 0.5,
        "fill_holes": True,
        "least_part": 0.5,
        "connectivity": 26,
        "organs": {"liver": {"removed_components": 2, "removed_voxels": 3, "filled_voxels": 1}},
    }
    assert np.count_nonzero(labels == LIVER) == 125


def test_an_island_becomes_what_surrounds_it() -> None:
    labels = np.full((9, 20, 20), INSIDE, np.uint8)
    labels[:, :, :3] = 0
    labels[:, :, 3:6] = WALL
    labels[2:6, 8:18, 8:18] = LIVER
    labels[4, 4, 1] = labels[4, 4, 4] = labels[7, 4, 12] = LIVER  # in air, wall and inside
    labels[3, 12, 12] = SPLEEN  # inside the liver
    labels[8, 1:5, 16] = SPLEEN
    clean(labels, TABLE, Cleaning(), 0.001)
    assert [labels[4, 4, 1], labels[4, 4, 4], labels[7, 4, 12]] == [0, WALL, INSIDE]
    assert labels[3, 12, 12] == LIVER
    assert np.count_nonzero(labels == SPLEEN) == 4


def test_an_island_between_organs_becomes_the_context_class_or_background() -> None:
    labels = np.full((3, 3, 9), LIVER, np.uint8)
    labels[1, 1, 7] = SPLEEN
    labels[:, :, :2] = SPLEEN
    bare = ClassTable(tuple(s for s in TABLE.structures if s.role != "context"))
    without_context = np.where(labels == LIVER, 1, 2).astype(np.uint8)
    clean(labels, TABLE, Cleaning(fill_holes=False), 0.001)
    clean(without_context, bare, Cleaning(fill_holes=False), 0.001)
    assert labels[1, 1, 7] == INSIDE
    assert without_context[1, 1, 7] == 0


def test_components_that_touch_by_a_corner_are_one() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = LIVER
    labels[3, 3, 3] = LIVER
    clean(labels, TABLE, Cleaning(), 0.001)
    np.testing.assert_array_equal(np.argwhere(labels == LIVER), [[0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_equal_components_the_first_in_working_order_stays(
    layout: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:
    labels = layout(np.zeros((3, 5, 5), np.uint8))
    labels[0, 4, 4] = labels[2, 0, 0] = labels[0, 0, 3] = LIVER
    clean(labels, TABLE, Cleaning(), 0.001)
    np.testing.assert_array_equal(np.argwhere(labels == LIVER), [[0, 0, 3]])


@pytest.mark.parametrize("islands", [[(0, 0, 1), (1, 0, 0)], [(0, 0, 4)]])
def test_working_order_is_kept_where_memory_and_slabs_run_otherwise(
    islands: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slabs are planes of equal column. The first island begins in a later one than it is found in,
    # the other one voxel before that of the first slab.
    monkeypatch.setattr(segmentation, "_SLAB_RUNS", 1)
    labels = np.asfortranarray(np.zeros((4, 4, 5), np.uint8))
    later = [(0, 3, 3), (0, 3, 4)] if len(islands) == 2 else [(0, 1, 0)]
    for voxel in (*islands, *later):
        labels[voxel] = LIVER
    clean(labels, TABLE, Cleaning(), 0.001)
    np.testing.assert_array_equal(np.argwhere(labels == LIVER), islands)


def test_dust_never_takes_the_last_component_of_an_organ() -> None:
    labels = np.zeros((3, 5, 9), np.uint8)
    labels[0, 0, :3] = labels[2, 4, :2] = LIVER
    record = clean(labels, TABLE, Cleaning("dust", dust_ml=1.0), voxel_ml=0.001)
    assert record["organs"]["liver"]["removed_voxels"] == 2
    assert np.count_nonzero(labels == LIVER) == 3


def test_a_hole_goes_to_the_organ_whose_faces_enclose_it() -> None:
    labels = np.full((11, 11, 11), LIVER, np.uint8)
    labels[3:8, 3:8, 3:8] = COLON
    labels[4:7, 4:7, 4:7] = INSIDE
    labels[1, 1, 1:3] = WALL, 0  # of two labels, one hole
    clean(labels, TABLE, Cleaning(), 0.001)
    assert (labels[4:7, 4:7, 4:7] == COLON).all()
    assert (labels[1, 1, 1:3] == LIVER).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [0, -1])
def test_a_void_at_the_border_of_the_map_is_no_hole(axis: int, end: int) -> None:
    labels = np.full((5, 5, 5), LIVER, np.uint8)
    border = np.moveaxis(labels, axis, 0)[end]
    border[2, 2] = INSIDE
    clean(labels, TABLE, Cleaning(), 0.001)
    assert border[2, 2] == INSIDE


def test_a_void_is_open_through_faces_only() -> None:
    labels = np.full((9, 9, 9), INSIDE, np.uint8)
    labels[1:8, 1:8, 1:8] = LIVER
    labels[2, 2, 2] = labels[6, 2, 4] = INSIDE
    labels[1, 1, 2] = INSIDE  # an edge from the first void, and outside
    labels[6, 1, 4] = INSIDE  # a face from the second void, and outside
    clean(labels, TABLE, Cleaning(), 0.001)
    assert labels[2, 2, 2] == LIVER
    assert [labels[1, 1, 2], labels[6, 1, 4], labels[6, 2, 4]] == [INSIDE] * 3


def test_what_two_organs_enclose_together_stays() -> None:
    labels = np.full((5, 5, 8), LIVER, np.uint8)
    labels[:, :, 4:] = SPLEEN
    labels[2, 2, 3:5] = INSIDE
    record = clean(labels, TABLE, Cleaning(), 0.001)
    assert (labels[2, 2, 3:5] == INSIDE).all()
    assert [c["filled_voxels"] for c in record["organs"].values()] == [0, 0]


def test_a_hole_around_another_organ_stays() -> None:
    labels = np.full((7, 7, 7), LIVER, np.uint8)
    labels[2:5, 2:5, 2:5] = INSIDE
    labels[3, 3, 3] = SPLEEN
    before = labels.copy()
    clean(labels, TABLE, Cleaning(), 0.001)
    np.testing.assert_array_equal(labels, before)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), order=st.permutations([LIVER, SPLEEN, COLON]))
def test_permuting_organs_permutes_the_clean_map(seed: int, order: list[int]) -> None:
    labels = blobs((8, 9, 10), 6, seed)
    renamed = np.array([0, WALL, INSIDE, *order], np.uint8)
    other = renamed[labels]
    clean(labels, TABLE, Cleaning(), 0.001)
    clean(other, TABLE, Cleaning(), 0.001)
    np.testing.assert_array_equal(other, renamed[labels])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_a_clean_map_stays_as_it_is(seed: int) -> None:
    labels = blobs((8, 9, 10), 6, seed)
    clean(labels, TABLE, Cleaning(fill_holes=False), 0.001)
    again = labels.copy()
    record = clean(again, TABLE, Cleaning(fill_holes=False), 0.001)
    np.testing.assert_array_equal(again, labels)
    assert all(not any(changes.values()) for changes in record["organs"].values())


def test_a_map_without_organs_is_left_alone() -> None:
    labels = np.full((3, 4, 5), INSIDE, np.uint8)
    assert clean(labels, TABLE, Cleaning(), 0.001)["organs"] == {}
    assert (labels == INSIDE).all()


def test_bad_arguments_are_refused() -> None:
    labels = np.zeros((2, 2, 2), np.uint8)
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="is no share; use above 0"):
            Cleaning("parts", least_part=share)
    with pytest.raises(ValueError, match="keep 'all' is unknown"):
        Cleaning("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dust_ml -1"):
        Cleaning(dust_ml=-1)
    with pytest.raises(ValueError, match="voxel_ml 0 is not positive"):
        clean(labels, TABLE, Cleaning(), 0)
    with pytest.raises(ValueError, match="have a label of 6 or more"):
        clean(labels + np.uint8(6), TABLE, Cleaning(), 1)
    labels.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        clean(labels, TABLE, Cleaning(), 1)


def test_islands_all_over_a_scan_need_little_memory() -> None:
    import tracemalloc

    labels = np.full((48, 256, 256), INSIDE, np.uint8)
    labels[::8, ::8, ::8] = LIVER
    labels[21:39, 101:199, 101:199] = LIVER
    clean(labels[:4].copy(), TABLE, Cleaning(), 0.001)
    tracemalloc.start()
    clean(labels, TABLE, Cleaning(), 0.001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2_097_152, f"{peak / 1e6:.0f} MB"
    assert np.count_nonzero(labels == LIVER) == 18 * 98 * 98


# --- labels that stay -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", SHAPES)
def test_only_kept_labels_stay(
    layout: Callable[[NDArray[Any]], NDArray[Any]], dtype: type, shape: tuple[int, ...]
) -> None:
    labels = layout(blobs(shape, 6, 4).astype(dtype))
    kept = np.isin(np.arange(np.iinfo(dtype).max + 1), [0, LIVER, COLON])
    expected = naive.clear_labels(labels, kept)
    keep_labels(labels, {LIVER, COLON})
    np.testing.assert_array_equal(labels, expected)


def test_labels_are_kept_in_a_map_that_can_be_written() -> None:
    labels = np.zeros((2, 3, 4), np.uint8)
    labels.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        keep_labels(labels, {1})
    with pytest.raises(ValueError, match="3-D uint8 or uint16"):
        keep_labels(np.zeros((2, 3), np.uint8), {1})
