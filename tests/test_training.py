"""Training of networks: blocks on the device, batches, steps, stopping, checkpoints, devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from organfast.anatomy import ClassTable
from organfast.augmentation import mirror_partners
from organfast.blocks import Block, Context
from organfast.errors import InputError
from organfast.grid import GridVolume, hu_lookup
from organfast.models.block_augmentation import (
    BlockAugmentation,
    Draws,
    _along,
    _normal,
    _ramps,
    altered,
    draw,
    mirrored_labels,
    turns,
)
from organfast.models.device_volumes import DeviceVolumes, Room, blocks_at
from organfast.models.examples import Examples, TrainingCase, TrainingData, drawn
from organfast.models.training import (
    NetworkPlan,
    Trained,
    TrainingOutputs,
    TrainingSettings,
    train_network,
)
from organfast.progress import silent
from organfast.sampling import features_at, slabs_at

HERE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
OFF = BlockAugmentation.off()
EVERYTHING = BlockAugmentation(5, 0.1, 10, 0.05, 20, 0.5, 0.5)
BLOCK = Block(9)
PLAN = NetworkPlan("towers", BLOCK, (-400.0, 400.0))
QUICK = TrainingSettings(
    steps=20, batch=32, learning_rate=5e-3, evaluate_every=5, augmentation=None
)


@pytest.fixture(autouse=True)
def _strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """All but the optimiser: optax raises a float to the power of an integer."""
    trains = "painted" in request.fixturenames
    with jax.numpy_dtype_promotion("standard" if trains else "strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _short_compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs are kept for the next test, and XLA does not think long about them."""
    wanted: dict[str, tuple[Any, Any]] = {  # here, and elsewhere
        "jax_compilation_cache_dir": (str(tmp_path_factory.mktemp("jax")), None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_disable_most_optimizations": (True, False),
    }
    for name, (here, _) in wanted.items():
        jax.config.update(name, here)
    yield
    for name, (_, elsewhere) in wanted.items():
        jax.config.update(name, elsewhere)


def _noise(shape: tuple[int, int, int], seed: int, table: str = "piecewise") -> GridVolume:
    """A scan that does not repeat itself, its table still to be applied, in an odd memory order."""
    random = np.random.default_rng(seed)
    hu = random.integers(-1100, 3000, shape[::-1]).astype(np.int16).transpose(2, 1, 0)
    return GridVolume(hu, table=hu_lookup(table), hu_table=table)


def _positions(volume: GridVolume, n: int, seed: int) -> np.ndarray:
    """Random positions, two corners among them."""
    inside = np.random.default_rng(seed).integers(0, volume.shape, (n, 3))
    corners = np.array([[0, 0, 0], np.array(volume.shape) - 1])
    return np.concatenate([corners, inside]).astype(np.int32)


# --- blocks on the device -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [Block(9), Block(17, (1, 3, 7), 3), Block(5, (8,), 5), Block(3, (127,)), Block(33)]
)
def test_blocks_of_the_device_equal_those_of_the_host(block: Block) -> None:
    volumes = [_noise((12, 40, 40), 0), _noise((2, 33, 51), 1), _noise((1, 1, 1), 2)]
    on_device = DeviceVolumes.of(volumes, block, HERE)
    where = [_positions(volume, 20, 3) for volume in volumes]
    cases = np.repeat(np.arange(3, dtype=np.int32), 22)
    found = jax.jit(blocks_at)(on_device, cases, np.concatenate(where))
    assert found.dtype == np.int16
    expected = [features_at(v, block, p) for v, p in zip(volumes, where, strict=True)]
    np.testing.assert_array_equal(np.asarray(found).reshape(66, -1), np.concatenate(expected))


@dataclass(frozen=True)
class _Turned:
    """A block's levels, read at other offsets."""

    block: Block
    offsets: np.ndarray

    widths = property(lambda self: self.block.widths)
    depths = property(lambda self: self.block.depths)
    n_features = property(lambda self: len(self.offsets))
    reach = property(lambda self: tuple(int(most) for most in abs(self.offsets[:, 1:]).max(0)))


