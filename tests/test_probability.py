"""Probabilities to voxels: against the slow twins, over memory orders, and the laws."""

from __future__ import annotations

import threading
import tracemalloc

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from organfast.blocks import Block
from organfast.grid import BlockGrid, GridVolume, ModelGrid, to_model_grid
from organfast.kernels.enlarge import (
    blend_slices,
    enlarge_labels,
    enlarge_map,
    scratch_floats,
    weigh_slice,
)
from organfast.probability import (
    Enlargement,
    SliceClassifier,
    axis_weights,
    enlarge,
    label_volume,
    organ_map,
    probability_slabs,
)
from organfast.volume import Volume
from organfast.workers import Workers

NO_CONFIDENCE = np.empty((0, 0), np.uint8)


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """Independent distributions: nearly every class may win in every cell."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)


def votes(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """A small forest's probabilities: few classes per position, many zeros, many ties."""
    rng = np.random.default_rng(seed)
    peaked = rng.dirichlet(np.full(shape[-1], 0.2), shape[:-1])
    return (rng.multinomial(4, peaked) / 4).astype(np.float32)


# Memory orders of a slice that the scan's own order may demand.
LAYOUTS = {
    "C": lambda shape, dtype: np.zeros(shape, dtype),
    "F": lambda shape, dtype: np.zeros(shape, dtype, order="F"),
    "flipped columns": lambda shape, dtype: np.zeros(shape, dtype)[:, ::-1],
    "flipped rows": lambda shape, dtype: np.zeros(shape, dtype)[::-1],
    "flipped F": lambda shape, dtype: np.zeros(shape, dtype, order="F")[::-1, ::-1],
    "strided": lambda shape, dtype: np.zeros((2 * shape[0], 3 * shape[1]), dtype)[::2, 1::3],
    "slices fastest": lambda shape, dtype: np.zeros((*shape, 4), dtype)[..., 2],
}


def run_kernel(p, i, j, labels, confidence=NO_CONFIDENCE):
    scratch = np.full(scratch_floats(p.shape[2], labels.shape[1]), np.nan, np.float32)
    enlarge_labels(p, i.lower, i.weight, j.lower, j.weight, labels, confidence, scratch)


# --- the kernels and their twins ------------------------------------------------------------------


