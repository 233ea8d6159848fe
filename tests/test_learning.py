"""Learning: what lies beside the classes, guides, altered copies, memory, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from organfast import learning
from organfast.adaptation import Adapt
from organfast.anatomy import ClassTable
from organfast.augmentation import Augmentation
from organfast.blocks import Block
from organfast.body import body_mask
from organfast.calibration import Temperature
from organfast.cli import run
from organfast.errors import InputError
from organfast.grid import BlockGrid, ModelGrid, to_model_grid
from organfast.layouts import dataset_nuisance, find_cases, write_case
from organfast.learning import Recipe, Sampling, train
from organfast.metrics import dice_per_class
from organfast.models.classifier import Model, load_model, save_model
from organfast.models.forest import ForestSettings
from organfast.painting import paint
from organfast.phantom import FieldOfView, class_labels, phantom, phantom_table
from organfast.pipeline import segment
from organfast.sampling import LabelledScan, Split, labelled_scan, slabs_at

FIELD = FieldOfView((72, 72, 40), (5.0, 5.0, 12.0))
GRID = ModelGrid((6.5, 6.0, 10.0), "piecewise")
SPLIT = Split(("p0", "p1"), test=("p2",))
BLOCK = Block(9, levels=(1, 3))
RECIPE = Recipe(
    grid=GRID, n_per_class=100, forest=ForestSettings("extra_trees", n_trees=12), split=SPLIT
)
DEFAULT = ClassTable.default()


@pytest.fixture(scope="module")
def fine_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms with all their labels, down to single ribs."""
    folder = tmp_path_factory.mktemp("fine")
    for n in range(3):
        anatomy = phantom(FIELD, n)
        write_case(folder, f"p{n}", paint(anatomy, n), anatomy.labels, phantom_table())
    return folder


def learn(cases: Path, threads: int = 1, **changes: Any) -> Model:
    return train(cases, BLOCK, replace(RECIPE, **{"classes": DEFAULT, **changes}), threads=threads)


@pytest.fixture(scope="module")
def model(fine_cases: Path) -> Model:
    return learn(fine_cases)


# --- what lies beside the classes -----------------------------------------------------------------


def test_what_lies_beside_the_classes_is_told_apart_and_summed_up(
    model: Model, fine_cases: Path
) -> None:
    assert model.classes == DEFAULT
    assert model.classifier.n_classes == 23
    beside = model.training["nuisance"]
    assert beside["stomach"] == "thorax_abdomen"
    assert beside["rib_left"] == "body_envelope"
    assert set(beside) == set(dataset_nuisance(find_cases(fine_cases), DEFAULT))
    drawn = model.training["n_cases_with"]
    assert drawn["liver"] == drawn["colon"] == drawn["background"] == 2
    assert drawn["thorax_abdomen"] == 0  # each voxel of it has a name of its own
    # The scan is labelled down to the last voxel, so its context is not lost.
    anatomy = phantom(FIELD, 9)
    truth = class_labels(anatomy)
    found = segment(paint(anatomy, 9), model).labels
    dice = dict(zip(DEFAULT.names, dice_per_class(truth, found, 23), strict=True))
    for name in ("lung_right", "lung_left", "liver"):
        assert dice[name] > 0.6, name
    assert json.dumps(model.training)


def test_a_model_is_scored_on_the_classes_of_its_table(model: Model) -> None:
    counts = np.array(model.scores["test"]["confusion"])
    assert counts.shape == (23, 23)
    assert counts[DEFAULT.index("thorax_abdomen")].sum() == RECIPE.n_per_class
    assert counts[DEFAULT.index("body_envelope")].sum() == RECIPE.n_per_class


def test_drawn_with_the_classes_or_so_many_of_each(model: Model, fine_cases: Path) -> None:
    apart = learn(fine_cases, sampling=Sampling(n_per_nuisance=7))
    n_beside = len(model.training["nuisance"])
    assert model.training["n_of_each_class"] == [100, 300, 300, *[100] * 20]
    assert apart.training["n_of_each_class"] == [100, 300, 300, *[100] * 20, *[7] * n_beside]
    without = learn(fine_cases, sampling=Sampling(nuisance=False))
    assert without.training["nuisance"] == {}
    assert set(without.training["n_cases_with"]) == set(DEFAULT.names)
    # What is not told apart is context where the case annotates every organ, and no wall.
    assert without.training["n_cases_with"]["thorax_abdomen"] == 2
    assert without.training["n_cases_with"]["body_envelope"] == 0
    assert model.training["n_examples"] == without.training["n_examples"] + 2 * 300


