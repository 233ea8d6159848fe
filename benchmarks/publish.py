"""Run all benchmarks, say which ratios fell since the last committed run, write the new results.

    python benchmarks/publish.py [--quick] [--cnn]  # about ten minutes; `make bench` calls it

Results go to ``benchmarks/results/reference.json``, asv's to ``benchmarks/results/asv/``. The exit
code is 1 where a ratio fell by more than a tenth. No file names the machine or its user.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from organfast.bench import machine, measure_all, run_record
from organfast.benchcases import SWEEP, TABLE
from organfast.benchcnn import cnn_cases, gpu_note

BENCHMARKS = Path(__file__).parent
REPOSITORY = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results" / "reference.json"
ASV_RESULTS = BENCHMARKS / "results" / "asv"
LEAST = 0.9


def ratios(record: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(case, peer, median ratio) of a run.

    Parameters
    ----------
    record : dict
        A run, as ``run_record`` makes it.
    """
    for comparison in [*record["table"], *record["sweep"]]:
        for peer, (median, _, _) in comparison["ratios"].items():
            yield comparison["name"], peer, median


def fallen(before: dict[str, Any], now: dict[str, Any], least: float = LEAST) -> list[str]:
    """A line for each ratio of the former run that fell, or that was not measured again.

    Parameters
    ----------
    before, now : dict
        Runs.
    least : float
        Share of the former ratio that is no fall.
    """
    found = {(case, peer): ratio for case, peer, ratio in ratios(now)}
    lines = []
    for case, peer, was in ratios(before):
        ratio = found.get((case, peer))
        if ratio is None:
            lines.append(f"{case} | {peer}: was {was:.3g}, was not measured")
        elif ratio < least * was:
            lines.append(f"{case} | {peer}: was {was:.3g}, is {ratio:.3g} ({ratio / was - 1:+.0%})")
    return lines


def last_committed() -> dict[str, Any] | None:
    """The run that the repository's last commit holds; None where it holds none."""
    where = f"HEAD:./{RESULTS.name}"
    git = ["git", "-C", str(RESULTS.parent), "show", where]
    shown = subprocess.run(git, capture_output=True, text=True, check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def run_asv() -> None:
    """Run asv's suite once, and keep its results without the names of machine and folders."""
    head = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="organfast-bench-") as home:
        # asv keeps its machines in the user's home; here a new one knows the reference alone.
        environment = {**os.environ, "HOME": home}
        asv = [sys.executable, "-m", "asv"]
        named = {"machine": "reference", "cpu": facts["cpu"], "os": facts["system"]}
        named["ram"] = f"{facts['ram_gb']} GB"
        flags = [f"--{key}={value}" for key, value in named.items()]
        run = ["run", "--quick", "--python=same", "--machine=reference"]
        for arguments in (["machine", *flags], [*run, f"--set-commit-hash={commit}"]):
            subprocess.run([*asv, *arguments], cwd=BENCHMARKS, env=environment, check=True)
    for path in (ASV_RESULTS / "reference").glob(f"{commit[:8]}-*.json"):
        text = without_folders(path.read_text("utf-8"))
        path.unlink()
        path.with_name(f"{commit[:8]}-existing-python.json").write_text(text, encoding="utf-8")


def without_folders(text: str) -> str:
    """asv's results of a run, where the interpreter is called ``python`` wherever it lies.

    Parameters
    ----------
    text : str
        JSON as asv wrote it.
    """
    text = text.replace(json.loads(text)["env_name"], "existing-python")
    return re.sub(r'"/[^"]*python[^"]*"', '"python"', text)


def main() -> int:
    """Run, compare, write; 1 where a ratio fell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no asv")
    parser.add_argument("--cnn", action="store_true", help="the CNN, too; needs JAX")
    given = parser.parse_args()
    quick, networks = given.quick, cnn_cases() if given.cnn else {}
    command = "python benchmarks/publish.py --cnn" if given.cnn else "make bench"
    notes = [gpu_note()] if given.cnn else []

    def say(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", file=sys.stderr)

    before = last_committed()
    rounds = 3 if quick else 9
    table = measure_all([*TABLE.values(), *networks.values()], rounds, say)
    sweep = measure_all(SWEEP.values(), rounds, say)
    now = run_record(table, dict(zip(SWEEP, sweep, strict=True)), command, notes)
    RESULTS.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    if not quick:
        run_asv()
    if before is None:
        print("no run is committed yet, so nothing is compared")
        return 0
    if before["machine"] != now["machine"]:
        print(f"note: the last run is of another machine, {before['machine']['cpu']}")
    lines = fallen(before, now)
    print(f"{len(lines)} ratios fell by more than {1 - LEAST:.0%} since {before['date']}")
    print("\n".join(lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
