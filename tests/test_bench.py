"""Every benchmark runs once, untimed and small, so that none can rot; ratios mean what they say."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import naive
import numpy as np
import pytest

from organfast import bench, benchcases, benchcnn, benchforest, benchscores
from organfast.bench import Benchmark, Comparison, Peer, Scaling, in_threads, run_record
from organfast.benchcnn import Cut
from organfast.benchforest import Size
from organfast.benchscan import GUNZIP, ScanCase
from organfast.blocks import Block
from organfast.cli import run
from organfast.grid import ModelGrid
from organfast.kernels.rates import gathered, shifted

REPOSITORY = Path(__file__).parents[1]
TINY = Size(n_trees=3, n_per_class=12, n_patients=1)
SQUARE = Cut(pixels=48, matrix=64)
HAS_JAX = all(importlib.util.find_spec(name) for name in ("jax", "flax"))
NEEDS_JAX = pytest.mark.skipif(not HAS_JAX, reason="JAX and flax are not installed")


def _load(path: str) -> ModuleType:
    """A script that is no module of the package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


publish, benchmark_table = _load("benchmarks/publish.py"), _load("tools/benchmark_table.py")

SMALL = {
    **{
        f"gather {n} px, stride {s}": partial(benchcases.gather_case, n, s)
        for n in benchcases.SIZES
        for s in (33, 8)
    },
    **{f"slice {n} px": partial(benchforest.slice_case, n, 33, TINY) for n in benchcases.SIZES},
    "context": partial(benchforest.context_case, 33, TINY),
    "neighbours": partial(benchforest.neighbours_case, 1, TINY),
    "labels": partial(benchforest.labels_case, 16, TINY),
    "working grid": partial(benchforest.working_grid_case, 64, TINY),
    "visits": partial(benchforest.visits_case, 1, TINY),
    "onnx": partial(benchforest.onnx_case, 1, TINY),
    "enlarge": partial(benchcases.enlargement_case, 23, 16, 128),
    "clean": partial(benchcases.cleaning_case, 48, 10),
    "load": partial(benchcases.load_case, (64, 48, 5)),
    "confusion": partial(benchscores.confusion_case, 48),
    "label pair": partial(benchscores.label_pair_case, 48),
    "surfaces": partial(benchscores.surface_case, 48),
    "bootstrap": partial(benchscores.bootstrap_case, 5, 3, 50),
}
SMALL_CNN = {
    "readme": partial(benchcnn.readme_case, 33, 16, SQUARE),
    "two towers": partial(benchcnn.towers_case, 33, 16, (1, 8), SQUARE),
    "batch": partial(benchcnn.batch_case, 33, 4, SQUARE),
}


# --- cases ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    "build",
    [
        *(pytest.param(build, id=name) for name, build in SMALL.items()),
        *(pytest.param(build, id=name, marks=NEEDS_JAX) for name, build in SMALL_CNN.items()),
    ],
)
def test_each_case_runs_once_with_all_its_peers(build: Any) -> None:
    case: Benchmark = build()
    case.ours()
    for name, peer in case.peers.items():
        peer.job()
        n = case.n_items if peer.n_items is None else peer.n_items
        assert 0 < n <= (np.inf if peer.is_limit else case.n_items)
        assert (n == case.n_items) or peer.is_limit or f"{n:,} of the positions" in name
    if case.whole is not None:
        case.whole()


def test_every_case_of_the_command_is_among_the_small_ones() -> None:
    def builders(cases: Any) -> set[Any]:
        found = set()
        for case in cases:
            while isinstance(case, partial):
                inner = case.args[:1] if case.args and callable(case.args[0]) else ()
                found |= builders(inner)
                case = case.func
            found.add(case)
        return found

    shown = builders([*benchcases.TABLE.values(), *benchcases.SWEEP.values()])
    if HAS_JAX:
        shown |= builders(benchcnn.cnn_cases().values())
    small = builders([*SMALL.values(), *SMALL_CNN.values()])
    assert shown - small == {ScanCase, benchcases.scaling_case, in_threads}