@pytest.mark.parametrize("nuisance", [True, False])
def test_a_structure_is_context_even_where_an_organ_was_not_drawn(
    fine_cases: Path, tmp_path: Path, nuisance: bool
) -> None:
    """In a case without spleen the rest of the inside is nobody's, but its muscle is known."""
    table = (fine_cases / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(table)
    for n in range(2):
        (tmp_path / f"p{n}").mkdir()
        for file in ("ct.nii.gz", "labels.nii.gz"):
            (tmp_path / f"p{n}" / file).symlink_to(fine_cases / f"p{n}" / file)
    (tmp_path / "p1" / "labels.csv").write_text(table.replace(",spleen\n", ",rest\n"))
    recipe = replace(
        RECIPE,
        classes=DEFAULT.keep(["thorax_abdomen", "liver", "spleen"]),
        split=Split(("p1",)),
        sampling=Sampling(nuisance=nuisance),
    )
    found = train(tmp_path, BLOCK, recipe).training["n_cases_with"]
    assert found.get("body_wall_muscle", 0) == nuisance
    assert found["thorax_abdomen"] == found["spleen"] == 0
    assert found["background"] == found["liver"] == 1


# --- a guide --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(model: Model, fine_cases: Path) -> Model:
    return learn(fine_cases, sampling=Sampling(guide=model))


def test_a_guide_is_named_in_the_record(model: Model, guided: Model) -> None:
    assert guided.training["sampling"]["guide"] == model.digest
    assert guided.training["sampling"]["guided_share"] == 0.5
    assert model.training["sampling"]["guide"] is None
    assert guided.training["n_examples"] == model.training["n_examples"]
    assert guided.digest != model.digest


def test_a_guide_from_a_file_gives_the_same_model_for_any_number_of_threads(
    model: Model, guided: Model, fine_cases: Path, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "guide.organfast")
    guide = load_model(tmp_path / "guide.organfast")
    assert learn(fine_cases, 2, sampling=Sampling(guide=guide)).digest == guided.digest


def test_hard_voxels_are_those_the_guide_gets_wrong(model: Model) -> None:
    """Of each voxel, 1 - p(its class) at the block nearest to it."""
    volume = to_model_grid(paint(phantom(FIELD, 4), 4), GRID)
    labels = np.random.default_rng(0).integers(0, 25, volume.shape).astype(np.uint8)
    labels[0, :9] = 255
    beside = {"stomach": 2, "rib": 1}
    guide = replace(model, stride=(3, 5, 7))
    found = learning._hardness(
        LabelledScan(volume, labels), learning._Fine(DEFAULT, beside), guide, 2
    )
    assert found is not None
    assert found.shape == labels.shape

    blocks = BlockGrid(volume.shape, guide.stride)
    inside = body_mask(volume, blocks)
    voxels = np.argwhere(labels < 255)[::97]
    for voxel in voxels:
        # Strides are odd, so that no voxel is as near to two blocks.
        at = [int(abs(c - x).argmin()) for c, x in zip(blocks.centres, voxel, strict=True)]
        label = int(labels[tuple(voxel)])
        true = [*range(23), *beside.values()][label]
        centre = np.array([[c[n] for c, n in zip(blocks.centres, at, strict=True)]], np.int32)
        p = np.zeros((1, 23), np.float32)
        p[0, 0] = 1
        if inside[tuple(at)]:
            ((_, slab, local),) = slabs_at(volume, guide.pattern, centre)
            guide.classifier.probabilities(slab, local, p)
        expected = max(1 - p[0, true], learning.EASIEST)
        np.testing.assert_allclose(found[tuple(voxel)], expected, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": DEFAULT.keep(["thorax_abdomen", "liver"])}, "knows other classes .*aorta"),
        ({"grid": ModelGrid((6.0, 6.0, 10.0), "piecewise")}, "the guide works on the grid"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(
    model: Model, fine_cases: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        learn(fine_cases, sampling=Sampling(guide=model), **change)


# --- altered copies -------------------------------------------------------------------------------

WILD = Augmentation(copies=2, elastic_mm=6.0, scale=(0.9, 1.1), jitter_deg=10.0, jitter_scale=0.2)


def test_each_copy_is_drawn_from_as_often_as_the_case(model: Model, fine_cases: Path) -> None:
    altered = learn(fine_cases, augmentation=WILD)
    np.testing.assert_allclose(
        altered.training["n_examples"], 3 * model.training["n_examples"], rtol=0.05
    )
    assert altered.training["augmentation"] == WILD.to_dict()
    assert altered.training["n_cases_with"]["liver"] == 2
    assert model.training["augmentation"] is None
    assert learn(fine_cases, 2, augmentation=WILD).digest == altered.digest
    still = learn(fine_cases, augmentation=replace(WILD, jitter_deg=0.0, jitter_scale=0.0))
    assert still.digest != altered.digest


def test_copies_that_alter_nothing_are_the_case_drawn_again(model: Model, fine_cases: Path) -> None:
    again = learn(fine_cases, augmentation=Augmentation.off(copies=1))
    assert again.training["n_examples"] == 2 * model.training["n_examples"]
    none = learn(fine_cases, augmentation=Augmentation.off(copies=0))
    np.testing.assert_array_equal(none.classifier.nodes, model.classifier.nodes)


# --- drawn in proportion --------------------------------------------------------------------------


@pytest.mark.parametrize("least_share", [0.001, 0.05, 1.0])
def test_positions_are_in_proportion_to_voxels_with_a_floor(least_share: float) -> None:
    sampling = Sampling(least_share=least_share)
    counts = np.array([10**6, 20_000, 5_000, 900, 0])  # the air outside, half a body, ...
    labels = np.repeat(np.arange(5, dtype=np.uint8), counts).reshape(1, 100, -1)
    found = sampling.in_proportion(labels, 5, 10)
    for label, n in enumerate(found):
        share = 0.0 if label == 0 else counts[label] / 20_000
        assert n == round(10 * max(share, least_share) / least_share)
    assert min(found) == 10
    assert sum(found[1:]) <= sampling.most_examples([10] * 5)
    assert sampling.in_proportion(np.zeros((2, 2, 2), np.uint8), 3, 4) == [4, 4, 4]
    unknown = np.full((2, 2, 2), 255, np.uint8)
    assert sampling.in_proportion(unknown, 3, 4) == [4, 4, 4]


def test_calibration_is_fitted_to_what_training_draws(
    fine_cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of classes in proportion says how often a voxel of a scan is of a class."""
    seen: list[np.ndarray] = []

    def fit(found: np.ndarray, truth: np.ndarray) -> Temperature:
        seen.append(np.bincount(truth, minlength=len(DEFAULT)))
        return Temperature(1.0)

    monkeypatch.setitem(learning.FITS, "temperature", fit)
    everyone = (*SPLIT.train, *SPLIT.validation, *SPLIT.test)
    split = Split(train=everyone[:1], validation=everyone[1:2])
    for least_share in (None, 0.1):
        sampling = Sampling(least_share=least_share)
        learn(fine_cases, n_per_class=20, sampling=sampling, split=split, calibration="temperature")
    alike, in_proportion = seen
    assert alike.max() == 20
    assert in_proportion.max() == 200


def test_without_a_floor_there_are_as_many_examples_as_are_asked_for() -> None:
    assert Sampling().most_examples([100, 300, 100]) == 500


def test_the_smallest_whole_organs_are_known(fine_cases: Path) -> None:
    """Counted again voxel by voxel on the model grid; what touches a side is not whole."""
    model = learn(fine_cases, n_per_class=20)
    expected: dict[str, list[float]] = {}
    for case in find_cases(fine_cases).cases:
        if case.patient not in SPLIT.train:
            continue
        scan = labelled_scan(case, model.classes, model.grid)
        voxel_ml = float(np.prod(scan.grid_volume.spacing_mm)) / 1000
        for label in model.classes.organs:
            places = np.argwhere(scan.labels == label)
            inside = (places > 0) & (places < np.array(scan.labels.shape) - 1)
            if len(places) and inside.all():
                expected.setdefault(model.classes.names[label], []).append(len(places) * voxel_ml)
    assert len(expected) > 3
    assert model.whole_ml == pytest.approx({k: min(v) for k, v in expected.items()}, abs=1e-3)


def test_a_model_of_classes_in_proportion(fine_cases: Path) -> None:
    """Counted again in each case; what is beside the classes is drawn by itself."""
    sampling = Sampling(least_share=0.1)
    model = learn(fine_cases, n_per_class=20, sampling=sampling, context_factor=7, adapt=Adapt())
    record, beside = model.training, tuple(model.training["nuisance"])
    names = (*DEFAULT.names, *beside)
    assert record["n_of_each_class"] == [20] * len(names)
    assert record["sampling"]["least_share"] == 0.1
    assert model.adapt == Adapt()
    assert model.atlas is not None
    assert (model.atlas.shares.reshape(len(DEFAULT.organs), -1).max(axis=1) > 0).sum() > 3
    assert learn(fine_cases, n_per_class=20).atlas is None
    expected = 0
    dataset = find_cases(fine_cases)
    for case in dataset.cases:
        if case.patient in SPLIT.train:
            scan = labelled_scan(case, DEFAULT, GRID, dataset_nuisance(dataset, DEFAULT))
            n_voxels = np.array([(scan.labels == n).sum() for n in range(len(names))])
            most = n_voxels[1:].max()
            for label, n in enumerate(n_voxels):
                share = 0.1 if label == 0 else max(n / most, 0.1)
                expected += min(n, round(20 / 0.1 * share))
    assert record["n_examples"] == expected


# --- what is refused ------------------------------------------------------------------------------


def test_what_memory_will_not_hold_is_refused_before_it_is_drawn(
    fine_cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(learning, "labelled_scan", lambda *_: read.append(1))
    words = (
        r"5,\d{3} examples of 162 features take up to 0\.\d+ GiB, and 0.001 GiB are allowed; use"
    )
    with pytest.raises(ValueError, match=words):
        learn(fine_cases, max_memory_gb=0.001)
    with pytest.raises(ValueError, match="are allowed"):
        train(fine_cases, Block(255), replace(RECIPE, classes=DEFAULT, n_per_class=10**7))
    assert not read


def test_a_table_that_the_dataset_lacks_is_refused(fine_cases: Path) -> None:
    table = ClassTable.from_names(["liver", "livre"])
    with pytest.raises(ValueError, match="names livre, which no case") as caught:
        learn(fine_cases, classes=table)
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampling(n_per_nuisance=0), "n_per_nuisance is 0"),
        (lambda: Sampling(guided_share=1.5), "guided_share is 1.5"),
        (lambda: Sampling(guided_share=float("nan")), "guided_share is nan"),
        (lambda: Sampling(least_share=0), "least_share is 0; give a share"),
        (lambda: Sampling(least_share=1.01), "least_share is 1.01"),
        (lambda: Sampling(least_share=float("nan")), "least_share is nan"),
        (lambda: Recipe(max_memory_gb=0), "max_memory_gb is 0"),
        (lambda: Recipe(max_memory_gb=float("nan")), "max_memory_gb is nan"),
    ],
)
def test_settings_out_of_range_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- from the command line ------------------------------------------------------------------------


def test_the_flags_of_train_reach_the_recipe(
    model: Model, fine_cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "\n".join(["name,role", *(f"{s.name},{s.role}" for s in DEFAULT.structures)])
    (tmp_path / "t.csv").write_text(names)
    guide, out = tmp_path / "guide.organfast", tmp_path / "m.organfast"
    save_model(model, guide)
    command = ["train", str(fine_cases), "-o", str(out), "--classes", str(tmp_path / "t.csv")]
    command += ["--block-size", "3", "--spacing", "6.5,6,10", "--n-per-class", "5", "--trees", "2"]
    flags = ["--no-nuisance", "--guide", str(guide), "--augment", "1", "--max-memory", "500MB"]
    flags += ["--adapt", "--least-share", "0.5"]
    assert run([*command, *flags]) == 0, capsys.readouterr().err
    record = load_model(out).training
    assert record["sampling"]["guide"] == model.digest
    assert record["sampling"]["nuisance"] is False
    assert record["sampling"]["least_share"] == 0.5
    assert load_model(out).adapt == Adapt()
    assert "adapts to each scan" in capsys.readouterr().out
    assert run(["info", str(out)]) == 0
    assert "adapt         own_hu True, core 0.7, least_core 20" in capsys.readouterr().out
    assert record["augmentation"]["copies"] == 1
    capsys.readouterr()
    for flag, code, words in (
        ("0.001MB", 2, "are allowed; use a smaller block"),
        ("8", 2, "--max-memory 8 is no amount of memory"),
        ("0GB", 2, "is no amount of memory"),
    ):
        assert run([*command, "--max-memory", flag]) == code
        assert words in capsys.readouterr().err
    assert run([*command, "--guide", str(tmp_path / "t.csv")]) == 1
    assert "t.csv" in capsys.readouterr().err
