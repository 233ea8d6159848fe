"""A convolutional network as a ``Classifier``. Importing this does not import JAX.

``architecture`` describes the layers, ``network`` defines them, ``dense`` evaluates them at all
positions of a slice at once; here are the weights, what they were trained for, and the two doors::

    probabilities        some positions    blocks are cut on the device, a fixed number at a time
    grid_probabilities   a grid of them    dense, or block by block where that is less work
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from organfast.blocks import Block
from organfast.errors import is_whole
from organfast.models.architecture import Architecture, architecture
from organfast.models.devices import (
    DEVICES,
    check_not_forked,
    compilation_cache,
    find_devices,
)

if TYPE_CHECKING:
    import jax

    from organfast.models.dense import Inputs

__all__ = ["METHODS", "PRECISIONS", "Cnn"]

PRECISIONS = ("float32", "bfloat16")
METHODS = ("auto", "dense", "blocks")
MAX_CLASSES = 65_535

# Blocks evaluated together: the second for few positions.
_BATCHES = (256, 32)
# Maps that live at a time in a dense call. The C library gives memory beyond 32 MB back to the
# system after each call, and new memory is written at a tenth of the speed of used memory.
_CACHED_BYTES = 16 << 20
_MOST_BYTES = 128 << 20
# Products of a dense program take up to this many times as long as those of a batch of blocks: as
# long where the stride is a multiple of 8, longer where maps are read with odd steps.
_DENSE_COST = 1.25

_lock = Lock()


@dataclass(frozen=True, eq=False)
class Cnn:
    """A trained network, ready to be run on a slab; a ``Classifier``.

    Parameters
    ----------
    architecture : Architecture
        Its layers, as ``architecture(name, pattern)`` gives them.
    pattern : Block
        What it sees around a position.
    window : (low, high) float
        Integers of the levels that become 0 and 1; those beyond are clipped.
    params : mapping of str to float32 array
        Weights, by the names of ``architecture.parameter_shapes``.
    merge : (n_labels,) int
        The class of each label that it knows. A class's probability is the sum over its labels.
    n_classes : int
        Columns of the probabilities, also of classes that no label has.
    standardise : bool
        Whether each block is brought to mean 0 and deviation 1 after the window: the seed's way.
        Such blocks share nothing, and are evaluated one by one.
    precision : {"float32", "bfloat16"}
        Of the factors of products; sums are float32 in either case.
    device : {"auto", "cpu", "gpu"}
        Where it runs; no part of the model. Several devices of the kind share each grid of
        positions.

    Raises
    ------
    ValueError
        The parts do not fit each other, or a weight is no number.
    """

    architecture: Architecture
    pattern: Block
    window: tuple[float, float]
    params: Mapping[str, NDArray[np.float32]]
    merge: NDArray[np.integer]
    n_classes: int
    standardise: bool = False
    precision: str = "float32"
    device: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        if not is_whole(self.n_classes) or not 1 <= self.n_classes <= MAX_CLASSES:
            raise ValueError(f"n_classes is {self.n_classes!r}; give 1 to {MAX_CLASSES}")
        if self.architecture != architecture(self.architecture.name, self.pattern):
            raise ValueError(f"the layers are not those of {self.architecture.name} for this block")
        for name, known in (("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(known)}")
        if not isinstance(self.standardise, bool):
            raise ValueError(f"standardise is {self.standardise!r}; give True or False")
        object.__setattr__(self, "window", _checked_window(self.window))
        merge = np.asarray(self.merge)
        if merge.ndim != 1 or merge.dtype.kind not in "iu" or not 1 <= len(merge) <= MAX_CLASSES:
            raise ValueError(f"merge is {merge.dtype} of shape {merge.shape}; give (n_labels,) int")
        if merge.min() < 0 or merge.max() >= self.n_classes:
            raise ValueError(
                f"merge leads to classes {merge.min()} to {merge.max()}, of {self.n_classes}"
            )
        object.__setattr__(self, "merge", _read_only(merge.astype(np.int64)))
        shapes = self.architecture.parameter_shapes(len(merge))
        if set(self.params) != set(shapes):
            raise ValueError(
                f"weights are {', '.join(sorted(self.params)) or 'missing'}; "
                f"{self.architecture.name} has {', '.join(shapes)}"
            )
        params = {name: _checked_weights(name, self.params[name], shapes[name]) for name in shapes}
        object.__setattr__(self, "params", params)

    @staticmethod
    def from_arrays(
        arrays: Mapping[str, NDArray[Any]],
        content: Mapping[str, Any],
        pattern: Block,
        n_classes: int,
    ) -> Cnn:
        """The inverse of :meth:`arrays` and :meth:`to_dict`.

        Parameters
        ----------
        arrays : mapping of str to array
            Weights and ``merge``.
        content : mapping
            As read from JSON.
        pattern : Block
            What it sees around a position.
        n_classes : int
            Columns of the probabilities.

        Raises
        ------
        ValueError
            Either, which may come from a tampered file, describes no network.
        """
        names = ("architecture", "window", "standardise", "precision")
        if not isinstance(content, Mapping) or set(content) != set(names):
            raise ValueError(f"a CNN is described by {', '.join(names)}")
        if not isinstance(content["architecture"], str):
            raise ValueError(f"architecture is {content['architecture']!r:.40}; give its name")
        if "merge" not in arrays:
            raise ValueError("a CNN's arrays lack merge, the class of each label")
        return Cnn(
            architecture=architecture(content["architecture"], pattern),
            pattern=pattern,
            window=content["window"],
            params={name: array for name, array in arrays.items() if name != "merge"},
            merge=arrays["merge"],
            n_classes=n_classes,
            standardise=content["standardise"],
            precision=content["precision"],
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a model file stores: the weights, and ``merge`` as int64."""
        return {**self.params, "merge": self.merge}

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it, without weights, pattern and classes."""
        return {
            "architecture": self.architecture.name,
            "window": list(self.window),
            "standardise": self.standardise,
            "precision": self.precision,
        }

    @property
    def offsets(self) -> NDArray[np.int32]:
        """The pattern's: (level index, dk, di, dj) of each voxel that is read."""
        return self.pattern.offsets

    @property
    def n_labels(self) -> int:
        """Labels that the network tells apart."""
        return len(self.merge)

    def probabilities(
        self,
        slab: NDArray[np.int16],
        positions: NDArray[np.int32],
        out: NDArray[np.float32] | NDArray[np.float64],
    ) -> None:
        """Class probabilities at positions of a slab, written to ``out``.

        Block by block, from any number of threads at once. One program is compiled for each shape
        of the slab, and another for calls with few positions.

        Parameters
        ----------
        slab : (L, K, R, C) int16
            Levels around the positions, from ``levels_slab``.
        positions : (n, 3) int32
            (k, i, j) in the slab, its padding included.
        out : (n, n_classes) float32 or float64
            Receives the probabilities.

        Raises
        ------
        ValueError
            A dtype or shape is wrong, or a position reaches beyond the slab.
        RuntimeError
            This process was forked after JAX had started.
        """
        check_not_forked()
        _check_slab(slab, self.pattern)
        if positions.ndim != 2 or positions.shape[1] != 3 or positions.dtype != np.int32:
            raise ValueError(f"positions is {positions.shape} {positions.dtype}; give (n, 3) int32")
        _check_out(out, (len(positions), self.n_classes), (np.float32, np.float64))
        n = len(positions)
        if n == 0:
            return
        self._check_reach(slab.shape, positions.min(axis=0), positions.max(axis=0))
        import jax

        # The slices that are read: another number of them would be another program only if the
        # positions spread over the slab differently.
        reach = self.pattern.reach[0]
        low, high = int(positions[:, 0].min()) - reach, int(positions[:, 0].max()) + reach + 1
        device = self._devices[0]
        there = jax.device_put(np.ascontiguousarray(slab[:, low:high]), device)
        moved = positions - np.array([low, 0, 0], np.int32)
        batch = min((b for b in _BATCHES if b >= n), default=_BATCHES[0])
        program = self._program("positions", there.shape, (batch,), device)
        for start in range(0, n, batch):
            some = moved[start : start + batch]
            padded = np.concatenate([some, np.repeat(some[-1:], batch - len(some), axis=0)])
            found = program(*self._weights[0], there, jax.device_put(padded, device))
            out[start : start + len(some)] = np.asarray(found)[: len(some)]

    def grid_probabilities(
        self,
        slab: NDArray[np.int16],
        first: tuple[int, int, int],
        stride: tuple[int, int],
        out: NDArray[np.float32],
        *,
        method: str = "auto",
    ) -> None:
        """Class probabilities on a grid of positions in one slice, written to ``out``.

        From any number of threads at once. The rows of positions are taken in parts of one size,
        so small that memory stays bounded; one program is compiled for each shape of ``slab`` and
        ``out`` and each stride.

        Parameters
        ----------
        slab : (L, K, R, C) int16
            Levels around the positions, from ``levels_slab``.
        first : (k, i, j) int
            The first position in the slab, its padding included.
        stride : (int, int)
            Voxels between positions along rows and columns.
        out : (n_i, n_j, n_classes) float32
            Receives the probabilities; its shape says how many positions there are.
        method : {"auto", "dense", "blocks"}
            How: "auto" is dense where that takes fewer operations by a fifth.

        Raises
        ------
        ValueError
            An argument is wrong, a position reaches beyond the slab, or dense evaluation is asked
            of a network whose blocks are standardised.
        RuntimeError
            This process was forked after JAX had started.
        """
        check_not_forked()
        _check_slab(slab, self.pattern)
        if not all(is_whole(s, 1) for s in stride) or len(stride) != 2:
            raise ValueError(f"stride is {stride!r}; give two numbers of at least 1")
        if out.ndim != 3:
            raise ValueError(f"out has {out.ndim} axes; give (n_i, n_j, n_classes)")
        _check_out(out, (*out.shape[:2], self.n_classes), (np.float32,))
        if out.size == 0:
            return
        k, i, j = (int(f) for f in first)
        n_i, n_j = out.shape[:2]
        last = (k, i + stride[0] * (n_i - 1), j + stride[1] * (n_j - 1))
        self._check_reach(slab.shape, np.array((k, i, j)), np.array(last))
        step = (int(stride[0]), int(stride[1]))
        how, rows = self._way(method, step, (n_i, n_j))
        import jax

        reach, n_devices = self.pattern.reach[0], len(self._devices)
        rows = min(rows, -(-n_i // n_devices))
        seen = np.ascontiguousarray(slab[:, k - reach : k + reach + 1])
        places = [
            (device, self._program(how, seen.shape, (*step, rows, n_j), device), planes, weights)
            for device, weights in zip(self._devices, self._weights, strict=True)
            for planes in [jax.device_put(seen, device)]
        ]
        # Each device gets its parts at once; they are waited for afterwards, in order.
        parts = []
        for n, begin in enumerate(range(0, n_i, rows)):
            row = min(begin, n_i - rows)  # the last part overlaps the one before
            device, program, planes, weights = places[n % n_devices]
            start = jax.device_put(np.array([i + row * step[0], j], np.int32), device)
            parts.append((row, program(*weights, planes, start)))
            if len(parts) == n_devices:
                _write(parts, out)
        _write(parts, out)

    def products_per_position(
        self, stride: tuple[int, int], shape: tuple[int, int]
    ) -> tuple[float, float]:
        """Multiplications per position of a grid, dense and block by block.

        Twice as many floating-point operations. Those that dense evaluation repeats where two parts
        of the grid meet are counted, those with zeros beyond a block are not.

        Parameters
        ----------
        stride : (int, int)
            Voxels between positions along rows and columns.
        shape : (int, int)
            Positions along rows and columns.
        """
        from organfast.models.dense import block_products

        _, dense = self._dense_parts(stride, shape)
        return dense, float(block_products(self.architecture, self.pattern, self.n_labels))

    # --- how ---

    def _way(self, method: str, stride: tuple[int, int], shape: tuple[int, int]) -> tuple[str, int]:
        """ "dense" or "blocks", and how many rows of positions at a time."""
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; use {', '.join(METHODS)}")
        if self.standardise:
            if method == "dense":
                raise ValueError(
                    "blocks that are standardised one by one share no values, and cannot be "
                    "evaluated densely; use the method blocks, or a network without standardise"
                )
            method = "blocks"
        if method == "auto":
            dense, block = self.products_per_position(stride, shape)
            method = "dense" if _DENSE_COST * dense < block else "blocks"
        if method == "dense":
            return method, self._dense_parts(stride, shape)[0]
        return method, _equal_parts(shape[0], _BATCHES[0] // shape[1])

    def _dense_parts(self, stride: tuple[int, int], shape: tuple[int, int]) -> tuple[int, float]:
        from organfast.models.dense import DensePlan, rows_together

        whole = DensePlan(self.architecture, self.pattern, stride, shape)
        return rows_together(whole, self.n_labels, _CACHED_BYTES, _MOST_BYTES)

    @cached_property
    def _inputs(self) -> Inputs:
        from organfast.models.dense import Inputs

        return Inputs(
            self.architecture, self.pattern, self.window, self.standardise, self.precision
        )

    @cached_property
    def _devices(self) -> list[jax.Device]:
        return find_devices(self.device)

    @cached_property
    def _weights(self) -> list[tuple[dict[str, jax.Array], jax.Array]]:
        """On each device: the weights, and which label is of which class."""
        import jax

        is_of = (self.merge[:, None] == np.arange(self.n_classes)).astype(np.float32)
        return [jax.device_put((dict(self.params), is_of), device) for device in self._devices]

    def _program(
        self, kind: str, shape: tuple[int, ...], geometry: tuple[int, ...], device: jax.Device
    ) -> Any:
        with _lock:  # another thread may be about to compile the same
            return _program(
                self._inputs,
                (self.n_labels, self.n_classes),
                device,
                kind,
                shape,
                geometry,
            )

    def _check_reach(
        self, shape: tuple[int, ...], first: NDArray[np.integer], last: NDArray[np.integer]
    ) -> None:
        for axis, (name, reach) in enumerate(zip("kij", self.pattern.reach, strict=True)):
            low, high = int(first[axis]) - reach, int(last[axis]) + reach
            if low < 0 or high >= shape[axis + 1]:
                raise ValueError(
                    f"positions reach {low}..{high} along {name}, the slab has 0.."
                    f"{shape[axis + 1] - 1}; pad it by what the pattern reaches"
                )


@lru_cache(maxsize=64)
def _program(
    inputs: Inputs,
    n_outputs: tuple[int, int],
    device: jax.Device,
    kind: str,
    shape: tuple[int, ...],
    geometry: tuple[int, ...],
) -> Any:
    """A compiled program: (weights, is_of, slab, positions or start) -> probabilities."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from organfast.models.dense import (
        block_grid_probabilities,
        dense_grid_probabilities,
        position_probabilities,
    )

    compilation_cache()
    programs: dict[str, Callable[..., jax.Array]] = {
        "positions": position_probabilities,
        "blocks": block_grid_probabilities,
        "dense": dense_grid_probabilities,
    }
    arguments = (
        {
            name: (s, np.float32)
            for name, s in inputs.described.parameter_shapes(n_outputs[0]).items()
        },
        (n_outputs, np.float32),
        (shape, np.int16),
        ((geometry[0], 3) if kind == "positions" else (2,), np.int32),
    )
    there = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(*a, sharding=there),
        arguments,
        is_leaf=lambda a: isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], tuple),
    )
    traced = partial(programs[kind], inputs)
    if kind != "positions":
        traced = partial(traced, (geometry[:2], geometry[2:]))
    return jax.jit(traced).lower(*shapes).compile()


def _write(parts: list[tuple[int, jax.Array]], out: NDArray[np.float32]) -> None:
    """Wait for parts of a grid, and let them go."""
    for row, found in parts:
        out[row : row + len(found)] = found
    parts.clear()


def _equal_parts(n: int, most: int) -> int:
    """The size of as few equal parts as there can be with at most so many in each."""
    n_parts = -(-n // max(1, min(n, most)))
    return -(-n // n_parts)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _checked_window(window: Any) -> tuple[float, float]:
    ends = tuple(window) if isinstance(window, (tuple, list)) else ()
    if (
        len(ends) != 2
        or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in ends)
        or not ends[0] < ends[1]
    ):
        raise ValueError(f"window is {window!r}; give (low, high) with low < high")
    return float(ends[0]), float(ends[1])


def _checked_weights(name: str, given: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(given)
    if array.shape != shape or array.dtype != np.float32:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; give float32 {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are no numbers; train the network again")
    return _read_only(array)


def _check_slab(slab: NDArray[Any], block: Block) -> None:
    if slab.ndim != 4 or slab.dtype != np.int16:
        raise ValueError(f"slab is {slab.ndim}-D {slab.dtype}; give (L, K, R, C) int16")
    if slab.shape[0] != len(block.levels):
        raise ValueError(f"slab has {slab.shape[0]} levels; the block reads {len(block.levels)}")


def _check_out(out: NDArray[Any], shape: tuple[int, ...], dtypes: tuple[type, ...]) -> None:
    if out.shape != shape or out.dtype not in dtypes or not out.flags.writeable:
        wanted = " or ".join(np.dtype(d).name for d in dtypes)
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}; give a writable {wanted} array of {shape}"
        )
