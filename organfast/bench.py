"""Measuring: a piece of our work beside named peers doing the same. The cases: ``benchcases``.

Speed is the median over rounds of peer time / our time, the two interleaved within each round, for
absolute times mean little on a shared machine. A peer that is not installed is named as skipped,
never replaced. A limit is the machine with nothing else to do than what cannot be left out: its
ratio is the share of that speed that is reached.
"""

from __future__ import annotations

import os
import platform
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from organfast import __version__
from organfast.models.forest import kernel_path
from organfast.progress import Progress, silent

__all__ = [
    "Benchmark",
    "Comparison",
    "Measurable",
    "Peer",
    "Scaling",
    "in_threads",
    "machine",
    "measure_all",
    "peak_resident_mb",
    "plain",
    "run_record",
    "spread",
    "sweep_rows",
    "table_rows",
    "together",
]

Job = Callable[[], object]
Spread = tuple[float, float, float]

_LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "numba",
    "isal",
    "nibabel",
    "opencv-python-headless",
    "scikit-image",
    "onnx",
    "onnxruntime",
    "skl2onnx",
    "jax",
    "flax",
    "torch",
    "monai",
)


@dataclass(frozen=True)
class Peer:
    """The same work done by others.

    Parameters
    ----------
    job : callable
        The work, called without arguments.
    n_items : int or None
        Items of one call, where it does a share of our work (its time is scaled, and its name says
        so); None is as many as ours.
    is_limit : bool
        A physical limit, not a competitor.
    """

    job: Job
    n_items: int | None = None
    is_limit: bool = False


@dataclass(frozen=True)
class Comparison:
    """What was measured of a case.

    Parameters
    ----------
    name : str
        The case.
    ours : float
        Our median figure.
    unit : str
        Of ``ours``.
    ratios : dict of str to (float, float, float)
        Per peer: how many times as fast we are, as (median, lowest, highest) over the rounds.
    limits : tuple of str
        Those of the peers that are physical limits.
    skipped : tuple of str
        Peers that are not installed.
    voxels_per_second : float or None
        Voxels of the scan that our figure covers in a second.
    ns_per_visit : float or None, ns
        Time of one thread per node of a tree at which a voxel is read.
    peak_mb : float or None, MB
        Memory; what is counted stands with the case.
    seconds : dict of str to float, s
        Where the time goes, by stage.
    first_call : float or None, s
        What the first call took, a program's compiling included.
    """

    name: str
    ours: float
    unit: str
    ratios: dict[str, Spread] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    voxels_per_second: float | None = None
    ns_per_visit: float | None = None
    peak_mb: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    first_call: float | None = None


class Measurable(Protocol):
    """A case."""

    @property
    def name(self) -> str:
        """What is timed, with its sizes."""

    def measure(self, rounds: int) -> Comparison:
        """Time it, round after round."""


@dataclass(frozen=True)
class Benchmark:
    """One piece of work, done by us and by peers.

    Parameters
    ----------
    name : str
        What is timed, with its sizes.
    ours : callable
        Our function on a prepared input; called without arguments.
    peers : mapping of str to Peer
        The same work by others.
    n_items : int
        Items of work in one call.
    unit : str
        What an item is.
    skipped : tuple of str
        Peers that are not installed.
    threads : int
        Threads on our side.
    n_voxels : int
        Voxels of the scan that one call covers; 0 where that means nothing.
    n_visits : float
        Nodes at which one call reads a voxel; 0 where that means nothing.
    whole : callable or None
        The same work with its input made from the scan, whose memory at its peak is measured: all
        that it allocates, above what was there before.
    first_call : float or None, s
        What the first call took, where a program was compiled in it.
    """

    name: str
    ours: Job
    peers: Mapping[str, Peer]
    n_items: int = 1
    unit: str = "calls"
    skipped: tuple[str, ...] = ()
    threads: int = 1
    n_voxels: int = 0
    n_visits: float = 0
    whole: Job | None = None
    first_call: float | None = None

    def measure(self, rounds: int) -> Comparison:
        """Time every job once to warm up, then all jobs in turn, round after round.

        Parameters
        ----------
        rounds : int
            Rounds; each gives one ratio per peer.
        """
        peers = {name: peer.job for name, peer in self.peers.items()}
        seconds = _interleaved({"": self.ours, **peers}, rounds)
        ours = seconds[""] / self.n_items
        second = float(np.median(seconds[""]))
        return Comparison(
            name=self.name,
            ours=self.n_items / second,
            unit=f"{self.unit}/s",
            ratios={
                name: spread(seconds[name] / (peer.n_items or self.n_items) / ours)
                for name, peer in self.peers.items()
            },
            limits=tuple(name for name, peer in self.peers.items() if peer.is_limit),
            skipped=self.skipped,
            voxels_per_second=self.n_voxels / second if self.n_voxels else None,
            ns_per_visit=1e9 * self.threads * second / self.n_visits if self.n_visits else None,
            peak_mb=_allocated_mb(self.whole) if self.whole else None,
            first_call=self.first_call,
        )


