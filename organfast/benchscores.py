"""Benchmark cases of scoring: label pairs, surfaces, the bootstrap."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.bench import Benchmark, Job, Peer
from organfast.benchforest import installed
from organfast.metrics import confusion, label_pair
from organfast.surfaces import surface_gaps

__all__ = ["bootstrap_case", "confusion_case", "label_pair_case", "surface_case"]

Labels = NDArray[np.uint8]
N_CLASSES = 23


def _pair(size: int) -> tuple[Labels, Labels, tuple[float, float, float]]:
    """A phantom's trunk, (0.78 size, size, size) voxels, the same shifted and strewn with boxes."""
    from organfast.phantom import FieldOfView, class_labels, phantom

    steps = (410 / size, 410 / size, 640 / (0.78125 * size))
    field = FieldOfView.over("trunk", steps, size)
    truth = np.ascontiguousarray(class_labels(phantom(field, 3)).transpose(2, 1, 0), np.uint8)
    predicted = np.roll(truth, (1, 2, 2), (0, 1, 2))
    random = np.random.default_rng(0)
    for _ in range(500):
        starts = random.integers(0, np.array(truth.shape) - 8)
        ends = starts + random.integers(1, 8, 3)
        box = tuple(slice(a, b) for a, b in zip(starts, ends, strict=True))
        predicted[box] = random.integers(0, N_CLASSES)
    return truth, predicted, (steps[2], steps[1], steps[0])


def _shape(labels: NDArray[Any]) -> str:
    return " x ".join(map(str, labels.shape[::-1]))


def confusion_case(size: int = 256) -> Benchmark:
    """The confusion matrix of two label maps, against NumPy and scikit-learn.

    Parameters
    ----------
    size : int
        Rows and columns of a slice.
    """
    truth, predicted, _ = _pair(size)

    def by_sklearn() -> object:
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(truth.ravel(), predicted.ravel(), labels=range(N_CLASSES))

    return Benchmark(
        f"confusion of {N_CLASSES} classes, {_shape(truth)} label maps",
        lambda: confusion(truth, predicted, N_CLASSES),
        {
            "numpy bincount of label pairs": Peer(lambda: _by_bincount(truth, predicted)),
            "scikit-learn confusion_matrix": Peer(by_sklearn),
        },
        n_items=truth.size,
        unit="voxels",
        n_voxels=truth.size,
    )


def label_pair_case(size: int = 256) -> Benchmark:
    """Confusion, boxes and centres of all classes in both maps, against NumPy with SciPy.

    Parameters
    ----------
    size : int
        Rows and columns of a slice.
    """
    from scipy import ndimage

    truth, predicted, _ = _pair(size)
    classes = np.arange(N_CLASSES)

    def by_scipy() -> object:
        found = [_by_bincount(truth, predicted)]
        for labels in (truth, predicted):
            # Label 0 is nothing to find_objects.
            found.append(ndimage.find_objects(labels + np.uint8(1), N_CLASSES))
            found.append(ndimage.center_of_mass(np.broadcast_to(1, labels.shape), labels, classes))
        return found

    return Benchmark(
        f"confusion, boxes and centres of {N_CLASSES} classes, {_shape(truth)} label maps",
        lambda: label_pair(truth, predicted, N_CLASSES),
        {"numpy bincount, scipy.ndimage find_objects and center_of_mass": Peer(by_scipy)},
        n_items=truth.size,
        unit="voxels",
        n_voxels=truth.size,
    )


def _by_bincount(truth: Labels, predicted: Labels) -> Any:
    pairs = truth.ravel().astype(np.int64)
    pairs *= N_CLASSES
    pairs += predicted.ravel()
    return np.bincount(pairs, minlength=N_CLASSES**2).reshape(N_CLASSES, N_CLASSES)


