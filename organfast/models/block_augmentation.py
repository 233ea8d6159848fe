"""Blocks altered on the device, each example otherwise, while a network is trained.

::

    position --(offsets turned, lengthened, mirrored)--> block in units of the HU table
             --(blur)--(HU: shift, gain, noise)--> block in the same units

All of it runs inside jit. What is drawn for an option does not depend on the other options.
Whole scans are altered in ``augmentation``; this costs no memory and never shows a block twice.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from organfast.augmentation import MOST_DEVIATIONS
from organfast.grid import hu_lookup
from organfast.volume import AIR_HU

__all__ = ["BlockAugmentation", "Draws", "altered", "draw", "mirrored_labels", "turns"]

_LIMITS: dict[str, tuple[float, str]] = {
    "rotation_deg": (90, "degrees"),
    "scale": (0.5, "(0.1 = 10 %)"),
    "shift_hu": (100, "HU"),
    "gain": (0.2, "(0.05 = 5 %)"),
    "noise_hu": (200, "HU"),
    "blur": (0.7, "voxels"),
    "mirror": (1, "(a probability)"),
}
_BYTES = 4  # summed for one normal number; its tails end at 3.4 deviations
_DARKEST_HU = -150
"""What is darker than fat grows with the gain as fat does: as in ``augmentation``."""


@dataclass(frozen=True)
class BlockAugmentation:
    """How the blocks of a batch are altered. Each option is off at 0.

    Parameters
    ----------
    rotation_deg : float
        Deviation of the rotation of a block's offsets in the slice, cut off at twice as much.
    scale : float
        A block's offsets are lengthened or shortened by at most this share.
    shift_hu : float
        All tissue (not gas) moves by at most this, HU.
    gain : float
        HU of all tissue change by at most this share, as with another tube voltage.
    noise_hu : float
        Largest deviation of added white noise, HU; of a level's averages it is as much less as
        averaging makes it.
    blur : float
        Largest deviation of a blur in the slice, voxels of the model grid; a level's averages are
        so much less blurred as they are wider.
    mirror : float
        Probability that left and right change places, the label with them. A label whose other
        side is not among the labels is never mirrored. Unpaired organs then lie as in situs
        inversus, so this is meant for tables of paired structures.

    Raises
    ------
    ValueError
        A value is out of its range.
    """

    rotation_deg: float = 6.0
    scale: float = 0.1
    shift_hu: float = 10.0
    gain: float = 0.05
    noise_hu: float = 0.0
    blur: float = 0.0
    mirror: float = 0.0

    def __post_init__(self) -> None:
        for name, (most, unit) in _LIMITS.items():
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= most:
                raise ValueError(f"{name} is {value!r}; give 0 to {most:g} {unit}")

    @staticmethod
    def off() -> BlockAugmentation:
        """Every option off."""
        return BlockAugmentation(**dict.fromkeys(_LIMITS, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return asdict(self)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["angle", "factor", "shift", "gain", "noise", "blur", "mirrored", "key"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class Draws:
    """What was drawn for each of n examples; a pytree of (n,) float32, ``mirrored`` (n,) bool.

    Parameters
    ----------
    angle : radians
    factor : of the offsets
    shift : HU
    gain : share
    noise : deviation, HU
    blur : deviation, voxels
    mirrored : whether left and right change places
    key : jax key
        Of the noise.
    """

    angle: jax.Array
    factor: jax.Array
    shift: jax.Array
    gain: jax.Array
    noise: jax.Array
    blur: jax.Array
    mirrored: jax.Array
    key: jax.Array


def draw(key: jax.Array, augmentation: BlockAugmentation, partners: jax.Array) -> Draws:
    """How each example is altered.

    Parameters
    ----------
    key : jax key
        All is drawn from it.
    augmentation : BlockAugmentation
        How much.
    partners : (n,) int32
        Of each example, the label of the other side; negative where there is none to be had.
    """
    n = len(partners)
    # One axis at a time: XLA takes seconds to compile random numbers along several axes.
    for_normal, for_even, for_noise = jax.random.split(key, 3)
    normal = jax.random.truncated_normal(for_normal, -MOST_DEVIATIONS, MOST_DEVIATIONS, (n,))
    even = jax.random.uniform(for_even, (6 * n,)).reshape(6, n)
    return Draws(
        angle=normal * np.float32(np.deg2rad(augmentation.rotation_deg)),
        factor=1 + augmentation.scale * (2 * even[0] - 1),
        shift=augmentation.shift_hu * (2 * even[1] - 1),
        gain=augmentation.gain * (2 * even[2] - 1),
        noise=augmentation.noise_hu * even[3],
        blur=augmentation.blur * even[4],
        mirrored=(even[5] < augmentation.mirror) & (partners >= 0),
        key=for_noise,
    )


def turns(draws: Draws, augmentation: BlockAugmentation) -> jax.Array | None:
    """What each block's offsets are multiplied by, for ``blocks_at``.

    Parameters
    ----------
    draws : Draws
        Of :func:`draw`.
    augmentation : BlockAugmentation
        How much; options that are off cost nothing.
    """
    side = jnp.where(draws.mirrored, -1.0, 1.0)
    down, along = draws.factor, draws.factor * side
    if augmentation.rotation_deg:
        cos, sin = jnp.cos(draws.angle), jnp.sin(draws.angle)
        rows = jnp.stack([down * cos, -along * sin], axis=-1)
        return jnp.stack([rows, jnp.stack([down * sin, along * cos], axis=-1)], axis=-2)
    if augmentation.scale or augmentation.mirror:
        return jnp.stack([down, along], axis=-1)
    return None


def mirrored_labels(draws: Draws, labels: jax.Array, partners: jax.Array) -> jax.Array:
    """Labels, of mirrored examples those of the other side.

    Parameters
    ----------
    draws : Draws
        Of :func:`draw`.
    labels : (n,) int32
        Of the examples as they are.
    partners : (n,) int32
        Of the other side.
    """
    return jnp.where(draws.mirrored, partners, labels)


def altered(
    blocks: jax.Array,
    draws: Draws,
    augmentation: BlockAugmentation,
    widths: tuple[int, ...],
    hu_table: str,
) -> jax.Array:
    """Blocks as another scanner would have shown them.

    Parameters
    ----------
    blocks : (n, n_levels, slices, size, size) float32
        In units of the HU table.
    draws : Draws
        Of :func:`draw`.
    augmentation : BlockAugmentation
        How much; options that are off cost nothing.
    widths : tuple of int
        Box width of each level.
    hu_table : str
        Name of the table.

    Returns
    -------
    The same, in the same units, not rounded.
    """
    width = np.array(widths, np.float32)[:, None, None, None]
    if augmentation.blur:
        # Taps (a, 1 - 2 a, a) have the variance 2 a.
        share = (draws.blur**2 / 2)[:, None, None, None, None] / width**2
        blocks = _blurred(_blurred(blocks, share, 3), share, 4)
    if not (augmentation.shift_hu or augmentation.gain or augmentation.noise_hu):
        return blocks
    from organfast.kernels.augmentation import GAS_HU, TISSUE_HU

    hu_of, unit_of = _ramps(hu_table)
    hu = _along(hu_of, blocks)
    shift, gain, noise = (
        v[:, None, None, None, None] for v in (draws.shift, draws.gain, draws.noise)
    )
    tissue = jnp.clip((hu - GAS_HU) / (TISSUE_HU - GAS_HU), 0, 1)
    hu = hu + tissue * (shift + gain * jnp.maximum(hu, _DARKEST_HU))
    if augmentation.noise_hu:
        hu = hu + noise / width * _normal(draws.key, blocks.shape)
    return _along(unit_of, hu)


def _blurred(blocks: jax.Array, share: jax.Array, axis: int) -> jax.Array:
    """Each voxel gives ``share`` of itself to both neighbours along an axis; edges are repeated."""
    n = blocks.shape[axis]
    before = jnp.concatenate(
        [
            jax.lax.slice_in_dim(blocks, 0, 1, axis=axis),
            jax.lax.slice_in_dim(blocks, 0, n - 1, axis=axis),
        ],
        axis,
    )
    after = jnp.concatenate(
        [
            jax.lax.slice_in_dim(blocks, 1, n, axis=axis),
            jax.lax.slice_in_dim(blocks, n - 1, n, axis=axis),
        ],
        axis,
    )
    return blocks + share * (before + after - 2 * blocks)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """About normal numbers: four even bytes summed, a quarter of the work of exact ones."""
    bits = jax.random.bits(key, (math.prod(shape),), jnp.uint32).reshape(shape)
    total = sum((bits >> np.uint32(8 * n)) & np.uint32(255) for n in range(_BYTES))
    deviation = np.sqrt(_BYTES * (256**2 - 1) / 12)
    centred = total.astype(jnp.float32) - np.float32(_BYTES * 255 / 2)
    return centred / np.float32(deviation)


Ramps = tuple[float, tuple[tuple[float, float, float], ...]]
"""A value at the beginning, and (begin, length, slope) of each straight piece."""


@cache
def _ramps(hu_table: str) -> tuple[Ramps, Ramps]:
    """HU of a unit, and unit of a HU, as straight pieces."""
    hu = np.arange(AIR_HU, 32768)
    units = hu_lookup(hu_table)[hu + 32768].astype(np.int64)
    slopes = np.diff(units)
    starts = np.flatnonzero(np.diff(slopes, prepend=np.nan))
    ends = np.append(starts[1:], len(slopes))
    kept = slopes[starts] > 0
    return (
        _pieces(hu, units, 1 / slopes[starts[kept]], starts[kept], ends[kept]),
        _pieces(units, hu, slopes[starts[kept]], starts[kept], ends[kept]),
    )


def _pieces(
    to: NDArray[np.int64],
    of: NDArray[np.int64],
    slopes: NDArray[Any],
    starts: NDArray[np.intp],
    ends: NDArray[np.intp],
) -> Ramps:
    pieces = (of[starts], of[ends] - of[starts], slopes)
    rows = np.stack(pieces, axis=1).tolist()
    return float(to[0]), tuple((begin, length, slope) for begin, length, slope in rows)


def _along(ramps: Ramps, x: jax.Array) -> jax.Array:
    first, pieces = ramps
    moved = (slope * jnp.clip(x - begin, 0, length) for begin, length, slope in pieces)
    return first + sum(moved, jnp.zeros_like(x))
