"""Every benchmark case runs once, untimed and small, so that none can rot."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from organfast.bench import (
    CASES,
    SIZES,
    Benchmark,
    compare,
    enlargement_case,
    forest_case,
    gather_case,
    in_threads,
    load_case,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SMALL = {
    **{f"gather {n} {s}": partial(gather_case, n, s) for n in SIZES for s in (33, 8)},
    **{f"forest {n}": partial(forest_case, n, 33, n_trees=3, n_per_class=10) for n in SIZES},
    "enlarge": partial(enlargement_case, 23, 16, 128),
    "enlarge two threads": partial(in_threads, partial(enlargement_case, 5, 8, 64), 2),
    "load": partial(load_case, (64, 48, 5)),
}


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL.keys())
def test_each_case_runs_once_with_all_its_peers(build: Any) -> None:
    case: Benchmark = build()
    case.ours()
    for peer in case.peers.values():
        peer()
    assert case.n_items > 0


def test_the_commands_cases_are_those_of_the_small_ones() -> None:
    builders = {case.func for case in CASES.values()}  # type: ignore[attr-defined]
    assert builders == {gather_case, forest_case, enlargement_case, load_case}


def test_gather_case_compares_the_same_numbers() -> None:
    case = gather_case(17, 33)
    blocks, expected = case.ours(), case.peers["numpy sliding_window_view + copy"]()
    flat = np.asarray(expected).reshape(-1, 17, 17)
    np.testing.assert_allclose(np.asarray(blocks), flat[: len(np.asarray(blocks))], atol=1e-6)


def test_ratios_are_of_peer_time_to_our_time() -> None:
    calls = []
    case = Benchmark(
        "sleep",
        lambda: calls.append("ours"),
        {"ten times": lambda: [calls.append("peer") for _ in range(1000)]},
    )
    comparison = compare(case, rounds=3)
    median, low, high = comparison.ratios["ten times"]
    assert low <= median <= high
    assert median > 1
    assert comparison.items_per_second > 0


def test_the_asv_suite_is_importable_and_its_configuration_is_json() -> None:
    assert json.loads((BENCHMARKS / "asv.conf.json").read_text())["benchmark_dir"] == "suite"
    spec = importlib.util.spec_from_file_location("kernels", BENCHMARKS / "suite" / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("Gather", "Forest", "Enlarge", "Load"):
        suite = getattr(module, name)
        assert len(suite.params) == len(suite.param_names)