@pytest.mark.parametrize("maps", [noise, votes])
@pytest.mark.parametrize(
    ("blocks", "classes", "shape", "stride"),
    [
        ((1, 1), 3, (5, 4), (9, 9)),  # one position
        ((1, 6), 8, (1, 31), (3, 5)),  # one row
        ((5, 1), 2, (23, 1), (4, 4)),  # one column
        ((4, 3), 23, (40, 40), (9, 13)),  # neither size a multiple of its stride
        ((2, 2), 9, (45, 37), (21, 20)),  # cells taller than a band, wider than two vectors
        ((7, 8), 40, (14, 17), (2, 2)),
        ((6, 5), 7, (6, 5), (1, 1)),
        ((3, 3), 1, (12, 12), (4, 4)),
    ],
)
def test_labels_and_confidence_equal_the_twin(maps, blocks, classes, shape, stride) -> None:
    p = maps((*blocks, classes), seed=classes)
    i = axis_weights(shape[0], stride[0] // 2, stride[0], blocks[0])
    j = axis_weights(shape[1], stride[1] // 2, stride[1], blocks[1])
    labels, confidence = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    run_kernel(p, i, j, labels, confidence)
    expected, best = naive.enlarge_labels(p, i.lower, i.weight, j.lower, j.weight)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(confidence, best)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label_dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("confidence_dtype", [np.uint8, np.float32, None])
def test_any_memory_order_is_written(layout, label_dtype, confidence_dtype) -> None:
    shape, p = (37, 30), votes((5, 4, 6))
    i, j = axis_weights(37, 3, 7, 5), axis_weights(30, 4, 7, 4)
    labels = LAYOUTS[layout](shape, label_dtype)
    whole_labels = labels if labels.base is None else labels.base
    confidence = NO_CONFIDENCE
    if confidence_dtype is not None:
        confidence = LAYOUTS[layout](shape, confidence_dtype)
    run_kernel(p, i, j, labels, confidence)
    expected, best = naive.enlarge_labels(p, i.lower, i.weight, j.lower, j.weight)
    np.testing.assert_array_equal(labels, expected)
    assert np.count_nonzero(whole_labels) == np.count_nonzero(expected)  # nothing beside the view
    if confidence_dtype is not None:
        best = naive.quantised(best) if confidence_dtype == np.uint8 else best
        np.testing.assert_array_equal(confidence, best)


def test_more_than_256_classes() -> None:
    p = noise((3, 3, 300))
    labels, confidence = enlarge(p, (13, 13), 4)
    i = axis_weights(13, 2, 4, 3)
    expected, best = naive.enlarge_labels(p, i.lower, i.weight, i.lower, i.weight)
    assert labels.dtype == np.uint16
    assert labels.max() > 255
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(confidence, best)


@settings(max_examples=60, deadline=None)
@given(
    corners=st.lists(st.integers(0, 3), min_size=2 * 2 * 5, max_size=2 * 2 * 5),
    apart=st.sampled_from([0.25, 2.0**-20, 2.0**-22, 2.0**-24]),
    base=st.sampled_from([0.0, 0.25]),
)
def test_ties_and_all_but_ties_equal_the_twin(corners, apart, base) -> None:
    """Classes that differ by less than the pruning margin, by it, and not at all."""
    p = (base + apart * np.array(corners).reshape(2, 2, 5)).astype(np.float32)
    i, j = axis_weights(7, 1, 5, 2), axis_weights(9, 1, 6, 2)
    labels, confidence = np.zeros((7, 9), np.uint8), np.zeros((7, 9), np.float32)
    run_kernel(p, i, j, labels, confidence)
    expected, best = naive.enlarge_labels(p, i.lower, i.weight, j.lower, j.weight)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(confidence, best)


def test_beaten_at_every_corner_by_different_classes_may_still_win() -> None:
    left, right = [0.6, 0.0, 0.4], [0.0, 0.6, 0.4]
    labels, confidence = enlarge(np.array([[left, right]], np.float32), (1, 9), 8, first=(0, 0))
    assert labels[0].tolist() == [0, 0, 0, 2, 2, 2, 1, 1, 1]
    np.testing.assert_allclose(confidence[0, 3:6], 0.4, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("blocks", [(1, 1), (1, 4), (5, 4)])
def test_one_class_equals_the_twin(layout, dtype, blocks) -> None:
    p = noise((*blocks, 3))[..., 1].copy()
    i, j = axis_weights(37, 3, 7, blocks[0]), axis_weights(30, 4, 7, blocks[1])
    values = LAYOUTS[layout]((37, 30), dtype)
    scratch = np.full(2 * blocks[1] + 30, np.nan, np.float32)
    enlarge_map(p, i.lower, i.weight, j.lower, j.weight, values, scratch)
    expected = naive.enlarge_map(p, i.lower, i.weight, j.lower, j.weight)
    expected = naive.quantised(expected) if dtype == np.uint8 else expected
    np.testing.assert_array_equal(values, expected)


def test_blend_and_weights_equal_the_twins() -> None:
    before, after = noise((3, 5, 7), 1), noise((3, 5, 7), 2)
    out = np.empty(105, np.float32)
    blend_slices(before.ravel(), after.ravel(), 0.3, out)
    np.testing.assert_array_equal(out.reshape(3, 5, 7), naive.blend_slices(before, after, 0.3))

    row_at, col_at = np.array([1.0, 4.0, 9.5]), np.arange(5) * 2.5 - 1
    sums, extremes = np.full((4, 7), np.nan), np.full((2, 7), np.nan, np.float32)
    weigh_slice(before, row_at, col_at, sums, extremes)
    np.testing.assert_allclose(sums[:3], naive.weigh_slice(before, row_at, col_at), rtol=1e-13)
    np.testing.assert_array_equal(extremes, [before.min((0, 1)), before.max((0, 1))])


# --- where the blocks lie -------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    n_out=st.integers(1, 60),
    first=st.integers(0, 20),
    stride=st.integers(1, 40),
    n_blocks=st.integers(1, 20),
    step=st.floats(0.2, 6),
    offset=st.floats(-3, 3),
)
def test_axis_weights_say_where_a_voxel_lies(n_out, first, stride, n_blocks, step, offset) -> None:
    weights = axis_weights(n_out, first, stride, n_blocks, step, offset)
    blocks = ((np.arange(n_out) - offset) / step - first) / stride
    found = weights.lower + weights.weight.astype(np.float64)
    np.testing.assert_allclose(found, np.clip(blocks, 0, n_blocks - 1), atol=1e-6)
    assert (weights.weight >= 0).all()
    assert (weights.weight < 1).all()
    assert (weights.weight[weights.lower == n_blocks - 1] == 0).all()  # no block after the last
    on_grid = (weights.centres - offset) / step
    np.testing.assert_allclose(on_grid, first + stride * np.arange(n_blocks), atol=1e-6)


@pytest.mark.parametrize(("stride", "n_blocks"), [(33, 16), (63, 8)])
def test_a_ramp_stays_where_it_is(stride, n_blocks) -> None:
    """The seed stretched the maps from corner to corner: every organ was moved."""
    centres = stride // 2 + stride * np.arange(n_blocks)
    ramp = np.clip(np.arange(512), centres[0], centres[-1]) / 511  # no pixel at exactly 1/2
    coarse = np.tile(centres / 511, (n_blocks, 1))
    p = np.stack([coarse, 1 - coarse], axis=-1).astype(np.float32)
    labels, confidence = enlarge(p, (512, 512), stride)
    expected = np.tile(np.maximum(ramp, 1 - ramp), (512, 1))
    np.testing.assert_allclose(confidence, expected, atol=1e-6)
    np.testing.assert_array_equal(labels, np.tile(ramp < 0.5, (512, 1)))
    seeds_way = ndimage.zoom(p[..., 0], 512 / n_blocks, order=1)
    assert abs(seeds_way[0] - ramp).max() > 0.02


def test_blocks_of_a_block_grid_are_reproduced_exactly() -> None:
    grid = BlockGrid((1, 50, 61), (1, 7, 5))
    p = noise((*grid.shape[1:], 5))
    labels, confidence = enlarge(p, (50, 61), (7, 5))
    at = np.ix_(*grid.centres[1:])
    np.testing.assert_array_equal(labels[at], p.argmax(2))
    np.testing.assert_array_equal(confidence[at], p.max(2))


def test_outside_the_hull_the_nearest_block_decides() -> None:
    p = noise((3, 4, 6))
    labels, confidence = enlarge(p, (40, 40), 4, first=(10, 12))
    hull = np.s_[10:19, 12:25]
    pad = ((10, 40 - 19), (12, 40 - 25))
    np.testing.assert_array_equal(labels, np.pad(labels[hull], pad, mode="edge"))
    np.testing.assert_array_equal(confidence, np.pad(confidence[hull], pad, mode="edge"))


# --- laws of the public door ----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_a_constant_map_enlarges_to_itself(weights, blocks) -> None:
    distribution = np.array(weights, np.float32)
    p = np.broadcast_to(distribution, (*blocks, len(weights)))
    labels, confidence = enlarge(p, (19, 23), (4, 5))
    np.testing.assert_array_equal(labels, distribution.argmax())
    np.testing.assert_array_equal(confidence, distribution.max())


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(11)), seed=st.integers(0, 99))
def test_permuting_classes_permutes_labels(order, seed) -> None:
    p = noise((4, 4, 11), seed)
    labels, confidence = enlarge(p, (21, 22), 5)
    permuted, same = enlarge(p[..., order], (21, 22), 5)
    np.testing.assert_array_equal(np.array(order)[permuted], labels)
    np.testing.assert_array_equal(same, confidence)


