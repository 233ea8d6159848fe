"""Blocks: patterns, the block grid, views, the fused gather, feature reads."""

from __future__ import annotations

import itertools
import json
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organfast.blocks import (
    Block,
    BlockGrid,
    Context,
    block_views,
    gather_blocks,
    gather_features,
    pattern_from_dict,
    pattern_on,
)
from organfast.grid import GridVolume, ModelGrid, hu_lookup
from organfast.levels import levels_slab
from organfast.volume import Volume


def zoo(array: np.ndarray) -> list[np.ndarray]:
    """The same values in other memory layouts, the last one read-only."""
    spread = np.zeros(tuple(2 * n + 1 for n in array.shape), array.dtype)
    strided = spread[tuple(slice(1, None, 2) for _ in array.shape)]
    strided[...] = array
    flipped = np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    upside_down = np.ascontiguousarray(np.flip(array))[(slice(None, None, -1),) * array.ndim]
    rolled = np.ascontiguousarray(np.moveaxis(array, 0, -1))
    read_only = array.copy()
    read_only.flags.writeable = False
    return [
        array,
        np.asfortranarray(array),
        strided,
        flipped,
        upside_down,
        np.moveaxis(rolled, -1, 0),
        read_only,
    ]


def random_hu(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3024, 3072, shape).astype(np.int16)


# --- patterns -------------------------------------------------------------------------------------


def test_features_are_ordered_by_level_slice_row_column() -> None:
    block = Block(size=3, levels=(1, 4), slices=3)
    expected = [
        (level, dk, w * di, w * dj)
        for level, w in enumerate((1, 4))
        for dk in (-1, 0, 1)
        for di in (-1, 0, 1)
        for dj in (-1, 0, 1)
    ]
    np.testing.assert_array_equal(block.offsets, expected)
    assert block.offsets.dtype == np.int32
    assert block.widths == (1, 4)
    assert block.n_features == len(expected)
    np.testing.assert_array_equal(block.reach, np.abs(block.offsets[:, 1:]).max(axis=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 64}, "block size 64 is even and has no centre; use 63 or 65"),
        ({"size": 0}, "block size is 0"),
        ({"size": -3}, "block size is -3"),
        ({"size": 33.0}, "block size is 33.0"),
        ({"size": True}, "block size is True"),
        ({"slices": 2}, "slices 2 is even and has no centre; use 1 or 3"),
        ({"levels": ()}, r"levels is \(\)"),
        ({"levels": (1, 1)}, r"levels is \(1, 1\)"),
        ({"levels": (0,)}, r"levels is \(0,\)"),
        ({"levels": (128,)}, "from 1 to 127"),
        ({"levels": "19"}, "levels is '19'"),
        ({"size": 257}, "66049 features; the forest's nodes hold 65536"),
        ({"size": 33, "slices": 61}, "fewer slices"),
        ({"size": 41, "slices": 41}, "68921 features"),
        ({"size": 10**9 + 1}, "features"),
    ],
)
def test_a_block_that_cannot_be_is_refused_in_words(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Block(**arguments)


@pytest.mark.parametrize("block", [Block(), Block(63), Block(17, (1, 9), 3), Block(255)])
def test_a_block_survives_json(block: Block) -> None:
    assert pattern_from_dict(json.loads(json.dumps(block.to_dict()))) == block


CONTEXT = Context().to_dict()


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"kind": "sphere"},
        {"kind": "context"},
        {**CONTEXT, "more": 1},
        {**CONTEXT, "n": 10**9},
        {**CONTEXT, "n": True},
        {**CONTEXT, "widths": [1, 1]},
        {**CONTEXT, "widths": [127]},
        {**CONTEXT, "reach_mm": [float("inf"), 1.0, 1.0]},
        {**CONTEXT, "reach_mm": [1.0, 1.0, 1.0]},
        {**CONTEXT, "spacing_mm": [0.0, 1.0, 1.0]},
        {**CONTEXT, "spacing_mm": [1.0, 1.0]},
        {**CONTEXT, "seed": -1},
        {**CONTEXT, "seed": 1},  # other offsets than the checksum's
        {**CONTEXT, "offsets_crc32": None},
        {"kind": "block", "size": 33},
        {"kind": "block", "size": 33, "levels": [1], "slices": 1, "more": 1},
        {"kind": "block", "size": "33", "levels": [1], "slices": 1},
        {"kind": "block", "size": 33, "levels": [1.5], "slices": 1},
        {"kind": "block", "size": 33, "levels": {"1": 1}, "slices": 1},
        {"kind": "block", "size": 33, "levels": [[1]], "slices": 1},
        {"kind": "block", "size": 10**30 + 1, "levels": [1], "slices": 1},
        {"kind": ["block"], "size": 33, "levels": [1], "slices": 1},
    ],
)
def test_a_tampered_pattern_is_a_value_error(content: Any) -> None:
    with pytest.raises(
        ValueError, match=r"pattern|block|levels|context|n is|widths is|_mm is|seed is|box"
    ):
        pattern_from_dict(content)


