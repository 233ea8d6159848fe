"""Altered copies of a labelled scan (Numba, cached). Arrays and numbers only; nothing is checked.

All volumes are [k, i, j]. HU stand in the *units* of an HU table; two arrays lead to HU and back::

    hu_of    (65536,) float32, HU of unit u at u + 32768, linear in between
    unit_of  (65536,) float32, unit of h HU at h + 32768, linear in between
"""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

# Numba's cache does not notice a change in another file: after one there, touch this file.
from organfast.kernels.painting import blur_columns, blur_rows

AIR_HU = -1024.0

GAS_HU, TISSUE_HU = -1000.0, -800.0
"""Gas keeps its HU whatever its surroundings do; changes fade in between these two."""

TEXTURE_HU = 80.0
"""Contrast about an organ's middle changes fully up to here, and not at all from twice this on."""

HISTOGRAM_HU = 4
"""Width of a bin of ``organ_histograms``; the first begins at ``AIR_HU``."""

# Columns of an organ's look.
OFFSET_HU = 0
CONTRAST = 1
MIDDLE_HU = 2


@njit(cache=True, nogil=True)
def organ_histograms(hu, organs, first, last, hu_of, counts):
    """Histograms of the HU of each organ over slices ``first .. last - 1``; added to ``counts``.

    hu : (K, R, C) int16, units; organs : (K, R, C) uint16, 0 = none of them;
    counts : (n_organs + 1, n_bins) int64; row 0 stays as it is.
    """
    top = counts.shape[1] - 1
    for k in range(first, last):
        for i in range(hu.shape[1]):
            for j in range(hu.shape[2]):
                organ = organs[k, i, j]
                if organ > 0:
                    above = hu_of[np.int64(hu[k, i, j]) + 32768] - AIR_HU
                    counts[organ, min(int(above / HISTOGRAM_HU), top)] += 1


@njit(cache=True, nogil=True)
def in_units(hu, unit_of):
    """Unit of a fractional HU; below air it is air."""
    hu = min(max(hu, AIR_HU), 32766.0)
    low = np.floor(hu)
    n = int(low) + 32768
    return unit_of[n] + (hu - low) * (unit_of[n + 1] - unit_of[n])


@njit(cache=True, nogil=True)
def fade(hu):
    """0 for gas, 1 for tissue, linear in between."""
    return min(max((hu - GAS_HU) / (TISSUE_HU - GAS_HU), 0.0), 1.0)


@njit(cache=True, nogil=True)
def organ_change(hu, look):
    """How many HU an organ of this look, (3,) float32, moves at this HU."""
    d = hu - look[MIDDLE_HU]
    # Falling back to nothing: what is far from the middle is another tissue (a vessel, an edge).
    texture = min(abs(d), max(2 * TEXTURE_HU - abs(d), 0.0))
    if d < 0:
        texture = -texture
    return fade(hu) * (look[OFFSET_HU] + look[CONTRAST] * texture)


@njit(cache=True, nogil=True)
def recolour_slice(hu, organs, k, look, hu_of, unit_of, plain, mixed, out):
    """One slice with each organ in its own new look.

    A voxel moves as the organs around it do, each by its share of the 3 x 3 x 3 neighbourhood
    (binomial weights, ends repeated): a border has the share that a blurred scan has there.

    Parameters
    ----------
    hu : (K, R, C) int16
        Units.
    organs : (K, R, C) uint16
        Row of ``look``; 0 = not an organ, unmoved.
    k : int
        The slice.
    look : (n_organs + 1, 3) float32
        Offset (HU), change of contrast (0 = none) and middle (HU) of each organ.
    hu_of, unit_of : (65536,) float32
        What happens to the whole scan is in ``hu_of``.
    plain : (65536,) int16
        Unit through ``hu_of`` and back.
    mixed : (C,) uint8
        Scratch.
    out : (R, C) int16
        Receives units.
    """
    n_k, n_i, n_j = hu.shape
    for i in range(n_i):
        own = organs[k, i]
        mixed[:] = 0
        for dk in range(-1, 2):
            for di in range(-1, 2):
                line = organs[min(max(k + dk, 0), n_k - 1), min(max(i + di, 0), n_i - 1)]
                for j in range(n_j):
                    mixed[j] |= np.uint8(line[j] != own[j])
        for j in range(n_j):
            before, after = max(j - 1, 0), min(j + 1, n_j - 1)
            unit = np.int64(hu[k, i, j]) + 32768
            alike = own[before] == own[j] and own[after] == own[j]
            if alike and not (mixed[before] or mixed[j] or mixed[after]):
                if own[j] == 0:
                    out[i, j] = plain[unit]
                    continue
                change = organ_change(hu_of[unit], look[own[j]])
            else:
                change = 0.0
                for dk in range(-1, 2):
                    for di in range(-1, 2):
                        line = organs[min(max(k + dk, 0), n_k - 1), min(max(i + di, 0), n_i - 1)]
                        for dj in range(-1, 2):
                            organ = line[min(max(j + dj, 0), n_j - 1)]
                            if organ > 0:
                                share = (2 - abs(dk)) * (2 - abs(di)) * (2 - abs(dj)) / 64.0
                                change += share * organ_change(hu_of[unit], look[organ])
            out[i, j] = np.int16(np.floor(in_units(hu_of[unit] + change, unit_of) + 0.5))


