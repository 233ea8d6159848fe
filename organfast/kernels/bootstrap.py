"""Bootstrap loops (Numba, cached). Numbers only; nothing is checked."""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit, uint64


@njit(cache=True, nogil=True)
def mixed(state):
    """Output of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA) for a state; uint64 to uint64."""
    z = (state ^ (state >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))


@njit(cache=True, nogil=True)
def bootstrap_means(values, seed, first, out):
    """Means of columns over rows drawn with replacement; NaN is left out.

    Resample r has a random stream of its own, that of ``seed`` and ``first + r``: resamples may be
    shared out among calls. Every column sees the same rows.

    values : (n, n_columns) float64, C order, n > 0; seed, first : int
    out    : (n_resamples, n_columns) float64, C order; NaN where nothing was drawn
    """
    n, n_columns = values.shape
    filled = np.empty((n, n_columns), np.float64)
    there = np.empty((n, n_columns), np.float64)
    for row in range(n):
        for column in range(n_columns):
            is_there = not np.isnan(values[row, column])
            there[row, column] = 1.0 if is_there else 0.0
            filled[row, column] = values[row, column] if is_there else 0.0
    step = uint64(0x9E3779B97F4A7C15)
    counts = np.empty(n_columns, np.float64)
    for r in range(out.shape[0]):
        state = mixed(mixed(uint64(seed)) + step * uint64(first + r + 1))
        sums = out[r]
        sums[:] = 0.0
        counts[:] = 0.0
        for _ in range(n):
            state += step
            # The upper 32 bits, scaled: no division, and no bias that could be seen.
            row = ((mixed(state) >> uint64(32)) * uint64(n)) >> uint64(32)
            for column in range(n_columns):
                sums[column] += filled[row, column]
                counts[column] += there[row, column]
        for column in range(n_columns):
            sums[column] = sums[column] / counts[column] if counts[column] else np.nan