@dataclass(frozen=True)
class Scaling:
    """How much faster two threads are than one, beside a loop that shares nothing.

    Parameters
    ----------
    name : str
        What is timed, with its sizes.
    one, two : callable
        Our work on one thread; twice of it on two threads.
    limit : str
        What the loop is.
    limit_one, limit_two : callable
        The loop on one thread; on two threads, each as long.
    """

    name: str
    one: Job
    two: Job
    limit: str
    limit_one: Job
    limit_two: Job

    def measure(self, rounds: int) -> Comparison:
        """Time the four jobs in turn; the ratio is our speed-up / the loop's.

        Parameters
        ----------
        rounds : int
            Rounds; each gives one ratio.
        """
        jobs = {"1": self.one, "2": self.two, "l1": self.limit_one, "l2": self.limit_two}
        seconds = _interleaved(jobs, rounds)
        ours = 2 * seconds["1"] / seconds["2"]
        loop = 2 * seconds["l1"] / seconds["l2"]
        return Comparison(
            name=self.name,
            ours=float(np.median(ours)),
            unit="times one thread",
            ratios={self.limit: spread(ours / loop)},
            limits=(self.limit,),
        )


def in_threads(build: Callable[[], Benchmark], threads: int) -> Benchmark:
    """The same work once per thread, all at a time; no peers.

    Parameters
    ----------
    build : callable
        Makes the case; called once per thread, so that no buffer is shared.
    threads : int
        Threads; with 1 the case is as ``build`` makes it.
    """
    if threads == 1:
        return build()
    cases = [build() for _ in range(threads)]
    first = cases[0]
    return replace(
        first,
        name=f"{first.name}, {threads} threads",
        ours=together([case.ours for case in cases]),
        peers={},
        skipped=(),
        threads=threads,
        n_items=first.n_items * threads,
        n_voxels=first.n_voxels * threads,
        n_visits=first.n_visits * threads,
        whole=None,
    )


def together(jobs: Iterable[Job]) -> Job:
    """A job that runs several at a time, each in a thread that waits for it.

    Parameters
    ----------
    jobs : iterable of callable
        One per thread.
    """
    waiting = list(jobs)
    pool = ThreadPoolExecutor(len(waiting))
    return lambda: [future.result() for future in [pool.submit(job) for job in waiting]]


def measure_all(
    cases: Iterable[Callable[[], Measurable]], rounds: int, progress: Progress = silent
) -> list[Comparison]:
    """Build and measure cases one after the other.

    Parameters
    ----------
    cases : iterable of callable
        Each makes a case, set up outside the timing.
    rounds : int
        Rounds of each.
    progress : callable, optional
        Called with (what, cases done, cases in all).
    """
    builders = list(cases)
    comparisons = []
    for number, build in enumerate(builders):
        progress("timing", number, len(builders))
        comparisons.append(build().measure(rounds))
    progress("timing", len(builders), len(builders))
    return comparisons


# --- clocks and memory ----------------------------------------------------------------------------


def spread(values: NDArray[np.float64]) -> Spread:
    """Median, lowest and highest.

    Parameters
    ----------
    values : (n,) float64
        One per round.
    """
    return float(np.median(values)), float(values.min()), float(values.max())


