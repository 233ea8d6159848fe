"""Loops that show what the machine can do (Numba, cached): limits that kernels are timed beside."""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from numba import njit, uint64


@njit(cache=True, nogil=True)
def gathered(voxels, places):
    """The sum of ``voxels[places]``: one read per place, and nothing waits for what was read.

    voxels : (n_voxels,) int16
    places : (n,) uint32, for an unsigned index needs no test for a negative one
    """
    total = 0
    for n in range(places.size):
        total += voxels[places[n]]
    return total


@njit(cache=True, nogil=True)
def shifted(n):
    """``n`` steps of a xorshift generator (Marsaglia 2003, J. Stat. Softw. 8(14)): registers only.

    n : int
    returns uint64, the last state
    """
    state = uint64(88172645463325252)
    for _ in range(n):
        state ^= state << uint64(13)
        state ^= state >> uint64(7)
        state ^= state << uint64(17)
    return state
