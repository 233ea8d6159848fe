"""pytest-benchmark cases: ``pytest benchmarks/test_speed.py --benchmark-only``.

Ratios against peers are what counts, and ``organfast bench`` prints them; here our side alone is
timed, by pattern, stride and threads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from organfast.bench import in_threads
from organfast.benchcases import SIZES, SWEEP, enlargement_case, gather_case, load_case
from organfast.benchcnn import batch_case, readme_case, towers_case
from organfast.benchscores import bootstrap_case, confusion_case, label_pair_case, surface_case

CNN = {
    "readme-33-dense-8": partial(readme_case, 33, 8),
    "readme-33-batch-256": partial(batch_case, 33, 256),
    "towers-33-dense-8": partial(towers_case, 33, 8),
    "towers-33-levels-1-8-dense-8": partial(towers_case, 33, 8, (1, 8)),
}
THREADS = pytest.mark.parametrize("threads", [1, 2])


@pytest.mark.parametrize("key", SWEEP, ids=lambda key: "-".join(map(str, key)))
def test_forest(benchmark: Any, key: tuple[str, int, int]) -> None:
    benchmark(SWEEP[key]().ours)


@pytest.mark.parametrize("build", CNN.values(), ids=CNN.keys())
def test_cnn(benchmark: Any, build: Any) -> None:
    pytest.importorskip("jax")
    pytest.importorskip("flax")
    benchmark(build().ours)


@THREADS
@pytest.mark.parametrize("stride", [33, 8, 4, 1])
@pytest.mark.parametrize("size", SIZES)
def test_gather(benchmark: Any, size: int, stride: int, threads: int) -> None:
    benchmark(in_threads(partial(gather_case, size, stride), threads).ours)


@THREADS
@pytest.mark.parametrize("blocks", [8, 16, 64, 128])
def test_enlarge(benchmark: Any, blocks: int, threads: int) -> None:
    benchmark(in_threads(partial(enlargement_case, 23, blocks, 512), threads).ours)


@THREADS
@pytest.mark.parametrize("slices", [50, 300])
def test_load(benchmark: Any, slices: int, threads: int) -> None:
    benchmark(in_threads(partial(load_case, (512, 512, slices)), threads).ours)


@pytest.mark.parametrize("build", [confusion_case, label_pair_case, surface_case, bootstrap_case])
def test_scores(benchmark: Any, build: Any) -> None:
    benchmark(build().ours)