@pytest.mark.parametrize("turn", ["mirrored", "longer", "turned"])
def test_turned_blocks_are_read_at_turned_offsets(turn: str) -> None:
    block, volume = Block(9, (1, 3), 3), _noise((6, 30, 35), 4)
    cos, sin = np.cos(0.41), np.sin(0.41)
    given = {
        "mirrored": np.array([1, -1]),
        "longer": np.array([1.137, -1.137]),
        "turned": 0.92 * np.array([[cos, -sin], [sin, cos]]),
    }[turn]
    offsets = block.offsets.copy()
    offsets[:, 2:] = np.rint(offsets[:, 2:] @ (np.diag(given) if given.ndim == 1 else given).T)
    positions = _positions(volume, 8, 5)
    expected = features_at(volume, _Turned(block, offsets), positions)
    on_device = DeviceVolumes.of([volume], block, HERE)
    of_all = np.repeat(given[None].astype(np.float32), 10, 0)
    found = jax.jit(blocks_at)(on_device, np.zeros(10, np.int32), positions, of_all)
    np.testing.assert_array_equal(np.asarray(found).reshape(10, -1), expected)
    if turn == "mirrored":
        plain = jax.jit(blocks_at)(on_device, np.zeros(10, np.int32), positions)
        np.testing.assert_array_equal(found, plain[..., ::-1])


def test_a_scan_given_twice_is_held_once() -> None:
    volume = _noise((3, 20, 20), 0)
    once = DeviceVolumes.of([volume], BLOCK, HERE)
    twice = DeviceVolumes.of([volume, replace(volume)], BLOCK, HERE)
    assert once.buffer.size == twice.buffer.size
    np.testing.assert_array_equal(twice.places[0], twice.places[1])
    assert once.buffer.nbytes == DeviceVolumes.n_bytes([volume.shape], BLOCK)


def test_scans_that_do_not_fit_are_refused_in_words() -> None:
    volume = _noise((3, 20, 20), 0)
    needed = DeviceVolumes.n_bytes([volume.shape], BLOCK) / 2**30
    DeviceVolumes.of([volume], BLOCK, HERE, Room(needed))
    with pytest.raises(ValueError, match=r"GiB on each device.*allow more \(max_memory_gb\)"):
        DeviceVolumes.of([volume], BLOCK, HERE, Room(0.99 * needed))
    with pytest.raises(ValueError, match="no scan"):
        DeviceVolumes.of([], BLOCK, HERE)
    with pytest.raises(ValueError, match=r"is a context.*give a Block"):
        DeviceVolumes.of([volume], Context(), HERE)
    with pytest.raises(ValueError, match=r"more than 2\^31"):
        DeviceVolumes.n_bytes([(2**11, 2**10, 2**10)], BLOCK)
    with pytest.raises(ValueError, match="max_memory_gb is 0"):
        Room(0)


def test_many_scans_count_further_than_int32() -> None:
    shapes = [(300, 512, 512)] * 40
    assert DeviceVolumes.n_bytes(shapes, Block(33)) > 2 * 40 * 300 * 512 * 512 > 2**32


# --- blocks altered -------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["identity", "piecewise"])
def test_hu_and_units_follow_the_table(table: str) -> None:
    hu = np.arange(-1024, 15_600)
    units = hu_lookup(table)[hu + 32768].astype(np.float32)
    hu_of, unit_of = _ramps(table)
    np.testing.assert_allclose(_along(hu_of, jnp.asarray(units)), hu, atol=2e-3)
    np.testing.assert_allclose(_along(unit_of, jnp.asarray(hu, jnp.float32)), units, atol=2e-3)


def _draws(n: int, **given: float) -> Draws:
    """Of n examples, nothing but what is given."""
    nothing = draw(jax.random.key(0), OFF, -jnp.ones(n, jnp.int32))
    values = {name: jnp.full(n, value, jnp.float32) for name, value in given.items()}
    return replace(nothing, **values)


