"""The benchmark cases of the CNN: dense and block by block, beside torch and onnxruntime.

Weights are those before training, from a fixed seed: speed does not depend on them. All sides run
the same network on the same positions of the same slice with as many threads as the machine has
cores, for XLA takes them all; torch runs with one as well, for where others use the cores its
threads wait for each other and it is slower with several. Compiling is outside the timing; the
first call's time, in which our program is compiled or read from JAX's cache on disk, is told apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.bench import Benchmark, Job, Peer
from organfast.benchforest import installed, timed_slice
from organfast.blocks import Block, gather_features
from organfast.grid import BlockGrid, GridVolume
from organfast.levels import levels_slab
from organfast.models.architecture import Conv, Dense, architecture, conv_padding, map_sizes
from organfast.models.cnn import Cnn

__all__ = ["SLICE", "Cut", "batch_case", "cnn_cases", "gpu_note", "readme_case", "towers_case"]

N_CLASSES = 23
_WINDOW = (-160.0, 240.0)
_PEER_SAMPLE = 1024
_BATCH = 256
_METHODS = {"dense": "dense", "blocks": "block by block"}
# Strides that go with a size, besides the size itself, which shares nothing.
_STRIDES = (16, 8, 4)
_SIZES = (33, 63)
_TOWER_SIZES = (17, 25, 33, 49, 63, 97)


@dataclass(frozen=True)
class Cut:
    """What of the slice is timed, and where.

    Parameters
    ----------
    pixels : int
        Side of the square in its middle.
    device : {"cpu", "gpu"}
        Where our side runs; peers run on the CPU.
    matrix : int
        Side of the matrices whose product is the limit.
    """

    pixels: int = 512
    device: str = "cpu"
    matrix: int = 2048


SLICE = Cut()


def n_threads() -> int:
    """Cores that this process may use: what XLA takes, and what peers are given."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _network(name: str, block: Block, device: str) -> Cnn:
    """With the weights that training begins with."""
    import jax

    from organfast.models.network import initial_params

    described = architecture(name, block)
    drawn = initial_params(described, N_CLASSES, jax.random.key(0))
    params = {key: np.asarray(array) for key, array in drawn.items()}
    return Cnn(described, block, _WINDOW, params, np.arange(N_CLASSES), N_CLASSES, device=device)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A network, and a grid of positions of a slice that it is asked about."""

    cnn: Cnn
    stride: int
    cut: Cut

    @cached_property
    def slab(self) -> NDArray[np.int16]:
        corner = (512 - self.cut.pixels) // 2
        inner = slice(corner, corner + self.cut.pixels)
        volume = GridVolume(timed_slice()[None, inner, inner], spacing_mm=(3.0, 0.8, 0.8))
        return levels_slab(volume, self.cnn.pattern, 0, 1)

    @cached_property
    def axis(self) -> NDArray[np.integer]:
        """Rows of the positions in the slice, and columns, which are the same."""
        shape = (1, self.cut.pixels, self.cut.pixels)
        return BlockGrid(shape, (1, self.stride, self.stride)).centres[1]

    @property
    def n(self) -> int:
        return len(self.axis) ** 2

    @cached_property
    def products(self) -> tuple[float, float]:
        """Multiplications per position, dense and block by block."""
        stride, shape = (self.stride, self.stride), (len(self.axis), len(self.axis))
        return self.cnn.products_per_position(stride, shape)

    def sample(self, most: int = _PEER_SAMPLE) -> slice:
        """Neighbouring rows of positions, from the middle."""
        n_rows = max(1, min(len(self.axis), most // len(self.axis)))
        first = (len(self.axis) - n_rows) // 2
        return slice(first, first + n_rows)

    def grid_job(self, method: str, rows: slice = slice(None)) -> Job:
        """Our job, by one of ``grid_probabilities``' methods."""
        reach, asked = self.cnn.pattern.reach, self.axis[rows]
        out = np.empty((len(asked), len(self.axis), N_CLASSES), np.float32)
        first = (reach[0], int(asked[0]) + reach[1], int(self.axis[0]) + reach[2])
        step = (self.stride, self.stride)

        def job() -> NDArray[np.float32]:
            self.cnn.grid_probabilities(self.slab, first, step, out, method=method)
            return out

        return job

    def positions(self, rows: slice = slice(None)) -> NDArray[np.int32]:
        """(n, 3), in the slab."""
        i, j = np.meshgrid(self.axis[rows], self.axis, indexing="ij")
        flat = np.stack([np.zeros_like(i), i, j], axis=-1).reshape(-1, 3)
        there: NDArray[np.int32] = (flat + np.array(self.cnn.pattern.reach)).astype(np.int32)
        return there

    def blocks(self, positions: NDArray[np.int32]) -> NDArray[np.int16]:
        block = self.cnn.pattern
        features = gather_features(self.slab, block.offsets, positions)
        shape = (-1, len(block.levels), block.slices, block.size, block.size)
        return features.astype(np.int16).reshape(shape)


