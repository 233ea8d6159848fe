"""Forests: against the slow twin and scikit-learn, over memory orders, and the laws."""

from __future__ import annotations

import copy
import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast.blocks import Block
from organfast.kernels.forest import CHUNK, PATHS, label_forest, walk_forest
from organfast.models import forest as module
from organfast.models.forest import NODE, Forest, ForestSettings, kernel_path, train_forest

N_CLASSES = 7
SEEN = (0, 2, 3, 6)  # labels with samples
EDGES = (-32768, -1024, 0, 32767)

# Two levels, three slices, nothing regular: what a pattern may be.
SCATTERED = SimpleNamespace(
    offsets=np.array(
        [(0, 0, 0, 0), (0, -1, 2, -3), (0, 1, -2, 3), (1, 0, 5, 0), (1, -1, 0, -4), (0, 0, 1, 1)]
        + [(level, 0, i, j) for level in (0, 1) for i in (-4, -1, 3) for j in (-5, 0, 4)],
        np.int32,
    ),
    n_features=24,
    reach=(1, 5, 5),
    widths=(1, 3),
)
PATTERNS = {"block": Block(9), "block 3-D": Block(5, (1, 3), 3), "scattered": SCATTERED}


def hu(shape, seed: int = 0) -> NDArray[np.int16]:
    """Voxels with few and with extreme values, so that thresholds are met exactly."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-40, 40, shape, np.int16) * 25
    values[rng.random(shape) < 0.02] = rng.choice(EDGES)
    return values


def _packed(slab):
    """A field of records of 5 bytes: strides and addresses that are odd."""
    records = np.zeros(slab.shape, np.dtype({"names": ["x", "hu"], "formats": ["3u1", "<i2"]}))
    records["hu"] = slab
    return records["hu"]


def _strided(slab):
    wide = np.zeros([2 * n for n in slab.shape], np.int16)
    wide[::2, 1::2, ::2, 1::2] = slab
    return wide[::2, 1::2, ::2, 1::2]


def _read_only(slab):
    view = slab.copy()
    view.flags.writeable = False
    return view


LAYOUTS = {
    "C": lambda slab: slab.copy(),
    "F": lambda slab: slab.copy(order="F"),
    "flipped": lambda slab: slab[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "flipped F": lambda slab: slab[:, :, ::-1].copy(order="F")[:, :, ::-1],
    "slices fastest": lambda slab: slab.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
    "strided": _strided,
    "packed": _packed,
    "read-only": _read_only,
}


def features_of(slab, pattern, positions):
    k, i, j = (positions[:, None, :] + pattern.offsets[None, :, 1:]).transpose(2, 0, 1)
    return slab[pattern.offsets[:, 0], k, i, j].astype(np.float32)


def places(slab, pattern, n: int, seed: int = 0) -> NDArray[np.int32]:
    """Random positions whose pattern lies in the slab, the outermost ones first."""
    low = np.array(pattern.reach)
    high = np.array(slab.shape[1:]) - low
    found = np.random.default_rng(seed).integers(low, high, (n, 3))
    corners = np.array([low, high - 1])[:n]
    found[: len(corners)] = corners
    return found.astype(np.int32)


def room(pattern, seed: int = 0):
    pk, pr, pc = pattern.reach
    return hu((len(pattern.widths), 4 + 2 * pk, 20 + 2 * pr, 30 + 2 * pc), seed)


@cache
def estimator(name: str, kind: str = "random_forest", **limits):
    """scikit-learn's forest on labels that depend on the voxels, with some noise."""
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

    pattern, slab = PATTERNS[name], room(PATTERNS[name], seed=1)
    positions = places(slab, pattern, 500, seed=2)
    x = features_of(slab, pattern, positions)
    rng = np.random.default_rng(3)
    level = x[:, 0] + x[:, 1] / 2 + rng.normal(0, 200, len(x))
    labels = np.array(SEEN)[np.digitize(level, (-500, 0, 500))]
    made = RandomForestClassifier if kind == "random_forest" else ExtraTreesClassifier
    return made(12, random_state=0, n_jobs=1, **limits).fit(x, labels)


def expected(model, slab, pattern, positions):
    out = np.zeros((len(positions), N_CLASSES))
    if len(positions):
        out[:, model.classes_] = model.predict_proba(features_of(slab, pattern, positions))
    return out


