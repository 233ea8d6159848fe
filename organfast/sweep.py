"""Accuracy against throughput on the user's own scans: settings tried one beside the other.

::

    model_curve    one model            x  stride x slice step x coarse to fine x trees
    learned_curve  ways to learn, folds x  the same; each patient by models that never saw them

    case --> read once --> every point in a new random order, as often as rounds ask --> seconds
                           --> each label map against the truth: Dice and centres

All points take turns on a scan before the next scan is read, so that what else the machine does
falls on all of them alike. Where a folder is given, each answer is kept in it once it is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast import __version__
from organfast.blocks import Block, Context
from organfast.curve import (
    TOLERANCE,
    Curve,
    CurvePoint,
    PointSettings,
    Smallest,
    smallest_as_good,
)
from organfast.errors import InputError, is_whole
from organfast.evaluation import Folds, Shelf, block_answers, fold_models
from organfast.layouts import Case, Dataset, case_labels, find_cases
from organfast.learning import Recipe, case_digests
from organfast.metrics import confusion, dice_from_confusion, label_pair
from organfast.models.classifier import Model, load_model, save_model
from organfast.models.forest import Forest
from organfast.nifti import Scan
from organfast.pipeline import Settings, segment
from organfast.progress import Progress, silent
from organfast.refinement import Refine
from organfast.results import too_large
from organfast.scans import as_scan
from organfast.scorebook import Failure

__all__ = [
    "SIZES",
    "Sweep",
    "Swept",
    "Way",
    "learned_curve",
    "model_curve",
    "store_presets",
    "ways_to_learn",
]

StrPath = str | PathLike[str]
Floats = NDArray[np.float64]

SIZES = (9, 17, 33, 49, 63, 97)
"""Block sizes that are compared unless others are named: the seed's range."""

_LEAST_TIMINGS = 3
_DIGITS = 6
_WHAT = "timing and scoring points"
_FROM_LEVELS = Block(17, levels=(1, 3, 9))


