"""The model file: what comes back, and what anything else is told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from organfast.adaptation import Adapt
from organfast.anatomy import ClassTable
from organfast.atlas import Atlas
from organfast.blocks import Block
from organfast.errors import InputError
from organfast.grid import ModelGrid
from organfast.models.classifier import MAX_CLASSES, Model, load_model, save_model
from organfast.models.forest import NODE, Forest

CLASSES = ClassTable.default().keep(["liver", "kidney_left", "kidney_right"])
N_CLASSES = len(CLASSES)
PATTERN = Block(5, (1, 3))
TRAINING = {
    "cases": {"patient 1": {"image": "00ff", "labels": "ff00"}},
    "n_examples": 12,
    "spacing_mm": [0.7, 0.7, 2.5],
    "split": {"train": ["patient 1"], "validation": [], "test": []},
    "seed": 3,
}
SCORE = {"n_patients": 1, "n_blocks": 9, "block_accuracy": 0.5, "block_accuracy_organs": 0.25}


def grown(n_trees: int, n_inner: int, n_rows: int, seed: int = 0) -> Forest:
    """Random trees, pairs in the order of their parents."""
    rng = np.random.default_rng(seed)
    size = 2 * n_inner + 1
    trees = np.zeros((n_trees, size), NODE)
    trees["left"] = ~rng.integers(0, N_CLASSES + n_rows, (n_trees, size), np.int32)
    for tree in trees:
        leaves = [0]
        for left in range(1, size, 2):
            parent = leaves.pop(rng.integers(len(leaves)))
            tree[parent] = (rng.integers(-500, 500), rng.integers(PATTERN.n_features), left)
            leaves += [left, left + 1]
    table = rng.dirichlet(np.ones(N_CLASSES), n_rows)
    starts = np.arange(n_trees + 1, dtype=np.int64) * size
    return Forest(trees.ravel(), starts, table, PATTERN.offsets, N_CLASSES)


def small() -> Model:
    return Model(
        classifier=grown(4, 15, 5),
        classes=CLASSES,
        pattern=PATTERN,
        grid=ModelGrid((1.5, 1.5, 3.0), "piecewise"),
        stride=(2, 3, 3),
        training=TRAINING,
        scores={"test": SCORE},
    )


@cache
def small_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.organfast"
        save_model(small(), path)
        return path.read_bytes()


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file as (header, arrays that may be changed)."""
    outer = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    arrays = {name: array.copy() for name, array in load(content).items()}
    return json.loads(outer["__metadata__"]["organfast"]), arrays


def joined(header: Any, arrays: dict[str, np.ndarray]) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {"organfast": text})


def use(model: Model) -> None:
    """All that the package does with a model; a file that loads must survive it."""
    pk, pr, pc = model.pattern.reach
    rng = np.random.default_rng(0)
    shape = (len(model.pattern.widths), 1 + 2 * pk, 3 + 2 * pr, 3 + 2 * pc)
    slab = rng.integers(-1024, 2000, shape, np.int16)
    positions = np.array([(pk, pr, pc), (pk, pr + 2, pc + 1)] * 20, np.int32)
    out = np.empty((40, model.classifier.n_classes))
    model.classifier.probabilities(slab, positions, out)
    np.testing.assert_allclose(out.sum(axis=1), 1, rtol=0, atol=1e-5)
    described = [f"{s['n_blocks']:d} {s['block_accuracy']:.1%}" for s in model.scores.values()]
    described += [*model.training["cases"], f"{model.training['n_examples']:d}", model.digest]
    described += [model.classes.itksnap_table(), model.classes.slicer_table()]
    described += [f"{name} {v}" for name, v in model.versions.items()]
    assert "\n".join([*described, str(model.stride), str(model.grid)]).encode()


def loads_or_says_why(content: bytes, path: Path) -> bool:
    path.write_bytes(content)
    try:
        model = load_model(path)
    except InputError as error:
        line = str(error)
        assert line.startswith(f"{path}: ")
        assert line.isprintable()
        assert len(line) < 600
        return False
    use(model)
    return True


# --- there and back -------------------------------------------------------------------------------