def asked(forest: Forest, slab, positions, dtype=np.float64):
    out = np.full((len(positions), forest.n_classes), np.nan, dtype)
    forest.probabilities(slab, positions, out)
    return out


def labelled(forest: Forest, slab, positions):
    out = np.full(len(positions), 65_535, np.uint16)
    n_walks = forest.labels(slab, positions, out)
    return out, n_walks


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every path that this machine has, one after the other."""
    monkeypatch.setenv("ORGANFAST_KERNELS", request.param)
    return request.param


@pytest.fixture(params=["slab read", "features copied first"])
def staging(request, monkeypatch):
    """Whether the walk reads the slab itself or a copy of what each position reads."""
    is_copied = request.param == "features copied first"
    monkeypatch.setattr(module, "_CACHE_BYTES", -1 if is_copied else 1 << 62)
    monkeypatch.setattr(Forest, "_n_visits", np.inf)
    return request.param


# --- equal to scikit-learn, and to the twin -------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PATTERNS)
def test_probabilities_equal_scikit_learn_in_every_memory_order(
    name: str, layout: str, path: str, staging: str
) -> None:
    pattern, model = PATTERNS[name], estimator(name)
    forest = Forest.from_sklearn(model, pattern, N_CLASSES)
    plain = room(pattern)
    slab, before = LAYOUTS[layout](plain), plain.copy()
    positions = places(slab, pattern, 700)
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(found, expected(model, plain, pattern, positions))
    np.testing.assert_array_equal(labelled(forest, slab, positions)[0], found.argmax(axis=1))
    np.testing.assert_array_equal(slab, before)


@pytest.mark.parametrize("n", [*range(20), 31, 32, 33, 255, 1000, CHUNK, CHUNK + 1, CHUNK + 40])
def test_any_number_of_positions(n: int, path: str) -> None:
    pattern, model = PATTERNS["scattered"], estimator("scattered")
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, n)
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(found, expected(model, slab, pattern, positions))


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("extra_trees", {}),
        ("random_forest", {"min_samples_leaf": 7}),  # leaves of several classes
        ("random_forest", {"max_depth": 3}),
        ("extra_trees", {"max_depth": 1}),
        ("random_forest", {"max_leaf_nodes": 20}),  # scikit-learn numbers these best first
        ("random_forest", {"class_weight": "balanced", "min_samples_leaf": 3}),
        ("random_forest", {"min_samples_leaf": 400}),  # roots only
    ],
)
def test_every_kind_of_forest(kind: str, limits) -> None:
    pattern, model = PATTERNS["block"], estimator("block", kind, **limits)
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 700)
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(found, expected(model, slab, pattern, positions))


@pytest.mark.parametrize("n_trees", [1, 5, 12])
@pytest.mark.parametrize("limits", [{}, {"min_samples_leaf": 9}])
def test_the_first_trees_are_scikit_learn_s_first_estimators(n_trees: int, limits) -> None:
    pattern, model = PATTERNS["scattered"], estimator("scattered", **limits)
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 700)
    part = copy.copy(model)
    part.estimators_, part.n_estimators = model.estimators_[:n_trees], n_trees
    first = forest.first(n_trees)
    assert first.n_trees == n_trees
    found = asked(first, slab, positions)
    np.testing.assert_array_equal(found, expected(part, slab, pattern, positions))
    np.testing.assert_array_equal(labelled(first, slab, positions)[0], found.argmax(axis=1))
    assert np.shares_memory(first.nodes, forest.nodes)
    for wrong in (0, 13, 2.5):
        with pytest.raises(ValueError, match="the forest has 1 to 12 to give"):
            forest.first(wrong)


def test_neighbours_in_one_row_and_one_position_repeated(path: str) -> None:
    pattern, model = PATTERNS["block"], estimator("block")
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    row = np.stack([np.full(30, 1), np.full(30, 9), np.arange(4, 34)], axis=1).astype(np.int32)
    for positions in (row, row[::-1], np.repeat(row[:1], 300, axis=0), np.tile(row, (20, 1))):
        found = asked(forest, slab, positions)
        np.testing.assert_array_equal(found, expected(model, slab, pattern, positions))


@pytest.mark.parametrize("size", [1, 17, 97])
def test_block_sizes(size: int) -> None:
    """97 x 97 is 9409 features; a block of one voxel has a single one."""
    from sklearn.ensemble import RandomForestClassifier

    pattern, slab = Block(size), hu((1, 1, size + 6, size + 9))
    positions = places(slab, pattern, 60)
    x = features_of(slab, pattern, positions)
    labels = np.random.default_rng(0).integers(0, N_CLASSES, len(x))
    model = RandomForestClassifier(5, random_state=0).fit(x, labels)
    forest = Forest.from_sklearn(model, pattern, N_CLASSES)
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(found, expected(model, slab, pattern, positions))


@st.composite
def trees(draw):
    """Any trees at all: lone roots, chains, thresholds at the ends of int16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_rows, thresholds = draw(st.integers(0, 3)), [*EDGES, -100, -25, 25, 100]
    nodes, starts = [], [0]
    for _ in range(draw(st.integers(1, 4))):
        n_inner = draw(st.sampled_from([0, 1, 2, 5, 40]))
        chain = draw(st.booleans())
        tree = np.zeros(2 * n_inner + 1, NODE)
        tree["left"] = ~rng.integers(0, N_CLASSES + n_rows, len(tree))
        leaves = [0]
        for left in range(1, len(tree), 2):
            parent = leaves.pop(-1 if chain else rng.integers(len(leaves)))
            tree[parent] = (rng.choice(thresholds), rng.integers(SCATTERED.n_features), left)
            leaves += [left, left + 1]
        nodes.append(tree)
        starts.append(starts[-1] + len(tree))
    table = rng.dirichlet(np.ones(N_CLASSES), n_rows).reshape(n_rows, N_CLASSES)
    starts = np.array(starts, np.int64)
    return Forest(np.concatenate(nodes), starts, table, SCATTERED.offsets, N_CLASSES)


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 90), st.integers(0, 2**32 - 1))
def test_kernel_equals_twin_on_any_trees(forest: Forest, n: int, seed: int) -> None:
    slab = room(SCATTERED, seed)
    positions = places(slab, SCATTERED, n, seed)
    twin = naive.walk_forest(
        forest.nodes, forest.tree_starts, forest.leaf_table, slab, forest.offsets, positions
    )
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(found, twin)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_together", [1, 3, 64, CHUNK])
def test_kernels_walk_any_number_together(n_together: int) -> None:
    pattern, model = PATTERNS["block"], estimator("block", min_samples_leaf=7)
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 130)
    arguments = forest._walk(slab, positions) | {
        "sums": np.empty((n_together, N_CLASSES)),
        "path": 0,
    }
    arrays = (forest.nodes, forest.tree_starts, forest.leaf_table)
    out, labels = np.empty((130, N_CLASSES)), np.empty((130, 2), np.uint16)[:, 1]
    walk_forest(**arguments, out=out)
    np.testing.assert_array_equal(out, naive.walk_forest(*arrays, slab, forest.offsets, positions))
    label_forest(**arguments, out=labels, n_between=1)
    np.testing.assert_array_equal(
        labels, naive.label_forest(*arrays, slab, forest.offsets, positions)
    )


