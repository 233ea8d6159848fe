"""Outputs of the kernels have not moved since tools/make_golden.py froze them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_golden", ROOT / "tools" / "make_golden.py")
assert spec is not None
assert spec.loader is not None
make_golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_golden)


@pytest.fixture(scope="module")
def found() -> dict[str, np.ndarray]:
    return dict(make_golden.outputs())


def _frozen() -> dict[str, np.ndarray]:
    with np.load(make_golden.GOLDEN) as golden:
        return dict(golden)


def test_every_output_is_frozen(found: dict[str, np.ndarray]) -> None:
    assert set(found) == set(_frozen())


@pytest.mark.parametrize(
    "name",
    [
        *("levels", "resampled", "gathered", "forest"),
        *("enlarged_labels", "enlarged_confidence", "cleaned", "confusion"),
    ],
)
def test_output_is_the_frozen_one(found: dict[str, np.ndarray], name: str) -> None:
    expected = _frozen()[name]
    assert found[name].dtype == expected.dtype
    np.testing.assert_array_equal(found[name], expected)


def test_the_frozen_outputs_are_not_trivial() -> None:
    for name, array in _frozen().items():
        assert len(np.unique(array)) > 2, name
