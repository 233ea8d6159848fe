"""Tissue maps -> HU (Numba, cached). Arrays and numbers only; nothing is checked here.

All volumes are in working order [k, i, j]: slice, row, column; i grows towards the patient's front.
A tissue is one row of numbers; its HU at a voxel depends on the voxel's *depth*, the distance to
the nearest voxel of another tissue::

    outside | shell (wall, cortex) | core + patches + vessels + contents | inner (deeper still)
            0                  SHELL_MM                              INNER_MM          depth, mm
"""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

DEPTH_STEP_MM = 0.25
"""Unit of depth; a uint8 depth saturates at 63.75 mm."""

# Columns of the tissue table.
CORE_HU = 0
PATCH_HU = 1  # deviation of the texture
PATCH_MM = 2
SHELL_HU = 3
SHELL_MM = 4
INNER_HU = 5
INNER_MM = 6
VESSEL_HU = 7
VESSEL_MM = 8  # spacing of the vessels
VESSEL_WIDTH = 9  # in units of VESSEL_MM / 8, at full depth
VESSEL_DEEP_MM = 10  # depth at which vessels reach their width; 0 = everywhere
GAS = 11  # share of the lumen that holds gas, 0..1
BUBBLES = 12  # texture value above which contents are gas; 0 = none
FALL_HU = 13  # change per mm towards the back
N_COLUMNS = 14

GAS_HU = -960.0


@njit(cache=True, nogil=True)
def sample_texture(texture, x, y, z):
    """Trilinear value of a periodic texture, (N, N, N) with N a power of two; unit = N / 8 cells.

    One unit is about the size of a feature.
    """
    n = texture.shape[0]
    mask = n - 1
    unit = n * 0.125
    x, y, z = x * unit, y * unit, z * unit
    fx, fy, fz = np.floor(x), np.floor(y), np.floor(z)
    u, v, w = x - fx, y - fy, z - fz
    i, j, k = int(fx) & mask, int(fy) & mask, int(fz) & mask
    i1, j1, k1 = (i + 1) & mask, (j + 1) & mask, (k + 1) & mask
    low = (1 - v) * ((1 - u) * texture[k, j, i] + u * texture[k, j, i1])
    low += v * ((1 - u) * texture[k, j1, i] + u * texture[k, j1, i1])
    high = (1 - v) * ((1 - u) * texture[k1, j, i] + u * texture[k1, j, i1])
    high += v * ((1 - u) * texture[k1, j1, i] + u * texture[k1, j1, i1])
    return (1 - w) * low + w * high


@njit(cache=True, nogil=True)
def tissue_depth(tissue, steps, out):
    """Chamfer distance of each voxel to the nearest voxel of another tissue, in whole units.

    Two passes (Rosenfeld and Pfaltz 1966) over the face and the in-plane edge neighbours; beyond
    the volume everything is more of the same. Saturates at 255.

    Parameters
    ----------
    tissue : (K, R, C) uint8
    steps : (4,) int64
        Units from slice to slice, row to row, column to column, and along an in-plane diagonal.
    out : (K, R, C) uint8
        Receives the depth; a voxel that touches another tissue has the step towards it.
    """
    n_k, n_i, n_j = tissue.shape
    dk, di, dj, dd = steps[0], steps[1], steps[2], steps[3]
    for sweep in range(2):
        back = -1 if sweep == 0 else 1
        for kk in range(n_k):
            k = kk if sweep == 0 else n_k - 1 - kk
            for ii in range(n_i):
                i = ii if sweep == 0 else n_i - 1 - ii
                for jj in range(n_j):
                    j = jj if sweep == 0 else n_j - 1 - jj
                    mine = tissue[k, i, j]
                    best = 255 if sweep == 0 else np.int64(out[k, i, j])
                    if mine == 0:
                        out[k, i, j] = 0
                        continue
                    if 0 <= k + back < n_k:
                        same = tissue[k + back, i, j] == mine
                        best = min(best, dk + (np.int64(out[k + back, i, j]) if same else 0))
                    if 0 <= j + back < n_j:
                        same = tissue[k, i, j + back] == mine
                        best = min(best, dj + (np.int64(out[k, i, j + back]) if same else 0))
                    if 0 <= i + back < n_i:
                        same = tissue[k, i + back, j] == mine
                        best = min(best, di + (np.int64(out[k, i + back, j]) if same else 0))
                        if j > 0:
                            same = tissue[k, i + back, j - 1] == mine
                            best = min(
                                best, dd + (np.int64(out[k, i + back, j - 1]) if same else 0)
                            )
                        if j + 1 < n_j:
                            same = tissue[k, i + back, j + 1] == mine
                            best = min(
                                best, dd + (np.int64(out[k, i + back, j + 1]) if same else 0)
                            )
                    out[k, i, j] = best


