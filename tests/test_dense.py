"""Dense evaluation: against blocks that are cut and evaluated one by one, for every stride."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import N_CLASSES, network

from organfast.blocks import Block
from organfast.models import cnn as module
from organfast.models import dense
from organfast.models.architecture import architecture
from organfast.models.cnn import Cnn
from organfast.models.dense import DensePlan, block_products

jax = pytest.importorskip("jax")


@pytest.fixture(autouse=True, scope="module")
def _strict_and_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """JAX's strictest promotion; compiled programs are not those of an earlier run."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("strict"):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def scene(block: Block, stride: tuple[int, int], shape: tuple[int, int], margin: int = 3):
    """A slab with so many voxels more than blocks read on each side, and the positions on it."""
    reach = block.reach
    rng = np.random.default_rng(1)
    sides = [
        2 * (r + margin) + s * (n - 1) + 1 for r, s, n in zip(reach[1:], stride, shape, strict=True)
    ]
    slab = rng.integers(-300, 400, (len(block.levels), block.slices + 2, *sides), np.int16)
    first = (reach[0] + 1, reach[1] + margin, reach[2] + margin)
    positions = [
        (first[0], first[1] + stride[0] * a, first[2] + stride[1] * b)
        for a in range(shape[0])
        for b in range(shape[1])
    ]
    return slab, first, np.array(positions, np.int32)


def expected(cnn: Cnn, slab, positions):
    block = cnn.pattern
    shape = (len(positions), len(block.levels), block.slices, block.size, block.size)
    blocks = naive.blocks_at(slab, block.offsets.tolist(), positions).reshape(shape)
    inputs = naive.cnn_inputs(blocks, cnn.window, cnn.standardise)
    return naive.cnn_probabilities(cnn.architecture, cnn.params, inputs, cnn.merge, cnn.n_classes)


def check(
    cnn: Cnn,
    stride: tuple[int, int],
    shape: tuple[int, int],
    method: str = "dense",
    margin: int = 3,
) -> None:
    slab, first, positions = scene(cnn.pattern, stride, shape, margin)
    out = np.full((*shape, N_CLASSES), np.nan, np.float32)
    cnn.grid_probabilities(slab, first, stride, out, method=method)
    wanted = expected(cnn, slab, positions).reshape(out.shape)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


def test_a_small_scene_tells_positions_apart() -> None:
    """Were blocks alike, a program that mixed them up would pass."""
    cnn = network("towers", Block(17, (1, 3, 7), 3))
    slab, _, positions = scene(cnn.pattern, (3, 3), (3, 2))
    assert np.ptp(expected(cnn, slab, positions), axis=0).max() > 0.1


# A program takes seconds to compile, so these are those whose borders or strides differ most; the
# runs they are made of are compared for all strides below.
@pytest.mark.parametrize(
    ("name", "block", "stride"),
    [
        ("readme", Block(9), 3),
        ("readme", Block(17), 16),
        ("readme", Block(33), 1),
        ("readme", Block(33), 8),
        ("readme", Block(33), 33),
        ("readme", Block(63), 4),
        ("readme-pool", Block(17), 4),
        ("towers", Block(9), 1),
        ("towers", Block(17, (1, 3, 7), 3), 3),
        ("towers", Block(33, (1, 8)), 1),
        ("towers", Block(33, (1, 8)), 3),
        ("towers", Block(33, (1, 8)), 8),
        ("towers", Block(33), 16),
        ("towers", Block(63), 8),
    ],
)
def test_dense_equals_block_by_block(name: str, block: Block, stride: int) -> None:
    check(network(name, block), (stride, stride), (3, 2) if stride < 16 else (2, 2))


def test_strides_may_differ_along_rows_and_columns() -> None:
    check(network("towers", Block(17, (1, 3, 7), 3)), (2, 5), (2, 4))


@pytest.mark.parametrize("method", ["dense", "blocks"])
def test_the_last_block_may_end_where_the_slab_ends(method: str) -> None:
    check(network("towers", Block(9)), (4, 4), (3, 5), method, margin=0)


@pytest.mark.parametrize("name", ["readme", "towers"])
def test_one_by_one_equals_block_by_block(name: str) -> None:
    check(network(name, Block(17)), (16, 16), (3, 2), "blocks")


# --- runs, along one axis and in whole numbers ----------------------------------------------------


def windows_of(name: str, size: int):
    return list(dense._windows(architecture(name, Block(size)), 0))


def kernel(n: int, size: int):
    return np.arange(3, 3 + 2 * size, 2) + n


def axis_by_blocks(windows, signal, size, width, stride, n):
    """Each block by itself; + 1 after each layer, so that a zero of the padding is no output."""
    found = []
    for a in range(n):
        x = signal[stride * a + width * np.arange(size)]
        for layer, w in enumerate(windows):
            x = np.concatenate([np.zeros(w.before, x.dtype), x, np.zeros(w.size, x.dtype)])
            starts = [w.stride * u for u in range(w.n_out)]
            x = np.array([(x[i : i + w.size] * kernel(layer, w.size)).sum() + 1 for i in starts])
        found.append(x[0])
    return found


