"""The benchmark cases of the forest, and the seeded inputs they share.

Every input is a phantom's. The forests learn from other phantoms than they are timed on, and grow
as large as on patients (100 trees of unlimited depth have about half a million nodes): one that
fits the cache would flatter us.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.bench import Benchmark, Job, Peer
from organfast.blocks import Block, Context, gather_features
from organfast.body import body_mask
from organfast.grid import BlockGrid, GridVolume, ModelGrid, to_model_grid
from organfast.levels import levels_slab
from organfast.models.forest import Forest
from organfast.sampling import features_at, sample_positions

__all__ = [
    "Size",
    "context_case",
    "installed",
    "labels_case",
    "neighbours_case",
    "onnx_case",
    "slice_case",
    "timed_slice",
    "visits_case",
    "working_grid_case",
]

N_CLASSES = 23
KERNELS = "ORGANFAST_KERNELS"
_GRID = ModelGrid((1.5, 1.5, 3.0), "piecewise")
_CONTEXT_PIXELS, _CONTEXT_SLICES = 272, 64
_AS_MANY = 8192
_PEER_SAMPLE = 2048


@dataclass(frozen=True)
class Size:
    """How large a forest grows.

    Parameters
    ----------
    n_trees : int
        Trees.
    n_per_class : int
        Training positions per class.
    n_patients : int
        Phantoms they are drawn from.
    """

    n_trees: int = 100
    n_per_class: int = 400
    n_patients: int = 4


REAL, SMALL = Size(), Size(n_trees=10)


# --- inputs ---------------------------------------------------------------------------------------


@cache
def _slices(patient: int, n: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """``n`` native slices of a phantom's trunk, (n, 512, 512): HU, and labels of the table."""
    from organfast.painting import paint
    from organfast.phantom import FieldOfView, class_labels, phantom

    anatomy = phantom(FieldOfView((512, 512, n), (0.8, 0.8, 40.0), 40.0), seed=patient, threads=2)
    labels = class_labels(anatomy).transpose(2, 1, 0)
    hu = np.ascontiguousarray(paint(anatomy, seed=patient, threads=2).working)
    return hu, np.ascontiguousarray(labels)


def timed_slice() -> NDArray[np.int16]:
    """The slice that is timed, (512, 512) HU, of a patient whom no forest learns from."""
    hu: NDArray[np.int16] = _slices(0, 1)[0][0]
    return hu


@cache
def _abdomen(patient: int) -> tuple[GridVolume, NDArray[np.uint8]]:
    """A phantom's abdomen on the working grid, and its labels."""
    from organfast.painting import paint
    from organfast.phantom import FieldOfView, class_labels, phantom

    shape = (_CONTEXT_PIXELS, _CONTEXT_PIXELS, _CONTEXT_SLICES)
    view = FieldOfView(shape, (1.5, 1.5, 3.0), 40.0)
    anatomy = phantom(view, seed=patient, threads=2)
    labels = np.ascontiguousarray(class_labels(anatomy).transpose(2, 1, 0))
    volume = to_model_grid(paint(anatomy, seed=patient, threads=2), _GRID)
    return volume, labels.astype(np.uint8)


def _native(hu: NDArray[np.int16]) -> GridVolume:
    return GridVolume(hu, spacing_mm=(3.0, 0.8, 0.8))


