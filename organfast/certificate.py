"""The equivalence certificate: is what the fast way says of this scan what the slow way says?

Voxels of the scan are drawn, half of them in organs. The positions around each are asked again
by ``recomputation``, their probabilities compared with those that the segmentation used, blended
in float64 and the most probable class compared with the voxel's label, before any cleaning and
before the scan's own organs correct it, where the model does that (``adaptation``).
Besides: how many labels would be others if every voxel of the model grid were a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.body import body_mask
from organfast.errors import is_whole
from organfast.grid import BlockGrid
from organfast.models.classifier import Model, load_model
from organfast.pipeline import Settings
from organfast.probability import (
    BACKGROUND,
    AxisWeights,
    Enlargement,
    Slab,
    SliceClassifier,
    label_volume,
    probability_slabs,
)
from organfast.progress import Progress, silent
from organfast.recomputation import recomputed_probabilities
from organfast.sampling import on_model_grid
from organfast.scans import as_scan
from organfast.verification import Verification, verify
from organfast.workers import Workers

__all__ = ["Certificate", "certify"]

TIE = 1e-5
"""Two classes whose probabilities differ by no more are as probable: rounding decides."""


@dataclass(frozen=True)
class Certificate:
    """What recomputing a sample of a scan the slow way found.

    Parameters
    ----------
    n_voxels : int
        Voxels of the scan that were drawn.
    n_positions : int
        Positions around them inside the body, each recomputed.
    largest_difference : float
        Between the probabilities of the two ways, of any class at any of these positions.
    flipped_positions : int
        Positions whose most probable class is another.
    flipped_voxels : int
        Voxels whose label is another.
    tied : int
        Positions and voxels that are of another class and no flip: the slow way's best class is as
        probable to five digits.
    stride : (int, int, int)
        Columns, rows, slices between positions.
    stride_one : Verification or None
        The label maps at this stride (the reference) and at stride 1, compared; None where it was
        not asked for.
    """

    n_voxels: int
    n_positions: int
    largest_difference: float
    flipped_positions: int
    flipped_voxels: int
    tied: int
    stride: tuple[int, int, int]
    stride_one: Verification | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        stride_one = None if self.stride_one is None else self.stride_one.to_dict()
        return {**asdict(self), "stride_one": stride_one}


def certify(
    scan: Any,
    model: Model | str | PathLike[str],
    n_voxels: int = 200,
    seed: int = 0,
    *,
    stride_one: bool = True,
    threads: int = 1,
    progress: Progress = silent,
) -> Certificate:
    """Recompute a sample of a scan's labels the slow way, and compare.

    Parameters
    ----------
    scan : path, nibabel image, Volume, Scan or (array, affine)
        The CT scan.
    model : Model or path
        What ``train`` or ``load_model`` returned, or a ``.organfast`` file.
    n_voxels : int
        Voxels to draw, half of them in organs where the scan has any.
    seed : int
        Of the draw.
    stride_one : bool
        Segment at stride 1, too, and count the labels that change.
    threads : int
        Threads of the fast way; the certificate does not depend on them.
    progress : callable, optional
        Called with (what, done, total).

    Raises
    ------
    InputError
        The scan or the model cannot be used.
    ValueError
        ``n_voxels`` is not a whole number from 1.
    """
    if not is_whole(n_voxels, 1):
        raise ValueError(f"n_voxels is {n_voxels!r}; give a whole number from 1")
    model = model if isinstance(model, Model) else load_model(model)
    name = fspath(scan) if isinstance(scan, (str, PathLike)) else "the given scan"
    scan = as_scan(scan)
    with Workers(threads) as workers:
        grid_volume = on_model_grid(name, scan.volume, model.grid, workers)
        grid = BlockGrid(grid_volume.shape, model.stride)
        mask = body_mask(grid_volume, grid)
        shape = scan.volume.working.shape
        enlargement = Enlargement.to_scan(grid, grid_volume, shape)
        slices = SliceClassifier(
            grid_volume, model.classifier, model.pattern, grid, workers, model.calibration
        )
        labels = np.zeros(shape, np.uint16)
        slabs = probability_slabs(slices, mask, workers)
        label_volume(_told(slabs, len(mask), progress), enlargement, labels, workers)
        voxels = _drawn_voxels(labels, model, enlargement, mask, n_voxels, seed)
        corners, weights = _surroundings(voxels, enlargement)
        asked, place = np.unique(corners.reshape(-1, 3), axis=0, return_inverse=True)
        fast = _of_slabs(probability_slabs(slices, mask, workers), asked, slices.n_classes)
    slow = np.zeros_like(fast)
    slow[:, BACKGROUND] = 1
    is_inside = mask[tuple(asked.T)]
    centres = np.stack([c[n] for c, n in zip(grid.centres, asked.T, strict=True)], axis=1)
    progress("recomputing", 0, 1)
    slow[is_inside] = recomputed_probabilities(model, grid_volume, centres[is_inside])
    progress("recomputing", 1, 1)
    blended = (slow[place.reshape(weights.shape)] * weights[..., None]).sum(axis=1)
    at_positions = _flips(slow, fast.argmax(axis=1))
    at_voxels = _flips(blended, labels[tuple(voxels.T)].astype(np.int64))
    one = None
    if stride_one:
        at_one = Settings(stride=(1, 1, 1))
        one = verify(scan, model, at_one, threads=threads, progress=progress)
    return Certificate(
        n_voxels=len(voxels),
        n_positions=int(is_inside.sum()),
        largest_difference=float(np.abs(slow - fast).max(initial=0)),
        flipped_positions=at_positions[0],
        flipped_voxels=at_voxels[0],
        tied=at_positions[1] + at_voxels[1],
        stride=model.stride[::-1],
        stride_one=one,
    )


def _flips(slow: NDArray[np.float64], taken: NDArray[np.int64]) -> tuple[int, int]:
    """How often the fast way took a class that is not the slow way's best, and how often a tie."""
    behind = slow.max(axis=1, initial=0) - slow[np.arange(len(slow)), taken]
    differs = slow.argmax(axis=1) != taken
    return int((differs & (behind > TIE)).sum()), int((differs & (behind <= TIE)).sum())


