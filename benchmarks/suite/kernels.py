"""Times and peak memory of our side, by pattern, stride and threads.

The forests are small ones of one phantom, so that setting up takes seconds: asv follows what
changes from commit to commit, ``organfast bench`` what it is worth.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from organfast.bench import Benchmark, in_threads
from organfast.benchcases import SIZES, enlargement_case, gather_case, load_case
from organfast.benchforest import Size, context_case, slice_case
from organfast.benchscores import bootstrap_case, confusion_case, label_pair_case, surface_case

THREADS = (1, 2)
FOREST = Size(n_trees=20, n_per_class=60, n_patients=1)


class _Timed:
    """Set-up outside the clock; our side inside it."""

    case: Benchmark
    timeout = 300

    def time_ours(self, *_: object) -> None:
        self.case.ours()


class Forest(_Timed):
    """Probabilities at the positions of a native slice, no block copied."""

    param_names: ClassVar = ["size", "stride"]
    params: ClassVar = [SIZES, (8, 1)]

    def setup(self, size: int, stride: int) -> None:
        self.case = slice_case(size, stride, FOREST)


class ForestInThreads(_Timed):
    """The same work once per thread, and the memory of the process at its peak."""

    param_names: ClassVar = ["threads"]
    params: ClassVar = [THREADS]

    def setup(self, threads: int) -> None:
        self.case = in_threads(partial(slice_case, 33, 1, FOREST), threads)

    def peakmem_ours(self, *_: object) -> None:
        self.case.ours()


class Context(_Timed):
    """Probabilities at the positions of a slice of the working grid, from 3-D context."""

    param_names: ClassVar = ["stride"]
    params: ClassVar = [(8, 1)]

    def setup(self, stride: int) -> None:
        self.case = context_case(stride, FOREST)

    def peakmem_ours(self, *_: object) -> None:
        self.case.ours()


class Gather(_Timed):
    """Blocks copied through a window."""

    param_names: ClassVar = ["size", "stride"]
    params: ClassVar = [SIZES, (33, 8)]

    def setup(self, size: int, stride: int) -> None:
        self.case = gather_case(size, stride)


class Enlarge(_Timed):
    """Labels and confidence of every voxel of a slice."""

    param_names: ClassVar = ["blocks", "threads"]
    params: ClassVar = [(8, 16, 64, 128), THREADS]

    def setup(self, blocks: int, threads: int) -> None:
        self.case = in_threads(partial(enlargement_case, 23, blocks, 512), threads)


class Scores(_Timed):
    """Two label maps compared, a boundary measured, patients resampled."""

    param_names: ClassVar = ["work"]
    params: ClassVar = [("confusion", "label pair", "surfaces", "bootstrap")]

    def setup(self, work: str) -> None:
        cases = {
            "confusion": confusion_case,
            "label pair": label_pair_case,
            "surfaces": surface_case,
            "bootstrap": bootstrap_case,
        }
        self.case = cases[work]()


class Load(_Timed):
    """A compressed scan."""

    param_names: ClassVar = ["slices"]
    params: ClassVar = [(50, 300)]

    def setup(self, slices: int) -> None:
        self.case = load_case((512, 512, slices))