@cache
def _trained(pattern: Block | Context, forest: Size) -> Any:
    """Extra trees of scikit-learn that learned the table's classes from phantoms."""
    from sklearn.ensemble import ExtraTreesClassifier

    features, labels = [], []
    for patient in range(1, forest.n_patients + 1):
        if isinstance(pattern, Context):
            volume, truth = _abdomen(patient)
        else:
            hu, truth = _slices(patient, 4)
            volume = _native(hu)
        n_wanted = dict.fromkeys(range(N_CLASSES), -(-forest.n_per_class // forest.n_patients))
        positions, found = sample_positions(truth, n_wanted, seed=patient)
        features.append(features_at(volume, pattern, positions))
        labels.append(found)
    estimator = ExtraTreesClassifier(forest.n_trees, random_state=0, n_jobs=-1)
    estimator.fit(np.concatenate(features), np.concatenate(labels))
    return estimator.set_params(n_jobs=1)


@cache
def _forest(pattern: Block | Context, forest: Size) -> Forest:
    return Forest.from_sklearn(_trained(pattern, forest), pattern, N_CLASSES)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A forest, scikit-learn's and ours, and positions of a scan that it is asked about.

    Parameters
    ----------
    pattern : Block or Context
        What the forest reads.
    volume : GridVolume
        The scan.
    positions : (n, 3) int32
        (k, i, j) voxels of the scan.
    size : Size
        Of the forest.
    """

    pattern: Block | Context
    volume: GridVolume
    positions: NDArray[np.int32]
    size: Size

    @property
    def estimator(self) -> Any:
        return _trained(self.pattern, self.size)

    @property
    def forest(self) -> Forest:
        return _forest(self.pattern, self.size)

    @property
    def _slices_asked(self) -> tuple[int, int]:
        return int(self.positions[:, 0].min()), int(self.positions[:, 0].max()) + 1

    def new_slab(self) -> NDArray[np.int16]:
        return levels_slab(self.volume, self.pattern, *self._slices_asked)

    @cached_property
    def slab(self) -> NDArray[np.int16]:
        return self.new_slab()

    @cached_property
    def local(self) -> NDArray[np.int32]:
        """The positions in the slab."""
        reach = np.array(self.pattern.reach, np.int32)
        return self.positions - np.array([self._slices_asked[0], 0, 0], np.int32) + reach

    def sample(self, most: int) -> slice:
        """As many neighbouring positions, from the middle."""
        n = min(most, len(self.positions))
        first = (len(self.positions) - n) // 2
        return slice(first, first + n)

    def features(self, chosen: slice) -> NDArray[np.float32]:
        return gather_features(self.slab, self.pattern.offsets, self.local[chosen])

    def n_visits(self) -> float:
        """Nodes at which a voxel is read, estimated from a sample of the positions."""
        chosen = self.sample(_PEER_SAMPLE)
        leaves = self.estimator.apply(self.features(chosen))
        trees = [e.tree_ for e in self.estimator.estimators_]
        depths = [tree.compute_node_depths()[leaves[:, t]] - 1 for t, tree in enumerate(trees)]
        return float(np.sum(depths)) / len(leaves) * len(self.positions)

    def probabilities(self, chosen: slice = slice(None)) -> tuple[Job, NDArray[np.float64]]:
        """Our job, and where it writes; checked against scikit-learn, bit for bit."""
        out = np.empty((len(self.positions[chosen]), N_CLASSES))
        job = partial(self.forest.probabilities, self.slab, self.local[chosen], out)
        job()
        some = self.sample(512)
        if chosen == slice(None):
            expected = np.zeros((some.stop - some.start, N_CLASSES))
            expected[:, self.estimator.classes_] = self.estimator.predict_proba(self.features(some))
            np.testing.assert_array_equal(out[some], expected)
        return job, out

    def whole(self) -> Job:
        """Our job with the levels to be made and the result to be allocated."""

        def job() -> None:
            out = np.empty((len(self.local), N_CLASSES))
            self.forest.probabilities(self.new_slab(), self.local, out)

        return job


def _grid_positions(
    shape: tuple[int, int, int], k: int, stride: int, inside: NDArray[np.bool_] | None = None
) -> NDArray[np.int32]:
    """Positions of the block grid in slice k, row by row."""
    rows, columns = BlockGrid(shape, (1, stride, stride)).centres[1:]
    positions = np.full((len(rows), len(columns), 3), k, np.int32)
    positions[..., 1], positions[..., 2] = rows[:, None], columns
    flat = positions.reshape(-1, 3)
    return flat if inside is None else np.ascontiguousarray(flat[inside.ravel()])


def _in_slice(size: int, stride: int, forest: Size) -> _Asked:
    volume = _native(timed_slice()[None])
    positions = _grid_positions(volume.shape, 0, stride)
    return _Asked(Block(size), volume, positions, forest)


# --- the forest -----------------------------------------------------------------------------------


def _forest_case(asked: _Asked, name: str, n_voxels: int) -> Benchmark:
    """All positions by us, a sample of them by scikit-learn on blocks copied beforehand."""
    chosen = asked.sample(_PEER_SAMPLE)
    features, n = asked.features(chosen), chosen.stop - chosen.start
    peer = f"scikit-learn predict_proba, features copied beforehand, {n:,} of the positions"
    return Benchmark(
        name,
        asked.probabilities()[0],
        {peer: Peer(lambda: asked.estimator.predict_proba(features), n)},
        n_items=len(asked.positions),
        unit="positions",
        n_voxels=n_voxels,
        n_visits=asked.n_visits(),
        whole=asked.whole(),
    )


def slice_case(size: int, stride: int, forest: Size = REAL) -> Benchmark:
    """Probabilities at every position of a native slice, inside the body or not.

    Parameters
    ----------
    size : int
        Side of a block, odd.
    stride : int
        Pixels between positions.
    forest : Size
        Of the forest.
    """
    asked = _in_slice(size, stride, forest)
    return _forest_case(
        asked,
        f"forest {forest.n_trees} trees, {size} px, stride {stride}, a 512 x 512 slice",
        512 * 512,
    )


def context_case(stride: int, forest: Size = REAL) -> Benchmark:
    """Probabilities at every position of a slice of the working grid, from 3-D context.

    Parameters
    ----------
    stride : int
        Voxels between positions.
    forest : Size
        Of the forest.
    """
    volume, n = _abdomen(0)[0], _CONTEXT_PIXELS
    positions = _grid_positions(volume.shape, _CONTEXT_SLICES // 2, stride)
    asked = _Asked(Context(), volume, positions, forest)
    name = (
        f"forest {forest.n_trees} trees, Context, stride {stride}, a {n} x {n} slice, working grid"
    )
    return _forest_case(asked, name, n * n)


def neighbours_case(n_rows: int = 16, forest: Size = REAL, path: str | None = None) -> Benchmark:
    """Probabilities at neighbouring positions: whole rows of a native slice, stride 1.

    Parameters
    ----------
    n_rows : int
        Rows of 512 positions.
    forest : Size
        Of the forest.
    path : str or None
        The version of the kernel, of ``kernel_path``; None is the one that runs.
    """
    asked = _rows(n_rows, forest)
    features = asked.features(slice(None))
    n, ours = len(asked.positions), asked.probabilities()[0]
    return Benchmark(
        f"forest {forest.n_trees} trees, 33 px, {n:,} neighbouring positions"
        + (f", {path} kernel" if path else ""),
        _forced(ours, path) if path else ours,
        {
            "scikit-learn predict_proba, blocks copied beforehand": Peer(
                lambda: asked.estimator.predict_proba(features)
            )
        },
        n_items=n,
        unit="positions",
        n_visits=asked.n_visits(),
    )


def _forced(job: Job, path: str) -> Job:
    """A job that runs a given version of the forest's kernel."""

    def forced() -> object:
        before = os.environ.get(KERNELS)
        os.environ[KERNELS] = path
        try:
            return job()
        finally:
            del os.environ[KERNELS]
            if before is not None:
                os.environ[KERNELS] = before

    return forced


def _rows(n_rows: int, forest: Size) -> _Asked:
    """Rows from the middle of the slice."""
    asked = _in_slice(33, 1, forest)
    return replace(asked, positions=asked.positions[asked.sample(n_rows * 512)])


def labels_case(stride: int = 1, forest: Size = REAL) -> Benchmark:
    """Labels alone at the positions of a native slice that lie in the body.

    Parameters
    ----------
    stride : int
        Pixels between positions.
    forest : Size
        Of the forest.
    """
    whole = _in_slice(33, stride, forest)
    mask = body_mask(whole.volume, BlockGrid(whole.volume.shape, (1, stride, stride)))
    asked = replace(whole, positions=_grid_positions(whole.volume.shape, 0, stride, mask[0]))
    rng = np.random.default_rng(0)
    n_asked = len(asked.positions)
    some = np.sort(rng.choice(n_asked, min(_AS_MANY, n_asked), replace=False))
    blocks = gather_features(asked.slab, asked.pattern.offsets, asked.local[some])
    out = np.empty(n_asked, np.uint16)
    ours = partial(asked.forest.labels, asked.slab, asked.local, out)
    walked = ours() / (n_asked * forest.n_trees)
    np.testing.assert_array_equal(out[some], asked.estimator.predict(blocks))
    peer = f"scikit-learn predict, blocks copied beforehand, {len(some):,} of the positions"
    return Benchmark(
        f"forest {forest.n_trees} trees, 33 px, labels alone, stride {stride}, "
        f"the body in a 512 x 512 slice ({n_asked:,} positions)",
        ours,
        {peer: Peer(lambda: asked.estimator.predict(blocks), len(some))},
        n_items=n_asked,
        unit="positions",
        n_voxels=512 * 512,
        n_visits=asked.n_visits() * walked,
    )


def working_grid_case(n: int = _AS_MANY, forest: Size = REAL) -> Benchmark:
    """Probabilities from 3-D context at positions in the body, strides (3, 3, 2) as in use.

    Both sides read levels that are ready; what they are read for is timed.

    Parameters
    ----------
    n : int
        Most positions, from the middle slices.
    forest : Size
        Of the forest.
    """
    volume = _abdomen(0)[0]
    block_grid = BlockGrid(volume.shape, (2, 3, 3))
    mask = body_mask(volume, block_grid)
    k, i, j = block_grid.centres
    inside = np.nonzero(mask)
    positions = np.stack([k[inside[0]], i[inside[1]], j[inside[2]]], axis=1).astype(np.int32)
    every = _Asked(Context(), volume, positions, forest)
    asked = replace(every, positions=positions[every.sample(n)])
    ready = asked.features(slice(None))
    buffer = np.empty_like(ready)

    def gather_and_predict() -> object:
        gather_features(asked.slab, asked.pattern.offsets, asked.local, buffer)
        return asked.estimator.predict_proba(buffer)

    return Benchmark(
        f"forest {forest.n_trees} trees, Context of {asked.pattern.n_features}, working grid, "
        f"{len(asked.positions):,} positions in the body",
        asked.probabilities()[0],
        {
            "scikit-learn predict_proba, and gathering the features by our kernel": Peer(
                gather_and_predict
            ),
            "scikit-learn predict_proba, features gathered beforehand": Peer(
                lambda: asked.estimator.predict_proba(ready)
            ),
        },
        n_items=len(asked.positions),
        unit="positions",
        n_visits=asked.n_visits(),
    )


def visits_case(n_rows: int = 16, forest: Size = REAL) -> Benchmark:
    """Node visits of neighbouring positions, against a loop that reads the same voxels.

    The loop is given the place of every voxel that the walk reads, in the order of trees, nodes and
    positions, and has nothing to compare: that is how fast this machine gathers them.

    Parameters
    ----------
    n_rows : int
        Rows of 512 positions.
    forest : Size
        Of the forest.
    """
    from organfast.kernels.rates import gathered

    asked = _rows(n_rows, forest)
    voxels, places = _reads(asked, asked.sample(_PEER_SAMPLE))
    shuffled = np.random.default_rng(0).permutation(places)
    n_visits = asked.n_visits()
    return Benchmark(
        f"forest {forest.n_trees} trees, 33 px, node visits at {len(asked.positions):,} neighbours",
        asked.probabilities()[0],
        {
            "Numba loop over the same voxels, node by node": Peer(
                lambda: gathered(voxels, places), len(places), is_limit=True
            ),
            "Numba loop over the same voxels, shuffled": Peer(
                lambda: gathered(voxels, shuffled), len(places), is_limit=True
            ),
        },
        n_items=round(n_visits),
        unit="node visits",
        n_visits=n_visits,
    )


def _reads(asked: _Asked, chosen: slice) -> tuple[NDArray[np.int16], NDArray[np.uint32]]:
    """The slab as it lies in memory, and where each node visit reads in it."""
    slab = asked.slab
    extent = sum((n - 1) * s for n, s in zip(slab.shape, slab.strides, strict=True)) // 2 + 1
    voxels = np.lib.stride_tricks.as_strided(slab, (extent,), (2,), writeable=False)
    strides = np.array(slab.strides) // 2
    centres = asked.local[chosen] @ strides[1:]
    offsets = asked.pattern.offsets @ strides
    features = asked.features(chosen)
    places = []
    for estimator in asked.estimator.estimators_:
        tree = estimator.tree_
        # By columns: node after node, and at each node the positions that come by.
        visits = tree.decision_path(features).tocsc()
        node = np.repeat(np.arange(tree.node_count), np.diff(visits.indptr))
        is_inner = tree.feature[node] >= 0
        read = offsets[tree.feature[node[is_inner]]]
        places.append(centres[visits.indices[is_inner]] + read)
    return voxels, np.concatenate(places).astype(np.uint32)


def onnx_case(n_rows: int = 16, forest: Size = SMALL) -> Benchmark:
    """A small forest, for converting a large one takes minutes, against onnxruntime as well.

    Parameters
    ----------
    n_rows : int
        Rows of 512 positions.
    forest : Size
        Of the forest.
    """
    asked = _rows(n_rows, forest)
    blocks = asked.features(slice(None))
    skipped: list[str] = []
    peers = {
        "scikit-learn predict_proba, blocks copied beforehand": Peer(
            lambda: asked.estimator.predict_proba(blocks)
        )
    }
    if installed("onnxruntime", skipped) and installed("skl2onnx", skipped):
        name = "onnxruntime, converted by skl2onnx, blocks copied beforehand"
        peers[name] = Peer(_by_onnxruntime(asked.estimator, blocks))
    n = len(asked.positions)
    return Benchmark(
        f"forest {forest.n_trees} trees, 33 px, {n:,} neighbouring positions",
        asked.probabilities()[0],
        peers,
        n_items=n,
        unit="positions",
        skipped=tuple(skipped),
        n_visits=asked.n_visits(),
    )


def _by_onnxruntime(estimator: Any, blocks: NDArray[np.float32]) -> Job:
    import onnxruntime
    from skl2onnx import to_onnx

    converted = to_onnx(estimator, blocks[:1], options={id(estimator): {"zipmap": False}})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        converted.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: blocks}
    return lambda: session.run(["probabilities"], given)[0]


def installed(module: str, skipped: list[str]) -> bool:
    """Whether a peer is there; if not, it is named among those skipped.

    Parameters
    ----------
    module : str
        The peer's module.
    skipped : list of str
        Appended to.
    """
    if find_spec(module) is None:
        skipped.append(module)
        return False
    return True
