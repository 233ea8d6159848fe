"""What test modules share: a phantom cohort, a model learned from it, a batch segmented by it."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# The same examples in every CI run; at home hypothesis goes on looking for new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

SPACING_MM = (5.0, 5.0, 8.0)
SIZE = 72


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantom patients, coarsely scanned: a dataset to read, not to write to."""
    from organfast.anatomy import ClassTable
    from organfast.layouts import write_case
    from organfast.phantom import cohort

    folder = tmp_path_factory.mktemp("phantoms") / "cohort"
    for case in cohort(3, 0, SPACING_MM, SIZE, threads=2):
        write_case(folder, case.name, case.scan, case.labels, ClassTable.default())
    return folder


@pytest.fixture(scope="session")
def scan_file(cohort_folder: Path) -> Path:
    """A scan of the cohort."""
    return cohort_folder / "phantom_001" / "ct.nii.gz"


@pytest.fixture(scope="session")
def model_file(cohort_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds most organs of such a scan, in a moment."""
    from organfast.blocks import Block
    from organfast.grid import ModelGrid
    from organfast.learning import Recipe, train
    from organfast.models.classifier import save_model
    from organfast.models.forest import ForestSettings

    recipe = Recipe(
        grid=ModelGrid(SPACING_MM, "piecewise"),
        n_per_class=100,
        forest=ForestSettings("extra_trees", n_trees=8),
    )
    path = tmp_path_factory.mktemp("model") / "phantom.organfast"
    save_model(train(cohort_folder, Block(9, levels=(1, 3)), recipe, threads=2), path)
    return path


@pytest.fixture(scope="session")
def archive(cohort_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five crops of phantom patients in folders of different depth: to read, not to write to."""
    from batches import write_archive

    return write_archive(cohort_folder, tmp_path_factory.mktemp("batch") / "archive")


@pytest.fixture(scope="session")
def whole(archive: Path, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run of this process leaves: to read, not to write to."""
    from batches import BARE, NAMES

    from organfast.batch import segment_batch

    out = tmp_path_factory.mktemp("whole") / "out"
    outcomes = list(segment_batch(archive, out, model_file, None, BARE, threads=2))
    assert [o.status for o in outcomes] == ["segmented"] * len(NAMES)
    return out
