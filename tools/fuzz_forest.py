"""Throw mutated forests and geometries at the forest's kernels; whatever is accepted must be right.

    python tools/fuzz_forest.py --seconds 60 [--seed 0]
    python tools/fuzz_forest.py --executions 10000000

Each round makes a forest, damages some of its numbers, and offers it. A forest that is refused is
counted; one that is accepted is run on random slabs of any memory order, on positions of which some
are outside, by every path of the kernel that the machine has. A run of the kernel is an execution.
Memory errors show in a build with sanitizers (``tools/sanitize.py``); here, results of all paths
are compared. Exit code 1 where they differ. Printed: rounds, refusals, executions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import numpy as np

from organfast.kernels import forest as kernel
from organfast.models.forest import NODE, Forest

CALLS_PER_FOREST = 64


def main() -> int:
    """Fuzz for a while; 1 where two paths of the kernel differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--executions", type=int, default=0, help="at least so many; 0: any")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.executions and given.seconds == float("inf"):
        parser.error("give --seconds or --executions")
    rng, counts = np.random.default_rng(given.seed), {"rounds": 0, "refused": 0, "executions": 0}
    end = time.monotonic() + given.seconds
    while time.monotonic() < end:
        if given.executions and counts["executions"] >= given.executions:
            break
        counts["rounds"] += 1
        forest = offered(rng)
        if forest is None:
            counts["refused"] += 1
            continue
        for _ in range(CALLS_PER_FOREST):
            counts["executions"] += asked(forest, rng)
    print(*(f"{name} {number:,}" for name, number in counts.items()), sep=", ", flush=True)
    return 0


def offered(rng: np.random.Generator) -> Forest | None:
    """A forest of a few random trees, often damaged; None where it is refused."""
    n_classes = int(rng.integers(1, 6))
    table = rng.random((int(rng.integers(0, 4)), n_classes))
    table /= table.sum(axis=1, keepdims=True)
    n_features = int(rng.integers(1, 40))
    trees = [_tree(rng, n_features, n_classes + len(table)) for _ in range(rng.integers(1, 6))]
    nodes = np.concatenate(trees)
    starts = np.cumsum([0, *map(len, trees)], dtype=np.int64)
    reach = int(rng.integers(1, 9))
    offsets = rng.integers(-reach, reach + 1, (n_features, 4)).astype(np.int32)
    offsets[:, 0] = rng.integers(0, 3, n_features)
    for _ in range(rng.integers(0, 4)):
        _damage(rng, (nodes, starts, table, offsets))
    try:
        return Forest(nodes, starts, table, offsets, n_classes)
    except ValueError:
        return None


def _tree(rng: np.random.Generator, n_features: int, n_codes: int) -> np.ndarray:
    """Children in pairs behind their parents, and codes of leaves."""
    n_inner = int(rng.integers(0, 12))
    tree = np.zeros(2 * n_inner + 1, NODE)
    tree["left"] = ~rng.integers(0, n_codes, len(tree)).astype(np.int32)
    tree["threshold"] = rng.integers(-1100, 1100, len(tree))
    tree["feature"] = rng.integers(0, n_features, len(tree))
    leaves = [0]
    for n in range(n_inner):
        parent = leaves.pop(int(rng.integers(len(leaves))))
        if parent > 2 * n:  # children come after their parents
            leaves.append(parent)
            parent = leaves.pop(0)
        tree["left"][parent] = 2 * n + 1
        leaves += [2 * n + 1, 2 * n + 2]
    return tree


def _damage(rng: np.random.Generator, parts: tuple[np.ndarray, ...]) -> None:
    """One number of one part becomes another."""
    part = parts[int(rng.integers(len(parts)))]
    if part.dtype == NODE:
        part = part[("left", "feature", "threshold")[int(rng.integers(3))]]
    if not part.size:
        return
    at = int(rng.integers(part.size))
    if part.dtype.kind == "f":
        part.flat[at] = rng.choice([np.nan, np.inf, -1.0, 2.0, 0.5])
        return
    limits = np.iinfo(part.dtype)
    near = int(part.flat[at]) + int(rng.integers(-2, 3))
    far = int(rng.choice([limits.min, limits.max, 0, -1, rng.integers(limits.min, limits.max)]))
    part.flat[at] = np.clip(near if rng.random() < 0.6 else far, limits.min, limits.max)


def asked(forest: Forest, rng: np.random.Generator) -> int:
    """Ask an accepted forest about a random geometry by every path; how often the kernel ran."""
    low, high = forest.offsets.min(axis=0), forest.offsets.max(axis=0)
    slab = _slab(rng, (high - low)[1:] if rng.random() < 0.9 else np.zeros(3, int), int(high[0]))
    n = int(rng.choice([1, 2, 7, 40, 300]))
    spread = np.array(slab.shape[1:])
    margin = int(rng.choice([0, 0, 1, 8]))
    positions = rng.integers(-margin, spread + margin, (n, 3)).astype(np.int32)
    if rng.random() < 0.3:
        positions = np.asfortranarray(positions)
    if rng.random() < 0.7:  # most are asked where they may be
        first, last = np.maximum(0, -low[1:]), spread - 1 - np.maximum(0, high[1:])
        if (last < first).any():
            return 0
        positions = np.clip(positions, first, last).astype(np.int32)
    dtype = np.float32 if rng.random() < 0.5 else np.float64
    found: list[Any] = []
    n_runs = 0
    for path in kernel.PATHS:
        os.environ["ORGANFAST_KERNELS"] = path
        out = np.full((n, forest.n_classes), np.nan, dtype)
        labels = np.zeros(n, np.uint16)
        try:
            forest.probabilities(slab, positions, out)
            forest.labels(slab, positions, labels)
        except ValueError:
            found.append(None)
            continue
        n_runs += 2
        found.append((out, labels))
    first = found[0]
    for other in found[1:]:
        same = (first is None) == (other is None)
        if same and first is not None:
            same = all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
        if not same:
            print("the paths of the kernel differ", forest, positions[:3], file=sys.stderr)
            sys.exit(1)
    return n_runs


def _slab(rng: np.random.Generator, span: np.ndarray, level: int) -> np.ndarray:
    """(L, K, R, C) int16 of any memory order, turned; mostly as large as the pattern needs."""
    if (span > 64).any() or level > 8:  # a damaged offset that is allowed
        span, level = np.zeros(3, int), 0
    levels = level + 1 + int(rng.integers(0, 2)) - int(rng.random() < 0.1)
    shape = np.array([max(levels, 1), *(span + rng.integers(1, 12, 3))])
    order = rng.permutation(4)
    slab = rng.integers(-1100, 1100, shape[order]).astype(np.int16).transpose(np.argsort(order))
    ways = tuple(slice(None, None, int(rng.choice([1, 1, 1, 1, -1]))) for _ in range(4))
    return slab[ways]


if __name__ == "__main__":
    sys.exit(main())