def axis_by_runs(windows, signal, size, width, stride, n):
    first, *layers = dense._axis_runs(windows, size, width, stride, n)
    maps = [signal[:: first[0].step][: first[0].n]]
    for layer, (w, runs) in enumerate(zip(windows, layers, strict=True)):
        made = []
        for run in runs:
            x = np.ones(run.n, signal.dtype)
            for taps in run.taps:
                seen = maps[taps.run][taps.extent(run.n)]
                for q in range(taps.n):
                    part = seen[q * taps.dilation :: taps.stride][: run.n]
                    x += part * kernel(layer, w.size)[taps.first + q]
            made.append(x)
        maps = made
    return maps[0].tolist()


def check_axis(windows, size: int, width: int, stride: int, n: int) -> None:
    signal = np.random.default_rng(0).integers(1, 1000, stride * (n - 1) + width * (size - 1) + 1)
    args = (windows, signal, size, width, stride, n)
    assert axis_by_runs(*args) == axis_by_blocks(*args)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 31, "size"])
@pytest.mark.parametrize("size", [9, 17, 33, 63])
@pytest.mark.parametrize("name", ["readme", "readme-pool", "towers"])
def test_runs_of_each_architecture(name: str, size: int, stride: int | str) -> None:
    for width in (1, 3, 7, 8):
        check_axis(windows_of(name, size), size, width, size if stride == "size" else stride, 4)


@st.composite
def any_layers(draw):
    size = n = draw(st.integers(5, 40))
    windows = []
    for _ in range(draw(st.integers(1, 4))):
        taps, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        if draw(st.booleans()) or taps > n:  # SAME
            n_out = -(-n // stride)
            before = max(0, (n_out - 1) * stride + taps - n) // 2
        else:
            before, n_out = 0, (n - taps) // stride + 1
        windows.append(dense._Window(taps, stride, before, n, n_out))
        n = n_out
    return [*windows, dense._Window(n, 1, 0, n, 1)], size


@settings(deadline=None, max_examples=200)
@given(any_layers(), st.integers(1, 9), st.integers(1, 40), st.integers(1, 5))
def test_runs_of_any_layers(layers, width: int, stride: int, n: int) -> None:
    check_axis(*layers, width, stride, n)


def test_runs_are_the_border_classes_of_the_readme() -> None:
    """Maps after each convolution: at 33 px zeros at the end only, at 63 px on both sides."""
    for size, counts in ((33, [1, 1, 2, 2, 1]), (63, [1, 1, 3, 3, 1])):
        runs = dense._axis_runs(windows_of("readme", size), size, 1, 8, 10)
        assert [len(layer) for layer in runs] == counts


# --- how much work, and which way -----------------------------------------------------------------


def test_products_of_one_block_are_those_of_its_layers() -> None:
    described = architecture("towers", Block(33))
    by_hand = 15**2 * 25 * 32 + 7**2 * 9 * 32 * 64 + 3**2 * 9 * 64 * 128 + 9 * 128 * 128
    by_hand += 128 * 128 + 128 * 5
    assert block_products(described, Block(33), 5) == by_hand
    both = 2 * (15**2 * 25 * 24 + 7**2 * 9 * 24 * 48 + 3**2 * 9 * 48 * 96 + 9 * 96 * 96)
    two = Block(33, (1, 8))
    assert block_products(architecture("towers", two), two, 5) == both + 192 * 128 + 128 * 5


def test_products_of_the_dense_program_are_those_that_are_shared() -> None:
    """At stride 8 a position adds 4 x 4 outputs of the first layer, 2 x 2, 1 and 1."""
    described = architecture("towers", Block(33))
    n = 1000
    per_position = DensePlan(described, Block(33), (8, 8), (n, n)).products(5) / n**2
    by_hand = 16 * 25 * 32 + 4 * 9 * 32 * 64 + 9 * 64 * 128 + 9 * 128 * 128 + 128 * 128 + 128 * 5
    np.testing.assert_allclose(per_position, by_hand, rtol=0.01)


def test_the_way_with_less_work_is_taken() -> None:
    cnn = network("readme", Block(33))
    assert cnn._way("auto", (8, 8), (64, 64))[0] == "dense"
    assert cnn._way("auto", (33, 33), (16, 16))[0] == "blocks"


def test_standardised_blocks_are_evaluated_one_by_one() -> None:
    cnn = replace(network("readme", Block(17)), standardise=True)
    check(cnn, (8, 8), (2, 3), "auto")
    with pytest.raises(ValueError, match="share no values"):
        check(cnn, (8, 8), (2, 3), "dense")


# --- parts, threads, compilations, precision ------------------------------------------------------


def compilations() -> list[str]:
    """Grows with each program that JAX compiles or takes from its cache."""
    seen: list[str] = []

    def listener(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    return seen


def test_one_compilation_serves_all_slices_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cnn = network("towers", Block(9))
    slab, first, positions = scene(cnn.pattern, (4, 4), (5, 3))
    three = DensePlan(cnn.architecture, cnn.pattern, (4, 4), (3, 3)).floats
    monkeypatch.setattr(module, "_MOST_BYTES", 4 * three)
    assert cnn._way("dense", (4, 4), (5, 3)) == ("dense", 3)  # 5 rows: the last part overlaps
    seen = compilations()
    out = np.empty((5, 3, N_CLASSES), np.float32)
    for k in (0, 1, 2):
        cnn.grid_probabilities(slab, (k, *first[1:]), (4, 4), out, method="dense")
        at = positions.copy()
        at[:, 0] = k
        wanted = expected(cnn, slab, at).reshape(out.shape)
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    assert len(seen) == 1
    again = Cnn(cnn.architecture, cnn.pattern, cnn.window, cnn.params, cnn.merge, N_CLASSES)
    again.grid_probabilities(slab, first, (4, 4), out, method="dense")
    assert len(seen) == 1  # other weights, the same program


def test_memory_is_bounded_however_fine_the_grid() -> None:
    """The maps of a part of a 512 x 512 slice at stride 4, and at stride 1."""
    for stride, n in ((4, 128), (1, 512)):
        cnn = network("readme", Block(33))
        how, rows = cnn._way("auto", (stride, stride), (n, n))
        part = DensePlan(cnn.architecture, cnn.pattern, (stride, stride), (rows, n))
        assert how == "dense"
        assert 4 * part.floats < module._MOST_BYTES


def test_threads_get_what_one_gets() -> None:
    cnn = network("towers", Block(9))
    slab, first, _ = scene(cnn.pattern, (3, 3), (4, 4))

    def run(_: int):
        out = np.empty((4, 4, N_CLASSES), np.float32)
        cnn.grid_probabilities(slab, first, (3, 3), out, method="dense")
        return out

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(8)))
    for other in found:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("method", ["dense", "blocks"])
