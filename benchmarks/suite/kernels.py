"""Times, peak memory, and ratios against peers, by block size and stride."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from organfast.bench import (
    SIZES,
    Benchmark,
    compare,
    enlargement_case,
    forest_case,
    gather_case,
    in_threads,
    load_case,
)


class _Timed:
    """Set-up outside the clock; our side inside it; the ratio to the first peer tracked."""

    case: Benchmark
    timeout = 300

    def time_ours(self, *_: object) -> None:
        self.case.ours()

    def peakmem_ours(self, *_: object) -> None:
        self.case.ours()

    def track_ratio(self, *_: object) -> float:
        return next(iter(compare(self.case, rounds=5).ratios.values()))[0]


class Gather(_Timed):
    """Blocks copied through a window."""

    param_names: ClassVar = ["size", "stride", "threads"]
    params: ClassVar = [SIZES, (33, 8), (1, 2)]

    def setup(self, size: int, stride: int, threads: int) -> None:
        self.case = in_threads(partial(gather_case, size, stride), threads)


class Forest(_Timed):
    """Probabilities at the positions of a slice, no block copied."""

    param_names: ClassVar = ["size", "stride", "threads"]
    params: ClassVar = [SIZES, (33, 8), (1, 2)]

    def setup(self, size: int, stride: int, threads: int) -> None:
        self.case = in_threads(partial(forest_case, size, stride), threads)


class Enlarge(_Timed):
    """Labels and confidence of every voxel of a slice."""

    param_names: ClassVar = ["blocks", "threads"]
    params: ClassVar = [(8, 16, 64, 128), (1, 2)]

    def setup(self, blocks: int, threads: int) -> None:
        self.case = in_threads(partial(enlargement_case, 23, blocks, 512), threads)


class Load(_Timed):
    """A compressed scan."""

    param_names: ClassVar = ["slices", "threads"]
    params: ClassVar = [(50, 300), (1, 2)]

    def setup(self, slices: int, threads: int) -> None:
        self.case = in_threads(partial(load_case, (512, 512, slices)), threads)
