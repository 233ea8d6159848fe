"""How good a model is, or a way to learn one: labelled scans segmented as a user would, and scored.

::

    dataset --(patient_folds)--> folds --(train, without the fold's patients)--> a model per fold
    case --(segment)--> label map on the scan's own grid --(score_labels)--> scores of each organ
         --(block_answers)--> balanced blocks: confusion, reliability

An organ that a case does not annotate, or that its model was never shown, is not scored there.
Where a folder is given, each case is written to it once it is scored, and each fold's model once it
is learned; what is there already, of the same files and settings, is not done again.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from organfast import __version__
from organfast.adaptation import check_adapts
from organfast.anatomy import ClassTable
from organfast.blocks import Block, Context, pattern_on
from organfast.calibration import brier_score, log_loss, reliability
from organfast.curve import curve_csv
from organfast.errors import InputError, is_whole
from organfast.files import written_whole
from organfast.layouts import Case, Dataset, case_labels, dataset_classes, find_cases
from organfast.learning import Recipe, case_digests, probabilities_at, train
from organfast.metrics import SCORES, confidence_histogram, confusion, score_labels
from organfast.models.classifier import Model, load_model, save_model
from organfast.pipeline import Settings, check_settings, segment
from organfast.progress import Progress, silent
from organfast.results import REPORT, too_large
from organfast.sampling import Split, labelled_scan, sample_positions
from organfast.scorebook import BlockAnswers, CaseScores, Evaluation, Failure, evaluation_csv
from organfast.statistics import patient_folds
from organfast.thumbnail import thumbnail
from organfast.volume import Volume

__all__ = [
    "FoldModels",
    "Scoring",
    "Shelf",
    "block_answers",
    "case_pictures",
    "cross_validate",
    "evaluate",
    "fold_models",
    "read_folds",
    "save_evaluation",
]

StrPath = str | PathLike[str]
Folds = int | Literal["leave-one-out"] | Sequence[Split]

WHAT = "evaluating cases"
_WRITABLE = "give a folder you may write to"


@dataclass(frozen=True)
class Scoring:
    """How cases are scored and what is made of the scores.

    Parameters
    ----------
    tolerance_mm : float, mm
        Of the normalised surface Dice.
    n_blocks : int
        Most blocks of each class and case that are classified by themselves; 0 for none.
    settings : Settings
        How scans are segmented; all organs are, whatever it says.
    level : float
        Of the intervals.
    n_resamples : int
        How often patients are drawn for an interval.
    seed : int
        Of the blocks and of the intervals.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    tolerance_mm: float = 2.0
    n_blocks: int = 200
    settings: Settings = field(default_factory=Settings)
    level: float = 0.95
    n_resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n_blocks", 0), ("n_resamples", 1), ("seed", 0)):
            if not is_whole(getattr(self, name), least):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; give a whole number from {least}"
                )
        if not self.tolerance_mm >= 0:
            raise ValueError(f"tolerance_mm is {self.tolerance_mm!r}; give 0 mm or more")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level!r}; give a share between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """As the record of an evaluation holds it."""
        return {
            "tolerance_mm": self.tolerance_mm,
            "n_blocks": self.n_blocks,
            "settings": asdict(self.settings),
            "level": self.level,
            "n_resamples": self.n_resamples,
            "seed": self.seed,
        }


# --- evaluating -----------------------------------------------------------------------------------