def test_probabilities_of_any_memory_order_stay_unchanged() -> None:
    p = noise((4, 6, 5))
    expected = enlarge(p, (20, 33), 5)
    for view in (np.asfortranarray(p), np.repeat(p, 2, axis=1)[:, ::2], p[::-1].copy()[::-1]):
        view.flags.writeable = False
        before = view.tobytes()
        for found, wanted in zip(enlarge(view, (20, 33), 5), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert view.tobytes() == before


def test_flips_and_transposes_follow_the_map() -> None:
    p = noise((5, 5, 4))
    labels, _ = enlarge(p, (25, 25), 5)
    np.testing.assert_array_equal(enlarge(p[::-1], (25, 25), 5)[0], labels[::-1])
    np.testing.assert_array_equal(enlarge(p[:, ::-1], (25, 25), 5)[0], labels[:, ::-1])
    np.testing.assert_array_equal(enlarge(p.swapaxes(0, 1), (25, 25), 5)[0], labels.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": np.zeros((4, 4, 3))}, "float32"),
        ({"probabilities": np.zeros((4, 4), np.float32)}, "shape"),
        ({"probabilities": np.zeros((4, 0, 3), np.float32)}, "non-empty"),
        ({"probabilities": np.full((4, 4, 3), np.nan, np.float32)}, "0..1"),
        ({"probabilities": np.full((4, 4, 3), 1.5, np.float32)}, "0..1"),
        ({"probabilities": np.full((4, 4, 3), -0.5, np.float32)}, "0..1"),
        ({"stride": 0}, "stride"),
        ({"stride": (1, 2, 3)}, "stride"),
        ({"stride": 6}, "20 rows"),
        ({"shape": (20, 12)}, "12 columns"),
        ({"shape": (20, 0)}, "shape"),
        ({"first": (-1, 0)}, "from -1"),
    ],
)
def test_what_does_not_fit_is_said(change, message) -> None:
    given_ = {"probabilities": np.zeros((4, 4, 3), np.float32), "shape": (20, 20), "stride": 5}
    with pytest.raises(ValueError, match=message):
        enlarge(**{**given_, **change})