@njit(cache=True, nogil=True)
def lumen_ceiling(tissue, hollow, out):
    """For each slice and column the frontmost row (highest i) of each hollow tissue, or -1.

    tissue : (K, R, C) uint8; hollow : (256,) int64, the map a tissue belongs to or -1;
    out : (n_maps, K, C) int16.
    """
    out[:] = -1
    for k in range(tissue.shape[0]):
        for i in range(tissue.shape[1]):
            for j in range(tissue.shape[2]):
                n = hollow[tissue[k, i, j]]
                if n >= 0:
                    out[n, k, j] = i


@njit(cache=True, nogil=True)
def tissue_hu(table, t, depth, x, y, z, texture):
    """HU of one voxel of tissue t, before gas, blur and noise. Depth and position in mm."""
    if depth < table[t, SHELL_MM]:
        return table[t, SHELL_HU]
    if table[t, INNER_MM] > 0 and depth > table[t, INNER_MM]:
        return table[t, INNER_HU] + 15.0 * sample_texture(texture, x / 6.0, y / 6.0, z / 6.0)
    hu = table[t, CORE_HU] - table[t, FALL_HU] * y
    if table[t, PATCH_HU] > 0:
        size = table[t, PATCH_MM]
        value = sample_texture(texture, x / size, z / size, y / size)
        if table[t, BUBBLES] > 0 and value > table[t, BUBBLES]:
            return GAS_HU
        hu += table[t, PATCH_HU] * value
    if table[t, VESSEL_WIDTH] > 0:
        width = table[t, VESSEL_WIDTH]
        if table[t, VESSEL_DEEP_MM] > 0:
            width *= min(1.0, depth / table[t, VESSEL_DEEP_MM])
        size = table[t, VESSEL_MM]
        first = sample_texture(texture, y / size + 0.37, x / size, z / size)
        if abs(first) < width:
            # Where two smooth fields are both near zero lie thin winding tubes.
            second = sample_texture(texture, z / size, y / size + 3.1, x / size + 1.7)
            if first * first + second * second < width * width:
                hu = table[t, VESSEL_HU]
    return hu


@njit(cache=True, nogil=True)
def paint_slice(tissue, depth, k, steps, table, hollow, levels, texture, out):
    """HU of one slice before blur and noise.

    Parameters
    ----------
    tissue, depth : (R, C) uint8
        Tissue numbers (0 = air) and depths in units of ``DEPTH_STEP_MM``.
    k : int
        Number of the slice.
    steps : (3,) float64, mm
        Voxel size along k, i, j.
    table : (n_tissues, N_COLUMNS) float32
    hollow : (256,) int64
        Which level map a tissue belongs to, or -1.
    levels : (n_maps, C) float32
        Row above which (towards the front) a lumen holds gas, at this slice.
    texture : (N, N, N) float32
    out : (R, C) float32
        Receives HU.
    """
    z = k * steps[0]
    half = 0.5 * min(steps[1], steps[2])
    for i in range(out.shape[0]):
        y = i * steps[1]
        for j in range(out.shape[1]):
            t = tissue[i, j]
            if t == 0:
                out[i, j] = -1000.0
                continue
            d = depth[i, j] * DEPTH_STEP_MM - half
            n = hollow[t]
            if n >= 0 and i > levels[n, j] and d >= table[t, SHELL_MM]:
                out[i, j] = GAS_HU
            else:
                out[i, j] = tissue_hu(table, t, d, j * steps[2], y, z, texture)


@njit(cache=True, nogil=True)
def blur_rows(source, taps, out):
    """Symmetric blur along the rows' direction i, ends repeated. taps : (n,), centre first."""
    n_i, n_j = source.shape
    for i in range(n_i):
        for j in range(n_j):
            out[i, j] = taps[0] * source[i, j]
        for t in range(1, taps.shape[0]):
            low, high = max(i - t, 0), min(i + t, n_i - 1)
            for j in range(n_j):
                out[i, j] += taps[t] * (source[low, j] + source[high, j])


@njit(cache=True, nogil=True)
def blur_columns(source, taps, out):
    """Symmetric blur along j, ends repeated. taps : (n,), centre first."""
    n_i, n_j = source.shape
    for i in range(n_i):
        for j in range(n_j):
            total = taps[0] * source[i, j]
            for t in range(1, taps.shape[0]):
                total += taps[t] * (source[i, max(j - t, 0)] + source[i, min(j + t, n_j - 1)])
            out[i, j] = total