def test_gather_peers_make_the_same_blocks() -> None:
    case = benchcases.gather_case(17, 8)
    expected = np.asarray(case.ours())
    for name, peer in case.peers.items():
        if not peer.is_limit:
            found = np.asarray(peer.job()).reshape(-1, 17, 17)
            np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=name)


def test_enlargement_peers_find_nearly_the_same_labels() -> None:
    case = benchcases.enlargement_case(23, 16, 128)
    expected = case.ours()[0]  # type: ignore[index]
    for name, peer in case.peers.items():
        found = np.asarray(peer.job()[0])  # type: ignore[index]
        # Blocks stand half a pixel apart from ours where the stride is even.
        assert np.mean(found == expected) > 0.9, name


def test_scoring_peers_find_the_same() -> None:
    case: Any = benchscores.confusion_case(48)
    for name, peer in case.peers.items():
        np.testing.assert_array_equal(peer.job(), case.ours(), err_msg=name)
    case = benchscores.label_pair_case(48)
    ours = case.ours()
    counts, boxes, centres, _, other_centres = next(iter(case.peers.values())).job()
    np.testing.assert_array_equal(counts, ours.counts)
    there = ours.n_voxels[0] > 0
    np.testing.assert_allclose(np.array(centres)[there], ours.centroids[0][there])
    np.testing.assert_allclose(other_centres, ours.centroids[1], equal_nan=True)
    for box, expected in zip(boxes, ours.boxes[0], strict=True):
        if box is not None:
            assert [(s.start, s.stop) for s in box] == [tuple(row) for row in expected.tolist()]
    case = benchscores.surface_case(48)
    nsd, hd95, mean = case.ours()
    theirs = case.peers["surface-distance"].job()
    np.testing.assert_allclose((nsd, hd95), theirs[:2], rtol=1e-5)
    assert min(theirs[2]) <= mean <= max(theirs[2])
    along, back = case.peers["scipy.ndimage correlate and distance_transform_edt"].job()
    assert max(np.median(along), np.median(back)) <= hd95 <= max(along.max(), back.max())


def test_forest_peers_find_the_same_probabilities() -> None:
    case = benchforest.onnx_case(1, TINY)
    found = [np.asarray(peer.job()) for peer in case.peers.values()]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


@NEEDS_JAX
@pytest.mark.parametrize("name", ["readme", "batch"])
def test_peers_of_the_cnn_find_the_same_probabilities(name: str) -> None:
    case = SMALL_CNN[name]()
    expected = np.asarray(case.ours()).reshape(case.n_items, -1)
    peers = [peer for peer in case.peers.values() if not peer.is_limit]
    names = " ".join([*case.peers, *case.skipped])
    assert all(named in names for named in ("torch", "onnx"))
    assert ("ours, " in names) == (name == "readme")
    for peer in peers:
        found = np.asarray(peer.job()).reshape(case.n_items, -1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert expected.std(axis=0).max() > 1e-3  # positions differ


@NEEDS_JAX
def test_the_limit_of_the_cnn_does_as_many_multiplications() -> None:
    case = benchcnn.batch_case(33, 4, Cut(pixels=48, matrix=256))
    (limit,) = (peer for peer in case.peers.values() if peer.is_limit)
    assert limit.n_items == round(256**3 / 3_855_884)


def test_a_named_kernel_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from organfast.models.forest import kernel_path

    for before in (None, "scalar"):
        if before:
            monkeypatch.setenv(benchforest.KERNELS, before)
        usual = kernel_path()
        assert benchforest._forced(kernel_path, "scalar")() == "scalar"
        assert kernel_path() == usual
    case = benchforest.neighbours_case(1, TINY, path="scalar")
    assert case.name.endswith("scalar kernel")
    case.ours()


def test_node_visits_are_counted_as_a_walk_would() -> None:
    case = benchforest.visits_case(1, TINY)
    n_read = {peer.n_items for peer in case.peers.values()}
    assert n_read == {case.n_items}  # 512 positions: all are in the sample
    assert case.n_items == round(case.n_visits)
    asked = benchforest._rows(1, TINY)
    features, walked = asked.features(slice(None)), 0
    for tree in (e.tree_ for e in asked.estimator.estimators_):
        for row in features:
            node = 0
            while tree.feature[node] >= 0:
                walked += 1
                left = row[tree.feature[node]] <= tree.threshold[node]
                node = (tree.children_left if left else tree.children_right)[node]
    assert case.n_items == walked


def test_the_loop_of_the_limit_reads_what_the_walk_reads() -> None:
    asked = benchforest._rows(1, TINY)
    voxels, places = benchforest._reads(asked, slice(0, 40))
    features = asked.features(slice(0, 40))
    expected = []
    for tree in (e.tree_ for e in asked.estimator.estimators_):
        visits = tree.decision_path(features).toarray().astype(bool)
        for node in np.flatnonzero(tree.feature >= 0):
            expected.extend(features[visits[:, node], tree.feature[node]])
    np.testing.assert_array_equal(voxels[places], expected)


def test_rates_are_those_of_their_twins() -> None:
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1024, 3000, 500, dtype=np.int16)
    places = rng.integers(0, 500, 300).astype(np.uint32)
    assert gathered(voxels, places) == naive.gathered(voxels, places)
    for n in (0, 1, 2, 77):
        assert int(shifted(n)) == naive.shifted(n)