def test_what_is_off_leaves_blocks_alone() -> None:
    blocks = jax.random.normal(jax.random.key(1), (4, 2, 1, 9, 9))
    nothing = draw(jax.random.key(0), OFF, jnp.arange(4))
    assert altered(blocks, nothing, OFF, (1, 3), "piecewise") is blocks
    assert turns(nothing, OFF) is None
    np.testing.assert_array_equal(
        mirrored_labels(nothing, jnp.arange(4), jnp.full(4, -1)), range(4)
    )


@pytest.mark.parametrize("table", ["identity", "piecewise"])
def test_tissue_is_shifted_in_hu_and_gas_stays(table: str) -> None:
    hu = np.array([-1024, -1000, -900, -300, -100, 0, 60, 239, 241, 1000])
    units = hu_lookup(table)[hu + 32768].astype(np.float32)
    blocks = jnp.asarray(np.broadcast_to(units[:, None, None, None, None], (10, 1, 1, 3, 3)))
    found = altered(blocks, _draws(10, shift=8, gain=0.05), replace(OFF, gain=0.1), (1,), table)
    tissue = np.clip((hu + 1000) / 200, 0, 1)
    expected = hu + tissue * (8 + 0.05 * np.maximum(hu, -150))
    back = _along(_ramps(table)[0], found[:, 0, 0, 1, 1])
    np.testing.assert_allclose(back, expected, atol=5e-3)


def test_noise_is_as_strong_as_drawn_and_weaker_in_averages() -> None:
    blocks = jnp.zeros((3, 2, 1, 65, 65))
    draws = replace(_draws(3), noise=jnp.array([0.0, 10.0, 20.0]))
    found = altered(blocks, draws, replace(OFF, noise_hu=20), (1, 4), "identity")
    deviation = np.asarray(found).std(axis=(2, 3, 4))
    np.testing.assert_allclose(deviation, [[0, 0], [10, 2.5], [20, 5]], rtol=0.05)
    normal = np.asarray(_normal(jax.random.key(2), (100_000,)))
    np.testing.assert_allclose(normal.mean(), 0, atol=0.015)
    np.testing.assert_allclose(normal.std(), 1, atol=0.01)


def test_blur_is_a_short_kernel_along_rows_and_columns() -> None:
    blocks = np.random.default_rng(0).normal(0, 100, (2, 2, 3, 7, 7)).astype(np.float32)
    draws = replace(_draws(2), blur=jnp.array([0.6, 0.3]))
    found = altered(jnp.asarray(blocks), draws, replace(OFF, blur=0.7), (1, 3), "identity")
    for example, blur in enumerate((0.6, 0.3)):
        for level, width in enumerate((1, 3)):
            share = (blur / width) ** 2 / 2
            taps, expected = [share, 1 - 2 * share, share], blocks[example, level]
            for axis in (1, 2):
                expected = correlate1d(expected, taps, axis, mode="nearest")
            np.testing.assert_allclose(found[example, level], expected, atol=1e-3)


def test_mirroring_exchanges_the_sides_or_does_not_happen() -> None:
    labels = jnp.arange(6) % 3
    partners = jnp.array([1, 0, -1])[labels]  # 0 and 1 are a pair, 2 has lost its partner
    how = replace(OFF, mirror=1.0)
    draws = draw(jax.random.key(0), how, partners)
    np.testing.assert_array_equal(draws.mirrored, partners >= 0)
    np.testing.assert_array_equal(mirrored_labels(draws, labels, partners), [1, 0, 2, 1, 0, 2])
    along = turns(draws, how)
    assert along is not None
    np.testing.assert_array_equal(along, [[1, -1], [1, -1], [1, 1]] * 2)
    both = turns(draws, replace(how, rotation_deg=5.0))
    assert both is not None
    np.testing.assert_array_equal(both[0], [[1, 0], [0, -1]])


