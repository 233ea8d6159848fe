"""Coarse to fine: against its slow twin, the full grid and plain interpolation."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast import probability
from organfast.blocks import Block
from organfast.grid import BlockGrid, GridVolume
from organfast.probability import SliceClassifier, probability_slabs
from organfast.refinement import Refine, Visits, refined_slabs
from organfast.workers import Workers

EVERYWHERE, NOWHERE = Refine(1.5), Refine(0, disagreement=False)


@dataclass(frozen=True, eq=False)
class Table:
    """A classifier that looks its answer up: a voxel's HU is its row."""

    answers: NDArray[np.float32]
    asked: list[int] = field(default_factory=list)

    @property
    def n_classes(self) -> int:
        return self.answers.shape[1]

    def probabilities(self, slab: Any, positions: Any, out: Any) -> None:
        rows = slab[(0, *positions.T)]
        out[...] = self.answers[rows]
        self.asked.extend(rows.tolist())


@dataclass(frozen=True, eq=False)
class World:
    """A scan of answers: smooth regions, with noise at some positions."""

    shape: tuple[int, int, int]
    stride: tuple[int, int, int]
    table: Table
    inside: NDArray[np.bool_]

    @staticmethod
    def of(
        shape: Sequence[int], stride: Sequence[int] = (1, 1, 1), n_classes: int = 3, seed: int = 0
    ) -> World:
        k, i, j = shape
        rng = np.random.default_rng(seed)
        few = rng.dirichlet([0.5] * n_classes, 3).astype(np.float32)
        regions = rng.integers(0, 3, [-(-n // 4) for n in shape])
        for axis in range(3):
            regions = np.repeat(regions, 4, axis)
        answers = few[regions[:k, :i, :j]]
        noisy = rng.random(answers.shape[:3]) < 0.1
        answers[noisy] = rng.dirichlet([1] * n_classes, int(noisy.sum()))
        world = World((k, i, j), tuple(stride), Table(answers.reshape(-1, n_classes)), noisy)
        return World(
            world.shape, world.stride, world.table, rng.random(world.block_grid.shape) < 0.8
        )

    @property
    def block_grid(self) -> BlockGrid:
        return BlockGrid(self.shape, self.stride)

    @property
    def at_positions(self) -> NDArray[np.float32]:
        """(n_k, n_i, n_j, classes): what each position would answer."""
        return self.table.answers.reshape(*self.shape, -1)[np.ix_(*self.block_grid.centres)]

    def slices(self, workers: Workers, slices: int = 1) -> SliceClassifier:
        hu = np.arange(np.prod(self.shape), dtype=np.int16).reshape(self.shape)
        pattern = Block(1, slices=slices)
        return SliceClassifier(GridVolume(hu), self.table, pattern, self.block_grid, workers)

    def refined(
        self, refine: Refine, threads: int = 1, slices: int = 1
    ) -> tuple[NDArray[np.float32], Visits]:
        visits = Visits()
        with Workers(threads) as workers:
            slabs = refined_slabs(
                self.slices(workers, slices), self.inside, refine, workers, visits
            )
            found = list(slabs)
        assert [n for n, _ in found] == list(range(self.block_grid.shape[0]))
        for _, slab in found:
            assert slab.dtype == np.float32
            assert slab.flags.c_contiguous
        return np.stack([slab for _, slab in found]), visits


# --- against the twin -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    stride=st.tuples(*[st.integers(1, 2)] * 3),
    n_classes=st.integers(2, 4),
    margin=st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.01]),
    disagreement=st.booleans(),
    seed=st.integers(0, 99),
)
def test_refined_slabs_equal_the_slow_twin(
    shape: tuple[int, int, int],
    stride: tuple[int, int, int],
    n_classes: int,
    margin: float,
    disagreement: bool,
    seed: int,
) -> None:
    world = World.of(shape, stride, n_classes, seed)
    found, visits = world.refined(Refine(margin, disagreement), threads=2)
    expected, asked = naive.refined_slabs(world.at_positions, world.inside, margin, disagreement)
    np.testing.assert_array_equal(found, expected)
    assert visits == Visits(int(world.inside.sum()), int(asked.sum()))
    # Each position once, and those alone.
    rows = np.arange(np.prod(shape)).reshape(shape)[np.ix_(*world.block_grid.centres)]
    assert sorted(world.table.asked) == sorted(rows[asked].tolist())