# --- the context ----------------------------------------------------------------------------------


def test_a_context_survives_json() -> None:
    context = Context(20, (1, 5), (30.0, 20.0, 10), 7, (2.0, 2.0, 5.0))
    assert pattern_from_dict(json.loads(json.dumps(context.to_dict()))) == context


def test_a_context_s_offsets_lie_in_reach_and_stay_what_they_are() -> None:
    context = Context()
    offsets = context.offsets
    assert offsets.shape == (700, 4)
    assert len(np.unique(offsets, axis=0)) == 700
    assert (np.abs(offsets[:, 1:]).max(axis=0) <= (40, 110, 110)).all()
    np.testing.assert_array_equal(np.unique(offsets[:, 0]), range(5))
    assert not np.array_equal(offsets, Context(seed=1).offsets)
    # Model files hold the seed, not the offsets: these must never change.
    np.testing.assert_array_equal(offsets[:2], [[2, 3, 3, 1], [2, 2, -1, 21]])
    with pytest.raises(ValueError, match="read-only"):
        offsets[0] = 0


def test_a_context_s_boxes_are_about_as_high_as_wide() -> None:
    assert Context().depths == (1, 1, 3, 7, 13)
    assert Context(spacing_mm=(1.0, 1.0, 1.0)).depths == (1, 3, 7, 13, 25)
    assert Context(spacing_mm=(1.0, 1.0, 5.0)).depths == (1, 1, 1, 3, 5)


def test_the_pattern_of_a_grid() -> None:
    working = ModelGrid((2.0, 2.0, 4.0), "piecewise")
    assert pattern_on(working) == Context(spacing_mm=(2.0, 2.0, 4.0))
    assert pattern_on(ModelGrid(None)) == Block(33)
    assert pattern_on(working, Block(17)) == Block(17)
    with pytest.raises(ValueError, match=r"for voxels of \(1.5, 1.5, 3.0\) mm.* native pixels"):
        pattern_on(ModelGrid(None), Context())
    with pytest.raises(ValueError, match=r"voxels of \(2.0, 2.0, 4.0\) mm; give both the same"):
        pattern_on(working, Context())


# --- the block grid -------------------------------------------------------------------------------


def test_the_seed_s_256_and_64_positions_of_a_slice() -> None:
    assert BlockGrid((1, 512, 512), (1, 33, 33)).shape == (1, 16, 16)
    assert BlockGrid((1, 512, 512), (1, 63, 63)).shape == (1, 8, 8)
    hu = np.zeros((512, 512), np.int16)
    assert gather_blocks(hu, 33, 33).shape == (256, 33, 33)
    assert gather_blocks(hu, 63, 63).shape == (64, 63, 63)


