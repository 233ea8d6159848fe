"""The benchmark cases, shared by ``organfast bench``, asv and pytest-benchmark.

A case is our function and its named peers doing the same work on the same seeded input. Speed is
reported as the median over rounds of peer time / our time, the two interleaved within each round,
for absolute times mean little on a shared machine. A peer that is not installed is named as
skipped, never replaced.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CASES",
    "SIZES",
    "Benchmark",
    "Comparison",
    "compare",
    "enlargement_case",
    "forest_case",
    "gather_case",
    "in_threads",
    "load_case",
]

SIZES = (17, 33, 63, 97)
N_CLASSES = 23
Job = Callable[[], object]


@dataclass(frozen=True)
class Benchmark:
    """One piece of work, done by us and by peers.

    Parameters
    ----------
    name : str
        What is timed, with its sizes.
    ours : callable
        Our function on a prepared input; called without arguments.
    peers : dict of str to callable
        The same work by others.
    skipped : tuple of str
        Peers that are not installed.
    n_items : int
        Items of work in one call.
    unit : str
        What an item is.
    """

    name: str
    ours: Job
    peers: dict[str, Job]
    skipped: tuple[str, ...] = ()
    n_items: int = 1
    unit: str = "call"


@dataclass(frozen=True)
class Comparison:
    """What was measured of a benchmark.

    Parameters
    ----------
    name : str
        The benchmark's.
    items_per_second : float
        Our median rate.
    unit : str
        What an item is.
    ratios : dict of str to (float, float, float)
        Per peer: peer time / our time, as (median, lowest, highest) over the rounds.
    skipped : tuple of str
        Peers that are not installed.
    """

    name: str
    items_per_second: float
    unit: str
    ratios: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def compare(benchmark: Benchmark, rounds: int = 7) -> Comparison:
    """Time a benchmark: every job once to warm up, then all jobs in turn, round after round.

    Parameters
    ----------
    benchmark : Benchmark
        What to time.
    rounds : int
        Rounds; each gives one ratio per peer.
    """
    jobs = {"": benchmark.ours, **benchmark.peers}
    for job in jobs.values():
        job()
    seconds = {name: np.empty(rounds) for name in jobs}
    for n in range(rounds):
        for name, job in jobs.items():
            seconds[name][n] = _time(job)
    ratios = {name: seconds[name] / seconds[""] for name in benchmark.peers}
    return Comparison(
        name=benchmark.name,
        items_per_second=float(benchmark.n_items / np.median(seconds[""])),
        unit=benchmark.unit,
        ratios={
            name: (float(np.median(r)), float(r.min()), float(r.max()))
            for name, r in ratios.items()
        },
        skipped=benchmark.skipped,
    )


def in_threads(build: Callable[[], Benchmark], threads: int) -> Benchmark:
    """The same work once per thread, all at a time; peers do it one after the other.

    Parameters
    ----------
    build : callable
        Makes the case; called once per thread, so that no buffer is shared.
    threads : int
        Threads on our side.
    """
    if threads == 1:
        return build()
    cases = [build() for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def ours() -> object:
        return [future.result() for future in [pool.submit(case.ours) for case in cases]]

    def one_after_the_other(peer: Job) -> Job:
        return lambda: [peer() for _ in cases]

    return replace(
        cases[0],
        name=f"{cases[0].name}, {threads} threads",
        ours=ours,
        peers={f"{name}, 1 thread": one_after_the_other(p) for name, p in cases[0].peers.items()},
        n_items=cases[0].n_items * threads,
    )


def _time(job: Job, at_least: float = 0.02) -> float:
    """Seconds per call; short jobs are repeated until ``at_least`` seconds have passed."""
    calls, start = 0, time.perf_counter()
    while True:
        job()
        calls += 1
        passed = time.perf_counter() - start
        if passed >= at_least:
            return passed / calls


# --- inputs ---------------------------------------------------------------------------------------


@cache
def _slice() -> NDArray[np.int16]:
    """A 512 x 512 slice of a phantom's abdomen, HU; made once."""
    from organfast.painting import paint
    from organfast.phantom import FieldOfView, phantom

    anatomy = phantom(FieldOfView((512, 512, 1), (0.8, 0.8, 3.0), 40.0), seed=1)
    scan = paint(anatomy, seed=1)
    found: NDArray[np.int16] = np.ascontiguousarray(scan.working[0])
    return found


@cache
def _labelled_slice() -> NDArray[np.uint8]:
    """The slice's labels of the default table."""
    from organfast.phantom import FieldOfView, class_labels, phantom

    anatomy = phantom(FieldOfView((512, 512, 1), (0.8, 0.8, 3.0), 40.0), seed=1)
    labels = class_labels(anatomy)
    found: NDArray[np.uint8] = np.ascontiguousarray(labels.transpose(2, 1, 0)[0])
    return found


def _installed(module: str, skipped: list[str]) -> bool:
    if find_spec(module) is None:
        skipped.append(module)
        return False
    return True


