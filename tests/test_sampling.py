"""Sampling: balanced, seeded, without replacement, patients never on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organfast.errors import InputError
from organfast.sampling import Split, sample_positions, split_patients


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    n=st.integers(1, 30),
    seed=st.integers(0, 10),
    fortran=st.booleans(),
)
def test_positions_carry_their_label_and_never_repeat(
    shape: tuple[int, int, int], n: int, seed: int, fortran: bool
) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, shape).astype(np.uint8)
    labels = np.asfortranarray(labels) if fortran else labels
    positions, classes = sample_positions(labels, {0: n, 2: n, 4: n}, seed)
    np.testing.assert_array_equal(labels[tuple(positions.T)], classes)
    assert len(np.unique(positions, axis=0)) == len(positions)
    for label in (0, 2, 4):
        assert (classes == label).sum() == min(n, (labels == label).sum())
    assert not np.isin(classes, (1, 3)).any()


def test_every_voxel_of_a_label_is_equally_likely() -> None:
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1:, ::2, 1:4] = 1
    drawn = np.zeros(labels.shape)
    for seed in range(600):
        positions, _ = sample_positions(labels, {1: 3}, seed)
        drawn[tuple(positions.T)] += 1
    expected = 600 * 3 / labels.sum()
    assert drawn[labels == 0].sum() == 0
    # Binomial: a deviation of five standard deviations does not happen by chance.
    np.testing.assert_allclose(drawn[labels == 1], expected, atol=5 * expected**0.5)


def test_the_seed_decides_and_memory_order_does_not() -> None:
    labels = np.random.default_rng(1).integers(0, 3, (4, 20, 20)).astype(np.uint8)
    first, _ = sample_positions(labels, {1: 50, 2: 50}, [3, 1])
    again, _ = sample_positions(np.asfortranarray(labels), {2: 50, 1: 50}, [3, 1])
    other, _ = sample_positions(labels, {1: 50, 2: 50}, [3, 2])
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), seed=st.integers(0, 5))
def test_no_patient_is_on_both_sides(n: int, seed: int) -> None:
    patients = [f"p{i}" for i in range(n)]
    split = split_patients(patients + patients[:2], seed)
    everyone = [*split.train, *split.validation, *split.test]
    assert sorted(everyone) == sorted(patients)
    assert split == split_patients(patients[::-1], seed)


def test_a_split_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    split = Split(("a", "b"), ("c",), ("d",))
    path.write_text(split.text())
    assert Split.read(path) == split


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"train": "a"}', '{"train": []}', '{"train": ["a"], "test": ["a"]}', '{"a": []}'],
)
def test_what_is_no_split_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"split\.json"):
        Split.read(path)


def test_a_split_of_other_patients_is_refused() -> None:
    with pytest.raises(ValueError, match="patient z"):
        Split(("z",)).check(["a", "b"])