@given(
    shape=st.tuples(*[st.integers(1, 70)] * 3),
    stride=st.tuples(*[st.integers(1, 80)] * 3),
)
@settings(max_examples=60, deadline=None)
def test_centres_lie_inside_a_stride_apart(
    shape: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    grid = BlockGrid(shape, stride)
    for centres, n, step in zip(grid.centres, shape, stride, strict=True):
        assert centres.dtype == np.int32
        expected = [c for c in range(step // 2, n, step)] or [(n - 1) // 2]
        np.testing.assert_array_equal(centres, expected)
    assert grid.shape == tuple(len(c) for c in grid.centres)


@pytest.mark.parametrize("bad", [(1, 2), (1, 2, 0), (1, 2, 3.0), 5, None])
def test_a_block_grid_takes_three_positive_integers(bad: Any) -> None:
    with pytest.raises(ValueError, match="stride is"):
        BlockGrid((4, 4, 4), bad)
    with pytest.raises(ValueError, match="volume_shape is"):
        BlockGrid(bad, (1, 1, 1))


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 2), (5, 7), (33, 33), (9, 20), (7, 40)])
def test_views_are_the_gathered_blocks_that_lie_inside(size: int, stride: int) -> None:
    hu = np.maximum(random_hu((3, 38, 45)), -1024)
    half = size // 2
    grid = BlockGrid(hu.shape, (1, stride, stride))
    rows, cols = (
        [c for c in centres if half <= c < n - half]
        for centres, n in zip(grid.centres[1:], hu.shape[1:], strict=True)
    )
    centres = np.array(list(itertools.product(range(3), rows, cols)), int).reshape(-1, 3)
    expected = gather_blocks(hu, centres, size).reshape(3, len(rows), len(cols), size, size)
    for same in zoo(hu):
        views = block_views(same, size, stride)
        np.testing.assert_array_equal(views, expected)
        np.testing.assert_array_equal(block_views(same[1], size, (stride, stride)), expected[1])
        assert views.size == 0 or np.shares_memory(views, same)
        assert not views.flags.writeable


def test_views_of_every_second_slice() -> None:
    hu = random_hu((7, 9, 9))
    views = block_views(hu, 3, (2, 4, 3))
    k, i, j = BlockGrid(hu.shape, (2, 4, 3)).centres
    assert views.shape == (3, 2, 3, 3, 3)
    np.testing.assert_array_equal(views[1, 1, 0, 1, 1], hu[k[1], i[1], j[0]])


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 9)])
def test_no_view_of_a_block_larger_than_the_slice(shape: tuple[int, ...]) -> None:
    assert block_views(np.zeros(shape, np.int16), 5, 2).shape == (*shape[:-2], 0, 0, 5, 5)


def test_views_refuse_what_they_cannot_cut() -> None:
    with pytest.raises(ValueError, match="4 axes"):
        block_views(np.zeros((1, 1, 4, 4), np.int16), 3, 1)
    with pytest.raises(ValueError, match="even"):
        block_views(np.zeros((4, 4), np.int16), 2, 1)
    with pytest.raises(ValueError, match="stride is"):
        block_views(np.zeros((4, 4), np.int16), 3, (1, 0))


# --- the fused gather -----------------------------------------------------------------------------

WINDOWS = [None, (-160, 240), (-1000.5, 400.25), (-2000, 100), (0, 1)]


@pytest.mark.parametrize("size", [1, 7, 15, 17, 33])
@pytest.mark.parametrize("window", WINDOWS)
def test_gather_blocks_equals_its_twin_in_every_layout(
    size: int, window: tuple[float, float] | None
) -> None:
    hu = random_hu((2, 40, 56), seed=size)
    centres = np.random.default_rng(size).integers(0, hu.shape, (12, 3))
    centres[:4] = [(0, 0, 0), (1, 39, 55), (1, 20, 28), (0, 20, 24)]
    expected = naive.gather_blocks(hu, centres, size, window)
    for same in zoo(hu):
        np.testing.assert_array_equal(gather_blocks(same, centres, size, window), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (1, 5, 1), (1, 3, 40)])