@njit(cache=True, nogil=True)
def recolour_slices(hu, organs, first, last, look, tables, out):
    """Recolour slices ``first .. last - 1``; see ``recolour_slice``.

    tables : hu_of, unit_of, plain; out : (K, R, C) int16.
    """
    hu_of, unit_of, plain = tables
    mixed = np.empty(hu.shape[2], np.uint8)
    for k in range(first, last):
        recolour_slice(hu, organs, k, look, hu_of, unit_of, plain, mixed, out[k])


@njit(cache=True, nogil=True)
def lattice_line(lattice, level, row, out):
    """A line along j of a lattice (n_k, n_i, n_j, 3) at fractional k and i; out : (n_j, 3)."""
    k = min(int(level), lattice.shape[0] - 2)
    i = min(int(row), lattice.shape[1] - 2)
    w, v = np.float32(level - k), np.float32(row - i)
    one = np.float32(1)
    for j in range(out.shape[0]):
        for c in range(3):
            low = (one - v) * lattice[k, i, j, c] + v * lattice[k, i + 1, j, c]
            high = (one - v) * lattice[k + 1, i, j, c] + v * lattice[k + 1, i + 1, j, c]
            out[j, c] = (one - w) * low + w * high


@njit(cache=True, nogil=True)
def blend(flat, at, n_j, v, u):
    """Bilinear value between voxel ``at`` of a volume in a row, and its next row and column."""
    one, row = np.uint64(1), np.uint64(n_j)
    a, b = np.float32(flat[at]), np.float32(flat[at + one])
    c, d = np.float32(flat[at + row]), np.float32(flat[at + row + one])
    a += u * (b - a)
    c += u * (d - c)
    return a + v * (c - a)


@njit(cache=True, nogil=True)
def blend_at_side(hu, k, i, j, v, u, air):
    """Bilinear value of slice k between rows i, i + 1 and columns j, j + 1; outside it is air."""
    n_i, n_j = hu.shape[1:]
    up, down = 0 <= i < n_i, 0 <= i + 1 < n_i
    left, right = 0 <= j < n_j, 0 <= j + 1 < n_j
    a = np.float32(hu[k, i, j]) if up and left else air
    b = np.float32(hu[k, i, j + 1]) if up and right else air
    c = np.float32(hu[k, i + 1, j]) if down and left else air
    d = np.float32(hu[k, i + 1, j + 1]) if down and right else air
    a += u * (b - a)
    c += u * (d - c)
    return a + v * (c - a)


