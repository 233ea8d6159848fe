"""Times of the CNN on the CPU, dense and block by block, with weights as before training."""

from __future__ import annotations

from typing import ClassVar

from organfast.bench import Benchmark
from organfast.benchcnn import Cut, batch_case, readme_case, towers_case

SQUARE = Cut(pixels=256)


class _Timed:
    """Set-up, and with it compiling, outside the clock; our side inside it."""

    case: Benchmark
    timeout = 300

    def time_ours(self, *_: object) -> None:
        self.case.ours()


class Readme(_Timed):
    """The seed's network at the positions of a quarter of a slice, dense."""

    param_names: ClassVar = ["size", "stride"]
    params: ClassVar = [(33,), (33, 8)]

    def setup(self, size: int, stride: int) -> None:
        self.case = readme_case(size, stride, SQUARE)


class Towers(_Timed):
    """Ours at the same positions, with one level and with two."""

    param_names: ClassVar = ["levels"]
    params: ClassVar = [((1,), (1, 8))]

    def setup(self, levels: tuple[int, ...]) -> None:
        self.case = towers_case(33, 8, levels, SQUARE)


class Batch(_Timed):
    """The seed's network on a batch of blocks."""

    param_names: ClassVar = ["size", "batch"]
    params: ClassVar = [(33,), (32, 256)]

    def setup(self, size: int, batch: int) -> None:
        self.case = batch_case(size, batch, SQUARE)
