"""A batch on workers of Dask: the same bytes, and workers that die."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType

import pytest
from batches import (
    BARE,
    NAMES,
    Meanwhile,
    command,
    is_held,
    lines,
    statuses,
    tree,
    wait_for,
)

pytest.importorskip("distributed")

import dask
from distributed import Client, LocalCluster

from organfast import cluster as cluster_module
from organfast.batch import BatchPlan, segment_batch
from organfast.batchworker import Outcome
from organfast.cli import run
from organfast.errors import InputError
from organfast.ledger import key_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks are listed by /proc")

# So many workers may die with a scan, and one more is too many.
ALLOWED = 1


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("this test hangs")

    earlier = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)


@pytest.fixture(scope="module")
def processes() -> Iterator[LocalCluster]:
    """A scheduler, and two processes with a thread each, which come again when they are killed."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": ALLOWED}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            silence_logs=50,
        ) as workers,
    ):
        yield workers


@pytest.fixture
def two_workers(processes: LocalCluster) -> LocalCluster:
    """Both of them, those of an earlier test that were killed there again."""
    processes.wait_for_workers(2)
    return processes


def batch(scans: Path, out: Path, model: Path, workers: LocalCluster) -> list[Outcome]:
    plan = BatchPlan(scheduler=workers.scheduler_address)
    return list(segment_batch(scans, out, model, None, BARE, plan))


def arguments(scans: Path, out: Path, model: Path, scheduler: object) -> list[str]:
    options = ["-i", scans, "-o", out, "-m", model, "--scheduler", scheduler, "--no-preview"]
    return ["segment", *map(str, options)]


class Killer(Meanwhile):
    """Kills the worker that works on a scan, so many times."""

    def __init__(self, out: Path, name: str, times: int) -> None:
        super().__init__()
        self.lock = out / ".batch" / "locks" / key_of(name)
        self.times = times
        self.killed: set[int] = set()

    def run(self) -> None:
        while not self.is_over.is_set() and len(self.killed) < self.times:
            if is_held(self.lock):
                for pid in self.holders() - self.killed - {os.getpid()}:
                    os.kill(pid, signal.SIGKILL)
                    self.killed.add(pid)
            time.sleep(0.0005)

    def holders(self) -> set[int]:
        inode = self.lock.stat().st_ino
        rows = (row.split() for row in Path("/proc/locks").read_text().splitlines())
        return {int(row[4]) for row in rows if int(row[5].rpartition(":")[2]) == inode}


# --- what a run leaves ----------------------------------------------------------------------------


def test_a_cluster_leaves_what_this_machine_leaves(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path, two_workers: LocalCluster
) -> None:
    """And each worker loads the model once, whatever the number of scans and runs."""

    def count_loads() -> None:
        from organfast import batchworker

        load = batchworker.load_model
        batchworker.n_loads = 0  # type: ignore[attr-defined]

        def counted(path: object) -> object:
            batchworker.n_loads += 1  # type: ignore[attr-defined]
            return load(path)  # type: ignore[arg-type]

        batchworker.load_model = counted  # type: ignore[assignment]

    def n_loads() -> int:
        from organfast import batchworker

        return int(batchworker.n_loads)  # type: ignore[attr-defined]

    out = tmp_path / "out"
    with Client(two_workers.scheduler_address, set_as_default=False) as client:
        client.run(count_loads)
        outcomes = batch(archive, out, model_file, two_workers)
        assert statuses(outcomes) == dict.fromkeys(NAMES, "segmented")
        assert all(outcome.organs_ml and outcome.seconds > 0 for outcome in outcomes)
        assert tree(out) == tree(whole)
        kept = batch(archive, out, model_file, two_workers)
        assert statuses(kept) == dict.fromkeys(NAMES, "kept")
        loads = client.run(n_loads)
    assert set(loads.values()) == {1}
    assert len(loads) == 2


