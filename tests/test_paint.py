"""Learning from painted copies: what is painted of a case, and what a model makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from organfast.anatomy import ClassTable
from organfast.grid import ModelGrid
from organfast.layouts import find_cases
from organfast.learning import Recipe, _Fine, _painted, train
from organfast.models.classifier import load_model
from organfast.models.forest import ForestSettings
from organfast.sampling import Split, labelled_scan

SPLIT = Split(train=("phantom_000", "phantom_001"), validation=("phantom_002",), test=())
COARSE = ModelGrid((5.0, 5.0, 8.0), "piecewise")
FOREST = ForestSettings("extra_trees", n_trees=2)


def test_a_painted_case_has_its_organs_and_a_context(cohort_folder: Path) -> None:
    classes = ClassTable.default()
    scan = labelled_scan(find_cases(cohort_folder).cases[0], classes, COARSE)
    painted = _painted(scan, _Fine(classes, None), Recipe(grid=COARSE), (0, 1), 1)
    counts = np.bincount(painted.labels.ravel(), minlength=len(classes))
    liver = classes.index("liver")
    assert counts[liver] > 50
    assert counts[classes.context] > counts[liver]
    hu = painted.grid_volume.hu[painted.labels == liver] / 8  # units of the piecewise table
    assert 0 < np.median(hu) < 150
    assert painted.grid_volume.spacing_mm == scan.grid_volume.spacing_mm


def test_a_forest_learns_from_painted_copies_too(cohort_folder: Path) -> None:
    recipe = {"grid": COARSE, "split": SPLIT, "n_per_class": 20, "forest": FOREST}
    plain = train(cohort_folder, recipe=Recipe(**recipe))
    more = train(cohort_folder, recipe=Recipe(**recipe, paint=1))
    again = train(cohort_folder, recipe=Recipe(**recipe, paint=1), threads=2)
    assert more.training["n_examples"] > 1.5 * plain.training["n_examples"]
    assert (plain.training["painted_copies"], more.training["painted_copies"]) == (0, 1)
    assert more.digest == again.digest


def test_wishes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="need a working grid"):
        Recipe(grid=ModelGrid(None), paint=2)
    with pytest.raises(ValueError, match="paint is -1"):
        Recipe(paint=-1)


def test_the_command_line_paints(cohort_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "painted.organfast"
    command = [sys.executable, "-m", "organfast", "train", str(cohort_folder), "-o", str(out)]
    options = ["--paint", "1", "--spacing", "5,5,8", "--trees", "2", "--n-per-class", "20"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert load_model(out).training["painted_copies"] == 1
