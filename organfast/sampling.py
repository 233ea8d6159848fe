"""Where training blocks come from: balanced positions of labelled voxels, patients kept apart.

The seed took 500-1000 random blocks per class and patient, later ones where earlier probability
maps were wrong. So does this module, and it keeps the blocks of one patient on one side of every
split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.blocks import gather_features
from organfast.body import body_voxels
from organfast.errors import InputError
from organfast.grid import (
    GridVolume,
    ModelGrid,
    Pattern,
    resample_labels,
    to_model_grid,
)
from organfast.layouts import Case, CaseLabels, case_labels
from organfast.levels import LevelWindow, levels_slab
from organfast.nifti import read_scan
from organfast.volume import Volume
from organfast.workers import Workers

__all__ = [
    "LabelledScan",
    "Split",
    "features_at",
    "label_counts",
    "labelled_scan",
    "on_model_grid",
    "sample_positions",
    "slabs_at",
    "split_patients",
]


_WINDOW_SLICES = 24
_LEAST_WEIGHT = 1e-9


@dataclass(frozen=True)
class Split:
    """Patients by what they are used for; each patient stands in one list only.

    Parameters
    ----------
    train : tuple of str
        Patients the classifier learns from.
    validation : tuple of str
        Patients that settings may be chosen on.
    test : tuple of str
        Patients that only the final score is measured on.

    Raises
    ------
    ValueError
        A patient stands in two lists, or nobody is left to train on.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        everyone = [*self.train, *self.validation, *self.test]
        twice = sorted({p for p in everyone if everyone.count(p) > 1})
        if twice:
            raise ValueError(f"patient {twice[0]} stands twice in the split")
        if not self.train:
            raise ValueError("the split leaves no patient to train on")

    @staticmethod
    def read(path: str | PathLike[str], patient_of: Mapping[str, str] | None = None) -> Split:
        """Read ``{"train": [...], "validation": [...], "test": [...]}``, or nnU-Net's splits.

        Those, ``[{"train": [...], "val": [...]}, ...]``, are folds, and name cases: of
        ``splits_final.json`` the first fold is taken, of ``splits_final.json#2`` the third.

        Parameters
        ----------
        path : path
            The file, with or without ``#`` and the fold, from 0.
        patient_of : mapping of str to str, optional
            Case -> patient, for nnU-Net's splits; by default each case is a patient.

        Raises
        ------
        InputError
            The file cannot be read, or is not such a split.
        """
        remedy = 'give JSON such as {"train": ["p1", "p2"], "validation": [], "test": ["p3"]}'
        file, fold = _file_and_fold(Path(path))
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(path, f"cannot be read as JSON ({error})", remedy) from None
        if isinstance(content, list):
            content = _fold(path, content, fold or 0, patient_of or {})
        elif fold is not None:
            raise InputError(path, "has no folds", "leave the # and what follows")
        if not isinstance(content, dict) or not set(content) <= {"train", "validation", "test"}:
            raise InputError(path, "is not a split of patients", remedy)
        lists = {use: names for use, names in content.items()}
        if not all(
            isinstance(names, list) and all(isinstance(n, str) for n in names)
            for names in lists.values()
        ):
            raise InputError(path, "is not a split of patients", remedy)
        try:
            return Split(**{"train": (), **{use: tuple(names) for use, names in lists.items()}})
        except ValueError as error:
            raise InputError(path, str(error), remedy) from None

    def text(self) -> str:
        """The split as JSON, ready to be written and given back with :meth:`read`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def check(self, patients: Iterable[str]) -> None:
        """Raise ValueError when the split names a patient that is not among ``patients``."""
        missing = {*self.train, *self.validation, *self.test} - set(patients)
        if missing:
            raise ValueError(f"the split names patient {min(missing)}, who is not in the dataset")


def _file_and_fold(path: Path) -> tuple[Path, int | None]:
    """A file as it is named, if it is there; else what stands before a # and the number behind."""
    name, mark, number = path.name.rpartition("#")
    if not mark or not number.isdecimal() or path.exists():
        return path, None
    return path.with_name(name), int(number)


