"""A CT scan in memory: int16 voxels as the file stores them, and where they lie in the patient.

Two axis orders occur, and no third one::

    stored    as in the file, ``hu[a, b, c]``; the affine belongs to it
    working   ``[k, i, j]`` = slice (inferior -> superior), row (posterior -> anterior),
              column (left -> right); always a strided view of the stored array, never a copy

The working order is nibabel's closest canonical orientation (RAS+) with its axes reversed, so that
for the commonest files the innermost loop runs along memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Orientation", "Volume"]

AIR_HU = -1024


@dataclass(frozen=True)
class Orientation:
    """How stored axes become working axes.

    Parameters
    ----------
    axes : tuple of int
        ``axes[w]`` is the stored axis that working axis ``w`` (k, i, j) reads.
    flips : tuple of bool
        ``flips[w]``: working axis ``w`` runs against its stored axis.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @staticmethod
    def of_affine(affine: NDArray[np.float64]) -> Orientation:
        """The closest canonical orientation of a voxel -> RAS+ mm affine.

        Stored axes are matched to world axes by the largest direction cosine first.
        """
        directions = np.asarray(affine, np.float64)[:3, :3]
        cosines = np.abs(directions / np.linalg.norm(directions, axis=0))
        stored_of_world = [0, 0, 0]
        left = cosines.copy()
        for _ in range(3):
            world, stored = np.unravel_index(int(np.argmax(left)), left.shape)
            stored_of_world[world] = int(stored)
            left[world, :] = -1
            left[:, stored] = -1
        axes = (stored_of_world[2], stored_of_world[1], stored_of_world[0])
        flips = tuple(bool(directions[2 - w, axes[w]] < 0) for w in range(3))
        return Orientation(axes, flips)  # type: ignore[arg-type]  # three flips by construction

    def working(self, stored: NDArray) -> NDArray:  # type: ignore[type-arg]
        """View of a stored array in working order; writing to it writes the stored array."""
        view = stored.transpose(self.axes)
        return view[tuple(slice(None, None, -1 if f else 1) for f in self.flips)]

    def stored(self, working: NDArray) -> NDArray:  # type: ignore[type-arg]
        """View of a working array in stored order: the inverse of :meth:`working`."""
        view = working[tuple(slice(None, None, -1 if f else 1) for f in self.flips)]
        return view.transpose(np.argsort(self.axes))

    def working_affine(
        self, affine: NDArray[np.float64], shape: tuple[int, ...]
    ) -> NDArray[np.float64]:
        """Affine from working (k, i, j) to RAS+ mm.

        Parameters
        ----------
        affine : (4, 4) float64
            Stored voxel index -> RAS+ mm.
        shape : tuple of int
            Voxels along the stored axes.
        """
        to_stored = np.zeros((4, 4))
        to_stored[3, 3] = 1
        for w, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            to_stored[axis, w] = -1 if flip else 1
            to_stored[axis, 3] = shape[axis] - 1 if flip else 0
        return np.asarray(affine, np.float64) @ to_stored

    def stored_index(
        self, working_index: tuple[float, float, float], shape: tuple[int, ...]
    ) -> tuple[float, float, float]:
        """An index of the stored array, not rounded.

        Parameters
        ----------
        working_index : (k, i, j) float
            The same place in working order.
        shape : tuple of int
            Voxels along the stored axes.
        """
        index = [0.0, 0.0, 0.0]
        for w, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            index[axis] = shape[axis] - 1 - working_index[w] if flip else working_index[w]
        return index[0], index[1], index[2]


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT scan.

    Parameters
    ----------
    hu : (n_a, n_b, n_c) int16, HU
        Voxels, axes as stored by the file, any memory order. Values below -1024 are padding and
        count as air.
    affine : (4, 4) float64
        Stored voxel index -> RAS+ mm.

    Raises
    ------
    ValueError
        ``hu`` is not a non-empty 3-D int16 array, or the affine is not an invertible 4x4 matrix.
    """

    hu: NDArray[np.int16]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.hu.ndim != 3 or self.hu.dtype != np.int16:
            raise ValueError(
                f"a volume is a 3-D int16 array, not {self.hu.ndim}-D {self.hu.dtype}; "
                "convert it to HU first"
            )
        if 0 in self.hu.shape:
            raise ValueError(f"a volume of shape {self.hu.shape} holds no voxel")
        affine = np.array(self.affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError("the affine is not a finite 4x4 matrix")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        with np.errstate(all="ignore"):  # pivots of 1e-310
            volume = abs(np.linalg.det(affine[:3, :3]))
        if lengths.min() <= 0 or volume < 1e-6 * lengths.prod():
            raise ValueError("the affine is singular: two voxel axes point the same way")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)

    @cached_property
    def orientation(self) -> Orientation:
        """Stored axes -> working axes."""
        return Orientation.of_affine(self.affine)

    @property
    def working(self) -> NDArray[np.int16]:
        """(n_k, n_i, n_j) int16 view of ``hu`` in working order."""
        return self.orientation.working(self.hu)

    @cached_property
    def working_affine(self) -> NDArray[np.float64]:
        """(4, 4): working index (k, i, j) -> RAS+ mm."""
        return self.orientation.working_affine(self.affine, self.hu.shape)

    @property
    def working_spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along (k, i, j), mm."""
        lengths = np.linalg.norm(self.working_affine[:3, :3], axis=0)
        return float(lengths[0]), float(lengths[1]), float(lengths[2])

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000.0)

    def to_mm(self, stored_index: NDArray[np.float64]) -> NDArray[np.float64]:
        """RAS+ mm of stored voxel indices, shapes ``(..., 3)``."""
        index = np.asarray(stored_index, np.float64)
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Stored voxel indices (not rounded) of RAS+ mm points, shapes ``(..., 3)``.

        >>> import numpy as np
        >>> scan = Volume(np.zeros((4, 4, 4), np.int16), np.diag([2.0, 2.0, 5.0, 1.0]))
        >>> scan.to_index(scan.to_mm([1.0, 2.0, 3.0])).tolist()
        [1.0, 2.0, 3.0]
        """
        inverse = np.linalg.inv(self.affine)
        index: NDArray[np.float64] = np.asarray(mm, np.float64) @ inverse[:3, :3].T
        return index + inverse[:3, 3]
