"""Accuracy on patients never trained on: phantoms in folds, and the two real scans each way.

    python benchmarks/accuracy.py patterns      # what a classifier sees; about 40 minutes
    python benchmarks/accuracy.py sampling      # what it is shown; about 40 minutes
    python benchmarks/accuracy.py networks      # forest and networks; about 20 minutes

Results are kept in benchmarks/results/accuracy.json, row by row: a row that is there already is
not measured again (`--again` does). ``tools/accuracy_table.py`` writes the README's tables from it.
The real scans lie beside a checkout in ../shared/data; without them their columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from organfast.anatomy import ClassTable
from organfast.augmentation import Augmentation
from organfast.blocks import Block, Context
from organfast.grid import ModelGrid
from organfast.layouts import Case, Dataset, case_labels, find_cases, write_case
from organfast.learning import Recipe, Sampling, train
from organfast.metrics import centroid_error_mm, dice_per_class
from organfast.models.classifier import Model, save_model
from organfast.models.forest import ForestSettings
from organfast.networklearning import NetworkRecipe, training_settings
from organfast.nifti import read_scan
from organfast.phantom import cohort, phantom_table
from organfast.pipeline import segment
from organfast.sampling import Split

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
REAL = Path(__file__).parents[2] / "shared" / "data" / "labelled"
SIX = ("liver", "spleen", "kidney_right", "kidney_left", "lung_right", "lung_left")
N_PHANTOMS, N_FOLDS, COHORT_SEED = 12, 3, 2026
NETWORK_STEPS = 300
THREADS = 2

Pattern = Block | Context


@dataclass(frozen=True)
class Row:
    """One way to learn; of how many phantoms, and from how many (None: all but the fold's).

    Guided: learned twice, the second time where the first model errs. ``n_folds``: how many of the
    folds are measured.
    """

    pattern: Pattern | None
    recipe: Recipe
    n_phantoms: int = N_PHANTOMS
    n_train: int | None = None
    is_guided: bool = False
    n_folds: int = N_FOLDS


BASE = Recipe(n_per_class=200, forest=ForestSettings("extra_trees", n_trees=60))

PATTERNS = {
    "block 33": Row(Block(33), BASE),
    "block 63": Row(Block(63), BASE),
    "block 17, levels 1, 3, 9": Row(Block(17, levels=(1, 3, 9)), BASE),
    "context": Row(Context(), BASE),
}

_BENT = {"elastic_mm": 6.0, "scale": (0.9, 1.12), "stretch": 0.05, "rotation_deg": 5.0}
_COLOURED = {"recolour_hu": 15.0, "recolour_contrast": 0.2, "shift_hu": 5.0, "gain": 0.05}
_BLURRED = {"blur_mm": 1.0, "noise_hu": 12.0}


def _learned(**options: Any) -> Row:
    """A row of the second table: few patients, for that is where sampling matters."""
    return Row(Context(), replace(BASE, **options), n_phantoms=6, n_train=2)


def _altered(**options: Any) -> Row:
    return _learned(augmentation=replace(Augmentation.off(copies=2), **options))


_PLAIN = Sampling(nuisance=False)
SAMPLING = {
    "scans as they are": _learned(sampling=_PLAIN),
    "+ nuisance classes": _learned(),
    "context positions x 1": _learned(sampling=_PLAIN, context_factor=1),
    "+ nuisance, context positions x 1": _learned(context_factor=1),
    "+ nuisance, 50 of each besides": _learned(sampling=Sampling(n_per_nuisance=50)),
    "+ nuisance, half drawn where an earlier model errs": replace(_learned(), is_guided=True),
    "+ nuisance, random forest": _learned(forest=ForestSettings(n_trees=60)),
    "+ nuisance, three times the positions": _learned(n_per_class=600),
    "+ nuisance, 2 copies bent, turned, scaled": _altered(**_BENT),
    "+ nuisance, 2 copies recoloured": _altered(**_COLOURED),
    "+ nuisance, 2 copies blurred, noisy": _altered(**_BLURRED),
    "+ nuisance, 2 copies cropped along z": _altered(crop_mm=150.0),
    "+ nuisance, 2 copies, offsets jittered": _altered(jitter_deg=5.0, jitter_scale=0.1),
    "+ nuisance, 2 copies mirrored, sides exchanged": _altered(mirror=0.5),
    "+ nuisance, 2 copies recoloured, jittered": _altered(
        **_COLOURED, jitter_deg=5.0, jitter_scale=0.1
    ),
    "+ nuisance, 2 copies with all of these but mirroring": _altered(
        **_BENT, **_COLOURED, **_BLURRED, crop_mm=150.0, jitter_deg=5.0, jitter_scale=0.1
    ),
    "+ nuisance, 4 painted copies": _learned(paint=4),
    "+ nuisance, 4 painted copies, 2 recoloured": replace(
        _altered(**_COLOURED), recipe=replace(_altered(**_COLOURED).recipe, paint=4)
    ),
}


def _network(architecture: str, spacing_mm: tuple[float, float, float], **options: Any) -> Row:
    """Of one fold: a network learns for minutes."""
    settings, _ = training_settings({"steps": NETWORK_STEPS}, architecture)
    network = NetworkRecipe(architecture, training=settings, **options)
    grid = ModelGrid(spacing_mm, "piecewise")
    return Row(None, replace(BASE, n_per_class=1000, grid=grid, network=network), n_folds=1)


NETWORKS = {
    "forest, context": Row(Context(), BASE, n_folds=1),
    "cnn, the seed's (readme), block 33": _network("readme", (1.5, 1.5, 3.0)),
    "the same, each block standardised": _network("readme", (1.5, 1.5, 3.0), standardise=True),
    "cnn, towers, block 17, levels 1, 3, 7, 3 slices": _network("towers", (3.0, 3.0, 3.0)),
}
TABLES: Mapping[str, Mapping[str, Row]] = {
    "patterns": PATTERNS,
    "sampling": SAMPLING,
    "networks": NETWORKS,
}


def main() -> None:
    """Measure the rows of a table that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--only", help="rows whose name holds this text")
    chosen = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table = results.setdefault(chosen.table, {})
    with tempfile.TemporaryDirectory() as folder:
        phantoms = _written_cohort(Path(folder))
        for name, row in TABLES[chosen.table].items():
            if (name in table and not chosen.again) or (chosen.only or "") not in name:
                continue
            start = time.perf_counter()
            table[name] = {"phantoms": _in_folds(phantoms, row)}
            if REAL.exists():
                table[name] |= _each_way(find_cases(REAL), row)
                if row.n_train is None and row.n_folds == N_FOLDS:
                    table[name] |= _from_phantoms(phantoms, find_cases(REAL), row)
            table[name]["minutes"] = round((time.perf_counter() - start) / 60, 1)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(name, json.dumps(table[name]), flush=True)


def _written_cohort(folder: Path) -> Dataset:
    table = phantom_table()
    for case in cohort(N_PHANTOMS, COHORT_SEED, threads=THREADS):
        write_case(folder, case.name, case.scan, case.anatomy.labels, table)
    return find_cases(folder)


def _in_folds(dataset: Dataset, row: Row) -> dict[str, Any]:
    """Every phantom is tested once, by a model that has not seen it."""
    row = replace(row, recipe=replace(row.recipe, classes=ClassTable.default()))
    scores = []
    patients = np.array(dataset.patients[: row.n_phantoms])
    for fold in range(row.n_folds):
        tested = patients[fold::N_FOLDS]
        others = np.setdiff1d(patients, tested)[: row.n_train]
        scores.append(_score(dataset, Split(tuple(others), (), tuple(tested)), row))
    return _together(scores) | {"n_train": len(others)}


def _each_way(dataset: Dataset, row: Row) -> dict[str, Any]:
    chest, abdomen = "chest", "abdomen"
    return {
        f"{known} -> {unseen}": _together([_score(dataset, Split((known,), (), (unseen,)), row)])
        for known, unseen in ((chest, abdomen), (abdomen, chest))
    }


def _from_phantoms(phantoms: Dataset, real: Dataset, row: Row) -> dict[str, Any]:
    """Both real scans, by a model that has never seen a real one."""
    everyone = Split(phantoms.patients)
    recipe = replace(row.recipe, classes=ClassTable.default(), split=everyone)
    model = train(phantoms, row.pattern, recipe, threads=THREADS)
    return {"phantoms -> real": _together([_judged(model, real.cases)])}


def _score(dataset: Dataset, split: Split, row: Row) -> dict[str, Any]:
    """Balanced blocks, Dice and centres of the test patients' organs that training knew."""
    recipe = replace(row.recipe, split=split)
    start = time.perf_counter()
    model = train(dataset, row.pattern, recipe, threads=THREADS)
    seconds = time.perf_counter() - start
    if row.is_guided:
        recipe = replace(recipe, sampling=Sampling(guide=model))
        model = train(dataset, row.pattern, recipe, threads=THREADS)
    tested = [case for case in dataset.cases if case.patient in split.test]
    return _judged(model, tested) | {
        "blocks": model.scores["test"]["block_accuracy"],
        "blocks_of_organs": model.scores["test"]["block_accuracy_organs"],
        "train_s": seconds,
    }


def _judged(model: Model, tested: Sequence[Case]) -> dict[str, Any]:
    names = model.classes.names
    known = {n for n in model.classes.organs if model.training["n_cases_with"][names[n]]}
    dice: dict[str, list[float]] = {}
    centres: list[float] = []
    seconds: list[float] = []
    n_missed = 0
    for case in tested:
        scan = read_scan(case.image)
        truth = case_labels(case, model.classes, scan.volume).labels
        start = time.perf_counter()
        result = segment(scan, model, threads=THREADS)
        seconds.append(time.perf_counter() - start)
        overlap = dice_per_class(np.minimum(truth, len(names)), result.labels, len(names) + 1)
        for organ in sorted(known):
            voxels = np.argwhere(truth == organ)
            if not len(voxels):
                continue
            dice.setdefault(names[organ], []).append(float(overlap[organ]))
            found = result.organs[names[organ]].centroid_mm
            if found is None:
                n_missed += 1
            else:
                truth_mm = scan.volume.affine[:3, :3] @ voxels.mean(0) + scan.volume.affine[:3, 3]
                centres.append(centroid_error_mm(truth_mm, found))
    return {
        "blocks": None,
        "blocks_of_organs": None,
        "dice": dice,
        "centres_mm": centres,
        "n_missed": n_missed,
        "n_patients": len(tested),
        "segment_s": seconds,
        "file_mb": _file_mb(model),
    }


def _file_mb(model: Model) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.organfast"
        save_model(model, path)
        return path.stat().st_size / 1e6


def _together(scores: Iterable[dict[str, Any]]) -> dict[str, Any]:
    scores = list(scores)
    dice: dict[str, list[float]] = {}
    for score in scores:
        for organ, values in score["dice"].items():
            dice.setdefault(organ, []).extend(values)
    centres = [mm for score in scores for mm in score["centres_mm"]]
    of_six = [value for organ in SIX for value in dice.get(organ, [])]
    return {
        **{
            blocks: _mean([score[blocks] for score in scores if score[blocks] is not None])
            for blocks in ("blocks", "blocks_of_organs")
        },
        "dice_of_six": _mean(of_six),
        "dice": _mean([value for values in dice.values() for value in values]),
        "dice_by_organ": {organ: _mean(values) for organ, values in dice.items()},
        "centre_mm_median": round(float(np.median(centres)), 1) if centres else None,
        "n_centres": len(centres),
        "n_missed": sum(score["n_missed"] for score in scores),
        "n_patients": sum(score["n_patients"] for score in scores),
        "train_s": _mean([score["train_s"] for score in scores if "train_s" in score]),
        "segment_s": _mean([s for score in scores for s in score["segment_s"]]),
        "file_mb": _mean([score["file_mb"] for score in scores]),
    }


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 3) if values else None


if __name__ == "__main__":
    main()