# --- the two walks, on every path -----------------------------------------------------------------


def wide_case():
    """A forest on a slice so wide that rows of it are too far apart to be walked as one set."""
    pattern, model = PATTERNS["block"], estimator("block")
    slab = np.zeros((1, 1, 60, 70_000), np.int16)
    slab[:] = hu(slab.shape[2:], 11)
    return pattern, model, Forest.from_sklearn(model, pattern, N_CLASSES), slab


def test_positions_near_and_far_from_each_other(path: str, staging: str) -> None:
    pattern, model, forest, slab = wide_case()
    rng = np.random.default_rng(0)
    n = 4000
    scattered = np.stack(
        [np.zeros(n, int), rng.integers(4, 56, n), rng.integers(4, 69_996, n)], axis=1
    )
    row = np.stack([np.zeros(n, int), np.full(n, 30), np.arange(4, n + 4)], axis=1)
    mixed = np.concatenate([row[:1500], scattered[:300], row[1500:1540], scattered[300:310]])
    for positions in (scattered, row, row[::-1], mixed, row[::16], scattered[:1]):
        positions = positions.astype(np.int32)
        found = asked(forest, slab, positions)
        np.testing.assert_array_equal(found, expected(model, slab, pattern, positions))
        np.testing.assert_array_equal(labelled(forest, slab, positions)[0], found.argmax(axis=1))


