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
    # What is there is counted beside its sums, but only where something is missing.
    has_gaps = np.isnan(values).any()
    table = np.zeros((n, 2 * n_columns if has_gaps else n_columns), np.float64)
    for row in range(n):
        for column in range(n_columns):
            if not np.isnan(values[row, column]):
                table[row, column] = values[row, column]
                if has_gaps:
                    table[row, n_columns + column] = 1.0
    step = uint64(0x9E3779B97F4A7C15)
    rows = np.empty(n, np.int64)
    sums = np.empty(table.shape[1], np.float64)
    for r in range(out.shape[0]):
        state = mixed(mixed(uint64(seed)) + step * uint64(first + r + 1))
        for place in range(n):
            state += step
            # The upper 32 bits, scaled: no division, and no bias that could be seen.
            rows[place] = np.int64(((mixed(state) >> uint64(32)) * uint64(n)) >> uint64(32))
        drawn = table[rows[0]]
        for column in range(drawn.size):
            sums[column] = drawn[column]
        for place in range(1, n):
            drawn = table[rows[place]]
            for column in range(drawn.size):
                sums[column] += drawn[column]
        means = out[r]
        for column in range(n_columns):
            count = sums[n_columns + column] if has_gaps else float(n)
            means[column] = sums[column] / count if count else np.nan