def test_draws_keep_to_their_ranges_and_options_to_themselves() -> None:
    draws = draw(jax.random.key(3), EVERYTHING, jnp.zeros(4000, jnp.int32))
    assert float(abs(draws.angle).max()) <= np.deg2rad(10) + 1e-6
    for drawn_ones, low, high in (
        (draws.factor, 0.9, 1.1),
        (draws.shift, -10, 10),
        (draws.gain, -0.05, 0.05),
        (draws.noise, 0, 20),
        (draws.blur, 0, 0.5),
    ):
        lowest, highest = float(drawn_ones.min()), float(drawn_ones.max())
        assert low <= lowest < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < highest <= high
    np.testing.assert_allclose(draws.mirrored.mean(), 0.5, atol=0.04)
    alone = draw(jax.random.key(3), replace(OFF, shift_hu=10), jnp.zeros(4000, jnp.int32))
    np.testing.assert_array_equal(alone.shift, draws.shift)


def test_partners_of_labels() -> None:
    table = ClassTable.default()
    beside = ["rib_left_1", "rib_right_1", "hip_left", "stomach", "heart_atrium_left"]
    partners = np.array(mirror_partners(table, beside))
    assert [table.names[p] for p in partners[[10, 11, 3, 0]]] == [
        *("lung_left", "lung_right", "liver", "background"),
    ]
    np.testing.assert_array_equal(partners[23:], [24, 23, -1, 26, 27])
    lonely = table.keep(["kidney_left", "liver"])
    np.testing.assert_array_equal(mirror_partners(lonely), [0, 1, -1])


def test_alterations_out_of_range_are_refused() -> None:
    for name, value in (("scale", 0.6), ("mirror", -0.1), ("blur", True), ("noise_hu", "much")):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; give 0 to"):
            replace(OFF, **{name: value})


# --- batches --------------------------------------------------------------------------------------


def _case(patient: str, labels: list[int], seed: int = 0) -> TrainingCase:
    volume = _noise((3, 12, 12), seed)
    positions = np.random.default_rng(seed).integers(0, volume.shape, (len(labels), 3))
    return TrainingCase(patient, volume, positions, np.array(labels, int))


def test_batches_are_balanced_over_classes_and_patients() -> None:
    cases = [
        _case("a", [0] * 90 + [1] * 3, 1),
        _case("b", [0] * 5 + [2] * 7 + [3] * 7, 2),
        _case("a", [1] * 2 + [4] * 9, 3),
    ]
    data = TrainingData(cases, [], 4, np.array([0, 1, 2, 2, 3]), [3, 1, 1, 0])
    examples = Examples.of(data)
    batch_of = jax.jit(lambda key: drawn(key, 60, examples))
    picked = np.concatenate([batch_of(jax.random.key(n)) for n in range(200)])
    labels, of_case = examples.labels[picked], examples.cases[picked]
    for batch in labels.reshape(200, 60):
        counts = np.bincount(data.class_of[batch], minlength=4)
        np.testing.assert_array_equal(counts, [36, 12, 12, 0])
    of_class_0 = of_case[labels == 0]
    np.testing.assert_allclose((of_class_0 == 0).mean(), 0.5, atol=0.01)  # 90 of a, 5 of b
    np.testing.assert_allclose((of_case[labels == 1] == 0).mean(), 0.6, atol=0.05)  # both are a's
    np.testing.assert_allclose((labels[np.isin(labels, (2, 3))] == 2).mean(), 0.5, atol=0.05)
    assert len(np.unique(picked)) == 90 + 3 + 5 + 14 + 2  # every position, but of class 3
    for n, case in enumerate(cases):
        rows = (examples.cases == n) & (examples.labels != 4)
        have = {(*p, y) for p, y in zip(case.positions.tolist(), case.labels, strict=True)}
        kept = zip(examples.positions[rows].tolist(), examples.labels[rows], strict=True)
        assert {(*p, y) for p, y in kept} <= have


