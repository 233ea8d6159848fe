"""After the classifier: what the organs of *this* scan look like corrects what it said of them.

::

    block grid, whole scan    p --(where p is sure: the class's core)--> histogram of its HU
    model grid, a few slices  p --(enlarged)--(times how likely the voxel's HU is in each class)-->
                                --(guided by the scan's edges)--> p at every voxel of the grid

A classifier knows an organ's place and its usual brightness; a patient's liver, in this phase and
after this disease, has one brightness of its own. The median and the spread of an organ's confident
core reweight the posteriors; here the whole histogram does, for lungs and bowel have no middle.
A wrong core would lose the organ, so a class with a small core abstains: its voxels are then as
likely as those of the context class, and stay what the classifier made of them. What surrounds the
patient is a class like any other, or air at his skin would pass for lung.

The guided filter (He, Sun and Tang 2013, IEEE TPAMI 35 (6), section 3.1) smooths within tissue and
keeps edges: in boxes whose HU vary, a probability becomes a linear function of the HU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.augmentation import mirror_partners
from organfast.errors import is_whole
from organfast.grid import BlockGrid, GridVolume, ModelGrid
from organfast.probability import BACKGROUND, AxisWeights, Slab, axis_weights
from organfast.workers import Workers

__all__ = ["Adapt", "Adaptation", "WeighedUp", "adapted_slabs", "check_adapts"]

_UNITS_PER_HU = {"identity": 1, "piecewise": 8}  # of soft tissue
_BIN_HU = 3
_N_BINS = 512
_BANDWIDTH = 2.0  # bins
_UNSEEN = 0.1
"""Share of a class's voxels whose HU its core does not tell: they may have any."""
_LEAST_P = 0.01
"""What is less probable at a position, and not its best class, is not there."""
_N_SLICES = 16
_LEAST_DICE = 0.3
"""An organ of which less than this is to be expected is not in view: it is not weighed up."""
_LEAST_GAIN = 1.1
"""What would be weighed up by less is sure enough as it is."""
_MOST_GAIN = 2.0


@dataclass(frozen=True)
class Adapt:
    """How a scan's own organs correct the classifier.

    Parameters
    ----------
    own_hu : bool
        Voxels are weighed by how likely their HU are in each organ of this scan.
    core : float
        Positions of at least this probability are a class's core.
    least_core : int
        A class with fewer positions in its core abstains.
    radius : int
        Of the guided filter's boxes, voxels of the model grid; 0 leaves it out.
    edge_hu : float
        Where HU deviate by more than this within a box, an edge is kept.
    expected_dice : bool
        Organs of which the classifier is not quite sure are weighed up, where they lie, until the
        expected Dice of what they win is greatest. What is then told as probability is that of an
        organ that counts for more.
    atlas : bool
        Organs are ruled out where hardly any scan that was learned from has them, see ``Atlas``.
        Says nothing of a model without an atlas.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    own_hu: bool = True
    core: float = 0.7
    least_core: int = 20
    radius: int = 1
    edge_hu: float = 20.0
    expected_dice: bool = True
    atlas: bool = True

    def __post_init__(self) -> None:
        for name in ("own_hu", "expected_dice", "atlas"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give True or False")
        if not 0 < self.core <= 1:
            raise ValueError(f"core is {self.core!r}; give a probability above 0, at most 1")
        if not is_whole(self.least_core, 1):
            raise ValueError(f"least_core is {self.least_core!r}; give a whole number from 1")
        if not (is_whole(self.radius, 0) and self.radius <= 8):
            raise ValueError(f"radius is {self.radius!r}; give 0 to 8 voxels")
        if not 1 <= self.edge_hu <= 1000:
            raise ValueError(f"edge_hu is {self.edge_hu!r}; give 1 to 1000 HU")


@dataclass(frozen=True, eq=False)
class WeighedUp:
    """An organ that counts for more in a part of the block grid.

    Parameters
    ----------
    gain : float32
        How much more.
    box : (k, i, j) slice
        Positions of the block grid.
    belongs : bool, of the box's shape
        Which of them.
    """

    gain: np.float32
    box: tuple[slice, slice, slice]
    belongs: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What a scan's own organs look like.

    Parameters
    ----------
    likelihood : (n_classes, n_bins) float32
        How likely HU of a bin are in each class; each row sums to 1.
    n_core : (n_classes,) int64
        Positions of each class's core.
    abstains : (n_classes,) bool
        Classes whose core was too small.
    weighed_up : dict of int to WeighedUp
        By label.
    how : Adapt
        What was asked for.
    """

    likelihood: NDArray[np.float32]
    n_core: NDArray[np.int64]
    abstains: NDArray[np.bool_]
    weighed_up: dict[int, WeighedUp]
    how: Adapt

    @staticmethod
    def of(
        coarse: NDArray[np.float32],
        block_grid: BlockGrid,
        grid_volume: GridVolume,
        classes: ClassTable,
        how: Adapt,
    ) -> Adaptation:
        """Look at the cores of all classes.

        Parameters
        ----------
        coarse : (n_k, n_i, n_j, n_classes) float32
            Probabilities at the positions of the block grid.
        block_grid : BlockGrid
            Where these are.
        grid_volume : GridVolume
            The scan.
        classes : ClassTable
            What they are of. One that abstains is as likely as the context class.
        how : Adapt
            What counts as core.
        """
        from scipy.ndimage import gaussian_filter1d

        n_classes = coarse.shape[-1]
        counts = np.zeros((n_classes, _N_BINS))
        bins = _position_bins(block_grid, grid_volume)
        for slab, hu in zip(coarse, bins, strict=True):
            label = slab.argmax(axis=-1)
            sure = slab.max(axis=-1) >= how.core
            np.add.at(counts, (label[sure], hu[sure]), 1)
        for label, partner in enumerate(mirror_partners(classes)):
            if partner > label:  # both sides of a patient look alike
                counts[[label, partner]] = counts[label] + counts[partner]
        n_core = counts.sum(axis=1).astype(np.int64)
        smooth = gaussian_filter1d(counts, _BANDWIDTH, axis=1, mode="nearest")
        total = smooth.sum(axis=1, keepdims=True)
        likelihood = np.full_like(smooth, 1 / _N_BINS)
        np.divide(smooth * (1 - _UNSEEN), total, out=likelihood, where=total > 0)
        likelihood += _UNSEEN / _N_BINS
        abstains = (n_core < how.least_core) | (not how.own_hu)
        usual = BACKGROUND if classes.context is None else classes.context
        likelihood[abstains] = likelihood[usual]
        likely = likelihood.astype(np.float32)
        weighed_up: dict[int, WeighedUp] = {}
        if how.expected_dice:
            weighed_up = _doubtful_organs(coarse, bins, likely, classes.organs)
        return Adaptation(likely, n_core, abstains, weighed_up, how)

    def record(self, classes: ClassTable) -> dict[str, Any]:
        """What ``run.json`` tells of it.

        Parameters
        ----------
        classes : ClassTable
            Names of the classes.
        """
        adapted = [n for n in classes.organs if not self.abstains[n]]
        return {
            **asdict(self.how),
            "core_positions": {classes.names[n]: int(self.n_core[n]) for n in adapted},
            "abstained": [classes.names[n] for n in classes.organs if self.abstains[n]],
            "weighed_up": {
                classes.names[n]: round(float(organ.gain), 2)
                for n, organ in self.weighed_up.items()
            },
        }


