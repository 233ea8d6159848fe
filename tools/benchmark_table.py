"""Write the README's tables of speed from the committed results of the benchmarks.

    python tools/benchmark_table.py

They stand between two comments, ``<!-- speed:begin -->`` and ``<!-- speed:end -->``; nobody edits
them by hand, and a test sees to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from organfast.bench import plain, table_rows

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "reference.json"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- speed:begin -->\n", "<!-- speed:end -->\n"


def tables(record: dict[str, Any]) -> str:
    """Markdown: where and how it was measured, the cases with their peers, the sweep.

    Parameters
    ----------
    record : dict
        A run, as ``organfast.bench.run_record`` makes it.
    """
    machine, skipped = record["machine"], sorted({n for c in record["table"] for n in c["skipped"]})
    lines = [
        f"{machine['cpu']} ({machine['cores']} cores, {machine['ram_gb']} GB, "
        f"{machine['kernels']} kernels), {record['date']}, by `{record['command']}`. "
        "One thread each unless said; medians of rounds in which all take turns. A *limit* is the "
        "machine with nothing else to do than what cannot be left out (writing the bytes, reading "
        "the voxels, inflating the file): there the figure is the share of its speed.",
        "",
    ]
    if skipped:
        lines[:1] = [f"{lines[0]} Not installed, so left out: {', '.join(skipped)}."]
    lines += ["| work | organfast | against | times as fast |", "|---|---|---|---|"]
    last = ""
    for work, ours, peer, ratio in table_rows(record["table"]):
        shown = ("", "") if work == last else (work, ours)
        lines.append(f"| {shown[0]} | {shown[1]} | {peer} | {ratio} |")
        last = work
    lines += [line for note in record.get("notes", ()) for line in ("", f"{note}.")]
    if record["sweep"]:
        lines += ["", *_sweep(record["sweep"])]
    return "\n".join(lines) + "\n"


def _sweep(comparisons: list[dict[str, Any]]) -> list[str]:
    """Scan voxels covered per second by pattern and stride, with one and two threads."""
    found = {(c["pattern"], c["stride"], c["threads"]): c for c in comparisons}
    patterns = list(dict.fromkeys(c["pattern"] for c in comparisons))
    lines = [
        "Forest of 100 trees over a whole slice, body or not: Mvoxel/s of the scan with one and "
        "with two threads, by voxels between positions.",
        "",
        "| pattern | side by side | every 8 | every 4 | every voxel | ns a node visit | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for pattern in patterns:
        strides = sorted({s for p, s, _ in found if p == pattern}, reverse=True)
        cells = []
        for stride in strides:
            both = (found[pattern, stride, threads] for threads in (1, 2))
            cells.append(" / ".join(plain(c["voxels_per_second"] / 1e6) for c in both))
        dense = found[pattern, 1, 1]
        cells += [f"{dense['ns_per_visit']:.2f}", f"{dense['peak_mb']:.0f}"]
        lines.append(f"| {pattern} | {' | '.join(cells)} |")
    return lines


def with_tables(readme: str, record: dict[str, Any]) -> str:
    """The README with its tables replaced.

    Parameters
    ----------
    readme : str
        Its text.
    record : dict
        A run.

    Raises
    ------
    ValueError
        The comments that enclose the tables are not there, each once and in order.
    """
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(END) < readme.index(BEGIN)
    ):
        raise ValueError(
            f"put {BEGIN.strip()} and {END.strip()} on lines of their own in README.md"
        )
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + tables(record) + END + rest.partition(END)[2]


if __name__ == "__main__":
    run = json.loads(RESULTS.read_text("utf-8"))
    try:
        README.write_text(with_tables(README.read_text("utf-8"), run), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"benchmark_table: {error}")