def test_a_model_comes_back_whole(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "model.organfast"
    save_model(model, path)
    back = load_model(path)
    for name, array in model.classifier.arrays().items():
        np.testing.assert_array_equal(back.classifier.arrays()[name], array)
    for name in ("classes", "pattern", "grid", "stride", "training", "scores", "versions"):
        assert getattr(back, name) == getattr(model, name), name
    assert back.digest == model.digest
    assert len(back.digest) == 64
    use(back)
    assert [p.name for p in tmp_path.iterdir()] == ["model.organfast"]


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.organfast", tmp_path / "b.organfast"
    save_model(small(), first)
    reordered = replace(small(), training=dict(reversed(TRAINING.items())))
    save_model(reordered, second)
    assert first.read_bytes() == second.read_bytes()
    save_model(load_model(first), second)
    assert first.read_bytes() == second.read_bytes()


def test_the_digest_tells_models_apart() -> None:
    model = small()
    others = [
        replace(model, classifier=grown(4, 15, 5, seed=1)),
        replace(model, classifier=grown(5, 15, 5)),
        replace(model, grid=ModelGrid()),
        replace(model, stride=(1, 3, 3)),
        replace(model, training={**TRAINING, "seed": 4}),
        replace(model, scores={}),
        replace(model, adapt=Adapt()),
        replace(model, adapt=Adapt(radius=2)),
    ]
    assert len({m.digest for m in [model, *others]}) == 9
    assert small().digest == model.digest


@pytest.mark.parametrize("wrong", [7, ["liver"], {"liver": -1}, {"liver": "3"}, {"liver": True}])
def test_how_large_whole_organs_are_must_be_numbers(wrong: Any) -> None:
    model = small()
    assert model.whole_ml == {}
    known = replace(model, training={**model.training, "whole_ml": {"liver": 900}})
    assert known.whole_ml == {"liver": 900.0}
    with pytest.raises(ValueError, match="how large whole organs are"):
        replace(model, training={**model.training, "whole_ml": wrong})


def test_how_it_adapts_comes_back_and_is_not_in_the_file_of_a_model_that_does_not(
    tmp_path: Path,
) -> None:
    model = replace(small(), adapt=Adapt(core=0.8, least_core=7, radius=2, edge_hu=30))
    save_model(model, tmp_path / "m.organfast")
    back = load_model(tmp_path / "m.organfast")
    assert back.adapt == model.adapt
    assert back.digest == model.digest
    # A model that does not has the bytes, and the digest, of before there was any adapting.
    header, arrays = parts(small_bytes())
    assert "adapt" not in header
    path = tmp_path / "null.organfast"
    path.write_bytes(joined({**header, "adapt": None}, arrays))
    assert load_model(path).digest == small().digest


def test_a_model_of_before_organs_were_weighed_up_goes_on_without(tmp_path: Path) -> None:
    model = replace(small(), adapt=Adapt(expected_dice=False))
    save_model(model, tmp_path / "m.organfast")
    header, arrays = parts((tmp_path / "m.organfast").read_bytes())
    assert "atlas" not in header["adapt"]  # the digest of before there was any
    del header["adapt"]["expected_dice"]
    (tmp_path / "old.organfast").write_bytes(joined(header, arrays))
    assert load_model(tmp_path / "old.organfast").adapt == model.adapt


def with_atlas() -> Model:
    shares = np.zeros((len(CLASSES.organs), 6, 5, 4), np.uint8)
    shares[0, 1:3, 2:, :2] = 7
    shares[2, 5, 4, 3] = 255
    return replace(small(), adapt=Adapt(), atlas=Atlas(shares))


def test_an_atlas_comes_back_and_is_part_of_what_a_model_is(tmp_path: Path) -> None:
    model, path = with_atlas(), tmp_path / "m.organfast"
    assert model.atlas is not None
    save_model(model, path)
    back = load_model(path)
    assert back.atlas is not None
    np.testing.assert_array_equal(back.atlas.shares, model.atlas.shares)
    assert back.digest == model.digest
    brighter = replace(model, atlas=Atlas(model.atlas.shares // 2))
    assert len({model.digest, brighter.digest, replace(model, atlas=None).digest}) == 3
    header, _ = parts(small_bytes())
    assert "atlas" not in header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atlas": None}, "its atlas is there by half"),
        ({"atlas": {"shape": [3, 6, 5, 4]}}, "atlas is missing, or not"),
        ({"atlas": {"shape": [2, 6, 5, 4], "boxes": [[[0, 1]] * 3] * 2}}, "more than its boxes"),
        ({"atlas": {"shape": [3, 6, 5, 4], "boxes": [[[0, 6]] * 3] * 3}}, "beyond the atlas"),
        ({"atlas": {"shape": [1, 6, 5, 4], "boxes": [[[1, 2]] * 3]}}, "holds more than"),
        ({"atlas": {"shape": [1, 6, 5, 4], "boxes": [[[1, 3], [2, 5], [0, 2]]]}}, "more than its"),
    ],
)
def test_a_tampered_atlas_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.organfast"
    save_model(with_atlas(), path)
    header, arrays = parts(path.read_bytes())
    path.write_bytes(joined({**header, **change}, arrays))
    with pytest.raises(InputError, match=message):
        load_model(path)


def test_an_atlas_of_other_numbers_or_without_any_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.organfast"
    save_model(with_atlas(), path)
    header, arrays = parts(path.read_bytes())
    atlas = arrays.pop("atlas")
    for other in (None, atlas.astype(np.float32), atlas[:-1], atlas.reshape(1, -1)):
        held = arrays if other is None else {**arrays, "atlas": other}
        path.write_bytes(joined(header, held))
        with pytest.raises(InputError, match="atlas"):
            load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected_dice": 1}, "adapt is missing, or not"),
        ({"atlas": None}, "adapt is missing, or not"),
        ({"radius": 99}, "radius is 99"),
        ({"radius": True}, "adapt is missing, or not"),
        ({"edge_hu": "20"}, "adapt is missing, or not"),
        ({"edge_hu": -1}, "edge_hu is -1"),
        ({"own_hu": 1}, "adapt is missing, or not"),
        ({"core": None}, "adapt is missing, or not"),
        ({"core": float("nan")}, "is not an organfast model"),
        ({"novelty": 1}, "adapt is missing, or not"),
    ],
)
def test_a_tampered_way_to_adapt_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    header, arrays = parts(small_bytes())
    usual = asdict(Adapt())
    path = tmp_path / "m.organfast"
    path.write_bytes(joined({**header, "adapt": {**usual, **change}}, arrays))
    with pytest.raises(InputError, match=message):
        load_model(path)