@pytest.mark.parametrize("share", [0.02, 0.4, 0.97, 0.999, 1.0])
def test_rows_with_gaps(share: float, path: str, staging: str) -> None:
    """Blocks of neighbours that are full, in part, or nearly empty, and more than a chunk holds."""
    pattern, model = PATTERNS["block"], estimator("block", min_samples_leaf=7)
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), hu((1, 1, 70, 210), 4)
    inside = np.argwhere(np.random.default_rng(5).random((62, 202)) < share) + 4
    positions = np.insert(inside, 0, 0, axis=1).astype(np.int32)
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(found, expected(model, slab, pattern, positions))
    np.testing.assert_array_equal(labelled(forest, slab, positions)[0], found.argmax(axis=1))


def test_rows_that_share_their_memory(path: str, staging: str) -> None:
    """As the windows of levels do: what is beyond one row's end is the next one's beginning."""
    pattern, model = PATTERNS["block 3-D"], estimator("block 3-D")
    forest, memory = Forest.from_sklearn(model, pattern, N_CLASSES), hu(20_000, 3)
    steps = np.array([3001, 700, 31, 1]) * 2
    slab = np.lib.stride_tricks.as_strided(memory, (2, 6, 20, 40), steps, writeable=False)
    positions = places(slab, pattern, 600)
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(found, expected(model, slab, pattern, positions))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_is_read_beside_the_slab(
    at_end: bool, flipped: bool, path: str, staging: str
) -> None:
    """The slab fills the page between two that must not be touched: to read there ends the run."""
    page, (pattern, model) = mmap.PAGESIZE, (PATTERNS["block"], estimator("block"))
    forest, memory = Forest.from_sklearn(model, pattern, N_CLASSES), mmap.mmap(-1, 3 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for edge in (start, start + 2 * page):
        assert protect(edge, page, 0) == 0
    shape = (1, 1, 35, page // 2 // 35)
    n = shape[2] * shape[3]
    offset = page + (page - 2 * n if at_end else 0)
    slab = np.frombuffer(memory, np.int16, n, offset).reshape(shape)
    slab[:] = hu(shape, 12)
    if flipped:
        slab = slab[:, :, ::-1, ::-1]
    rows, columns = np.meshgrid(np.arange(4, 31), np.arange(4, shape[3] - 4), indexing="ij")
    positions = np.stack([0 * rows, rows, columns], axis=-1).reshape(-1, 3).astype(np.int32)
    for some in (positions, positions[:20], positions[-20:], positions[-1:]):
        found = asked(forest, slab, some)
        np.testing.assert_array_equal(found, expected(model, slab, pattern, some))


def test_the_path_is_told_and_forced(monkeypatch) -> None:
    monkeypatch.delenv("ORGANFAST_KERNELS", raising=False)
    assert kernel_path() == PATHS[-1]
    for name in PATHS:
        monkeypatch.setenv("ORGANFAST_KERNELS", name)
        assert kernel_path() == name
    monkeypatch.setenv("ORGANFAST_KERNELS", "sse9")
    pattern = PATTERNS["block"]
    forest, slab = Forest.from_sklearn(estimator("block"), pattern, N_CLASSES), room(pattern)
    for call in (asked, labelled):
        with pytest.raises(
            ValueError, match="ORGANFAST_KERNELS is 'sse9'; this machine has scalar"
        ):
            call(forest, slab, places(slab, pattern, 3))


# --- labels, and leaving early --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 90), st.integers(0, 2**32 - 1))
def test_labels_equal_the_twin_on_any_trees(forest: Forest, n: int, seed: int) -> None:
    """Few trees and classes: ties abound."""
    slab = room(SCATTERED, seed)
    positions = places(slab, SCATTERED, n, seed)
    arrays = (forest.nodes, forest.tree_starts, forest.leaf_table)
    twin = naive.label_forest(*arrays, slab, forest.offsets, positions)
    np.testing.assert_array_equal(labelled(forest, slab, positions)[0], twin)


def voting(shares) -> tuple[Forest, NDArray[np.int16], NDArray[np.int32]]:
    """Trees of one leaf each: their shares, whatever is read."""
    shares = np.asarray(shares, np.float64)
    nodes = np.zeros(len(shares), NODE)
    nodes["left"] = ~(shares.shape[1] + np.arange(len(shares)))
    pure = (shares == 1).any(axis=1)
    nodes["left"][pure] = ~shares[pure].argmax(axis=1)
    starts, offsets = np.arange(len(shares) + 1), np.zeros((1, 4), np.int32)
    forest = Forest(nodes, starts, shares, offsets, shares.shape[1])
    return forest, np.zeros((1, 1, 1, 40), np.int16), np.zeros((40, 3), np.int32)


@pytest.mark.parametrize("n_trees", [1, 2, 3, 16, 17, 50, 100])
def test_ties_go_to_the_lowest_class_and_late_votes_count(
    n_trees: int, path: str, staging: str
) -> None:
    one, two = np.eye(3)[1], np.eye(3)[2]
    for n_two in range(n_trees + 1):
        for votes in (
            [two] * n_two + [one] * (n_trees - n_two),
            [one] * n_two + [two] * (n_trees - n_two),
        ):
            forest, slab, positions = voting(votes)
            found, n_walks = labelled(forest, slab, positions)
            np.testing.assert_array_equal(found, asked(forest, slab, positions).argmax(axis=1))
            assert n_walks <= 40 * n_trees


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([1, 3, 7, 10]))
def test_labels_of_mixed_leaves_that_round_alike(seed: int, n_trees: int, parts: int) -> None:
    """Shares in tenths and the like: sums that differ by their rounding alone, or not at all."""
    rng = np.random.default_rng(seed)
    shares = rng.multinomial(parts, np.ones(4) / 4, n_trees) / parts
    forest, slab, positions = voting(shares)
    found = labelled(forest, slab, positions)[0]
    np.testing.assert_array_equal(found, asked(forest, slab, positions).argmax(axis=1))


def test_unanimous_positions_leave_after_half_the_trees(staging: str) -> None:
    for n_trees, n_needed in ((1, 1), (2, 2), (3, 3), (16, 16), (40, 21), (100, 51), (101, 51)):
        forest, slab, positions = voting([np.eye(3)[2]] * n_trees)
        found, n_walks = labelled(forest, slab, positions)
        np.testing.assert_array_equal(found, 2)
        assert n_walks == 40 * n_needed


# --- laws -----------------------------------------------------------------------------------------


def test_permuting_labels_permutes_results() -> None:
    pattern, model = PATTERNS["block"], estimator("block", min_samples_leaf=7)
    slab = room(pattern)
    positions = places(slab, pattern, 200)
    found = asked(Forest.from_sklearn(model, pattern, N_CLASSES), slab, positions)
    order = np.random.default_rng(0).permutation(N_CLASSES)
    renamed = copy.copy(model)
    renamed.classes_ = order[model.classes_]
    permuted = asked(Forest.from_sklearn(renamed, pattern, N_CLASSES), slab, positions)
    np.testing.assert_array_equal(permuted[:, order], found)


def test_classes_without_samples_have_probability_zero() -> None:
    pattern, model = PATTERNS["block"], estimator("block", max_depth=3)
    slab = room(pattern)
    found = asked(Forest.from_sklearn(model, pattern, 300), slab, places(slab, pattern, 99))
    np.testing.assert_array_equal(found[:, sorted(set(range(300)) - set(SEEN))], 0)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-12)