def _interleaved(jobs: Mapping[str, Job], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of each job in each round, after one call of each that is not timed."""
    for job in jobs.values():
        job()
    seconds = {name: np.empty(rounds) for name in jobs}
    for n in range(rounds):
        for name, job in jobs.items():
            seconds[name][n] = _time(job)
    return seconds


def _time(job: Job, at_least: float = 0.02) -> float:
    """Seconds per call; short jobs are repeated until ``at_least`` seconds have passed."""
    calls, start = 0, time.perf_counter()
    while True:
        job()
        calls += 1
        passed = time.perf_counter() - start
        if passed >= at_least:
            return passed / calls


def _allocated_mb(job: Job) -> float:
    """MB that a job holds at its peak, as NumPy and Python allocate it; kernels allocate little."""
    tracemalloc.start()
    try:
        job()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def peak_resident_mb() -> float | None:
    """Largest resident memory of this process so far, MB; None where the system does not tell.

    Linux's own count: ``getrusage`` includes what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return None
    peaks = (row.split() for row in status.splitlines() if row.startswith("VmHWM:"))
    return next((int(peak[1]) * 1024 / 1e6 for peak in peaks), None)


# --- what is kept and shown -----------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Facts of this machine that speed depends on; neither its name nor its user's."""
    cpu = platform.processor() or platform.machine()
    try:
        rows = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        rows = []
    facts = {key.strip(): value.strip() for key, _, value in (r.partition(":") for r in rows)}
    cpu = facts.get("model name", cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": " ".join(cpu.replace("(R)", "").split()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        "ram_gb": round(memory / 2**30),
        "kernels": kernel_path(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def run_record(
    table: Iterable[Comparison],
    sweep: Mapping[tuple[str, int, int], Comparison],
    command: str,
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """A run as JSON would hold it.

    Parameters
    ----------
    table : iterable of Comparison
        The named cases.
    sweep : mapping of (str, int, int) to Comparison
        By pattern, stride and threads.
    command : str
        What was typed.
    notes : iterable of str
        What is to be said of it, such as what was not measured.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"organfast": __version__, "python": platform.python_version(), **_versions()},
        "notes": list(notes),
        "table": [asdict(c) for c in table],
        "sweep": [
            {"pattern": pattern, "stride": stride, "threads": threads, **asdict(c)}
            for (pattern, stride, threads), c in sweep.items()
        ],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table_rows(comparisons: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(work, our figure, peer, times as fast) of each ratio, for people to read.

    Parameters
    ----------
    comparisons : iterable of mapping
        Comparisons as a run's record holds them.
    """
    rows = []
    for c in comparisons:
        figure = f"{plain(c['ours'])} {c['unit']}"
        if c["ns_per_visit"]:
            figure += f", {c['ns_per_visit']:.2f} ns a node visit"
        if c["peak_mb"]:
            figure += f", {c['peak_mb']:,.0f} MB"
        if c.get("first_call"):  # not in records of before there were any
            figure += f", first call {c['first_call']:.1f} s"
        peers = [
            (f"{'limit: ' if name in c['limits'] else ''}{name}", f"{plain(ratio[0])}×")
            for name, ratio in c["ratios"].items()
        ]
        rows += [(c["name"], figure, *peer) for peer in peers or [("", "")]]
    return rows


def sweep_rows(comparisons: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """(work, blocks/s, Mvoxel/s, ns per visit, MB, ratio to the first peer), for people to read.

    Parameters
    ----------
    comparisons : iterable of mapping
        Comparisons as a run's record holds them.
    """
    return [
        (
            c["name"],
            f"{c['ours']:,.0f}",
            plain(c["voxels_per_second"] / 1e6),
            f"{c['ns_per_visit']:.2f}",
            f"{c['peak_mb']:.0f}" if c["peak_mb"] else "",
            next((f"{plain(ratio[0])}×" for ratio in c["ratios"].values()), ""),
        )
        for c in comparisons
    ]


def plain(number: float) -> str:
    """Two or three digits, for people to read.

    Parameters
    ----------
    number : float
        Not negative.

    >>> [plain(n) for n in (0.8512, 5.04, 12.34, 21.7, 4567.8, 234567.8, 1234567.8)]
    ['0.85', '5.0', '12.3', '22', '4,568', '234,568', '1.23 M']
    """
    if number >= 1e6:
        return f"{number / 1e6:.3g} M"
    decimals = 2 if number < 2 else 1 if number < 20 else 0
    return f"{number:,.{decimals}f}"