# --- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_workers_keep_the_order_and_stay_near(threads) -> None:
    started: list[int] = []

    def work(n: int) -> int:
        started.append(n)
        return n

    with Workers(threads) as workers:
        for n, result in enumerate(workers.in_order(work, range(50))):
            assert result == n
            assert max(started) <= n + workers.window
    with pytest.raises(ValueError, match="threads"):
        Workers(0)


def test_a_failure_in_a_worker_reaches_the_consumer() -> None:
    def work(n: int) -> int:
        if n == 3:
            raise OSError("broken")
        return n

    with Workers(2) as workers, pytest.raises(OSError, match="broken"):
        list(workers.in_order(work, range(10)))


# --- slabs and volumes ----------------------------------------------------------------------------


class HuClassifier:
    """Reads the HU at a position and its right neighbour's; remembers which threads asked."""

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes
        self.asked: list[int] = []
        self.threads: set[int] = set()

    def probabilities(self, slab, positions, out) -> None:
        self.asked.append(len(positions))
        self.threads.add(threading.get_ident())
        k, i, j = positions.T
        hu = slab[0, k, i, j].astype(np.float64) + slab[-1, k, i, j + 1]
        logits = np.cos(hu[:, None] * (1 + np.arange(self.n_classes)) / 300)
        weights = np.exp(4 * logits)
        out[:] = weights / weights.sum(1, keepdims=True)


def scan(shape=(9, 40, 44), seed=0) -> Volume:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), (1, 3, 3))
    hu = (smooth / smooth.std() * 200).astype(np.int16)
    return Volume(hu.transpose(2, 1, 0), np.diag([1.0, 1.0, 3.0, 1.0]))


CASES = {
    "native": (ModelGrid(), (1, 4, 4)),
    "native, slices left out": (ModelGrid(), (3, 5, 4)),
    "working grid": (ModelGrid((1.7, 1.3, 2.0)), (2, 3, 4)),
    "one position": (ModelGrid(), (50, 90, 90)),
}


def set_up(case: str):
    volume = scan()
    grid, stride = CASES[case]
    grid_volume = to_model_grid(volume, grid)
    block_grid = BlockGrid(grid_volume.shape, stride)
    enlargement = Enlargement.to_scan(block_grid, grid_volume, volume.working.shape)
    return grid_volume, block_grid, enlargement


def slabs_of(grid_volume, classifier, pattern, block_grid, mask, workers):
    slices = SliceClassifier(grid_volume, classifier, pattern, block_grid, workers)
    return probability_slabs(slices, mask, workers)