def _position_bins(block_grid: BlockGrid, grid_volume: GridVolume) -> NDArray[np.int16]:
    """(n_k, n_i, n_j): the bin of the HU at each position."""
    k, i, j = block_grid.centres
    bins = np.empty(block_grid.shape, np.int16)
    for n, slab in zip(k, bins, strict=True):
        slab[:] = _binned(_units(grid_volume, slice(n, n + 1))[0][np.ix_(i, j)], grid_volume)
    return bins


def _doubtful_organs(
    coarse: NDArray[np.float32],
    bins: NDArray[np.int16],
    likelihood: NDArray[np.float32],
    organs: Iterable[int],
) -> dict[int, WeighedUp]:
    """By label: the organs of which the classifier is not quite sure, and where they are."""
    total = np.zeros(bins.shape, np.float32)
    for label in range(len(likelihood)):
        total += coarse[..., label] * likelihood[label][bins]
    np.maximum(total, np.float32(1e-12), out=total)
    found = {}
    for label in organs:
        p = coarse[..., label] * likelihood[label][bins] / total
        threshold = _threshold(p)
        gain = min((1 - threshold) / threshold, _MOST_GAIN)
        if gain >= _LEAST_GAIN:
            found[label] = _where_it_is(p, threshold, gain)
    return found


def _threshold(p: NDArray[np.float32]) -> float:
    """From which probability on an organ's voxels together have the greatest expected Dice.

    That of the n most probable voxels is 2 sum(their p) / (n + sum(all p)); it is greatest where
    the next one's p is half of it (Lipton, Elkan and Naryanaswamy 2014, theorem 1). A half where
    too little is to be expected at all.
    """
    ordered = np.sort(p[p >= 2 * _LEAST_P])[::-1].astype(np.float64)
    if not ordered.size:
        return 0.5
    dice = 2 * np.cumsum(ordered) / (np.arange(1, ordered.size + 1) + ordered.sum())
    best = float(dice.max())
    return best / 2 if best >= _LEAST_DICE else 0.5