# --- cases ----------------------------------------------------------------------------------------


def readme_case(size: int, stride: int, cut: Cut = SLICE) -> Benchmark:
    """The seed's network at all positions of a slice, dense or block by block: the lesser work.

    Parameters
    ----------
    size : int
        Side of a block, odd.
    stride : int
        Pixels between positions.
    cut : Cut
        Of the slice.
    """
    asked = _Asked(_network("readme", Block(size), cut.device), stride, cut)
    blocks = asked.blocks(asked.positions(asked.sample()))
    skipped: list[str] = []
    peers = _others(asked.cnn, blocks, asked.n, skipped, _limit(min(asked.products), cut))
    return _grid_case(asked, f"CNN readme, {size} px", peers, skipped)


def towers_case(
    size: int, stride: int = 8, levels: tuple[int, ...] = (1,), cut: Cut = SLICE
) -> Benchmark:
    """Our network at all positions of a slice; at 33 and 63 px beside the seed's, dense.

    Parameters
    ----------
    size : int
        Side of a block, odd.
    stride : int
        Pixels between positions.
    levels : tuple of int
        Of the block; a tower reads each.
    cut : Cut
        Of the slice.
    """
    asked = _Asked(_network("towers", Block(size, levels), cut.device), stride, cut)
    peers: dict[str, Peer] = {}
    if size in _SIZES:
        readme = replace(asked, cnn=_network("readme", Block(size), cut.device))
        peers[f"ours, readme, {size} px, dense"] = Peer(readme.grid_job("dense"))
    peers |= _limit(min(asked.products), cut)
    name = f"CNN towers, {size} px, {'one level' if levels == (1,) else f'levels {levels}'}"
    return _grid_case(asked, name, peers, [])


def batch_case(size: int, batch: int, cut: Cut = SLICE) -> Benchmark:
    """The seed's network block by block, on a batch of blocks that are cut from the slice.

    Parameters
    ----------
    size : int
        Side of a block, odd.
    batch : int
        Blocks.
    cut : Cut
        Of the slice.
    """
    from organfast.models.dense import block_products

    asked = _Asked(_network("readme", Block(size), cut.device), 4, cut)
    positions = np.ascontiguousarray(asked.positions(asked.sample())[:batch])
    skipped: list[str] = []
    out = np.empty((len(positions), N_CLASSES), np.float32)

    def job() -> NDArray[np.float32]:
        asked.cnn.probabilities(asked.slab, positions, out)
        return out

    n = len(positions)
    products = block_products(asked.cnn.architecture, asked.cnn.pattern, N_CLASSES)
    limit = _limit(products, cut)
    return Benchmark(
        f"CNN readme, {size} px, block by block, a batch of {n}{_where(cut)}",
        job,
        _others(asked.cnn, asked.blocks(positions), n, skipped, limit),
        n_items=n,
        unit="positions",
        skipped=tuple(skipped),
        threads=n_threads(),
        first_call=_first_call(job),
    )


