"""The CNN: its architectures and their sizes, the network against its slow twin, the classifier."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
from networks import N_CLASSES, WINDOW, network

from organfast.blocks import Block, Context
from organfast.grid import GridVolume
from organfast.levels import levels_slab
from organfast.models import devices
from organfast.models.architecture import (
    ARCHITECTURES,
    Conv,
    architecture,
    conv_padding,
    map_sizes,
    n_parameters,
)
from organfast.models.cnn import Cnn

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

from organfast.models.network import (  # noqa: E402
    cut_blocks,
    initial_params,
    kernel_penalty,
    logits,
    scaled,
)

BLOCK = Block(9, (1, 3), 3)


@pytest.fixture(autouse=True, scope="module")
def _strict_and_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """JAX's strictest promotion; compiled programs are not those of an earlier run."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("strict"):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def on_device(cnn: Cnn):
    return {name: jnp.asarray(array) for name, array in cnn.params.items()}


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "n"),
    [
        ("readme", Block(33), 1_801_111),
        ("readme", Block(63), 6_716_311),
        ("readme-pool", Block(33), 1_333_855),
        ("towers", Block(33), 260_247),
        ("towers", Block(33, (1, 8)), 298_967),
        ("towers", Block(17, (1, 3, 7), 3), 316_895),
        ("towers", Block(63), 268_983),
    ],
)
def test_numbers_of_parameters_are_frozen(name: str, block: Block, n: int) -> None:
    assert n_parameters(architecture(name, block), 23) == n


@pytest.mark.parametrize("size", range(9, 98, 2))
def test_towers_see_each_block_whole_and_end_in_one_voxel(size: int) -> None:
    described = architecture("towers", Block(size))
    sizes = map_sizes(described, 0)
    assert sizes[-1] == 1
    for layer, n in zip(described.towers[0], sizes, strict=False):
        assert isinstance(layer, Conv)
        assert layer.padding == "VALID"
        assert n % 2 == 1  # the middle voxel stays in the middle
        assert (n - layer.size) % layer.stride == 0  # no row is left at the end
    assert n_parameters(described, 23) < 450_000


def test_shapes_of_the_readme() -> None:
    assert map_sizes(architecture("readme", Block(33)), 0) == (33, 16, 8, 4)
    assert map_sizes(architecture("readme-pool", Block(33)), 0) == (33, 31, 15, 15, 7)
    assert architecture("readme", Block(63, (8,), 3)).tower_channels == ((3, 32, 64, 128),)


@pytest.mark.parametrize("taps", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_that_of_jax(taps: int, stride: int) -> None:
    for n in range(1, 20):
        layer = Conv(1, taps, stride, "SAME")
        assert conv_padding(layer, n) == lax.padtype_to_pads((n,), (taps,), (stride,), "SAME")[0]


@pytest.mark.parametrize(
    ("name", "pattern", "words"),
    [
        ("resnet", Block(33), "architecture 'resnet' is unknown; use readme, readme-pool, towers"),
        ("towers", Context(), "a CNN reads blocks"),
        ("towers", Block(7), "from 9 to 97, not 7"),
        ("towers", Block(99), "from 9 to 97, not 99"),
        ("readme", Block(33, (1, 8)), "reads one level"),
        ("readme", Block(1), "too small for readme"),
        ("readme-pool", Block(5), "too small for readme-pool"),
    ],
)
def test_what_no_architecture_is_for_is_said(name: str, pattern, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        architecture(name, pattern)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("readme", Block(33)),
        ("readme", Block(63)),
        ("readme-pool", Block(33)),
        ("towers", Block(17, (1, 3, 7), 3)),
        ("towers", Block(33, (1, 8))),
    ],
)
def test_the_network_equals_its_slow_twin(name: str, block: Block) -> None:
    cnn = network(name, block)
    shape = (3, len(block.levels), block.slices, block.size, block.size)
    x = np.random.default_rng(0).random(shape, np.float32)
    found = jax.jit(lambda p, x: logits(cnn.architecture, p, x))(on_device(cnn), x)
    wanted = naive.cnn_logits(cnn.architecture, cnn.params, x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_first_weights_have_the_names_shapes_and_spread_they_should() -> None:
    for name, spread in (("readme", 2 / (9 * 64 + 9 * 128)), ("towers", 2 / (9 * 64))):
        described = architecture(name, Block(33))
        params = initial_params(described, 23, jax.random.key(0))
        shapes = {key: array.shape for key, array in params.items()}
        assert shapes == described.parameter_shapes(23)
        assert all((params[key] == 0).all() for key in params if key.endswith("bias"))
        third = np.asarray(params["tower0.conv2.kernel"])
        np.testing.assert_allclose(third.var(), spread, rtol=0.03)
        dense = np.asarray(params["dense0.kernel"])
        n_in, n_out = dense.shape
        spread = 2 / n_in if name == "towers" else 2 / (n_in + n_out)
        np.testing.assert_allclose(dense.var(), spread, rtol=0.05)
        other = initial_params(described, 23, jax.random.key(1))
        assert (np.asarray(other["tower0.conv2.kernel"]) != third).any()


def test_dropout_is_for_training_and_follows_its_key() -> None:
    cnn = network("towers", BLOCK)
    x = jnp.asarray(np.random.default_rng(0).random((2, 2, 3, 9, 9), np.float32))
    params = on_device(cnn)
    run = jax.jit(lambda key: logits(cnn.architecture, params, x, dropout_key=key))
    keys = jax.random.split(jax.random.key(0), 200)
    found = np.array([run(key) for key in keys])
    np.testing.assert_array_equal(found[0], run(keys[0]))
    assert (found[0] != found[1]).any()
    # Only the last layer follows it, so that its mean is what comes without.
    without = naive.cnn_logits(cnn.architecture, cnn.params, x)
    error = found.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(found.mean(axis=0) - without) < 5 * error).all()


