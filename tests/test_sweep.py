"""Curves of models and of what is learned: measured again by hand, stored, used, gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from test_model_file import joined, parts

from organfast import sweep as flow
from organfast.anatomy import ClassTable
from organfast.blocks import Block, Context
from organfast.cli import run
from organfast.curve import Curve, CurvePoint, PointSettings
from organfast.errors import InputError
from organfast.evaluation import block_answers
from organfast.grid import ModelGrid
from organfast.layouts import Dataset, find_cases
from organfast.learning import Recipe, train
from organfast.metrics import dice_per_class
from organfast.models.classifier import Model, load_model, save_model
from organfast.models.forest import ForestSettings
from organfast.networklearning import NetworkRecipe
from organfast.pipeline import Settings, segment
from organfast.refinement import Refine
from organfast.sampling import Split
from organfast.sweep import (
    Sweep,
    Swept,
    Way,
    learned_curve,
    model_curve,
    store_presets,
    ways_to_learn,
)

SWEEP = Sweep(strides=(1, 8), slice_steps=(1,), trees=(2, 8), margins=(None, 0.3), rounds=2)
RECIPE = Recipe(
    grid=ModelGrid((8, 8, 8), "piecewise"),
    n_per_class=30,
    forest=ForestSettings("extra_trees", n_trees=4),
)
SPLIT = Split(("phantom_000",), (), ("phantom_001", "phantom_002"))


@pytest.fixture(scope="module")
def dataset(cohort_folder: Path) -> Dataset:
    return find_cases(cohort_folder)


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return load_model(model_file)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swept") / "out"


@pytest.fixture(scope="module")
def swept(model: Model, dataset: Dataset, shelf: Path) -> Swept:
    return model_curve(model, dataset, SWEEP, folder=shelf, threads=2)


@pytest.fixture
def stored(model_file: Path, swept: Swept, tmp_path: Path) -> Path:
    path = Path(shutil.copy(model_file, tmp_path / "stored.organfast"))
    store_presets(path, swept.curve)
    return path


def settings_of(point: CurvePoint) -> Settings:
    chosen = point.settings
    refine = None if chosen.margin is None else Refine(chosen.margin)
    return Settings(stride=chosen.stride, refine=refine, trees=chosen.trees)


# --- one model ------------------------------------------------------------------------------------


def test_points_are_what_segmenting_with_their_settings_gives(
    swept: Swept, model: Model, dataset: Dataset
) -> None:
    curve = swept.curve
    assert len(curve.points) == 8
    unseen = [c for c in dataset.cases if c.name not in model.training["cases"]]
    assert len(unseen) == curve.n_cases == curve.n_patients
    assert set(swept.left_out) == set(model.training["cases"])
    assert (curve.n_timings, curve.threads, curve.model) == (2 * len(unseen), 2, model.digest)
    table = ClassTable.default()
    new = np.array([model.classes.index(n) if n in model.classes else 0 for n in table.names])
    for point in (curve.points[0], curve.points[-1]):
        rows = []
        for case in unseen:
            truth = np.asanyarray(nib.load(case.image.with_name("labels.nii.gz")).dataobj)
            labels = segment(case.image, model, settings_of(point)).labels
            rows.append(dice_per_class(new[truth], labels, len(model.classes)))
        dice = np.array(rows)[:, list(model.classes.organs)]
        for n, value in enumerate(point.dice.values()):
            found = dice[:, n][~np.isnan(dice[:, n])]
            assert (value is None) == (not found.size)
            if value is not None:
                np.testing.assert_allclose(value, found.mean(), atol=1e-6)
        np.testing.assert_allclose(point.mean_dice, np.nanmean(dice, axis=1).mean(), atol=1e-6)


def test_the_first_trees_of_the_same_stride_cost_less_accuracy_or_time(swept: Swept) -> None:
    by_settings = {p.settings: p for p in swept.curve.points}
    fine = by_settings[PointSettings((1, 1, 1), trees=8)]
    coarse = by_settings[PointSettings((8, 8, 1), trees=2)]
    assert fine.mean_dice > coarse.mean_dice
    assert coarse.scans_per_minute > fine.scans_per_minute


def test_a_sweep_that_was_stopped_goes_on(
    swept: Swept, model: Model, dataset: Dataset, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_asked = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal n_asked
        n_asked += 1
        return segment(*arguments, **options)

    monkeypatch.setattr(flow, "segment", counted)
    again = model_curve(model, dataset, SWEEP, folder=shelf, threads=2)
    assert again.curve == swept.curve
    assert n_asked == 0
    kept = sorted((shelf / "curve").iterdir())
    assert len(kept) == 8 * 2 * swept.curve.n_cases
    kept[0].write_text("{")
    kept[1].unlink()
    again = model_curve(model, dataset, SWEEP, folder=shelf, threads=2)
    assert n_asked == 3  # one to be warm, and the two that were lost
    assert [p.dice for p in again.curve.points] == [p.dice for p in swept.curve.points]


def test_whom_the_model_learned_from_is_left_out(model: Model, dataset: Dataset) -> None:
    trained = set(model.training["cases"])
    with pytest.raises(InputError, match=r"only patients that the model has learned.*--folds 5"):
        model_curve(model, dataset, SWEEP, trained)
    with pytest.raises(ValueError, match="patient nobody is not in"):
        model_curve(model, dataset, SWEEP, ["nobody"])
    # Another scan of a patient who trained is no new patient.
    cases = tuple(replace(case, patient="one") for case in dataset.cases)
    with pytest.raises(InputError, match="only patients that the model has learned"):
        model_curve(model, replace(dataset, cases=cases), SWEEP)


def test_a_case_that_cannot_be_used_is_reported(
    model: Model, cohort_folder: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(cohort_folder, tmp_path / "cohort"))
    for case in find_cases(broken).cases:
        if case.name not in model.training["cases"]:
            (broken / case.name / "labels.nii.gz").write_bytes(b"no scan")
    with pytest.raises(InputError, match=r"no case that could be measured: .*labels\.nii\.gz"):
        model_curve(model, broken, SWEEP)


def test_settings_that_are_tried_follow_from_the_model(model: Model) -> None:
    found = Sweep().settings_for(model)
    assert len(set(found)) == len(found)
    k, i, j = model.stride
    assert {s.stride for s in found} == {
        (-(-j * f // 2), -(-i * f // 2), step) for f in (1, 2, 4, 8) for step in (k, 2 * k)
    }
    assert {s.trees for s in found} == {1, 3, 8}
    assert {s.margin for s in found} == {None, 0.2}
    for wrong, message in (
        ({"strides": (0,)}, "strides is"),
        ({"trees": ()}, "trees is"),
        ({"margins": ()}, "margins is empty"),
        ({"rounds": 0}, "rounds is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Sweep(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the forest has 8"):
        Sweep(trees=(9,)).settings_for(model)


# --- presets --------------------------------------------------------------------------------------


def test_a_preset_gives_the_labels_of_the_same_explicit_settings(
    stored: Path, swept: Swept, model: Model, scan_file: Path
) -> None:
    with_presets = load_model(stored)
    assert with_presets.presets == swept.curve
    assert with_presets.digest == model.digest
    for name, at in swept.curve.presets.items():
        settings = Settings.of_preset(with_presets, name, Settings(organs=("liver",)))
        assert settings.preset == name
        point = next(p for p in swept.curve.points if p.name == at)
        explicit = replace(settings_of(point), organs=("liver",))
        assert replace(settings, preset=None) == explicit
        first = segment(scan_file, with_presets, settings)
        second = segment(scan_file, model, explicit)
        np.testing.assert_array_equal(first.labels, second.labels)
        assert first.record["settings"]["preset"] == name
        assert first.record["model"] == second.record["model"]


def test_presets_that_are_not_there_or_not_of_this_model(stored: Path, model: Model) -> None:
    with pytest.raises(ValueError, match=r"no presets; .*-m MODEL --curve --store"):
        Settings.of_preset(model, "fast")
    with pytest.raises(ValueError, match="use fast, balanced, accurate"):
        Settings.of_preset(load_model(stored), "best")
    changed = replace(load_model(stored), stride=(1, 9, 9))
    with pytest.raises(ValueError, match="has changed since its presets were measured"):
        Settings.of_preset(changed, "fast")
    save_model(replace(changed, presets=None), stored)
    presets = replace(model, presets=None)
    assert presets.digest == model.digest
    curve = Curve.from_dict({**_curve_dict(), "model": model.digest})
    with pytest.raises(InputError, match="is not the model that the curve was measured on"):
        store_presets(stored, curve)
    assert load_model(stored).presets is None


def _curve_dict() -> dict[str, Any]:
    point = CurvePoint("a", 1.0, 0.5, {}, {}, 0, PointSettings((3, 3, 1)))
    return Curve((point,), 1, 1, 3, 1).to_dict()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("points", 0, "settings", "stride", 0), 0, "stride is"),
        (("points", 0, "settings", "trees"), 9, "asks 9 of 8 trees"),
        (("points", 0, "settings", "pattern"), {}, "yet to be learned"),
        (("points", 0, "settings", "command"), "x", "unknown entry 'command'"),
        (("points", 0, "name"), "\x1b[2J", "the name of a point is"),
        (("points", 0, "on_front"), "yes", "on_front"),
        (("presets", "fast"), "nowhere", "presets must be"),
        (("presets",), {}, "presets must be"),
        (("threads",), -1, "threads is -1"),
        ((), [], "presets is missing, or not of its kind"),
        ((), {}, "a curve has no points"),
    ],
)
def test_tampered_presets_make_no_model(
    place: tuple[Any, ...], value: Any, message: str, stored: Path
) -> None:
    header, arrays = parts(stored.read_bytes())
    holder: Any = {"": header["presets"]}
    for key in ("", *place)[:-1]:
        holder = holder[key]
    if place:
        holder[place[-1]] = value
    else:
        header["presets"] = value
    stored.write_bytes(joined(header, arrays))
    with pytest.raises(InputError) as error:
        load_model(stored)
    assert message in str(error.value)


def test_trees_that_are_not_there_are_refused(model: Model, scan_file: Path) -> None:
    with pytest.raises(ValueError, match="trees is 9; the forest has 1 to 8"):
        segment(scan_file, model, Settings(trees=9))
    with pytest.raises(ValueError, match="trees is 0"):
        Settings(trees=0)
    every = segment(scan_file, model, Settings(trees=8))
    np.testing.assert_array_equal(every.labels, segment(scan_file, model).labels)


# --- what is learned ------------------------------------------------------------------------------


def test_ways_to_learn_are_blocks_of_every_size_and_context() -> None:
    ways = ways_to_learn(RECIPE, (33, 9), depths=(None, 4))
    assert [way.name for way in ways[:4]] == [
        *("block 9", "block 9, depth 4", "block 33", "block 33, depth 4")
    ]
    assert {way.pattern for way in ways[4:]} == {
        Block(17, levels=(1, 3, 9)),
        Context(spacing_mm=(8, 8, 8)),
    }
    assert ways[1].recipe.forest.max_depth == 4
    native = replace(RECIPE, grid=ModelGrid(None))
    assert [way.name for way in ways_to_learn(native, (9,), [(1,)])] == ["block 9"]
    with pytest.raises(ValueError, match="even and has no centre"):
        ways_to_learn(RECIPE, (8,))
    with pytest.raises(ValueError, match="leave the network"):
        ways_to_learn(replace(RECIPE, network=NetworkRecipe()))


def test_what_is_learned_is_measured_on_patients_who_did_not_train(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ways_to_learn(RECIPE, (1, 9), [(1,)], context=False)
    found = learned_curve(dataset, ways, [SPLIT], folder=tmp_path, threads=2)
    curve = found.curve
    assert (curve.n_patients, curve.n_cases, found.failures) == (2, 2, ())
    assert {p.settings.trees for p in curve.points} == {1, 4}
    assert len(curve.points) == 4
    # The same model learned by itself gives the same scores.
    recipe = replace(RECIPE, split=Split(("phantom_000",)))
    alone = train(dataset, Block(9), recipe, threads=2)
    point = next(p for p in curve.points if "block 9" in p.name and p.settings.trees == 4)
    again = model_curve(
        alone, dataset, Sweep(strides=(alone.stride[1],), slice_steps=(2,), trees=(4,), rounds=1)
    )
    same = next(p for p in again.curve.points if p.settings.margin is None)
    assert same.settings.stride == point.settings.stride
    assert (same.dice, same.centre_mm, same.n_missed) == (
        *(point.dice, point.centre_mm),
        point.n_missed,
    )
    truth, answers = block_answers(alone, dataset.cases[1], 100)
    other_truth, others = block_answers(alone, dataset.cases[2], 100)
    lung = alone.classes.index("lung_right")
    shares = [
        (a.argmax(axis=1) == lung)[t == lung].mean()
        for t, a in ((truth, answers), (other_truth, others))
    ]
    assert point.block_recall is not None
    np.testing.assert_allclose(point.block_recall["lung_right"], np.mean(shares), atol=1e-6)
    best = curve.smallest["lung_right"]
    assert best is not None
    assert best.n_patients == 2
    assert set(best.by_size) == {1, 9}
    np.testing.assert_allclose(best.by_size[9], point.dice["lung_right"], atol=1e-6)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("was done before")

    for name in ("segment", "block_answers"):
        monkeypatch.setattr(flow, name, never)
    monkeypatch.setattr("organfast.evaluation.train", never)
    assert learned_curve(dataset, ways, [SPLIT], folder=tmp_path, threads=2).curve == curve


def test_ways_that_cannot_be_told_apart_are_refused(dataset: Dataset) -> None:
    way = Way("a", Block(9), RECIPE)
    for ways in ((), (way, way)):
        with pytest.raises(ValueError, match="ways must be different ones"):
            learned_curve(dataset, ways)


# --- the command line -----------------------------------------------------------------------------


def test_the_command_measures_stores_and_segments(
    cohort_folder: Path,
    model_file: Path,
    scan_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = tmp_path / "m.organfast", tmp_path / "out"
    shutil.copy(model_file, model)
    task = ["segment", "-i", str(scan_file), "-m", str(model), "--preset", "fast"]
    assert run([*task, "-o", str(tmp_path / "a")]) == 1
    told = capsys.readouterr().err
    assert told == (
        f"organfast: {model}: the model has no presets; measure them: organfast evaluate DATASET "
        "-m MODEL --curve --store\n"
    )
    quick = ["--strides", "9", "--slice-steps", "1", "--tree-counts", "2", "--blocks", "0"]
    command = ["evaluate", str(cohort_folder), "-m", str(model), "--curve", *quick]
    assert run([*command, "--store", "-o", str(out)]) == 0
    shown, told = capsys.readouterr()
    assert "accurate" in shown
    assert f"wrote the curve and its presets into {model}" in shown
    assert "left out of the curve, trained on: phantom_00" in told
    assert {"curve.csv", "curve.png", "evaluation.json"} <= {p.name for p in out.iterdir()}
    curve = json.loads((out / "evaluation.json").read_text())["curve"]
    assert Curve.from_dict(curve) == load_model(model).presets

    assert run([*task, "-o", str(tmp_path / "a")]) == 0
    assert run([*task, "-o", str(tmp_path / "c"), "--trees", "8", "--full-grid"]) == 0
    fast = next(p for p in curve["points"] if p["name"] == curve["presets"]["fast"])["settings"]
    explicit = ["--stride", ",".join(map(str, fast["stride"])), "--trees", str(fast["trees"])]
    if fast["refine"] is not None:
        explicit += ["--coarse-to-fine", "--margin", str(fast["refine"]["margin"])]
    assert run([*task[:5], *explicit, "-o", str(tmp_path / "b")]) == 0
    first, second = (tmp_path / n / "segmentation.nii.gz" for n in "ab")
    assert first.read_bytes() == second.read_bytes()
    records = [json.loads((tmp_path / n / "run.json").read_text()) for n in "abc"]
    assert [r["settings"]["preset"] for r in records] == ["fast", None, "fast"]
    assert (records[2]["settings"]["trees"], records[2]["settings"]["refine"]) == (8, None)
    assert records[0]["settings"]["stride"] == fast["stride"]
    capsys.readouterr()
    assert run(["locate", *task[1:], "--json"]) == 0
    assert "liver" in capsys.readouterr().out


def test_the_command_learns_a_curve(
    cohort_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = tmp_path / "split.json"
    split.write_text('{"train": ["phantom_000"], "test": ["phantom_001"]}')
    quick = ["--spacing", "8,8,8", "--trees", "2", "--n-per-class", "20", "--blocks", "0"]
    command = ["evaluate", str(cohort_folder), "--split", str(split), "--curve", *quick]
    command += ["--sizes", "1,5", "--levels", "1", "--depths", "3,none"]
    assert run([*command, "--strides", "2", "--tree-counts", "2", "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "smallest block that still recognises each organ" in shown
    assert "at 1  at 5" in shown
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())["curve"]
    assert content["model"] is None
    names = {point["name"].split(", stride")[0] for point in content["points"]}
    ways = ("block 1", "block 5", "context")
    assert names == {way + depth for way in ways for depth in ("", ", depth 3")}
    depths = {point["settings"]["max_depth"] for point in content["points"]}
    assert depths == {None, 3}
    assert content["smallest"]["lung_right"]["block_size"] in (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "x", "--store"], "--store is about a curve"),
        (["--folds", "3", "--sizes", "9"], "--sizes is about a curve"),
        (["--folds", "3", "--curve", "--store"], "--store is about a model"),
        (["-m", "x", "--curve", "--sizes", "9"], "--sizes is about what is learned"),
        (["--folds", "3", "--curve", "--depths", "deep"], "--depths deep is no list"),
        (["--folds", "3", "--curve", "--strides", "a"], "--strides a is no list"),
        (["--folds", "3", "--curve", "--learn", "cnn"], "block sizes are compared by forests"),
    ],
)
def test_wishes_that_contradict_each_other_are_wrong_usage(
    arguments: list[str], message: str, cohort_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(cohort_folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_preset_is_wrong_usage(
    model_file: Path, scan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["-i", str(scan_file), "-m", str(model_file), "--preset", "best"]
    assert run(["segment", *task, "-o", str(tmp_path / "a")]) == 2
    assert "use fast, balanced, accurate" in capsys.readouterr().err