def _grid_case(asked: _Asked, name: str, peers: dict[str, Peer], skipped: list[str]) -> Benchmark:
    """By the method that takes fewer multiplications, beside the other."""
    dense, block = asked.products
    ours, other = ("dense", "blocks") if dense < block else ("blocks", "dense")
    job, pixels = asked.grid_job(ours), asked.cut.pixels
    rows = asked.sample() if other == "blocks" else slice(0, len(asked.axis))
    n = (rows.stop - rows.start) * len(asked.axis)
    beside = {f"ours, {_METHODS[other]}{_share(n, asked.n)}": Peer(asked.grid_job(other, rows), n)}
    return Benchmark(
        f"{name}, {_METHODS[ours]}, stride {asked.stride}, a {pixels} x {pixels} slice"
        f"{_where(asked.cut)}",
        job,
        {**beside, **peers},
        n_items=asked.n,
        unit="positions",
        skipped=tuple(skipped),
        threads=n_threads(),
        n_voxels=pixels * pixels,
        first_call=_first_call(job),
    )


def _where(cut: Cut) -> str:
    return f", {n_threads()} threads" if cut.device == "cpu" else ", GPU"


def _first_call(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


# --- peers ----------------------------------------------------------------------------------------


def _share(n: int, of: int) -> str:
    return "" if n == of else f", {n:,} of the positions"


def _others(
    cnn: Cnn, blocks: NDArray[np.int16], n_asked: int, skipped: list[str], limit: dict[str, Peer]
) -> dict[str, Peer]:
    """The same weights by others, on blocks that are in memory, a batch at a time; and the limit.

    NumPy's threads go on looking for work for a while after a product; so what comes next is torch
    with one thread, which minds them least.
    """
    n, found = len(blocks), {}
    how = f"blocks copied beforehand{_share(n, n_asked)}"
    if installed("onnx", skipped) and installed("onnxruntime", skipped):
        found[f"onnxruntime, as exported, {how}"] = Peer(_by_onnxruntime(cnn, blocks), n)
    found |= limit
    if installed("torch", skipped):
        for threads in sorted({1, n_threads()}):
            name = f"torch, {'one thread' if threads == 1 else f'{threads} threads'}, {how}"
            found[name] = Peer(_by_torch(cnn, blocks, threads), n)
    return found


def _in_batches(run: Callable[[Any], Any], blocks: Any) -> Job:
    parts = [blocks[start : start + _BATCH] for start in range(0, len(blocks), _BATCH)]
    return lambda: np.concatenate([run(part) for part in parts])


def _by_onnxruntime(cnn: Cnn, blocks: NDArray[np.int16]) -> Job:
    import onnxruntime

    from organfast.models.export import onnx_file

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads()
    session = onnxruntime.InferenceSession(
        onnx_file(cnn), options, providers=["CPUExecutionProvider"]
    )
    return _in_batches(lambda part: session.run(None, {"blocks": part})[0], blocks)


def _by_torch(cnn: Cnn, blocks: NDArray[np.int16], threads: int) -> Job:
    """Eager, on float32 blocks that are windowed beforehand; channels last, which is faster."""
    import torch

    low, high = cnn.window
    levels = torch.from_numpy(np.clip((blocks.astype(np.float32) - low) / (high - low), 0, 1))
    towers = [_torch_tower(cnn, t) for t in range(len(cnn.architecture.towers))]
    head = _torch_head(cnn)

    def run(part: Any) -> NDArray[np.float32]:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            flat = torch.cat([tower(part[:, t]) for t, tower in enumerate(towers)], 1)
            found: NDArray[np.float32] = torch.softmax(head(flat), 1).numpy()
            return found

    return _in_batches(run, levels)


def _torch_tower(cnn: Cnn, t: int) -> Any:
    import torch
    from torch import nn

    layers: list[Any] = []
    sizes, channels = map_sizes(cnn.architecture, t), cnn.architecture.tower_channels[t]
    for n, layer in enumerate(cnn.architecture.towers[t]):
        if not isinstance(layer, Conv):
            layers.append(nn.MaxPool2d(layer.size))
            continue
        before, after = conv_padding(layer, sizes[n])
        even = before == after
        if not even:
            layers.append(nn.ZeroPad2d((before, after, before, after)))
        padding = before if even else 0
        conv = nn.Conv2d(channels[n], layer.features, layer.size, layer.stride, padding)
        kernel = cnn.params[f"tower{t}.conv{n}.kernel"].transpose(3, 2, 0, 1)
        _give(conv, kernel, cnn.params[f"tower{t}.conv{n}.bias"])
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten()).to(memory_format=torch.channels_last)