def _fold(
    path: str | PathLike[str], folds: list[Any], number: int, patient_of: Mapping[str, str]
) -> dict[str, list[str]]:
    """A fold of nnU-Net's, as patients."""
    remedy = 'give [{"train": ["case1"], "val": ["case2"]}, ...]'
    if number >= len(folds):
        raise InputError(path, f"has {len(folds)} folds, from 0", "name one of them after the #")
    fold = folds[number]
    if not isinstance(fold, dict) or set(fold) != {"train", "val"}:
        raise InputError(path, f"has a fold {number} that is no split of nnU-Net", remedy)
    patients = {}
    for use, names in (("train", fold["train"]), ("validation", fold["val"])):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(path, f"has a fold {number} that is no split of nnU-Net", remedy)
        patients[use] = list(dict.fromkeys(patient_of.get(name, name) for name in names))
    for patient in patients["train"]:
        if patient in patients["validation"]:
            raise InputError(
                path,
                f"has cases of patient {patient} both to train and to validate in fold {number}",
                "split by patient",
            )
    return patients


def split_patients(patients: Iterable[str], seed: int = 0) -> Split:
    """Split patients at random: a fifth to validate and a fifth to test, when there are enough.

    With two patients or fewer all of them train; with three or four one of them is tested on.

    Parameters
    ----------
    patients : iterable of str
        Patient ids; repeats (several scans of one patient) count once.
    seed : int
        Seed of the shuffle. The same patients in any order give the same split.

    >>> split = split_patients(["a", "b", "c", "d", "e"])
    >>> len(split.train), len(split.validation), len(split.test)
    (3, 1, 1)
    """
    everyone = sorted(set(patients))
    shuffled = [everyone[i] for i in np.random.default_rng(seed).permutation(len(everyone))]
    n = len(everyone)
    n_test = 0 if n < 3 else max(1, n // 5)
    n_validation = 0 if n < 5 else max(1, n // 5)
    return Split(
        train=tuple(sorted(shuffled[n_test + n_validation :])),
        validation=tuple(sorted(shuffled[n_test : n_test + n_validation])),
        test=tuple(sorted(shuffled[:n_test])),
    )


def sample_positions(
    labels: NDArray[np.unsignedinteger],
    n_wanted: Mapping[int, int],
    seed: int | Sequence[int],
    weights: NDArray[np.floating] | None = None,
    weighted_share: float = 0.5,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Random voxels of each wanted label, drawn without replacement.

    Parameters
    ----------
    labels : (K, R, C) unsigned int
        Label map on the model grid, any memory order.
    n_wanted : mapping of int to int
        Most positions of each label; a label with fewer voxels gives all it has, labels that are
        not named are passed over.
    seed : int or sequence of int
        Seed of ``numpy.random.default_rng``.
    weights : (K, R, C) float, optional
        How much each voxel is wanted, not negative. Without weights all are wanted alike.
    weighted_share : float
        The share of each label's positions that the weights draw: one by one, each in proportion to
        the weights of the voxels that are left (Efraimidis and Spirakis 2006), of weight 0 last.
        The others come first and are drawn evenly.

    Returns
    -------
    positions : (n, 3) int32
        (k, i, j), by ascending label, then in memory order of (k, i, j).
    classes : (n,) int64
        The label of each position.

    Raises
    ------
    ValueError
        Fewer than one position is wanted of a label, the share is not within 0..1, or the weights
        are negative or of another shape.
    """
    if min(n_wanted.values(), default=1) < 1:
        raise ValueError(f"n_wanted is {dict(n_wanted)}; draw at least one position per class")
    if not 0 <= weighted_share <= 1:
        raise ValueError(f"weighted_share is {weighted_share!r}; give a share from 0 to 1")
    if weights is not None and (weights.shape != labels.shape or not (weights >= 0).all()):
        raise ValueError(
            f"weights of shape {weights.shape} must be one number from 0 for each of the "
            f"{labels.shape} voxels"
        )
    rng = np.random.default_rng(seed)
    n_labels = max(n_wanted, default=0) + 1
    counts = label_counts(labels, n_labels)
    positions, classes = [np.empty((0, 3), np.int32)], [np.empty(0, np.int64)]
    for label in sorted(n_wanted):
        total = int(counts[:, label].sum())
        n = min(n_wanted[label], total)
        n_weighted = 0 if weights is None else round(n * weighted_share)
        ranks = rng.choice(total, n - n_weighted, replace=False)
        if weights is not None and n_weighted:
            of_label = _weights_of(labels, label, counts[:, label], weights)
            keys = rng.standard_exponential(total) / np.maximum(of_label, _LEAST_WEIGHT)
            keys[ranks] = np.inf
            ranks = np.concatenate([ranks, np.argpartition(keys, n_weighted - 1)[:n_weighted]])
        found = _voxels_of_rank(labels, label, counts[:, label], np.sort(ranks))
        positions.append(found)
        classes.append(np.full(len(found), label, np.int64))
    return np.concatenate(positions), np.concatenate(classes)


def _weights_of(
    labels: NDArray[np.unsignedinteger],
    label: int,
    counts: NDArray[np.int64],
    weights: NDArray[np.floating],
) -> NDArray[np.floating]:
    """Weights of the voxels with this label, slice after slice."""
    return np.concatenate([weights[k][labels[k] == label] for k in np.flatnonzero(counts)])


def label_counts(labels: NDArray[np.unsignedinteger], n_labels: int) -> NDArray[np.int64]:
    """Voxels of each label in each slice; counting a whole map at once takes 8 bytes a voxel.

    Parameters
    ----------
    labels : (K, R, C) unsigned int
        Label map, any memory order.
    n_labels : int
        Labels that are counted: the lowest.

    Returns
    -------
    (K, n_labels) int64
    """
    return np.stack([np.bincount(page.ravel(), minlength=n_labels)[:n_labels] for page in labels])


def _voxels_of_rank(
    labels: NDArray[np.unsignedinteger],
    label: int,
    counts: NDArray[np.int64],
    ranks: NDArray[np.int64],
) -> NDArray[np.int32]:
    """(k, i, j) of the voxels that are the ``ranks``-th with this label, slice after slice."""
    ends = np.cumsum(counts)
    slices = np.searchsorted(ends, ranks, side="right")
    found = np.empty((len(ranks), 3), np.int32)
    for k in np.unique(slices):
        chosen = slices == k
        rows, columns = np.nonzero(labels[k] == label)
        local = ranks[chosen] - (ends[k] - counts[k])
        found[chosen] = np.stack([np.full(len(local), k), rows[local], columns[local]], axis=1)
    return found


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """A case on the model grid, ready to be drawn from.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan.
    labels : (K, R, C) uint8 or uint16
        Class of each voxel; from ``len(classes)`` on structures beside the class table. The two
        greatest values of the dtype say that nothing can be learned from a voxel.
    warnings : tuple of str
        What is doubtful in the scan's file or in its labels.
    """

    grid_volume: GridVolume
    labels: NDArray[np.unsignedinteger]
    warnings: tuple[str, ...] = ()


def on_model_grid(
    path: str | PathLike[str], volume: Volume, grid: ModelGrid, workers: Workers | None = None
) -> GridVolume:
    """A file's scan on the model grid; see ``to_model_grid``.

    Parameters
    ----------
    path : str or PathLike
        The file, which an error names.
    volume : Volume
        The scan that was read from it.
    grid : ModelGrid
        The grid to bring it to.
    workers : Workers, optional
        Threads to share the slices.

    Raises
    ------
    InputError
        The scan is so large, in mm, that it does not fit the grid.
    """
    try:
        return to_model_grid(volume, grid, workers)
    except ValueError as error:
        problem, _, remedy = str(error).partition("; ")
        raise InputError(path, problem, remedy) from None


def labelled_scan(
    case: Case, classes: ClassTable, grid: ModelGrid, nuisance: Mapping[str, int] | None = None
) -> LabelledScan:
    """Read a case and bring its voxels and labels to the model grid.

    Voxels without a label are background outside the body. Inside it they are the table's context
    class, but only where the case annotates every organ of the table: an organ that nobody drew is
    not context. A structure that was drawn is what it is, whatever else the case annotates.

    Parameters
    ----------
    case : Case
        Of ``find_cases``.
    classes : ClassTable
        The classes of the model.
    grid : ModelGrid
        The grid to bring the case to.
    nuisance : mapping of str to int, optional
        Of ``dataset_nuisance``: structures beside the table, which get labels of their own.

    Raises
    ------
    InputError
        The scan or its labels cannot be used.
    """
    scan = read_scan(case.image)
    volume = scan.volume
    labelled = case_labels(case, classes, volume, nuisance)
    grid_volume = on_model_grid(case.image, volume, grid)
    labels = resample_labels(volume.orientation.working(labelled.labels), grid_volume)
    labels = _with_context(labels, labelled, classes, grid_volume)
    return LabelledScan(grid_volume, labels, (*scan.warnings, *labelled.warnings))


def _with_context(
    labels: NDArray[np.unsignedinteger],
    labelled: CaseLabels,
    classes: ClassTable,
    grid_volume: GridVolume,
) -> NDArray[np.unsignedinteger]:
    """Labels on the model grid, the unlabelled voxels told apart by the body mask."""
    unlabelled = labels == labelled.unlabelled
    if not unlabelled.any():
        return labels
    body = body_voxels(grid_volume)
    resolved = np.where(unlabelled & ~body, labels.dtype.type(0), labels)
    if classes.context is not None and not labelled.missing & set(classes.organs):
        resolved[unlabelled & body] = classes.context
    return resolved


def slabs_at(
    grid_volume: GridVolume, pattern: Pattern, positions: NDArray[np.int32]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int16], NDArray[np.int32]]]:
    """Levels around scattered positions, one slice of positions after the other.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.
    pattern : Pattern
        What is read around a position.
    positions : (n, 3) int32
        (k, i, j) voxels of the model grid.

    Yields
    ------
    rows : (m,) intp
        Which of the positions lie in this slice.
    slab : (L, K, R, C) int16
        As ``levels_slab`` makes it.
    local : (m, 3) int32
        Those positions in the slab, its padding included.
    """
    reach = np.array(pattern.reach, np.int32)
    visited = np.unique(positions[:, 0])
    window = LevelWindow(grid_volume, pattern, _WINDOW_SLICES) if reach[0] else None
    ready = -1
    for k in map(int, visited):
        rows = np.flatnonzero(positions[:, 0] == k)
        local = positions[rows] - np.array([k, 0, 0], np.int32) + reach
        if window is None:  # slices are far apart or few: each is made for itself
            yield rows, levels_slab(grid_volume, pattern, k, k + 1), local
            continue
        if k > ready:
            ready = min(k + window.n_slices, grid_volume.shape[0]) - 1
            for run in window.move(k, ready + 1):
                window.fill(run)
        yield rows, window.slab(k, k + 1), local


def features_at(
    grid_volume: GridVolume,
    pattern: Pattern,
    positions: NDArray[np.int32],
    jitter: Callable[[int], NDArray[np.int32]] | None = None,
) -> NDArray[np.float32]:
    """Features of a pattern at scattered positions, (n, n_features) float32, copied.

    Parameters
    ----------
    grid_volume : GridVolume
        The scan on the model grid.
    pattern : Pattern
        What is read around a position.
    positions : (n, 3) int32
        (k, i, j) voxels of the model grid.
    jitter : callable, optional
        Called with a slice k; the offsets (n_features, 4) to read around its positions instead of
        the pattern's, within the pattern's reach.
    """
    features = np.empty((len(positions), pattern.n_features), np.float32)
    for rows, slab, local in slabs_at(grid_volume, pattern, positions):
        offsets = pattern.offsets if jitter is None else jitter(int(positions[rows[0], 0]))
        features[rows] = gather_features(slab, offsets, local)
    return features
