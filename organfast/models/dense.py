"""The CNN at all positions of a slice at once: every value that blocks share is computed once.

Along one axis, let position a be at voxel ``s a`` and a tower read level ``w``. Output u of a layer
whose strides multiply to T is a function of its taps, and those lie in the scan at a fixed distance
from ``s a + w T u``. So outputs with the same taps in the block are *one* map over the scan, read
at ``s a + w T u``, whichever block they belong to::

    SAME, stride 2, 31 inputs:    0 | 0  1  2  3 ... 27 28 29 30 | 0
    16 outputs                    (     )(     )       (       )
                                  first      interior      last

The first output reads a zero where a neighbouring block reads a voxel, so it is a map of its own. A
*run* is a run of outputs with the same taps, and of taps in the same runs of the layer before; each
pair of a run of rows and a run of columns is one map. Places of a run of several outputs are
``gcd(s, w T)`` apart, of a single one ``s``; with that every layer is a convolution with stride
and dilation from map to map. The flattened last layer meets the first dense one as a convolution
that is as large as the layer. Equal to the network on each block, up to the order of sums.

Where blocks share less than the maps cost, the blocks are cut and evaluated one by one
(:func:`block_products` and ``DensePlan.products`` tell).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from math import gcd, lcm, prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from organfast.blocks import Block
from organfast.models.architecture import (
    Architecture,
    Conv,
    Dense,
    MaxPool,
    conv_padding,
    map_sizes,
)
from organfast.models.network import Params, cut_blocks, logits, scaled

__all__ = [
    "DensePlan",
    "Inputs",
    "Run",
    "Taps",
    "block_grid_probabilities",
    "block_probabilities",
    "block_products",
    "dense_grid_probabilities",
    "dense_logits",
    "position_probabilities",
    "rows_together",
]

# Runs of so few outputs are taken apart where a map of each, at the positions alone, is less work
# than one of all. Of more, their many small convolutions would take long to compile.
_MOST_APART = 4
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Taps:
    """Neighbouring taps of a window that read one run of the layer before.

    Parameters
    ----------
    run : int
        Which run.
    first, n : int
        Taps of the window.
    start : int
        Where in the run's map the first output's first tap is.
    stride, dilation : int
        Places in the map between outputs, and between taps.
    """

    run: int
    first: int
    n: int
    start: int
    stride: int
    dilation: int

    def extent(self, n_outputs: int) -> slice:
        """What so many outputs read of the run's map."""
        length = (n_outputs - 1) * self.stride + (self.n - 1) * self.dilation + 1
        return slice(self.start, self.start + length)


@dataclass(frozen=True)
class Run:
    """Outputs of a layer along one axis that are one map over the scan.

    Parameters
    ----------
    first, last : int
        Outputs of the block, half-open.
    step : int
        Voxels between places of the map.
    n : int
        Places.
    taps : tuple of Taps
        What an output reads, in order; beyond the block is nothing.
    """

    first: int
    last: int
    step: int
    n: int
    taps: tuple[Taps, ...] = ()


@dataclass(frozen=True)
class _Window:
    """A layer along one axis."""

    size: int
    stride: int
    before: int
    n_in: int
    n_out: int


def _windows(described: Architecture, tower: int) -> Iterator[_Window]:
    """The layers of a tower, and last the flattening as one window over all that is left."""
    sizes = map_sizes(described, tower)
    for layer, n_in, n_out in zip(described.towers[tower], sizes, sizes[1:], strict=False):
        if isinstance(layer, MaxPool):
            yield _Window(layer.size, layer.size, 0, n_in, n_out)
        else:
            yield _Window(layer.size, layer.stride, conv_padding(layer, n_in)[0], n_in, n_out)
    yield _Window(sizes[-1], 1, 0, sizes[-1], 1)