def test_positions_that_are_drawn_alike_are_so_whoever_they_are_of() -> None:
    """Each class by its weight, and within it every position as often: counted."""
    cases = [_case("a", [0] * 90 + [1] * 4, 1), _case("b", [0] * 10 + [1] * 36 + [2] * 5, 2)]
    data = TrainingData(cases, [], 3, class_weights=[100, 40, 5], patients_alike=False)
    examples = Examples.of(data)
    batch_of = jax.jit(lambda key: drawn(key, 145, examples))
    picked = np.concatenate([batch_of(jax.random.key(n)) for n in range(300)])
    assert len(np.unique(picked)) == 145
    times = np.bincount(picked, minlength=145) / 300
    np.testing.assert_allclose(times, 1, atol=0.35)  # 5 deviations of a mean of 300
    for label, n in enumerate((100, 40, 5)):
        np.testing.assert_allclose(times[examples.labels == label].sum(), n, atol=1e-9)
    of_a = (examples.cases == 0) & (examples.labels == 1)
    np.testing.assert_allclose(times[of_a].sum(), 4, atol=0.3)  # and 20 if patients were alike
    alike = replace(data, patients_alike=True)
    assert alike.digest() != data.digest()
    assert float(Examples.of(alike).edges[0]) == pytest.approx(50 / 145)
    assert float(examples.edges[0]) == pytest.approx(90 / 145)


