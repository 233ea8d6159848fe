"""The benchmark cases, shared by ``organfast bench``, asv and pytest-benchmark."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.bench import Benchmark, Job, Measurable, Peer, Scaling, in_threads, together
from organfast.benchforest import (
    context_case,
    installed,
    labels_case,
    neighbours_case,
    onnx_case,
    slice_case,
    timed_slice,
    visits_case,
    working_grid_case,
)
from organfast.benchscan import ScanCase, gunzip
from organfast.benchscores import bootstrap_case, confusion_case, label_pair_case, surface_case
from organfast.blocks import Block, gather_blocks
from organfast.grid import ModelGrid
from organfast.kernels import forest as forest_kernels
from organfast.models.forest import kernel_path

__all__ = [
    "SIZES",
    "SWEEP",
    "TABLE",
    "cleaning_case",
    "enlargement_case",
    "gather_case",
    "load_case",
    "scaling_case",
    "strides",
]

SIZES = (17, 33, 63, 97)
_WINDOW = (-160.0, 240.0)


def scaling_case(
    build: Callable[[], Benchmark], times: int = 1, n_steps: int = 8_000_000
) -> Scaling:
    """A case on two threads over one, beside a loop that stays in registers.

    Parameters
    ----------
    build : callable
        Makes the case.
    times : int
        How often the case is done at a time: waking a thread takes as long as a short one.
    n_steps : int
        Length of the loop.
    """
    from organfast.kernels.rates import shifted

    def repeated(job: Job) -> Job:
        return lambda: [job() for _ in range(times)]

    first = build()
    one, other = repeated(first.ours), repeated(build().ours)
    loop = partial(shifted, n_steps)
    return Scaling(
        f"{first.name}: two threads, twice the work",
        one,
        together([one, other]),
        "the speed-up of a Numba loop in registers",
        loop,
        together([loop, loop]),
    )


def gather_case(size: int, stride: int) -> Benchmark:
    """Blocks of a slice windowed into a reused buffer, against copies of views, memcpy and memset.

    Parameters
    ----------
    size : int
        Side of a block, odd.
    stride : int
        Pixels between blocks. At most 2 MB of blocks are written at a time, as in use.
    """
    pixels, half = timed_slice(), size // 2
    rows = np.arange(stride // 2, len(pixels), stride)
    centres = np.stack(np.meshgrid(rows, rows, indexing="ij"), axis=-1).reshape(-1, 2)
    n_rows = max(1, min(len(rows), 2**21 // (4 * size * size * len(rows))))
    n = n_rows * len(rows)
    padded = np.pad(pixels, half, constant_values=-1024)[rows[0] :, rows[0] :]
    padded = np.ascontiguousarray(
        padded[: (n_rows - 1) * stride + size, : (len(rows) - 1) * stride + size]
    )
    out = np.empty((n, size, size), np.float32)
    memory = np.empty_like(out)
    skipped: list[str] = []
    peers = {"numpy sliding_window_view, normalised": Peer(_by_numpy(padded, size, stride))}
    for module, name, by in (
        ("skimage", "scikit-image view_as_windows, normalised", _by_skimage),
        ("torch", "torch unfold, normalised", _by_torch_unfold),
        ("jax", "jax dynamic_slice, vmapped and compiled", _by_jax_slices),
        ("monai", "MONAI iter_patch, normalised together", _by_monai),
    ):
        if installed(module, skipped) and not (module == "monai" and stride > size):
            peers[name] = Peer(by(padded, size, stride))
    peers["memcpy of the bytes written"] = Peer(lambda: np.copyto(memory, out), is_limit=True)
    peers["memset of the bytes written"] = Peer(lambda: memory.fill(0), is_limit=True)
    return Benchmark(
        f"gather {size} px, stride {stride}",
        lambda: gather_blocks(pixels, centres[:n], size, _WINDOW, out),
        peers,
        n_items=n,
        unit="blocks",
        skipped=tuple(skipped),
        n_voxels=n * stride * stride,
    )


def _normalised(views: NDArray[np.int16], out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Views copied as float32 and windowed, in place."""
    np.copyto(out, views)
    out -= _WINDOW[0]
    out *= 1 / (_WINDOW[1] - _WINDOW[0])
    return np.clip(out, 0, 1, out=out)


def _by_numpy(padded: NDArray[np.int16], size: int, stride: int) -> Job:
    views = np.lib.stride_tricks.sliding_window_view(padded, (size, size))[::stride, ::stride]
    out = np.empty(views.shape, np.float32)
    return lambda: _normalised(views, out)


def _by_skimage(padded: NDArray[np.int16], size: int, stride: int) -> Job:
    from skimage.util import view_as_windows

    out = np.empty(view_as_windows(padded, (size, size), stride).shape, np.float32)
    return lambda: _normalised(view_as_windows(padded, (size, size), stride), out)


