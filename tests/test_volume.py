"""Volume: working order, world coordinates, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organfast.volume import Orientation, Volume

ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]


def _affine(order: tuple[int, ...], signs: tuple[float, ...]) -> np.ndarray:
    """Stored axis n runs along world axis order[n], in the direction signs[n]."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for stored, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, stored] = sign * (1.0 + stored)
    affine[:3, 3] = (-7.0, 11.0, 3.0)
    return affine


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_working_order_is_superior_anterior_right_for_all_48(
    order: tuple[int, ...], signs: tuple[float, ...]
) -> None:
    hu = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    volume = Volume(hu, _affine(order, signs))
    directions = volume.working_affine[:3, :3]
    # Working axes k, i, j run along world axes z, y, x, upwards.
    np.testing.assert_array_equal(np.argmax(np.abs(directions), axis=0), [2, 1, 0])
    assert np.diag(directions[::-1]).min() > 0
    assert np.shares_memory(volume.working, hu)
    np.testing.assert_array_equal(volume.orientation.stored(volume.working), hu)
    for index in itertools.product(*(range(n) for n in volume.working.shape)):
        stored = volume.orientation.stored_index(index, hu.shape)
        assert hu[tuple(int(n) for n in stored)] == volume.working[index]
        np.testing.assert_allclose(
            volume.to_mm(np.array(stored)),
            (volume.working_affine @ [*index, 1.0])[:3],
            atol=1e-12,
        )


def test_writing_the_working_view_writes_the_stored_array() -> None:
    affine = _affine((2, 0, 1), (-1.0, 1.0, -1.0))
    stored = np.zeros((2, 3, 4), np.uint8)
    Orientation.of_affine(affine).working(stored)[0, 0, 0] = 7
    assert stored.sum() == 7


def test_an_oblique_affine_takes_the_closest_axes() -> None:
    angle = np.deg2rad(20)
    rotation = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-0.7, -0.7, 2.5])
    volume = Volume(np.zeros((5, 6, 7), np.int16), affine)
    assert volume.orientation == Orientation((2, 1, 0), (False, True, True))
    np.testing.assert_allclose(volume.working_spacing_mm, (2.5, 0.7, 0.7))
    np.testing.assert_allclose(volume.voxel_ml, 0.7 * 0.7 * 2.5 / 1000)


@settings(deadline=None, max_examples=50)
@given(
    entries=st.lists(st.floats(-3, 3), min_size=9, max_size=9),
    point=st.tuples(*[st.floats(-500, 500)] * 3),
)
def test_voxels_to_mm_and_back(entries: list[float], point: tuple[float, ...]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(entries, (3, 3)) + 4 * np.eye(3)
    if np.linalg.cond(affine) > 1e4:
        return
    volume = Volume(np.zeros((2, 2, 2), np.int16), affine)
    np.testing.assert_allclose(volume.to_mm(volume.to_index(np.array(point))), point, atol=1e-6)


@pytest.mark.parametrize(
    ("hu", "affine", "reason"),
    [
        (np.zeros((2, 2), np.int16), np.eye(4), "3-D"),
        (np.zeros((2, 2, 2), np.float32), np.eye(4), "int16"),
        (np.zeros((2, 0, 2), np.int16), np.eye(4), "no voxel"),
        (np.zeros((2, 2, 2), np.int16), np.eye(3), "4x4"),
        (np.zeros((2, 2, 2), np.int16), np.full((4, 4), np.nan), "finite"),
        (np.zeros((2, 2, 2), np.int16), np.diag([1.0, 0, 1, 1]), "singular"),
        (np.zeros((2, 2, 2), np.int16), np.eye(4)[[0, 0, 2, 3]], "singular"),
    ],
)
def test_what_is_no_volume_is_refused(hu: np.ndarray, affine: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Volume(hu, affine)


def test_the_affine_is_kept_from_change() -> None:
    affine = np.eye(4)
    volume = Volume(np.zeros((2, 2, 2), np.int16), affine)
    affine[0, 0] = 9
    assert volume.affine[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        volume.affine[0, 0] = 2