def test_blocks_larger_than_the_slice_read_air_around_it(shape: tuple[int, int, int]) -> None:
    hu = random_hu(shape)
    centres = np.argwhere(np.ones(shape, bool))
    expected = naive.gather_blocks(hu, centres, 17, (-160, 240))
    np.testing.assert_array_equal(gather_blocks(hu, 1, 17, (-160, 240)), expected)


def test_positions_near_the_edge_exist_and_read_air() -> None:
    """The seed predicted nothing near the edge of a slice."""
    hu = np.full((20, 20), 50, np.int16)
    blocks = gather_blocks(hu, np.array([(0, 0), (19, 19), (10, 10)]), 9)
    assert (blocks[0, :4] == -1024).all()
    assert (blocks[0, :, :4] == -1024).all()
    assert (blocks[0, 4:, 4:] == 50).all()
    assert (blocks[1, 5:] == -1024).all()
    assert (blocks[2] == 50).all()


def test_every_hu_is_scaled_alike_and_never_wraps() -> None:
    """The seed scaled differently in training and in inference, and wrapped into uint8."""
    hu = np.arange(-32768, 32768).astype(np.int16).reshape(256, 256)
    window = (-160.0, 240.0)
    together = gather_blocks(hu, 1, 1, window).ravel()
    assert (np.diff(together) >= 0).all()
    assert together[0] == 0
    assert together[-1] == 1
    np.testing.assert_allclose(together[np.arange(-160, 241) + 32768], np.linspace(0, 1, 401))
    some = np.random.default_rng(0).integers(0, 256, (50, 2))
    for centre in some:  # one block at a time, and in the middle of a larger block
        alone = gather_blocks(hu, centre[None], 1, window)[0, 0, 0]
        wide = gather_blocks(hu, centre[None], 33, window)[0, 16, 16]
        assert alone == wide == together[centre[0] * 256 + centre[1]]


def test_rows_of_a_block_run_along_i_and_columns_along_j() -> None:
    """The seed read axes as Z, Y, X from an X, Y, Z array."""
    x, y, z = np.meshgrid(np.arange(20), np.arange(21), np.arange(4), indexing="ij")
    stored = (x + 20 * y + 420 * z).astype(np.int16)
    scan = Volume(stored, np.diag([0.7, 0.8, 5.0, 1.0])).working
    block = gather_blocks(scan, np.array([(2, 9, 11)]), 5)[0]
    j, i = np.meshgrid(np.arange(9, 14), np.arange(7, 12))
    np.testing.assert_array_equal(block, j + 20 * i + 420 * 2)


def test_padding_below_air_is_air() -> None:
    hu = np.full((9, 9), -3024, np.int16)
    assert (gather_blocks(hu, 3, 3) == -1024).all()