def _where_it_is(p: NDArray[np.float32], threshold: float, gain: float) -> WeighedUp:
    """Of the components of probable positions the one where an organ is, one position wider.

    That is where it wins most positions as it is, so that it does not move by being weighed up;
    where it wins none, where most of its probability lies.
    """
    import cc3d
    from scipy.ndimage import binary_dilation, find_objects

    parts = cc3d.connected_components(p >= threshold, connectivity=26)
    won = np.bincount(parts[p >= 0.5])
    mass = won if won.any() else np.bincount(parts[parts > 0], weights=p[parts > 0])
    belongs = parts == mass.argmax()
    (box,) = find_objects(belongs.astype(np.uint8))
    k, i, j = (
        slice(max(0, side.start - 1), min(side.stop + 1, n))
        for side, n in zip(box, p.shape, strict=True)
    )
    wider = binary_dilation(belongs[k, i, j], np.ones((3, 3, 3), bool))
    return WeighedUp(np.float32(gain), (k, i, j), wider)


def check_adapts(grid: ModelGrid) -> None:
    """Raise ValueError when a model works on a grid on which nothing can be adapted.

    Parameters
    ----------
    grid : ModelGrid
        On a scan's own pixels every voxel would be corrected for itself.
    """
    if grid.spacing_mm is None:
        raise ValueError(
            "adapting to a scan needs a model with a working grid, such as ModelGrid((3.0, 3.0, "
            "3.0)), and this one works on the scan's own pixels; leave adapt off"
        )


def adapted_slabs(
    coarse: NDArray[np.float32],
    block_grid: BlockGrid,
    grid_volume: GridVolume,
    adaptation: Adaptation,
    workers: Workers,
) -> Iterator[Slab]:
    """Corrected probabilities at every voxel of the model grid, slice after slice.

    Parameters
    ----------
    coarse : (n_k, n_i, n_j, n_classes) float32
        Probabilities at the positions of the block grid.
    block_grid : BlockGrid
        Where these are.
    grid_volume : GridVolume
        The scan.
    adaptation : Adaptation
        What its organs look like.
    workers : Workers
        Threads that compute, a few slices each; the result does not depend on them.

    Yields
    ------
    n : int
        Slice of the model grid, 0, 1, 2, ...
    probabilities : (n_rows, n_columns, n_classes) float32
        C-contiguous; the consumer's to keep.
    """
    stage = _Stage(coarse, block_grid, grid_volume, adaptation)
    firsts = range(0, grid_volume.shape[0], _N_SLICES)
    for first, slabs in zip(firsts, workers.in_order(stage.slices, firsts), strict=True):
        yield from enumerate(slabs, start=first)


