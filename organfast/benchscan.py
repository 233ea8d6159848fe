"""The benchmark of a whole scan, from file to files, in a process of its own."""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from organfast.bench import Comparison, peak_resident_mb, spread
from organfast.blocks import Block, Context
from organfast.grid import ModelGrid
from organfast.volume import Volume

__all__ = ["GUNZIP", "ScanCase", "gunzip", "scan_folder"]

GUNZIP = "isal gunzip of the file, 1 thread"
_SAMPLE_SECONDS = 0.02
_TRUNK_MM = (410.0, 410.0, 600.0)


@dataclass(frozen=True)
class ScanCase:
    """A phantom's compressed scan segmented with a model that learned from other phantoms.

    A fresh process imports the package, then loads the model, reads the scan, segments it with the
    default settings and writes label map, organs and tables, all but pictures. That is timed, and
    so is inflating the same file. Memory is all that the process ever held, imports and all.

    Parameters
    ----------
    shape : (n_x, n_y, n_z) int
        Voxels; the trunk is spread over them.
    pattern : Block or Context
        What the model reads.
    grid : ModelGrid
        What it works on.
    threads : int
        Threads of the process.
    n_patients : int
        Phantoms to learn from.
    n_per_class : int
        Training positions per class and patient.
    repeats : int
        How often each painted slice stands: a long scan without painting all of it.
    ending : {".nii.gz", ".nii"}
        Of the scan's file.
    """

    shape: tuple[int, int, int] = (512, 512, 400)
    pattern: Block | Context = field(default_factory=Context)
    grid: ModelGrid = field(default_factory=lambda: ModelGrid((1.5, 1.5, 3.0), "piecewise"))
    threads: int = 2
    n_patients: int = 2
    n_per_class: int = 400
    repeats: int = 1
    ending: str = ".nii.gz"

    @property
    def name(self) -> str:
        """What is timed, with its sizes."""
        kind = "Context" if isinstance(self.pattern, Context) else f"{self.pattern.size} px"
        where = "working grid" if self.grid.spacing_mm else "native pixels"
        return (
            f"whole scan {' x '.join(map(str, self.shape))} {self.ending} to labels .nii.gz and "
            f"organs, {kind} forest, {where}, {self.threads} threads"
        )

    def measure(self, rounds: int) -> Comparison:
        """Time it.

        Parameters
        ----------
        rounds : int
            Three of them are one scan segmented, for it takes long.
        """
        found = self.run(max(1, rounds // 3))
        return Comparison(
            name=self.name,
            ours=float(np.median(found["total"])),
            unit="s",
            ratios={GUNZIP: spread(np.divide(found["gunzip"], found["total"]))},
            limits=(GUNZIP,),
            voxels_per_second=float(np.prod(self.shape) / np.median(found["total"])),
            peak_mb=found["peak_mb"],
            seconds={name: float(np.median(s)) for name, s in found["stages"].items()},
        )

    def run(self, times: int) -> dict[str, Any]:
        """Segment the scan several times in one new process.

        Parameters
        ----------
        times : int
            Times.

        Returns
        -------
        dict
            ``imports_mb``, ``peak_mb``, of it ``anonymous_mb`` (no file's pages, which the system
            may drop; sampled), ``organs`` (found), and per time, in s, ``total``, ``gunzip`` (of a
            compressed scan) and ``stages``.
        """
        folder = scan_folder(self.shape, self.repeats, self.ending)
        with tempfile.TemporaryDirectory(prefix="organfast-bench-") as own:
            self._train(Path(own) / "model.organfast")
            command = [sys.executable, "-m", "organfast.benchscan", f"{own}/model.organfast"]
            finished = subprocess.run(
                [
                    *command,
                    f"{folder}/scan{self.ending}",
                    f"{own}/out",
                    str(self.threads),
                    str(times),
                ],
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
        found: dict[str, Any] = json.loads(finished.stdout)
        return found

    def _train(self, path: Path) -> None:
        from organfast.anatomy import ClassTable
        from organfast.layouts import write_case
        from organfast.learning import Recipe, train
        from organfast.models.classifier import save_model
        from organfast.models.forest import ForestSettings
        from organfast.phantom import cohort
        from organfast.sampling import Split

        with tempfile.TemporaryDirectory(prefix="organfast-bench-") as folder:
            cases = list(cohort(self.n_patients, 1, (2.5, 2.5, 5.0), 160, threads=2))
            for case in cases:
                write_case(folder, case.name, case.scan, case.labels, ClassTable.default())
            recipe = Recipe(
                grid=self.grid,
                n_per_class=self.n_per_class,
                forest=ForestSettings("extra_trees"),
                split=Split(tuple(case.name for case in cases)),
            )
            save_model(train(folder, self.pattern, recipe, threads=2), path)


@cache
def scan_folder(shape: tuple[int, int, int], repeats: int, ending: str) -> str:
    """A folder that holds ``scan`` with that ending; it is gone when the process ends.

    Parameters
    ----------
    shape : (n_x, n_y, n_z) int
        Voxels; a painted phantom's trunk is spread over them.
    repeats : int
        How often each painted slice stands.
    ending : {".nii.gz", ".nii"}
        Of the file.
    """
    from organfast.nifti import write_volume
    from organfast.painting import paint
    from organfast.phantom import FieldOfView, phantom

    spacing = tuple(mm / n for mm, n in zip(_TRUNK_MM, shape, strict=True))
    painted = (shape[0], shape[1], shape[2] // repeats)
    view = FieldOfView(painted, (spacing[0], spacing[1], spacing[2] * repeats))
    scan = paint(phantom(view, seed=3, threads=2), seed=3, threads=2)
    if repeats > 1:
        # Memory in the file's order: no slice is copied when it is written.
        hu = np.repeat(scan.hu.T, repeats, axis=0).T
        scan = Volume(hu, scan.affine @ np.diag([1, 1, 1 / repeats, 1]))
    folder = tempfile.mkdtemp(prefix="organfast-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_volume(Path(folder) / f"scan{ending}", scan)
    return folder


def gunzip(path: Path) -> int:
    """Inflate a file piece by piece and forget it: what no reader of it can do without.

    Parameters
    ----------
    path : Path
        A ``.gz`` file.

    Returns
    -------
    int
        Bytes inflated.
    """
    from isal import igzip

    with igzip.open(path) as file:
        return sum(len(part) for part in iter(lambda: file.read(1 << 20), b""))


class _AnonymousPeak:
    """Samples this process's resident memory that no file stands behind."""

    def __init__(self) -> None:
        self._peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            rows = (
                row.split() for row in Path("/proc/self/status").read_text("ascii").splitlines()
            )
            now = next((int(row[1]) for row in rows if row[0] == "RssAnon:"), 0)
            self._peak = max(self._peak, now)

    def end(self) -> float:
        """The peak so far, in MB."""
        self._ended.set()
        self._thread.join()
        return self._peak / 1024


def _segment_and_gunzip(
    model: Path, scan: Path, out: Path, threads: int, times: int
) -> dict[str, Any]:
    """What the new process does."""
    import cc3d  # noqa: F401  # all that is imported on the way is imported before
    import fill_voids  # noqa: F401
    import scipy.ndimage  # noqa: F401

    from organfast.models.classifier import load_model
    from organfast.pipeline import segment

    imports_mb = peak_resident_mb()
    anonymous = _AnonymousPeak()
    total, inflating, n_organs = [], [], 0
    stages: dict[str, list[float]] = {}
    for _ in range(times):
        start = time.perf_counter()
        loaded = load_model(model)
        seconds = {"load the model": time.perf_counter() - start}
        result = segment(scan, loaded, threads=threads)
        segmented = time.perf_counter()
        result.save(out, preview=False)
        end = time.perf_counter()
        seconds |= {**result.timings["seconds"], "write": end - segmented}
        for stage, passed in seconds.items():
            stages.setdefault(stage, []).append(passed)
        total.append(end - start)
        n_organs = sum(organ.present for organ in result.organs.values())
        del loaded, result
        start = time.perf_counter()
        if scan.suffix == ".gz":
            gunzip(scan)
        inflating.append(time.perf_counter() - start)
    return {
        "imports_mb": imports_mb,
        "peak_mb": peak_resident_mb(),
        "anonymous_mb": anonymous.end(),
        "organs": n_organs,
        "total": total,
        "gunzip": inflating,
        "stages": stages,
    }


if __name__ == "__main__":
    model, scan, out = map(Path, sys.argv[1:4])
    json.dump(_segment_and_gunzip(model, scan, out, *map(int, sys.argv[4:])), sys.stdout)
