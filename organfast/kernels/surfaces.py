"""Surfaces of masks and the gaps between two of them (Numba, cached). Numbers only, no checks.

A surface runs between voxels, so it is described at voxel *corners*: a map of K x I x J voxels has
(K + 1) x (I + 1) x (J + 1) of them, and outside the map there is nothing. A corner's *code* has a
bit for each of the eight voxels around it: ``1 << (4 dk + 2 di + dj)`` for voxel
``(k - 1 + dk, i - 1 + di, j - 1 + dj)``. The surface passes where the code is neither 0 nor 255.

::

    inside --(corner_codes)--> codes --(squared_in_planes)--> nearest corner of the surface in the
    same plane --(gaps_to)--> of the whole surface, at the corners of the other surface
"""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

N_BINS = 4096


@njit(cache=True, nogil=True)
def corner_codes(inside, codes):
    """Write the code of every corner; returns how many corners the surface passes.

    inside : (K, I, J) uint8, 0 or 1, C order; codes : (K + 1, I + 1, J + 1) uint8, C order
    """
    n_k, n_i, n_j = inside.shape
    n_passed = 0
    for k in range(n_k + 1):
        for i in range(n_i + 1):
            row = codes[k, i]
            row[:] = 0
            for dk in range(2):
                for di in range(2):
                    if not (0 <= k - 1 + dk < n_k and 0 <= i - 1 + di < n_i):
                        continue
                    voxels = inside[k - 1 + dk, i - 1 + di]
                    before, after = np.uint8(4 * dk + 2 * di), np.uint8(4 * dk + 2 * di + 1)
                    for j in range(n_j):
                        row[j + 1] |= np.uint8(voxels[j] << before)
                    for j in range(n_j):
                        row[j] |= np.uint8(voxels[j] << after)
            for j in range(n_j + 1):
                n_passed += (row[j] != 0) & (row[j] != 255)
    return n_passed


@njit(cache=True, nogil=True)
def squared_in_planes(codes, step_i, step_j, squared, passed):
    """Squared distance, mm2, from each corner to the nearest one of the surface in its plane k.

    The lower envelope of parabolas, row by row and then column by column (Felzenszwalb and
    Huttenlocher 2012, Theory of Computing 8(19)); linear in the number of corners.

    codes   : (K, I, J) uint8, C order
    squared : (K, I, J) float32, C order; written where ``passed``
    passed  : (K,) bool, written: whether the surface has a corner in the plane
    """
    n_k, n_i, n_j = codes.shape
    rows = np.empty(n_i, np.int64)
    # Of one column: the rows of the envelope's parabolas, their values, and where each begins.
    apex = np.empty(n_i, np.int64)
    value = np.empty(n_i, np.float64)
    begins = np.empty(n_i + 1, np.float64)
    columns = np.empty((n_j, n_i), np.float32)
    for k in range(n_k):
        n_rows = 0
        for i in range(n_i):
            if distances_in_row(codes[k, i], step_j, squared[k, i]):
                rows[n_rows] = i
                n_rows += 1
        passed[k] = n_rows > 0
        if n_rows == 0:
            continue
        for n in range(n_rows):  # columns side by side in memory: read and written row by row
            for j in range(n_j):
                columns[j, n] = squared[k, rows[n], j]
        for j in range(n_j):
            n_apex = envelope(columns[j], rows, n_rows, step_i, apex, value, begins)
            at = 0
            for i in range(n_i):
                while at + 1 < n_apex and begins[at + 1] < i:
                    at += 1
                away = step_i * (i - apex[at])
                columns[j, i] = value[at] + away * away
        for i in range(n_i):
            for j in range(n_j):
                squared[k, i, j] = columns[j, i]


@njit(cache=True, nogil=True)
def distances_in_row(codes, step, squared):
    """Squared distance, mm2, to the nearest corner of the surface in the row; False without one."""
    far = codes.size
    since = far
    for j in range(codes.size):
        since = 0 if 0 < codes[j] < 255 else since + 1
        squared[j] = since
    if since >= far:
        return False
    since = 2 * far
    for j in range(codes.size - 1, -1, -1):
        since = 0 if squared[j] == 0 else since + 1
        away = step * min(float(since), float(squared[j]))
        squared[j] = away * away
    return True


