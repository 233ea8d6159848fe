"""What segmenting one scan costs from the command to the last file, against `gunzip` of the scan.

    python benchmarks/whole_command.py [COLUMNS ROWS SLICES] [--rounds N]     # 512 512 400, 3

The scan is a painted phantom. `organfast segment -i scan.nii.gz -o out` (the starter model, two
threads, pictures included) and `gunzip -c scan.nii.gz` take turns, each as a process of its own,
after a first run of either that is not counted: it compiles what later runs find on disk. Prints a
line of JSON: seconds of each round, the median of the rounds' ratios, and the largest memory.
The limit is what no reader can do without, the inflating; the starter model's contract is ten times
that, and 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from organfast.benchscan import scan_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the line; the exit code is 1 where the contract is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", type=int, nargs="*", default=[512, 512, 400])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    if len(given.shape) != 3 or given.rounds < 1:
        parser.error("give three numbers of voxels, and one round or more")
    columns, rows, slices = given.shape
    scan = Path(scan_folder((columns, rows, slices), 1, ".nii.gz")) / "scan.nii.gz"
    found = measured(scan, given.rounds)
    print(json.dumps({"shape": given.shape, "file_mb": scan.stat().st_size / 1e6, **found}))
    return int(found["ratio"] > 10 or found["peak_mb"] > 1500)


def measured(scan: Path, rounds: int) -> dict[str, Any]:
    """Both commands in turn."""
    seconds: dict[str, list[float]] = {"organfast": [], "gunzip": []}
    with tempfile.TemporaryDirectory(prefix="organfast-bench-") as own:
        out = Path(own) / "out"
        segment = [sys.executable, "-m", "organfast", "segment", "-i", str(scan), "-o", str(out)]
        commands = {
            "organfast": [*segment, "--threads", "2"],
            "gunzip": ["gunzip", "-c", str(scan)],
        }
        for number in range(rounds + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(
                    command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
                if number:
                    seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    sys.exit(main())