def evaluate(
    model: Model | StrPath,
    dataset: StrPath | Dataset,
    scoring: Scoring | None = None,
    patients: Iterable[str] | None = None,
    folder: StrPath | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Evaluation:
    """Score a model on labelled scans.

    Parameters
    ----------
    model : Model or path
        What ``train`` or ``load_model`` returned, or a ``.organfast`` file.
    dataset : path or Dataset
        A folder in one of the layouts of ``find_cases``, or what that function returned.
    scoring : Scoring, optional
        How to segment and to score.
    patients : iterable of str, optional
        Whose cases to use; by default all. Cases that the model was trained on are marked.
    folder : path, optional
        Where each case's scores are kept, so that a run that was stopped goes on.
    threads : int
        Threads; the scores do not depend on them.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    Evaluation
        A case that cannot be used is among its ``failures``, and the others are scored.

    Raises
    ------
    InputError
        The model or the dataset cannot be used, or the folder cannot be written to.
    ValueError
        A patient is not in the dataset, or the settings do not fit the model.
    """
    model = model if isinstance(model, Model) else load_model(model)
    dataset = _scans(dataset)
    scoring = scoring or Scoring()
    check_settings(scoring.settings, model)
    wanted = set(dataset.patients) if patients is None else set(patients)
    unknown = wanted - set(dataset.patients)
    if unknown:
        raise ValueError(f"patient {min(unknown)} is not in {dataset.folder}")
    cases = [case for case in dataset.cases if case.patient in wanted]
    shelf = Shelf.of(folder)
    run = _Run(scoring, shelf, threads, progress, len(cases))
    run.score(cases, _Given(model), None)
    return run.evaluation(model.classes, {"model": model.digest})


def cross_validate(
    dataset: StrPath | Dataset,
    pattern: Block | Context | None = None,
    recipe: Recipe | None = None,
    folds: Folds = 5,
    scoring: Scoring | None = None,
    folder: StrPath | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Evaluation:
    """Score a way to learn: each patient is segmented by a model that has not seen them.

    Each fold's model is learned from nothing but the recipe and the other patients.

    Parameters
    ----------
    dataset : path or Dataset
        A folder in one of the layouts of ``find_cases``, or what that function returned.
    pattern : Block or Context, optional
        What the classifier sees around a position.
    recipe : Recipe, optional
        Everything else that shapes a model; its split is not used, its seed deals out the folds.
    folds : int, "leave-one-out" or sequence of Split
        How many folds of patients, one patient at a time, or the folds themselves: learned from
        ``train``, tested on ``test``.
    scoring : Scoring, optional
        How to segment and to score.
    folder : path, optional
        Where models and scores are kept, so that a run that was stopped goes on.
    threads : int
        Threads; the scores do not depend on them.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    Evaluation
        Of all folds. A fold that cannot be learned leaves its cases among the ``failures``.

    Raises
    ------
    InputError
        The dataset cannot be used, or the folder cannot be written to.
    ValueError
        The folds or the recipe do not fit the dataset.
    """
    dataset, scoring = _scans(dataset), scoring or Scoring()
    pattern, recipe = _way(dataset, pattern, recipe or Recipe())
    if scoring.settings.adapt:
        check_adapts(recipe.grid)
    splits = _splits(dataset, folds, recipe.seed)
    tested = [[case for case in dataset.cases if case.patient in s.test] for s in splits]
    shelf = Shelf.of(folder)
    run = _Run(scoring, shelf, threads, progress, sum(map(len, tested)))
    how = {"pattern": pattern.to_dict(), "recipe": _fingerprint(recipe)}
    for fold, (split, cases) in enumerate(zip(splits, tested, strict=True)):
        # Training is not told whom it is tested on: it would score blocks of them, too.
        untested = replace(recipe, split=Split(split.train, split.validation))
        run.score(cases, _Learned(dataset, pattern, untested, run), fold)
    record = {
        **how,
        "folds": [{use: list(names) for use, names in asdict(s).items()} for s in splits],
    }
    assert recipe.classes is not None
    return run.evaluation(recipe.classes, record)


@dataclass(frozen=True, eq=False)
class FoldModels:
    """A fold, and what learns the models that are tested in it.

    Parameters
    ----------
    split : Split
        Whom they learn from, and whom they are tested on.
    cases : tuple of Case
        Of the tested patients.
    learners : tuple of callable
        One for each way to learn: called without arguments it gives the model, of the shelf where
        it is there.
    """

    split: Split
    cases: tuple[Case, ...]
    learners: tuple[Callable[[], Model], ...]


def fold_models(
    dataset: Dataset,
    ways: Sequence[tuple[Block | Context | None, Recipe]],
    folds: Folds,
    shelf: Shelf,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> tuple[FoldModels, ...]:
    """Folds of several ways to learn: the models of :func:`cross_validate`, to be asked otherwise.

    Parameters
    ----------
    dataset : Dataset
        What ``find_cases`` returned.
    ways : sequence of (Block, Context or None, Recipe)
        As for :func:`cross_validate`; the first one's seed deals out the folds.
    folds : int, "leave-one-out" or sequence of Split
        As for :func:`cross_validate`.
    shelf : Shelf
        Where models are kept.
    threads : int
        Threads; the models do not depend on them.
    progress : callable, optional
        Called with (what, done, total) while a model is learned.

    Raises
    ------
    InputError
        The dataset cannot be used.
    ValueError
        The folds or a recipe do not fit the dataset.
    """
    dataset = _scans(dataset)
    full = [_way(dataset, pattern, recipe) for pattern, recipe in ways]
    splits = _splits(dataset, folds, full[0][1].seed)
    run = _Run(Scoring(), shelf, threads, progress, 0)
    return tuple(
        FoldModels(
            split,
            tuple(case for case in dataset.cases if case.patient in split.test),
            tuple(partial(_learned, dataset, way, split, run) for way in full),
        )
        for split in splits
    )


def _learned(
    dataset: Dataset, way: tuple[Block | Context, Recipe], split: Split, run: _Run
) -> Model:
    """A fold's model, which nothing here keeps in memory."""
    pattern, recipe = way
    untested = replace(recipe, split=Split(split.train, split.validation))
    return _Learned(dataset, pattern, untested, run).model()


def _way(
    dataset: Dataset, pattern: Block | Context | None, recipe: Recipe
) -> tuple[Block | Context, Recipe]:
    """A way to learn, with all that it leaves to the dataset filled in."""
    if recipe.network is None:
        pattern = pattern_on(recipe.grid, pattern)
    else:
        pattern = recipe.network.pattern_on(recipe.grid, pattern)
        outputs = recipe.network.outputs
        wishes = ("checkpoints", "log", "tensorboard", "report")
        if outputs is not None and any(getattr(outputs, wish) is not None for wish in wishes):
            raise ValueError(
                "the network has outputs, and checkpoints of one fold must not reach the next; "
                "leave them out"
            )
        recipe = replace(recipe, network=replace(recipe.network, outputs=None))
    # One table for all folds, whatever the patients that train in one of them lack.
    classes = recipe.classes or dataset_classes(dataset)
    return pattern, replace(recipe, classes=classes, split=None)


def _scans(dataset: StrPath | Dataset) -> Dataset:
    dataset = dataset if isinstance(dataset, Dataset) else find_cases(dataset)
    if dataset.layout == "blocks":
        raise InputError(
            dataset.folder,
            "holds blocks that were cut out, and no scan to segment",
            "give labelled scans; `organfast train --split` scores blocks",
        )
    return dataset


def _splits(dataset: Dataset, folds: Folds, seed: int) -> tuple[Split, ...]:
    patients = set(dataset.patients)
    if isinstance(folds, (int, str)):
        if isinstance(folds, str) and folds != "leave-one-out":
            raise ValueError(f"folds is {folds!r}; give a number, 'leave-one-out' or splits")
        dealt = patient_folds(patients, folds if isinstance(folds, int) else None, seed)
        return tuple(Split(tuple(sorted(patients - set(t))), (), t) for t in dealt)
    for split in folds:
        split.check(patients)
        if not split.test:
            raise ValueError("a fold has no patient to test on; name one in its split")
    return tuple(folds)


def read_folds(path: StrPath, dataset: Dataset) -> tuple[Split, ...]:
    """Read folds: a split of ``Split.read``, which is one, or nnU-Net's ``splits_final.json``.

    Parameters
    ----------
    path : path
        JSON. nnU-Net names cases, and tests on what it calls ``val``; ``splits_final.json#2`` is
        its third fold alone.
    dataset : Dataset
        Whose patients or cases it names.

    Raises
    ------
    InputError
        The file is no such split, or does not fit the dataset.
    """
    patient_of = {case.name: case.patient for case in dataset.cases}
    folds: tuple[Split, ...] = (Split.read(path, patient_of),)  # which checks the file
    content = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else [None]
    if isinstance(content, list):  # nnU-Net's, whole or, with a #, one of them
        numbers = range(1, len(content))
        named = (*folds, *(Split.read(f"{path}#{n}", patient_of) for n in numbers))
        folds = tuple(Split(fold.train, (), fold.validation) for fold in named)
    for fold in folds:
        try:
            fold.check(dataset.patients)
        except ValueError as error:
            raise InputError(path, str(error), "see `organfast info DATASET`") from None
    return folds


class _Source(Protocol):
    """Where the model of some cases comes from."""

    @property
    def key(self) -> dict[str, Any]:
        """All that the model depends on."""

    def model(self) -> Model:
        """The model; asked for only if a case has no scores yet."""


@dataclass(frozen=True, eq=False)
class _Given:
    """A model that is there."""

    given: Model

    @property
    def key(self) -> dict[str, Any]:
        return {"model": self.given.digest}

    def model(self) -> Model:
        return self.given


@dataclass(frozen=True, eq=False)
class _Learned:
    """The model of a fold, learned when it is first asked for."""

    dataset: Dataset
    pattern: Block | Context
    recipe: Recipe
    run: _Run

    @cached_property
    def key(self) -> dict[str, Any]:
        split = self.recipe.split or Split(self.dataset.patients)
        learned_from = {*split.train, *split.validation}
        cases = [case for case in self.dataset.cases if case.patient in learned_from]
        return {
            "organfast": __version__,
            "pattern": self.pattern.to_dict(),
            "recipe": _fingerprint(self.recipe),
            "cases": {case.name: self.run.digests(case) for case in cases},
        }

    def model(self) -> Model:
        outcome = self._outcome
        if isinstance(outcome, InputError):
            raise outcome
        return outcome

    @cached_property
    def _outcome(self) -> Model | InputError:
        """A fold that cannot be learned is not tried again for each of its cases."""
        run = self.run

        def learn() -> Model:
            return train(
                self.dataset,
                self.pattern,
                self.recipe,
                threads=run.threads,
                progress=run.progress,
            )

        try:
            return run.shelf.model(self.key, learn)
        except InputError as error:
            return error


@dataclass(eq=False)
class _Run:
    """Cases scored so far, and those that could not be."""

    scoring: Scoring
    shelf: Shelf
    threads: int
    progress: Progress
    n_cases: int
    cases: list[CaseScores] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    hashed: dict[str, dict[str, str]] = field(default_factory=dict)

    def digests(self, case: Case) -> dict[str, str]:
        """What the case is; each file is hashed once, in however many folds it trains."""
        if case.name not in self.hashed:
            self.hashed[case.name] = case_digests(case)
        return self.hashed[case.name]

    def score(self, cases: Sequence[Case], source: _Source, fold: int | None) -> None:
        """Score the cases of a fold, those that were scored before excepted."""
        for case in cases:
            self._tell()
            try:
                key = {
                    "organfast": __version__,
                    "case": [case.name, case.patient, self.digests(case), fold],
                    "model": source.key,
                    # The number of resamples and the level change the score of no case.
                    "scoring": _fingerprint(replace(self.scoring, n_resamples=1, level=0.5)),
                }
                scores = self.shelf.case(case.name, key)
                if scores is None:
                    scores = _scored(case, source.model(), self.scoring, fold, self.threads)
                    self.shelf.keep(case.name, key, scores)
            except InputError as error:
                self.failures.append(Failure(case.name, str(error)))
            except MemoryError:
                self.failures.append(Failure(case.name, str(too_large(case.image))))
            else:
                self.cases.append(scores)
        self._tell()

    def _tell(self) -> None:
        self.progress(WHAT, len(self.cases) + len(self.failures), self.n_cases)

    def evaluation(self, classes: ClassTable, what: Mapping[str, Any]) -> Evaluation:
        return Evaluation(
            classes=classes.names,
            organs=tuple(classes.names[n] for n in classes.organs),
            cases=tuple(sorted(self.cases, key=lambda case: (case.name, case.fold or 0))),
            failures=tuple(self.failures),
            how={"organfast": __version__, **self.scoring.to_dict(), **what},
        )


# --- one case -------------------------------------------------------------------------------------


def _scored(
    case: Case, model: Model, scoring: Scoring, fold: int | None, threads: int
) -> CaseScores:
    classes = model.classes
    n, organs = len(classes), list(classes.organs)
    # The context classes stay in, so that the confusion matrix shows what an organ was taken for.
    settings = replace(scoring.settings, organs=None, keep_context=True, probabilities=())
    result = segment(case.image, model, settings, threads=threads)
    volume = result.scan.volume
    labelled = case_labels(case, classes, volume)
    learned = model.training.get("n_cases_with", {})
    scored = {
        organ
        for organ in organs
        if organ not in labelled.missing and learned.get(classes.names[organ], 1)
    }
    truth = np.minimum(labelled.labels, n)  # whatever has no label
    found = score_labels(
        truth,
        result.labels,
        volume.affine,
        (n + 1, scored),
        scoring.tolerance_mm,
        threads=threads,
    )
    judged = np.isin(np.arange(n), list(scored))
    confidence = np.zeros((2, 256), np.int64)
    if result.confidence is not None:
        confidence = confidence_histogram(truth, result.labels, result.confidence, judged)
    known = {digests.get("image") for digests in model.training["cases"].values()}
    return CaseScores(
        name=case.name,
        patient=case.patient,
        fold=fold,
        model=model.digest,
        was_trained_on=result.record["input"] in known,
        annotated=judged[organs],
        present=np.array([result.organs[classes.names[o]].present for o in organs], bool),
        truth_ml=found.truth_ml[organs],
        predicted_ml=found.predicted_ml[organs],
        scores={name: getattr(found, name)[organs] for name in SCORES},
        voxels=found.counts[:, :n],
        confidence=confidence,
        blocks=_blocks(case, model, scoring) if scoring.n_blocks else None,
        warnings=(*result.warnings, *labelled.warnings),
        picture=_picture(volume, truth, result.labels, found.dice, sorted(scored)),
    )


def _picture(
    volume: Volume,
    truth: NDArray[Any],
    found: NDArray[Any],
    dice: NDArray[np.float64],
    scored: Sequence[int],
) -> bytes | None:
    """The organ with the lowest Dice; None where none was scored."""
    judged = [organ for organ in scored if not np.isnan(dice[organ])]
    if not judged:
        return None
    working = volume.orientation.working
    worst = min(judged, key=lambda organ: dice[organ])
    return thumbnail(volume, working(truth), working(found), worst)


def _blocks(case: Case, model: Model, scoring: Scoring) -> BlockAnswers | None:
    truth, found = block_answers(model, case, scoring.n_blocks, scoring.seed)
    if not len(truth):
        return None
    return BlockAnswers(
        confusion(truth, found.argmax(axis=1), len(model.classes)),
        reliability(found, truth),
        brier_score(found, truth),
        log_loss(found, truth),
    )


def block_answers(
    model: Model, case: Case, n_per_class: int = 200, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Class probabilities at balanced positions of a labelled case.

    Parameters
    ----------
    model : Model
        Asked at each position by itself.
    case : Case
        Of ``find_cases``.
    n_per_class : int
        Most positions of each class.
    seed : int
        Of the positions, together with the name of the case.

    Returns
    -------
    labels : (n,) int64
        Classes that are right.
    probabilities : (n, n_classes) float32
        What the model says.

    Raises
    ------
    InputError
        The case cannot be used.
    """
    n_classes = len(model.classes)
    scan = labelled_scan(case, model.classes, model.grid)
    of_name = int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:8], "little")
    positions, labels = sample_positions(
        scan.labels, dict.fromkeys(range(n_classes), n_per_class), (seed, of_name)
    )
    return labels, probabilities_at(model, scan.grid_volume, positions)


# --- what is kept ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shelf:
    """A folder of finished cases and models, each found by all that it depends on; or none.

    Parameters
    ----------
    folder : Path or None
        Of :meth:`of`, which makes it; without one nothing is kept.
    """

    folder: Path | None

    @staticmethod
    def of(folder: StrPath | None) -> Shelf:
        """A shelf in a folder, made where it does not exist; InputError if it cannot be."""
        if folder is None:
            return Shelf(None)
        folder = Path(folder)
        try:
            for name in ("cases", "models"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from None
        return Shelf(folder)

    def case(self, name: str, key: Mapping[str, Any]) -> CaseScores | None:
        """The scores of a case; None where they are not there whole."""
        path = self._path("cases", name, key, ".json")
        if path is None or not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != key:
                return None
            return replace(CaseScores.from_dict(content["scores"]), picture=_picture_in(content))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # damaged: the case is scored again

    def keep(self, name: str, key: Mapping[str, Any], scores: CaseScores) -> None:
        """Keep the scores of a case."""
        path = self._path("cases", name, key, ".json")
        if path is not None:
            drawn = scores.picture
            packed = None if drawn is None else base64.b64encode(drawn).decode("ascii")
            _write(path, _json({"key": key, "scores": scores.to_dict(), "picture": packed}))

    def entry(self, kind: str, name: str, key: Mapping[str, Any]) -> Any:
        """What :meth:`keep_entry` kept of a kind; None where it is not there whole."""
        path = self._path(kind, name, key, ".json")
        if path is None or not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["entry"] if content["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # damaged: it is made again

    def keep_entry(self, kind: str, name: str, key: Mapping[str, Any], entry: Any) -> None:
        """Keep what is for JSON in a folder of its kind."""
        path = self._path(kind, name, key, ".json")
        if path is not None:
            try:
                path.parent.mkdir(exist_ok=True)
            except OSError as error:
                raise _unwritable(path.parent, error) from None
            _write(path, _json({"key": key, "entry": entry}))

    def model(self, key: Mapping[str, Any], learn: Callable[[], Model]) -> Model:
        """The model of a fold; learned, and kept, where it is not there."""
        path = self._path("models", "fold", key, ".organfast")
        if path is None:
            return learn()
        if path.exists():
            return load_model(path)
        model = learn()
        save_model(model, path)
        return model

    def _path(self, kind: str, name: str, key: Mapping[str, Any], ending: str) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(_json(key).encode()).hexdigest()
        plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:80]
        return self.folder / kind / f"{plain}-{digest[:20]}{ending}"


def case_pictures(folder: StrPath) -> dict[tuple[str, int | None, str], bytes]:
    """Pictures of cases that an evaluation keeps in its folder: (name, fold, model) -> PNG.

    Parameters
    ----------
    folder : path
        What ``evaluate`` was given; a case whose file is damaged has no picture.
    """
    pictures = {}
    for path in sorted((Path(folder) / "cases").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            picture, scores = _picture_in(content), content["scores"]
            if picture is not None:
                pictures[scores["name"], scores["fold"], scores["model"]] = picture
    return pictures


def _picture_in(content: Mapping[str, Any]) -> bytes | None:
    packed = content.get("picture")
    return None if packed is None else base64.b64decode(packed, validate=True)


def save_evaluation(evaluation: Evaluation, folder: StrPath) -> None:
    """Write ``evaluation.json``, ``evaluation.csv`` and ``report.html``, each whole or not at all.

    Where there is a curve, ``curve.csv`` and ``curve.png`` as well.

    Parameters
    ----------
    evaluation : Evaluation
        What to write.
    folder : path
        Made where it does not exist; the files of an earlier evaluation are replaced.

    Raises
    ------
    InputError
        They cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    _write(folder / "evaluation.json", _json(evaluation.to_dict()))
    _write(folder / "evaluation.csv", evaluation_csv(evaluation))
    if evaluation.curve is not None:
        from organfast.curvefigure import curve_figure
        from organfast.overlay import save_png

        _write(folder / "curve.csv", curve_csv(evaluation.curve))
        save_png(curve_figure(evaluation.curve), folder / "curve.png")
    evaluation.report(folder / REPORT)


def _write(path: Path, text: str) -> None:
    with written_whole(path, _WRITABLE) as beside:
        beside.write_text(text, encoding="utf-8")


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(path, f"cannot be written ({reason})", _WRITABLE)


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n"


def _fingerprint(value: Any) -> Any:
    """Settings as JSON: dataclasses by their fields, a model by its digest."""
    if isinstance(value, Model):
        return value.digest
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _fingerprint(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _fingerprint(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fingerprint(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no setting that a run could be recognised by")
