"""Throw mutated forests and geometries at the forest's kernels; whatever is accepted must be right.

    python tools/sanitize.py fuzz --seconds 60              # under sanitizers, which is the point
    python tools/sanitize.py fuzz --executions 10000000 --record fuzz.json
    python tools/fuzz_forest.py --seconds 5                 # results alone

Each epoch grows some small forests. A mutant of one of them, changed in one to three places, many
at the edge of what is allowed, goes the way a model file goes: ``Forest.from_arrays`` checks it.
Refused mutants are counted; an accepted one takes its parent's place and is asked about slabs of
any memory order that hold just what it reads, at positions of which some are outside. Where
``Forest`` accepts these, too, each path of the kernel that the machine has walks it in chunks and
in tiles, for probabilities and for labels. A call of the kernel is an execution: none is of a model
or a geometry that was not accepted, and none of a model that was not mutated.

Memory errors show in a build with sanitizers (``tools/sanitize.py``). Beside it all results are
compared with each other, and some with a walk one node at a time; exit code 1 where they differ.
A walk that never ends is ended by the system ("Virtual timer expired").
An epoch depends on ``--seed`` and its number alone, and the record names the one that runs: what
ended with an error is repeated by ``--seed S --epoch N``, and what was stopped goes on by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from organfast.kernels import forest as kernel
from organfast.models.forest import NODE, Forest

FORESTS_PER_EPOCH = 8
MUTANTS_PER_EPOCH = 200
SLABS_PER_MUTANT = 3
POSITIONS_PER_SLAB = 2
MOST_NODES = 30
MOST_SECONDS = 120  # of processor time; an epoch takes less than one
MOST_VOXELS = 100_000  # only a damaged offset reads so far

Parts = dict[str, Any]


class WrongResult(Exception):
    """Two ways to the same result differ."""


class Chance(random.Random):
    """Single draws from Python, which are ten times as fast; arrays of them from NumPy."""

    def __init__(self, seed: int, epoch: int) -> None:
        super().__init__(seed << 40 | epoch)
        self.arrays = np.random.default_rng([seed, epoch])


def main() -> int:
    """Fuzz for a while; 1 where two paths of the kernel differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--executions", type=int, default=0, help="at least so many; 0: any")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epoch", type=int, default=0, help="the first one")
    parser.add_argument("--record", type=Path, help="a file of counts, to go on from")
    given = parser.parse_args()
    if not given.executions and given.seconds == float("inf"):
        parser.error("give --seconds or --executions")
    counts: Counter[str] = Counter(epoch=given.epoch, seed=given.seed)
    if given.record and given.record.exists():
        counts = Counter(json.loads(given.record.read_text("utf-8")))
    end, begin = time.monotonic() + given.seconds, time.monotonic()
    while time.monotonic() < end:
        if given.executions and counts["executions"] >= given.executions:
            break
        _note(given.record, counts)
        signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)  # ends the process: a walk in circles
        try:
            fuzz_epoch(counts, Chance(counts["seed"], counts["epoch"]))
        except WrongResult as wrong:
            print(f"{wrong}: --seed {counts['seed']} --epoch {counts['epoch']}", file=sys.stderr)
            return 1
        counts["epoch"] += 1
    counts["seconds"] += round(time.monotonic() - begin)
    _note(given.record, counts)
    print(*(f"{name} {number:,}" for name, number in counts.items()), sep="\n", flush=True)
    return 0


def _note(path: Path | None, counts: Counter[str]) -> None:
    if path:
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(counts), "utf-8")
        os.replace(beside, path)


def fuzz_epoch(counts: Counter[str], chance: Chance) -> None:
    """Mutate some forests for a while, and ask those that are accepted."""
    forests = [_fresh(chance) for _ in range(FORESTS_PER_EPOCH)]
    for _ in range(MUTANTS_PER_EPOCH):
        place = chance.randrange(FORESTS_PER_EPOCH)
        mutant = dict(forests[place])
        for _ in range(chance.randint(1, 3)):
            chance.choice(MUTATIONS)(mutant, chance)
        counts["models offered"] += 1
        try:
            forest = Forest.from_arrays(mutant, mutant["offsets"], mutant["n_classes"])
        except ValueError:
            counts["models refused"] += 1
            continue
        counts["models accepted"] += 1
        forests[place] = mutant
        for _ in range(SLABS_PER_MUTANT):
            slab = _slab(forest, chance)
            if slab is None:
                counts["slabs too large for this fuzzer"] += 1
                continue
            for _ in range(POSITIONS_PER_SLAB):
                _offer(forest, slab, chance, counts)