# --- cases ----------------------------------------------------------------------------------------


def gather_case(size: int, stride: int) -> Benchmark:
    """Blocks of a slice windowed into a reused buffer, against NumPy and against memcpy.

    Parameters
    ----------
    size : int
        Side of a block, odd.
    stride : int
        Pixels between blocks. At most 2 MB of blocks are written at a time, as in use.
    """
    from organfast.blocks import gather_blocks

    pixels, window = _slice(), (-160.0, 240.0)
    half = size // 2
    padded = np.pad(pixels, half, constant_values=-1024)
    rows = np.arange(stride // 2, len(pixels), stride)
    centres = np.stack(np.meshgrid(rows, rows, indexing="ij"), axis=-1).reshape(-1, 2)
    n = max(1, min(len(centres), 2**21 // (4 * size * size)))
    out = np.empty((n, size, size), np.float32)
    memory = np.empty_like(out)
    n_rows = -(-n // len(rows))
    views = np.lib.stride_tricks.sliding_window_view(padded, (size, size))
    views = views[rows[0] :: stride, rows[0] :: stride][:n_rows]

    copied = np.empty(views.shape, np.float32)

    def by_numpy() -> object:
        scaled = (views.astype(np.float32) - window[0]) / (window[1] - window[0])
        np.copyto(copied, np.clip(scaled, 0, 1, out=scaled))
        return copied

    return Benchmark(
        f"gather {size} px, stride {stride}",
        lambda: gather_blocks(pixels, centres[:n], size, window, out),
        {"numpy sliding_window_view + copy": by_numpy, "memcpy": lambda: np.copyto(memory, out)},
        n_items=n,
        unit="blocks",
    )


def enlargement_case(n_classes: int, n_blocks: int, n_pixels: int) -> Benchmark:
    """Labels and confidence of a slice, against scipy, OpenCV, torch and jax.

    Parameters
    ----------
    n_classes : int
        Classes; a few compete at each place, as in a scan.
    n_blocks : int
        Blocks along each side.
    n_pixels : int
        Pixels along each side, a multiple of ``n_blocks``.
    """
    from scipy import ndimage

    from organfast.probability import enlarge

    probabilities = _competing_classes(n_classes, n_blocks)
    stride = n_pixels // n_blocks
    shape = (n_pixels, n_pixels)
    by_class = np.ascontiguousarray(probabilities.transpose(2, 0, 1))

    def by_scipy() -> object:
        full = ndimage.zoom(by_class, (1, stride, stride), order=1)
        return full.argmax(axis=0), full.max(axis=0)

    peers: dict[str, Job] = {"scipy.ndimage.zoom": by_scipy}
    skipped: list[str] = []
    if _installed("cv2", skipped):
        peers["cv2.resize"] = _by_opencv(by_class, shape)
    if _installed("torch", skipped):
        peers["torch interpolate"] = _by_torch(by_class, shape)
    if _installed("jax", skipped):
        peers["jax.image.resize"] = _by_jax(by_class, shape)
    return Benchmark(
        f"enlarge {n_classes} x {n_blocks} x {n_blocks} to {n_pixels} px",
        lambda: enlarge(probabilities, shape, stride),
        peers,
        tuple(skipped),
        n_items=n_pixels * n_pixels,
        unit="voxels",
    )


def _competing_classes(n_classes: int, n_blocks: int) -> NDArray[np.float32]:
    """Smooth maps in which a few classes compete at each place and the others are all but zero."""
    from scipy import ndimage

    fields = np.random.default_rng(0).normal(size=(n_classes, n_blocks, n_blocks))
    smooth = ndimage.gaussian_filter(fields, (0, n_blocks / 16, n_blocks / 16), mode="nearest")
    logits = 4 * smooth / smooth.std()
    weights = np.exp(logits - logits.max(axis=0))
    weights[weights < 1e-3] = 0  # a forest's leaves give exact zeros
    probabilities = (weights / weights.sum(axis=0)).astype(np.float32)
    return np.ascontiguousarray(probabilities.transpose(1, 2, 0))


def _by_opencv(by_class: NDArray[np.float32], shape: tuple[int, int]) -> Job:
    """Class by class with a running maximum: several times faster than 23 channels and argmax."""
    import cv2

    cv2.setNumThreads(1)

    def job() -> object:
        labels = np.zeros(shape, np.uint8)
        best = cv2.resize(by_class[0], shape[::-1], interpolation=cv2.INTER_LINEAR)
        for label, coarse in enumerate(by_class[1:], start=1):
            full = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_LINEAR)
            labels[full > best] = label
            np.maximum(best, full, out=best)
        return labels, best

    return job


def _by_jax(by_class: NDArray[np.float32], shape: tuple[int, int]) -> Job:
    import jax

    def enlarged(coarse: Any) -> Any:
        full = jax.image.resize(coarse, (len(by_class), *shape), "linear")
        return full.argmax(axis=0), full.max(axis=0)

    compiled = jax.jit(enlarged)
    return lambda: jax.block_until_ready(compiled(by_class))


def _by_torch(by_class: NDArray[np.float32], shape: tuple[int, int]) -> Job:
    import torch

    torch.set_num_threads(1)
    batch = torch.from_numpy(by_class)[None]

    def job() -> object:
        full = torch.nn.functional.interpolate(batch, size=shape, mode="bilinear")
        return full.max(dim=1)

    return job


def load_case(shape: tuple[int, int, int]) -> Benchmark:
    """A compressed scan read to HU, against nibabel's ``get_fdata`` and against inflating alone.

    Parameters
    ----------
    shape : (n_x, n_y, n_z) int
        Voxels of the scan: at most 512 columns and rows; the middle of a phantom's slice, shifted
        from slice to slice.
    """
    import nibabel
    from isal import igzip

    from organfast.nifti import read_volume, write_volume
    from organfast.volume import Volume

    hu = np.empty(shape, np.int16, order="F")
    first_row, first_column = (512 - shape[1]) // 2, (512 - shape[0]) // 2
    pixels = _slice()[first_row:, first_column:][: shape[1], : shape[0]].T
    for z in range(shape[2]):
        hu[:, :, z] = np.roll(pixels, z, axis=1)
    folder = tempfile.mkdtemp(prefix="organfast-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "scan.nii.gz"
    write_volume(path, Volume(hu, np.diag([0.8, 0.8, 3.0, 1.0])))

    def inflate() -> object:
        with igzip.open(path) as file:
            return sum(len(part) for part in iter(lambda: file.read(1 << 20), b""))

    return Benchmark(
        f"read {' x '.join(map(str, shape))} int16 .nii.gz",
        lambda: read_volume(path),
        {
            "nibabel get_fdata(float32)": lambda: nibabel.load(path).get_fdata(dtype=np.float32),
            "isal inflate alone": inflate,
        },
        n_items=hu.size,
        unit="voxels",
    )


def forest_case(size: int, stride: int, n_trees: int = 100, n_per_class: int = 400) -> Benchmark:
    """Probabilities at every position of a slice, against scikit-learn on copied blocks.

    One thread on both sides, trees of unlimited depth, every position of the block grid inside the
    body or not. Both probabilities are checked to be equal, bit for bit, before anything is timed.

    Parameters
    ----------
    size : int
        Side of a block, odd.
    stride : int
        Pixels between positions.
    n_trees : int
        Trees.
    n_per_class : int
        Training blocks per class.
    """
    from organfast.blocks import Block, gather_blocks
    from organfast.grid import BlockGrid, GridVolume
    from organfast.levels import levels_slab
    from organfast.models.forest import Forest

    pattern = Block(size)
    estimator = _estimator(size, n_trees, n_per_class)
    forest = Forest.from_sklearn(estimator, pattern, N_CLASSES)
    pixels = _slice()
    volume = GridVolume(pixels[None])
    slab = levels_slab(volume, pattern, 0, 1)
    rows, columns = BlockGrid(volume.shape, (1, stride, stride)).centres[1:]
    centres = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    positions = np.zeros((len(centres), 3), np.int32)
    positions[:, 1:] = centres + size // 2
    blocks = gather_blocks(pixels, centres, size).reshape(len(centres), -1)
    found = np.empty((len(centres), N_CLASSES))

    def ours() -> None:
        forest.probabilities(slab, positions, found)

    ours()
    expected = np.zeros_like(found)
    expected[:, estimator.classes_] = estimator.predict_proba(blocks)
    np.testing.assert_array_equal(found, expected)
    return Benchmark(
        f"forest {n_trees} trees, {size} px, stride {stride}",
        ours,
        {"scikit-learn predict_proba": lambda: estimator.predict_proba(blocks)},
        n_items=len(centres),
        unit="blocks",
    )


@cache
def _estimator(size: int, n_trees: int, n_per_class: int) -> Any:
    """A random forest of scikit-learn that learned the slice's own classes from its blocks."""
    from sklearn.ensemble import RandomForestClassifier

    from organfast.blocks import gather_blocks
    from organfast.sampling import sample_positions

    n_wanted = dict.fromkeys(range(N_CLASSES), n_per_class)
    positions, labels = sample_positions(_labelled_slice()[None], n_wanted, seed=0)
    blocks = gather_blocks(_slice(), positions[:, 1:], size).reshape(len(positions), -1)
    estimator = RandomForestClassifier(n_trees, random_state=0, n_jobs=-1)
    return estimator.fit(blocks, labels).set_params(n_jobs=1)


# Name -> builder, as `organfast bench` prints them. Builders do their set-up when they are called.
CASES: dict[str, Callable[[], Benchmark]] = {
    "gather": partial(gather_case, 33, 33),
    "gather_dense": partial(gather_case, 33, 8),
    "enlarge": partial(enlargement_case, 23, 64, 512),
    "load": partial(load_case, (512, 512, 300)),
    **{f"forest_{size}": partial(forest_case, size, 8) for size in SIZES},
}