def _torch_head(cnn: Cnn) -> Any:
    from torch import nn

    from organfast.models.export import channels_first

    layers: list[Any] = []
    for n, layer in enumerate((*cnn.architecture.head, Dense(cnn.n_labels))):
        if not isinstance(layer, Dense):
            continue
        kernel = cnn.params[f"dense{n}.kernel"]
        if not layers:
            kernel = kernel[channels_first(cnn)]
        linear = nn.Linear(*kernel.shape)
        _give(linear, kernel.T, cnn.params[f"dense{n}.bias"])
        layers += [linear, nn.ReLU()] if layer.relu else [linear]
    return nn.Sequential(*layers)


def _give(layer: Any, kernel: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
    import torch

    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel.copy()))
        layer.bias.copy_(torch.from_numpy(bias.copy()))


@cache
def _matrix_product(n: int, device: str) -> Job:
    a, b = np.random.default_rng(0).random((2, n, n), np.float32)
    if device == "cpu":
        out = np.empty((n, n), np.float32)
        return lambda: np.matmul(a, b, out)
    import jax

    from organfast.models.devices import find_devices

    there = jax.device_put((a, b), find_devices(device)[0])
    product = jax.jit(partial(jax.numpy.matmul, precision="highest"))
    return lambda: product(*there).block_until_ready()


def _limit(products: float, cut: Cut) -> dict[str, Peer]:
    """As many products as a position takes, in one product of matrices: the machine's peak."""
    n, by = cut.matrix, "NumPy" if cut.device == "cpu" else "JAX"
    n_items = max(1, round(n**3 / products))
    name = f"float32 product of two {n} x {n} matrices by {by}, as many multiplications"
    return {name: Peer(_matrix_product(n, cut.device), n_items, is_limit=True)}


# --- by name --------------------------------------------------------------------------------------


def cnn_cases() -> dict[str, Callable[[], Benchmark]]:
    """Name -> builder, as ``organfast bench --cnn`` prints them; on a GPU, too, where there is one.

    Raises
    ------
    ValueError
        JAX is not installed.
    """
    if find_spec("jax") is None or find_spec("flax") is None:
        raise ValueError('the benchmarks of the CNN need JAX; pip install "organfast[cnn]"')
    cases: dict[str, Callable[[], Benchmark]] = {}
    for device in ("cpu", "gpu") if _has_gpu() else ("cpu",):
        cut = Cut(device=device)
        for size in _SIZES:
            for stride in (size, *_STRIDES):
                cases[f"readme {size} / {stride}, {device}"] = partial(
                    readme_case, size, stride, cut
                )
            for batch in (32, 256):
                cases[f"readme {size}, {batch}, {device}"] = partial(batch_case, size, batch, cut)
        for size in _TOWER_SIZES:
            cases[f"towers {size}, {device}"] = partial(towers_case, size, cut=cut)
        cases[f"two towers, {device}"] = partial(towers_case, 33, 8, (1, 8), cut)
    return cases


def gpu_note() -> str:
    """Which GPU was measured, or that none was."""
    if not _has_gpu():
        return "GPU: not measured"
    import jax

    return f"GPU: {jax.local_devices(backend='gpu')[0].device_kind}"


def _has_gpu() -> bool:
    import jax

    try:
        return bool(jax.local_devices(backend="gpu"))
    except RuntimeError:
        return False
