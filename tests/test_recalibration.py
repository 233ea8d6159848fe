"""A model's calibration: fitted to who is held out, kept in its file, applied where it is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import network

from organfast.blocks import Block
from organfast.calibration import Isotonic, Temperature, log_loss, reliability
from organfast.cli import run
from organfast.errors import InputError
from organfast.evaluation import block_answers
from organfast.grid import ModelGrid
from organfast.layouts import Dataset, find_cases
from organfast.learning import Recipe, train
from organfast.models.classifier import Model, load_model, save_model
from organfast.models.forest import ForestSettings
from organfast.pipeline import Settings, segment
from organfast.recalibration import calibrated
from organfast.sampling import Split

HALF = Temperature(0.5)


@pytest.fixture(scope="module")
def dataset(cohort_folder: Path) -> Dataset:
    return find_cases(cohort_folder)


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return load_model(model_file)


@pytest.fixture(scope="module")
def unseen(model: Model, dataset: Dataset) -> list[str]:
    return sorted(set(dataset.patients) - set(model.training["cases"]))


def curves(n: int) -> Isotonic:
    """The second class is always likelier than it says."""
    knots = np.linspace(0, 1, 11, dtype=np.float32)
    rows = np.tile(knots, (n, 1))
    rows[1] = np.sqrt(knots)
    return Isotonic(rows)


# --- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"), [("temperature", Temperature), ("isotonic", Isotonic)]
)
def test_it_is_fitted_to_patients_that_the_model_does_not_know(
    kind: str, expected: type, model: Model, dataset: Dataset, unseen: list[str]
) -> None:
    bare = replace(model, calibration=None)
    found = calibrated(model, dataset, kind, unseen, n_per_class=100)
    assert isinstance(found.model.calibration, expected)
    assert found.patients == tuple(unseen)
    case = next(case for case in dataset.cases if case.patient == unseen[0])
    labels, before = block_answers(bare, case, 100)
    again, after = block_answers(found.model, case, 100)
    np.testing.assert_array_equal(labels, again)
    assert log_loss(after, labels) < log_loss(before, labels)
    assert found.calibration_error[0] == reliability(before, labels).expected_error
    assert found.calibration_error[1] is None  # a single patient leaves nobody
    with pytest.raises(ValueError, match="the model was trained on"):
        calibrated(model, dataset, kind, dataset.patients)
    with pytest.raises(ValueError, match="no case to calibrate on"):
        calibrated(model, dataset, kind, [])
    with pytest.raises(ValueError, match="use temperature or isotonic"):
        calibrated(model, dataset, "magic", unseen)


def test_the_error_is_of_patients_left_out_of_the_fit(model: Model, dataset: Dataset) -> None:
    nobody = {"cases": {}, "n_examples": 0, "spacing_mm": None}
    stranger = replace(model, training=nobody)  # knows none of them
    found = calibrated(stranger, dataset, n_per_class=60)
    assert found.patients == dataset.patients
    rows = []
    for left_out in dataset.patients:
        others = [p for p in dataset.patients if p != left_out]
        fitted = calibrated(stranger, dataset, patients=others, n_per_class=60).model
        (case,) = (case for case in dataset.cases if case.patient == left_out)
        labels, p = block_answers(fitted, case, 60)
        rows.append((p.max(axis=1), p.argmax(axis=1) == labels))
    sure, right = (np.concatenate(part) for part in zip(*rows, strict=True))
    place = np.clip(np.ceil(sure * 15) - 1, 0, 14)
    gaps = [abs((sure[place == b] - right[place == b]).sum()) for b in range(15)]
    np.testing.assert_allclose(found.calibration_error[1], sum(gaps) / len(sure), rtol=1e-5)


def test_training_calibrates_on_who_validates_and_scores_who_is_tested(
    dataset: Dataset, unseen: list[str]
) -> None:
    first, second, third = dataset.patients
    recipe = Recipe(
        grid=ModelGrid((8, 8, 8), "piecewise"),
        n_per_class=40,
        forest=ForestSettings("extra_trees", n_trees=3),
        split=Split((first,), (second,), (third,)),
    )
    plain, warm, bent = (
        train(dataset, Block(9), replace(recipe, calibration=kind))
        for kind in (None, "temperature", "isotonic")
    )
    assert plain.calibration is None
    assert isinstance(warm.calibration, Temperature)
    assert isinstance(bent.calibration, Isotonic)
    # Of those who validate the error before the fit is kept: after it, it would flatter.
    assert plain.scores["validation"] == warm.scores["validation"]
    assert plain.scores["test"]["confusion"] == warm.scores["test"]["confusion"]
    before, after = (m.scores["test"]["calibration_error"] for m in (plain, warm))
    assert after != before  # with one patient to fit to, not always for the better
    with pytest.raises(ValueError, match="calibration 'magic' is unknown"):
        replace(recipe, calibration="magic")


# --- in the file ----------------------------------------------------------------------------------


def test_it_is_kept_in_the_file_and_is_part_of_what_the_model_is(
    model: Model, tmp_path: Path
) -> None:
    digests = {model.digest}
    for number, calibration in enumerate((HALF, curves(len(model.classes)))):
        path = tmp_path / f"{number}.organfast"
        save_model(replace(model, calibration=calibration), path)
        loaded = load_model(path)
        assert loaded.calibration is not None
        assert loaded.calibration.to_dict() == calibration.to_dict()
        digests.add(loaded.digest)
    assert len(digests) == 3


def test_it_must_fit_the_classes(model: Model) -> None:
    with pytest.raises(ValueError, match="calibration is of an unknown kind, damaged, or not of"):
        replace(model, calibration=curves(3))


@pytest.mark.parametrize(
    "tampered",
    [
        {"kind": "temperature", "temperature": 0},
        {"kind": "temperature", "temperature": True},
        {"kind": "temperature", "temperature": 1.5, "and": 1},
        {"kind": "isotonic", "curves": [[0, 1]]},
        {"kind": "isotonic", "curves": [[1, 0]] * 5},
        {"kind": "magic"},
        {},
        [1],
    ],
)
def test_a_tampered_calibration_is_refused(tampered: Any, model_file: Path, tmp_path: Path) -> None:
    content = model_file.read_bytes()
    n = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + n])
    header = json.loads(outer["__metadata__"]["organfast"])
    outer["__metadata__"]["organfast"] = json.dumps({**header, "calibration": tampered})
    text = json.dumps(outer).encode()
    path = tmp_path / "tampered.organfast"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + n :])
    with pytest.raises(InputError, match="is not a valid model"):
        load_model(path)


# --- applied --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
@pytest.mark.parametrize("of", ["forest", "cnn"])
def test_the_probabilities_of_a_segmentation_are_calibrated(
    of: str, kind: str, model: Model, scan_file: Path
) -> None:
    bare = model
    if of == "cnn":
        cnn = network("towers", Block(9))
        classes = replace(model.classes, structures=model.classes.structures[: cnn.n_classes])
        bare = Model(cnn, classes, Block(9), model.grid, (2, 4, 4))
    n = len(bare.classes)
    calibration = HALF if kind == "temperature" else curves(n)
    # Each voxel is a position, so its probability is a row of the classifier's, unmixed.
    settings = Settings(
        stride=(1, 1, 1) if of == "forest" else (2, 2, 1), probabilities=bare.classes.names
    )
    before = segment(scan_file, bare, settings)
    after = segment(scan_file, replace(bare, calibration=calibration), settings)
    assert before.record["model"] != after.record["model"]
    step = settings.stride[0]  # type: ignore[index]
    first = step // 2
    there = np.s_[first::step, first::step, :]
    names = bare.classes.names
    rows, found = (
        np.stack([r.probability(c)[there].reshape(-1) for c in names], axis=1).astype(float) / 255
        for r in (before, after)
    )
    expected = np.empty_like(rows)
    calibration.apply(rows / rows.sum(axis=1, keepdims=True), expected)
    off = np.abs(expected - found).max(axis=1)
    assert np.abs(rows - found).max() > 0.1  # it does something
    # Maps are rounded to 1/255, which a temperature of a half makes twice as coarse.
    assert np.quantile(off, 0.99) < 0.02
    assert off.max() < 0.06


def test_labels_alone_need_an_order_that_stays(scan_file: Path, model: Model) -> None:
    native = replace(model, grid=ModelGrid(None), stride=(1, 1, 1))
    settings = Settings(stride=1, confidence=False)
    same = [
        segment(scan_file, replace(native, calibration=c), settings).labels for c in (None, HALF)
    ]
    np.testing.assert_array_equal(*same)
    with pytest.raises(ValueError, match="calibration may change which class"):
        segment(scan_file, replace(native, calibration=curves(len(model.classes))), settings)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_calibrates_a_model(
    cohort_folder: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.organfast"
    command = ["calibrate", str(cohort_folder), "-m", str(model_file), "-o", str(out)]
    # The only patient that the model does not know is kept to be tested on.
    assert run(command) == 2
    assert "no case to calibrate on" in capsys.readouterr().err
    assert not out.exists()
    model = load_model(model_file)
    split = {**model.training["split"], "test": []}
    save_model(replace(model, training={**model.training, "split": split}), tmp_path / "old")
    command[3] = str(tmp_path / "old")
    assert run([*command, "--blocks", "50", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert load_model(out).digest == told["digest"]
    assert told["calibration"] == "temperature"
    assert len(told["patients"]) == 1
    assert run([*command, "--blocks", "50", "--kind", "isotonic"]) == 0
    assert "isotonic, a curve for each class, fitted to 1 patient" in capsys.readouterr().out
    assert isinstance(load_model(out).calibration, Isotonic)
