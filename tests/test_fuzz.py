"""A few seconds of what the fuzzers do for hours: seeded, so that a failure comes again."""

from __future__ import annotations

import importlib.util
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from organfast.models import forest as forest_module

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str) -> ModuleType:
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutants_of_a_forest_are_refused_or_walked_alike_by_all_paths() -> None:
    fuzz, counts = tool("fuzz_forest"), Counter[str]()
    for epoch in range(2):
        fuzz.fuzz_epoch(counts, fuzz.Chance(7, epoch))
    assert counts["models refused"] > 50
    assert counts["models accepted"] > 50
    assert counts["geometries refused"] > 100
    assert counts["executions"] > 4000


@pytest.mark.parametrize("check", ["_check_leaves", "_check_trees", "_check_offsets"])
def test_the_fuzzer_offers_what_each_check_refuses(
    check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz, refused = tool("fuzz_forest"), Counter[str]()
    checked = getattr(forest_module, check)

    def counting(*arguments: object) -> None:
        try:
            checked(*arguments)
        except ValueError as error:
            refused[str(error)] += 1
            raise

    monkeypatch.setattr(forest_module, check, counting)
    monkeypatch.setattr(fuzz, "SLABS_PER_MUTANT", 0)
    fuzz.fuzz_epoch(Counter(), fuzz.Chance(7, 0))
    assert refused


READER = """
import sys
sys.path.insert(0, sys.argv[1])
import random, fuzz_readers, signal
from pathlib import Path
signal.signal(signal.SIGVTALRM, fuzz_readers._too_slow)
target = fuzz_readers.Target(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[3]) / "findings")
for n in range(int(sys.argv[4])):
    target.one_input(target.made(random.Random(n)))
sys.exit(target.report())
"""


@pytest.mark.parametrize(("reader", "n"), [("nifti", 800), ("model", 300)])
def test_a_reader_gives_an_answer_or_one_line(reader: str, n: int, tmp_path: Path) -> None:
    # In a process of its own, whose memory is limited.
    done = subprocess.run(
        [sys.executable, "-c", READER, str(TOOLS), reader, str(tmp_path), str(n)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert int(counts["accepted"]) > n // 20
    assert int(counts["refused"]) > n // 3


def test_what_is_no_answer_and_no_line_is_found(tmp_path: Path) -> None:
    readers = tool("fuzz_readers")

    def fails(path: Path) -> bool:
        raise IndexError("beyond")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:  # warnings are errors here as they are there
        target = readers.Target("nifti", tmp_path, tmp_path / "findings")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    target._read = fails
    target.one_input(b"abc")
    target.one_input(b"abcd")  # the same place: counted, not kept
    assert target.counts["findings"] == 2
    assert [p.read_bytes() for p in (tmp_path / "findings").iterdir()] == [b"abc"]
    assert target.report() == 1


def test_a_walk_by_hand_finds_a_wrong_result() -> None:
    fuzz = tool("fuzz_forest")
    forest = fuzz.Forest.from_arrays(
        dict(fuzz._fresh(fuzz.Chance(0, 0))),
        np.zeros((20, 4), np.int32),
        fuzz._fresh(fuzz.Chance(0, 0))["n_classes"],
    )
    slab, found = np.zeros((1, 1, 1, 1), np.int16), np.full(forest.n_classes, 0.123)
    with pytest.raises(fuzz.WrongResult, match="by hand"):
        fuzz._check_one(forest, slab, [0, 0, 0], found)
