"""What a network learns from: labelled positions of some patients' scans, and batches of them.

::

    batch of n   example e stands at (e + u) / n of all weight, u random in 0 .. 1
                 |  class 0   |  class 1   |  ...        in proportion to the classes' weights
                 | P1 | P2 |P3| P1 |  P3   |             of each class, patients alike
                       ^ any of the positions of this class and patient

so that each batch holds every class, and of a class every patient, as often as their weight asks,
up to one example. All is drawn on the device from a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from organfast.grid import GridVolume

__all__ = ["Examples", "TrainingCase", "TrainingData", "drawn"]


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """A scan and the positions of it that are learned from, or tested on.

    Parameters
    ----------
    patient : str
        Whose scan it is; several cases may be one patient's.
    grid_volume : GridVolume
        The scan on the model grid.
    positions : (n, 3) int
        (k, i, j) voxels of it.
    labels : (n,) int
        Label of each position.

    Raises
    ------
    ValueError
        Shapes or dtypes do not fit, or a position is outside the scan.
    """

    patient: str
    grid_volume: GridVolume
    positions: NDArray[np.integer]
    labels: NDArray[np.integer]

    def __post_init__(self) -> None:
        positions, labels = self.positions, self.labels
        if labels.dtype.kind not in "iu" or positions.dtype.kind not in "iu":
            raise ValueError(
                f"positions are {positions.dtype} and labels {labels.dtype}; give integers"
            )
        if labels.ndim != 1 or positions.shape != (len(labels), 3):
            raise ValueError(
                f"positions are {positions.shape} and labels {labels.shape}; give (n, 3) and (n,)"
            )
        if len(labels) and (
            positions.min() < 0 or (positions.max(axis=0) >= self.grid_volume.shape).any()
        ):
            raise ValueError(
                f"a position is outside the scan of {self.patient}, whose shape is "
                f"{self.grid_volume.shape} (k, i, j)"
            )


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Everything that a network learns from and is tested on.

    Parameters
    ----------
    train : sequence of TrainingCase
        What is learned from.
    validation : sequence of TrainingCase
        Cases of other patients, on which it is decided when to stop; may be empty.
    n_classes : int
        Classes of the model.
    merge : (n_labels,) int, optional
        Class of each label, where more is told apart than the classes; by default each class is
        its own label.
    class_weights : sequence of float, optional
        How often each class is drawn, relative to the others; by default all alike.
    patients_alike : bool
        Draw each patient who has a class as often for it, however few positions there are of it;
        else each position as often.
    partners : sequence of int, optional
        Label of the other side of each label, itself where there is but one; negative where the
        other side is no label. Needed only where blocks are mirrored.

    Raises
    ------
    ValueError
        A patient both trains and validates, a label or class is out of range, there is no
        position, or the scans' HU tables differ.
    """

    train: Sequence[TrainingCase]
    validation: Sequence[TrainingCase]
    n_classes: int
    merge: NDArray[np.integer] | None = None
    class_weights: Sequence[float] | None = None
    patients_alike: bool = True
    partners: Sequence[int] | None = None

    def __post_init__(self) -> None:
        both = {c.patient for c in self.train} & {c.patient for c in self.validation}
        if both:
            raise ValueError(f"patient {min(both)} both trains and validates; give each to one")
        merge = self.class_of
        if merge.ndim != 1 or merge.dtype.kind not in "iu" or not len(merge):
            raise ValueError(f"merge is {merge.shape} {merge.dtype}; give one class per label")
        if merge.min() < 0 or merge.max() >= self.n_classes:
            raise ValueError(
                f"merge leads to classes {merge.min()} to {merge.max()}; give 0 to "
                f"{self.n_classes - 1}"
            )
        if not any(len(case.labels) for case in self.train):
            raise ValueError("no position to train on; label at least one voxel")
        for case in (*self.train, *self.validation):
            if len(case.labels) and not 0 <= case.labels.min() <= case.labels.max() < self.n_labels:
                raise ValueError(
                    f"labels of {case.patient} are {case.labels.min()} to {case.labels.max()}; "
                    f"give 0 to {self.n_labels - 1}"
                )
        tables = {case.grid_volume.hu_table for case in (*self.train, *self.validation)}
        if len(tables) > 1:
            raise ValueError(f"scans have passed different HU tables ({', '.join(sorted(tables))})")
        weights = self.weights
        if weights.shape != (self.n_classes,) or not (weights >= 0).all() or not weights.any():
            raise ValueError(
                f"class_weights is {self.class_weights!r}; give {self.n_classes} numbers from 0, "
                "not all 0"
            )
        self._check_partners()

    def _check_partners(self) -> None:
        if self.partners is None:
            return
        partners = np.asarray(self.partners)
        if partners.shape != (self.n_labels,) or partners.dtype.kind not in "iu":
            raise ValueError(f"partners are {partners.shape}; give one label per label")
        known = np.flatnonzero(partners >= 0)
        if (partners[known] >= self.n_labels).any() or (partners[partners[known]] != known).any():
            raise ValueError("partners do not come in pairs; a partner's partner is the label")

    @property
    def class_of(self) -> NDArray[np.integer]:
        """(n_labels,) class of each label."""
        return np.arange(self.n_classes) if self.merge is None else self.merge

    @property
    def n_labels(self) -> int:
        """What the network tells apart."""
        return len(self.class_of)

    @property
    def weights(self) -> NDArray[np.float64]:
        """(n_classes,) how often each class is drawn."""
        if self.class_weights is None:
            return np.ones(self.n_classes)
        return np.asarray(self.class_weights, np.float64)

    @property
    def hu_table(self) -> str:
        """Name of the scans' HU table."""
        return self.train[0].grid_volume.hu_table

    def digest(self) -> str:
        """SHA-256 of everything, also of the scans: does not depend on how they lie in memory."""
        found = hashlib.sha256()
        for use, cases in (("train", self.train), ("validation", self.validation)):
            for case in cases:
                volume = case.grid_volume
                found.update(repr((use, case.patient, volume.shape, volume.hu_table)).encode())
                found.update(b"as it is" if volume.table is None else b"through the table")
                for hu in volume.hu:
                    found.update(np.ascontiguousarray(hu).data)
                found.update(np.ascontiguousarray(case.positions, "<i8").data)
                found.update(np.ascontiguousarray(case.labels, "<i8").data)
        rest = (self.class_of.tolist(), self.weights.tolist(), self.partners and [*self.partners])
        found.update(repr(rest).encode())
        if not self.patients_alike:
            found.update(b"positions alike")
        return found.hexdigest()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cases", "positions", "labels", "starts", "counts", "edges"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class Examples:
    """Training positions by class and patient, ready to be drawn from; a pytree.

    Parameters
    ----------
    cases : (n,) int32
        Number of the case.
    positions : (n, 3) int32
        (k, i, j).
    labels : (n,) int32
        Their labels.
    starts, counts : (g,) int32
        Where the positions of a class and patient begin, and how many there are.
    edges : (g,) float32
        Where the share of a class and patient ends, of all that are drawn; ascending to 1.
    """

    cases: jax.Array | NDArray[np.int32]
    positions: jax.Array | NDArray[np.int32]
    labels: jax.Array | NDArray[np.int32]
    starts: jax.Array | NDArray[np.int32]
    counts: jax.Array | NDArray[np.int32]
    edges: jax.Array | NDArray[np.float32]

    @staticmethod
    def of(data: TrainingData) -> Examples:
        """The training cases' positions, on the host.

        Parameters
        ----------
        data : TrainingData
            Its training cases.

        Raises
        ------
        ValueError
            No class that is drawn has a position.
        """
        everyone = sorted({case.patient for case in data.train})
        patients = np.concatenate(
            [np.full(len(c.labels), everyone.index(c.patient)) for c in data.train]
        )
        labels = np.concatenate([case.labels for case in data.train]).astype(np.int32)
        classes = data.class_of[labels]
        drawn_at_all = np.flatnonzero(data.weights[classes] > 0)
        if not len(drawn_at_all):
            raise ValueError("no class with a weight has a position; change class_weights")
        order = drawn_at_all[np.lexsort((patients[drawn_at_all], classes[drawn_at_all]))]
        group = classes[order] * len(everyone) + patients[order]
        groups, starts, counts = np.unique(group, return_index=True, return_counts=True)
        of_class = groups // len(everyone)
        share = np.ones(len(groups)) if data.patients_alike else counts.astype(float)
        total = np.bincount(of_class, share, minlength=data.n_classes)
        weights = data.weights[of_class] * share / total[of_class]
        edges = np.cumsum(weights) / weights.sum()
        cases = np.concatenate([np.full(len(c.labels), n) for n, c in enumerate(data.train)])
        positions = np.concatenate([case.positions for case in data.train])
        return Examples(
            cases[order].astype(np.int32),
            positions[order].astype(np.int32),
            labels[order],
            starts.astype(np.int32),
            counts.astype(np.int32),
            edges.astype(np.float32),
        )


def drawn(key: jax.Array, n: int, examples: Examples) -> jax.Array:
    """A batch: numbers of ``n`` examples, (n,) int32; see the drawing above.

    Parameters
    ----------
    key : jax key
        All is drawn from it.
    n : int
        Examples in the batch.
    examples : Examples
        What is drawn from.
    """
    which, within = jax.random.uniform(key, (2 * n,)).reshape(2, n)
    share = (jnp.arange(n, dtype=jnp.float32) + which) / n
    group = jnp.searchsorted(examples.edges, share, side="right", method="compare_all")
    group = jnp.minimum(group, len(examples.edges) - 1)
    count = jnp.asarray(examples.counts)[group]
    number = jnp.minimum((within * count.astype(jnp.float32)).astype(jnp.int32), count - 1)
    return jnp.asarray(examples.starts)[group] + number