def test_two_threads_do_twice_the_work() -> None:
    build = partial(benchcases.enlargement_case, 5, 8, 64)
    one, two = in_threads(build, 1), in_threads(build, 2)
    assert (two.n_items, two.threads, two.peers) == (2 * one.n_items, 2, {})
    for labels, _ in two.ours():  # type: ignore[attr-defined]
        np.testing.assert_array_equal(labels, one.ours()[0])  # type: ignore[index]


def test_a_scaling_case_runs() -> None:
    build = partial(benchcases.enlargement_case, 5, 8, 64)
    found = benchcases.scaling_case(build, n_steps=1000).measure(1)
    assert found.limits == tuple(found.ratios)
    assert found.ours > 0


@pytest.mark.parametrize(
    ("pattern", "grid"), [(Block(5), ModelGrid(None)), (Block(5, (1, 3)), ModelGrid((6, 6, 9)))]
)
def test_a_whole_scan_is_segmented_in_a_process_of_its_own(pattern: Block, grid: ModelGrid) -> None:
    case = ScanCase((48, 40, 12), pattern, grid, threads=1, n_patients=1, n_per_class=8)
    found = case.measure(1)
    assert set(found.ratios) == {GUNZIP}
    assert found.ratios[GUNZIP][0] < 1
    assert found.peak_mb is None or 20 < found.peak_mb < 2000
    assert {"read", "write", "classify and enlarge"} <= set(found.seconds)
    assert sum(found.seconds.values()) <= 1.05 * found.ours


# --- measuring ------------------------------------------------------------------------------------


def test_ratios_are_of_peer_time_to_our_time_per_item() -> None:
    def rest(seconds: float) -> Any:
        return partial(time.sleep, seconds)

    case = Benchmark(
        "sleep",
        rest(0.03),
        {"slow": Peer(rest(0.09)), "a third of it": Peer(rest(0.03), 10, is_limit=True)},
        n_items=30,
        unit="naps",
        skipped=("absent",),
        threads=2,
        n_voxels=60,
        n_visits=1e6,
    )
    found = case.measure(3)
    assert (found.unit, found.limits, found.skipped) == ("naps/s", ("a third of it",), ("absent",))
    for median, low, high in found.ratios.values():
        assert low <= median <= high
        assert 2 < median < 4.5
    assert 500 < found.ours < 1000
    assert found.voxels_per_second == pytest.approx(2 * found.ours)
    # Two threads spend 30 ms each on half of a million visits.
    assert found.ns_per_visit is not None
    assert 60 < found.ns_per_visit < 120


def test_scaling_is_our_speed_up_over_that_of_the_loop() -> None:
    def rest(seconds: float) -> Any:
        return partial(time.sleep, seconds)

    found = Scaling("s", rest(0.03), rest(0.06), "loop", rest(0.03), rest(0.03)).measure(3)
    assert 0.8 < found.ours < 1.25
    assert 0.4 < found.ratios["loop"][0] < 0.65


