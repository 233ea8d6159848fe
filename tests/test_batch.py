"""Batches: what is finished stays, what was interrupted goes on, and one bad scan is one line."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
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

import organfast as of
from organfast.batch import BatchPlan, segment_batch
from organfast.batchinputs import find_inputs, is_in_shard, parse_shard
from organfast.batchworker import Outcome, Outputs
from organfast.cli import run
from organfast.errors import InputError
from organfast.ledger import Ledger, key_of, tree_digests
from organfast.ledgers import merge
from organfast.memory import resident_bytes, scan_bytes
from organfast.models.classifier import load_model, save_model
from organfast.nifti import write_volume


@pytest.fixture
def copied(archive: Path, tmp_path: Path) -> Path:
    """The archive, to be changed."""
    return Path(shutil.copytree(archive, tmp_path / "copied"))


def batch(scans: object, out: Path, model: Path, plan: BatchPlan | None = None) -> list[Outcome]:
    return list(segment_batch(scans, out, model, None, BARE, plan, threads=2))


# --- what a run leaves ----------------------------------------------------------------------------


def test_the_tree_is_mirrored_and_recorded(archive: Path, whole: Path, model_file: Path) -> None:
    outputs = ["a", "p1", "p2/deep", "p3/Lungen_ärztlich", "q"]
    assert [line["input"] for line in lines(whole)] == list(NAMES)
    assert [line["output"] for line in lines(whole)] == outputs
    text = (whole / "batch.jsonl").read_text("utf-8")
    assert str(archive) not in text
    assert str(whole) not in text
    assert "seconds" not in text
    for line in lines(whole):
        digests = tree_digests(whole / str(line["output"]))
        assert line["files"] == digests
        assert {"segmentation.nii.gz", "organs.json", "run.json"} <= digests.keys()
        made = json.loads((whole / str(line["output"]) / "run.json").read_text("utf-8"))
        assert line["input_sha256"] == made["input"]
        assert line["model_sha256"] == made["model"] == load_model(model_file).digest
        assert line["organfast"] == of.__version__
        assert line["error"] is None
        asked = {"preview": False, "probabilities": [], "report": False, "types": ["nifti"]}
        assert line["parameters"]["outputs"] == asked
    timings = lines(whole, "timings.jsonl")
    assert [line["input"] for line in timings] == list(NAMES)
    assert all(line["seconds"]["save"] > 0 for line in timings)
    assert list((whole / ".batch" / "work").iterdir()) == []


def test_a_batch_gives_what_a_single_scan_gives(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path
) -> None:
    result = of.segment(archive / NAMES[1], model_file)
    result.save(tmp_path / "single", preview=False)
    assert tree(tmp_path / "single") == tree(whole / "p1")


def test_workers_leave_the_same_and_progress_counts_scans(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    out, two = tmp_path / "out", BatchPlan(workers=2)
    outcomes = segment_batch(
        archive, out, model_file, None, BARE, two, progress=lambda *step: seen.append(step)
    )
    assert {outcome.status for outcome in outcomes} == {"segmented"}
    assert seen == [("scans", n, 5) for n in (1, 2, 3, 4, 5)]
    assert tree(out) == tree(whole)


def test_one_bad_scan_is_one_line_and_the_rest_goes_on(
    copied: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "p1" / "ct.nii.gz").write_bytes((copied / "a.nii.gz").read_bytes()[:-2000])
    out = tmp_path / "out"
    arguments = ["segment", "-i", copied, "-o", out, "-m", model_file, "--no-preview"]
    assert run([str(a) for a in arguments]) == 3
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"organfast: {copied / 'p1' / 'ct.nii.gz'}: is ")
    assert "4 scans done, 1 failed" in told.out
    bad = lines(out)[1]
    assert (bad["input"], bad["files"]) == ("p1/ct.nii.gz", {})
    assert errors[0].endswith(str(bad["error"]))
    assert not (out / "p1").exists()
    assert len(list(out.glob("**/segmentation.nii.gz"))) == 4

    # What failed is tried again, and only that.
    shutil.copy(copied / "a.nii.gz", copied / "p1" / "ct.nii.gz")
    kept = statuses(batch(copied, out, model_file))
    assert kept == {**dict.fromkeys(NAMES, "kept"), "p1/ct.nii.gz": "segmented"}


# --- what is finished -----------------------------------------------------------------------------


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """The output of a run, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


