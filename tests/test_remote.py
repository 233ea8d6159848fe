"""Scans and results on object storage: what is finished, what is not, and what is said of a URL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batches import BARE, NAMES, lines, statuses, tree

pytest.importorskip("fsspec")

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

import organfast as of
from organfast import batch as batch_module
from organfast.batch import BatchPlan, segment_batch
from organfast.batchinputs import BatchInput, find_inputs
from organfast.batchworker import Desk, Job, Outcome
from organfast.cli import run
from organfast.errors import InputError, is_transient
from organfast.ledger import key_of
from organfast.ledgers import ledger_of, merge
from organfast.models.classifier import Model, load_model
from organfast.remote import Store, fetched, find_urls, is_url, shown


class Unsteady(MemoryFileSystem):  # type: ignore[misc]
    """A store that does so many writes and then none, and may fail some reads."""

    protocol = "unsteady"
    store: dict[str, Any] = {}  # noqa: RUF012  # the class's, as its parent's
    pseudo_dirs = [""]  # noqa: RUF012
    writes_left = 10**6
    reads_to_fail: list[Exception] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = str(path).removeprefix("unsteady://").rpartition("@")[2].strip("/")
        return f"/{path}" if path else ""

    def _write(self) -> None:
        if Unsteady.writes_left == 0:
            raise PermissionError("no more, says me:secret@store")
        Unsteady.writes_left -= 1

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self._write()
        super().pipe_file(path, value, *args, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._write()
        super().put_file(lpath, rpath, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        self._write()
        super().rm_file(path)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        if Unsteady.reads_to_fail:
            raise Unsteady.reads_to_fail.pop()
        super().get_file(rpath, lpath, *args, **kwargs)


fsspec.register_implementation("unsteady", Unsteady)


@pytest.fixture(autouse=True)
def clear() -> Iterator[None]:
    """Stores that are empty and steady."""
    for kind in (MemoryFileSystem, Unsteady):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Unsteady.writes_left, Unsteady.reads_to_fail = 10**6, []
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return load_model(model_file)


def put(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            Store(url).put(path, path.relative_to(folder).as_posix())


def got(url: str) -> dict[str, bytes]:
    """Every file but those of timings."""
    system, root = fsspec.core.url_to_fs(url)
    files = system.find(root)
    names = {file: file[len(root) :].lstrip("/") for file in files}
    return {name: system.cat_file(file) for file, name in names.items() if "timings" not in name}


def expected(whole: Path) -> dict[str, bytes]:
    """What a store holds of such a run: no folders and no locks."""
    files = {name: content for name, content in tree(whole).items() if content is not None}
    return {n: c for n, c in files.items() if not n.startswith((".batch/lock", ".batch/work"))}


def here(scans: tuple[BatchInput, ...], job: Job, model: Model) -> list[Outcome]:
    """The scans of a batch in this process, whose memory is the store."""
    ledger = ledger_of(job.out)
    ledger.open([scan.name for scan in scans])
    outcomes: list[Outcome] = []
    Desk(job, model, outcomes.append).work(scans)
    ledger.gather()
    return outcomes


def job_of(out: str, model_file: Path, model: Model, scratch: Path) -> Job:
    return Job(out, model_file, model.digest, "auto", of.Settings(), BARE, 1, str(scratch))


# --- names ----------------------------------------------------------------------------------------


def test_urls_and_how_they_are_shown() -> None:
    assert all(map(is_url, ("s3://b", "gs://b/x", "simplecache::s3://b", "file:///a")))
    assert not any(map(is_url, ("a/b.nii", "C:\\x", "a:b", Path("s3://b"))))
    assert shown("sftp://me:p@ss@host/a@b.nii") == "sftp://host/a@b.nii"
    assert shown("https://host/a.nii?X-Amz-Signature=secret") == "https://host/a.nii"
    assert shown("s3://b/odd?.nii") == "s3://b/odd?.nii"
    secret = "sftp://me:secret@host/a.nii.gz"
    scan = BatchInput("a.nii.gz", "a", secret)
    assert "secret" not in repr(scan) + scan.shown
    assert "secret" not in repr(Store(secret)) + repr(ledger_of(secret))


def test_folders_patterns_files_and_lists(archive: Path, tmp_path: Path) -> None:
    put(archive, "memory://bucket/cases")
    for name in (".hidden/x.nii.gz", "b_seg.nii.gz", "r/segmentation.nii.gz", "notes.txt"):
        Store("memory://bucket/cases").write(name, b"")
    base = "memory://bucket/cases"

    def found(given: str) -> list[BatchInput]:
        return list(find_inputs(given, "out"))

    assert [(one.name, one.output) for one in found(base)] == [
        (one.name, one.output) for one in find_inputs(archive, "out")
    ]
    assert [one.path for one in found(base + "/")] == [f"{base}/{name}" for name in NAMES]
    assert [one.name for one in found(f"{base}/*/ct.nii.gz")] == ["p1/ct.nii.gz"]
    assert [one.name for one in found(f"{base}/p*/**/*.nii.gz")] == list(NAMES[1:4])
    assert [one.name for one in found("memory://bucket/*/q.nii")] == ["cases/q.nii"]
    # It is found out on reading whether it is there.
    assert found(f"{base}/no.nii.gz") == [BatchInput("no.nii.gz", "no", f"{base}/no.nii.gz")]
    assert found(f"{base}/series.zip")[0].output == "series"
    (tmp_path / "list.txt").write_text(f"# two\n{base}/p1/ct.nii.gz\n{base}/q.nii\n")
    assert [(o.name, o.path) for o in found(str(tmp_path / "list.txt"))] == [
        ("p1/ct.nii.gz", f"{base}/p1/ct.nii.gz"),
        ("q.nii", f"{base}/q.nii"),
    ]
    (tmp_path / "list.txt").write_text(f"{base}/p1/ct.nii.gz\nq.nii\n")
    with pytest.raises(InputError, match="names paths and URLs"):
        found(str(tmp_path / "list.txt"))
    for nothing in (f"{base}/empty", f"{base}/*.dcm"):
        with pytest.raises(InputError, match="holds no scan"):
            found(nothing)


def test_what_is_missing_is_named_by_its_pip_package() -> None:
    with pytest.raises(InputError, match=r"^gs://b/x: needs gcsfs, .*; pip install 'gcsfs'$"):
        find_urls("gs://b/x", (".nii",))
    with pytest.raises(InputError, match=r"^sftp://host/x: needs paramiko, .*'paramiko'$"):
        find_urls("sftp://me:secret@host/x", (".nii",))
    with pytest.raises(InputError, match=r"^nothing://b: is of a kind that fsspec does not know"):
        find_urls("nothing://b", (".nii",))


# --- what is finished -----------------------------------------------------------------------------


def test_a_store_holds_what_a_folder_holds_and_a_run_goes_on(
    archive: Path, whole: Path, model_file: Path, model: Model, tmp_path: Path
) -> None:
    put(archive, "memory://bucket/cases")
    scans = find_inputs("memory://bucket/cases", "memory://bucket/out")
    out = "memory://bucket/out"
    job = job_of(out, model_file, model, tmp_path)
    assert statuses(here(scans, job, model)) == dict.fromkeys(NAMES, "segmented")
    assert got(out) == expected(whole)
    assert list(tmp_path.iterdir()) == []

    # A byte changed, a file gone, one too many, a record gone; and what is somebody else's.
    store = Store(out)
    labels = store.read("a/segmentation.nii.gz")
    assert labels is not None
    store.write("a/segmentation.nii.gz", labels[:-1] + bytes([labels[-1] ^ 1]))
    store.remove(["p1/organs.csv", f".batch/records/{key_of(NAMES[3])}.json"])
    store.write("p2/deep/overlay.png", b"of an earlier run")
    store.write("q/notes.txt", b"mine")
    outcomes = here(scans, job, model)
    assert statuses(outcomes) == {**dict.fromkeys(NAMES, "segmented"), "q.nii": "failed"}
    (refused,) = [str(outcome.error) for outcome in outcomes if outcome.error is not None]
    assert refused.startswith("memory://bucket/out/q: is a folder that holds other files")
    store.remove(["q/notes.txt"])
    assert statuses(here(scans, job, model)) == {
        **dict.fromkeys(NAMES, "kept"),
        "q.nii": "segmented",
    }
    assert got(out) == expected(whole)
    assert merge([out]).missing == ()


def test_ended_after_any_write_it_goes_on(
    archive: Path, whole: Path, model_file: Path, model: Model, tmp_path: Path
) -> None:
    """Of one scan, done again over an earlier result by another version: removed, put, recorded."""
    out = "unsteady://me:secret@bucket/out"
    (scan,) = find_inputs(archive / "a.nii.gz", out)
    job = job_of(out, model_file, model, tmp_path)
    name = f".batch/records/{key_of('a.nii.gz')}.json"
    n = 0
    while True:
        Store(out).write("a/overlay.png", b"earlier")
        old = {"input": "a.nii.gz", "output": "a", "files": {"overlay.png": "0"}, "error": None}
        Store(out).write(name, json.dumps(old).encode())
        Unsteady.writes_left = n
        outcomes: list[Outcome] = []
        Desk(job, model, outcomes.append).work([scan])
        Unsteady.writes_left = 10**6
        if outcomes[0].status == "segmented":
            break
        n += 1
        assert "secret" not in str(outcomes[0].error)
        # Nothing that is there counts as finished.
        record = ledger_of(out).record("a.nii.gz")
        if record is not None and record["error"] is None:
            assert not ledger_of(out).holds(record)
            assert Store(out).names("a") == ["overlay.png"]
    # The record goes, nine files of a result and its time come, the earlier picture goes, two more.
    assert n >= 11
    assert ledger_of(out).record("a.nii.gz") == lines(whole)[0]
    of_scan = {k: v for k, v in got(out).items() if k.startswith("a/")}
    assert of_scan == {k: v for k, v in expected(whole).items() if k.startswith("a/")}
    assert list(tmp_path.iterdir()) == []


def test_processes_of_this_machine_read_and_write_urls(
    archive: Path,
    whole: Path,
    model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the command line, with the model by its URL, a bad scan, and gone on with."""
    shutil.copytree(archive, tmp_path / "in")
    (tmp_path / "in" / "q.nii").write_bytes(b"no scan")
    url, out = f"file://{tmp_path}/in", f"file://{tmp_path}/out"
    command = ["segment", "-i", url, "-o", out, "-m", f"file://{model_file}", "--no-preview"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert run(command) == 3
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"organfast: {url}/q.nii: ")
    assert f"4 scans done, 1 failed -> {out}/batch.jsonl" in told.out
    assert list(scratch.glob("organfast-*")) == []
    shutil.copy(archive / "q.nii", tmp_path / "in" / "q.nii")
    assert run(command) == 0
    assert "5 scans done (4 by an earlier run)" in capsys.readouterr().out
    assert got(out) == expected(whole)
    assert run(["merge", out]) == 0
    assert f"wrote {out}/batch.jsonl" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_an_error_before_any_work(
    archive: Path, model_file: Path
) -> None:
    Unsteady.writes_left = 0
    with pytest.raises(InputError, match=r"^unsteady://bucket/out: may not be used") as caught:
        list(segment_batch(archive, "unsteady://me:secret@bucket/out", model_file, None, BARE))
    assert "secret" not in str(caught.value)


