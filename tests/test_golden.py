"""What tools/make_golden.py froze has not moved; it is compared here and never written."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from organfast.models.classifier import load_model

ROOT = Path(__file__).parents[1]


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "tools/make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


golden = _tool()

EXACT = ["forest", "enlarge", "gather", "levels", "resample", "clean"]


@pytest.mark.parametrize("name", EXACT)
def test_a_kernel_gives_what_it_gave_to_the_last_bit(name: str) -> None:
    """Integers, and floats that sums and products alone make: no fused multiply-add, no libm."""
    inputs, expected = golden.read(name)
    kept = {key: array.copy() for key, array in inputs.items()}
    found = golden.CASES[name].outputs(inputs)
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    for key, array in kept.items():
        np.testing.assert_array_equal(inputs[key], array, err_msg=key)


def test_a_scan_and_an_old_model_file_give_what_they_gave() -> None:
    inputs, expected = golden.read("scan")
    found = golden.CASES["scan"].outputs(inputs)
    assert set(found) == set(expected)
    for key in ("model", "labels", "confidence", "liver", "names", "n_voxels", "present"):
        assert found[key].dtype.kind == expected[key].dtype.kind, key
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    for key in ("centroid_mm", "probability_centroid_mm"):
        # Products with the affine go through BLAS, which may fuse them.
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-12, atol=1e-9, err_msg=key)


def test_phantom_patients_are_who_they_were() -> None:
    """Not to the last voxel: shapes are made of sines, roots and logarithms, whose last bits differ
    between C libraries and versions of Numba. So each structure may win or lose 5 voxels or one in
    a hundred, and the mean HU of the larger ones may move by 1."""
    inputs, expected = golden.read("phantom")
    found = golden.CASES["phantom"].outputs(inputs)
    assert set(found) == set(expected)
    n_voxels = expected["n_voxels"]
    off = np.abs(found["n_voxels"] - n_voxels)
    assert (off <= np.maximum(5, n_voxels / 100)).all(), np.flatnonzero(off)
    large = n_voxels >= 100
    assert large.sum() > 20
    np.testing.assert_allclose(found["mean_hu"][large], expected["mean_hu"][large], atol=1.0)


def test_the_frozen_outputs_are_not_trivial() -> None:
    for name in golden.CASES:
        inputs, outputs = golden.read(name)
        assert inputs
        for key, array in outputs.items():
            if array.dtype.kind in "iuf":
                assert len(np.unique(array)) > 2, (name, key)
    _, scan = golden.read("scan")
    assert scan["present"].all()
    assert set(np.unique(scan["labels"])) == {0, *load_model(golden.MODEL).classes.organs}


def test_golden_files_are_few_small_and_those_of_the_tool() -> None:
    expected = {golden.path_of(name) for name in golden.CASES} | {golden.MODEL}
    assert set(golden.GOLDEN.iterdir()) == expected
    assert set(golden.CASES) == {*EXACT, "scan", "phantom"}
    assert sum(path.stat().st_size for path in expected) < 100_000