def test_the_penalty_is_the_seeds_on_convolutions_alone() -> None:
    cnn = network("readme", Block(9))
    kernels = [a for n, a in cnn.params.items() if "conv" in n and n.endswith("kernel")]
    assert len(kernels) == 3
    wanted = 1e-3 * sum(float((k.astype(float) ** 2).sum()) for k in kernels)
    penalty = kernel_penalty(cnn.architecture, on_device(cnn))
    np.testing.assert_allclose(penalty, wanted, rtol=1e-5)
    assert kernel_penalty(network("towers", BLOCK).architecture, on_device(cnn)) == 0


def test_blocks_are_cut_where_the_pattern_reads() -> None:
    slab = np.random.default_rng(0).integers(-1000, 1000, (2, 5, 40, 37), np.int16)
    positions = np.array([(1, 12, 12), (3, 27, 24), (2, 20, 13)], np.int32)
    found = cut_blocks(jnp.asarray(slab), jnp.asarray(positions), BLOCK)
    assert found.shape == (3, 2, 3, 9, 9)
    wanted = naive.blocks_at(slab, BLOCK.offsets.tolist(), positions)
    np.testing.assert_array_equal(found.reshape(3, -1), wanted)


@pytest.mark.parametrize("standardise", [False, True])
def test_inputs_are_scaled_as_the_twin_does(standardise: bool) -> None:
    blocks = np.random.default_rng(0).integers(-400, 400, (3, 2, 3, 9, 9), np.int16)
    blocks[0] = 7  # one value: no deviation to divide by
    found = np.asarray(scaled(jnp.asarray(blocks), WINDOW, standardise=standardise))
    assert found.dtype == np.float32
    wanted = naive.cnn_inputs(blocks, WINDOW, standardise)
    np.testing.assert_allclose(found[1:], wanted[1:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[0], 0 if standardise else wanted[0], rtol=0, atol=0.2)
    assert standardise or (found.min(), found.max()) == (0, 1)


# --- the classifier -------------------------------------------------------------------------------


def expected(cnn: Cnn, slab, positions):
    block = cnn.pattern
    shape = (len(positions), len(block.levels), block.slices, block.size, block.size)
    blocks = naive.blocks_at(slab, block.offsets.tolist(), positions).reshape(shape)
    inputs = naive.cnn_inputs(blocks, cnn.window, cnn.standardise)
    return naive.cnn_probabilities(cnn.architecture, cnn.params, inputs, cnn.merge, cnn.n_classes)


def real_slab():
    """As a scan gives it: read-only, rows that share their padding."""
    hu = np.random.default_rng(0).integers(-300, 400, (6, 30, 26), np.int16)
    return levels_slab(GridVolume(hu), BLOCK, 1, 4)


def some_positions(slab, n: int):
    rng = np.random.default_rng(1)
    reach = BLOCK.reach
    along = [rng.integers(r, s - r, n) for r, s in zip(reach, slab.shape[1:], strict=True)]
    return np.stack(along, axis=1).astype(np.int32)


@pytest.mark.parametrize("n", [1, 33, 300])
def test_probabilities_equal_those_of_the_slow_twin(n: int) -> None:
    cnn, slab = network("towers", BLOCK), real_slab()
    assert not slab.flags.writeable
    assert not slab.flags.c_contiguous
    positions = some_positions(slab, n)
    out = np.full((n, N_CLASSES), np.nan, np.float32)
    cnn.probabilities(slab, positions, out)
    chosen = slice(None, None, 7)
    np.testing.assert_allclose(out[chosen], expected(cnn, slab, positions[chosen]), atol=1e-5)
    np.testing.assert_allclose(out.sum(axis=1), 1, atol=1e-5)
    assert (out[:, 3] == 0).all()  # a class without a label


def test_no_positions_and_float64() -> None:
    cnn, slab = network("towers", BLOCK), real_slab()
    cnn.probabilities(slab, np.empty((0, 3), np.int32), np.empty((0, N_CLASSES), np.float32))
    positions = some_positions(slab, 5)
    out, out64 = (np.empty((5, N_CLASSES), dtype) for dtype in (np.float32, np.float64))
    cnn.probabilities(slab, positions, out)
    cnn.probabilities(slab, positions, out64)
    np.testing.assert_array_equal(out, out64)


def test_standardised_blocks_do_not_see_brightness() -> None:
    cnn = replace(network("towers", BLOCK), standardise=True, window=(-2000.0, 2000.0))
    slab = real_slab()
    positions = some_positions(slab, 4)
    one, other = np.empty((2, 4, N_CLASSES), np.float32)
    cnn.probabilities(slab, positions, one)
    cnn.probabilities(slab + np.int16(100), positions, other)
    np.testing.assert_allclose(one, expected(cnn, slab, positions), atol=1e-5)
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_threads_get_what_one_gets() -> None:
    cnn, slab = network("towers", BLOCK), real_slab()
    positions = some_positions(slab, 40)

    def run(_: int):
        out = np.empty((40, N_CLASSES), np.float32)
        cnn.probabilities(slab, positions, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(8)))
    for other in found:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slab": np.zeros((2, 3, 40, 40))}, "slab is 4-D float64"),
        ({"slab": np.zeros((1, 3, 40, 40), np.int16)}, "slab has 1 levels; the block reads 2"),
        ({"positions": np.zeros((2, 3))}, "positions is"),
        ({"positions": np.zeros((2, 3), np.int32)}, "positions reach -1"),
        ({"positions": np.array([[1, 20, 28], [1, 12, 12]], np.int32)}, "along j"),
        ({"out": np.empty((2, 4), np.float32)}, "out is"),
    ],
)
def test_wrong_arguments_are_named(change, words: str) -> None:
    given = {
        "slab": np.zeros((2, 3, 40, 40), np.int16),
        "positions": np.array([[1, 20, 20], [1, 12, 12]], np.int32),
        "out": np.empty((2, N_CLASSES), np.float32),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        network("towers", BLOCK).probabilities(**given)


# --- its file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arrays_and_header_bring_it_back(name: str) -> None:
    cnn = replace(network(name, Block(9)), window=[-200, 300], precision="bfloat16")
    again = Cnn.from_arrays(cnn.arrays(), cnn.to_dict(), cnn.pattern, N_CLASSES)
    assert again.to_dict() == cnn.to_dict()
    assert again.architecture == cnn.architecture
    assert set(again.arrays()) == set(cnn.arrays())
    for key, array in cnn.arrays().items():
        np.testing.assert_array_equal(again.arrays()[key], array)
    np.testing.assert_array_equal(again.offsets, cnn.pattern.offsets)


def _without(key: str):
    return lambda arrays: arrays.pop(key)


def _put(key: str, change):
    return lambda arrays: arrays.update({key: change(arrays.get(key))})


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (_without("dense0.bias"), "weights are"),
        (_without("merge"), "lack merge"),
        (_put("more", lambda _: np.zeros(3, np.float32)), "weights are"),
        (_put("dense0.bias", lambda a: a[:-1]), r"dense0.bias is float32 of shape \(127,\)"),
        (_put("dense0.bias", lambda a: a.astype(float)), "dense0.bias is float64"),
        (_put("dense0.bias", lambda a: a + np.float32(np.nan)), "no numbers"),
        (_put("merge", lambda a: a + 1), "merge leads to classes 1 to 5"),
        (_put("merge", lambda a: a - 1), "merge leads to classes -1"),
        (_put("merge", lambda a: a[:0]), "merge is"),
        (_put("merge", lambda a: a.astype(float)), "merge is float64"),
        (_put("merge", lambda a: a[:-1]), "dense2.kernel is"),
    ],
)
def test_tampered_arrays_are_refused(tamper, words: str) -> None:
    cnn = network("towers", BLOCK)
    arrays = cnn.arrays()
    tamper(arrays)
    with pytest.raises(ValueError, match=words):
        Cnn.from_arrays(arrays, cnn.to_dict(), BLOCK, N_CLASSES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "readme"}, "reads one level"),
        ({"architecture": 3}, "give its name"),
        ({"window": [240, -160]}, "window is"),
        ({"window": [0, float("inf")]}, "window is"),
        ({"window": ["0", 1]}, "window is"),
        ({"window": 3}, "window is"),
        ({"standardise": 1}, "standardise is 1"),
        ({"precision": "float16"}, "precision is 'float16'"),
        ({"more": 1}, "a CNN is described by"),
    ],
)
def test_a_tampered_header_is_refused(change, words: str) -> None:
    cnn = network("towers", BLOCK)
    with pytest.raises(ValueError, match=words):
        Cnn.from_arrays(cnn.arrays(), {**cnn.to_dict(), **change}, BLOCK, N_CLASSES)