def test_bfloat16_agrees_as_far_as_eight_bits_go(method: str) -> None:
    """Measured on this scene: by at most 0.0035, and no label is another."""
    cnn = network("towers", Block(17, (1, 3, 7), 3))
    slab, first, positions = scene(cnn.pattern, (3, 3), (6, 6))
    out = np.empty((6, 6, N_CLASSES), np.float32)
    replace(cnn, precision="bfloat16").grid_probabilities(slab, first, (3, 3), out, method=method)
    wanted = expected(cnn, slab, positions).reshape(out.shape)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=0.01)
    assert np.abs(out - wanted).max() > 1e-5  # the option does something
    clear = np.sort(wanted, axis=2)[..., -1] - np.sort(wanted, axis=2)[..., -2] > 0.1
    np.testing.assert_array_equal(out.argmax(axis=2)[clear], wanted.argmax(axis=2)[clear])


# --- arguments ------------------------------------------------------------------------------------


def test_a_grid_beyond_the_slab_is_refused() -> None:
    cnn = network("towers", Block(9))
    slab, first, _ = scene(cnn.pattern, (4, 4), (3, 2), margin=0)
    out = np.empty((3, 2, N_CLASSES), np.float32)
    for wrong in [(0, 1, 0), (0, 0, -1), (9, 0, 0)]:
        at = tuple(f + w for f, w in zip(first, wrong, strict=True))
        with pytest.raises(ValueError, match=r"positions reach .* pad it"):
            cnn.grid_probabilities(slab, at, (4, 4), out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stride": (0, 4)}, "stride is"),
        ({"stride": (4,)}, "stride is"),
        ({"out": np.empty((3, 2, 4), np.float32)}, "out is"),
        ({"out": np.empty((3, 2, N_CLASSES))}, "out is float64"),
        ({"out": np.empty((6, N_CLASSES), np.float32)}, "out has 2 axes"),
        ({"slab": np.zeros((1, 3, 99, 99))}, "slab is 4-D float64"),
        ({"slab": np.zeros((2, 3, 99, 99), np.int16)}, "slab has 2 levels"),
        ({"method": "fast"}, "method is 'fast'"),
    ],
)
def test_wrong_arguments_are_named(change, words: str) -> None:
    cnn = network("towers", Block(9))
    slab, first, _ = scene(cnn.pattern, (4, 4), (3, 2))
    out = np.empty((3, 2, N_CLASSES), np.float32)
    given_ = {"slab": slab, "first": first, "stride": (4, 4), "out": out, **change}
    with pytest.raises(ValueError, match=words):
        cnn.grid_probabilities(**given_)