def test_moving_slab_and_positions_together_changes_nothing() -> None:
    pattern, model = PATTERNS["block"], estimator("block")
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 200)
    wider = np.pad(slab, ((0, 2), (1, 3), (5, 0), (2, 7)), constant_values=77)
    moved = (positions + np.array([1, 5, 2])).astype(np.int32)
    np.testing.assert_array_equal(asked(forest, wider, moved), asked(forest, slab, positions))


def test_float32_is_float64_rounded_and_out_may_be_strided() -> None:
    pattern, model = PATTERNS["block"], estimator("block", min_samples_leaf=7)
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 200)
    found = asked(forest, slab, positions)
    np.testing.assert_array_equal(
        asked(forest, slab, positions, np.float32), found.astype(np.float32)
    )
    wide = np.full((N_CLASSES, 400), np.nan, np.float32)
    forest.probabilities(slab, positions[::-1], wide.T[::2])
    np.testing.assert_array_equal(wide.T[::2], found[::-1].astype(np.float32))
    assert np.isnan(wide.T[1::2]).all()


def test_one_forest_from_several_threads_at_once() -> None:
    pattern, model = PATTERNS["block 3-D"], estimator("block 3-D")
    forest = Forest.from_sklearn(model, pattern, N_CLASSES)
    slabs = [room(pattern, seed) for seed in range(8)]
    positions = places(slabs[0], pattern, 3000)
    alone = [asked(forest, slab, positions) for slab in slabs]
    with ThreadPoolExecutor(7) as pool:
        together = list(pool.map(lambda slab: asked(forest, slab, positions), slabs * 3))
    for n, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[n % 8])