def _told(slabs: Iterable[Slab], total: int, progress: Progress) -> Iterator[Slab]:
    for n, slab in slabs:
        yield n, slab
        progress("segmenting", n + 1, total)


def _drawn_voxels(
    labels: NDArray[np.uint16],
    model: Model,
    enlargement: Enlargement,
    mask: NDArray[np.bool_],
    n: int,
    seed: int,
) -> NDArray[np.int64]:
    """(n, 3) voxels: half in organs, the others in the body, whatever they are."""
    rng = np.random.default_rng(seed)
    in_organs = np.flatnonzero(np.isin(labels, model.classes.organs))
    drawn = [rng.choice(in_organs, min(n // 2, len(in_organs)), replace=False)]
    inside = np.argwhere(mask)
    n_left = n - len(drawn[0])
    axes = (enlargement.k, enlargement.i, enlargement.j)
    near = inside[rng.integers(len(inside), size=n_left)] if len(inside) else np.zeros((0, 3), int)
    beside = [
        np.clip(
            np.rint(axis.centres[at] + rng.uniform(-0.5, 0.5, len(at)) * _apart(axis)), 0, size - 1
        )
        for axis, at, size in zip(axes, near.T, labels.shape, strict=True)
    ]
    rest = np.stack(beside, axis=1).astype(np.int64)
    return np.concatenate([np.stack(np.unravel_index(drawn[0], labels.shape), axis=1), rest])


def _apart(axis: AxisWeights) -> float:
    """Voxels between positions along an axis."""
    return float(axis.centres[1] - axis.centres[0]) if len(axis.centres) > 1 else 1.0


def _surroundings(
    voxels: NDArray[np.int64], enlargement: Enlargement
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The eight positions around each voxel, (n, 8, 3), and their weights, (n, 8)."""
    corners = np.empty((len(voxels), 8, 3), np.int64)
    weights = np.ones((len(voxels), 8))
    for a, axis in enumerate((enlargement.k, enlargement.i, enlargement.j)):
        at, last = voxels[:, a], len(axis.centres) - 1
        step = _apart(axis)
        # Not from the table of the fast way: a voxel's place between the centres, by definition.
        place = np.clip((at - axis.centres[0]) / step, 0, last)
        lower = np.minimum(place.astype(np.int64), max(last - 1, 0))
        for corner in range(8):
            after = corner >> a & 1
            corners[:, corner, a] = np.minimum(lower + after, last)
            weights[:, corner] *= place - lower if after else 1 - (place - lower)
    return corners, weights


def _of_slabs(
    slabs: Iterable[Slab], asked: NDArray[np.int64], n_classes: int
) -> NDArray[np.float64]:
    found = np.empty((len(asked), n_classes))
    for n, slab in slabs:
        here = np.flatnonzero(asked[:, 0] == n)
        found[here] = slab[asked[here, 1], asked[here, 2]]
    return found