@dataclass(frozen=True)
class Sweep:
    """Settings to try, every combination of them. None is left to the model.

    Parameters
    ----------
    strides : tuple of int or None
        Voxels of the model grid between positions in a slice. None is half the model's own
        (rounded up), its own, twice and four times that.
    slice_steps : tuple of int or None
        Slices of the model grid between positions. None is the model's own and twice that.
    trees : tuple of int or None
        First trees of a forest that are asked. None is a tenth of them, two fifths, and all.
    margins : tuple of float or None
        Of coarse to fine; None within the tuple asks at every position.
    rounds : int or None
        How often each point is timed on each scan. None is once, or more often with fewer than
        three scans, so that there are three timings at least.
    n_blocks : int
        Blocks per class and case that learned ways name one by one.
    seed : int
        Of the order in which points take turns, and of the blocks.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    strides: tuple[int, ...] | None = None
    slice_steps: tuple[int, ...] | None = None
    trees: tuple[int, ...] | None = None
    margins: tuple[float | None, ...] = (None, Refine().margin)
    rounds: int | None = None
    n_blocks: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("strides", "slice_steps", "trees"):
            numbers = getattr(self, name)
            if numbers is None:
                continue
            if not numbers or not all(is_whole(n, 1) for n in numbers):
                raise ValueError(f"{name} is {numbers!r}; give whole numbers from 1, or None")
            object.__setattr__(self, name, tuple(sorted({int(n) for n in numbers})))
        if not self.margins:
            raise ValueError("margins is empty; give (None,) to ask at every position")
        for name, least in (("rounds", 1), ("n_blocks", 1), ("seed", 0)):
            value = getattr(self, name)
            if not is_whole(value, least) and not (value is None and name == "rounds"):
                raise ValueError(f"{name} is {value!r}; give a whole number from {least}")

    def settings_for(self, model: Model) -> tuple[PointSettings, ...]:
        """The settings that a model is asked with, the fastest first.

        Parameters
        ----------
        model : Model
            Whose stride and trees stand for what is None.

        Raises
        ------
        ValueError
            The forest has fewer trees, or there is no forest.
        """
        own_k, own_i, own_j = model.stride
        in_slice: Iterable[tuple[int, int]]
        if self.strides is None:
            factors = (4, 2, 1, 0.5)
            in_slice = [(math.ceil(own_j * f), math.ceil(own_i * f)) for f in factors]
        else:
            in_slice = [(n, n) for n in reversed(self.strides)]
        steps = (own_k, 2 * own_k) if self.slice_steps is None else self.slice_steps
        return tuple(
            PointSettings(
                (cols, rows, step),
                margin=None if margin is None else Refine(margin).margin,
                trees=trees,
            )
            for cols, rows in dict.fromkeys(in_slice)
            for step in sorted(set(steps), reverse=True)
            for margin in dict.fromkeys(self.margins)
            for trees in self._trees_of(model)
        )

    def _trees_of(self, model: Model) -> tuple[int | None, ...]:
        if not isinstance(model.classifier, Forest):
            if self.trees is not None:
                raise ValueError("trees are of a forest, and the model is a network; leave them")
            return (None,)
        n = model.classifier.n_trees
        if self.trees is None:
            return tuple(sorted({max(1, n // 10), max(1, 2 * n // 5), n}))
        if self.trees[-1] > n:
            raise ValueError(f"trees is {self.trees}; the forest has {n}")
        return self.trees


@dataclass(frozen=True, eq=False)
class Swept:
    """A curve, and the cases that it lacks.

    Parameters
    ----------
    curve : Curve
        Of the cases that could be used.
    failures : tuple of Failure
        Those that could not.
    left_out : tuple of str
        Cases of patients that the model has learned from.
    """

    curve: Curve
    failures: tuple[Failure, ...]
    left_out: tuple[str, ...] = ()


def model_curve(
    model: Model | StrPath,
    dataset: StrPath | Dataset,
    sweep: Sweep | None = None,
    patients: Iterable[str] | None = None,
    folder: StrPath | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Swept:
    """What a model's accuracy costs: settings to ask it with, on patients it has not learned from.

    Parameters
    ----------
    model : Model or path
        What ``train`` or ``load_model`` returned, or a ``.organfast`` file.
    dataset : path or Dataset
        A folder in one of the layouts of ``find_cases``, or what that function returned.
    sweep : Sweep, optional
        Which settings.
    patients : iterable of str, optional
        Whose cases to use; by default all. Those that the model has learned from are left out.
    folder : path, optional
        Where answers and seconds are kept, so that a run that was stopped goes on.
    threads : int
        Threads; the seconds depend on them.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    Swept
        The curve, whose presets :func:`store_presets` writes into the model's file.

    Raises
    ------
    InputError
        The dataset or the model cannot be used, or nobody is left to measure on.
    ValueError
        A patient is not in the dataset, or the settings do not fit the model.
    """
    model = model if isinstance(model, Model) else load_model(model)
    dataset = dataset if isinstance(dataset, Dataset) else find_cases(dataset)
    sweep = sweep or Sweep()
    wanted = set(dataset.patients) if patients is None else set(patients)
    unknown = wanted - set(dataset.patients)
    if unknown:
        raise ValueError(f"patient {min(unknown)} is not in {dataset.folder}")
    run = _Run(sweep, Shelf.of(folder), threads, progress)
    learned = {digests.get("image") for digests in model.training["cases"].values()}
    # Another scan of a patient who trained is no new patient either.
    known = {c.patient for c in dataset.cases if run.digests(c, "image") in learned}
    cases = [case for case in dataset.cases if case.patient in wanted - known]
    if not cases:
        raise InputError(
            dataset.folder,
            "has only patients that the model has learned from, who say nothing of new ones",
            "give labelled scans of others, or learn anew: organfast evaluate DATASET --folds 5 "
            "--curve",
        )
    contenders = [_Contender(_name(s), s, model) for s in sweep.settings_for(model)]
    rounds = sweep.rounds or math.ceil(_LEAST_TIMINGS / len(cases))
    run.expect(len(cases) * len(contenders) * rounds)
    for case in cases:
        run.measure(case, contenders, rounds)
    left_out = tuple(c.name for c in dataset.cases if c.patient in wanted & known)
    curve = run.curve(dataset, [(c.name, c.settings) for c in contenders], rounds, model.digest)
    return Swept(curve, tuple(run.failures), left_out)


@dataclass(frozen=True)
class Way:
    """A way to learn a model.

    Parameters
    ----------
    name : str
        What tells it from the others.
    pattern : Block or Context
        What the classifier sees around a position.
    recipe : Recipe
        Everything else; its split is not used.
    """

    name: str
    pattern: Block | Context
    recipe: Recipe


def ways_to_learn(
    recipe: Recipe,
    sizes: Sequence[int] = SIZES,
    levels: Sequence[tuple[int, ...]] | None = None,
    depths: Sequence[int | None] = (None,),
    context: bool = True,
) -> tuple[Way, ...]:
    """Ways to learn, for :func:`learned_curve`: blocks of every size, and context.

    Parameters
    ----------
    recipe : Recipe
        Of all of them; a forest's.
    sizes : sequence of int
        Sides of the blocks, odd, in voxels of the recipe's grid.
    levels : sequence of tuple of int, optional
        Levels that each size is read from. By default the voxels alone, and besides one small block
        of 17 on levels 1, 3 and 9.
    depths : sequence of int or None
        Most decisions between root and leaf of the trees; None is any number.
    context : bool
        3-D context, too, where the recipe has a working grid.

    Raises
    ------
    ValueError
        A size, level or depth is out of range, or the recipe is a network's.
    """
    if recipe.network is not None:
        raise ValueError(
            "block sizes are compared by forests; leave the network, or give a trained one with -m"
        )
    patterns: list[Block | Context] = [
        Block(size, levels=widths) for widths in levels or ((1,),) for size in sorted(set(sizes))
    ]
    if levels is None:
        patterns.append(_FROM_LEVELS)
    if context and recipe.grid.spacing_mm is not None:
        patterns.append(Context(spacing_mm=recipe.grid.spacing_mm))
    ways = {}
    for pattern in patterns:
        for depth in dict.fromkeys(depths):
            name = _pattern_name(pattern) + ("" if depth is None else f", depth {depth}")
            forest = replace(recipe.forest, max_depth=depth)
            ways[name] = Way(name, pattern, replace(recipe, forest=forest))
    return tuple(ways.values())


def learned_curve(
    dataset: StrPath | Dataset,
    ways: Sequence[Way],
    folds: Folds = 5,
    sweep: Sweep | None = None,
    folder: StrPath | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Swept:
    """What can be learned and what it costs: each patient by models that have not seen them.

    Parameters
    ----------
    dataset : path or Dataset
        A folder in one of the layouts of ``find_cases``, or what that function returned.
    ways : sequence of Way
        Of :func:`ways_to_learn`, or others.
    folds : int, "leave-one-out" or sequence of Split
        As for ``cross_validate``; the first way's seed deals them out.
    sweep : Sweep, optional
        How each model is asked. By default at its own stride, by a quarter of its trees and by all.
    folder : path, optional
        Where models, answers and seconds are kept, so that a run that was stopped goes on.
    threads : int
        Threads; the seconds depend on them.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    Swept
        The curve, with the smallest block that still recognises each organ.

    Raises
    ------
    InputError
        The dataset cannot be used, or no case could.
    ValueError
        There is no way, two have one name, or the folds or a recipe do not fit the dataset.
    """
    dataset = dataset if isinstance(dataset, Dataset) else find_cases(dataset)
    if not ways or len({way.name for way in ways}) != len(ways):
        raise ValueError("ways must be different ones, at least one; name them differently")
    shelf = Shelf.of(folder)
    # The largest learn first: what does not fit in memory is said before anything is learned.
    ways = sorted(ways, key=lambda way: -way.pattern.n_features)
    pairs = [(way.pattern, way.recipe) for way in ways]
    parts = fold_models(dataset, pairs, folds, shelf, threads=threads, progress=progress)
    run = _Run(sweep or Sweep(), shelf, threads, progress)
    n_cases = sum(len(part.cases) for part in parts)
    rounds = run.sweep.rounds or math.ceil(_LEAST_TIMINGS / n_cases)
    points: dict[str, PointSettings] = {}
    for number, part in enumerate(parts):
        progress("learning folds", number, len(parts))
        try:
            models = [learn() for learn in part.learners]
        except InputError as error:  # of a file, which all ways read
            run.failures += [Failure(case.name, str(error)) for case in part.cases]
            continue
        if len({model.classes.names for model in models}) > 1:
            raise ValueError("the ways learn different classes; give all of them one class table")
        contenders = [
            contender
            for way, model in zip(ways, models, strict=True)
            for contender in _contenders(way, model, run.sweep, sweep is None)
        ]
        points |= {contender.name: contender.settings for contender in contenders}
        run.expect(n_cases * len(contenders) * rounds)
        for case in part.cases:
            run.measure(case, contenders, rounds)
            run.name_blocks(case, zip((way.name for way in ways), models, strict=True))
    progress("learning folds", len(parts), len(parts))
    curve = run.curve(dataset, list(points.items()), rounds, None)
    return Swept(run.with_sizes(curve, ways), tuple(run.failures))


def store_presets(path: StrPath, curve: Curve) -> Model:
    """Write a curve and its presets into the file of the model that it was measured on.

    Parameters
    ----------
    path : path
        The model file; replaced once the new one is complete.
    curve : Curve
        Of :func:`model_curve`.

    Returns
    -------
    Model
        As it is now in the file. Its digest is what it was.

    Raises
    ------
    InputError
        The file cannot be read or written, or holds another model than was measured.
    """
    model = load_model(path)
    if curve.model != model.digest:
        raise InputError(
            path, "is not the model that the curve was measured on", "measure this one with --curve"
        )
    stored = replace(model, presets=curve)
    save_model(stored, path)
    return stored


# --- points ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Contender:
    """A point before it is measured: a model of the fold, and how it is asked."""

    name: str
    settings: PointSettings
    model: Model

    @property
    def key(self) -> dict[str, Any]:
        asked = replace(self.settings, pattern=None, max_depth=None)
        return {"model": self.model.digest, "settings": asked.to_dict()}

    @property
    def asked(self) -> Settings:
        chosen = self.settings
        refine = None if chosen.margin is None else Refine(chosen.margin, chosen.disagreement)
        return Settings(stride=chosen.stride, refine=refine, trees=chosen.trees)


def _contenders(way: Way, model: Model, sweep: Sweep, by_default: bool) -> list[_Contender]:
    if by_default:
        k, i, j = model.stride
        n = way.recipe.forest.n_trees
        asked: Iterable[PointSettings] = (
            PointSettings((j, i, k), trees=trees) for trees in sorted({max(1, n // 4), n})
        )
    else:
        asked = sweep.settings_for(model)
    depth = way.recipe.forest.max_depth
    return [
        _Contender(
            f"{way.name}, {_name(settings)}",
            replace(settings, pattern=way.pattern.to_dict(), max_depth=depth),
            model,
        )
        for settings in asked
    ]


def _name(settings: PointSettings) -> str:
    parts = ["stride {},{},{}".format(*settings.stride)]
    if settings.margin is not None:
        parts.append(f"coarse to fine {settings.margin:g}")
    if settings.trees is not None:
        parts.append(f"{settings.trees} trees")
    return ", ".join(parts)


def _pattern_name(pattern: Block | Context) -> str:
    if isinstance(pattern, Context):
        return "context"
    levels = "" if pattern.levels == (1,) else f", levels {'+'.join(map(str, pattern.levels))}"
    slices = "" if pattern.slices == 1 else f", {pattern.slices} slices"
    return f"block {pattern.size}{levels}{slices}"


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Answer:
    """One point on one case; arrays follow the organs of the class table."""

    dice: Floats
    centre_mm: Floats
    is_there: NDArray[np.bool_]
    is_missed: NDArray[np.bool_]
    seconds: float


@dataclass(eq=False)
class _Run:
    """What has been measured so far."""

    sweep: Sweep
    shelf: Shelf
    threads: int
    progress: Progress
    organs: tuple[str, ...] = ()
    failures: list[Failure] = field(default_factory=list)
    patients: dict[str, str] = field(default_factory=dict)
    answers: dict[tuple[str, str], _Answer] = field(default_factory=dict)
    recalls: dict[tuple[str, str], Floats] = field(default_factory=dict)
    _hashed: dict[str, dict[str, str]] = field(default_factory=dict)
    _warm: set[str] = field(default_factory=set)
    _done: int = 0
    _total: int = 0

    def digests(self, case: Case, name: str | None = None) -> Any:
        if case.name not in self._hashed:
            self._hashed[case.name] = case_digests(case)
        return self._hashed[case.name] if name is None else self._hashed[case.name][name]

    def expect(self, total: int) -> None:
        self._total = total
        self.progress(_WHAT, self._done, total)

    def measure(self, case: Case, contenders: Sequence[_Contender], rounds: int) -> None:
        """Answers and seconds of all contenders on a case; a case that fails is no case."""
        self.organs = tuple(
            contenders[0].model.classes.names[n] for n in contenders[0].model.classes.organs
        )
        due = self._done + len(contenders) * rounds
        try:
            found = self._measured(case, contenders, rounds)
        except InputError as error:
            self.failures.append(Failure(case.name, str(error)))
        except MemoryError:
            self.failures.append(Failure(case.name, str(too_large(case.image))))
        else:
            self.patients[case.name] = case.patient
            self.answers |= {(name, case.name): answer for name, answer in found.items()}
        self._done = due
        self.progress(_WHAT, self._done, self._total)

    def _measured(
        self, case: Case, contenders: Sequence[_Contender], rounds: int
    ) -> dict[str, _Answer]:
        opened: _Opened | None = None
        entries: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
        for number in range(rounds):
            order = np.random.default_rng((self.sweep.seed, number)).permutation(len(contenders))
            for n in order:
                contender = contenders[int(n)]
                key = self._key(case, contender, number)
                entry = self.shelf.entry("curve", case.name, key)
                if entry is None:
                    opened = opened or _Opened.of(case, contender.model)
                    self._warm_up(opened, contender)
                    entry = opened.entry(contender, self.threads, is_scored=number == 0)
                    self.shelf.keep_entry("curve", case.name, key, entry)
                entries[contender.name].append(entry)
                self._done += 1
                self.progress(_WHAT, self._done, self._total)
        return {name: _answer(of_rounds) for name, of_rounds in entries.items()}

    def _key(self, case: Case, contender: _Contender, number: int) -> dict[str, Any]:
        return {
            "organfast": __version__,
            "case": [case.name, self.digests(case)],
            **contender.key,
            "threads": self.threads,
            "round": number,
        }

    def _warm_up(self, opened: _Opened, contender: _Contender) -> None:
        """An untimed run: of a forest once, of a network for each program that it compiles."""
        is_forest = isinstance(contender.model.classifier, Forest)
        what = "forest" if is_forest else f"{opened.name} {contender.name}"
        if what not in self._warm:
            self._warm.add(what)
            segment(opened.scan, contender.model, contender.asked, threads=self.threads)

    def name_blocks(self, case: Case, models: Iterable[tuple[str, Model]]) -> None:
        """Share of each organ's blocks that are named rightly, one by one."""
        if case.name not in self.patients:
            return
        for name, model in models:
            key = {
                "organfast": __version__,
                "case": [case.name, self.digests(case)],
                "model": model.digest,
                "blocks": [self.sweep.n_blocks, self.sweep.seed],
            }
            counts = self.shelf.entry("curve", case.name, key)
            if counts is None:
                truth, found = block_answers(model, case, self.sweep.n_blocks, self.sweep.seed)
                counts = confusion(truth, found.argmax(axis=1), len(model.classes)).tolist()
                self.shelf.keep_entry("curve", case.name, key, counts)
            table = np.array(counts, np.int64)
            organs = list(model.classes.organs)
            n_true = table.sum(axis=1)[organs]
            recall = np.full(len(organs), np.nan)
            np.divide(table.diagonal()[organs], n_true, out=recall, where=n_true > 0)
            self.recalls[name, case.name] = recall

    # --- what it says together ---

    def curve(
        self,
        dataset: Dataset,
        points: Sequence[tuple[str, PointSettings]],
        rounds: int,
        model: str | None,
    ) -> Curve:
        if not self.patients:
            reason = f": {self.failures[0].reason}" if self.failures else ""
            raise InputError(
                dataset.folder,
                f"has no case that could be measured{reason}",
                "see `organfast info`",
            )
        return Curve(
            points=tuple(self._point(dataset, name, settings) for name, settings in points),
            n_patients=len(set(self.patients.values())),
            n_cases=len(self.patients),
            n_timings=rounds * len(self.patients),
            threads=self.threads,
            model=model,
        )

    def _point(self, dataset: Dataset, name: str, settings: PointSettings) -> CurvePoint:
        answers = {case: self.answers[name, case] for case in self.patients}
        dice = self._by_patient({case: a.dice for case, a in answers.items()})
        centre = self._by_patient({case: a.centre_mm for case, a in answers.items()})
        mean_dice = _mean(np.array([_mean(row) for row in dice]))
        if math.isnan(mean_dice):
            raise InputError(
                dataset.folder,
                "has none of the model's organs to be scored",
                "see `organfast info`, and give scans on which they are labelled",
            )
        seconds = float(np.median([a.seconds for a in answers.values()]))
        recalls = {
            case: found
            for (way, case), found in self.recalls.items()
            if name.startswith(f"{way}, stride ")
        }
        recall = self._by_organ(self._by_patient(recalls)) if recalls else None
        return CurvePoint(
            name=name,
            scans_per_minute=float(f"{60 / seconds:.6g}"),
            mean_dice=round(mean_dice, _DIGITS),
            dice=self._by_organ(dice),
            centre_mm=self._by_organ(centre),
            n_missed=int(sum(a.is_missed.sum() for a in answers.values())),
            settings=settings,
            block_recall=recall,
        )

    def _by_patient(self, of_cases: Mapping[str, Floats]) -> Floats:
        """(n_patients, n_organs): means over each patient's cases, patients in order."""
        rows: dict[str, list[Floats]] = {}
        for case, values in of_cases.items():
            rows.setdefault(self.patients[case], []).append(values)
        return np.array(
            [[_mean(column) for column in np.array(rows[p]).T] for p in sorted(rows)]
        ).reshape(len(rows), len(self.organs))

    def _by_organ(self, table: Floats) -> dict[str, float | None]:
        means = [_mean(column) for column in table.T]
        return {
            organ: None if math.isnan(mean) else round(mean, _DIGITS)
            for organ, mean in zip(self.organs, means, strict=True)
        }

    def with_sizes(self, curve: Curve, ways: Sequence[Way]) -> Curve:
        """The smallest block of each organ, by the points that differ in nothing but the size."""
        plain = {
            way.pattern.size: way.name
            for way in ways
            if isinstance(way.pattern, Block)
            and way.pattern == Block(way.pattern.size)
            and way.recipe.forest.max_depth is None
        }
        sizes = sorted(plain)
        if len(sizes) < 2:
            return curve
        best = self._point_of_each(curve, plain)
        dice = [self._answers_of(best[size]) for size in sizes]
        recall = [
            self._by_patient({c: self.recalls[plain[size], c] for c in self.patients})
            for size in sizes
        ]
        return replace(
            curve,
            smallest=self._smallest(sizes, dice),
            smallest_by_recall=self._smallest(sizes, recall),
        )

    def _point_of_each(self, curve: Curve, plain: Mapping[int, str]) -> dict[int, str]:
        """Size -> its point: of the settings that all sizes were asked with, the most thorough."""

        def effort(point: CurvePoint) -> tuple[float, ...]:
            s = point.settings
            return (-math.prod(s.stride), s.margin is None, s.trees or math.inf)

        return {
            size: max(
                (p for p in curve.points if p.name.startswith(f"{way}, stride ")), key=effort
            ).name
            for size, way in plain.items()
        }

    def _answers_of(self, name: str) -> Floats:
        """Dice by patient, NaN where the organ is not there: what is false is no recognition."""
        of_cases = {}
        for case in self.patients:
            answer = self.answers[name, case]
            of_cases[case] = np.where(answer.is_there, answer.dice, np.nan)
        return self._by_patient(of_cases)

    def _smallest(
        self, sizes: Sequence[int], tables: Sequence[Floats]
    ) -> dict[str, Smallest | None]:
        return {
            organ: smallest_as_good(
                sizes, np.stack([table[:, n] for table in tables], axis=1), TOLERANCE
            )
            for n, organ in enumerate(self.organs)
        }