def test_what_one_machine_began_a_cluster_ends_by_its_file_and_relative_names(
    archive: Path,
    whole: Path,
    model_file: Path,
    tmp_path: Path,
    two_workers: LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(archive, tmp_path / "scans")
    (tmp_path / "scans" / "a.nii.gz").write_bytes(b"no scan")
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "q")
    monkeypatch.chdir(tmp_path)
    # What else the file of a scheduler holds is not looked at.
    told = {"type": "Scheduler", "address": two_workers.scheduler_address}
    Path("scheduler.json").write_text(json.dumps(told))
    given = arguments(Path("scans"), Path("out"), model_file, "scheduler.json")
    assert run(given) == 3
    printed = capsys.readouterr()
    assert "4 scans done (3 by an earlier run), 1 failed -> out/batch.jsonl" in printed.out
    errors = [line for line in printed.err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("organfast: scans/a.nii.gz: ")
    assert [line["input"] for line in lines(tmp_path / "out") if line["error"]] == ["a.nii.gz"]
    assert str(tmp_path) not in (tmp_path / "out" / "batch.jsonl").read_text("utf-8")


def test_the_window_is_bounded(
    archive: Path, model_file: Path, tmp_path: Path, two_workers: LocalCluster
) -> None:
    """One in, one out: who stops asking holds up all but two scans a thread."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    for n in range(12):
        shutil.copytree(archive / "p1", scans / f"p{n}")
    plan = BatchPlan(scheduler=two_workers.scheduler_address)
    outcomes = segment_batch(scans, out, model_file, None, BARE, plan)
    most = 0
    with closing(outcomes):
        for n, _ in enumerate(outcomes, 1):
            if n in (1, 4):
                time.sleep(1)
                assert len(list((out / ".batch" / "records").iterdir())) <= n + 4
            most = max(most, len(two_workers.scheduler.tasks))
    assert 2 <= most <= 5  # four in flight, and the one that was just told of
    assert len(lines(out)) == 12


# --- workers that die -----------------------------------------------------------------------------


def test_a_worker_is_killed_and_its_scan_is_retried(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path, two_workers: LocalCluster
) -> None:
    out = tmp_path / "out"
    with Killer(out, "p2/deep/ct.nii.gz", times=1) as killer:
        outcomes = batch(archive, out, model_file, two_workers)
    assert len(killer.killed) == 1
    # What the worker had finished and could not tell of any more is found finished.
    assert set(statuses(outcomes).values()) <= {"segmented", "kept"}
    assert sorted(outcome.scan.name for outcome in outcomes) == sorted(NAMES)
    assert tree(out) == tree(whole)


def test_a_scan_that_kills_every_worker_is_one_failed_scan(
    archive: Path,
    whole: Path,
    model_file: Path,
    tmp_path: Path,
    two_workers: LocalCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, name = tmp_path / "out", "p1/ct.nii.gz"
    with Killer(out, name, times=99) as killer:
        given = arguments(archive, out, model_file, two_workers.scheduler_address)
        assert run(given) == 3
    # Beside others, and alone; a worker may also have been lost while the scan waited there.
    assert ALLOWED + 1 <= len(killer.killed) <= 2 * (ALLOWED + 1)
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"organfast: {archive / name}: ended the workers that segmented it")
    # A scan that was finished when its worker was killed counts as found finished.
    assert re.search(r"4 scans done( \(\d by an earlier run\))?, 1 failed", told.out)
    assert {str(line["input"]) for line in lines(out) if line["error"]} == {name}
    assert str(lines(out)[1]["error"]).startswith("ended the workers that segmented it, 2 of them")
    assert not (out / "p1").exists()

    # Nobody kills any more.
    again = batch(archive, out, model_file, two_workers)
    assert statuses(again) == {**dict.fromkeys(NAMES, "kept"), name: "segmented"}
    assert tree(out) == tree(whole)


def test_a_signal_ends_it_and_the_same_command_goes_on(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path, two_workers: LocalCluster
) -> None:
    out = tmp_path / "out"
    process = command(*arguments(archive, out, model_file, two_workers.scheduler_address))
    wait_for(out / ".batch" / "locks" / key_of(NAMES[0]))
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=180)
    # It may just have ended.
    assert process.returncode in (0, 1), errors
    if process.returncode == 1:
        assert errors.splitlines()[-1].endswith("the same command goes on from here")
    assert "Traceback" not in errors
    outcomes = batch(archive, out, model_file, two_workers)
    assert set(statuses(outcomes).values()) <= {"kept", "segmented"}
    assert tree(out) == tree(whole)


# --- schedulers -----------------------------------------------------------------------------------


def test_a_scheduler_that_cannot_be_reached_is_one_line(
    archive: Path,
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster_module, "_REACH", 0.5)
    out, nobody = tmp_path / "out", "tcp://127.0.0.1:1"
    (tmp_path / "none.json").write_text("[]")
    for scheduler, begins, ends, code in (
        (nobody, f"{nobody}: is no scheduler that can be reached (", "its port is open", 1),
        (tmp_path / "no.json", f"{tmp_path}/no.json: is no scheduler file", "-file wrote", 1),
        (tmp_path / "none.json", f"{tmp_path}/none.json: names no address", "-file wrote", 1),
        ("somewhere", "the scheduler somewhere is neither", "--scheduler-file", 2),
    ):
        assert run(arguments(archive, out, model_file, scheduler)) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"organfast: {begins}")
        assert line.endswith(ends)
        assert not out.exists()


def test_a_scheduler_without_workers_and_one_that_goes(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "_REACH", 2.0)
    monkeypatch.setattr(cluster_module, "_START", 0.5)
    out = tmp_path / "out"
    with LocalCluster(
        n_workers=0, processes=False, dashboard_address=":0", protocol="tcp://", silence_logs=50
    ) as here:
        with pytest.raises(InputError, match="has no workers; start some: dask worker tcp://"):
            batch(archive, out, model_file, here)
        assert not out.exists()
        here.scale(1)
        here.wait_for_workers(1)
        plan = BatchPlan(scheduler=here.scheduler_address)
        outcomes = segment_batch(archive, out, model_file, None, BARE, plan)
        assert next(outcomes).status == "segmented"
        here.close()
        with pytest.raises(InputError, match=r"can no longer be reached; .* goes on from here"):
            list(outcomes)
    statuses_then = statuses(list(segment_batch(archive, out, model_file, None, BARE)))
    assert "kept" in statuses_then.values()
    assert tree(out) == tree(whole)


def test_what_is_of_this_machine_does_not_go_with_a_scheduler() -> None:
    with pytest.raises(ValueError, match="leave workers"):
        BatchPlan(workers=2, scheduler="tcp://host:8786")
    with pytest.raises(ValueError, match="--memory-limit"):
        BatchPlan(max_memory_gb=2, scheduler="tcp://host:8786")