def _offer(forest: Forest, slab: np.ndarray, chance: Chance, counts: Counter[str]) -> None:
    """Ask a forest about a geometry, if it takes it."""
    positions = _positions(forest, slab, chance)
    counts["geometries offered"] += 1
    try:
        forest._check_call(slab, positions)
    except ValueError:
        counts["geometries refused"] += 1
        return
    counts["geometries accepted"] += 1
    asked(forest, slab, positions, chance, counts)


# --- forests --------------------------------------------------------------------------------------


def _fresh(chance: Chance) -> Parts:
    """A few random trees, or more than the kernel sums at a time."""
    n_classes = chance.choice((1, 2, 3, 5, 70))
    table = chance.arrays.random((chance.randrange(4), n_classes))
    table /= table.sum(axis=1, keepdims=True)
    n_features, reach = chance.randint(1, 20), chance.randint(1, 3)
    offsets = chance.arrays.integers(-reach, reach + 1, (n_features, 4)).astype(np.int32)
    offsets[:, 0] = chance.arrays.integers(0, 3, n_features)
    parts: Parts = {"leaf_table": table, "offsets": offsets, "n_classes": n_classes}
    n_trees = 40 if chance.random() < 0.1 else chance.randint(1, 3)
    return _with_trees(parts, [_tree(parts, chance) for _ in range(n_trees)])


def _with_trees(parts: Parts, trees: list[np.ndarray]) -> Parts:
    nodes = np.concatenate(trees)
    for name in NODE.names or ():
        parts[name] = np.ascontiguousarray(nodes[name])
    parts["tree_starts"] = np.cumsum([0, *map(len, trees)], dtype=np.int64)
    return parts