# --- where it runs --------------------------------------------------------------------------------


def test_importing_the_classifier_does_not_load_jax() -> None:
    code = "import organfast.models.cnn, sys; sys.stdout.write(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax"} & set(run.stdout.split())


def test_devices() -> None:
    assert devices.find_devices("cpu")[0].platform == "cpu"
    assert devices.find_devices("auto") == jax.local_devices()
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        devices.find_devices("tpu")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    cnn = replace(network("towers", BLOCK), device="gpu")
    slab = np.zeros((2, 3, 40, 40), np.int16)
    out = np.empty((1, N_CLASSES), np.float32)
    with pytest.raises(ValueError, match="JAX finds no gpu; use device cpu or auto"):
        cnn.probabilities(slab, np.array([[1, 20, 20]], np.int32), out)


CACHE = """
import os, sys, jax
import organfast.models.devices as devices
places = []
for home in sys.argv[1:]:
    os.environ["XDG_CACHE_HOME"] = home
    devices._LEAST_SECONDS = 0
    places.append(str(devices.compilation_cache()))
jax.jit(lambda x: x * 2)(3.0)
jax.config.update("jax_compilation_cache_dir", "mine")
print(*places, devices.compilation_cache(), sep="\\n")
"""


def test_compiled_programs_are_kept_where_the_user_keeps_such_things(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    run = subprocess.run(
        [sys.executable, "-c", CACHE, tmp_path / "file", tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
    )
    nowhere, place, chosen = run.stdout.split()
    assert (nowhere, chosen) == ("None", "mine")
    assert Path(place).parent == tmp_path / "organfast" / "jax"
    assert any(Path(place).iterdir())


_ON_FOUR = """
import sys; sys.path.insert(0, {tests!r})
import jax, numpy as np
from test_cnn import on_a_grid
assert len(jax.devices()) == 4
np.save({path!r}, on_a_grid())
"""


def on_a_grid() -> np.ndarray:
    """Probabilities on a grid of 7 x 5 positions: rows that four devices share unevenly."""
    cnn = network("towers", Block(9, (1, 3)))
    reach = cnn.pattern.reach
    shape = (2, 1, 2 * reach[1] + 14, 2 * reach[2] + 10)
    slab = np.random.default_rng(3).integers(-900, 400, shape, np.int16)
    out = np.empty((7, 5, N_CLASSES), np.float32)
    cnn.grid_probabilities(slab, reach, (2, 2), out)
    return out


def test_several_devices_share_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "four.npy"
    code = _ON_FOUR.format(tests=str(Path(__file__).parent), path=str(path))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **flags})
    np.testing.assert_allclose(np.load(path), on_a_grid(), rtol=0, atol=1e-5)
