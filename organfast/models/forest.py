"""A forest of decision trees that reads voxels where they lie: no block is ever copied.

scikit-learn trains it; ``Forest`` holds its trees as three flat arrays and walks them over a slab
with a compiled kernel. Probabilities equal scikit-learn's ``predict_proba`` (``n_jobs=1``) on the
copied blocks, bit for bit in float64.

::

    nodes of one tree     0 | 1 2 | 3 4 | 5 6 | ...      siblings side by side, the pairs
                       root   left, right of the root     in depth-first order of their parents
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from organfast.errors import is_whole
from organfast.grid import Pattern
from organfast.kernels import forest as kernel

if TYPE_CHECKING:
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

__all__ = ["Forest", "ForestSettings", "kernel_path", "train_forest"]

KINDS = ("random_forest", "extra_trees")
MAX_FEATURES = 65_536
MAX_REACH = 4096
MAX_CLASSES = 65_535

# A position whose voxel is at most the threshold goes to `left`, any other to `left + 1`, both
# counted from the tree's first node. Where `left` is negative the node is a leaf, and `~left` its
# code: below n_classes the one class it holds, from there on n_classes + a row of the leaf table.
NODE = np.dtype([("threshold", np.int16), ("feature", np.uint16), ("left", np.int32)])

# An environment variable that forces one of the kernel's paths, for tests and for timing.
_FORCED = "ORGANFAST_KERNELS"

_SUMS_BYTES = 8 << 20
# Patterns that read from more memory than this do so from beyond the second cache: positions are
# walked in tiles, for which all features are copied, if that takes fewer reads than the walk.
_CACHE_BYTES = 1 << 20
_TREES_BETWEEN_EXITS = 16
_TREES_PER_REPORT = 10


@dataclass(frozen=True)
class ForestSettings:
    """Kind and size of a forest.

    Parameters
    ----------
    kind : {"extra_trees", "random_forest"}
        Random thresholds on all samples (Geurts et al. 2006), or best thresholds on bootstrapped
        ones (Breiman 2001; the seed's), which take several times as long to train.
    n_trees : int
        Trees.
    max_depth : int or None
        Most decisions between root and leaf; None grows until leaves are pure.
    min_samples_leaf : int
        Fewest samples in a leaf.
    max_features : {"sqrt", "log2"} or float
        Features tried at a node: of all n, their square root, logarithm or this share.
    seed : int
        Seed of everything random.

    Raises
    ------
    ValueError
        A setting is out of range.
    """

    kind: str = "extra_trees"
    n_trees: int = 100
    max_depth: int | None = None
    min_samples_leaf: int = 1
    max_features: str | float = "sqrt"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"forest kind {self.kind!r} is unknown; use {' or '.join(KINDS)}")
        for name, least in (("n_trees", 1), ("min_samples_leaf", 1), ("seed", 0)):
            value = getattr(self, name)
            if not is_whole(value) or not least <= value < 2**32:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")
        if self.max_depth is not None and (not is_whole(self.max_depth) or self.max_depth < 1):
            raise ValueError(f"max_depth is {self.max_depth!r}; give at least 1, or None")
        share = self.max_features
        is_share = isinstance(share, float) and 0 < share <= 1
        if not is_share and share not in ("sqrt", "log2"):
            raise ValueError(f"max_features is {share!r}; use sqrt, log2 or a share such as 0.1")


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees as flat arrays, ready to be walked over a slab; a ``Classifier``.

    Parameters
    ----------
    nodes : (n_nodes,) structured (threshold int16, feature uint16, left int32)
        All trees, one after another.
    tree_starts : (n_trees + 1,) int64
        Where each tree begins in ``nodes``; the last is their number.
    leaf_table : (n_rows, n_classes) float64
        Class probabilities of the leaves that hold more than one class.
    offsets : (n_features, 4) int32
        A pattern's: (level index, dk, di, dj) of each feature.
    n_classes : int
        Classes, also those that no leaf holds.

    Raises
    ------
    ValueError
        A node could lead the walk out of its tree, its pattern or the leaf table.
    """

    nodes: NDArray[np.void]
    tree_starts: NDArray[np.int64]
    leaf_table: NDArray[np.float64]
    offsets: NDArray[np.int32]
    n_classes: int

    def __post_init__(self) -> None:
        if not is_whole(self.n_classes) or not 1 <= self.n_classes <= MAX_CLASSES:
            raise ValueError(f"n_classes is {self.n_classes!r}; give 1 to {MAX_CLASSES}")
        for name, dtype, n_axes in (
            ("nodes", NODE, 1),
            ("tree_starts", np.dtype(np.int64), 1),
            ("leaf_table", np.dtype(np.float64), 2),
            ("offsets", np.dtype(np.int32), 2),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != n_axes:
                raise ValueError(f"{name} is {array.ndim}-D {array.dtype}, not {n_axes}-D {dtype}")
            # What was checked stays so: read-only views of what came.
            view = np.ascontiguousarray(array).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        _check_offsets(self.offsets)
        _check_trees(self.nodes, self.tree_starts, len(self.offsets))
        _check_leaves(self.nodes, self.leaf_table, self.n_classes)

    @staticmethod
    def from_sklearn(
        estimator: RandomForestClassifier | ExtraTreesClassifier,
        pattern: Pattern,
        n_classes: int,
        merge: NDArray[np.integer] | None = None,
    ) -> Forest:
        """Flatten a forest that scikit-learn has trained on a pattern's features.

        Parameters
        ----------
        estimator : RandomForestClassifier or ExtraTreesClassifier
            Trained on HU as they lie in the slab; its ``classes_`` are labels. Labels it has never
            seen get probability 0.
        pattern : Pattern
            Where its features are read.
        n_classes : int
            Columns of the probabilities.
        merge : (n_labels,) int, optional
            The class of each label that the estimator knows. A leaf's share of a class is the sum
            over its labels, in ascending order; a leaf of several labels of one class is pure.

        Raises
        ------
        ValueError
            The estimator does not fit the pattern or the classes, or was not trained on integers.
        """
        if estimator.n_features_in_ != pattern.n_features:
            raise ValueError(
                f"the forest was trained on {estimator.n_features_in_} features, "
                f"the pattern has {pattern.n_features}"
            )
        labels = np.asarray(estimator.classes_)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError("the forest was not trained on one integer label per sample")
        _check_merge(merge, n_classes)
        n_labels = n_classes if merge is None else len(merge)
        if labels.min() < 0 or labels.max() >= n_labels:
            raise ValueError(f"the forest knows labels up to {labels.max()}, not {n_labels}")
        trees = [e.tree_ for e in estimator.estimators_]
        leaves = _Leaves(labels if merge is None else merge[labels], n_classes)
        nodes = np.concatenate([_flatten(tree, leaves) for tree in trees])
        starts = np.cumsum([0, *(tree.node_count for tree in trees)], dtype=np.int64)
        table, row = np.unique(np.concatenate(leaves.rows), axis=0, return_inverse=True)
        is_mixed = ~nodes["left"] >= n_classes
        rows = row.ravel()[~nodes["left"][is_mixed] - n_classes]  # NumPy 2.0: (n, 1)
        nodes["left"][is_mixed] = ~(n_classes + rows)
        return Forest(nodes, starts, table, pattern.offsets, n_classes)

    @staticmethod
    def from_arrays(
        arrays: Mapping[str, NDArray[Any]], offsets: NDArray[np.int32], n_classes: int
    ) -> Forest:
        """The inverse of :meth:`arrays`.

        Parameters
        ----------
        arrays : mapping of str to array
            ``threshold``, ``feature`` and ``left`` of the nodes, ``tree_starts``, ``leaf_table``.
        offsets : (n_features, 4) int32
            A pattern's: (level index, dk, di, dj) of each feature.
        n_classes : int
            Columns of the probabilities.

        Raises
        ------
        ValueError
            The arrays, which may come from a tampered file, are no forest.
        """
        threshold, feature, left = (arrays[name] for name in ("threshold", "feature", "left"))
        if not threshold.shape == feature.shape == left.shape or left.ndim != 1:
            raise ValueError("thresholds, features and children differ in number")
        nodes = np.empty(left.shape, NODE)
        nodes["threshold"], nodes["feature"], nodes["left"] = threshold, feature, left
        return Forest(nodes, arrays["tree_starts"], arrays["leaf_table"], offsets, n_classes)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a model file stores of the forest; the pattern is stored beside it."""
        nodes = {name: np.ascontiguousarray(self.nodes[name]) for name in NODE.names or ()}
        return {**nodes, "tree_starts": self.tree_starts, "leaf_table": self.leaf_table}

    def first(self, n_trees: int) -> Forest:
        """The forest of the first trees alone: a smaller forest, whose arrays are views of these.

        Parameters
        ----------
        n_trees : int
            How many of them.

        Raises
        ------
        ValueError
            There are not so many.
        """
        if not is_whole(n_trees, 1) or n_trees > self.n_trees:
            raise ValueError(f"trees is {n_trees!r}; the forest has 1 to {self.n_trees} to give")
        if n_trees == self.n_trees:
            return self
        starts = self.tree_starts[: n_trees + 1]
        return Forest(
            self.nodes[: starts[-1]], starts, self.leaf_table, self.offsets, self.n_classes
        )

    @property
    def n_trees(self) -> int:
        """Trees."""
        return len(self.tree_starts) - 1

    @property
    def n_features(self) -> int:
        """Reads per position that a node may choose from."""
        return len(self.offsets)

    @cached_property
    def _extent(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Least and greatest (level index, dk, di, dj)."""
        return self.offsets.min(axis=0), self.offsets.max(axis=0)

    def probabilities(
        self,
        slab: NDArray[np.int16],
        positions: NDArray[np.int32],
        out: NDArray[np.float32] | NDArray[np.float64],
    ) -> None:
        """Class probabilities at positions of a slab, written to ``out``.

        Any memory order, any number of positions, from any number of threads at once.

        Parameters
        ----------
        slab : (L, K, R, C) int16, HU
            Levels around the positions, from ``levels_slab``.
        positions : (n, 3) int32
            (k, i, j) in the slab, its padding included.
        out : (n, n_classes) float32 or float64
            Receives the mean over the trees of the class shares in the leaves, as float64 equal to
            scikit-learn's.

        Raises
        ------
        ValueError
            A dtype or shape is wrong, or a position reaches beyond the slab.
        """
        self._check_call(slab, positions)
        if out.shape != (len(positions), self.n_classes):
            raise ValueError(f"out has shape {out.shape}; give {(len(positions), self.n_classes)}")
        if out.dtype not in (np.float32, np.float64) or not out.flags.writeable:
            raise ValueError(f"out is {out.dtype}; give a writable float32 or float64 array")
        path = kernel.PATHS.index(kernel_path())
        if len(positions):
            kernel.walk_forest(**self._walk(slab, positions), path=path, out=out)

    def labels(
        self, slab: NDArray[np.int16], positions: NDArray[np.int32], out: NDArray[np.uint16]
    ) -> int:
        """The most probable class at positions of a slab, written to ``out``.

        Equal to the argmax of :meth:`probabilities` in float64, ties to the lowest class, with as
        few as half the walks: from half the trees on, positions whose label is certain leave their
        chunk, a third of it or more at a time.

        It is certain when the sum of its first class exceeds that of any other by more than the
        number of remaining trees, for a tree adds at most 1 to another class. Sums of leaves that
        hold several classes are rounded, and rows of the leaf table may sum to 1 + 1e-6: so the
        margin must exceed that number by another 0.5 + 2e-6 per tree, more than both can amount to.
        Where leaves are pure, margins are whole and the 0.5 costs nothing.

        Parameters
        ----------
        slab : (L, K, R, C) int16, HU
            Levels around the positions, from ``levels_slab``.
        positions : (n, 3) int32
            (k, i, j) in the slab, its padding included.
        out : (n,) uint16
            Receives the labels.

        Returns
        -------
        int
            Walks from a root to a leaf that were made, of ``n * n_trees``.

        Raises
        ------
        ValueError
            A dtype or shape is wrong, or a position reaches beyond the slab.
        """
        self._check_call(slab, positions)
        if out.shape != (len(positions),) or out.dtype != np.uint16 or not out.flags.writeable:
            raise ValueError(
                f"out is {out.shape} {out.dtype}; give a writable ({len(positions)},) uint16 array"
            )
        path = kernel.PATHS.index(kernel_path())
        if len(positions) == 0:
            return 0
        return kernel.label_forest(
            **self._walk(slab, positions), path=path, out=out, n_between=_TREES_BETWEEN_EXITS
        )

    @cached_property
    def _n_visits(self) -> float:
        """About how many nodes a position visits: what it would in balanced trees."""
        return float(np.log2((np.diff(self.tree_starts) + 1) / 2).sum())

    def _walk(
        self,
        slab: NDArray[np.int16],
        positions: NDArray[np.int32],
        scratch: NDArray[np.uint8] | None = None,
    ) -> dict[str, Any]:
        """What both kernels take: trees, where they read in this slab, and scratch."""
        # Bytes from a position to each feature's voxel, in this slab's geometry.
        reads = (self.offsets.astype(np.intp) * slab.strides).sum(axis=1)
        is_far = np.ptp(reads) > _CACHE_BYTES and self.n_features < self._n_visits
        n_chunk = min(kernel.CHUNK, len(positions), max(1, _SUMS_BYTES // (8 * self.n_classes)))
        return {
            "nodes": self.nodes,
            "tree_starts": self.tree_starts,
            "leaf_table": self.leaf_table,
            "slab": slab,
            "reads": reads,
            "positions": positions,
            "staged": _lines(self.n_features if is_far else 0, kernel.TILE),
            "scratch": np.empty(kernel.WALK_BYTES, np.uint8) if scratch is None else scratch,
            "sums": np.empty((kernel.TILE if is_far else n_chunk, self.n_classes)),
        }

    def _check_call(self, slab: NDArray[Any], positions: NDArray[Any]) -> None:
        if slab.ndim != 4 or slab.dtype != np.int16:
            raise ValueError(f"slab is {slab.ndim}-D {slab.dtype}; give (L, K, R, C) int16")
        if positions.ndim != 2 or positions.shape[1] != 3 or positions.dtype != np.int32:
            raise ValueError(f"positions is {positions.shape} {positions.dtype}; give (n, 3) int32")
        if len(positions) == 0:
            return
        least, greatest = self._extent
        if greatest[0] >= slab.shape[0]:
            raise ValueError(
                f"slab has {slab.shape[0]} levels; the pattern reads {greatest[0] + 1}"
            )
        for axis, name in enumerate("kij", start=1):
            column = positions[:, axis - 1]
            # The positions themselves, too: of an axis of one voxel NumPy tells the kernel another
            # stride than us, and index 0 alone is the same place by both.
            low = int(column.min()) + min(0, int(least[axis]))
            high = int(column.max()) + max(0, int(greatest[axis]))
            if low < 0 or high >= slab.shape[axis]:
                raise ValueError(
                    f"positions reach {low}..{high} along {name}, the slab has 0.."
                    f"{slab.shape[axis] - 1}; pad it by what the pattern reaches"
                )


def _lines(n: int, n_voxels: int) -> NDArray[np.int16]:
    """(n, n_voxels) int16, uninitialised, from the beginning of a cache line on."""
    memory = np.empty(2 * n * n_voxels + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + 2 * n * n_voxels].view(np.int16).reshape(n, n_voxels)


def kernel_path() -> str:
    """Which version of the walk runs: "scalar", "x86-64-v3" (AVX2) or "x86-64-v4" (AVX-512).

    The widest that this machine has, unless the environment variable ``ORGANFAST_KERNELS`` names
    another; it is read at each call. Results are the same bit for bit.

    Raises
    ------
    ValueError
        The variable names a path that is unknown, or that this machine does not have.
    """
    forced = os.environ.get(_FORCED)
    if not forced:
        return kernel.PATHS[-1]
    if forced not in kernel.PATHS:
        raise ValueError(
            f"{_FORCED} is {forced!r}; this machine has {', '.join(kernel.PATHS)}, "
            "and without the variable the last of them is used"
        )
    return forced


def train_forest(
    features: NDArray[np.float32],
    labels: NDArray[np.integer],
    settings: ForestSettings,
    pattern: Pattern,
    n_classes: int,
    merge: NDArray[np.integer] | None = None,
    *,
    threads: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Forest:
    """Train a forest.

    Parameters
    ----------
    features : (n, n_features) float32
        Slab voxels at the pattern's offsets around n positions.
    labels : (n,) int
        Their classes, 0 to ``n_classes - 1``; with ``merge`` 0 to ``len(merge) - 1``.
    settings : ForestSettings
        Kind and size of the forest.
    pattern : Pattern
        Where the features were read.
    n_classes : int
        Classes of the model, with or without samples.
    merge : (n_labels,) int, optional
        The class of each label: the trees tell labels apart, the model sums their probabilities.
    threads : int
        Trees trained at once; the forest does not depend on it.
    progress : callable, optional
        Called with (what, trees trained, trees in all).

    Returns
    -------
    Forest
        The same for the same arguments, whatever ``threads``.

    Raises
    ------
    ValueError
        Shapes or values do not fit.
    """
    if features.dtype != np.float32 or features.shape != (len(labels), pattern.n_features):
        raise ValueError(
            f"features is {features.shape} {features.dtype}; "
            f"give {(len(labels), pattern.n_features)} float32"
        )
    if len(labels) == 0:
        raise ValueError("no sample to train on; label at least one voxel")
    if not np.isfinite(features.sum(dtype=np.float64)):
        raise ValueError("features hold NaN or infinite values; give voxels")
    _check_merge(merge, n_classes)
    n_labels = n_classes if merge is None else len(merge)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= n_labels:
        raise ValueError(f"labels must be integers from 0 to {n_labels - 1}")
    if threads < 1:
        raise ValueError(f"threads is {threads}; give at least 1")
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

    kind = RandomForestClassifier if settings.kind == "random_forest" else ExtraTreesClassifier
    estimator = kind(
        max_depth=settings.max_depth,
        min_samples_leaf=settings.min_samples_leaf,
        max_features=settings.max_features,
        random_state=settings.seed,
        n_jobs=threads,
        warm_start=True,  # in steps, each tree with the seed it has when all are trained at once
    )
    for n_trained in range(0, settings.n_trees, _TREES_PER_REPORT):
        if progress:
            progress("training trees", n_trained, settings.n_trees)
        estimator.set_params(n_estimators=min(n_trained + _TREES_PER_REPORT, settings.n_trees))
        estimator.fit(features, labels)
    if progress:
        progress("training trees", settings.n_trees, settings.n_trees)
    return Forest.from_sklearn(estimator, pattern, n_classes, merge)


# --- from scikit-learn ----------------------------------------------------------------------------


class _Leaves:
    """Codes of leaves; those that hold several classes, few unless depth or leaf size is limited,
    are numbered as they come. ``classes``: the class of each label the estimator has seen."""

    def __init__(self, classes: NDArray[np.integer], n_classes: int) -> None:
        self.classes, self.n_classes = classes, n_classes
        self.rows = [np.empty((0, n_classes))]
        self._n_rows = 0

    def codes(self, shares: NDArray[np.float64]) -> NDArray[np.int64]:
        """(n_leaves,) codes for (n_leaves, seen labels) shares."""
        codes: NDArray[np.int64] = self.classes[shares.argmax(axis=1)].astype(np.int64)
        has_several = np.count_nonzero(shares, axis=1) != 1
        candidates = np.flatnonzero(has_several | (shares.max(axis=1) != 1))
        rows = np.zeros((len(candidates), self.n_classes))
        for n, label_class in enumerate(self.classes):
            rows[:, label_class] += shares[candidates, n]
        merged = has_several[candidates] & (np.count_nonzero(rows, axis=1) == 1)
        rows = rows[~merged]
        codes[candidates[~merged]] = self.n_classes + self._n_rows + np.arange(len(rows))
        self.rows.append(rows)
        self._n_rows += len(rows)
        return codes


def _flatten(tree: Any, leaves: _Leaves) -> NDArray[np.void]:
    """Nodes of one of scikit-learn's trees, siblings side by side."""
    is_inner = tree.children_left >= 0
    # The r-th inner node's children stand at 1 + 2r and 2 + 2r. scikit-learn numbers nodes depth
    # first (best first under max_leaf_nodes), always a parent before its children, and so do we.
    left = 1 + 2 * (np.cumsum(is_inner) - 1)
    place = np.zeros(tree.node_count, np.int64)
    place[tree.children_left[is_inner]] = left[is_inner]
    place[tree.children_right[is_inner]] = left[is_inner] + 1

    nodes = np.zeros(tree.node_count, NODE)
    inner, leaf = place[is_inner], place[~is_inner]
    nodes["threshold"][inner] = _integer_thresholds(tree.threshold[is_inner])
    nodes["feature"][inner] = tree.feature[is_inner]
    nodes["left"][inner] = left[is_inner]
    nodes["left"][leaf] = ~leaves.codes(tree.value[~is_inner, 0])
    return nodes


def _integer_thresholds(thresholds: NDArray[np.float64]) -> NDArray[np.int16]:
    """int16 thresholds that part int16 voxels as scikit-learn's float64 ones do.

    scikit-learn sends a voxel x left where float32(x) <= t. An int16 is a float32 exactly, and for
    an integer x, x <= t just where x <= floor(t). Where floor(t) is above every int16, all go left,
    and so they do at 32767. Where it is below every int16 none would go left, which no int16 can
    say; but a threshold lies between two values seen in training, so this is no forest of voxels.
    """
    floors = np.floor(thresholds)
    if not (floors >= -32768).all():  # NaN, too
        raise ValueError("the forest has a threshold below -32768; it was not trained on int16 HU")
    whole: NDArray[np.int16] = np.minimum(floors, 32767).astype(np.int16)
    return whole


# --- what must hold before the kernel runs --------------------------------------------------------


def _check_merge(merge: NDArray[np.integer] | None, n_classes: int) -> None:
    if merge is None:
        return
    if merge.ndim != 1 or merge.dtype.kind not in "iu" or len(merge) == 0:
        raise ValueError(f"merge is {merge.shape} {merge.dtype}; give one integer per label")
    if merge.min() < 0 or merge.max() >= n_classes:
        raise ValueError(
            f"merge leads to classes {merge.min()} to {merge.max()}; give 0 to {n_classes - 1}"
        )


def _check_offsets(offsets: NDArray[np.int32]) -> None:
    if offsets.shape[1] != 4 or not 1 <= len(offsets) <= MAX_FEATURES:
        raise ValueError(
            f"a pattern of {len(offsets)} features does not fit the forest, whose nodes hold 1 to "
            f"{MAX_FEATURES}; use a smaller pattern"
        )
    if offsets[:, 0].min() < 0 or offsets.min() <= -MAX_REACH or offsets.max() >= MAX_REACH:
        raise ValueError(f"the pattern reaches {MAX_REACH} voxels or more")


def _check_trees(nodes: NDArray[np.void], starts: NDArray[np.int64], n_features: int) -> None:
    """Each tree is one: from its root every node of it is reached, once, and no other.

    Children come after their parents, in pairs (1, 2), (3, 4) ... of which each has one parent: so
    going from a node to its parent ends at the root.
    """
    n_nodes = len(nodes)
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != n_nodes or n_nodes > 2**31 - 1:
        raise ValueError("the trees do not cover the nodes")
    if not (starts[1:] > starts[:-1]).all():
        raise ValueError("a tree has no node")
    sizes = np.diff(starts).astype(np.int32)
    start_of = np.repeat(starts[:-1].astype(np.int32), sizes)
    size_of = np.repeat(sizes, sizes)
    left = np.ascontiguousarray(nodes["left"])
    inner = np.flatnonzero(left >= 0)
    child, start = left[inner], start_of[inner]
    if (child <= inner - start).any():
        raise ValueError("a node stands before its parent")
    if (child % 2 != 1).any() or (child >= size_of[inner] - 1).any():
        raise ValueError("a node has children outside its tree")
    has_parent = np.zeros(n_nodes, bool)
    has_parent[child + start] = True
    n_parents = np.add.reduceat((left >= 0).astype(np.int32), starts[:-1])
    if np.count_nonzero(has_parent) != len(inner) or (2 * n_parents + 1 != sizes).any():
        raise ValueError("a node has no parent, or two")
    if int(nodes["feature"].max()) >= n_features:
        raise ValueError(f"a node reads feature {nodes['feature'].max()} of {n_features}")


def _check_leaves(nodes: NDArray[np.void], leaf_table: NDArray[np.float64], n_classes: int) -> None:
    if leaf_table.shape[1] != n_classes:
        raise ValueError(f"the leaf table has {leaf_table.shape[1]} classes, not {n_classes}")
    if ~int(nodes["left"].min()) >= n_classes + len(leaf_table):
        raise ValueError("a leaf is not in the leaf table")
    if not np.isfinite(leaf_table).all() or (leaf_table < 0).any():
        raise ValueError("the leaf table holds values that are no probabilities")
    if (abs(leaf_table.sum(axis=1) - 1) > 1e-6).any():
        raise ValueError("a row of the leaf table does not sum to 1")