def test_gather_blocks_writes_the_given_buffer_and_nothing_else() -> None:
    hu = random_hu((64, 64))
    before = hu.copy()
    buffer = np.full((16 + 1, 17, 17), -7, np.float32)
    given = gather_blocks(hu, 16, 17, (-160, 240), out=buffer[:16])
    assert np.shares_memory(given, buffer)
    np.testing.assert_array_equal(given, gather_blocks(hu, 16, 17, (-160, 240)))
    assert (buffer[16] == -7).all()
    np.testing.assert_array_equal(hu, before)
    assert gather_blocks(hu, np.empty((0, 2), int), 17).shape == (0, 17, 17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"array": np.zeros((4, 4), np.float32)}, "array is float32"),
        ({"array": np.zeros((4, 4), ">i2")}, "array is >i2"),
        ({"array": np.zeros(4, np.int16)}, "1 axes"),
        ({"array": np.zeros((0, 4), np.int16)}, "non-empty"),
        ({"array": np.zeros(33, np.uint8)[1:].view(np.int16).reshape(4, 4)}, "aligned"),
        ({"centres": np.zeros((1, 3), int)}, "centres is"),
        ({"centres": np.zeros((1, 2), np.float32)}, "centres is"),
        ({"centres": np.array([(4, 0)])}, "is not inside"),
        ({"centres": np.array([(1, 1), (0, 4)])}, r"centre \[0, 4\] is not inside"),
        ({"centres": np.array([(0, -1)])}, "is not inside"),
        ({"centres": np.array([(2**63 + 1, 0)], np.uint64)}, "is not inside"),
        ({"array": np.zeros((2, 4, 4), np.int16), "centres": np.array([(2, 0, 0)])}, "not inside"),
        ({"centres": 0}, "stride is"),
        ({"size": 2}, "even"),
        ({"window": (240, -160)}, "window is"),
        ({"window": (0, np.inf)}, "window is"),
        ({"out": np.zeros((4, 3, 3))}, "out is float64"),
        ({"out": np.zeros((5, 3, 3), np.float32)}, "out is"),
        ({"out": np.zeros((3, 3, 4), np.float32).T}, "C-contiguous"),
    ],
)
def test_the_gather_s_door(arguments: dict[str, Any], message: str) -> None:
    fitting = {"array": np.zeros((4, 4), np.int16), "centres": 2, "size": 3}
    with pytest.raises(ValueError, match=message):
        gather_blocks(**{**fitting, **arguments})


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [Block(5), Block(3, (1, 2, 5), 3), Block(1, (4,))])
def test_gather_features_equals_its_twin_in_every_layout(block: Block) -> None:
    hu = random_hu((4, 13, 11))
    scan = GridVolume(hu, table=hu_lookup("identity"))
    slab = levels_slab(scan, block, 1, 3)
    positions = np.argwhere(np.ones((2, 13, 11), bool)) + block.reach
    expected = naive.gather_features(slab, block.offsets, positions)
    for same in zoo(slab):
        np.testing.assert_array_equal(gather_features(same, block.offsets, positions), expected)
    out = np.empty_like(expected)
    assert gather_features(slab, block.offsets, positions, out) is out
    np.testing.assert_array_equal(out, expected)


def test_features_of_a_block_are_the_gathered_block() -> None:
    hu = random_hu((3, 30, 31))
    block = Block(9)
    slab = levels_slab(GridVolume(hu, table=hu_lookup("identity")), block, 0, 3)
    positions = np.argwhere(np.ones(hu.shape, bool))
    features = gather_features(slab, block.offsets, positions + block.reach)
    np.testing.assert_array_equal(features, gather_blocks(hu, positions, 9).reshape(-1, 81))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slab": np.zeros((4, 4, 4), np.int16)}, "4 axes"),
        ({"slab": np.zeros((1, 4, 4, 4), np.int32)}, "slab is int32"),
        ({"offsets": np.zeros((2, 3), np.int32)}, "offsets is"),
        ({"positions": np.zeros((2, 3))}, "positions is float64"),
        ({"offsets": np.array([(1, 0, 0, 0)])}, "outside a slab"),
        ({"offsets": np.array([(0, 0, 0, -1)])}, "outside a slab"),
        ({"positions": np.array([(3, 0, 4)])}, "outside a slab"),
        ({"positions": np.array([(2**40, 0, 0)])}, "outside a slab"),
        ({"out": np.zeros((1, 2), np.float32)}, "out is"),
    ],
)
def test_the_door_of_gather_features(arguments: dict[str, Any], message: str) -> None:
    fitting = {
        "slab": np.zeros((1, 4, 4, 4), np.int16),
        "offsets": np.zeros((1, 4), np.int32),
        "positions": np.zeros((1, 3), np.int32),
    }
    with pytest.raises(ValueError, match=message):
        gather_features(**{**fitting, **arguments})


def test_no_position_gives_no_feature() -> None:
    slab = np.zeros((1, 1, 1, 1), np.int16)
    assert gather_features(slab, Block(3).offsets, np.empty((0, 3), np.int32)).shape == (0, 9)