def _by_torch_unfold(padded: NDArray[np.int16], size: int, stride: int) -> Job:
    import torch

    torch.set_num_threads(1)
    pixels, width = torch.from_numpy(padded), _WINDOW[1] - _WINDOW[0]
    out = torch.empty(pixels.unfold(0, size, stride).unfold(1, size, stride).shape)

    def job() -> object:
        out.copy_(pixels.unfold(0, size, stride).unfold(1, size, stride))
        return out.sub_(_WINDOW[0]).mul_(1 / width).clamp_(0, 1)

    return job


def _by_jax_slices(padded: NDArray[np.int16], size: int, stride: int) -> Job:
    import jax.numpy as jnp

    jax = _jax_on_one_thread()
    n_rows, n_cols = ((n - size) // stride + 1 for n in padded.shape)
    corners = np.indices((n_rows, n_cols), np.int32).reshape(2, -1).T * stride

    def blocks(pixels: Any, places: Any) -> Any:
        def block(place: Any) -> Any:
            return jax.lax.dynamic_slice(pixels, (place[0], place[1]), (size, size))

        found = jax.vmap(block)(places).astype(jnp.float32)
        return jnp.clip((found - _WINDOW[0]) * (1 / (_WINDOW[1] - _WINDOW[0])), 0, 1)

    compiled, given = jax.jit(blocks), (jnp.asarray(padded), jnp.asarray(corners))
    return lambda: jax.block_until_ready(compiled(*given))


@cache
def _jax_on_one_thread() -> Any:
    """JAX, whose pool has as many threads as there are cores when it first looks for devices."""
    import jax

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        jax.devices()
    finally:
        os.sched_setaffinity(0, cores)
    return jax


def _by_monai(padded: NDArray[np.int16], size: int, stride: int) -> Job:
    from monai.data.utils import iter_patch

    n = int(np.prod([(edge - size) // stride + 1 for edge in padded.shape]))
    out = np.empty((n, size, size), np.float32)
    blocks = np.empty((n, size, size), np.int16)

    def job() -> object:
        patches = iter_patch(
            padded, (size, size), overlap=1 - stride / size, copy_back=False, mode=None
        )
        for block, (patch, _) in zip(blocks, islice(patches, n), strict=True):
            block[:] = patch
        return _normalised(blocks, out)

    return job


def enlargement_case(n_classes: int, n_blocks: int, n_pixels: int) -> Benchmark:
    """Labels and confidence of a slice, against scipy, OpenCV, torch and jax.

    The others place blocks half a pixel apart from us where the stride is even, and are allowed to.

    Parameters
    ----------
    n_classes : int
        Classes; a few compete at each place, as in a scan.
    n_blocks : int
        Blocks along each side.
    n_pixels : int
        Pixels along each side, a multiple of ``n_blocks``.
    """
    from organfast.probability import enlarge

    probabilities = _competing_classes(n_classes, n_blocks)
    stride = n_pixels // n_blocks
    shape = (n_pixels, n_pixels)
    by_class = np.ascontiguousarray(probabilities.transpose(2, 0, 1))
    skipped: list[str] = []
    peers = {"scipy.ndimage.zoom, argmax": Peer(_by_scipy(by_class, stride))}
    for module, name, by in (
        ("cv2", "cv2.resize, class by class, running maximum", _by_opencv),
        ("torch", "torch interpolate, max", _by_torch),
        ("jax", "jax.image.resize, argmax, compiled", _by_jax),
    ):
        if installed(module, skipped):
            peers[name] = Peer(by(by_class, shape))
    return Benchmark(
        f"enlarge {n_classes} x {n_blocks} x {n_blocks} to {n_pixels} px",
        lambda: enlarge(probabilities, shape, stride),
        peers,
        n_items=n_pixels * n_pixels,
        unit="voxels",
        skipped=tuple(skipped),
        n_voxels=n_pixels * n_pixels,
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


def _by_scipy(by_class: NDArray[np.float32], stride: int) -> Job:
    from scipy import ndimage

    def job() -> object:
        full = ndimage.zoom(by_class, (1, stride, stride), order=1, grid_mode=True, mode="nearest")
        return full.argmax(axis=0), full.max(axis=0)

    return job


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
    jax = _jax_on_one_thread()

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
        best, labels = full.max(dim=1)
        return labels[0], best[0]

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

    from organfast.nifti import read_volume, write_volume
    from organfast.volume import Volume

    hu = np.empty(shape, np.int16, order="F")
    first_row, first_column = (512 - shape[1]) // 2, (512 - shape[0]) // 2
    pixels = timed_slice()[first_row:, first_column:][: shape[1], : shape[0]].T
    for z in range(shape[2]):
        hu[:, :, z] = np.roll(pixels, z, axis=1)
    folder = tempfile.mkdtemp(prefix="organfast-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "scan.nii.gz"
    write_volume(path, Volume(hu, np.diag([0.8, 0.8, 3.0, 1.0])))
    return Benchmark(
        f"read {' x '.join(map(str, shape))} int16 .nii.gz",
        lambda: read_volume(path),
        {
            "nibabel get_fdata(float32)": Peer(
                lambda: nibabel.load(path).get_fdata(dtype=np.float32)
            ),
            "isal gunzip alone": Peer(partial(gunzip, path), is_limit=True),
        },
        n_items=hu.size,
        unit="voxels",
        n_voxels=hu.size,
    )


# --- what is printed ------------------------------------------------------------------------------


def cleaning_case(size: int = 256, n_islands: int = 500) -> Benchmark:
    """A label map cleaned, against cc3d that only finds the components of organs and of voids.

    Parameters
    ----------
    size : int
        Rows and columns of a slice of a phantom's trunk.
    n_islands : int
        Boxes of up to 7 voxels a side and of any label that are strewn over it.
    """
    import cc3d

    from organfast.anatomy import ClassTable
    from organfast.phantom import FieldOfView, class_labels, phantom
    from organfast.segmentation import Cleaning, clean

    classes = ClassTable.default()
    steps = (410 / size, 410 / size, 640 / (0.75 * size))
    field = FieldOfView.over("trunk", steps, size)
    stored = class_labels(phantom(field, 3), classes)
    labels = stored.transpose(2, 1, 0)
    random = np.random.default_rng(0)
    for _ in range(n_islands):
        starts = random.integers(0, np.array(labels.shape) - 8)
        ends = starts + random.integers(1, 8, 3)
        box = tuple(slice(a, b) for a, b in zip(starts, ends, strict=True))
        labels[box] = random.integers(0, len(classes))
    work, memory = labels.copy(), labels.copy()
    is_organ = np.isin(np.arange(len(classes)), classes.organs)

    def cleaned() -> None:
        np.copyto(work, labels)
        clean(work, classes, Cleaning(), 1e-3)

    def by_cc3d() -> None:
        organs = is_organ[labels]
        cc3d.connected_components(labels * organs, connectivity=26, return_N=True)
        cc3d.connected_components(~organs, connectivity=6, return_N=True)

    peers = {
        "cc3d, components of organs and voids found, nothing removed": Peer(by_cc3d),
        "memcpy of the map": Peer(lambda: np.copyto(memory, labels), is_limit=True),
    }
    return Benchmark(
        f"clean {size} px, {len(labels)} slices",
        cleaned,
        peers,
        n_items=1,
        unit="maps",
        n_voxels=labels.size,
    )


def strides(size: int) -> tuple[int, ...]:
    """Strides of the sweep: side by side, then denser.

    Parameters
    ----------
    size : int
        Side of a block.
    """
    return size, 8, 4, 1


_ENLARGE = partial(enlargement_case, 23, 64, 512)

# Name -> builder, as `organfast bench` prints them. Builders do their set-up when they are called.
TABLE: dict[str, Callable[[], Measurable]] = {
    "forest": neighbours_case,
    **{
        f"forest, {path}": partial(neighbours_case, path=path)
        for path in forest_kernels.PATHS
        if path != kernel_path()
    },
    "labels": labels_case,
    "context": working_grid_case,
    "visits": visits_case,
    "forest threads": partial(scaling_case, neighbours_case, 4),
    "enlarge threads": partial(scaling_case, _ENLARGE, 100),
    "small forest": onnx_case,
    "gather": partial(gather_case, 33, 33),
    "gather dense": partial(gather_case, 33, 8),
    "enlarge": _ENLARGE,
    "clean": cleaning_case,
    "load": partial(load_case, (512, 512, 300)),
    "confusion": confusion_case,
    "label pair": label_pair_case,
    "surfaces": surface_case,
    "bootstrap": bootstrap_case,
    "scan": ScanCase,
    "scan, native": partial(ScanCase, pattern=Block(33), grid=ModelGrid(None)),
}

_PATTERNS: tuple[tuple[str, Callable[[int], Benchmark], tuple[int, ...]], ...] = (
    *((f"{size} px", partial(slice_case, size), strides(size)) for size in SIZES),
    ("Context", context_case, strides(33)),
)

# (pattern, stride, threads) -> builder: what `organfast bench --full` prints besides.
SWEEP: dict[tuple[str, int, int], Callable[[], Measurable]] = {
    (pattern, stride, threads): partial(in_threads, partial(build, stride), threads)
    for pattern, build, densities in _PATTERNS
    for stride in densities
    for threads in (1, 2)
}
