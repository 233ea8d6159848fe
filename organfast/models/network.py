"""The CNN as a flax module, and the pure functions that run under ``jax.jit``.

nnx defines the layers; everything else works on a flat dict of arrays, ``{"tower0.conv0.kernel":
...}``, which is also what a model file stores. ::

    slab (L, K, R, C) int16 --cut_blocks--> blocks (n, L, slices, size, size) int16
        --scaled--> float32, about 0..1 --logits--> (n, n_labels) float32
"""

from __future__ import annotations

from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from organfast.blocks import Block
from organfast.models.architecture import (
    Architecture,
    Conv,
    Dense,
    conv_padding,
    map_sizes,
)

__all__ = [
    "PRECISIONS",
    "Network",
    "Params",
    "cut_blocks",
    "initial_params",
    "kernel_penalty",
    "logits",
    "scaled",
]

Params = dict[str, jax.Array]
PRECISIONS = ("float32", "bfloat16")

_CUT_DEVIATION = 0.87962566  # of a normal distribution cut at two deviations


class Tower(nnx.Module):
    """The layers that read one level."""

    def __init__(
        self, described: Architecture, tower: int, options: dict[str, Any], rngs: nnx.Rngs
    ) -> None:
        self.layers = described.towers[tower]
        channels = described.tower_channels[tower]
        for n, layer in enumerate(self.layers):
            if isinstance(layer, Conv):
                before, after = conv_padding(layer, map_sizes(described, tower)[n])
                conv = nnx.Conv(
                    channels[n],
                    layer.features,
                    (layer.size, layer.size),
                    strides=layer.stride,
                    padding=((before, after), (before, after)),
                    rngs=rngs,
                    **options,
                )
                setattr(self, f"conv{n}", conv)

    def __call__(self, x: jax.Array) -> jax.Array:
        for n, layer in enumerate(self.layers):
            if isinstance(layer, Conv):
                x = nnx.relu(getattr(self, f"conv{n}")(x))
            else:
                sides = (layer.size, layer.size)
                x = nnx.max_pool(x, sides, strides=sides)  # type: ignore[no-untyped-call]
        return x.reshape(x.shape[0], -1)