@njit(cache=True, nogil=True)
def add_couch(tissue, steps, couch, out):
    """Draw the patient table into the air of one slice.

    couch : (6,) float64: column and row (mm) of the top of its shell at mid-line, radius of its
    curve, half width, HU of the shell, mm of mattress on it; a radius of 0 means no table.
    """
    if couch[2] <= 0:
        return
    for j in range(out.shape[1]):
        x = j * steps[2] - couch[0]
        if abs(x) > couch[3]:
            continue
        top = couch[1] + x * x / (2 * couch[2])
        low = max(0, int((top - 70.0) / steps[1]))
        high = min(out.shape[0], int((top + couch[5] + 1.0) / steps[1]) + 1)
        for i in range(low, high):
            if tissue[i, j] != 0:
                continue
            below = top - i * steps[1]
            if below < -couch[5]:
                continue
            if below < 0:
                out[i, j] = -915.0  # the mattress
            elif below < 3.0:
                out[i, j] = couch[4]
            else:
                out[i, j] = -965.0 if below < 67.0 else 0.3 * couch[4]


@njit(cache=True, nogil=True)
def finish_slice(base, k, noise, tiles, circle, out):
    """Add the scanner's noise to one slice and round to HU.

    Parameters
    ----------
    base : (R, C) float32, HU
    k : int
    noise : tuple
        sigma, streak (K,) float32: deviation of noise and of streaks per slice, HU; shifts (K, 6)
        int64 into the tiles; body (K, 3) float32: row, column and radius of the body in voxels.
    tiles : (3, N, N) float32
        Periodic noise of deviation 1, N a power of two; the third holds streaks along rows.
    circle : float
        Radius in voxels of the reconstructed field around the middle; 0 = the whole square.
    out : (R, C) int16
    """
    sigma, streak, shifts, body = noise
    mask = tiles.shape[1] - 1
    n_i, n_j = base.shape
    grain = sigma[k] * np.float32(0.70710678)
    flat = 1.0 / (body[k, 2] * body[k, 2])
    for i in range(n_i):
        a, b, c = (i + shifts[k, 0]) & mask, (i + shifts[k, 2]) & mask, (i + shifts[k, 4]) & mask
        di = i - body[k, 0]
        for j in range(n_j):
            dj = j - body[k, 1]
            near = 1.12 - 0.42 * min(1.0, (di * di + dj * dj) * flat)
            value = tiles[0, a, (j + shifts[k, 1]) & mask]
            value += tiles[1, b, (j + shifts[k, 3]) & mask]
            hu = base[i, j] + near * (
                grain * value + streak[k] * tiles[2, c, (j + shifts[k, 5]) & mask]
            )
            if circle > 0:
                u, v = i - 0.5 * (n_i - 1), j - 0.5 * (n_j - 1)
                if u * u + v * v > circle * circle:
                    hu = -1024.0
            out[i, j] = np.int16(np.floor(min(max(hu, -1024.0), 3071.0) + 0.5))


@njit(cache=True, nogil=True)
def paint_slices(out, first, maps, look, scanner, scratch):
    """Paint slices ``first .. first + len(out)`` of a tissue map.

    Parameters
    ----------
    out : (n_k, R, C) int16
        Receives HU.
    first : int
        Number of the first slice.
    maps : tuple
        tissue, depth (K, R, C) uint8, levels (n_maps, K, C) float32.
    look : tuple
        table, hollow, texture; see ``paint_slice``.
    scanner : tuple
        steps (3,) float64 mm; couch (6,); taps of the in-plane blur for rows and for columns;
        weight of each neighbouring slice; noise and tiles and circle, see ``finish_slice``.
    scratch : (5, R, C) float32
    """
    tissue, depth, levels = maps
    table, hollow, texture = look
    steps, couch, row_taps, column_taps, neighbour, noise, tiles, circle = scanner
    n_k = tissue.shape[0]
    blended, blurred = scratch[3], scratch[4]
    for n in range(-1, out.shape[0] + 1):
        k = first + n
        if 0 <= k < n_k:
            page = scratch[k % 3]
            paint_slice(tissue[k], depth[k], k, steps, table, hollow, levels[:, k], texture, page)
            add_couch(tissue[k], steps, couch, page)
        if n < 1:
            continue
        k -= 1
        before, after = max(k - 1, 0), min(k + 1, n_k - 1)
        w = np.float32(neighbour)
        for i in range(blended.shape[0]):
            for j in range(blended.shape[1]):
                middle = scratch[k % 3, i, j]
                around = scratch[before % 3, i, j] + scratch[after % 3, i, j]
                blended[i, j] = middle + w * (around - 2 * middle)
        blur_rows(blended, row_taps, blurred)
        blur_columns(blurred, column_taps, blended)
        finish_slice(blended, k, noise, tiles, circle, out[n - 1])
