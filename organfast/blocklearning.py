"""Learning from blocks that were cut out already, and how many of them a model gets right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.blockfiles import ROWS_NOTE, Blocks, block_size, read_blocks
from organfast.blocks import Block, Context
from organfast.cases import Case
from organfast.errors import InputError
from organfast.grid import ModelGrid, hu_lookup
from organfast.metrics import accuracy, confusion
from organfast.models.classifier import Model
from organfast.nifti import file_digest
from organfast.progress import Progress, silent

__all__ = ["block_pattern", "learned_blocks", "score_blocks"]

_SCORED_AT_ONCE = 2048


def block_pattern(cases: Sequence[Case], pattern: Block | Context | None) -> Block:
    """The pattern that reads blocks of the files' size.

    Parameters
    ----------
    cases : sequence of Case
        Of a dataset of blocks; the first line of the first file is read.
    pattern : Block, Context or None
        What was asked for; None takes the files' size.

    Raises
    ------
    InputError
        The file cannot be read.
    ValueError
        The pattern reads what is not in a block.
    """
    expected = Block(block_size(cases[0].image))
    if pattern is not None and pattern != expected:
        given = pattern.to_dict()
        raise ValueError(
            f"the files hold blocks of {expected.size} pixels, of which {given} reads others; "
            f"use Block({expected.size})"
        )
    return expected


def learned_blocks(
    cases: Sequence[Case],
    classes: ClassTable,
    grid: ModelGrid,
    n_of_each: Sequence[int],
    seed: int,
    *,
    progress: Progress = silent,
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[str, Any]]:
    """Features and labels to learn from.

    Parameters
    ----------
    cases : sequence of Case
        Block files.
    classes : ClassTable
        The classes of the model.
    grid : ModelGrid
        The scan's own pixels; its HU table is applied.
    n_of_each : sequence of int
        Most blocks of each class and file; where there are more, they are drawn at random.
    seed : int
        Seed of that.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    features : (n, size * size) float32
        Pixels of the blocks, as ``Block`` orders them.
    labels : (n,) int64
        Their classes.
    record : dict
        Where they are from.

    Raises
    ------
    InputError
        A file cannot be used, or none has a block of the classes.
    """
    features, labels, digests = [], [], {}
    for number, (case, blocks) in enumerate(_read_alike(cases, classes)):
        progress("reading cases", number, len(cases))
        drawn = _drawn(blocks.labels, n_of_each, (seed, number))
        features.append(_features(blocks.hu[drawn], grid))
        labels.append(blocks.labels[drawn])
        digests[case.name] = {"blocks": file_digest(case.image)}
    progress("reading cases", len(cases), len(cases))
    counts = np.stack([np.bincount(y, minlength=len(classes)) for y in labels])
    if not counts.any():
        raise InputError(
            cases[0].image.parent, "holds no block of the classes to learn", "see its RadLex ids"
        )
    record = {
        "cases": digests,
        "nuisance": {},
        "n_of_each_class": list(n_of_each),
        "n_examples": int(counts.sum()),
        "n_cases_with": dict(zip(classes.names, (counts > 0).sum(axis=0).tolist(), strict=True)),
        "spacing_mm": None,
        "warnings": [ROWS_NOTE],
    }
    return np.concatenate(features), np.concatenate(labels), record


def score_blocks(
    model: Model, cases: Sequence[Case], *, progress: Progress = silent
) -> dict[str, Any]:
    """Share of the blocks of some files that a model gets right.

    Parameters
    ----------
    model : Model
        Of blocks of the files' size, on native pixels.
    cases : sequence of Case
        Block files of patients that the model was not trained on.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    dict
        ``n_patients``, ``n_blocks``, ``block_accuracy`` (of all blocks),
        ``block_accuracy_organs`` (of those that are of an organ), ``by_patient`` (patient -> share
        of that patient's blocks, None without any) and ``confusion``, rows are truth.

    Raises
    ------
    InputError
        A file cannot be used.
    ValueError
        The model reads something else than such blocks.
    """
    block_pattern(cases, model.pattern)
    if model.grid.spacing_mm is not None:
        raise ValueError("the model works on another grid than native pixels, those of the blocks")
    n_classes = len(model.classes)
    of_patient = {case.patient: np.zeros((n_classes, n_classes), np.int64) for case in cases}
    for number, (case, blocks) in enumerate(_read_alike(cases, model.classes)):
        progress("scoring held-out patients", number, len(cases))
        found = _classified(model, blocks)
        of_patient[case.patient] += confusion(blocks.labels, found, n_classes)
    progress("scoring held-out patients", len(cases), len(cases))
    counts = np.sum(list(of_patient.values()), axis=0)
    organs = list(model.classes.organs)
    return {
        "n_patients": len(of_patient),
        "n_blocks": int(counts.sum()),
        "block_accuracy": accuracy(counts),
        "block_accuracy_organs": float(counts[organs, organs].sum() / max(counts[organs].sum(), 1)),
        "by_patient": {p: accuracy(n) if n.any() else None for p, n in of_patient.items()},
        "confusion": counts.tolist(),
    }


def _read_alike(cases: Sequence[Case], classes: ClassTable) -> Iterator[tuple[Case, Blocks]]:
    """The blocks of each file; sizes and kinds of pixels that differ are an error."""
    first: Blocks | None = None
    for case in cases:
        blocks = read_blocks(case.image, classes)
        first = first or blocks
        for what, of_this, of_first in (
            ("size", f"{blocks.size} pixels", f"{first.size} pixels"),
            ("kind", _kind(blocks), _kind(first)),
        ):
            if of_this != of_first:
                raise InputError(
                    case.image,
                    f"holds blocks of {of_this}, {cases[0].image.name} of {of_first}",
                    f"train on one {what} of blocks at a time",
                )
        yield case, blocks


def _kind(blocks: Blocks) -> str:
    return "grey levels" if blocks.is_grey else "HU"


def _drawn(
    labels: NDArray[np.int64], n_of_each: Sequence[int], seed: tuple[int, int]
) -> NDArray[np.intp]:
    """Which blocks are learned from, ascending."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label, n in enumerate(n_of_each):
        rows = np.flatnonzero(labels == label)
        drawn.append(rows if len(rows) <= n else rng.choice(rows, n, replace=False))
    return np.sort(np.concatenate(drawn))


def _on_grid(hu: NDArray[np.int16], grid: ModelGrid) -> NDArray[np.int16]:
    values: NDArray[np.int16] = hu_lookup(grid.hu_table)[hu.astype(np.int32) + 2**15]
    return values


def _features(hu: NDArray[np.int16], grid: ModelGrid) -> NDArray[np.float32]:
    return _on_grid(hu, grid).reshape(len(hu), hu.shape[1] * hu.shape[2]).astype(np.float32)


def _classified(model: Model, blocks: Blocks) -> NDArray[np.int64]:
    """(n,) most probable class. Each block is a slice of a slab, asked at its middle."""
    found = np.empty(len(blocks.labels), np.int64)
    middle = blocks.size // 2
    for start in range(0, len(found), _SCORED_AT_ONCE):
        hu = _on_grid(blocks.hu[start : start + _SCORED_AT_ONCE], model.grid)
        positions = np.full((len(hu), 3), middle, np.int32)
        positions[:, 0] = np.arange(len(hu))
        probabilities = np.empty((len(hu), len(model.classes)), np.float32)
        model.classifier.probabilities(hu[None], positions, probabilities)
        found[start : start + len(hu)] = probabilities.argmax(axis=1)
    return found