def test_what_cannot_be_learned_from_is_refused() -> None:
    case, other = _case("a", [0, 1]), _case("b", [1])
    for problem, given in (
        ("both trains and validates", {"validation": [case]}),
        ("no position to train on", {"train": [_case("a", [])]}),
        ("labels of a are 0 to 1; give 0 to 0", {"n_classes": 1}),
        ("merge leads to classes", {"merge": np.array([0, 2])}),
        ("class_weights is", {"class_weights": [1]}),
        ("class_weights is", {"class_weights": [0, 0]}),
        ("partners do not come in pairs", {"partners": [1, 1]}),
        ("partners are", {"partners": [1]}),
        (
            "different HU tables",
            {"validation": [replace(other, grid_volume=_noise((3, 12, 12), 0, "identity"))]},
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            TrainingData(**{"train": [case], "validation": [other], "n_classes": 2, **given})
    with pytest.raises(ValueError, match="outside the scan of a"):
        replace(case, positions=np.array([[0, 0, 0], [3, 0, 0]]))
    with pytest.raises(ValueError, match=r"give \(n, 3\)"):
        replace(case, labels=np.array([1]))
    with pytest.raises(ValueError, match="give integers"):
        replace(case, labels=np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="no class with a weight"):
        Examples.of(TrainingData([other], [], 2, None, [1, 0]))


# --- training -------------------------------------------------------------------------------------


def _painted(patient: str, seed: int, n: int = 60) -> TrainingCase:
    """Four tissues in noise: two HU, each plain or striped; a single voxel does not tell them."""
    random = np.random.default_rng(seed)
    tissue = random.integers(0, 4, (3, 4, 4)).repeat(4, 0).repeat(10, 1).repeat(10, 2)
    stripes = 150 * (np.arange(40) % 4 < 2) - 75
    hu = np.where(tissue % 2, 80, 0) + np.where(tissue < 2, 0, stripes)
    hu = np.rint(hu + random.normal(0, 40, tissue.shape)).astype(np.int16)
    positions = random.integers(0, tissue.shape, (4 * n, 3))
    positions[:, 1:] = positions[:, 1:] // 10 * 10 + random.integers(3, 7, (4 * n, 2))
    return TrainingCase(patient, GridVolume(hu), positions, tissue[tuple(positions.T)])


@pytest.fixture(scope="module")
def painted() -> TrainingData:
    return TrainingData([_painted("a", 0), _painted("b", 1)], [_painted("c", 2)], 4)


def _accuracy(trained: Trained, case: TrainingCase, label: int | None = None) -> float:
    """Share of right classes as the classifier tells them from slabs: not as training judges."""
    chosen = np.ones(len(case.labels), bool) if label is None else case.labels == label
    found = np.empty((len(chosen), trained.classifier.n_classes), np.float32)
    for rows, slab, local in slabs_at(case.grid_volume, BLOCK, case.positions.astype(np.int32)):
        part = np.empty((len(rows), found.shape[1]), np.float32)
        trained.classifier.probabilities(slab, local, part)
        found[rows] = part
    return float((found.argmax(axis=1) == case.labels)[chosen].mean())


def test_a_small_network_learns_what_was_painted(painted: TrainingData) -> None:
    settings = replace(QUICK, steps=150, evaluate_every=50)
    trained = train_network(painted, PLAN, settings)
    assert _accuracy(trained, _painted("d", 9)) > 0.9
    of_classes = [_accuracy(trained, painted.validation[0], label) for label in range(4)]
    np.testing.assert_allclose(
        trained.record["validation_accuracy"], np.mean(of_classes), atol=1e-6
    )
    json.dumps(trained.record)


def test_same_seed_same_weights(painted: TrainingData) -> None:
    first, again, other = (
        train_network(painted, PLAN, replace(QUICK, seed=seed)).classifier.params
        for seed in (1, 1, 2)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert any((first[name] != other[name]).any() for name in first)


class _Killed(Exception):
    pass


def _kill_at(step: int) -> Any:
    def progress(what: str, done: int, total: int) -> None:
        if done >= step:
            raise _Killed

    return progress


def test_a_killed_run_goes_on_bit_for_bit(painted: TrainingData, tmp_path: Path) -> None:
    settings = replace(QUICK, steps=24)
    whole = train_network(painted, PLAN, settings)
    outputs = TrainingOutputs(tmp_path / "kept", 6, tmp_path / "log.jsonl")
    with pytest.raises(_Killed):
        train_network(painted, PLAN, settings, outputs=outputs, progress=_kill_at(15))
    steps = [json.loads(line)["step"] for line in outputs.log.read_text().splitlines()]
    assert steps == [5, 10, 15]
    with outputs.log.open("a") as log:
        log.write('{"step": 2')  # cut off, as it was written
    seen: list[int] = []
    resumed = train_network(
        painted, PLAN, settings, outputs=outputs, progress=lambda what, done, n: seen.append(done)
    )
    assert seen[0] == 12
    assert resumed.record == whole.record
    for name, array in whole.classifier.params.items():
        np.testing.assert_array_equal(resumed.classifier.params[name], array)
    lines = [json.loads(line) for line in outputs.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 24]
    assert lines[-1].keys() == {
        *("step", "loss", "learning_rate", "blocks_per_second"),
        *("validation_accuracy", "validation_loss"),
    }
    done = train_network(painted, PLAN, settings, outputs=outputs)  # nothing is left to do
    assert done.record == whole.record
    for other, name in (
        (replace(settings, learning_rate=1e-3), r"settings\.learning_rate"),
        (replace(settings, augmentation=OFF), r"settings\.augmentation"),
    ):
        with pytest.raises(InputError, match=f"another training, which differs in {name}"):
            train_network(painted, PLAN, other, outputs=outputs)
    reversed_data = replace(painted, train=painted.train[::-1])
    with pytest.raises(InputError, match="differs in data"):
        train_network(reversed_data, PLAN, settings, outputs=outputs)


def test_a_folder_of_something_else_is_left_alone(painted: TrainingData, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no checkpoints"):
        train_network(painted, PLAN, QUICK, outputs=TrainingOutputs(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(InputError, match=r"training\.json cannot be read"):
        train_network(painted, PLAN, QUICK, outputs=TrainingOutputs(tmp_path))


def test_training_stops_when_nothing_gets_better_and_keeps_the_best(painted: TrainingData) -> None:
    entries: list[Any] = []
    settings = replace(QUICK, steps=400, learning_rate=0.3, patience=3)
    trained = train_network(painted, PLAN, settings, outputs=TrainingOutputs(report=entries.append))
    judged = [entry for entry in entries if "validation_accuracy" in entry]
    assert trained.record["n_steps"] < 400
    assert "early: 3 evaluations" in trained.record["stopped"]
    best = max(judged, key=lambda e: (e["validation_accuracy"], -e["validation_loss"]))
    assert judged.index(best) == len(judged) - 4
    assert trained.record["best_step"] == best["step"] == trained.record["n_steps"] - 15
    assert trained.record["validation_accuracy"] == best["validation_accuracy"]


def test_without_validation_patients_the_last_weights_are_kept(painted: TrainingData) -> None:
    trained = train_network(replace(painted, validation=[]), PLAN, replace(QUICK, steps=7))
    assert trained.record["best_step"] == trained.record["n_steps"] == 7
    assert "no validation patients" in trained.record["stopped"]
    assert trained.record["validation_accuracy"] is None


def test_labels_are_summed_into_classes_when_judged(painted: TrainingData) -> None:
    """Two labels of one class: what matters is the class."""
    merged = replace(painted, n_classes=2, merge=np.array([0, 0, 1, 1]))
    settings = replace(QUICK, steps=100, evaluate_every=50)
    trained = train_network(merged, PLAN, settings)
    assert trained.classifier.params["dense2.bias"].shape == (4,)
    assert trained.record["validation_accuracy"] > 0.9


def test_the_rate_rises_and_falls() -> None:
    settings = TrainingSettings(steps=100, learning_rate=2.0, warmup=0.1)
    expected = [
        2 * (step + 1) / 10
        if step < 10
        else 2 * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 90)))
        for step in range(100)
    ]
    expected[1:10] = [0.2 + 1.8 * step / 10 for step in range(1, 10)]
    with jax.numpy_dtype_promotion("standard"):  # optax
        np.testing.assert_allclose(settings.rates(), expected, rtol=1e-5)
        assert replace(settings, warmup=0.0).rates()[0] == 2.0


@pytest.mark.parametrize("name", ["towers", "readme"])
def test_one_step_equals_the_optimiser_written_out(painted: TrainingData, name: str) -> None:
    """Adam by hand on the gradient of the same batch; decay of kernels, or the seed's penalty."""
    from organfast.models.network import kernel_penalty, logits, scaled
    from organfast.models.training import _mesh, _Run

    plan = NetworkPlan(name, BLOCK, PLAN.window)
    settings = replace(QUICK, clip=0.05, weight_decay=0.1, dropout=0.0, warmup=0.0)
    run = _Run(painted, plan, settings, _mesh(settings))
    before = {n: np.array(a, np.float64) for n, a in run.state.params.items()}
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)[0]
    chosen = np.asarray(drawn(key, 32, run.examples))
    where = [np.asarray(a)[chosen] for a in (run.examples.cases, run.examples.positions)]
    blocks = scaled(blocks_at(run.volumes, *map(jnp.asarray, where)), plan.window)
    wanted = np.full((32, 4), 0.05 / 4, np.float32)
    wanted[np.arange(32), np.asarray(run.examples.labels)[chosen]] += 0.95

    def loss_of(params: Any) -> Any:
        found = jax.nn.log_softmax(logits(plan.layers, params, blocks))
        penalty = kernel_penalty(plan.layers, params)
        return -(found * wanted).sum(axis=1).mean() + penalty

    gradient = jax.jit(jax.grad(loss_of))(jax.device_put(run.state.params))
    gradient = {n: np.array(g, np.float64) for n, g in gradient.items()}
    length = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert length > 0.05
    run.step()
    for array, g in gradient.items():
        g = g * 0.05 / length
        expected = before[array] - 5e-3 * g / (abs(g) + 1e-8)
        if name == "towers" and array.endswith("kernel"):
            expected -= 5e-3 * 0.1 * before[array]
        large = abs(g) > 1e-5  # where Adam's first step is no division of rounding by rounding
        assert large.mean() > 0.1
        found = np.asarray(run.state.params[array])
        np.testing.assert_allclose(found[large], expected[large], atol=2e-5)


def test_bfloat16_learns_as_well(painted: TrainingData) -> None:
    settings = replace(QUICK, steps=100, precision="bfloat16", evaluate_every=50)
    assert train_network(painted, PLAN, settings).record["validation_accuracy"] > 0.9


def test_mirrored_batches_need_partners(painted: TrainingData) -> None:
    settings = replace(QUICK, steps=2, augmentation=BlockAugmentation(mirror=0.5))
    with pytest.raises(ValueError, match="not said which labels are partners"):
        train_network(painted, PLAN, settings)


def test_a_loss_that_is_no_number_is_an_error(painted: TrainingData) -> None:
    from organfast.models.training import _Log, _mesh, _Run

    run = _Run(painted, PLAN, QUICK, _mesh(QUICK))
    run.state = replace(run.state, params=jax.tree.map(lambda a: a / 0, run.state.params))
    with pytest.raises(FloatingPointError, match="nan at step 5; use a lower learning rate"):
        run.to_the_end(None, 1, _Log(TrainingOutputs(), 0), silent)


def test_settings_out_of_range_are_refused_in_words() -> None:
    for name, value, words in (
        ("steps", 0, "give a whole number from 1"),
        ("batch", 2.0, "give a whole number from 1"),
        ("seed", -1, "give a whole number from 0"),
        ("patience", True, "give a whole number from 1"),
        ("learning_rate", 0, "give a number from 1e-08 to 10"),
        ("warmup", 1.0, "give a number from 0 to 0.9"),
        ("label_smoothing", None, "give a number from 0 to 0.5"),
        ("dropout", 1.0, "give a number from 0 to 0.9"),
        ("clip", 0, "give a number from 1e-06"),
        ("precision", "float16", "use float32, bfloat16"),
        ("device", "cuda", "use auto, cpu, gpu"),
        ("max_memory_gb", -1, "give GiB above 0"),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; {words}"):
            TrainingSettings(**{name: value})
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        TrainingOutputs(checkpoint_every=0)
    with pytest.raises(ValueError, match="'unet' is unknown"):
        NetworkPlan("unet", BLOCK, (0.0, 1.0))
    with pytest.raises(ValueError, match=r"window is \(1, 1\)"):
        NetworkPlan("towers", BLOCK, (1, 1))


def test_tensorboard_is_asked_for_or_not_missed(
    painted: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    settings = replace(QUICK, steps=1)
    with pytest.raises(ValueError, match="tensorboardX is not installed"):
        train_network(
            painted, PLAN, settings, outputs=TrainingOutputs(tensorboard=tmp_path / "board")
        )
    train_network(painted, PLAN, settings)


# --- devices --------------------------------------------------------------------------------------

_ON_DEVICES = """
import sys
import jax, numpy as np
jax.config.update("jax_disable_most_optimizations", True)
sys.path.insert(0, {tests!r})
from test_training import PLAN, QUICK, altered_training, replace, train_network
assert len(jax.devices()) == 4
data, settings = altered_training()
try:
    train_network(data, PLAN, replace(settings, batch=30))
except ValueError as error:
    assert "cannot be shared by 4 devices; give a multiple, such as 32" in str(error), error
else:
    raise AssertionError
trained = train_network(data, PLAN, settings)
np.savez({path!r}, loss=trained.record["validation_loss"], **trained.classifier.params)
"""


def altered_training() -> tuple[TrainingData, TrainingSettings]:
    """A short training with every alteration; validation positions that four cannot share."""
    cases = [_painted("a", 0), _painted("b", 1)], [_painted("c", 2, 13)]
    settings = replace(QUICK, steps=6, evaluate_every=6, augmentation=EVERYTHING)
    return TrainingData(*cases, 4, partners=[2, 1, 0, -1]), settings


def test_several_devices_share_a_batch_and_get_the_same(
    painted: TrainingData, tmp_path: Path
) -> None:
    path = str(tmp_path / "four.npz")
    code = _ON_DEVICES.format(tests=str(Path(__file__).parent), path=path)
    flags = "--xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "XLA_FLAGS": flags})
    data, settings = altered_training()
    single = train_network(data, PLAN, settings)
    found = dict(np.load(path))
    np.testing.assert_allclose(found["loss"], single.record["validation_loss"], rtol=1e-3)
    for name, array in single.classifier.params.items():
        # Sums over a batch come in another order; Adam divides small gradients by themselves.
        np.testing.assert_allclose(found[name], array, atol=2e-4, err_msg=name)
