"""The demo from end to end, at a fraction of its size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from organfast import demo
from organfast.anatomy import ClassTable
from organfast.errors import InputError
from organfast.layouts import find_cases
from organfast.models.classifier import load_model
from organfast.nifti import read_geometry, read_labels, read_volume
from organfast.painting import paint
from organfast.phantom import FieldOfView, class_labels, phantom
from organfast.pipeline import Settings, segment

SEED = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[demo.OrganScore]]:
    folder = tmp_path_factory.mktemp("run") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_COHORT", ((6.0, 6.0, 9.0), 64))
        patch.setattr(demo, "_UNSEEN", ((5.0, 5.0, 8.0), 76))
        patch.setattr(demo, "_N_PER_CLASS", 60)
        patch.setattr(demo, "_N_TREES", 10)
        scores = demo.run_demo(folder, 3, SEED, threads=2)
    return folder, scores


def test_the_demo_fills_its_folder_with_what_the_readme_promises(
    made: tuple[Path, list[demo.OrganScore]],
) -> None:
    folder, _ = made
    for name in (
        *("cohort/labels.csv", "phantom.organfast", "scores.json"),
        *("unseen/ct.nii.gz", "unseen/labels.nii.gz"),
        *("segmented/segmentation.nii.gz", "segmented/overlay.png", "segmented/organs.json"),
        *("segmented/organs.csv", "segmented/labels.json", "segmented/run.json"),
        "segmented/report.html",
        *("segmented/probabilities/liver.nii.gz", "segmented/probabilities/liver.png"),
    ):
        assert (folder / name).stat().st_size > 0, name
    dataset = find_cases(folder / "cohort")
    assert dataset.patients == ("phantom_000", "phantom_001", "phantom_002")
    segmented = read_geometry(folder / "segmented" / "segmentation.nii.gz")
    unseen = read_geometry(folder / "unseen" / "ct.nii.gz")
    assert segmented.shape == unseen.shape
    np.testing.assert_array_equal(segmented.affine, unseen.affine)


def test_every_organ_has_a_finite_score_and_the_large_ones_a_good_one(
    made: tuple[Path, list[demo.OrganScore]],
) -> None:
    folder, scores = made
    classes = ClassTable.default()
    assert [s.name for s in scores] == [classes.names[n] for n in classes.organs]
    for score in scores:
        assert 0 <= score.dice <= 1
        assert score.volume_ml >= 0
        assert math.isfinite(score.centre_error_mm) == (score.volume_ml > 0)
    dice = {s.name: s.dice for s in scores}
    # Measured .91, .90 and .83.
    for name in ("lung_right", "lung_left", "liver"):
        assert dice[name] > 0.6, name

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "scores.json").read_text("utf-8")
    written = json.loads(text, parse_constant=refuse)
    assert [row["name"] for row in written] == [s.name for s in scores]
    assert [row["dice"] for row in written] == [s.dice for s in scores]


def test_the_unseen_patient_is_not_of_the_cohort_and_its_model_knows_nobody_else(
    made: tuple[Path, list[demo.OrganScore]],
) -> None:
    folder, _ = made
    model = load_model(folder / "phantom.organfast")
    assert set(model.training["cases"]) <= {"phantom_000", "phantom_001", "phantom_002"}
    assert model.training["seed"] == model.training["forest"]["seed"] == SEED
    unseen, _ = read_labels(folder / "unseen" / "labels.nii.gz")
    for case in find_cases(folder / "cohort").cases:
        assert read_volume(case.image).hu.shape != unseen.shape
    again = segment(folder / "unseen" / "ct.nii.gz", model, Settings(probabilities=("liver",)))
    labels, _ = read_labels(folder / "segmented" / "segmentation.nii.gz")
    np.testing.assert_array_equal(again.labels, labels)


def test_a_demo_is_not_written_over_another(made: tuple[Path, list[demo.OrganScore]]) -> None:
    before = (made[0] / "scores.json").read_bytes()
    with pytest.raises(InputError, match="holds a demo already"):
        demo.run_demo(made[0], 1, 0)
    assert (made[0] / "scores.json").read_bytes() == before


def test_an_organ_in_neither_map_has_no_score(
    made: tuple[Path, list[demo.OrganScore]],
) -> None:
    """A pelvis has no thyroid: not to find one is neither right nor wrong."""
    folder, _ = made
    model = load_model(folder / "phantom.organfast")
    field = FieldOfView((40, 40, 4), (8.0, 8.0, 8.0), middle_mm=-160.0)
    anatomy = phantom(field, 1)
    truth = class_labels(anatomy)
    result = segment(paint(anatomy, 1), model)
    scores = {s.name: s for s in demo._scores(result, truth)}
    thyroid = model.classes.index("thyroid_gland")
    assert not (truth == thyroid).any()
    assert not (result.labels == thyroid).any()
    assert math.isnan(scores["thyroid_gland"].dice)
    assert math.isnan(scores["thyroid_gland"].centre_error_mm)