def test_memory_is_what_a_job_holds_at_its_peak() -> None:
    def job() -> None:
        for _ in range(3):
            np.empty(4_000_000, np.uint8).fill(1)

    found = Benchmark("m", job, {}, whole=job).measure(1)
    assert found.peak_mb == pytest.approx(4, abs=0.5)


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    facts = json.dumps(bench.machine())
    assert platform.node() not in facts
    assert bench.machine()["cores"] >= 1


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--full"],
        ["--full", "--json"],
        pytest.param(["--cnn"], marks=NEEDS_JAX),
    ],
)
def test_the_command_prints_what_was_measured(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchcases, "TABLE", {"enlarge": SMALL["enlarge"]})
    slice_of = partial(benchforest.slice_case, 33, 33, TINY)
    monkeypatch.setattr(
        benchcases, "SWEEP", {("33 px", 33, n): partial(in_threads, slice_of, n) for n in (1, 2)}
    )
    monkeypatch.setattr(benchcnn, "cnn_cases", lambda: {"batch": SMALL_CNN["batch"]})
    assert run(["bench", "--quick", *flags]) == 0
    shown = capsys.readouterr().out
    if "--json" in flags:
        record = json.loads(shown)
        assert record["command"] == "organfast bench --full --quick"
        assert [c["threads"] for c in record["sweep"]] == [1, 2]
        shown = str(record)
    assert "scipy.ndimage.zoom" in shown
    assert ("stride 33" in shown) == ("--full" in flags)
    assert ("CNN readme, 33 px" in shown) == ("--cnn" in flags)
    assert ("GPU: " in shown) == ("--cnn" in flags)
    assert ("first call" in shown) == ("--cnn" in flags)


# --- results --------------------------------------------------------------------------------------


def _run(**ratios: float) -> dict[str, Any]:
    """A run with one case in the table and one in the sweep."""
    spreads = {name: (ratio, ratio / 2, 2 * ratio) for name, ratio in ratios.items()}
    table = [Comparison("one", 1234.0, "blocks/s", spreads, ("memcpy",), ("monai",))]
    dense = {
        ("17 px", stride, threads): Comparison(
            f"17 px {stride} {threads}",
            5.0,
            "positions/s",
            {"sklearn": (20.0, 19.0, 21.0)} if threads == 1 else {},
            voxels_per_second=3e6 * threads,
            ns_per_visit=1.25,
            peak_mb=77.0,
        )
        for stride in (17, 8, 4, 1)
        for threads in (1, 2)
    }
    return json.loads(json.dumps(run_record(table, dense, "make bench")))  # type: ignore[no-any-return]


def test_a_ratio_that_falls_by_more_than_a_tenth_is_flagged() -> None:
    before = _run(numpy=5.0, memcpy=0.8)
    assert publish.fallen(before, before) == []
    assert publish.fallen(before, _run(numpy=4.51, memcpy=0.9, new=0.1)) == []
    assert publish.fallen(before, _run(numpy=4.49, memcpy=0.71)) == [
        "one | numpy: was 5, is 4.49 (-10%)",
        "one | memcpy: was 0.8, is 0.71 (-11%)",
    ]
    assert publish.fallen(before, _run(numpy=5.0)) == ["one | memcpy: was 0.8, was not measured"]


def test_a_fall_in_the_sweep_is_flagged_too() -> None:
    before, now = _run(numpy=5.0), _run(numpy=5.0)
    now["sweep"][2]["ratios"]["sklearn"][0] = 10.0
    assert publish.fallen(before, now) == ["17 px 8 1 | sklearn: was 20, is 10 (-50%)"]


def test_tables_name_machine_date_command_and_every_figure() -> None:
    run = _run(numpy=5.0, memcpy=0.8)
    text = benchmark_table.tables(run)
    for part in (run["date"], run["machine"]["cpu"], "`make bench`", "left out: monai"):
        assert part in text
    assert "| one | 1,234 blocks/s | numpy | 5.0× |" in text
    assert "|  |  | limit: memcpy | 0.80× |" in text
    all_strides = "3.0 / 6.0 | " * 4
    assert f"| 17 px | {all_strides}1.25 | 77 |" in text


