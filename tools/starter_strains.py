"""A labelled scan as others might have made it: thick slices, a sharp kernel, a narrow view, slabs.

Used by ``train_starter.py``: a model that never saw the patient is judged by each of these. The
body is the same one, so a strain tells what a scanner or a protocol costs, not what another patient
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, rotate

from organfast.volume import Volume

THICK_MM = 5.0
NARROW_MM = 280.0
SLAB_MM, SLAB_EVERY_MM = 100.0, 70.0
SHARP, BLUR_MM = 1.5, 0.9  # so much of what a blur takes away is added again
NOISE_HU = 15.0
TURN_DEG = 12.0
AIR_HU = -1024

Pair = tuple[Volume, NDArray[np.unsignedinteger]]
Working = tuple[NDArray[np.int16], NDArray[np.unsignedinteger], NDArray[np.float64]]
Strain = Callable[..., Iterator[Working]]


def strained(
    volume: Volume, labels: NDArray[np.unsignedinteger]
) -> Iterator[tuple[str, Iterator[Pair]]]:
    """By strain: scans, each with its labels as stored; made as they are asked for.

    Parameters
    ----------
    volume : Volume
        A scan.
    labels : (n_a, n_b, n_c) unsigned
        Its labels, as stored.
    """
    spacing_mm = np.array(volume.working_spacing_mm)
    given = np.maximum(volume.working, AIR_HU), volume.orientation.working(labels), spacing_mm
    for name, make in _STRAINS.items():
        yield name, (_stored(*one) for one in make(*given))


def _stored(
    hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
) -> Pair:
    k, i, j = spacing_mm.tolist()
    return Volume(np.ascontiguousarray(hu).T, np.diag([j, i, k, 1.0])), labels.T


def _as_it_is(
    hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
) -> Iterator[Working]:
    yield hu, labels, spacing_mm


def _thick(
    hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
) -> Iterator[Working]:
    """Slices averaged to about 5 mm; the label is that of the middle one."""
    n = max(1, round(THICK_MM / float(spacing_mm[0])))
    whole = len(hu) // n * n
    mean = hu[:whole].reshape(-1, n, *hu.shape[1:]).mean(axis=1).round().astype(np.int16)
    yield mean, labels[n // 2 : whole : n], spacing_mm * [n, 1, 1]


def _sharp(
    hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
) -> Iterator[Working]:
    """Edges and noise as a lung kernel has them."""
    values = hu.astype(np.float32)
    values += SHARP * (values - gaussian_filter(values, BLUR_MM / spacing_mm))
    values += np.random.default_rng(0).normal(0, NOISE_HU, hu.shape).astype(np.float32)
    yield np.clip(values, AIR_HU, 3000).round().astype(np.int16), labels, spacing_mm


def _narrow(
    hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
) -> Iterator[Working]:
    """Rows and columns of the middle 28 cm alone."""
    middle = []
    for n, mm in zip(hu.shape[1:], spacing_mm[1:].tolist(), strict=True):
        wide = min(n, round(NARROW_MM / mm))
        middle.append(slice((n - wide) // 2, (n - wide) // 2 + wide))
    box = (slice(None), *middle)
    yield hu[box], labels[box], spacing_mm


def _turned(
    hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
) -> Iterator[Working]:
    """The patient lies turned about his long axis; pixels are square."""
    plane = {"axes": (1, 2), "reshape": False}
    turned = rotate(hu, TURN_DEG, order=1, cval=AIR_HU, **plane)
    yield turned, rotate(labels, TURN_DEG, order=0, **plane), spacing_mm


def _sized(size: float) -> Strain:
    def sized(
        hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
    ) -> Iterator[Working]:
        yield hu, labels, spacing_mm * size

    return sized


def _slabs(
    hu: NDArray[np.int16], labels: NDArray[np.unsignedinteger], spacing_mm: NDArray[np.float64]
) -> Iterator[Working]:
    n, every = (round(mm / float(spacing_mm[0])) for mm in (SLAB_MM, SLAB_EVERY_MM))
    for first in range(0, len(hu) - n + 1, every):
        run = slice(first, first + n)
        yield hu[run], labels[run], spacing_mm


_STRAINS: dict[str, Strain] = {
    "as it is": _as_it_is,
    "slices of about 5 mm": _thick,
    "a sharp kernel, and noise": _sharp,
    "a view of 28 cm": _narrow,
    "turned by 12°": _turned,
    "a body of .85 the size": _sized(0.85),
    "a body of 1.15 the size": _sized(1.15),
    "slabs of 10 cm": _slabs,
}