@njit(cache=True, nogil=True)
def deform_slice(hu, labels, k, placement, lattice, pitch, air, unknown, line, page, out_labels):
    """One slice of the deformed scan: trilinear HU, nearest labels.

    Voxel p of the result comes from ``placement . (p, 1) + u(p)`` of the scan. ::

        beyond the sides   air, label 0
        beyond the ends    the end slice repeated, label ``unknown``

    Parameters
    ----------
    hu : (K, R, C) int16
        Units, C-contiguous.
    labels : (K, R, C) uint8 or uint16
    k : int
        Slice of the result.
    placement : (3, 4) float64
        Result voxel (k, i, j, 1) -> scan voxel.
    lattice : (n_k, n_i, n_j, 3) float32
        Displacements, scan voxels, at least 2 nodes along each axis; linear in between.
    pitch : (3,) float64
        Nodes per result voxel.
    air : float32
        Units.
    unknown : int
    line : (n_j, 3) float32
        Scratch.
    page : (R', C') float32
        Receives units, not rounded.
    out_labels : (R', C') uint8 or uint16
    """
    n_k, n_i, n_j = hu.shape
    flat = hu.reshape(-1)
    half = np.float32(0.5)
    for i in range(page.shape[0]):
        lattice_line(lattice, k * pitch[0], i * pitch[1], line)
        z0 = placement[0, 0] * k + placement[0, 1] * i + placement[0, 3]
        y0 = placement[1, 0] * k + placement[1, 1] * i + placement[1, 3]
        x0 = placement[2, 0] * k + placement[2, 1] * i + placement[2, 3]
        for j in range(page.shape[1]):
            node = j * pitch[2]
            n = min(int(node), line.shape[0] - 2)
            t = node - n
            z = z0 + placement[0, 2] * j + line[n, 0] + t * (line[n + 1, 0] - line[n, 0])
            y = y0 + placement[1, 2] * j + line[n, 1] + t * (line[n + 1, 1] - line[n, 1])
            x = x0 + placement[2, 2] * j + line[n, 2] + t * (line[n + 1, 2] - line[n, 2])
            a, b, c = int(np.floor(z)), int(np.floor(y)), int(np.floor(x))
            w, v, u = np.float32(z - a), np.float32(y - b), np.float32(x - c)
            near_k, near_i, near_j = a + (w >= half), b + (v >= half), c + (u >= half)
            if near_k < 0 or near_k >= n_k:
                out_labels[i, j] = unknown
            elif 0 <= near_i < n_i and 0 <= near_j < n_j:
                out_labels[i, j] = labels[near_k, near_i, near_j]
            else:
                out_labels[i, j] = 0
            if a < 0:
                a, w = 0, np.float32(0)
            elif a >= n_k - 1:
                a, w = n_k - 1, np.float32(0)
            if 0 <= b < n_i - 1 and 0 <= c < n_j - 1:
                # Unsigned: no index counts from the end.
                at = np.uint64((a * n_i + b) * n_j + c)
                low = blend(flat, at, n_j, v, u)
                if a < n_k - 1:
                    at += np.uint64(n_i * n_j)
                high = blend(flat, at, n_j, v, u)
            elif -1 <= b < n_i and -1 <= c < n_j:
                low = blend_at_side(hu, a, b, c, v, u, air)
                high = blend_at_side(hu, min(a + 1, n_k - 1), b, c, v, u, air)
            else:
                low = high = air
            page[i, j] = low + w * (high - low)


@njit(cache=True, nogil=True)
def random_normal(seed, n):
    """The n-th number of a sequence of about normal numbers, mean 0 and deviation 1.

    The sum of the four quarters of a 64-bit hash (splitmix64; Steele, Lea and Flood 2014).
    seed, n : uint64.
    """
    z = seed + (n + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    quarter = np.uint64(0xFFFF)
    total = (z & quarter) + ((z >> np.uint64(16)) & quarter)
    total += ((z >> np.uint64(32)) & quarter) + (z >> np.uint64(48))
    return (float(total) - 131070.0) / 37837.226


@njit(cache=True, nogil=True)
def finish_page(page, k, noise_hu, seed, hu_of, unit_of, out):
    """A slice (R, C) of float32 units -> int16 units, rounded half up, with noise in HU.

    noise_hu : float, deviation; seed : uint64. The noise depends on these and on the position.
    """
    n_i, n_j = page.shape
    for i in range(n_i):
        for j in range(n_j):
            value = page[i, j]
            if noise_hu > 0.0:
                low = np.floor(value)
                n = int(low) + 32768
                hu = hu_of[n] + (value - low) * (hu_of[min(n + 1, 65535)] - hu_of[n])
                hu += noise_hu * random_normal(seed, np.uint64((k * n_i + i) * n_j + j))
                out[i, j] = np.int16(np.floor(in_units(hu, unit_of) + 0.5))
            else:
                out[i, j] = np.int16(np.floor(value + np.float32(0.5)))


@njit(cache=True, nogil=True)
def alter_slices(scan, first, where, scanner, out_hu, out_labels):
    """Slices ``first .. first + len(out_hu)`` of an altered copy: deformed, blurred, with noise.

    Parameters
    ----------
    scan : tuple
        hu, labels, air, unknown; see ``deform_slice``.
    first : int
    where : tuple
        placement, lattice, pitch; see ``deform_slice``.
    scanner : tuple
        taps of the in-plane blur along rows and along columns, centre first (one tap = none);
        noise_hu, seed, hu_of, unit_of, see ``finish_page``.
    out_hu : (n_k, R', C') int16
    out_labels : (n_k, R', C') uint8 or uint16
    """
    hu, labels, air, unknown = scan
    placement, lattice, pitch = where
    row_taps, column_taps, noise_hu, seed, hu_of, unit_of = scanner
    line = np.empty((lattice.shape[2], 3), np.float32)
    page = np.empty(out_hu.shape[1:], np.float32)
    blurred = np.empty_like(page)
    for n in range(out_hu.shape[0]):
        k = first + n
        deform_slice(
            hu, labels, k, placement, lattice, pitch, air, unknown, line, page, out_labels[n]
        )
        if row_taps.shape[0] > 1 or column_taps.shape[0] > 1:
            blur_rows(page, row_taps, blurred)
            blur_columns(blurred, column_taps, page)
        finish_page(page, k, noise_hu, seed, hu_of, unit_of, out_hu[n])