@njit(cache=True, nogil=True)
def envelope(values, rows, n_rows, step, apex, value, begins):
    """Lower envelope of the parabolas ``values[n] + (step (i - rows[n]))^2``.

    apex, value, begins : written: row and value of each parabola of the envelope, and the row, not
    rounded, from which on it is the lowest; returns how many there are
    """
    apex[0], value[0] = rows[0], values[0]
    begins[0] = -np.inf
    n_apex = 1
    scale = 0.5 / (step * step)
    for n in range(1, n_rows):
        row, height = rows[n], np.float64(values[n])
        while True:
            last = apex[n_apex - 1]
            meet = 0.5 * (row + last) + scale * (height - value[n_apex - 1]) / (row - last)
            if meet > begins[n_apex - 1]:
                break
            n_apex -= 1
        apex[n_apex], value[n_apex], begins[n_apex] = row, height, meet
        n_apex += 1
    return n_apex


@njit(cache=True, nogil=True)
def gaps_to(codes, squared, passed, step_k, areas, gaps, weights):
    """Distance, mm, from each corner of one surface to the nearest corner of another.

    codes    : (K, I, J) uint8 of the one
    squared, passed, step_k : of the other, by ``squared_in_planes``; it has a corner somewhere
    areas    : (256,) float64, area of the surface at a corner by its code
    gaps     : (n,) float32, written, n being what ``corner_codes`` returned
    weights  : (n,) float32, written: areas
    """
    n_k, n_i, n_j = codes.shape
    n = 0
    for k in range(n_k):
        for i in range(n_i):
            for j in range(n_j):
                code = codes[k, i, j]
                if code == 0 or code == 255:
                    continue
                best = np.inf
                for away in range(max(k + 1, n_k - k)):
                    along = (step_k * away) ** 2
                    if along >= best:
                        break
                    if k >= away and passed[k - away]:
                        best = min(best, along + squared[k - away, i, j])
                    if k + away < n_k and passed[k + away]:
                        best = min(best, along + squared[k + away, i, j])
                gaps[n] = np.sqrt(best)
                weights[n] = areas[code]
                n += 1


@njit(cache=True, nogil=True)
def gap_sums(gaps, weights, within):
    """Of the weights: all, times the gaps, and those whose gap is at most ``within``.

    gaps, weights : (n,) float32; returns three float64
    """
    total, weighted, near = 0.0, 0.0, 0.0
    for n in range(gaps.size):
        weight = np.float64(weights[n])
        total += weight
        weighted += weight * gaps[n]
        if gaps[n] <= within:
            near += weight
    return total, weighted, near


@njit(cache=True, nogil=True)
def weighted_percentile(gaps, weights, share):
    """The smallest gap at which ``share`` of the weight has gaps no greater.

    Only the gaps of one of many equally wide bins are sorted.

    gaps, weights : (n,) float32, n > 0; share : 0..1
    """
    greatest = np.float64(gaps.max())
    per_bin = N_BINS / greatest if greatest > 0 else 0.0
    bins = np.zeros(N_BINS + 1, np.float64)
    for n in range(gaps.size):
        bins[int(gaps[n] * per_bin)] += weights[n]
    wanted = share * bins.sum()
    below, chosen = 0.0, 0
    while chosen < N_BINS and (bins[chosen] == 0 or below + bins[chosen] < wanted):
        below += bins[chosen]
        chosen += 1
    here = np.empty(gaps.size, np.int64)
    n_here = 0
    for n in range(gaps.size):
        if int(gaps[n] * per_bin) == chosen:
            here[n_here] = n
            n_here += 1
    if n_here == 0:
        return greatest  # rounding left a little weight wanting after the last bin
    here = here[:n_here]
    order = here[np.argsort(gaps[here], kind="mergesort")]
    for n in order:
        below += weights[n]
        if below >= wanted:
            return np.float64(gaps[n])
    return np.float64(gaps[order[-1]])