class Network(nnx.Module):
    """A network as described, with so many labels.

    Parameters
    ----------
    described : Architecture
        Its layers.
    n_labels : int
        Its outputs.
    precision : {"float32", "bfloat16"}
        Of the factors of products; sums are float32 in either case.
    rngs : nnx.Rngs
        Where flax draws first weights from; ours come from :func:`initial_params`.
    """

    def __init__(
        self,
        described: Architecture,
        n_labels: int,
        *,
        precision: str = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {}
        if precision == "bfloat16":
            options |= {"promote_dtype": _factors, "preferred_element_type": jnp.float32}
        self.n_towers = len(described.towers)
        for t in range(self.n_towers):
            setattr(self, f"tower{t}", Tower(described, t, options, rngs))
        self.head = (*described.head, Dense(n_labels))
        n_in = described.n_flat
        for n, layer in enumerate(self.head):
            if isinstance(layer, Dense):
                dense = nnx.Linear(n_in, layer.features, rngs=rngs, **options)
                setattr(self, f"dense{n}", dense)
                n_in = layer.features

    def __call__(self, blocks: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits of blocks.

        Parameters
        ----------
        blocks : (n, L, slices, size, size) float32
            Scaled.
        dropout_key : key, optional
            What dropout draws from: in training. Without it nothing is dropped.

        Returns
        -------
        (n, n_labels) float32
        """
        levels = jnp.moveaxis(blocks, 2, 4)  # (n, L, size, size, slices)
        x = jnp.concatenate(
            [getattr(self, f"tower{t}")(levels[:, t]) for t in range(self.n_towers)], axis=1
        )
        for n, layer in enumerate(self.head):
            if isinstance(layer, Dense):
                x = getattr(self, f"dense{n}")(x)
                x = nnx.relu(x) if layer.relu else x
            elif dropout_key is not None:
                key = jax.random.fold_in(dropout_key, n)
                x = nnx.Dropout(layer.rate)(x, deterministic=False, rngs=key)
        return x


def _factors(arrays: tuple[Any, ...], *, dtype: Any = None) -> tuple[Any, ...]:
    """Inputs and kernel as bfloat16; the bias is added to float32 sums."""
    inputs, kernel, bias = arrays
    return inputs.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), bias


@cache
def _definition(described: Architecture, n_labels: int, precision: str) -> nnx.GraphDef[Network]:
    made = nnx.eval_shape(
        lambda: Network(described, n_labels, precision=precision, rngs=nnx.Rngs(0))
    )
    return nnx.split(made)[0]


def initial_params(described: Architecture, n_labels: int, key: jax.Array) -> Params:
    """Weights before training: he_normal (He et al. 2015) or glorot_uniform (Glorot, Bengio 2010).

    Parameters
    ----------
    described : Architecture
        The layers.
    n_labels : int
        Outputs.
    key : key
        From ``jax.random.key``.
    """
    params: Params = _initial_params(described, n_labels, key)
    return params


@partial(jax.jit, static_argnums=(0, 1))
def _initial_params(described: Architecture, n_labels: int, key: jax.Array) -> Params:
    shapes = described.parameter_shapes(n_labels)
    # All at once, for each draw of another shape is compiled anew, a second long.
    total = (sum(prod(shape) for name, shape in shapes.items() if name.endswith("kernel")),)
    if described.kernel_init == "he_normal":
        drawn = jax.random.truncated_normal(key, -2, 2, total, jnp.float32) / _CUT_DEVIATION
    else:
        drawn = jax.random.uniform(key, total, jnp.float32, -(3**0.5), 3**0.5)
    params, start = {}, 0
    for name, shape in shapes.items():
        if name.endswith("bias"):
            params[name] = jnp.zeros(shape, jnp.float32)
            continue
        fan_in, fan_out = prod(shape[:-1]), prod(shape[:-2]) * shape[-1]
        fan = fan_in if described.kernel_init == "he_normal" else fan_in + fan_out
        part = drawn[start : start + prod(shape)].reshape(shape)
        params[name] = part * jnp.float32((2 / fan) ** 0.5)
        start += prod(shape)
    return params


def logits(
    described: Architecture,
    params: Params,
    blocks: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
    precision: str = "float32",
) -> jax.Array:
    """Logits of blocks: the network as a pure function.

    Parameters
    ----------
    described : Architecture
        The layers.
    params : dict of str to array
        Weights; they also say how many labels there are.
    blocks : (n, L, slices, size, size) float32
        From :func:`scaled`.
    dropout_key : key, optional
        What dropout draws from: in training. Without it nothing is dropped.
    precision : {"float32", "bfloat16"}
        Of the factors of products; sums are float32 in either case.

    Returns
    -------
    (n, n_labels) float32
    """
    n_labels = params[f"dense{len(described.head)}.bias"].shape[0]
    flat = [(tuple(name.split(".")), nnx.Param(array)) for name, array in params.items()]
    network = nnx.merge(
        _definition(described, n_labels, precision), nnx.from_flat_state(sorted(flat))
    )
    return network(blocks, dropout_key=dropout_key)


def kernel_penalty(described: Architecture, params: Params) -> jax.Array:
    """The seed's L2: ``l2`` times the sum of the squared kernels of the convolutions.

    Parameters
    ----------
    described : Architecture
        Its ``l2``.
    params : dict of str to array
        Weights.

    Returns
    -------
    () float32
    """
    squares = [
        jnp.sum(jnp.square(array))
        for name, array in params.items()
        if ".conv" in name and name.endswith(".kernel")
    ]
    return jnp.float32(described.l2) * sum(squares, start=jnp.float32(0))


def cut_blocks(slab: jax.Array, positions: jax.Array, block: Block) -> jax.Array:
    """Blocks around positions of a slab.

    Parameters
    ----------
    slab : (L, K, R, C)
        Levels, padded by what the block reaches.
    positions : (n, 3) int32
        (k, i, j) in the slab, its padding included. They are not checked.
    block : Block
        What is seen around a position.

    Returns
    -------
    (n, L, slices, size, size)
        Of the slab's dtype.
    """
    half = block.size // 2
    along = jnp.arange(-half, half + 1, dtype=jnp.int32)
    deep = jnp.arange(block.slices, dtype=jnp.int32) - block.slices // 2
    k = positions[:, 0, None] + deep
    levels = []
    for level, width in enumerate(block.levels):
        i = positions[:, 1, None] + width * along
        j = positions[:, 2, None] + width * along
        levels.append(slab[level, k[:, :, None, None], i[:, None, :, None], j[:, None, None, :]])
    return jnp.stack(levels, axis=1)


def scaled(
    values: jax.Array, window: tuple[float, float], *, standardise: bool = False
) -> jax.Array:
    """What the network is given: the one place where the slab's integers become its input.

    Parameters
    ----------
    values : (...) int16, or (n, L, slices, size, size) to be standardised
        Voxels of a level, after the grid's HU table.
    window : (low, high) float
        In the units of ``values``: ``clip((values - low) / (high - low), 0, 1)``.
    standardise : bool
        The seed's way: then each block is also brought to mean 0 and standard deviation 1. Blocks
        of one value become 0.

    Returns
    -------
    float32, of the same shape
    """
    low, high = window
    scale = jnp.float32(1 / (high - low))
    x = jnp.clip((values.astype(jnp.float32) - jnp.float32(low)) * scale, 0.0, 1.0)
    if standardise:
        own = tuple(range(1, x.ndim))
        x = x - x[(slice(None), *(slice(1) for _ in own))]  # equal voxels become 0, not rounding
        x = x - jnp.mean(x, axis=own, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True))
        x = x / jnp.maximum(deviation, jnp.float32(1e-6))
    return x