@given(
    st.one_of(
        st.floats(-32768, 40000),
        st.integers(-32768, 32767).map(float),
        st.integers(-65536, 65535).map(lambda n: n / 2),
    ).filter(lambda t: t >= -32768),
    st.integers(-32768, 32767),
)
@settings(max_examples=200, deadline=None)
def test_integer_thresholds_part_voxels_as_float_ones(threshold: float, voxel: int) -> None:
    from organfast.models.forest import _integer_thresholds

    (whole,) = _integer_thresholds(np.array([threshold]))
    for x in {voxel, int(np.clip(np.floor(threshold), -32768, 32767)), -32768, 32767}:
        # As scikit-learn compares: a Python float would be rounded to float32 first.
        assert (x <= whole) == (np.float32(x) <= np.float64(threshold))


# --- merged labels --------------------------------------------------------------------------------

MERGE = np.array([1, 0, 0, 2, 0, 0, 1])  # labels 0 and 6 are of one class, as are 2, 1, 4, 5


@pytest.mark.parametrize("limits", [{}, {"min_samples_leaf": 7}, {"max_depth": 2}])
def test_shares_of_merged_labels_are_summed(limits) -> None:
    pattern, model = PATTERNS["block"], estimator("block", **limits)
    slab = room(pattern)
    positions = places(slab, pattern, 700)
    fine = asked(Forest.from_sklearn(model, pattern, N_CLASSES), slab, positions)
    forest = Forest.from_sklearn(model, pattern, 4, MERGE)
    found = asked(forest, slab, positions)
    summed = np.stack([fine[:, c == MERGE].sum(axis=1) for c in range(4)], axis=1)
    np.testing.assert_allclose(found, summed, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(
        found,
        naive.walk_forest(
            forest.nodes, forest.tree_starts, forest.leaf_table, slab, forest.offsets, positions
        ),
    )


def test_leaves_whose_labels_are_of_one_class_are_pure() -> None:
    model = estimator("block", min_samples_leaf=7)
    alike = Forest.from_sklearn(model, PATTERNS["block"], 3, np.full(N_CLASSES, 2))
    assert len(alike.leaf_table) == 0
    assert set(alike.nodes["left"][alike.nodes["left"] < 0]) == {~2}
    mixed = Forest.from_sklearn(model, PATTERNS["block"], N_CLASSES)
    same = Forest.from_sklearn(model, PATTERNS["block"], N_CLASSES, np.arange(N_CLASSES))
    for name, array in mixed.arrays().items():
        np.testing.assert_array_equal(same.arrays()[name], array)
    partly = Forest.from_sklearn(model, PATTERNS["block"], 4, MERGE)
    assert 0 < len(partly.leaf_table) < len(mixed.leaf_table)
    assert (np.count_nonzero(partly.leaf_table, axis=1) > 1).all()


def test_training_with_merged_labels() -> None:
    x, y = samples()
    chosen = ForestSettings(n_trees=5, min_samples_leaf=4)
    forest = train_forest(x, y, chosen, PATTERNS["block"], 4, MERGE)
    fine = train_forest(x, y, chosen, PATTERNS["block"], N_CLASSES)
    slab = room(PATTERNS["block"])
    positions = places(slab, PATTERNS["block"], 300)
    summed = np.zeros((300, 4))
    np.add.at(summed.T, MERGE, asked(fine, slab, positions).T)
    np.testing.assert_allclose(asked(forest, slab, positions), summed, rtol=0, atol=1e-14)


def test_a_merge_that_does_not_fit_is_refused() -> None:
    x, y = samples(20)
    pattern, chosen = PATTERNS["block"], ForestSettings(n_trees=1)
    for merge, n_classes, message in (
        (MERGE, 2, "classes 0 to 2; give 0 to 1"),
        (MERGE - 1, 4, "classes -1 to 1"),
        (MERGE[:3], 4, "from 0 to 2"),
        (MERGE[:0], 4, r"\(0,\) int64"),
        (MERGE[None], 4, r"\(1, 7\) int64"),
        (MERGE.astype(float), 4, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            train_forest(x, y, chosen, pattern, n_classes, merge)
    with pytest.raises(ValueError, match="labels up to 6, not 3"):
        Forest.from_sklearn(estimator("block"), pattern, 4, MERGE[:3])


# --- training -------------------------------------------------------------------------------------


def samples(n: int = 300):
    pattern = PATTERNS["block"]
    slab = room(pattern, seed=5)
    positions = places(slab, pattern, n, seed=6)
    labels = np.random.default_rng(7).choice(SEEN, n)
    return features_of(slab, pattern, positions), labels


@pytest.mark.parametrize("kind", ["random_forest", "extra_trees"])
def test_training_does_not_depend_on_threads_nor_on_steps(kind: str) -> None:
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

    x, y = samples()
    chosen = ForestSettings(kind, n_trees=23, seed=4)
    steps: list[tuple[str, int, int]] = []
    forests = [
        train_forest(x, y, chosen, PATTERNS["block"], N_CLASSES, threads=threads, progress=report)
        for threads, report in ((1, None), (2, lambda *step: steps.append(step)), (7, None))
    ]
    at_once = {"random_forest": RandomForestClassifier, "extra_trees": ExtraTreesClassifier}[kind]
    model = at_once(23, random_state=4).fit(x, y)
    forests.append(Forest.from_sklearn(model, PATTERNS["block"], N_CLASSES))
    for forest in forests[1:]:
        for name, array in forest.arrays().items():
            np.testing.assert_array_equal(array, forests[0].arrays()[name])
    assert [done for _, done, _ in steps] == [0, 10, 20, 23]
    assert {total for _, _, total in steps} == {23}


def test_settings_reach_the_trees() -> None:
    x, y = samples()
    small = ForestSettings(n_trees=3, max_depth=2, min_samples_leaf=5, max_features=0.5)
    forest = train_forest(x, y, small, PATTERNS["block"], N_CLASSES)
    assert forest.n_trees == 3
    assert max(np.diff(forest.tree_starts)) <= 7
    other = train_forest(x, y, replace(small, seed=1), PATTERNS["block"], N_CLASSES)
    assert not np.array_equal(forest.nodes[:7], other.nodes[:7])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "boosting"}, "boosting"),
        ({"n_trees": 0}, "n_trees is 0"),
        ({"n_trees": 2.0}, "n_trees is 2.0"),
        ({"max_depth": 0}, "max_depth is 0"),
        ({"min_samples_leaf": 0}, "min_samples_leaf is 0"),
        ({"max_features": "all"}, "max_features is 'all'"),
        ({"max_features": 1.5}, r"max_features is 1\.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForestSettings(**setting)


def test_training_data_that_does_not_fit_is_refused() -> None:
    x, y = samples(20)
    chosen, pattern = ForestSettings(n_trees=1), PATTERNS["block"]
    for features, labels, message in (
        (x.astype(np.float64), y, "float64"),
        (x[:, :-1], y, r"\(20, 80\)"),
        (x[:10], y, r"\(10, 81\)"),
        (x[:0], y[:0], "no sample"),
        (np.where(x == x.max(), np.nan, x).astype(np.float32), y, "NaN"),
        (x, y + 1, "0 to 6"),
        (x, y - 1, "0 to 6"),
        (x, y.astype(float), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            train_forest(features, labels, chosen, pattern, N_CLASSES)
    with pytest.raises(ValueError, match="threads is 0"):
        train_forest(x, y, chosen, pattern, N_CLASSES, threads=0)


# --- the door -------------------------------------------------------------------------------------


def test_a_call_that_would_read_elsewhere_is_refused() -> None:
    pattern, model = PATTERNS["block 3-D"], estimator("block 3-D")
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 3)
    out = np.empty((3, N_CLASSES))
    frozen = out.copy()
    frozen.flags.writeable = False
    for arguments, message in (
        ((slab[0], positions, out), "slab is 3-D"),
        ((slab.astype(np.int32), positions, out), "int32"),
        ((slab.astype(">i2"), positions, out), ">i2"),
        ((slab[:1], positions, out), "1 levels; the pattern reads 2"),
        ((slab, positions.astype(np.int64), out), "int64"),
        ((slab, positions[:, :2], out), r"\(3, 2\)"),
        ((slab, positions, out[:2]), r"\(2, 7\)"),
        ((slab, positions, out[:, :6]), r"\(3, 6\)"),
        ((slab, positions, out.astype(np.float16)), "float16"),
        ((slab, positions, frozen), "writable"),
    ):
        with pytest.raises(ValueError, match=message):
            forest.probabilities(*arguments)


def test_labels_that_would_be_written_elsewhere_are_refused() -> None:
    pattern, model = PATTERNS["block 3-D"], estimator("block 3-D")
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 3)
    frozen = np.empty(3, np.uint16)
    frozen.flags.writeable = False
    for out, message in (
        (np.empty(2, np.uint16), r"\(2,\) uint16"),
        (np.empty((3, 1), np.uint16), r"\(3, 1\)"),
        (np.empty(3, np.uint8), "uint8"),
        (frozen, "writable"),
    ):
        with pytest.raises(ValueError, match=message):
            forest.labels(slab, positions, out)
    with pytest.raises(ValueError, match="slab is 3-D"):
        forest.labels(slab[0], positions, np.empty(3, np.uint16))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("beyond", [-1, 1, 2**31 - 1, -(2**31)])
def test_a_position_beyond_the_slab_is_refused(axis: int, beyond: int) -> None:
    pattern, model = PATTERNS["block 3-D"], estimator("block 3-D")
    forest, slab = Forest.from_sklearn(model, pattern, N_CLASSES), room(pattern)
    positions = places(slab, pattern, 5)  # the first two touch the ends
    positions[0, axis] = positions[0, axis] - 1 if beyond == -1 else positions[0, axis]
    positions[1, axis] = positions[1, axis] + 1 if beyond == 1 else positions[1, axis]
    if abs(beyond) > 1:
        positions[2, axis] = beyond
    with pytest.raises(ValueError, match=f"along {'kij'[axis]}"):
        forest.probabilities(slab, positions, np.empty((5, N_CLASSES)))


def test_a_position_beyond_an_axis_of_one_voxel_is_refused_where_all_reads_are_inside() -> None:
    """NumPy gave the kernel another stride of that axis than the one its reads were made with."""
    tree = np.array([(7, 0, 1), (0, 0, ~0), (0, 0, ~1)], NODE)
    offsets = np.array([(0, 0, 0, -1)], np.int32)
    forest = Forest(tree, np.array([0, 3]), np.empty((0, 2)), offsets, 2)
    slab = np.zeros((1, 2, 2, 1), np.int16)[..., ::-1]
    positions, out = np.array([(1, 1, 1)], np.int32), np.empty((1, 2))
    with pytest.raises(ValueError, match=r"reach 0\.\.1 along j"):
        forest.probabilities(slab, positions, out)


def test_an_estimator_that_does_not_fit_is_refused() -> None:
    from sklearn.ensemble import RandomForestClassifier

    model = estimator("block")
    with pytest.raises(ValueError, match="81 features, the pattern has 150"):
        Forest.from_sklearn(model, PATTERNS["block 3-D"], N_CLASSES)
    with pytest.raises(ValueError, match="labels up to 6, not 4"):
        Forest.from_sklearn(model, PATTERNS["block"], 4)
    x = np.array([[-70000.0], [-60000.0]], np.float32)
    for features, labels, message in (
        (x, [0, 1], "not trained on int16"),  # no voxel would go left
        (x, ["a", "b"], "integer label"),
        (x, [[0, 1], [1, 0]], "integer label"),
    ):
        other = RandomForestClassifier(3, bootstrap=False).fit(features, labels)
        with pytest.raises(ValueError, match=message):
            Forest.from_sklearn(other, Block(1), N_CLASSES)


def test_more_features_than_nodes_can_name_are_refused_in_words() -> None:
    offsets = np.zeros((65_537, 4), np.int32)
    leaf = np.array([(0, 0, ~0)], NODE)
    one_tree, no_rows = np.array([0, 1]), np.empty((0, 2))
    Forest(leaf, one_tree, no_rows, offsets[1:], 2)
    with pytest.raises(ValueError, match="65537 features does not fit"):
        Forest(leaf, one_tree, no_rows, offsets, 2)


def test_the_last_feature_a_node_can_name_is_read() -> None:
    offsets = np.zeros((65_536, 4), np.int32)
    offsets[-1, 3] = 1
    tree = np.array([(7, 65_535, 1), (0, 0, ~0), (0, 0, ~1)], NODE)
    forest = Forest(tree, np.array([0, 3]), np.empty((0, 2)), offsets, 2)
    slab = np.array([[[[9, 7, 8, 0]]]], np.int16)
    positions = np.array([(0, 0, j) for j in range(3)], np.int32)
    np.testing.assert_array_equal(asked(forest, slab, positions), [(1, 0), (0, 1), (1, 0)])