def _tree(parts: Parts, chance: Chance) -> np.ndarray:
    """Children in pairs behind their parents, and codes of leaves."""
    n_inner = chance.randrange(MOST_NODES // 2)
    tree = np.zeros(2 * n_inner + 1, NODE)
    n_codes = parts["n_classes"] + len(parts["leaf_table"])
    tree["left"] = ~chance.arrays.integers(0, n_codes, len(tree)).astype(np.int32)
    tree["threshold"] = chance.arrays.integers(-1100, 1100, len(tree))
    tree["feature"] = chance.arrays.integers(0, len(parts["offsets"]), len(tree))
    leaves = [0]
    for n in range(n_inner):
        parent = leaves.pop(chance.randrange(len(leaves)))
        if parent > 2 * n:  # children come after their parents
            leaves.append(parent)
            parent = leaves.pop(0)
        tree["left"][parent] = 2 * n + 1
        leaves += [2 * n + 1, 2 * n + 2]
    return tree


# --- mutations: each changes one thing, within what is allowed, at its edge or beyond it ---------


def _set(parts: Parts, name: str, at: int, value: Any) -> None:
    """One number of an array becomes another; what no array can hold is the nearest."""
    array = parts[name] = parts[name].copy()
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        value = min(max(int(value), int(limits.min)), int(limits.max))
    if array.size:
        array.flat[at % array.size] = value


def _node(parts: Parts, chance: Chance) -> tuple[int, int, int]:
    """Some node, and where its tree begins and ends, as far as that can be told."""
    starts, n = parts["tree_starts"], len(parts["left"])
    at = chance.randrange(n)
    tree = int(np.searchsorted(starts[:-1], at, side="right")) - 1
    return at, int(starts[tree]), int(starts[min(tree + 1, len(starts) - 1)])


def _child(parts: Parts, chance: Chance) -> None:
    """A node's children are others: near, the last pair, behind the tree, the node itself."""
    at, start, end = _node(parts, chance)
    size, near = end - start, int(parts["left"][at]) + chance.choice((-2, -1, 1, 2))
    edges = (near, near, size - 1, size - 2, size - 3, size, at - start, 0, 2**31 - 1)
    _set(parts, "left", at, chance.choice(edges))


def _code(parts: Parts, chance: Chance) -> None:
    """A leaf's code: the ends of the classes and of the table, one beyond, none."""
    n = parts["n_classes"]
    codes = (0, n - 1, n, n + len(parts["leaf_table"]) - 1, n + len(parts["leaf_table"]), 2**31 - 1)
    leaves = np.flatnonzero(parts["left"] < 0)
    if len(leaves):
        _set(parts, "left", int(leaves[chance.randrange(len(leaves))]), ~chance.choice(codes))


def _exchange(parts: Parts, chance: Chance) -> None:
    """Two nodes of a tree exchange what is below them."""
    at, start, end = _node(parts, chance)
    if start < end:
        other = chance.randrange(start, end) % len(parts["left"])
        left = parts["left"] = parts["left"].copy()
        left[[at, other]] = left[[other, at]]


def _feature(parts: Parts, chance: Chance) -> None:
    n = len(parts["offsets"])
    features = (0, n - 1, n, 65_535, chance.randrange(n))
    _set(parts, "feature", _node(parts, chance)[0], chance.choice(features))


def _threshold(parts: Parts, chance: Chance) -> None:
    thresholds = (-32768, 32767, -32767, 32766, chance.randrange(-1100, 1100))
    _set(parts, "threshold", _node(parts, chance)[0], chance.choice(thresholds))


def _offset(parts: Parts, chance: Chance) -> None:
    """A feature is read one voxel farther, or as far as is allowed, or farther than that."""
    at = chance.randrange(parts["offsets"].size)
    near = int(parts["offsets"].flat[at]) + chance.choice((-1, 1))
    far = chance.choice((-4096, -4095, 4095, 4096, 2**31 - 1, -(2**31)))
    _set(parts, "offsets", at, near if chance.random() < 0.9 else far)


def _start(parts: Parts, chance: Chance) -> None:
    at = chance.randrange(len(parts["tree_starts"]))
    near = int(parts["tree_starts"][at]) + chance.choice((-2, -1, 1, 2))
    far = chance.choice((0, -1, len(parts["left"]), 2**62))
    _set(parts, "tree_starts", at, near if chance.random() < 0.6 else far)


def _share(parts: Parts, chance: Chance) -> None:
    """A probability: none, nearly the same, or two of a row exchanged."""
    table = parts["leaf_table"] = parts["leaf_table"].copy()
    if not table.size:
        return
    row = table[chance.randrange(len(table))]
    at = chance.randrange(len(row))
    if chance.random() < 0.3:
        row[at] = chance.choice((np.nan, np.inf, -1.0, 2.0))
    elif chance.random() < 0.3:
        row[at] += chance.choice((-1e-5, 9e-7, 1e-7))
    else:
        row[:] = np.roll(row, 1)


def _table(parts: Parts, chance: Chance) -> None:
    """The table loses its last row, or gets another, which leaves may name from then on."""
    table = parts["leaf_table"]
    row = chance.arrays.random((1, table.shape[1]))
    more = np.concatenate([table, row / row.sum()])
    parts["leaf_table"] = table[:-1].copy() if chance.random() < 0.5 else more


def _length(parts: Parts, chance: Chance) -> None:
    """An array is shorter, or longer by some noise."""
    name = chance.choice((*(NODE.names or ()), "tree_starts", "offsets"))
    array = parts[name]
    by = chance.choice((-2, -1, 1, 2))
    if by > 0:
        parts[name] = np.concatenate([array, array[:by]])
    elif len(array) > -by:
        parts[name] = array[:by].copy()


def _classes(parts: Parts, chance: Chance) -> None:
    """One class more or less; mostly the table follows."""
    n = parts["n_classes"] + chance.choice((-1, 1))
    parts["n_classes"] = n
    if n > 0 and chance.random() < 0.8:
        shares = chance.arrays.random((len(parts["leaf_table"]), n))
        parts["leaf_table"] = shares / shares.sum(axis=1, keepdims=True)


def _trees(parts: Parts, chance: Chance) -> None:
    """A tree is another one, comes in addition, or goes; where these are trees at all."""
    nodes = np.zeros(min(len(parts[name]) for name in NODE.names or ()), NODE)
    for name in NODE.names or ():
        nodes[name] = parts[name][: len(nodes)]
    starts = parts["tree_starts"]
    if not 1 <= parts["n_classes"] < 1000 or (np.diff(starts) < 1).any() or len(starts) < 2:
        return
    if starts[0] != 0 or starts[-1] != len(nodes):
        return
    trees = np.split(nodes, starts[1:-1])
    at, what = chance.randrange(len(trees)), chance.random()
    if what < 0.6 or len(trees) == 1:
        trees[at] = _tree(parts, chance)
    elif what < 0.8 and len(trees) < 70:
        trees.append(_tree(parts, chance))
    else:
        del trees[at]
    _with_trees(parts, trees)


MUTATIONS: tuple[Callable[[Parts, Chance], None], ...] = (
    *(_child, _code, _exchange, _feature, _threshold, _offset, _start),
    *(_share, _table, _length, _classes, _trees, _trees),
)


# --- geometries -----------------------------------------------------------------------------------

# Voxels of slabs are cut from here: around zero, where thresholds are, and at the ends.
_POOL = np.random.default_rng(0).integers(-1200, 1200, 2 * MOST_VOXELS).astype(np.int16)
_POOL[::7] = -32768
_POOL[::11] = 32767
# A slab may be a field of records: int16 of which none, or each, is at an odd address.
_RECORDS = {
    size: np.dtype({"names": ["hu"], "formats": ["<i2"], "offsets": [size - 2], "itemsize": size})
    for size in range(3, 7)
}


def _slab(forest: Forest, chance: Chance) -> np.ndarray | None:
    """(L, K, R, C) int16 in any memory order, turned: what the forest reads from some positions.

    Its memory holds no voxel more, so that a read beyond it is seen. None where that is too much.
    """
    low, high = (extent.tolist() for extent in forest._extent)
    more = [chance.randrange(n) for n in (2, 3, 4, 70 if chance.random() < 0.2 else 5)]
    more[0] -= chance.random() < 0.05
    shape = [max(1, high[0] + 1 + more[0])]
    shape += [max(1, high[a] + 1 - low[a] + more[a]) for a in (1, 2, 3)]
    n_voxels = math.prod(shape)
    if n_voxels > MOST_VOXELS:
        return None
    first = chance.randrange(len(_POOL) - n_voxels)
    voxels = _POOL[first : first + n_voxels]
    if chance.random() < 0.1:
        step = chance.randint(3, 6)
        records = np.zeros(n_voxels, _RECORDS[step])
        records["hu"] = voxels
        voxels = records["hu"]
    else:
        voxels = voxels.copy()
    order = [0, 1, 2, 3]
    if chance.random() < 0.5:
        chance.shuffle(order)
    slab = voxels.reshape([shape[a] for a in order]).transpose(np.argsort(order))
    if chance.random() < 0.3:
        slab = slab[tuple(slice(None, None, chance.choice((1, -1))) for _ in range(4))]
    if chance.random() < 0.05:
        slab = np.broadcast_to(slab[:, :1], slab.shape)
    return slab


def _positions(forest: Forest, slab: np.ndarray, chance: Chance) -> np.ndarray:
    """(n, 3) int32: rows side by side, corners, or scattered; at times one is beyond the edge."""
    low, high = (extent.tolist() for extent in forest._extent)
    first = [max(0, -low[a]) for a in (1, 2, 3)]
    last = [max(first[a - 1], slab.shape[a] - 1 - max(0, high[a])) for a in (1, 2, 3)]
    n = chance.choice((1, 2, 3, 7, 16, 17, 33, 64, 65, 100))
    if chance.random() < 0.0005:
        n = 9000  # more than a chunk
    what = chance.random()
    if what < 0.4:
        box = np.indices([b - a + 1 for a, b in zip(first, last, strict=True)])
        found = np.resize(box.reshape(3, -1).T + first, (n, 3))
    else:
        found = chance.arrays.integers(first, np.add(last, 1), (n, 3))
        if what < 0.7:
            found = np.where(2 * found <= np.add(first, last), first, last)
    if chance.random() < 0.15:
        at = chance.randrange(3)
        beyond = (first[at] - 1, last[at] + 1, 2**31 - 1, -(2**31))
        found[chance.randrange(n), at] = chance.choice(beyond)
    layout = chance.random()
    if layout < 0.2:
        return np.asfortranarray(found, np.int32)
    if layout < 0.3:
        return np.repeat(found.astype(np.int32), 2, axis=0)[::2]
    if layout < 0.4:
        return found[::-1].astype(np.int32)[::-1]
    return found.astype(np.int32)


# --- executions -----------------------------------------------------------------------------------

_SCRATCH = np.zeros(kernel.WALK_BYTES, np.uint8)


def asked(
    forest: Forest,
    slab: np.ndarray,
    positions: np.ndarray,
    chance: Chance,
    counts: Counter[str],
) -> None:
    """Run each path of the kernel in chunks and in tiles, and compare what they say."""
    n, n_classes = len(positions), forest.n_classes
    walk = forest._walk(slab, positions, _SCRATCH)
    n_together = n if chance.random() < 0.7 else chance.randint(1, n)
    sums = np.empty((min(n_together, kernel.CHUNK), n_classes))
    of_chunk = {**walk, "staged": np.empty((0, kernel.TILE), np.int16), "sums": sums}
    staged = np.empty((forest.n_features, kernel.TILE), np.int16)
    of_tile = {**walk, "staged": staged, "sums": np.empty((kernel.TILE, n_classes))}
    step, n_between = chance.randint(1, 2), chance.choice((1, 3, 16))
    shares = np.empty((n, step * n_classes))[:, ::step]
    narrow = np.empty((n * step, n_classes), np.float32)[::step]
    labels = np.empty(n * step, np.uint16)[::step]
    expected = None
    for path, name in enumerate(kernel.PATHS):
        for way, arguments in (("chunks", of_chunk), ("tiles", of_tile)):
            shares.fill(np.nan)
            narrow.fill(np.nan)
            labels.fill(65_535)
            kernel.walk_forest(**arguments, path=path, out=shares)
            kernel.walk_forest(**arguments, path=path, out=narrow)
            kernel.label_forest(**arguments, path=path, out=labels, n_between=n_between)
            counts["executions"] += 3
            counts[f"of these {name} in {way}"] += 3
            found = shares.tobytes(), narrow.tobytes(), labels.tobytes()
            if expected is None:
                expected = found
                _check((narrow == shares.astype(np.float32)).all(), "float32 differs from float64")
                _check((labels == shares.argmax(axis=1)).all(), "labels differ from probabilities")
                if chance.random() < 0.2:
                    p = chance.randrange(n)
                    _check_one(forest, slab, positions[p].tolist(), shares[p])
            _check(found == expected, "paths of the kernel differ")


def _check_one(forest: Forest, slab: np.ndarray, position: list[int], found: np.ndarray) -> None:
    """One position again, one node at a time."""
    n, (k, i, j) = forest.n_classes, position
    sums = np.zeros(n)
    for start in forest.tree_starts[:-1].tolist():
        node = forest.nodes[start]
        while node["left"] >= 0:
            level, dk, di, dj = forest.offsets[node["feature"]].tolist()
            goes_right = slab[level, k + dk, i + di, j + dj] > node["threshold"]
            node = forest.nodes[start + node["left"] + int(goes_right)]
        code = ~int(node["left"])
        sums += np.arange(n) == code if code < n else forest.leaf_table[code - n]
    _check((sums / forest.n_trees == found).all(), "the kernel differs from a walk by hand")


def _check(is_right: bool, otherwise: str) -> None:
    if not is_right:
        raise WrongResult(otherwise)


if __name__ == "__main__":
    sys.exit(main())
