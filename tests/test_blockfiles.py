"""Block files: what they hold, what bad ones get, and models that learn from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import organfast as of
from organfast.anatomy import ClassTable, Structure
from organfast.blockfiles import classes_in, hu_of_grey, read_blocks
from organfast.blocklearning import score_blocks
from organfast.errors import InputError
from organfast.grid import ModelGrid
from organfast.layouts import case_labels, find_cases
from organfast.volume import Volume

DEFAULT = ClassTable.default()
LIVER, SPLEEN, LUNG = 58, 86, 1302
SOME_HU = {LIVER: 100, SPLEEN: 130, LUNG: -800}


def grey_of(hu: NDArray[np.int16]) -> NDArray[np.int64]:
    """As the files were made."""
    return ((np.clip(hu, -1023, 2976) + 1023) / 3999 * 255).astype(np.int64)


def some_blocks(
    n: int, seed: int = 0, size: int = 33
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Noise around a value of each structure, n blocks of each."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(list(SOME_HU), n)
    means = np.array([SOME_HU[i] for i in ids])
    hu = rng.normal(means[:, None, None], 12, (len(ids), size, size))
    return ids, np.rint(hu).astype(np.int16)


def put(path: Path, ids: NDArray[np.int64], pixels: NDArray[np.integer]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.column_stack([ids, pixels.reshape(len(ids), -1)])
    np.savetxt(path, table, "%d", ",")
    return path


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [33, 63])
def test_raw_blocks_are_what_was_written(tmp_path: Path, size: int) -> None:
    ids, hu = some_blocks(4, size=size)
    hu[0, 0, :3] = [-2000, 3071, 7]
    blocks = read_blocks(put(tmp_path / "p.csv", ids, hu), DEFAULT)
    np.testing.assert_array_equal(blocks.hu, hu)
    assert [DEFAULT.structures[n].radlex for n in blocks.labels] == ids.tolist()
    assert (blocks.is_grey, blocks.size) == (False, size)


def test_grey_levels_become_the_middle_of_their_hu(tmp_path: Path) -> None:
    every = np.arange(-1023, 2977)
    grey = grey_of(every)
    middles = [(every[grey == g].min() + every[grey == g].max()) / 2 for g in range(256)]
    np.testing.assert_allclose(hu_of_grey(np.arange(256)), middles, atol=0.5)
    np.testing.assert_array_equal(grey_of(hu_of_grey(np.arange(256))), np.arange(256))

    ids, hu = some_blocks(3)
    blocks = read_blocks(put(tmp_path / "p.csv", ids, grey_of(hu)), DEFAULT)
    assert blocks.is_grey
    np.testing.assert_allclose(blocks.hu, hu, atol=8)  # 15.7 HU a level


def test_a_table_of_ones_own_chooses_blocks(tmp_path: Path) -> None:
    ids, hu = some_blocks(3)
    path = put(tmp_path / "p.csv", ids, hu)
    by_name = ClassTable((Structure("background", "background"), Structure("Spleen")))
    blocks = read_blocks(path, by_name)
    np.testing.assert_array_equal(blocks.hu, hu[ids == SPLEEN])
    assert set(blocks.labels) == {1}
    ids[ids == LUNG] = 777_777
    put(path, ids, hu)
    own = ClassTable((Structure("background", "background"), Structure("nodule", radlex=777_777)))
    assert len(read_blocks(path, own).labels) == 3


def test_lines_beyond_a_chunk_and_blank_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("organfast.blockfiles._LINES_AT_ONCE", 4)
    ids, hu = some_blocks(3)
    path = put(tmp_path / "p.csv", ids, hu)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
    np.testing.assert_array_equal(read_blocks(path, DEFAULT).hu, hu)


BAD_FILES = {
    "empty": ("", "holds no block"),
    "columns": ("58,1,2\n", "has 3 columns in line 1, not 1090 or 3970"),
    "mixed sizes": ("OK\n58" + ",1" * 3969 + "\n", "has 3970 columns in line 2, where .* 1090"),
    "a column lost": ("OK\nOK\n58" + ",1" * 1088 + "\n", "has 1089 columns in line 3, where"),
    "word": (
        "OK\n58,1,two" + ",3" * 1087 + "\n",
        "holds 'two' in line 2, column 3, which is no nu",
    ),
    "gap": ("OK\n58,1," + ",3" * 1087 + "\n", "holds '' in line 2, column 3"),
    "nan": ("OK\n58,1,nan" + ",3" * 1087 + "\n", "holds nan in line 2, column 3, which is no HU"),
    "huge": ("58,1,40000" + ",3" * 1087 + "\n", "holds 40000 in line 1, column 3, which is no HU"),
    "no id": ("OK\nliver" + ",3" * 1089 + "\n", "'liver' in line 2, column 1|no RadLex id"),
    "half an id": (
        "OK\n58.5" + ",3" * 1089 + "\n",
        "begins line 2 with '58.5', which is no RadLex",
    ),
    "unknown id": (
        "OK\nOK\n59" + ",3" * 1089 + "\n",
        "line 3 with the RadLex id 59, of no structure",
    ),
    "bytes": ("OK\n\u00e9\n", "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_the_line(tmp_path: Path, case: str) -> None:
    text, words = BAD_FILES[case]
    path = tmp_path / "p.csv"
    path.write_text(text.replace("OK", "58" + ",1" * 1089), encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_blocks(path, DEFAULT)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# --- finding --------------------------------------------------------------------------------------


def test_block_files_are_found_without_being_read(tmp_path: Path) -> None:
    ids, hu = some_blocks(1)
    put(tmp_path / "p0000.csv", ids, hu)
    for n in range(1, 1000):
        (tmp_path / f"p{n:04d}.csv").touch()
    (tmp_path / "patients.csv").write_text("case,patient\np0001,twice\np0002,twice\n")
    (tmp_path / "labels.csv").write_text("id,name\n1,liver\n")
    dataset = find_cases(tmp_path)
    assert (dataset.layout, len(dataset.cases), len(dataset.patients)) == ("blocks", 1000, 999)
    with pytest.raises(InputError, match="holds blocks, not a scan"):
        case_labels(dataset.cases[0], DEFAULT, Volume(np.zeros((1, 1, 1), np.int16), np.eye(4)))


def test_other_tables_are_no_blocks(tmp_path: Path) -> None:
    (tmp_path / "meta.csv").write_text("id,age\n1,2\n")
    with pytest.raises(InputError, match="no labelled scan"):
        find_cases(tmp_path)
    (case,) = find_cases(tmp_path, "blocks").cases
    with pytest.raises(InputError, match="has 2 columns in line 1"):
        read_blocks(case.image, DEFAULT)
    for name in ("a.nii.gz", "a_labels.nii.gz"):
        (tmp_path / name).touch()
    put(tmp_path / "p.csv", *some_blocks(1))
    with pytest.raises(InputError, match="layouts pairs and blocks; name the one"):
        find_cases(tmp_path)


# --- learning -------------------------------------------------------------------------------------

QUICK = of.Recipe(
    grid=ModelGrid(None),
    forest=of.ForestSettings(n_trees=8),
    split=of.Split(("p0", "p1"), (), ("p2",)),
)


def put_patients(folder: Path, *, as_grey: bool = False) -> None:
    for n in range(3):
        ids, hu = some_blocks(20, seed=n)
        put(folder / f"p{n}.csv", ids, grey_of(hu) if as_grey else hu)


@pytest.mark.parametrize("as_grey", [False, True])
def test_a_model_learns_from_blocks_and_is_scored_by_patient(tmp_path: Path, as_grey: bool) -> None:
    put_patients(tmp_path, as_grey=as_grey)
    model = of.train(tmp_path, of.Block(33), QUICK)
    assert model.classes.names == ("background", "liver", "spleen", "lung_right")
    assert (model.grid.spacing_mm, model.pattern, model.stride) == (None, of.Block(33), (1, 4, 4))
    score = model.scores["test"]
    assert (score["n_patients"], score["n_blocks"]) == (1, 60)
    assert score["block_accuracy"] == score["by_patient"]["p2"] > 0.95
    assert np.array(score["confusion"]).sum(axis=1).tolist() == [0, 20, 20, 20]
    assert model.training["layout"] == "blocks"
    assert "which way their rows run" in model.training["warnings"][0]
    of.save_model(model, tmp_path / "m.organfast")
    assert of.load_model(tmp_path / "m.organfast").digest == model.digest

    # The model reads a scan as it read the blocks.
    hu = np.full((56, 56, 3), SOME_HU[LIVER], np.int16)
    hu += np.random.default_rng(5).normal(0, 12, hu.shape).astype(np.int16)
    hu[0, 0, 0] = -1000
    settings = of.Settings(body_mask=False, cleaning=of.Cleaning("none"), keep_context=True)
    result = of.segment((hu, np.eye(4)), model, settings)
    inside = result.labels[20:36, 20:36]  # blocks that see nothing beyond the sides
    assert np.mean(inside == model.classes.index("liver")) > 0.9


def test_without_a_recipe_the_grid_is_native(tmp_path: Path) -> None:
    put_patients(tmp_path)
    model = of.train(tmp_path, of.Block(33))
    assert model.grid == ModelGrid(None)
    assert set(model.scores) == {"test"}


def test_the_same_blocks_give_the_same_forest_as_scikit_learn(tmp_path: Path) -> None:
    from sklearn.ensemble import ExtraTreesClassifier

    put_patients(tmp_path)
    model = of.train(tmp_path, None, QUICK)
    train = [read_blocks(tmp_path / f"p{n}.csv", model.classes) for n in (0, 1)]
    test = read_blocks(tmp_path / "p2.csv", model.classes)
    settings = QUICK.forest
    peer = ExtraTreesClassifier(
        settings.n_trees,
        min_samples_leaf=settings.min_samples_leaf,
        max_features=settings.max_features,
        max_depth=settings.max_depth,
        random_state=settings.seed,
    ).fit(
        np.concatenate([b.hu.reshape(len(b.hu), -1) for b in train]),
        np.concatenate([b.labels for b in train]),
    )
    right = (peer.predict(test.hu.reshape(len(test.hu), -1)) == test.labels).mean()
    assert model.scores["test"]["block_accuracy"] == pytest.approx(right, abs=1e-12)
    dataset = find_cases(tmp_path)
    again = score_blocks(model, [c for c in dataset.cases if c.name == "p2"])
    assert again == model.scores["test"]


def test_at_most_so_many_blocks_of_a_class_and_file(tmp_path: Path) -> None:
    put_patients(tmp_path)
    recipe = of.Recipe(
        grid=ModelGrid(None),
        forest=of.ForestSettings(n_trees=1),
        split=of.Split(("p0", "p1")),
        n_per_class=5,
    )
    assert of.train(tmp_path, None, recipe).training["n_examples"] == 2 * 3 * 5


def test_what_blocks_cannot_be_used_for_is_said(tmp_path: Path) -> None:
    put_patients(tmp_path)
    for pattern, recipe, words in (
        (of.Block(63), None, "blocks of 33 pixels.*use Block"),
        (of.Block(33, levels=(1, 3)), None, "use Block"),
        (of.Context(), None, "use Block"),
        (None, of.Recipe(), "working grid; use ModelGrid"),
        (None, of.Recipe(grid=ModelGrid(None), augmentation=of.Augmentation()), "be altered"),
        (None, of.Recipe(grid=ModelGrid(None), network=of.NetworkRecipe()), "teach a network"),
        (
            None,
            of.Recipe(grid=ModelGrid(None), sampling=of.Sampling(least_share=0.1)),
            "be drawn in proportion to a scan; leave least_share",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            of.train(tmp_path, pattern, recipe)
    ids, hu = some_blocks(2, 9)
    put(tmp_path / "p1.csv", ids, grey_of(hu))
    with pytest.raises(InputError, match=r"holds blocks of grey levels, p0\.csv of HU"):
        of.train(tmp_path, None, QUICK)
    put(tmp_path / "p1.csv", *some_blocks(2, 9, 63))
    with pytest.raises(InputError, match=r"holds blocks of 63 pixels, p0\.csv of 33"):
        of.train(tmp_path, None, QUICK)
    assert len(classes_in(find_cases(tmp_path).cases)) == 4