def test_what_is_finished_is_kept_and_what_is_somebody_elses_too(
    archive: Path, finished: Path, model_file: Path
) -> None:
    (finished / "p1" / "notes.txt").write_text("mine")
    before = inodes(finished)
    outcomes = batch(archive, finished, model_file)
    assert statuses(outcomes) == {**dict.fromkeys(NAMES, "kept"), "p1/ct.nii.gz": "failed"}
    assert "holds other files" in str([o.error for o in outcomes if o.error is not None])
    assert all(o.organs_ml for o in outcomes if o.error is None)
    assert inodes(finished) == before


def inodes(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in out.glob("[!.]*/**/*")}


def test_what_was_tampered_with_is_done_again(
    copied: Path, whole: Path, finished: Path, model_file: Path
) -> None:
    """A byte changed, a file removed, a record gone, a record damaged; and another scan."""
    labels = finished / "a" / "segmentation.nii.gz"
    content = bytearray(labels.read_bytes())
    content[-1] ^= 1
    labels.write_bytes(content)
    (finished / "p1" / "segmentation.nii.gz").unlink()
    records = [finished / ".batch" / "records" / f"{key_of(name)}.json" for name in NAMES]
    records[2].unlink()
    records[3].write_bytes(records[3].read_bytes()[:100])
    done = statuses(batch(copied, finished, model_file))
    assert done == {**dict.fromkeys(NAMES, "segmented"), "q.nii": "kept"}
    assert tree(finished) == tree(whole)

    image = nib.load(copied / "q.nii")
    turned = np.asanyarray(image.dataobj)[:, :, ::-1].copy()
    nib.save(nib.Nifti1Image(turned, image.affine), copied / "q.nii")
    done = statuses(batch(copied, finished, model_file))
    assert done == {**dict.fromkeys(NAMES, "kept"), "q.nii": "segmented"}


