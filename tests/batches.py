"""Batches to test with: an archive of small scans, and what is looked at afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

import nibabel as nib

from organfast.batchworker import Outcome, Outputs

BARE = Outputs(preview=False)
NAMES = ("a.nii.gz", "p1/ct.nii.gz", "p2/deep/ct.nii.gz", "p3/Lungen_ärztlich.nii.gz", "q.nii")


def write_archive(cohort_folder: Path, folder: Path) -> Path:
    """Five crops of phantom patients in folders of different depth."""
    for n, name in enumerate(NAMES):
        image = nib.load(cohort_folder / f"phantom_00{n % 3}" / "ct.nii.gz")
        part = image.slicer[10:60, 10:60, n : n + 20]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(part, folder / name)
    return folder


class Meanwhile:
    """What runs in a thread of its own while a block does; it ends with the block."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.scan.name: outcome.status for outcome in outcomes}


def tree(out: Path) -> dict[str, bytes | None]:
    """Every file's bytes, those of timings left out; a folder is there, too."""
    return {
        path.relative_to(out).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in out.rglob("*")
        if path.name not in ("timings.json", "timings.jsonl") and path.parent.name != "timings"
    }


def lines(out: Path, name: str = "batch.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]


def command(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "organfast", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.002)


def is_held(lock: Path) -> bool:
    """Whether a process works on the scan of this lock."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