@dataclass(frozen=True, eq=False)
class _Opened:
    """A case that was read: its scan, and the truth on the scan's own grid."""

    name: str
    scan: Scan
    truth: NDArray[Any]
    scored: NDArray[np.bool_]

    @staticmethod
    def of(case: Case, model: Model) -> _Opened:
        scan = as_scan(case.image)
        labelled = case_labels(case, model.classes, scan.volume)
        learned = model.training.get("n_cases_with", {})
        scored = [
            organ not in labelled.missing and bool(learned.get(model.classes.names[organ], 1))
            for organ in model.classes.organs
        ]
        truth = np.minimum(labelled.labels, len(model.classes))  # whatever has no label
        return _Opened(case.name, scan, truth, np.array(scored, bool))

    def entry(self, contender: _Contender, threads: int, *, is_scored: bool) -> dict[str, Any]:
        """What is kept of a run, for JSON: its seconds and, of the first one, its scores."""
        result = segment(self.scan, contender.model, contender.asked, threads=threads)
        stages = {**result.timings["seconds"], "read": 0.0}
        entry: dict[str, Any] = {"seconds": sum(stages.values())}
        if not is_scored:
            return entry
        classes = contender.model.classes
        pair = label_pair(self.truth, result.labels, len(classes) + 1)
        organs = list(classes.organs)
        n_true, n_found = pair.n_voxels[:, organs]
        axes = np.asarray(self.scan.volume.affine, np.float64)[:3, :3]
        apart = np.linalg.norm((pair.centroids[0] - pair.centroids[1]) @ axes.T, axis=1)[organs]
        dice = dice_from_confusion(pair.counts)[organs]
        return entry | {
            "dice": _plain(np.where(self.scored, dice, np.nan)),
            "centre_mm": _plain(np.where(self.scored, apart, np.nan)),
            "is_there": (self.scored & (n_true > 0)).tolist(),
            "is_missed": (self.scored & (n_true > 0) & (n_found == 0)).tolist(),
        }


def _answer(of_rounds: Sequence[Mapping[str, Any]]) -> _Answer:
    first = of_rounds[0]
    return _Answer(
        dice=_floats(first["dice"]),
        centre_mm=_floats(first["centre_mm"]),
        is_there=np.array(first["is_there"], bool),
        is_missed=np.array(first["is_missed"], bool),
        seconds=float(np.median([entry["seconds"] for entry in of_rounds])),
    )


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else math.nan


def _plain(values: Floats) -> list[float | None]:
    return [None if math.isnan(x) else x for x in values.tolist()]


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)