# --- faults that pass -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(104, "reset"), True),
        (TimeoutError("slow"), True),
        (OSError(116, "Stale file handle"), True),
        (FileNotFoundError(2, "none"), False),
        (PermissionError(13, "no"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("odd"), False),
    ],
)
def test_which_faults_pass(error: Exception, passes: bool, tmp_path: Path) -> None:
    assert is_transient(error) == passes
    Unsteady.reads_to_fail = [error]
    with pytest.raises(InputError) as caught:
        fetched("unsteady://bucket/a.nii", tmp_path)
    assert is_transient(caught.value) == passes


@pytest.mark.parametrize(("n_faults", "status", "n_left"), [(2, "segmented", 0), (4, "failed", 1)])
def test_a_scan_is_tried_three_times_if_the_fault_may_pass(
    n_faults: int,
    status: str,
    n_left: int,
    archive: Path,
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a worker of Dask in this process, whose memory is the store."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(batch_module, "_PAUSES", (0.1, 0.1, 0.0))
    put(archive / "p1", "unsteady://me:secret@bucket/cases")
    Unsteady.reads_to_fail = [ConnectionResetError(104, "reset, me:secret@bucket")] * n_faults
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        dashboard_address=":0",
        protocol="tcp://",
        silence_logs=50,
    ) as worker:
        plan = BatchPlan(scheduler=worker.scheduler_address)
        scans = "unsteady://me:secret@bucket/cases"
        (outcome,) = segment_batch(scans, tmp_path / "out", model_file, None, BARE, plan)
    assert outcome.status == status
    assert len(Unsteady.reads_to_fail) == n_left
    if status == "failed":
        assert str(outcome.error).startswith("unsteady://bucket/cases/ct.nii.gz: cannot be used (")
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()


def test_a_fault_that_does_not_pass_is_not_tried_again(
    model_file: Path, model: Model, tmp_path: Path
) -> None:
    scan = BatchInput("a.nii.gz", "a", "unsteady://bucket/a.nii.gz")
    (outcome,) = here((scan,), job_of(str(tmp_path), model_file, model, tmp_path), model)
    assert str(outcome.error) == "unsteady://bucket/a.nii.gz: does not exist; check the name"
    assert not outcome.is_transient