@pytest.mark.parametrize("given", [[], 1, {}, {"radius": 1}])
def test_what_is_no_way_to_adapt_is_refused(given: Any, tmp_path: Path) -> None:
    header, arrays = parts(small_bytes())
    (tmp_path / "m.organfast").write_bytes(joined({**header, "adapt": given}, arrays))
    with pytest.raises(InputError, match="adapt"):
        load_model(tmp_path / "m.organfast")


def test_a_forest_without_mixed_leaves_comes_back(tmp_path: Path) -> None:
    model = replace(small(), classifier=grown(3, 0, 0))
    save_model(model, tmp_path / "m.organfast")
    back = load_model(tmp_path / "m.organfast")
    assert back.digest == model.digest
    use(back)


def test_an_unwritable_place_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "m.organfast", tmp_path):
        with pytest.raises(InputError, match="cannot be written") as error:
            save_model(small(), path)
        assert error.value.path == str(path)
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob(".organfast-*"))


def test_loading_and_asking_a_model_needs_no_scikit_learn(tmp_path: Path) -> None:
    (tmp_path / "m.organfast").write_bytes(small_bytes())
    code = """
import sys
sys.modules["sklearn"] = None
import numpy as np
from organfast.models.classifier import load_model
model = load_model(sys.argv[1])
out = np.empty((1, model.classifier.n_classes))
model.classifier.probabilities(np.zeros((2, 1, 13, 13), np.int16), np.array([[0, 6, 6]], "i4"), out)
heavy = {"scipy", "numba", "nibabel", "matplotlib", "jax"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    run = [sys.executable, "-c", code, str(tmp_path / "m.organfast")]
    assert subprocess.run(run, capture_output=True, text=True, check=True).returncode == 0


def test_a_hundred_unlimited_trees_load_well_under_a_second(tmp_path: Path) -> None:
    one = grown(1, 4130, 200)
    forest = Forest(
        np.tile(one.nodes, 100),
        np.arange(101, dtype=np.int64) * len(one.nodes),
        one.leaf_table,
        one.offsets,
        N_CLASSES,
    )
    save_model(replace(small(), classifier=forest), tmp_path / "m.organfast")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_model(tmp_path / "m.organfast")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


# --- parts that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ClassTable.default()}, "tells 4 classes apart, the class table has 23"),
        ({"pattern": Block(5, (1, 5))}, "other voxels"),
        ({"adapt": Adapt(), "grid": ModelGrid()}, "adapting to a scan needs"),
        (
            {"atlas": Atlas(np.ones((2, 3, 3, 3), np.uint8))},
            "shows 2 organs, the class table has 3",
        ),
        ({"stride": (1, 4)}, r"stride is \(1, 4\)"),
        ({"stride": (0, 4, 4)}, r"stride is \(0, 4, 4\)"),
        ({"stride": (1, 4.5, 4)}, r"stride is \(1, 4.5, 4\)"),
        ({"training": {}}, "training.cases is missing"),
        ({"training": {**TRAINING, "spacing_mm": [0, 1, 1]}}, "spacing_mm"),
        ({"training": {**TRAINING, "more": {1, 2}}}, "must be for JSON"),
        ({"scores": {"test": {**SCORE, "block_accuracy": float("nan")}}}, "must be for JSON"),
        ({"scores": {"test": {**SCORE, "block_accuracy": None}}}, "test.block_accuracy is"),
        ({"scores": {"test": {"n_patients": 1}}}, "test.n_blocks is missing"),
        ({"versions": {"numpy": 2}}, "versions.numpy is"),
    ],
)
def test_parts_that_do_not_fit_make_no_model(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small(), **change)


# --- files that are no model ----------------------------------------------------------------------


def test_files_that_are_no_model_are_named(tmp_path: Path) -> None:
    other = save({"a": np.zeros(3)}, {"format": "pt"})
    for name, content in {
        "empty": b"",
        "short": b"\x10\0\0",
        "text": b"class,name\n0,background\n" * 50,
        "gzip": b"\x1f\x8b\x08\0" + bytes(400),
        "pickle": b"\x80\x04\x95\x10" + bytes(400),
        "safetensors": other,
        "bare safetensors": save({"a": np.zeros(3)}),
        "header alone": small_bytes()[:8],
        "no JSON": joined("{", {"a": np.zeros(1)}),
        "no object": joined("[]", {"a": np.zeros(1)}),
        "deep": joined("[" * 100_000, {"a": np.zeros(1)}),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not an organfast model") as error:
            load_model(path)
        assert error.value.path == str(path)
    for path, problem in ((tmp_path / "absent", "cannot be read"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=problem):
            load_model(path)


def test_a_newer_schema_is_said_to_be_newer(tmp_path: Path) -> None:
    header, arrays = parts(small_bytes())
    path = tmp_path / "m.organfast"
    path.write_bytes(joined({**header, "schema": 2, "novelty": {}}, arrays))
    with pytest.raises(InputError, match=r"newer organfast.*update organfast"):
        load_model(path)


def test_more_classes_than_can_be_are_refused_at_once(tmp_path: Path) -> None:
    header, arrays = parts(small_bytes())
    row = header["classes"][1]
    rows = [{**row, "name": f"s{n}"} for n in range(MAX_CLASSES)]
    path = tmp_path / "m.organfast"
    path.write_bytes(joined({**header, "classes": [header["classes"][0], *rows]}, arrays))
    with pytest.raises(InputError, match="4097 classes"):
        load_model(path)


# --- tampered forests -----------------------------------------------------------------------------

Tamper = Callable[[dict[str, np.ndarray]], None]


def put(name: str, index: Any, value: Any) -> Tamper:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][index] = value

    return change


def share_a_pair(arrays: dict[str, np.ndarray]) -> None:
    """Two parents for one pair, none for another."""
    inner = np.flatnonzero(arrays["left"][:31] > 0)
    arrays["left"][inner[0]] = arrays["left"][inner[1]]


def reach_back(arrays: dict[str, np.ndarray]) -> None:
    """A node and one of its descendants change pairs: a circle apart from the root."""
    left = arrays["left"]
    parent = next(n for n in range(1, 31) if left[n] > 0 and left[left[n]] > 0)
    below = left[parent]
    left[parent], left[below] = left[below], left[parent]


def inner_of(name: str, value: int) -> Tamper:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][np.flatnonzero(arrays["left"] > 0)[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("left", 0, 31), "outside its tree"),
        (put("left", 0, 2**31 - 1), "outside its tree"),
        (put("left", 0, 2), "outside its tree"),
        (put("left", 0, 0), "before its parent"),
        (share_a_pair, "no parent, or two"),
        (reach_back, "before its parent"),
        (put("left", 0, ~0), "no parent, or two"),
        (put("left", 30, ~(N_CLASSES + 5)), "not in the leaf table"),
        (put("left", 30, -(2**31)), "not in the leaf table"),
        (inner_of("feature", 50), "reads feature 50 of 50"),
        (inner_of("feature", 65535), "reads feature 65535 of 50"),
        (put("feature", 30, 50), "reads feature 50 of 50"),  # of a leaf: it is read, if not used
        (put("leaf_table", (0, 0), np.nan), "no probabilities"),
        (put("leaf_table", (0, 0), np.inf), "no probabilities"),
        (put("leaf_table", 2, [-0.5, 0.5, 0.5, 0.5]), "no probabilities"),
        (put("leaf_table", 1, [0.5, 0.5, 0.5, 0.5]), "does not sum to 1"),
        (put("tree_starts", 0, 1), "do not cover"),
        (put("tree_starts", -1, 200), "do not cover"),
        (put("tree_starts", 1, 62), "no node"),
        (put("tree_starts", 1, -(2**63)), "no node"),
        (put("tree_starts", 1, 2**63 - 1), "no node"),
        (put("tree_starts", 1, 33), "before its parent"),
        (lambda a: a.update(left=a["left"][:-1]), "differ in number"),
        (lambda a: a.update(left=a["left"].astype(np.int64)), "left is 1-D int64"),
        (lambda a: a.update(feature=a["feature"].reshape(2, -1)), "feature is 2-D uint16"),
        (lambda a: a.update(leaf_table=a["leaf_table"][:, :-1]), "3 classes, not 4"),
        (lambda a: a.update(tree_starts=a["tree_starts"][:1]), "do not cover"),
        (lambda a: a.update(tree_starts=a["tree_starts"][:0]), "do not cover"),
        (lambda a: a.pop("feature"), "holds the arrays leaf_table, left"),
        (lambda a: a.update(more=np.zeros(2)), "holds the arrays"),
        (lambda a: a.update({k: a[k][:0] for k in ("threshold", "feature", "left")}), "not cover"),
    ],
)
def test_a_tampered_forest_is_refused(change: Tamper, message: str, tmp_path: Path) -> None:
    header, arrays = parts(small_bytes())
    change(arrays)
    path = tmp_path / "m.organfast"
    path.write_bytes(joined(header, arrays))
    with pytest.raises(InputError, match=f"is not a valid model: .*({message})"):
        load_model(path)


def test_changed_numbers_of_a_forest_never_crash(tmp_path: Path) -> None:
    header, untouched = parts(small_bytes())
    rng = np.random.default_rng(0)
    loaded = 0
    for n in range(300):
        arrays = {name: array.copy() for name, array in untouched.items()}
        array = arrays[list(arrays)[n % len(arrays)]]
        for _ in range(rng.integers(1, 4)):
            raw = array.reshape(-1).view(np.uint8)
            raw[rng.integers(raw.size)] = rng.integers(256)
        loaded += loads_or_says_why(joined(header, arrays), tmp_path / "m.organfast")
    assert 30 < loaded < 270  # thresholds may be anything


def test_changed_bytes_of_a_file_never_crash(tmp_path: Path) -> None:
    content = small_bytes()
    rng = np.random.default_rng(1)
    header_ends = 8 + int.from_bytes(content[:8], "little")
    for n in range(500):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            changed[rng.integers(header_ends if n % 2 else len(content))] = rng.integers(256)
        if n % 5 == 0:
            changed = changed[: rng.integers(len(content))]
        if n % 5 == 1:
            changed += rng.bytes(rng.integers(1, 40))
        loads_or_says_why(bytes(changed), tmp_path / "m.organfast")


JUNK = (
    *(
        None,
        True,
        -1,
        0,
        3,
        2**31,
        2**63,
        10**400,
        0.5,
        -1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
    ),
    *("\ud800", "\x1b[2J\n", "é" * 5000, [], [[]], [1, "a"], [None], {}, {"": 0}, {"x": {"y": []}}),
    *(
        ["block"],
        "block",
        [1, 1, 1],
        [0, 0, 0],
        [10**9] * 3,
        [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]],
    ),
)


def places_in(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from places_in(item, (*here, key))


def test_a_changed_header_never_crashes(tmp_path: Path) -> None:
    """At each place each kind of junk, then the place removed."""
    header, arrays = parts(small_bytes())
    n = loaded = 0
    for place in places_in(header):
        # One class row stands for the others.
        if place[:1] == ("classes",) and place[1:2] not in ((), (1,)):
            continue
        for junk in (*JUNK, KeyError):
            changed = copy.deepcopy(header)
            inside = changed
            for key in place[:-1]:
                inside = inside[key]
            if not place:
                changed = None if junk is KeyError else junk
            elif junk is KeyError:
                del inside[place[-1]]
            else:
                inside[place[-1]] = junk
            loaded += loads_or_says_why(
                joined(json.dumps(changed), arrays), tmp_path / "m.organfast"
            )
            n += 1
    assert 0 < loaded < n / 3
