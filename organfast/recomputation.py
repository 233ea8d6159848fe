"""A model's answers computed the slow way: blocks copied voxel by voxel, plain NumPy or plain JAX.

Nothing here is shared with what segments: no compiled kernel, no view of a level, no shared
convolution. Box averages are differences of sums, trees are walked on copied features, a network
is given one block at a time. Only the volume on the model grid is what the others read, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from organfast.grid import GridVolume, hu_lookup
from organfast.models.forest import Forest

if TYPE_CHECKING:
    from organfast.grid import Pattern
    from organfast.models.classifier import Model
    from organfast.models.cnn import Cnn

__all__ = ["copied_features", "recomputed_probabilities"]

_PLANES = 160
_BATCH = 64


def recomputed_probabilities(
    model: Model, volume: GridVolume, positions: NDArray[np.int32]
) -> NDArray[np.float64]:
    """What a model says at positions of a volume, computed the slow way.

    Parameters
    ----------
    model : Model
        Forest or network; its calibration is applied.
    volume : GridVolume
        On the model's grid.
    positions : (n, 3) int
        (k, i, j) in the volume.

    Returns
    -------
    (n, n_classes) float64

    Raises
    ------
    ValueError
        A position is outside the volume.
    """
    positions = np.asarray(positions, np.int64)
    inside = (positions >= 0) & (positions < np.array(volume.shape))
    if positions.ndim != 2 or positions.shape[1] != 3 or not inside.all():
        raise ValueError(f"positions must be rows (k, i, j) in a volume of shape {volume.shape}")
    features = copied_features(volume, model.pattern, positions)
    if isinstance(model.classifier, Forest):
        found = _by_trees(model.classifier, features)
    else:
        found = _by_network(model.classifier, features)
    if model.calibration is not None and len(found):
        model.calibration.apply(found, found)
    return found


def copied_features(
    volume: GridVolume, pattern: Pattern, positions: NDArray[np.integer]
) -> NDArray[np.int64]:
    """What a pattern reads around positions, each value computed for itself.

    Parameters
    ----------
    volume : GridVolume
        On the model's grid.
    pattern : Pattern
        Its offsets, and the boxes of its levels.
    positions : (n, 3) int
        (k, i, j) in the volume.

    Returns
    -------
    (n, n_features) int64
    """
    out = np.empty((len(positions), len(pattern.offsets)), np.int64)
    boxes = _Boxes(volume)
    order = np.argsort(np.asarray(positions)[:, 0], kind="stable")  # planes are summed once
    for row in order:
        for level in range(len(pattern.widths)):
            columns = np.flatnonzero(pattern.offsets[:, 0] == level)
            centres = np.asarray(positions[row], np.int64) + pattern.offsets[columns, 1:]
            box = pattern.widths[level], pattern.depths[level]
            out[row, columns] = boxes.averages(centres, *box)
    return out


class _Boxes:
    """Averages of boxes of a volume, anywhere: beside it is air, above and below its end slices."""

    def __init__(self, volume: GridVolume) -> None:
        self._volume, self._table = volume, hu_lookup(volume.hu_table).astype(np.int64)
        # Of the 26 or so planes of a box and the hundred that a pattern reaches, each is met often.
        self._sums = lru_cache(_PLANES)(self._summed)

    def _summed(self, k: int) -> NDArray[np.int64]:
        """(rows + 1, columns + 1): sum of all voxels of plane k above and left of each corner."""
        plane = self._volume.hu[k].astype(np.int64)
        if self._volume.table is not None:
            plane = self._table[plane + 32768]
        plane = np.maximum(plane, self._volume.air)
        sums = np.zeros((plane.shape[0] + 1, plane.shape[1] + 1), np.int64)
        sums[1:, 1:] = plane.cumsum(axis=0).cumsum(axis=1)
        return sums

    def averages(self, centres: NDArray[np.int64], width: int, depth: int) -> NDArray[np.int64]:
        """Half rounded up, of boxes around (m, 3) centres (k, i, j)."""
        n_k, n_rows, n_columns = self._volume.shape
        first = centres - np.array([depth, width, width]) // 2
        tops, bottoms = (np.clip(first[:, 1] + end, 0, n_rows) for end in (0, width))
        lefts, rights = (np.clip(first[:, 2] + end, 0, n_columns) for end in (0, width))
        n_inside = (bottoms - tops) * (rights - lefts)
        totals = self._volume.air * depth * (width * width - n_inside)
        for further in range(depth):
            planes = np.clip(first[:, 0] + further, 0, n_k - 1)
            for k in np.unique(planes):
                here, sums = planes == k, self._sums(int(k))
                top, bottom, left, right = (e[here] for e in (tops, bottoms, lefts, rights))
                totals[here] += (
                    sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
                )
        n = depth * width * width
        averages: NDArray[np.int64] = (2 * totals + n) // (2 * n)
        return averages


def _by_trees(forest: Forest, features: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of the leaves' shares, summed tree after tree in float64, as scikit-learn does."""
    nodes = forest.nodes
    shares = np.concatenate([np.eye(forest.n_classes), forest.leaf_table])
    rows = np.arange(len(features))
    totals = np.zeros((len(features), forest.n_classes))
    for root in forest.tree_starts[:-1]:
        here = np.full(len(features), root)
        while True:
            left = nodes["left"][here].astype(np.int64)
            is_inner = left >= 0
            if not is_inner.any():
                break
            value = features[rows, nodes["feature"][here] * is_inner]
            is_right = value > nodes["threshold"][here]
            here = np.where(is_inner, root + left + is_right, here)
        totals += shares[~left]
    return totals / forest.n_trees


def _by_network(cnn: Cnn, features: NDArray[np.int64]) -> NDArray[np.float64]:
    """Softmax of flax's own layers on one copied block after the other, float32 on the CPU."""
    import jax

    from organfast.models.devices import check_not_forked
    from organfast.models.network import logits, scaled

    check_not_forked()
    block = cnn.pattern
    shape = (-1, len(block.levels), block.slices, block.size, block.size)
    found = np.zeros((len(features), cnn.n_classes))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = {name: jax.numpy.asarray(array) for name, array in cnn.params.items()}
        for start in range(0, len(features), _BATCH):
            blocks = jax.numpy.asarray(features[start : start + _BATCH].astype(np.int16))
            x = scaled(blocks.reshape(shape), cnn.window, standardise=cnn.standardise)
            z = np.asarray(logits(cnn.architecture, params, x), np.float64)
            p = np.exp(z - z.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            for label, of_class in enumerate(cnn.merge):
                found[start : start + len(p), of_class] += p[:, label]
    return found