def test_another_model_or_setting_does_it_again(
    archive: Path, finished: Path, model_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.organfast"
    save_model(replace(load_model(model_file), stride=(1, 8, 8)), other)
    for settings, file in ((None, other), (of.Settings(stride=9), other)):
        outcomes = list(segment_batch(archive / "a.nii.gz", finished, file, settings, BARE))
        assert statuses(outcomes) == {"a.nii.gz": "segmented"}
    assert lines(finished)[0]["parameters"]["stride"] == 9
    assert [line["input"] for line in lines(finished)] == list(NAMES)


# --- interruption ---------------------------------------------------------------------------------


def test_killed_at_any_instant_it_goes_on(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("segment", "-i", archive, "-o", out, "-m", model_file, "--no-preview")
    draw = np.random.default_rng(0)
    left = []
    for n in range(4):
        process = command(*arguments, "--workers", 1 + n % 2)
        # Python and the model take a while: from the first folder on there is something to break.
        until = time.monotonic() + 60
        while not (out / ".batch" / "work").is_dir() and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(float(draw.uniform(0, 0.5)) if n == 0 else float(draw.uniform(0.6, 2.2)))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        left.append(len(list((out / ".batch" / "records").iterdir())))
        # Nothing is in place by half, whatever has a record or not.
        for folder in {p.parent for p in out.glob("*/**/segmentation.nii.gz")}:
            if ".batch" not in folder.parts:
                assert {"run.json", "organs.json", "timings.json"} <= set(os.listdir(folder))
        if n == 2:  # what a crash leaves: files half-written, in nobody's hands
            work = out / ".batch" / "work" / key_of("q.nii") / "result"
            work.mkdir(parents=True, exist_ok=True)
            (work / "segmentation.nii.gz").write_bytes(b"half")
    assert left == sorted(left)
    process = command(*arguments)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert tree(out) == tree(whole)


def test_a_signal_ends_it_and_says_what_goes_on(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("segment", "-i", archive, "-o", out, "-m", model_file, "--no-preview")
    process = command(*arguments)
    wait_for(out / ".batch" / "records" / f"{key_of(NAMES[0])}.json")
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    # It may just have ended.
    assert process.returncode in (0, 1), errors
    if process.returncode == 1:
        assert errors.splitlines()[-1].endswith("the same command goes on from here")
        assert len(errors.splitlines()) == 1 + errors.count("warning")
    recorded = lines(out)
    assert NAMES[0] in [line["input"] for line in recorded]
    assert all(line in lines(whole) for line in recorded)


def test_who_stops_asking_ends_the_workers(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcomes = segment_batch(archive, out, model_file, None, BARE)
    next(outcomes)
    children = workers_of_this_process()
    assert children
    outcomes.close()
    assert not workers_of_this_process()
    assert lines(out)
    assert "kept" in statuses(batch(archive, out, model_file)).values()
    assert tree(out) == tree(whole)


def workers_of_this_process() -> list[int]:
    """Children that segment, as Linux lists them."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                line = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"batchworker" in line:
                found.append(int(child))
    return found


class Killer(Meanwhile):
    """Kills the workers of this process whenever a scan is in work."""

    def __init__(self, out: Path, name: str, times: int) -> None:
        super().__init__()
        self.times, self.killed = times, 0
        self.lock = out / ".batch" / "locks" / key_of(name)

    def run(self) -> None:
        while not self.is_over.is_set() and self.killed < self.times:
            if self.is_held():
                for worker in workers_of_this_process():
                    os.kill(worker, signal.SIGKILL)
                self.killed += 1
                while self.is_held() and not self.is_over.is_set():
                    time.sleep(0.001)
            time.sleep(0.0005)

    def is_held(self) -> bool:
        return is_held(self.lock)


@pytest.mark.skipif(sys.platform != "linux", reason="children are listed by /proc")
def test_a_scan_that_kills_its_worker_twice_has_failed(
    archive: Path, model_file: Path, tmp_path: Path
) -> None:
    """And those that were in the same worker have not."""
    out, name = tmp_path / "out", "p2/deep/ct.nii.gz"
    with Killer(out, name, times=2) as killer:
        outcomes = batch(archive, out, model_file)
    assert killer.killed == 2
    assert statuses(outcomes) == {**dict.fromkeys(NAMES, "segmented"), name: "failed"}
    record = Ledger(out).record(name)
    assert record is not None
    assert "twice (SIGKILL)" in str(record["error"])
    assert not (out / "p2" / "deep").exists()


def test_a_worker_that_cannot_begin_is_an_error(
    archive: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(InputError, match=r"before its first scan \(exit code 1\)"):
        batch(archive, tmp_path / "out", model_file)


# --- several runs ---------------------------------------------------------------------------------


def test_two_runs_share_the_work(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("segment", "-i", archive, "-o", out, "-m", model_file, "--no-preview", "--json")
    runs = [command(*arguments) for _ in range(2)]
    told = [process.communicate(timeout=90) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], told
    made = [json.loads(line) for text, _ in told for line in text.splitlines()]
    segmented = sorted(line["input"] for line in made if line["status"] == "segmented")
    assert segmented == sorted(str(archive / name) for name in NAMES)
    assert tree(out) == tree(whole)


def test_a_scan_in_other_hands_is_left_there(
    archive: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ledger = Ledger(out)
    ledger.open([])
    claim = ledger.claim("p1/ct.nii.gz")
    assert claim is not None
    assert ledger.claim("p1/ct.nii.gz") is None
    outcomes = statuses(batch(archive, out, model_file))
    assert outcomes == {**dict.fromkeys(NAMES, "segmented"), "p1/ct.nii.gz": "elsewhere"}
    assert not (out / "p1").exists()
    claim.release()
    again = Ledger(out).claim("p1/ct.nii.gz")
    assert again is not None
    again.release()


def test_shards_merge_into_the_whole(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["segment", "-i", archive, "-o", out, "-m", model_file, "--no-preview"]
    assert run([str(a) for a in (*arguments, "--shard", "1/2")]) == 0
    first = {str(line["input"]) for line in lines(out)}
    assert first == {name for name in NAMES if is_in_shard(name, (1, 2))}
    assert 0 < len(first) < len(NAMES)
    capsys.readouterr()

    assert run(["merge", str(out)]) == 3
    told = capsys.readouterr()
    missing = [line.split(": ")[1] for line in told.err.splitlines()]
    assert missing == sorted(set(NAMES) - first)

    assert run([str(a) for a in (*arguments, "--shard", "2/2")]) == 0
    assert run(["merge", str(out)]) == 0
    assert "5 scans done, 0 failed, 0 missing" in capsys.readouterr().out
    assert tree(out) == tree(whole)


def test_shards_in_folders_of_their_own(whole: Path, tmp_path: Path) -> None:
    outs = [Path(shutil.copytree(whole, tmp_path / name)) for name in ("one", "two")]
    paths = {
        name: [out / ".batch" / "records" / f"{key_of(name)}.json" for out in outs]
        for name in NAMES
    }
    for name, (first, second) in paths.items():
        (second if is_in_shard(name, (1, 2)) else first).unlink()
    merged = merge(outs)
    assert not merged.missing
    assert not merged.failed
    assert (outs[0] / "batch.jsonl").read_bytes() == (whole / "batch.jsonl").read_bytes()
    assert merge(outs[1:]).missing == tuple(n for n in NAMES if is_in_shard(n, (1, 2)))

    # A failure gives way to a success of another folder, and two successes must agree.
    name = next(n for n in NAMES if is_in_shard(n, (2, 2)))
    success = json.loads(paths[name][1].read_text("utf-8"))
    paths[name][0].write_text(json.dumps({**success, "files": {}, "error": "is empty"}))
    assert not merge(outs).failed
    assert [record["input"] for record in merge(outs[:1]).failed] == [name]
    paths[name][0].write_text(json.dumps({**success, "model_sha256": "0"}))
    with pytest.raises(InputError, match="another result of"):
        merge(outs)
    with pytest.raises(InputError, match="holds no batch"):
        merge([tmp_path])


def test_shards_part_the_names_and_stay() -> None:
    names = [f"p{n}/ct.nii.gz" for n in range(200)]
    parts = [{name for name in names if is_in_shard(name, (i, 4))} for i in range(1, 5)]
    assert set().union(*parts) == set(names)
    assert sum(map(len, parts)) == len(names)
    assert min(map(len, parts)) > 30
    # By hand: sha256 of the name, 32 digits, modulo 4.
    assert [is_in_shard("a", (i, 4)) for i in (1, 2, 3, 4)] == [
        int("ca978112ca1bbdcafac231b39a23dc4d", 16) % 4 == i for i in range(4)
    ]
    assert parse_shard("3/4") == (3, 4)
    for text in ("0/4", "5/4", "1", "1/0", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="is not i/N"):
            parse_shard(text)


# --- memory and disk ------------------------------------------------------------------------------


def test_a_scan_too_large_for_the_memory_allowed_is_refused_in_words(
    archive: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    shutil.copy(archive / "a.nii.gz", scans / "a.nii.gz")
    # Refused by its header: nobody reads its 2.4 GB of voxels, which are not there.
    header = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.diag([0.5, 0.5, 0.5, 1])).header
    header.set_data_shape((1000, 1000, 1200))
    header["vox_offset"] = 352
    with open(scans / "huge.nii", "wb") as file:
        file.write(header.binaryblock + bytes(4))
        file.truncate(352 + 2 * 1000 * 1000 * 1200)
    out = tmp_path / "out"
    outcomes = batch(scans, out, model_file, BatchPlan(workers=2, max_memory_gb=2))
    assert statuses(outcomes) == {"a.nii.gz": "segmented", "huge.nii": "failed"}
    refused = str(lines(out)[1]["error"])
    # Labels and confidence: the voxels of a mapped file are the system's to hold or drop.
    assert refused.startswith("needs about 2.2 GB of memory beside the program"), refused
    assert "the 2 GB allowed" in refused
    assert not (out / "huge").exists()
    single = ["segment", "-i", scans / "huge.nii", "-o", tmp_path / "one", "-m", model_file]
    assert run([str(a) for a in (*single, "--max-memory", "2GB")]) == 1
    assert re.search(r"needs about \d\.\d GB of memory, more than 2 GB", capsys.readouterr().err)


def test_what_is_in_flight_stays_within_the_memory_allowed(
    archive: Path, whole: Path, model_file: Path, tmp_path: Path
) -> None:
    """Just enough for one scan at a time, whatever the number of workers and what this holds."""
    allowed = resident_bytes() / (1 << 30) + 0.25
    out = tmp_path / "out"
    outcomes = segment_batch(
        archive, out, model_file, None, BARE, BatchPlan(workers=4, max_memory_gb=allowed)
    )
    most = 0
    done = []
    for outcome in outcomes:
        done.append(outcome.status)
        most = max(most, len(workers_of_this_process()))
    assert done == ["segmented"] * len(NAMES)
    assert 1 <= most < 4
    assert tree(out) == tree(whole)


def test_bytes_of_a_scan_are_counted_from_its_header(archive: Path, model_file: Path) -> None:
    model = load_model(model_file)
    small = scan_bytes(archive / "a.nii.gz", model, of.Settings())
    mapped = scan_bytes(archive / "a.nii.gz", model, of.Settings(probabilities=("liver",)))
    assert small is not None
    assert mapped is not None
    n = 50 * 50 * 20
    # A byte a voxel, and a float32 a position.
    assert mapped - small == n + 4 * (n // math.prod(model.stride))
    assert small >= n * (2 + 1 + 1 + 2)
    assert scan_bytes(archive / "missing.nii", model, of.Settings()) is None
    adapted = scan_bytes(archive / "a.nii.gz", model, of.Settings(adapt=True))
    assert adapted is not None
    # A float32 of each class at each position and, of so few slices, at each voxel; eleven more at
    # each position while an organ is weighed up.
    n_positions = n // math.prod(model.stride)
    assert adapted - small == 4 * (len(model.classes) * (n + n_positions) + 11 * n_positions)
    own = replace(model, adapt=of.Adapt())
    assert scan_bytes(archive / "a.nii.gz", own, of.Settings()) == adapted


def test_workers_of_a_batch_adapt_as_a_single_scan_does(
    archive: Path, model_file: Path, tmp_path: Path
) -> None:
    out, one = tmp_path / "out", tmp_path / "one"
    command = ["segment", "-m", str(model_file), "--adapt", "--no-preview", "--threads", "2"]
    scans = [f"-i{archive / name}" for name in ("p1/ct.nii.gz", "q.nii")]
    assert run([*command, *scans, "-o", str(out), "--workers", "2"]) == 0
    assert run([*command, f"-i{archive / 'q.nii'}", "-o", str(one)]) == 0
    assert [line["parameters"]["adapt"] for line in lines(out)] == [True, True]
    for name in ("segmentation.nii.gz", "run.json"):
        assert (out / "q" / name).read_bytes() == (one / name).read_bytes()
    record = json.loads((one / "run.json").read_text())
    assert record["settings"]["adapt"]["core"] == 0.7
    assert set(record["adapted"]) >= {"core_positions", "abstained"}
    # Without it, it is another result, and made anew.
    stamp = (out / "q" / "run.json").stat().st_mtime_ns
    without = ["segment", "-m", str(model_file), "--no-adapt", "--no-preview"]
    assert run([*without, *scans, "-o", str(out)]) == 0
    assert [line["parameters"]["adapt"] for line in lines(out)] == [False, False]
    assert (out / "q" / "run.json").stat().st_mtime_ns > stamp
    assert json.loads((out / "q" / "run.json").read_text())["adapted"] is None


MEASURE = """
import sys
import organfast as of
from organfast.batchworker import Outputs
from organfast.memory import LIBRARIES, resident_bytes, scan_bytes
from organfast.results import peak_memory_mb
scan, out = sys.argv[1], sys.argv[3]
model = of.load_model(sys.argv[2])
settings = of.Settings(adapt=sys.argv[4] == "adapted")
before = resident_bytes()
Outputs(preview=False).save(of.segment(scan, model, settings, threads=2), out)
sys.stdout.write(f"{LIBRARIES + scan_bytes(scan, model, settings)} ")
sys.stdout.write(f"{peak_memory_mb() * 2**20 - before}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("how", ["plain", "adapted"])
def test_the_estimate_covers_what_a_scan_takes(model_file: Path, tmp_path: Path, how: str) -> None:
    """And is not so far above it that half of the memory would stay unused."""
    hu = np.full((320, 320, 200), -1000, np.int16, order="F")
    hu[40:280, 60:260] = 40
    scan = tmp_path / "scan.nii.gz"
    write_volume(scan, of.Volume(hu, np.diag([1.2, 1.2, 2.0, 1.0])))
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(scan), str(model_file), str(tmp_path / "out"), how],
        capture_output=True,
        text=True,
        check=True,
    )
    estimate, grown = map(float, measured.stdout.split())
    assert grown <= estimate <= 2 * grown


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_it_and_room_lets_it_go_on(
    archive: Path,
    whole: Path,
    model_file: Path,
    tiny_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tiny_disk / "out"
    arguments = ["segment", "-i", archive, "-o", out, "-m", model_file, "--no-preview"]
    assert run([str(a) for a in arguments]) == 3
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"organfast: {out}: is on a full disk; make room")
    assert os.strerror(errno.ENOSPC) in told[-2]
    done = [p.parent for p in out.glob("**/segmentation.nii.gz")]
    assert 1 <= len(done) < len(NAMES)
    assert not any(".batch" in folder.parts for folder in done)
    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)
    outcomes = statuses(batch(archive, out, model_file))
    assert list(outcomes.values()).count("kept") == len(done)
    assert tree(out) == tree(whole)


def test_an_output_folder_that_cannot_be_written(
    archive: Path, model_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        batch(archive, tmp_path / "file", model_file)
    with pytest.raises(InputError, match="cannot be written"):
        batch(archive, tmp_path / "file" / "out", model_file)
    if os.geteuid():
        (tmp_path / "closed").mkdir(0o555)
        with pytest.raises(InputError, match="cannot be written"):
            batch(archive, tmp_path / "closed" / "out", model_file)


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"max_memory_gb": 0.0},
        {"shard": (0, 2)},
        {"shard": (3, 2)},
        {"workers": 1.5},
    ],
)
def test_a_plan_is_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BatchPlan(**wrong)  # type: ignore[arg-type]