def test_tables_stand_between_their_comments() -> None:
    run = _run(numpy=5.0)
    before = f"# of\n{benchmark_table.BEGIN}old\n{benchmark_table.END}more\n"
    written = benchmark_table.with_tables(before, run)
    assert written.startswith(f"# of\n{benchmark_table.BEGIN}")
    assert written.endswith(f"{benchmark_table.END}more\n")
    assert "old" not in written
    assert benchmark_table.with_tables(written, run) == written
    for broken in ("# of\n", benchmark_table.END + benchmark_table.BEGIN, before + before):
        with pytest.raises(ValueError, match="on lines of their own"):
            benchmark_table.with_tables(broken, run)


@pytest.mark.skipif(not publish.RESULTS.exists(), reason="no run has been published yet")
def test_the_readme_shows_the_published_run() -> None:
    run = json.loads(publish.RESULTS.read_text("utf-8"))
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert benchmark_table.with_tables(readme, run) == readme, "python tools/benchmark_table.py"
    assert all(math.isfinite(ratio) for _, _, ratio in publish.ratios(run))


def test_published_results_name_no_machine_and_no_folder() -> None:
    for path in (REPOSITORY / "benchmarks" / "results").rglob("*.json"):
        text = path.read_text("utf-8")
        assert '"/' not in text, path.name
        assert not {"home", "root"} & set(text.replace("_", "/").split("/")), path.name


def test_asv_results_lose_the_names_of_folders(tmp_path: Path) -> None:
    raw = {
        "env_name": "existing-py_home_me_.venv_bin_python",
        "params": {"python": "/home/me/.venv/bin/python", "machine": "reference"},
        "python": "/home/me/.venv/bin/python",
        "results": {"kernels.Load.time_ours": [[1.5], [["50"]]]},
    }
    found = json.loads(publish.without_folders(json.dumps(raw)))
    assert found["env_name"] == "existing-python"
    assert found["params"] == {"python": "python", "machine": "reference"}
    assert found["results"] == raw["results"]


def test_the_asv_suite_sets_up_and_its_configuration_is_json() -> None:
    config = json.loads((REPOSITORY / "benchmarks" / "asv.conf.json").read_text())
    assert config["benchmark_dir"] == "suite"
    assert config["environment_type"] == "existing"
    suite = _load("benchmarks/suite/kernels.py")
    for name in ("Forest", "ForestInThreads", "Context", "Gather", "Enlarge", "Load"):
        assert len(getattr(suite, name).params) == len(getattr(suite, name).param_names)
    gather = suite.Gather()
    gather.setup(17, 33)
    gather.time_ours(17, 33)


@NEEDS_JAX
def test_the_whole_command_is_run_beside_gunzip(capsys: pytest.CaptureFixture[str]) -> None:
    """Once, and nothing is said of how long it took: a small scan costs the start alone."""
    command = _load("benchmarks/whole_command.py")
    command.main(["48", "48", "24", "--rounds", "1"])
    found = json.loads(capsys.readouterr().out)
    assert found["shape"] == [48, 48, 24]
    assert found["file_mb"] > 0.01
    assert [len(seconds) for seconds in found["seconds"].values()] == [1, 1]
    assert found["ratios"] == [found["ratio"]]
    assert found["peak_mb"] > 50
    with pytest.raises(SystemExit):
        command.main(["48", "48"])


@NEEDS_JAX
def test_the_asv_suite_of_the_cnn_sets_up(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = _load("benchmarks/suite/cnn.py")
    monkeypatch.setattr(suite, "SQUARE", SQUARE)
    for name in ("Readme", "Towers", "Batch"):
        timed = getattr(suite, name)
        assert len(timed.params) == len(timed.param_names)
    batch = suite.Batch()
    batch.setup(33, 4)
    batch.time_ours(33, 4)