def surface_case(size: int = 256) -> Benchmark:
    """NSD, 95 % Hausdorff and mean distance of a liver, against SciPy and surface-distance.

    Parameters
    ----------
    size : int
        Rows and columns of a slice.
    """
    from organfast.anatomy import ClassTable

    truth, predicted, spacing = _pair(size)
    liver = ClassTable.default().index("liver")
    where = np.argwhere((truth == liver) | (predicted == liver))
    box = tuple(slice(a, b) for a, b in zip(where.min(axis=0), where.max(axis=0) + 1, strict=True))
    one, other = truth[box] == liver, predicted[box] == liver

    def ours() -> object:
        gaps = surface_gaps(one, other, spacing)
        return gaps.nsd(2), gaps.hausdorff_mm(95), gaps.mean_mm

    peers = {"scipy.ndimage correlate and distance_transform_edt": _by_scipy(one, other, spacing)}
    skipped: list[str] = []
    if installed("surface_distance", skipped):
        peers["surface-distance"] = _by_surface_distance(one, other, spacing)
    return Benchmark(
        f"surface distances of a liver, {_shape(one)} voxels",
        ours,
        {name: Peer(job) for name, job in peers.items()},
        n_items=one.size,
        unit="voxels",
        skipped=tuple(skipped),
        n_voxels=one.size,
    )


def _by_scipy(
    one: NDArray[np.bool_], other: NDArray[np.bool_], spacing: tuple[float, float, float]
) -> Job:
    """The same surface points and their distances; neither areas nor percentiles."""
    from scipy import ndimage

    kernel = (1 << np.arange(8, dtype=np.uint8)).reshape(2, 2, 2)

    def job() -> object:
        points = []
        for mask in (one, other):
            codes = ndimage.correlate(
                np.pad(mask.view(np.uint8), ((0, 1),) * 3), kernel, mode="constant"
            )
            points.append((codes > 0) & (codes < 255))
        away = [ndimage.distance_transform_edt(~p, sampling=spacing) for p in points]
        return away[1][points[0]], away[0][points[1]]

    return job


def _by_surface_distance(
    one: NDArray[np.bool_], other: NDArray[np.bool_], spacing: tuple[float, float, float]
) -> Job:
    import warnings

    import surface_distance

    def job() -> object:
        with warnings.catch_warnings():  # about where it takes SciPy's functions from
            warnings.simplefilter("ignore", DeprecationWarning)
            found = surface_distance.compute_surface_distances(one, other, spacing)
            return (
                surface_distance.compute_surface_dice_at_tolerance(found, 2),
                surface_distance.compute_robust_hausdorff(found, 95),
                surface_distance.compute_average_surface_distance(found),
            )

    return job


def bootstrap_case(
    n_patients: int = 12, n_columns: int = 21, n_resamples: int = 10_000
) -> Benchmark:
    """Means of resampled patients, organ by organ, against NumPy and SciPy.

    Parameters
    ----------
    n_patients, n_columns : int
        Size of the table.
    n_resamples : int
        How often patients are drawn.
    """
    from organfast.kernels.bootstrap import bootstrap_means

    values = np.random.default_rng(0).beta(5, 1.5, (n_patients, n_columns))
    values[::3, 0] = np.nan  # an organ that some patients lack
    out = np.empty((n_resamples, n_columns))

    def by_numpy() -> object:
        rows = np.random.default_rng(0).integers(0, n_patients, (n_resamples, n_patients))
        return np.nanmean(values[rows], axis=1)

    def by_scipy() -> object:
        from scipy.stats import bootstrap

        return bootstrap(
            (values,),
            np.nanmean,
            n_resamples=n_resamples,
            method="percentile",
            axis=0,
            rng=np.random.default_rng(0),
        )

    return Benchmark(
        f"bootstrap of {n_columns} means, {n_patients} patients, {n_resamples:,} resamples",
        lambda: bootstrap_means(values, 0, 0, out),
        {
            "numpy, rows drawn, nanmean": Peer(by_numpy),
            "scipy.stats.bootstrap of nanmean": Peer(by_scipy),
        },
        n_items=n_resamples,
        unit="resamples",
    )
