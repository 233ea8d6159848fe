"""Peak memory of segmenting one scan, in a process of its own.

    python benchmarks/peak_memory.py [COLUMNS ROWS SLICES]      # default 512 512 400
    python benchmarks/peak_memory.py --contract                 # 512 512 2000: below 4 GB?

Prints a line of JSON for native pixels with 33-pixel blocks and for Context on the working grid,
with one and with two threads each: ``imports_mb`` is the largest resident memory once all is
imported, ``peak_mb`` that at the end (VmHWM of Linux: getrusage would count the parent's).

The contract is that a scan of 512 x 512 x 2000 voxels, as .nii and as .nii.gz, stays below 4 GB
with the default model (Context, 100 trees, the working grid) and two threads; the exit code is 1 if
it does not. Of a .nii the voxels are pages of the file, which count as resident and may be dropped:
``anonymous_mb`` is without them. Making the scan takes 3 GB of memory and of disk besides.
"""

from __future__ import annotations

import json
import sys

from organfast.benchscan import ScanCase
from organfast.blocks import Block
from organfast.grid import ModelGrid

CONTRACT = (512, 512, 2000)
CONTRACT_MB = 4096
# Each of 100 painted slices stands so often.
REPEATS = 20


def contract() -> int:
    """Print a line for each case of the contract; the exit code."""
    peaks = []
    for ending in (".nii", ".nii.gz"):
        case = ScanCase(CONTRACT, repeats=REPEATS, ending=ending)
        found = case.run(1)
        peaks.append(found["peak_mb"])
        print(json.dumps({"case": case.name, "limit_mb": CONTRACT_MB, **found}), flush=True)
    return int(max(peaks) >= CONTRACT_MB)


if __name__ == "__main__":
    if sys.argv[1:] == ["--contract"]:
        sys.exit(contract())
    columns, rows, slices = (int(n) for n in sys.argv[1:4] or (512, 512, 400))
    for threads in (1, 2):
        for case in (
            ScanCase((columns, rows, slices), Block(33), ModelGrid(None), threads),
            ScanCase((columns, rows, slices), threads=threads),
        ):
            print(json.dumps({"case": case.name, **case.run(1)}), flush=True)
