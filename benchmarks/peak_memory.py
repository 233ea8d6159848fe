"""Peak memory of segmenting one scan, in a process of its own.

    python benchmarks/peak_memory.py [COLUMNS ROWS SLICES]      # default 512 512 400

Prints a line of JSON for native pixels with 33-pixel blocks and for Context on the working grid,
with one and with two threads each: ``imports_mb`` is the largest resident memory once all is
imported, ``peak_mb`` that at the end (VmHWM of Linux: getrusage would count the parent's).
"""

from __future__ import annotations

import json
import sys

from organfast.benchscan import ScanCase
from organfast.blocks import Block
from organfast.grid import ModelGrid

if __name__ == "__main__":
    columns, rows, slices = (int(n) for n in sys.argv[1:4] or (512, 512, 400))
    for threads in (1, 2):
        for case in (
            ScanCase((columns, rows, slices), Block(33), ModelGrid(None), threads),
            ScanCase((columns, rows, slices), threads=threads),
        ):
            print(json.dumps({"case": case.name, **case.run(1)}), flush=True)