def _axis_runs(
    windows: Iterable[_Window], size: int, width: int, stride: int, n: int
) -> tuple[tuple[Run, ...], ...]:
    """Runs before the first layer and after each, for n positions along an axis."""
    reach = stride * (n - 1)
    step = gcd(stride, width)
    runs: tuple[Run, ...] = (Run(0, size, step, (reach + width * (size - 1)) // step + 1),)
    found: list[tuple[Run, ...]] = [runs]
    apart = width  # voxels between neighbouring outputs
    for window in windows:
        run_of = {u: r for r, run in enumerate(runs) for u in range(run.first, run.last)}
        reads = [
            [run_of.get(window.stride * u - window.before + q) for q in range(window.size)]
            for u in range(window.n_out)
        ]
        step = gcd(stride, apart * window.stride)
        made: list[Run] = []
        for _, same in groupby(range(window.n_out), key=reads.__getitem__):
            outputs = list(same)
            length = (reach + apart * window.stride * (len(outputs) - 1)) // step + 1
            is_apart = len(outputs) <= _MOST_APART and n * len(outputs) <= length
            for group in [[u] for u in outputs] if is_apart else [outputs]:
                places = step if len(group) > 1 else stride
                length = (reach + apart * window.stride * (len(group) - 1)) // places + 1
                taps = tuple(_taps(window, reads[group[0]], group[0], runs, apart, places))
                made.append(Run(group[0], group[-1] + 1, places, length, taps))
        runs, apart = tuple(made), apart * window.stride
        found.append(runs)
    return tuple(found)


def _taps(
    window: _Window,
    reads: list[int | None],
    output: int,
    runs: tuple[Run, ...],
    apart: int,
    step: int,
) -> Iterator[Taps]:
    for run, same in groupby(range(window.size), key=reads.__getitem__):
        if run is None:
            continue
        taps, source = list(same), runs[run]
        index = window.stride * output - window.before + taps[0]
        start = apart * (index - source.first) // source.step
        dilation = apart // source.step if len(taps) > 1 else 1
        yield Taps(run, taps[0], len(taps), start, step // source.step, dilation)


@dataclass(frozen=True)
class DensePlan:
    """Maps of a network over the positions of a slice.

    Parameters
    ----------
    described : Architecture
        The layers.
    block : Block
        What is seen around a position.
    stride : (int, int)
        Voxels between positions, along rows and columns.
    shape : (int, int)
        Positions along rows and columns.
    """

    described: Architecture
    block: Block
    stride: tuple[int, int]
    shape: tuple[int, int]

    @cached_property
    def runs(self) -> tuple[tuple[tuple[tuple[Run, ...], ...], ...], ...]:
        """By tower and axis: the runs before the first layer and after each."""
        return tuple(
            tuple(
                _axis_runs(_windows(self.described, tower), self.block.size, width, stride, n)
                for stride, n in zip(self.stride, self.shape, strict=True)
            )
            for tower, width in enumerate(self.block.levels)
        )

    @property
    def image_shapes(self) -> tuple[tuple[int, int], ...]:
        """Of each level, the rows and columns that are read."""
        reach = [stride * (n - 1) + 1 for stride, n in zip(self.stride, self.shape, strict=True)]
        return tuple(
            (reach[0] + width * (self.block.size - 1), reach[1] + width * (self.block.size - 1))
            for width in self.block.levels
        )

    def products(self, n_labels: int) -> int:
        """Multiplications of all layers: half of the floating-point operations."""
        n_positions = prod(self.shape)
        total = 0
        for tower, (rows, cols) in enumerate(self.runs):
            channels = self.described.tower_channels[tower]
            for n, layer in enumerate(self.described.towers[tower], start=1):
                if isinstance(layer, Conv):
                    along = [
                        sum(run.n * sum(taps.n for taps in run.taps) for run in axis[n])
                        for axis in (rows, cols)
                    ]
                    total += along[0] * along[1] * channels[n - 1] * channels[n]
        return total + n_positions * _head_products(self.described, n_labels)

    @property
    def floats(self) -> int:
        """The most values that two neighbouring layers hold, and the flattened one."""
        most = 0
        for tower, axes in enumerate(self.runs):
            channels = self.described.tower_channels[tower]
            sizes = [
                prod(sum(run.n for run in axis[n]) for axis in axes) * channels[n]
                for n in range(len(channels))
            ]
            sizes.append(prod(self.shape) * self.described.n_flat)
            most = max(most, *(a + b for a, b in pairwise(sizes)))
        return most


@lru_cache(maxsize=64)
def rows_together(
    whole: DensePlan, n_labels: int, cached_bytes: int, most_bytes: int
) -> tuple[int, float]:
    """In what parts a grid of positions is best evaluated, and the work then.

    Parts of fewer rows repeat more of what lies between two of them; parts of more fill memory that
    is slow, which is worth half as many products again.

    Parameters
    ----------
    whole : DensePlan
        The whole grid.
    n_labels : int
        Outputs.
    cached_bytes : int
        Maps of this size are fast.
    most_bytes : int
        Maps shall not be larger, if rows of positions one by one allow that.

    Returns
    -------
    rows : int
        Rows of positions in a part.
    products : float
        Multiplications per position.
    """
    n_rows, n_cols = whole.shape
    best = (0.0, 0, 0.0)
    n_parts = 1
    while best[1] == 0 or n_parts <= n_rows:
        rows = -(-n_rows // n_parts)
        part = DensePlan(whole.described, whole.block, whole.stride, (rows, n_cols))
        held, products = _FLOAT_BYTES * part.floats, part.products(n_labels) / (rows * n_cols)
        products *= rows * -(-n_rows // rows) / n_rows  # the last part overlaps
        cost = products if held <= cached_bytes else 1.5 * products
        if (held <= most_bytes or rows == 1) and (best[1] == 0 or cost < best[0]):
            best = (cost, rows, products)
        n_parts = max(n_parts + 1, n_parts * 5 // 4)
    return best[1:]


def _head_products(described: Architecture, n_labels: int) -> int:
    total, n_in = 0, described.n_flat
    for layer in (*described.head, Dense(n_labels)):
        if isinstance(layer, Dense):
            total += n_in * layer.features
            n_in = layer.features
    return total


def block_products(described: Architecture, block: Block, n_labels: int) -> int:
    """Multiplications for one block that is evaluated by itself; those with padding not counted.

    Parameters
    ----------
    described : Architecture
        The layers.
    block : Block
        What is seen around a position.
    n_labels : int
        Outputs.

    Returns
    -------
    int

    >>> from organfast.models.architecture import architecture
    >>> block_products(architecture("readme", Block(33)), Block(33), 23)
    3855884
    """
    # One position, and a stride by which no place comes between its outputs.
    apart = lcm(*block.levels)
    for tower in range(len(described.towers)):
        apart *= prod(window.stride for window in _windows(described, tower))
    return DensePlan(described, block, (apart, apart), (1, 1)).products(n_labels)


# --- the program ----------------------------------------------------------------------------------


def dense_logits(
    plan: DensePlan,
    params: Params,
    images: list[jax.Array],
    window: tuple[float, float],
    precision: str = "float32",
) -> jax.Array:
    """Logits at all positions of a plan.

    Parameters
    ----------
    plan : DensePlan
        What is computed.
    params : dict of str to array
        Weights.
    images : list of (slices, rows, cols) int16
        Of each level, what ``plan.image_shapes`` says, from the first block's first voxel on.
    window : (low, high) float
        As for ``scaled``.
    precision : {"float32", "bfloat16"}
        Of the factors of products; sums are float32 in either case.

    Returns
    -------
    (n_rows, n_cols, n_labels) float32
    """
    flat = [
        _tower_flat(plan, tower, params, scaled(image, window), precision)
        for tower, image in enumerate(images)
    ]
    x = jnp.concatenate(flat, axis=1)
    n_labels = params[f"dense{len(plan.described.head)}.bias"].shape[0]
    for n, layer in enumerate((*plan.described.head, Dense(n_labels))):
        if isinstance(layer, Dense):
            x = _dense(x, params[f"dense{n}.kernel"], precision) + params[f"dense{n}.bias"]
            x = jax.nn.relu(x) if layer.relu else x
    return x.reshape(*plan.shape, -1)


Maps = dict[tuple[int, int], jax.Array]


def _tower_flat(
    plan: DensePlan, tower: int, params: Params, image: jax.Array, precision: str
) -> jax.Array:
    """(n_positions, n_flat) of a tower."""
    rows, cols = plan.runs[tower]
    image = image[:, :: rows[0][0].step, :: cols[0][0].step]
    maps = {(0, 0): jnp.moveaxis(image, 0, 2)[None]}  # (1, rows, cols, slices)
    for n, layer in enumerate(plan.described.towers[tower]):
        pairs = [
            ((r, c), row, col)
            for r, row in enumerate(rows[n + 1])
            for c, col in enumerate(cols[n + 1])
        ]
        if isinstance(layer, MaxPool):
            maps = {at: _pooled(maps, row, col) for at, row, col in pairs}
        else:
            kernel, bias = (params[f"tower{tower}.conv{n}.{name}"] for name in ("kernel", "bias"))
            maps = {
                at: jax.nn.relu(_convolved(maps, row, col, kernel, precision) + bias)
                for at, row, col in pairs
            }
    row, col = rows[-1][0], cols[-1][0]
    taps = [x[0] for x in _shifted(maps, row, col)]
    return jnp.concatenate(taps, axis=2).reshape(row.n * col.n, -1)


def _shifted(maps: Maps, row: Run, col: Run) -> Iterator[jax.Array]:
    """Of each tap, in the order of the window, its value for every output."""
    for i in _single(row):
        for j in _single(col):
            yield maps[i.run, j.run][
                :,
                i.start : i.start + (row.n - 1) * i.stride + 1 : i.stride,
                j.start : j.start + (col.n - 1) * j.stride + 1 : j.stride,
            ]


def _single(run: Run) -> list[Taps]:
    """Taps one by one."""
    return [
        Taps(taps.run, taps.first + q, 1, taps.start + q * taps.dilation, taps.stride, 1)
        for taps in run.taps
        for q in range(taps.n)
    ]


def _pooled(maps: Maps, row: Run, col: Run) -> jax.Array:
    first, *others = _shifted(maps, row, col)
    for other in others:
        first = jnp.maximum(first, other)
    return first


def _convolved(maps: Maps, row: Run, col: Run, kernel: jax.Array, precision: str) -> jax.Array:
    parts = [
        _conv(
            maps[i.run, j.run][:, i.extent(row.n), j.extent(col.n)],
            kernel[i.first : i.first + i.n, j.first : j.first + j.n],
            (i, j),
            precision,
        )
        for i in row.taps
        for j in col.taps
    ]
    return sum(parts[1:], start=parts[0])


def _conv(x: jax.Array, kernel: jax.Array, along: tuple[Taps, Taps], precision: str) -> jax.Array:
    dtype = jnp.dtype(precision)
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        tuple(taps.stride for taps in along),
        "VALID",
        rhs_dilation=tuple(taps.dilation for taps in along),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )


def _dense(x: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
    dtype = jnp.dtype(precision)
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


# --- from a slab to probabilities -----------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A network and how it sees a slab.

    Parameters
    ----------
    described : Architecture
        The layers.
    block : Block
        What is seen around a position.
    window : (low, high) float
        As for ``scaled``.
    standardise : bool
        As for ``scaled``.
    precision : {"float32", "bfloat16"}
        Of the factors of products.
    """

    described: Architecture
    block: Block
    window: tuple[float, float]
    standardise: bool
    precision: str


Grid = tuple[tuple[int, int], tuple[int, int]]
"""Of positions: (stride, shape)."""


def block_probabilities(
    inputs: Inputs, params: Params, is_of: jax.Array, blocks: jax.Array
) -> jax.Array:
    """Of blocks that have been cut.

    Parameters
    ----------
    inputs : Inputs
        The network.
    params : dict of str to array
        Weights.
    is_of : (n_labels, n_classes) float32
        1 where a label is of a class.
    blocks : (n, L, slices, size, size) int16
        From ``cut_blocks``.

    Returns
    -------
    (n, n_classes) float32
    """
    with _exact(inputs):
        x = scaled(blocks, inputs.window, standardise=inputs.standardise)
        found = logits(inputs.described, params, x, precision=inputs.precision)
        return jnp.matmul(jax.nn.softmax(found), is_of)


def position_probabilities(
    inputs: Inputs, params: Params, is_of: jax.Array, slab: jax.Array, positions: jax.Array
) -> jax.Array:
    """Block by block.

    Parameters
    ----------
    inputs : Inputs
        The network.
    params : dict of str to array
        Weights.
    is_of : (n_labels, n_classes) float32
        1 where a label is of a class.
    slab : (L, K, R, C) int16
        Levels.
    positions : (n, 3) int32
        (k, i, j) in the slab.

    Returns
    -------
    (n, n_classes) float32
    """
    return block_probabilities(inputs, params, is_of, cut_blocks(slab, positions, inputs.block))


def block_grid_probabilities(
    inputs: Inputs, grid: Grid, params: Params, is_of: jax.Array, *where: jax.Array
) -> jax.Array:
    """On a grid of positions of one slice, block by block.

    Parameters
    ----------
    inputs : Inputs
        The network.
    grid : ((int, int), (int, int))
        Stride and shape.
    params : dict of str to array
        Weights.
    is_of : (n_labels, n_classes) float32
        1 where a label is of a class.
    where : (L, slices, R, C) int16 and (2,) int32
        The slices that blocks read, and (i, j) of the first position.

    Returns
    -------
    (n_i, n_j, n_classes) float32
    """
    planes, start = where
    (stride, shape) = grid
    i, j = (start[a] + stride[a] * jnp.arange(shape[a], dtype=jnp.int32) for a in (0, 1))
    k = jnp.full(shape, inputs.block.slices // 2, jnp.int32)
    positions = jnp.stack(
        [k, jnp.broadcast_to(i[:, None], shape), jnp.broadcast_to(j, shape)], axis=-1
    )
    found = position_probabilities(inputs, params, is_of, planes, positions.reshape(-1, 3))
    return found.reshape(*shape, -1)


def dense_grid_probabilities(
    inputs: Inputs, grid: Grid, params: Params, is_of: jax.Array, *where: jax.Array
) -> jax.Array:
    """As :func:`block_grid_probabilities`, sharing what blocks share.

    Parameters
    ----------
    inputs : Inputs
        The network.
    grid : ((int, int), (int, int))
        Stride and shape.
    params : dict of str to array
        Weights.
    is_of : (n_labels, n_classes) float32
        1 where a label is of a class.
    where : (L, slices, R, C) int16 and (2,) int32
        The slices that blocks read, and (i, j) of the first position.

    Returns
    -------
    (n_i, n_j, n_classes) float32
    """
    planes, start = where
    block = inputs.block
    plan = DensePlan(inputs.described, block, *grid)
    images = []
    for level, (width, shape) in enumerate(zip(block.levels, plan.image_shapes, strict=True)):
        i, j = (start[a] - jnp.int32(width * (block.size // 2)) for a in (0, 1))
        corner = (jnp.int32(0), i, j)
        images.append(lax.dynamic_slice(planes[level], corner, (block.slices, *shape)))
    with _exact(inputs):
        found = dense_logits(plan, params, images, inputs.window, inputs.precision)
        return jnp.matmul(jax.nn.softmax(found), is_of)


def _exact(inputs: Inputs) -> AbstractContextManager[Any]:
    """float32 is float32: GPUs would round the factors of products to 10 bits."""
    precision = "highest" if inputs.precision == "float32" else "default"
    context: AbstractContextManager[Any] = jax.default_matmul_precision(precision)
    return context
