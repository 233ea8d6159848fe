"""Evaluation: numbers found again by hand, nobody tested on who trained, and runs that go on."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from organfast import evaluation as flow
from organfast.anatomy import ClassTable
from organfast.blocks import Block
from organfast.calibration import reliability
from organfast.cli import run
from organfast.errors import InputError
from organfast.evaluation import (
    Scoring,
    block_answers,
    cross_validate,
    evaluate,
    read_folds,
    save_evaluation,
)
from organfast.grid import ModelGrid
from organfast.layouts import Dataset, find_cases
from organfast.learning import Recipe, train
from organfast.metrics import SCORES
from organfast.models.classifier import Model, load_model
from organfast.models.forest import ForestSettings
from organfast.networklearning import NetworkRecipe, training_settings
from organfast.pipeline import Settings, segment
from organfast.sampling import Split
from organfast.scorebook import (
    ALL_ORGANS,
    CaseScores,
    Evaluation,
    Failure,
    Presence,
    compare,
    comparison_rows,
    evaluation_csv,
    summary_rows,
)
from organfast.statistics import mean_intervals

PATTERN = Block(9, levels=(1, 3))
RECIPE = Recipe(
    grid=ModelGrid((8, 8, 8), "piecewise"),
    n_per_class=30,
    forest=ForestSettings("extra_trees", n_trees=3),
)
SCORING = Scoring(n_blocks=20, n_resamples=500)


@pytest.fixture(scope="module")
def dataset(cohort_folder: Path) -> Dataset:
    return find_cases(cohort_folder)


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return load_model(model_file)


@pytest.fixture(scope="module")
def evaluated(model: Model, dataset: Dataset) -> Evaluation:
    return evaluate(model, dataset, SCORING, threads=2)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validated") / "out"


@pytest.fixture(scope="module")
def validated(dataset: Dataset, shelf: Path) -> Evaluation:
    return cross_validate(dataset, PATTERN, RECIPE, "leave-one-out", SCORING, shelf, threads=2)


@pytest.fixture
def copied(cohort_folder: Path, tmp_path: Path) -> Path:
    """A cohort to break."""
    return Path(shutil.copytree(cohort_folder, tmp_path / "cohort"))


def labels_of(dataset: Dataset, n: int) -> np.ndarray:
    path = dataset.cases[n].image.with_name("labels.nii.gz")
    return np.asanyarray(nib.load(path).dataobj)


# --- one model ------------------------------------------------------------------------------------


def test_scores_are_those_of_the_segmentation_that_a_user_gets(
    evaluated: Evaluation, model: Model, dataset: Dataset
) -> None:
    table = ClassTable.default()
    for n, case in enumerate(evaluated.cases):
        result = segment(dataset.cases[n].image, model)
        true = labels_of(dataset, n)
        assert (case.name, case.model) == (dataset.cases[n].name, model.digest)
        assert case.annotated.all()
        for column, organ in enumerate(evaluated.organs):
            t, p = true == table.index(organ), result.labels == model.classes.index(organ)
            both, shared = t.sum() + p.sum(), (t & p).sum()
            dice = 2 * shared / both if both else np.nan
            np.testing.assert_allclose(case.scores["dice"][column], dice)
            np.testing.assert_allclose(case.truth_ml[column], t.sum() * 0.2)
            assert case.present[column] == result.organs[organ].present
            if t.any() and p.any():
                mm = [np.argwhere(mask).mean(axis=0) * [5, 5, 8] for mask in (t, p)]
                off = np.linalg.norm(mm[0] - mm[1])
                np.testing.assert_allclose(case.scores["centroid_mm"][column], off)
        assert case.voxels.sum() == true.size
        assert not case.voxels[-1].any()  # all voxels of a phantom are labelled
        is_organ = np.isin(result.labels, model.classes.organs)
        assert case.confidence[0].sum() == is_organ.sum()
    assert evaluated.failures == ()


def test_cases_that_the_model_learned_from_are_marked(evaluated: Evaluation, model: Model) -> None:
    assert evaluated.trained_on == tuple(sorted(model.training["cases"]))
    assert 0 < len(evaluated.trained_on) < len(evaluated.cases)


def test_scores_do_not_depend_on_threads_or_on_what_else_is_wanted(
    evaluated: Evaluation, model: Model, dataset: Dataset
) -> None:
    scoring = replace(SCORING, settings=Settings(organs=("liver",), probabilities=("liver",)))
    again = evaluate(model, dataset, scoring, ["phantom_001"])
    assert [case.name for case in again.cases] == ["phantom_001"]
    assert again.cases[0].to_dict() == evaluated.cases[1].to_dict()
    with pytest.raises(ValueError, match="patient nobody is not in"):
        evaluate(model, dataset, SCORING, ["nobody"])


def test_an_organ_that_a_case_does_not_annotate_is_not_scored_there(
    copied: Path, model: Model
) -> None:
    table = "id,name\n" + "".join(
        f"{n},{'something' if name == 'liver' else name}\n"
        for n, name in enumerate(ClassTable.default().names)
    )
    (copied / "phantom_002" / "labels.csv").write_text(table)
    found = evaluate(model, copied, replace(SCORING, n_blocks=0))
    liver = found.organs.index("liver")
    assert [bool(case.annotated[liver]) for case in found.cases] == [True, True, False]
    for score in ("dice", "nsd", "volume_error_ml"):
        np.testing.assert_array_equal(
            np.isnan(found.by_case(score)[:, liver]), [False, False, True]
        )
    assert np.isnan(found.cases[2].truth_ml[liver])
    assert found.cases[2].voxels[-1].sum() > 0  # what has no label is told apart
    assert found.summary("dice")["liver"]["n_patients"] == 2
    assert found.presence["liver"].n_there == 2
    assert found.blocks is None
    assert found.to_dict()["confusion"]["blocks"] is None


def test_a_case_that_cannot_be_used_is_reported_and_the_others_are_scored(
    copied: Path, model: Model
) -> None:
    (copied / "phantom_001" / "labels.nii.gz").write_bytes(b"no scan")
    found = evaluate(model, copied, SCORING)
    assert [case.name for case in found.cases] == ["phantom_000", "phantom_002"]
    assert [failure.case for failure in found.failures] == ["phantom_001"]
    assert "phantom_001/labels.nii.gz: " in found.failures[0].reason
    # A fold that cannot be learned takes its cases along, and no others.
    split = [
        Split(("phantom_001",), (), ("phantom_002",)),
        Split(("phantom_002",), (), ("phantom_000",)),
    ]
    validated = cross_validate(copied, PATTERN, RECIPE, split, SCORING)
    assert [case.name for case in validated.cases] == ["phantom_000"]
    assert [failure.case for failure in validated.failures] == ["phantom_002"]


# --- folds ----------------------------------------------------------------------------------------


def test_each_patient_is_tested_by_a_model_that_has_not_seen_them(
    validated: Evaluation, dataset: Dataset
) -> None:
    assert validated.patients == dataset.patients
    assert validated.trained_on == ()
    assert [case.fold for case in validated.cases] == [0, 1, 2]
    for fold in validated.how["folds"]:
        assert sorted(fold["train"] + fold["test"]) == list(dataset.patients)
    # The second fold learned by itself: nothing was carried over from the first.
    split = Split(("phantom_000", "phantom_002"))
    alone = train(dataset, PATTERN, replace(RECIPE, split=split), threads=2)
    assert validated.cases[1].model == alone.digest
    scored = evaluate(alone, dataset, SCORING, ["phantom_001"]).cases[0]
    assert {**scored.to_dict(), "fold": 1} == validated.cases[1].to_dict()


def test_a_run_that_was_stopped_goes_on(
    validated: Evaluation, shelf: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("was done before")

    def again(scoring: Scoring = SCORING) -> Evaluation:
        return cross_validate(dataset, PATTERN, RECIPE, "leave-one-out", scoring, shelf, threads=2)

    monkeypatch.setattr(flow, "train", never)
    with monkeypatch.context() as patch:
        patch.setattr(flow, "segment", never)
        assert again().to_dict() == validated.to_dict()
        # Other intervals are made of the same scores.
        other = again(replace(SCORING, level=0.5))
        assert other.cases[0].to_dict() == validated.cases[0].to_dict()
        with pytest.raises(AssertionError, match="was done before"):
            again(replace(SCORING, tolerance_mm=1.0))
    kept = sorted((shelf / "cases").iterdir())
    assert len(kept) == 3
    kept[0].write_text("{")  # half-written, by whoever
    kept[1].unlink()
    assert again().to_dict() == validated.to_dict()


def test_folds_are_given_by_number_and_by_split(dataset: Dataset) -> None:
    seen = []
    split = Split(("phantom_000",), ("phantom_002",), ("phantom_001",))
    found = cross_validate(
        dataset,
        PATTERN,
        RECIPE,
        [split],
        replace(SCORING, n_blocks=0),
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert [case.name for case in found.cases] == ["phantom_001"]
    fold = {"train": ["phantom_000"], "validation": ["phantom_002"], "test": ["phantom_001"]}
    assert found.how["folds"] == [fold]
    assert (flow.WHAT, 0, 1) in seen
    assert seen[-1] == (flow.WHAT, 1, 1)
    for folds, message in (
        (4, "leave nobody to train or to test on"),
        ("all", "give a number"),
        ([Split(("phantom_000",))], "no patient to test on"),
        ([Split(("nobody",), (), ("phantom_000",))], "not in the dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_validate(dataset, PATTERN, RECIPE, folds, SCORING)  # type: ignore[arg-type]


def test_folds_are_read_as_nnunet_writes_them(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    a, b, c = dataset.patients
    path.write_text(json.dumps([{"train": [a, b], "val": [c]}, {"train": [c], "val": [b, a]}]))
    assert read_folds(path, dataset) == (Split((a, b), (), (c,)), Split((c,), (), (b, a)))
    assert read_folds(f"{path}#1", dataset) == (Split((c,), (), (b, a)),)
    path.write_text(json.dumps({"train": [a], "test": [b]}))
    assert read_folds(path, dataset) == (Split((a,), (), (b,)),)
    for wrong, message in (
        ("[", "cannot be read as JSON"),
        ("[]", "has 0 folds"),
        ('[{"train": ["phantom_000"]}]', "no split of nnU-Net"),
        ('[{"train": ["phantom_000"], "val": ["x"]}]', "names patient x"),
        ('[{"train": ["phantom_000"], "val": ["phantom_000"]}]', "both to train and to validate"),
        ('{"train": ["x"]}', "names patient x"),
        ("3", "is not a split"),
    ):
        path.write_text(wrong)
        with pytest.raises(InputError, match=message):
            read_folds(path, dataset)


def test_networks_go_through_it_as_forests_do(dataset: Dataset, tmp_path: Path) -> None:
    training, outputs = training_settings({"steps": 30}, "towers", checkpoints=tmp_path / "kept")
    recipe = replace(
        RECIPE, grid=ModelGrid((5, 5, 8), "piecewise"), network=NetworkRecipe(training=training)
    )
    split = [Split(("phantom_000",), ("phantom_002",), ("phantom_001",))]
    shelf = tmp_path / "out"
    found = cross_validate(dataset, PATTERN, recipe, split, SCORING, shelf, threads=2)
    assert [case.name for case in found.cases] == ["phantom_001"]
    assert found.by_case("dice")[0, found.organs.index("lung_right")] > 0.3
    model = load_model(next((shelf / "models").iterdir()))
    assert model.digest == found.cases[0].model
    assert set(model.training["cases"]) == {"phantom_000"}
    blocks = found.blocks
    assert blocks is not None
    assert blocks.counts.trace() > 3 / len(found.classes) * blocks.counts.sum()
    carried = replace(recipe, network=NetworkRecipe(training=training, outputs=outputs))
    with pytest.raises(ValueError, match="must not reach the next"):
        cross_validate(dataset, PATTERN, carried, split, SCORING)


def test_blocks_that_were_cut_out_are_no_scans(dataset: Dataset, model: Model) -> None:
    blocks = replace(dataset, layout="blocks")
    for job in (lambda: evaluate(model, blocks), lambda: cross_validate(blocks)):
        with pytest.raises(InputError, match="no scan to segment"):
            job()


# --- blocks and calibration -----------------------------------------------------------------------


def test_blocks_are_balanced_and_their_answers_the_classifier_s(
    evaluated: Evaluation, model: Model, dataset: Dataset
) -> None:
    labels, probabilities = block_answers(model, dataset.cases[0], 20)
    assert np.bincount(labels).max() == 20
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    blocks = evaluated.cases[0].blocks
    assert blocks is not None
    assert blocks.counts.sum() == len(labels)
    assert blocks.counts.trace() == (probabilities.argmax(axis=1) == labels).sum()
    np.testing.assert_allclose(
        blocks.reliability.expected_error, reliability(probabilities, labels).expected_error
    )
    together = evaluated.blocks
    assert together is not None
    parts = [case.blocks for case in evaluated.cases if case.blocks is not None]
    np.testing.assert_array_equal(together.counts, sum(part.counts for part in parts))
    weights = [part.counts.sum() for part in parts]
    np.testing.assert_allclose(
        together.brier, np.average([part.brier for part in parts], weights=weights)
    )


# --- what cases say together ----------------------------------------------------------------------


def case(name: str, patient: str, dice: list[float], **changed: Any) -> CaseScores:
    """Three organs, of which one may be absent (NaN)."""
    values = np.array(dice)
    usual: dict[str, Any] = {
        "fold": None,
        "model": "m",
        "was_trained_on": False,
        "annotated": np.array([True, True, True]),
        "present": np.array([True, True, False]),
        "truth_ml": np.array([10.0, 5.0, 0.0]),
        "predicted_ml": np.array([9.0, 0.0, 0.0]),
        "scores": {score: values for score in SCORES},
        "voxels": np.zeros((6, 5), np.int64),
        "confidence": np.zeros((2, 256), np.int64),
        "blocks": None,
    }
    return CaseScores(name, patient, **{**usual, **changed})


def book(*cases: CaseScores, seed: int = 0) -> Evaluation:
    how = {"tolerance_mm": 2.0, "level": 0.9, "n_resamples": 400, "seed": seed}
    classes = ("background", "context", "a", "b", "c")
    return Evaluation(classes, ("a", "b", "c"), cases, (Failure("x", "x: why; what"),), how)


NAN = np.nan
ONE = (
    case("1", "p", [0.2, NAN, 0.4]),
    case("2", "q", [0.6, NAN, NAN]),
    case("3", "p", [0.4, NAN, 0.8]),
)


def test_scans_of_one_patient_are_one_observation() -> None:
    found = book(*ONE)
    assert found.patients == ("p", "q")
    expected = [[0.3, NAN, 0.6, 0.45], [0.6, NAN, NAN, 0.6]]
    np.testing.assert_allclose(found.by_patient("dice"), expected)
    summary = found.summary("dice")
    intervals = mean_intervals(np.array(expected), 0, 400, 0.9)
    assert summary["a"] == {
        "n_patients": 2,
        "mean": pytest.approx(0.45),
        "low": pytest.approx(intervals.low[0]),
        "high": pytest.approx(intervals.high[0]),
    }
    assert summary["b"] == {"n_patients": 0, "mean": None, "low": None, "high": None}
    assert summary["c"] == {"n_patients": 1, "mean": pytest.approx(0.6), "low": None, "high": None}
    assert summary[ALL_ORGANS]["mean"] == pytest.approx(0.525)
    with pytest.raises(ValueError, match="'f1' is unknown"):
        found.by_case("f1")


def test_errors_of_opposite_sign_do_not_cancel_out() -> None:
    found = book(case("1", "p", [-10, 1, 1]), case("2", "q", [10, 1, 1]))
    assert found.summary("volume_error_percent")["a"]["mean"] == 10


def test_presence_counts_cases_that_annotate_the_organ() -> None:
    unknown = case("4", "r", [NAN] * 3, annotated=np.zeros(3, bool), truth_ml=np.full(3, NAN))
    false = case("5", "s", [0.1] * 3, predicted_ml=np.ones(3), present=np.ones(3, bool))
    found = book(*ONE, unknown, false).presence
    assert found["a"] == Presence(4, 4, 0, 0, 0, 0)
    assert found["b"] == Presence(4, 4, 0, 0, 3, 0)
    assert found["c"] == Presence(0, 0, 4, 3, 0, 1)
    assert (found["a"].sensitivity, found["a"].specificity) == (1, None)
    assert (found["c"].sensitivity, found["c"].specificity) == (None, 0.75)


def test_models_are_compared_on_what_both_know() -> None:
    first = book(*ONE)
    second = book(
        case("1", "p", [0.3, NAN, 0.4]),
        case("3", "p", [0.5, NAN, 0.9]),
        case("2", "q", [0.9, NAN, 0.1]),
        case("9", "z", [1, 1, 1]),
    )
    second = replace(second, organs=("c", "b", "a"))  # another table: a and c exchanged
    found = compare(first, second)
    assert list(found) == ["a", "b", "c", ALL_ORGANS]
    assert found["a"].n_patients == 2
    np.testing.assert_allclose(found["a"].difference, ((0.65 - 0.3) + (0.1 - 0.6)) / 2)
    assert found["b"].n_patients == 0
    assert found["c"].n_patients == 1
    heads, rows = comparison_rows(found, 0.9)
    assert heads[2] == "difference [90 %]"
    assert [row[0] for row in rows] == ["a", "c", ALL_ORGANS]
    assert rows[1][1:3] == ("1", "-0.200")
    with pytest.raises(ValueError, match="no case or no organ in common"):
        compare(first, book(case("9", "z", [1, 1, 1])))


def test_an_evaluation_survives_json(evaluated: Evaluation, validated: Evaluation) -> None:
    for found in (evaluated, validated, book(*ONE), book()):
        told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        again = Evaluation.from_dict(told)
        assert again.to_dict() == told
        assert {"summary", "presence", "confusion", "calibration", "cases"} <= set(told)
    for wrong in ({}, [], {"schema": 1}, {**told, "cases": [{}]}):
        with pytest.raises(ValueError, match="evaluate again"):
            Evaluation.from_dict(wrong)  # type: ignore[arg-type]


def test_tables_for_spreadsheets_and_people(evaluated: Evaluation) -> None:
    rows = list(csv.DictReader(io.StringIO(evaluation_csv(evaluated))))
    assert len(rows) == len(evaluated.cases) * len(evaluated.organs)
    row = rows[len(evaluated.organs)]
    assert (row["case"], row["organ"], row["fold"]) == ("phantom_001", evaluated.organs[0], "")
    np.testing.assert_allclose(float(row["dice"]), evaluated.by_case("dice")[1, 0], rtol=1e-5)
    assert evaluation_csv(book(case("=1+1", "p", [NAN] * 3))).splitlines()[1].startswith("'=1+1,p,")
    heads, table = summary_rows(book(*ONE))
    assert heads[:4] == ("organ", "patients", "Dice", "NSD 2 mm")
    assert [r[0] for r in table] == ["a", "b", "c", ALL_ORGANS]
    assert table[0][2].startswith("0.45 [0.")
    assert table[1][-2:] == ("3 of 3", "0 of 0")
    assert table[2][2] == "0.60"


def test_saving_replaces_whole_files(
    evaluated: Evaluation, model: Model, dataset: Dataset, tmp_path: Path
) -> None:
    for _ in range(2):
        save_evaluation(evaluated, tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert {p.name for p in out.iterdir()} == {"evaluation.json", "evaluation.csv", "report.html"}
    again = Evaluation.from_dict(json.loads((out / "evaluation.json").read_text()))
    assert again.to_dict() == json.loads(json.dumps(evaluated.to_dict()))
    with pytest.raises(InputError, match="cannot be written"):
        save_evaluation(evaluated, out / "evaluation.csv" / "inside")
    with pytest.raises(InputError, match="cannot be written"):
        evaluate(model, dataset, SCORING, folder=out / "evaluation.csv")


def test_settings_out_of_range_are_refused() -> None:
    for name, value in (
        ("n_blocks", -1),
        ("n_resamples", 0),
        ("seed", 0.5),
        ("tolerance_mm", -1),
        ("level", 1),
    ):
        with pytest.raises(ValueError, match=f"{name} is"):
            Scoring(**{name: value})


# --- the command line -----------------------------------------------------------------------------


def test_the_command_evaluates_a_model(
    cohort_folder: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["evaluate", str(cohort_folder), "-m", str(model_file), "--blocks", "10"]
    assert run([*command, "-o", str(out), "--against", str(model_file)]) == 0
    shown, told = capsys.readouterr()
    assert "3 patients, 3 cases" in shown
    assert "all organs" in shown
    assert "Wilcoxon p" in shown
    assert told.startswith("organfast: warning: the model was trained on phantom_00")
    assert {p.name for p in out.iterdir()} == {
        *("evaluation.json", "evaluation.csv", "report.html", "against", "cases", "models")
    }
    assert run([*command, "--json", "-o", str(out)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "evaluation.json").read_text())


def test_the_command_learns_folds(
    cohort_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = tmp_path / "split.json"
    split.write_text('{"train": ["phantom_000"], "test": ["phantom_001"]}')
    quick = ("--block-size", "5", "--spacing", "8,8,8", "--trees", "2", "--n-per-class", "20")
    command = ["evaluate", str(cohort_folder), *quick, "--blocks", "0", "--json"]
    for way, n in ((["--split", str(split)], 1), (["--folds", "3"], 3), (["--leave-one-out"], 3)):
        assert run([*command, *way]) == 0
        content = json.loads(capsys.readouterr().out)
        assert len(content["patients"]) == n
        assert content["trained_on"] == []


def test_some_failed_cases_are_said_in_a_line_each(
    copied: Path, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "phantom_001" / "ct.nii.gz").write_bytes(b"no scan")
    command = ["evaluate", str(copied), "-m", str(model_file), "--blocks", "0"]
    assert run(command) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"organfast: {copied}/phantom_001/ct.nii.gz: ")
    for name in ("phantom_000", "phantom_002"):
        (copied / name / "ct.nii.gz").write_bytes(b"no scan")
    assert run(command) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "not none of them"),
        (["-m", "x", "--folds", "2"], "not --model and --folds"),
        (["--folds", "2", "--split", "x"], "not --folds and --split"),
        (["--folds", "2", "--against", "x"], "give --model as well"),
        (["--folds", "2", "--levels", "1"], "give --block-size as well"),
        (["--folds", "9"], "leave nobody to train or to test on"),
    ],
)
def test_wishes_that_contradict_each_other_are_wrong_usage(
    arguments: list[str], message: str, cohort_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(cohort_folder), *arguments]) == 2
    assert message in capsys.readouterr().err