def test_asked_everywhere_it_is_the_full_grid() -> None:
    world = World.of((11, 10, 9), (1, 2, 1))
    found, visits = world.refined(EVERYWHERE)
    with Workers(1) as workers:
        full = np.stack(
            [p for _, p in probability_slabs(world.slices(workers), world.inside, workers)]
        )
    np.testing.assert_array_equal(found, full)
    assert visits.share == 1


@pytest.mark.parametrize("shape", [(9, 7, 11), (8, 6, 10), (1, 5, 2), (2, 1, 1)])
def test_asked_nowhere_it_is_the_coarse_grid_enlarged(shape: tuple[int, int, int]) -> None:
    from scipy.ndimage import map_coordinates

    world = World.of(shape)
    world.inside[:] = True
    found, visits = world.refined(NOWHERE)
    coarse = world.at_positions[::2, ::2, ::2]
    at = np.stack(np.meshgrid(*(np.arange(n) / 2 for n in shape), indexing="ij"))
    for label in range(coarse.shape[3]):
        expected = map_coordinates(coarse[..., label], at, order=1, mode="nearest")
        np.testing.assert_allclose(found[..., label], expected, atol=1e-6)
    assert visits.n_asked == coarse[..., 0].size


def test_it_asks_more_where_it_doubts_more() -> None:
    world = World.of((12, 12, 12))
    asked = [world.refined(Refine(m))[1].n_asked for m in (0, 0.2, 0.5, 0.9, 1.01)]
    assert asked == sorted(set(asked))
    assert asked[-1] == world.inside.sum()


def test_probabilities_stay_probabilities() -> None:
    found, _ = World.of((9, 9, 9)).refined(Refine(0.1))
    np.testing.assert_allclose(found.sum(axis=3), 1, atol=1e-6)
    assert found.min() >= 0


# --- how the work is cut --------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("window_bytes", [1, 20_000, 1 << 30])
def test_neither_threads_nor_runs_matter(
    threads: int, window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World.of((23, 9, 8))
    expected, visits = world.refined(Refine(0.3))
    monkeypatch.setattr(probability, "_WINDOW_BYTES", window_bytes)
    # Blocks that reach beyond their slice: levels are made in a window.
    found, again = world.refined(Refine(0.3), threads, slices=3)
    np.testing.assert_array_equal(found, expected)
    assert again == visits


def test_it_computes_little_ahead_of_who_takes_the_slabs() -> None:
    world = World.of((60, 6, 6))
    with Workers(1) as workers:
        slabs = refined_slabs(world.slices(workers), None, Refine(), workers, Visits())
        next(slabs)
        assert max(world.table.asked) < 12 * 36
        slabs.close()  # type: ignore[attr-defined]  # a generator
    assert threading.active_count() < 10


def test_no_mask_is_a_mask_of_all() -> None:
    world = World.of((5, 6, 7))
    world.inside[:] = True
    expected, visits = world.refined(Refine(0.3))
    again = Visits()
    with Workers(2) as workers:
        slabs = refined_slabs(world.slices(workers), None, Refine(0.3), workers, again)
        np.testing.assert_array_equal(np.stack([slab for _, slab in slabs]), expected)
    assert again == visits


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_a_margin_is_a_difference_of_probabilities(margin: float) -> None:
    with pytest.raises(ValueError, match=r"^margin is .*; give a difference"):
        Refine(margin)


def test_a_mask_of_another_grid_is_refused() -> None:
    world = World.of((4, 4, 4))
    with Workers(1) as workers:
        for mask in (world.inside[:, :, 1:], world.inside.astype(np.uint8)):
            with pytest.raises(
                ValueError, match=r"give bool of the block grid's shape \(4, 4, 4\)"
            ):
                next(refined_slabs(world.slices(workers), mask, Refine(), workers, Visits()))


def test_the_share_of_no_position_is_none() -> None:
    assert Visits().share is None
    assert Visits(4, 1).share == 0.25