def test_bad_calls_are_told_before_any_work(
    archive: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="labels alone need"):
        segment_batch(archive, out, model_file, of.Settings(confidence=False))
    with pytest.raises(ValueError, match="heart"):
        segment_batch(archive, out, model_file, None, Outputs(probabilities=("heart",)))
    with pytest.raises(ValueError, match="leave --device"):
        segment_batch(archive, out, model_file, None, None, BatchPlan(device="gpu"))
    assert not out.exists()


# --- inputs ---------------------------------------------------------------------------------------


def named(given: object, out: str = "out") -> dict[str, str]:
    return {found.name: found.output for found in find_inputs(given, out)}  # type: ignore[arg-type]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders_are_searched_to_the_bottom_and_links_lead_nowhere_twice(tmp_path: Path) -> None:
    root, far = tmp_path / "root", tmp_path / "far"
    touch(root / "1/2/3/4/5/x.nii.gz", root / ".hidden/y.nii.gz", far / "z.nii.gz")
    (root / "1" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "1")
    (root / "far").symlink_to(far)
    (far / "back").symlink_to(root)
    assert named(root) == {"1/2/3/4/5/x.nii.gz": "1/2/3/4/5/x", "far/z.nii.gz": "far/z"}


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in/a/ct.nii.gz", tmp_path / "in/b.nii", tmp_path / "other/c.nii.gz")
    text = tmp_path / "in" / "scans.txt"
    text.write_text("# two\na/ct.nii.gz\n\n  b.nii\n", encoding="utf-8")
    expected = {"a/ct.nii.gz": "a", "b.nii": "b"}
    assert named(text) == expected
    monkeypatch.chdir(tmp_path / "in")
    assert named("scans.txt") == expected
    # Beyond the list's folder: named from the folder that holds all of them.
    text.write_text(f"a/ct.nii.gz\n../other/c.nii.gz\n{tmp_path / 'gone.nii.gz'}\n")
    assert named(text) == {
        "in/a/ct.nii.gz": "in/a",
        "other/c.nii.gz": "other/c",
        "gone.nii.gz": "gone",
    }
    text.write_text("\n# nothing\n")
    with pytest.raises(InputError, match="names no scan"):
        named(text)
    with pytest.raises(InputError, match="does not exist"):
        named(tmp_path / "no.txt")


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "d/a/ct.nii.gz", tmp_path / "d/b/ct.nii.gz", tmp_path / "d/b/ct_seg.nii.gz")
    touch(tmp_path / "d/out/x/segmentation.nii.gz", tmp_path / "d/[odd].nii.gz")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert named(f"{tmp_path}/d/*/ct.nii.gz") == {"a/ct.nii.gz": "a", "b/ct.nii.gz": "b"}
    everything = {"a/ct.nii.gz": "a", "b/ct.nii.gz": "b", "[odd].nii.gz": "[odd]"}
    assert named(f"{tmp_path}/d/**/*.nii.gz") == everything
    monkeypatch.chdir(tmp_path / "d")
    assert named("?/ct.nii.gz") == {"a/ct.nii.gz": "a", "b/ct.nii.gz": "b"}
    assert named("[odd].nii.gz") == {"[odd].nii.gz": "[odd]"}  # is there
    with pytest.raises(InputError, match=r"matches no scan; .*quotes"):
        named("*.dcm")


def test_names_are_apart_and_stay_inside(tmp_path: Path) -> None:
    touch(tmp_path / "a/x.nii.gz", tmp_path / "b/x.nii.gz", tmp_path / ".batch.nii.gz")
    with pytest.raises(ValueError, match="two scans are called x;"):
        named([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="two scans are called x;"):
        named([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(InputError, match="no usable name"):
        named(tmp_path / ".batch.nii.gz")
    for name in ("..", "../x.nii.gz", "a/../../x.nii.gz"):
        for found in find_inputs([tmp_path / "a" / name], "out"):
            assert ".." not in Path(found.output).parts
    touch(tmp_path / "c/y/ct.nii.gz", tmp_path / "c/y/z.nii.gz")
    with pytest.raises(ValueError, match="out/y/z would lie in that of"):
        named(tmp_path / "c")