@dataclass(frozen=True, eq=False)
class _Stage:
    """A scan, ready to be corrected a few slices at a time."""

    coarse: NDArray[np.float32]
    block_grid: BlockGrid
    grid_volume: GridVolume
    adaptation: Adaptation

    @cached_property
    def axes(self) -> tuple[AxisWeights, ...]:
        return tuple(
            axis_weights(n, float(centres[0]), stride, len(centres))
            for n, centres, stride in zip(
                self.grid_volume.shape,
                self.block_grid.centres,
                self.block_grid.stride,
                strict=True,
            )
        )

    def slices(self, first: int) -> NDArray[np.float32]:
        """(n, rows, columns, classes) from slice ``first`` on."""
        n_slices, rows, columns = self.grid_volume.shape
        margin = 2 * self.adaptation.how.radius
        last = min(first + _N_SLICES, n_slices)
        around = slice(max(0, first - margin), min(last + margin, n_slices))
        units = _units(self.grid_volume, around)
        found = self._reweighted(units, around)
        if margin:
            found = self._guided(units, found)
        own = slice(first - around.start, last - around.start)
        out = np.zeros((last - first, rows, columns, self.coarse.shape[-1]), np.float32)
        for label, (box, p) in found.items():
            out[(slice(None), *box, label)] = p[own]
        np.clip(out, 0, None, out=out)
        out /= np.maximum(out.sum(axis=-1, keepdims=True), np.float32(1e-6))
        return out

    def _reweighted(
        self, units: NDArray[np.int16], around: slice
    ) -> dict[int, tuple[tuple[slice, slice], NDArray[np.float32]]]:
        """Posteriors of the classes that occur in some slices, each in the box where it does."""
        k = self.axes[0]
        blocks = slice(int(k.lower[around.start]), int(k.lower[around.stop - 1]) + 2)
        coarse = self.coarse[blocks]
        best = coarse.max(axis=-1)
        bins = _binned(units, self.grid_volume)
        total = np.zeros(units.shape, np.float32)
        found = {}
        for label in range(coarse.shape[-1]):
            asked = coarse[..., label]
            asked = np.where((asked >= _LEAST_P) | (asked == best), asked, np.float32(0))
            box = self._box(np.any(asked, axis=0))
            if box is None:
                continue
            asked = self._weighed_up(asked, label, blocks)
            p = self._enlarged(asked, blocks.start, around, box)
            p *= self.adaptation.likelihood[label][bins[(slice(None), *box)]]
            total[(slice(None), *box)] += p
            found[label] = box, p
        np.maximum(total, np.float32(1e-12), out=total)
        for box, p in found.values():
            p /= total[(slice(None), *box)]
        return found

    def _weighed_up(
        self, asked: NDArray[np.float32], label: int, blocks: slice
    ) -> NDArray[np.float32]:
        """A class at the positions of some slices of blocks, weighed up where it is."""
        organ = self.adaptation.weighed_up.get(label)
        if organ is None:
            return asked
        k, *rest = organ.box
        first, last = max(k.start, blocks.start), min(k.start + len(organ.belongs), blocks.stop)
        if first < last:
            part = asked[(slice(first - blocks.start, last - blocks.start), *rest)]
            part[organ.belongs[first - k.start : last - k.start]] *= organ.gain
        return asked

    def _box(self, occurs: NDArray[np.bool_]) -> tuple[slice, slice] | None:
        """Rows and columns that a class reaches, filtered: elsewhere it is 0 to the letter.

        So no slice depends on which others are corrected together with it.
        """
        sides, margin = [], 2 * self.adaptation.how.radius
        for axis, weights in zip((1, 0), self.axes[1:], strict=True):
            blocks = np.flatnonzero(occurs.any(axis=axis))
            if not len(blocks):
                return None
            near = (weights.lower >= blocks[0] - 1) & (weights.lower <= blocks[-1])
            voxels = np.flatnonzero(near)
            first, last = int(voxels[0]) - margin, int(voxels[-1]) + margin
            sides.append(slice(max(0, first), min(last + 1, len(weights.lower))))
        return sides[0], sides[1]

    def _enlarged(
        self,
        coarse: NDArray[np.float32],
        first_block: int,
        around: slice,
        box: tuple[slice, slice],
    ) -> NDArray[np.float32]:
        """One class at the voxels of some slices, in a box: linear between positions."""
        out = coarse
        ends = (around, *box)
        for axis, (weights, part) in enumerate(zip(self.axes, ends, strict=True)):
            lower = weights.lower[part] - (first_block if axis == 0 else 0)
            upper = np.minimum(lower + 1, out.shape[axis] - 1)
            share = weights.weight[part].reshape([-1 if a == axis else 1 for a in range(3)])
            before, after = np.take(out, lower, axis), np.take(out, upper, axis)
            out = before + share * (after - before)
        return out

    def _guided(
        self,
        units: NDArray[np.int16],
        found: dict[int, tuple[tuple[slice, slice], NDArray[np.float32]]],
    ) -> dict[int, tuple[tuple[slice, slice], NDArray[np.float32]]]:
        """The guided filter, of each class in its box."""
        how = self.adaptation.how
        edge = np.float32(how.edge_hu * _UNITS_PER_HU[self.grid_volume.hu_table])
        guide = units.astype(np.float32)
        guide /= edge  # around 0 HU, where a float32 is finest
        mean = _box_mean(guide, how.radius)
        spread = _box_mean(guide * guide, how.radius) - mean * mean + 1
        return {
            label: (box, _filtered(p, [a[(slice(None), *box)] for a in (guide, mean, spread)], how))
            for label, (box, p) in found.items()
        }


def _filtered(
    p: NDArray[np.float32], guide: list[NDArray[np.float32]], how: Adapt
) -> NDArray[np.float32]:
    values, mean, spread = guide
    mean_p = _box_mean(p, how.radius)
    slope = ((_box_mean(values * p, how.radius) - mean * mean_p) / spread).astype(np.float32)
    rest = mean_p - slope * mean
    out: NDArray[np.float32] = _box_mean(slope, how.radius) * values + _box_mean(rest, how.radius)
    return out


def _box_mean(values: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    from scipy.ndimage import uniform_filter

    mean: NDArray[np.float32] = uniform_filter(values, 2 * radius + 1, mode="nearest")
    return mean


def _units(volume: GridVolume, slices: slice) -> NDArray[np.int16]:
    """Slices of a scan in units of its HU table."""
    hu = volume.hu[slices]
    if volume.table is None:
        return hu
    return volume.table[hu.astype(np.int32) + 32768]


def _binned(units: NDArray[np.int16], volume: GridVolume) -> NDArray[np.intp]:
    width = _BIN_HU * _UNITS_PER_HU[volume.hu_table]
    bins: NDArray[np.intp] = ((units.astype(np.int32) - volume.air) // width).astype(np.intp)
    return np.clip(bins, 0, _N_BINS - 1)