def naive_label_volume(coarse, enlargement):
    labels = np.zeros(enlargement.shape, np.uint8)
    best = np.zeros(enlargement.shape, np.float32)
    i, j = enlargement.i, enlargement.j
    for k, (n, weight) in enumerate(zip(enlargement.k.lower, enlargement.k.weight, strict=True)):
        after = min(n + 1, len(coarse) - 1)
        slab = naive.blend_slices(coarse[n], coarse[after], weight)
        labels[k], best[k] = naive.enlarge_labels(slab, i.lower, i.weight, j.lower, j.weight)
    return labels, best


@pytest.mark.parametrize("case", CASES)
def test_a_volume_equals_the_twin_for_any_number_of_threads(case) -> None:
    grid_volume, block_grid, enlargement = set_up(case)
    pattern, classifier = Block(3), HuClassifier(4)
    with Workers(1) as workers:
        slabs = list(slabs_of(grid_volume, classifier, pattern, block_grid, None, workers))
    assert [n for n, _ in slabs] == list(range(block_grid.shape[0]))
    coarse = np.stack([p for _, p in slabs])
    assert coarse.shape == (*block_grid.shape, 4)
    expected, best = naive_label_volume(coarse, enlargement)

    found = []
    for threads in (1, 2, 7):
        stored = np.zeros(enlargement.shape[::-1], np.uint8)  # (x, y, z), right to left
        labels = stored.transpose()[:, :, ::-1]
        confidence = np.zeros(enlargement.shape, np.uint8)
        with Workers(threads) as workers:
            evidence = label_volume(
                slabs_of(grid_volume, classifier, pattern, block_grid, None, workers),
                enlargement,
                labels,
                workers,
                confidence=confidence,
                keep=(2, 1),
            )
            out = np.zeros(enlargement.shape, np.uint8, order="F")
            organ_map(evidence.maps[1], enlargement, out, workers)
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_array_equal(confidence, naive.quantised(best))
        np.testing.assert_array_equal(evidence.maps[2], coarse[..., 2])
        np.testing.assert_array_equal(out[labels == 1], confidence[labels == 1])
        found.append((evidence.weight, evidence.position, evidence.peak, out))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)

    weight, position, peak, _ = found[0]
    squared = coarse.astype(np.float64) ** 2
    at = np.meshgrid(
        *(
            o + s * c
            for o, s, c in zip(
                grid_volume.offset, grid_volume.step, block_grid.centres, strict=True
            )
        ),
        indexing="ij",
    )
    np.testing.assert_allclose(weight, squared.sum((0, 1, 2)), rtol=1e-12)
    for axis in range(3):
        mean = (squared * at[axis][..., None]).sum((0, 1, 2)) / weight
        np.testing.assert_allclose(position[:, axis], mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(peak, coarse.max((0, 1, 2)))


def test_organ_map_equals_the_twin() -> None:
    _, block_grid, enlargement = set_up("working grid")
    coarse = noise((*block_grid.shape, 3))[..., 0]
    out = np.zeros(enlargement.shape, np.uint8)
    with Workers(2) as workers:
        organ_map(coarse, enlargement, out, workers)
    i, j = enlargement.i, enlargement.j
    for k, (n, weight) in enumerate(zip(enlargement.k.lower, enlargement.k.weight, strict=True)):
        plane = naive.blend_slices(coarse[n], coarse[min(n + 1, len(coarse) - 1)], weight)
        expected = naive.enlarge_map(plane, i.lower, i.weight, j.lower, j.weight)
        np.testing.assert_array_equal(out[k], naive.quantised(expected))


def test_outside_the_body_is_background_and_not_visited() -> None:
    grid_volume, block_grid, _ = set_up("native")
    mask = np.random.default_rng(1).random(block_grid.shape) < 0.4
    mask[3] = False
    mask[4] = True
    pattern = Block(3)
    with Workers(3) as workers:
        everywhere = np.stack(
            [
                p
                for _, p in slabs_of(
                    grid_volume, HuClassifier(5), pattern, block_grid, None, workers
                )
            ]
        )
        classifier = HuClassifier(5)
        masked = np.stack(
            [p for _, p in slabs_of(grid_volume, classifier, pattern, block_grid, mask, workers)]
        )
    np.testing.assert_array_equal(masked[mask], everywhere[mask])
    np.testing.assert_array_equal(masked[~mask], np.eye(5, dtype=np.float32)[[0] * (~mask).sum()])
    assert sorted(classifier.asked) == sorted(int(m.sum()) for m in mask if m.any())


def test_a_class_that_never_occurs_has_no_position() -> None:
    grid_volume, block_grid, enlargement = set_up("one position")
    labels = np.full(enlargement.shape, 9, np.uint16)
    mask = np.zeros(block_grid.shape, bool)
    with Workers(1) as workers:
        slabs = slabs_of(grid_volume, HuClassifier(3), Block(3), block_grid, mask, workers)
        evidence = label_volume(slabs, enlargement, labels, workers)
    np.testing.assert_array_equal(labels, 0)
    np.testing.assert_array_equal(evidence.weight, [1, 0, 0])
    assert np.isnan(evidence.position[1:]).all()
    assert evidence.position[0].tolist() == [4, 19, 21]  # the middle voxel of 9 x 40 x 44


def test_slabs_and_outputs_that_do_not_fit_are_refused() -> None:
    grid_volume, block_grid, enlargement = set_up("native")
    n_k, n_i, n_j = block_grid.shape
    slab = noise((n_i, n_j, 3))
    slabs = [(n, slab) for n in range(n_k)]
    labels = np.zeros(enlargement.shape, np.uint8)
    read_only = labels.copy()
    read_only.flags.writeable = False
    not_a_number = slab.copy()
    not_a_number[2, 3, 1] = np.nan
    cases = [
        (slabs[:-1], labels, "were due"),
        (slabs[::-1], labels, "was due"),
        ([*slabs, (n_k, slab)], labels, "was due"),
        ([(0, slab[1:])], labels, "positions"),
        ([(0, slab.astype(np.float64))], labels, "float32"),
        ([(0, np.asfortranarray(slab))], labels, "contiguous"),
        ([(0, noise((n_i, n_j, 257)))], labels, "uint16"),
        ([*slabs[:-1], (n_k - 1, not_a_number)], labels, "0..1"),
        ([*slabs[:-1], (n_k - 1, 2 * slab)], labels, "0..1"),
        (slabs, labels[1:], "shape"),
        (slabs, labels.astype(np.int32), "uint8 or uint16"),
        (slabs, read_only, "read-only"),
    ]
    with Workers(1) as workers:
        for given_slabs, output, message in cases:
            with pytest.raises(ValueError, match=message):
                label_volume(given_slabs, enlargement, output, workers)
        with pytest.raises(ValueError, match="keep"):
            label_volume(slabs, enlargement, labels, workers, keep=(3,))
        with pytest.raises(ValueError, match="confidence"):
            label_volume(slabs, enlargement, labels, workers, confidence=labels[1:])
        with pytest.raises(ValueError, match="coarse"):
            organ_map(slab, enlargement, labels, workers)
        other, mask = BlockGrid((1, 2, 3), (1, 1, 1)), np.ones((1, 1, 1), bool)
        with pytest.raises(ValueError, match="block grid"):
            slabs_of(grid_volume, HuClassifier(3), Block(3), other, None, workers)
        with pytest.raises(ValueError, match="body_mask"):
            slabs_of(grid_volume, HuClassifier(3), Block(3), block_grid, mask, workers)


def test_classes_times_volume_is_never_held() -> None:
    shape, n_classes = (60, 96, 96), 50
    block_grid = BlockGrid(shape, (1, 4, 4))
    enlargement = Enlargement.to_scan(block_grid, GridVolume(np.zeros(shape, np.int16)), shape)
    labels = np.zeros(shape, np.uint8)
    slab = noise((24, 24, n_classes))
    with Workers(2) as workers:
        tracemalloc.start()
        slabs = ((n, slab.copy()) for n in range(shape[0]))
        label_volume(slabs, enlargement, labels, workers)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 * slab.nbytes  # of 60, and of 960 enlarged
