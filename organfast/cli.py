"""The command line: reads arguments, calls the library, prints. Nothing imports it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from organfast.errors import InputError

if TYPE_CHECKING:
    from organfast.adaptation import Adapt
    from organfast.anatomy import ClassTable
    from organfast.batch import BatchPlan
    from organfast.batchinputs import BatchInput
    from organfast.batchworker import Outcome, Outputs
    from organfast.certificate import Certificate
    from organfast.curve import Curve
    from organfast.evaluation import Folds
    from organfast.layouts import Dataset
    from organfast.learning import Recipe
    from organfast.models.classifier import Model
    from organfast.networklearning import NetworkRecipe
    from organfast.organs import Organ
    from organfast.pipeline import Settings
    from organfast.progress import Progress
    from organfast.refinement import Refine
    from organfast.sampling import Split
    from organfast.scorebook import Evaluation
    from organfast.statistics import PairedComparison
    from organfast.sweep import Sweep, Swept
    from organfast.verification import Verification

EXIT_INPUT, EXIT_USAGE, EXIT_SOME_FAILED = 1, 2, 3

app = typer.Typer(
    name="organfast",
    help=(
        "Learn organs from a few labelled CT scans, then find, locate and segment them in new ones."
        "\n\nExit codes: 0 done, 1 input that cannot be used, 2 wrong usage, 3 some scans of "
        "several failed. One line on standard error says why; --debug shows the traceback."
        "\n\nFor research use only, not a medical device."
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Scans = Annotated[
    list[str],
    typer.Option(
        "-i",
        "--input",
        readable=False,  # whether it can be read is told as of any scan
        help="A scan (.nii, .nii.gz, or a DICOM series: its folder, a zip, FOLDER#N for one "
        "series of several), a folder of scans, a .txt list of paths, a pattern in quotes, or the "
        "URL of a file, a folder or a pattern (s3://...); repeatable.",
    ),
]
ModelFile = Annotated[
    Path, typer.Option("-m", "--model", readable=False, help="A .organfast file.")
]
_MODEL_HELP = "A .organfast file; `starter` is the model that comes with the package."
UsualModel = Annotated[Path, typer.Option("-m", "--model", readable=False, help=_MODEL_HELP)]
Stride = Annotated[
    str | None,
    typer.Option(help="Voxels between positions: N, or COLS,ROWS,SLICES. Default: the model's."),
]
CoarseToFine = Annotated[
    bool | None,
    typer.Option(
        "--coarse-to-fine/--full-grid",
        help="Ask at every second position first, then only where that leaves a doubt; "
        "`organfast verify` tells what it changes.",
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        min=0, help="With --coarse-to-fine: doubt where the best class leads by less than this."
    ),
]
Trees = Annotated[
    int | None,
    typer.Option(min=1, help="Ask so many of a forest's trees, the first ones. Default: all."),
]
Adapting = Annotated[
    bool | None,
    typer.Option(
        "--adapt/--no-adapt",
        help="Let the organs of the scan itself, their HU and its edges, correct what the model "
        "says; not on native pixels. Default: as the model was trained.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="fast, balanced or accurate: stride, coarse to fine and trees as measured by "
        "`organfast evaluate --curve --store`; options given besides go before."
    ),
]
Layout = Annotated[
    str,
    typer.Option(help="auto, totalsegmentator, visceral, nnunet, msd, pairs or blocks."),
]
Device = Annotated[
    str, typer.Option(help="Where a network runs: auto, cpu or gpu. Forests run on the CPU.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads; results do not depend on it.")]
Calibration = Annotated[
    str,
    typer.Option(
        help="How confidence is brought to how often it is right, on the patients who validate: "
        "temperature, isotonic or none."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]


# Typer's parent of all usage errors, which it took over from click.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    debug = "--debug" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name need not be text; on standard error Python does the same by itself.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(
            [a for a in arguments if a != "--debug"], prog_name="organfast", standalone_mode=False
        )
        sys.stdout.flush()
    except (ValueError, OSError, MemoryError, typer.Abort, _UsageError) as error:
        if debug:
            raise
        return _failed(error)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_INPUT
    return code if isinstance(code, int) else 0


def _open_streams() -> None:
    """Give a process that was started without them its three streams.

    Else the next file it opens would get their numbers, and what is said would go into a scan.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _failed(error: Any) -> int:
    """Say on one line what went wrong, and return the exit code."""
    if isinstance(error, _UsageError):
        command = "organfast" if error.ctx is None else error.ctx.command_path
        _complain(f"{error.format_message().rstrip('.')}; see {command} --help")
        return EXIT_USAGE
    if isinstance(error, ValueError):
        _complain(str(error))
        return EXIT_INPUT if isinstance(error, InputError) else EXIT_USAGE
    if isinstance(error, BrokenPipeError):
        # Who read has gone; else Python complains once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif isinstance(error, OSError):
        where = error.filename or "the output"
        _complain(f"{where}: cannot be used ({error.strerror}); check its name and the disk")
    elif isinstance(error, MemoryError):
        _complain("there is too little memory; use a machine with more, or crop the scan")
    else:
        _complain("interrupted")
    return EXIT_INPUT


# --- commands -------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Flags of the program itself; each command has a --help of its own."""
    if version:
        from organfast import __version__

        print(f"organfast {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(EXIT_USAGE)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to fill.")] = Path("demo"),
    patients: Annotated[int, typer.Option(min=1, help="Phantom patients to paint.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the cohort and of the forest.")] = 0,
    cnn: Annotated[
        bool, typer.Option("--cnn", help="Learn a network instead of a forest: some minutes more.")
    ] = False,
    threads: Threads = 2,
) -> None:
    """Paint a phantom cohort, learn from it, segment a scan that was not in it. Works offline."""
    from organfast.demo import run_demo

    kind = "cnn" if cnn else "forest"
    with _progress() as progress:
        scores = run_demo(out, patients, seed, kind=kind, threads=threads, progress=progress)
    rows = [
        (s.name, f"{s.volume_ml:.0f}", _number(s.dice, 2), _number(s.centre_error_mm, 0))
        for s in scores
    ]
    _table(("organ", "volume ml", "Dice", "centre off by mm"), rows)
    dice = [s.dice for s in scores if not math.isnan(s.dice)]
    print(
        f"\nOne phantom patient who was not in training: mean Dice {sum(dice) / len(dice):.2f} of"
    )
    print(f"{len(dice)} organs. Phantoms are made up: this says nothing of real scans. Look at")
    for name in ("segmented/report.html", "segmented/overlay.png", "segmented"):
        _say(f"  {out / name}")


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(help="Folder of labelled scans.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Model file to write.")],
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Learn from blocks with this side, odd, in voxels. Default: from 3-D context, "
            "or blocks of 33 on native pixels; a cnn of towers from 17 on three levels."
        ),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(help="Widths of the box averages that the block is read from. Default: 1."),
    ] = None,
    slices: Annotated[int | None, typer.Option(help="Slices in a block, odd. Default: 1.")] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            help="Working grid X,Y,Z in mm, or `native` for the scan's own pixels. "
            "Default: 1.5,1.5,3, or 3,3,3 for a cnn, or native for a dataset of blocks."
        ),
    ] = None,
    classes: Annotated[
        str,
        typer.Option(
            help="`default` (the 23 that the dataset has), `dataset` (all it labels), or a CSV."
        ),
    ] = "default",
    layout: Layout = "auto",
    split: Annotated[
        Path | None,
        typer.Option(
            help="JSON of patients: train, validation, test; or nnU-Net's splits_final.json, "
            "its first fold, or that after a #: splits_final.json#2."
        ),
    ] = None,
    n_per_class: Annotated[int, typer.Option(min=1, help="Blocks per class and patient.")] = 1000,
    context_factor: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The context classes get so many times as many blocks. "
            "Default: 3, or 1 with a single patient.",
        ),
    ] = None,
    least_share: Annotated[
        float | None,
        typer.Option(
            help="Draw classes by how often they are, but each at least this share as often as the "
            "most frequent one, such as 0.02; --n-per-class is then of the rarest. Default: all "
            "alike, but for the context.",
        ),
    ] = None,
    nuisance: Annotated[
        bool, typer.Option(help="Learn also what the dataset labels beside the classes.")
    ] = True,
    guide: Annotated[
        Path | None,
        typer.Option(help="An earlier model: half of the blocks are drawn where it errs."),
    ] = None,
    augment: Annotated[
        int, typer.Option(min=0, help="Altered copies of each case to draw blocks from as well.")
    ] = 0,
    paint: Annotated[
        int,
        typer.Option(min=0, help="CT scans to paint on altered copies of each case's label map."),
    ] = 0,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Most memory for the blocks, such as 8GB. Default: half of all."),
    ] = None,
    model: Annotated[str, typer.Option(help="forest or cnn, a convolutional network.")] = "forest",
    architecture: Annotated[
        str, typer.Option(help="Of a cnn: towers, or the seed's readme and readme-pool.")
    ] = "towers",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a cnn: batches learned from, at most.")
    ] = None,
    standardise: Annotated[
        bool, typer.Option("--standardise", help="Of a cnn: mean 0, deviation 1 in each block.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="Of a cnn: folder of checkpoints, from the latest of which it goes on."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Of a cnn: file that gets a line of JSON every ten steps.")
    ] = None,
    device: Device = "auto",
    trees: Annotated[int, typer.Option(min=1, help="Trees of the forest.")] = 100,
    forest: Annotated[str, typer.Option(help="extra_trees or random_forest.")] = "extra_trees",
    calibration: Calibration = "temperature",
    adapt: Annotated[
        bool,
        typer.Option(
            "--adapt",
            help="The model lets the organs of each scan correct what it says, as segment's "
            "--adapt does, unless that says --no-adapt.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """Learn a model from a folder of labelled scans, and score it on patients held out."""
    from organfast.adaptation import Adapt
    from organfast.augmentation import Augmentation
    from organfast.blocks import Block
    from organfast.grid import ModelGrid
    from organfast.layouts import find_cases
    from organfast.learning import Recipe, Sampling
    from organfast.learning import train as learn
    from organfast.models.classifier import load_model, save_model
    from organfast.models.forest import ForestSettings
    from organfast.results import check_file_target

    pattern = None
    if block_size is not None:
        widths = _integers("--levels", "1" if levels is None else levels)
        pattern = Block(block_size, levels=widths, slices=1 if slices is None else slices)
    elif levels is not None or slices is not None:
        flag = "--slices" if levels is None else "--levels"
        raise typer.BadParameter("is about a block; give --block-size as well", param_hint=flag)
    if context_factor is not None and least_share is not None:
        raise typer.BadParameter(
            "says nothing where --least-share does; leave one of them",
            param_hint="--context-factor",
        )
    found = find_cases(dataset, layout)
    network = _network(model, architecture, steps, standardise, seed, (resume, log, device))
    if spacing is None:
        usual = "1.5,1.5,3" if network is None else "3,3,3"
        spacing = "native" if found.layout == "blocks" else usual
    spacing_mm = None if spacing == "native" else _three_lengths(spacing)
    recipe = Recipe(
        grid=ModelGrid(spacing_mm, "piecewise" if spacing_mm else "identity"),
        n_per_class=n_per_class,
        context_factor=context_factor,
        forest=ForestSettings(kind=forest, n_trees=trees, seed=seed),
        network=network,
        paint=paint,
        classes=_classes(classes, found),
        split=None if split is None else _split(split, found),
        seed=seed,
        sampling=Sampling(
            nuisance=nuisance,
            guide=None if guide is None else load_model(guide),
            least_share=least_share,
        ),
        augmentation=Augmentation(copies=augment) if augment else None,
        calibration=None if calibration == "none" else calibration,
        adapt=Adapt() if adapt else None,
        max_memory_gb=None if max_memory is None else _gigabytes("--max-memory", max_memory),
    )
    check_file_target(out)
    with _progress() as progress:
        learned = learn(found, pattern, recipe, threads=threads, progress=progress)
    save_model(learned, out)
    for warning in learned.training["warnings"]:
        _complain(f"{dataset}: warning: {warning}")
    for note in learned.training.get("notes", ()):
        _complain(f"{dataset}: note: {note}")
    if as_json:
        _json({"model": str(out), "digest": learned.digest, **_described(learned)})
        return
    n_cases, n_patients = len(found.cases), len(found.patients)
    print(f"layout {found.layout}: {n_cases} cases of {n_patients} patients")
    _describe(learned)
    _say(f"wrote {out}")


@app.command()
def segment(
    scans: Scans,
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="A folder, its URL, or NAME.nii.gz for one label map alone.",
        ),
    ],
    model: Annotated[
        str, typer.Option("-m", "--model", help=f"{_MODEL_HELP.rstrip('.')}; or a URL.")
    ] = "starter",
    organs: Annotated[
        str | None, typer.Option(help="Organs to keep, parted by commas. Default: all.")
    ] = None,
    stride: Stride = None,
    preset: Preset = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Components of an organ to keep: largest, parts (also those half as large), "
            "dust (all but), none. Default: parts with an atlas, else largest."
        ),
    ] = None,
    fill_holes: Annotated[bool, typer.Option(help="Fill holes inside organs.")] = True,
    body_mask: Annotated[bool, typer.Option(help="Look only inside the body.")] = True,
    context: Annotated[
        bool, typer.Option("--context", help="Leave the context classes in the label map.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write a full-size map per organ kept.")
    ] = False,
    coarse_to_fine: CoarseToFine = None,
    margin: Margin = None,
    trees: Trees = None,
    adapt: Adapting = None,
    atlas: Annotated[
        bool,
        typer.Option(
            help="When adapting, rule organs out where hardly any scan that was learned from has "
            "them; leave it where an organ was transplanted or lies on the other side."
        ),
    ] = True,
    labels_only: Annotated[
        bool,
        typer.Option(
            "--labels-only",
            help="No confidence: the same labels sooner, at stride 1 with a native model.",
        ),
    ] = False,
    output_type: Annotated[
        list[str] | None,
        typer.Option(
            "-ot",
            "--output-type",
            help="nifti, or dicom_seg for a DICOM series; repeatable. Default: nifti.",
        ),
    ] = None,
    preview: Annotated[bool, typer.Option(help="Draw overlay.png.")] = True,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html: a viewer in one page, offline.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Of several scans: processes, which share the threads.")
    ] = 1,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Most memory of all processes together, such as 2GB. Default: no limit."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Of several scans: only part i of N, as i/N, by the scans' names."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Of Dask, whose workers segment (tcp://host:port or its .json file); --threads "
            "are then of each scan."
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """Segment scans: label map, organs, pictures. One scan fills OUT, several a folder each.

    Of several, OUT/batch.jsonl has a record of each; the same command goes on where it was
    interrupted. `organfast merge` puts the records of shards together.
    """
    from organfast.batch import BatchPlan
    from organfast.batchinputs import find_inputs, parse_shard
    from organfast.batchworker import Outputs
    from organfast.batchworker import loaded as load
    from organfast.pipeline import Settings
    from organfast.remote import is_url, shown
    from organfast.results import is_one_file
    from organfast.segmentation import Cleaning

    types = _output_types(output_type, out)
    inputs = find_inputs(scans, out)
    is_elsewhere = scheduler is not None or any(map(is_url, [*scans, out]))
    is_one = len(scans) == 1 and [Path(one.path) for one in inputs] == [Path(scans[0])]
    is_batch = is_elsewhere or not is_one
    _check_place(scans, out, is_batch=is_batch, shard=shard)
    plan = BatchPlan(
        workers,
        None if max_memory is None else _gigabytes("--max-memory", max_memory),
        (1, 1) if shard is None else parse_shard(shard),
        device,
        scheduler,
    )
    if probabilities and is_one_file(out):
        raise ValueError(f"--probabilities needs a folder, and {out} is one file")
    if report and is_one_file(out):
        raise ValueError(f"--report needs a folder, and {out} is one file")
    loaded = load(model if is_url(model) else Path(model), device)
    _introduce_starter(model, loaded)
    names = None if organs is None else tuple(name.strip() for name in organs.split(","))
    wanted = names or tuple(loaded.classes.names[n] for n in loaded.classes.organs)
    for name in wanted:
        loaded.classes.index(name)
    kept = wanted if probabilities else ()
    settings = Settings(
        organs=names,
        cleaning=Cleaning(keep=keep, fill_holes=fill_holes),  # type: ignore[arg-type]  # checked
        body_mask=body_mask,
        keep_context=context,
        probabilities=kept,
        confidence=not labels_only,
        adapt=adapt if atlas else _without_atlas(adapt, loaded),
    )
    asked = (_stride(stride), coarse_to_fine, _refine(coarse_to_fine, margin), trees)
    settings = _with_shortcuts(settings, asked, preset, (Path(shown(model)), loaded))

    outputs = Outputs(preview, kept, report, types)
    if not is_batch:
        outputs.check(scans[0])
        scan = Path(scans[0])
        _check_fits(scan, loaded, settings, plan)
        _segment_one(scan, Path(out), loaded, (settings, outputs), threads=threads, as_json=as_json)
        return
    how = (model, settings, outputs, plan)
    raise typer.Exit(_segment_batch(inputs, out, how, threads=threads, as_json=as_json))


@app.command()
def merge(
    folders: Annotated[
        list[str],
        typer.Argument(help="Output folders of `organfast segment` of several scans, or URLs."),
    ],
    as_json: AsJson = False,
) -> None:
    """Put the records of a batch's shards together, and say which scans failed or are missing.

    batch.jsonl, sorted by input, is written into the first folder; results stay where they are.
    """
    from organfast.ledgers import merge as merge_records
    from organfast.remote import shown

    merged = merge_records(folders)
    n_failed, n_missing = len(merged.failed), len(merged.missing)
    n_done = len(merged.records) - n_failed
    for record in merged.failed:
        _complain(f"{record['input']}: {record['error']}")
    for name in merged.missing:
        _complain(f"{name}: has not been segmented; run its shard, or the same command, again")
    if as_json:
        _json({"done": n_done, "failed": n_failed, "missing": n_missing})
    else:
        print(f"{n_done} scans done, {n_failed} failed, {n_missing} missing")
        _say(f"wrote {shown(folders[0]).rstrip('/')}/batch.jsonl")
    if n_failed or n_missing:
        raise typer.Exit(EXIT_SOME_FAILED if n_done else EXIT_INPUT)


@app.command()
def locate(
    scan: Annotated[
        Path, typer.Option("-i", "--input", readable=False, help="A scan, as for segment.")
    ],
    model: UsualModel = Path("starter"),
    stride: Stride = None,
    preset: Preset = None,
    trees: Trees = None,
    adapt: Adapting = None,
    device: Device = "auto",
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """Say where each organ is, from half as many positions as segmenting, or by a preset."""
    from organfast.batchworker import loaded as load
    from organfast.organs import organs_json
    from organfast.pipeline import Settings, half_as_dense
    from organfast.pipeline import segment as find

    loaded = load(model, device)
    _introduce_starter(model, loaded)
    asked = (_stride(stride), None, None, trees)
    settings = _with_shortcuts(Settings(adapt=adapt), asked, preset, (model, loaded))
    settings = half_as_dense(settings, loaded)
    result = find(scan, loaded, settings, threads=threads)
    _warn(scan, result.warnings)
    if as_json:
        print(organs_json(result.organs), end="")
        return
    _organ_table(result.organs.values())


@app.command()
def calibrate(
    dataset: Annotated[Path, typer.Argument(help="Folder of labelled scans.")],
    model: ModelFile,
    out: Annotated[Path, typer.Option("-o", "--output", help="Model file to write.")],
    kind: Annotated[
        str, typer.Option(help="temperature (one number) or isotonic (a curve for each class).")
    ] = "temperature",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks per class and case to fit to.")] = 500,
    layout: Layout = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the blocks.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Bring a model's confidence to how often it is right, on patients that it does not know.

    All such patients of the dataset are used, but those that the model keeps to be tested on.
    """
    from organfast.layouts import find_cases
    from organfast.models.classifier import load_model, save_model
    from organfast.recalibration import calibrated
    from organfast.results import check_file_target

    check_file_target(out)
    found = calibrated(
        load_model(model), find_cases(dataset, layout), kind, n_per_class=blocks, seed=seed
    )
    save_model(found.model, out)
    before, after = found.calibration_error
    if as_json:
        _json(
            {
                "model": str(out),
                "digest": found.model.digest,
                "patients": list(found.patients),
                "calibration_error": {"before": before, "left_out": after},
                "calibration": _described(found.model)["calibration"],
            }
        )
        return
    n = len(found.patients)
    print(f"{_calibration_text(found.model)}, fitted to {n} patient{'s' if n > 1 else ''}")
    left_out = (
        f"{after:.1%} after, each patient by a calibration fitted to the others"
        if after is not None
        else "after: not known, for a single patient leaves nobody to test on"
    )
    print(f"confidence off by {before:.1%} before, {left_out}")
    _say(f"wrote {out}")


@app.command()
def verify(
    scan: Annotated[Path, typer.Argument(help="A scan, as for segment.")],
    model: ModelFile,
    coarse_to_fine: CoarseToFine = False,
    margin: Margin = None,
    stride: Stride = None,
    adapt: Adapting = None,
    voxels: Annotated[
        int, typer.Option(min=1, help="Of the certificate: voxels to recompute.")
    ] = 200,
    stride_one: Annotated[
        bool, typer.Option(help="Of the certificate: segment at stride 1, too, and compare.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the certificate: which voxels.")] = 0,
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """Certify that the fast way says what the slow way says; or tell what a shortcut changes.

    The certificate recomputes voxels of the scan from copied blocks, with none of the code that
    segments, and counts the labels that stride 1 would change. It fails, with exit code 1, where a
    label is another. What is recomputed is what the model says, before a scan's own organs correct
    it.

    With --coarse-to-fine, a --stride, or both, the scan is segmented with that shortcut and without
    it, at the model's own stride with every position asked, and the two are compared; --adapt is
    for both of them.
    """
    from organfast.certificate import certify
    from organfast.pipeline import Settings
    from organfast.verification import verify as compare

    refine = _refine(coarse_to_fine, margin)
    if refine is None and stride is None:
        if adapt is not None:
            raise ValueError(
                f"{_adapting(adapt)} goes with a shortcut, for the certificate is of what the "
                "model says before a scan corrects it; give --coarse-to-fine or --stride, or leave "
                "it"
            )
        with _progress() as progress:
            certificate = certify(
                scan, model, voxels, seed, stride_one=stride_one, threads=threads, progress=progress
            )
        if as_json:
            _json(certificate.to_dict())
        else:
            _certified(certificate)
        if certificate.flipped_voxels:
            raise typer.Exit(EXIT_INPUT)
        return
    settings = Settings(stride=_stride(stride), refine=refine, adapt=adapt)
    with _progress() as progress:
        found = compare(scan, model, settings, threads=threads, progress=progress)
    _warn(scan, found.warnings)
    if as_json:
        _json(found.to_dict())
        return
    _verified(found)
    _saved(found)


@app.command()
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="Folder of labelled scans.")],
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="A .organfast file to evaluate.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, help="Learn as often, and test each patient once, unseen."),
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="As many folds as patients.")
    ] = False,
    split: Annotated[
        Path | None,
        typer.Option(
            help="JSON of patients, or nnU-Net's splits_final.json. With -m, those to test; "
            "without, the folds themselves."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for evaluation.json, evaluation.csv, report.html, with --curve curve.csv "
            "and curve.png, and what a run that was stopped goes on from.",
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With -m: another model to compare on the same patients.")
    ] = None,
    adapt: Adapting = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Of the surface Dice, mm.")] = 2.0,
    blocks: Annotated[
        int, typer.Option(min=0, help="Blocks per class and case to judge by themselves.")
    ] = 200,
    block_size: Annotated[
        int | None, typer.Option(help="Folds learn from blocks of this side, not from context.")
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="Widths of the box averages a block is read from; with --curve several such "
            "lists, 1;1,3,9."
        ),
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Accuracy against throughput, too: with -m of settings to ask the model with, "
            "else of block sizes and of context, learned anew.",
        ),
    ] = False,
    store: Annotated[
        bool,
        typer.Option(
            "--store", help="With -m and --curve: write the curve and its presets into the model."
        ),
    ] = False,
    sizes: Annotated[
        str | None,
        typer.Option(help="With --curve, of folds: block sizes. Default: 9,17,33,49,63,97."),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="With --curve, of folds: depths of the trees, such as 8,none."),
    ] = None,
    strides: Annotated[
        str | None,
        typer.Option(help="With --curve: strides in the slice. Default: around the model's own."),
    ] = None,
    slice_steps: Annotated[
        str | None,
        typer.Option(help="With --curve: slices between positions. Default: own and twice that."),
    ] = None,
    tree_counts: Annotated[
        str | None, typer.Option(help="With --curve: trees of the forest that are asked.")
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            help="Working grid of the folds, X,Y,Z in mm, or `native`. Default: 1.5,1.5,3; 3,3,3 "
            "for a cnn."
        ),
    ] = None,
    classes: Annotated[
        str, typer.Option(help="What the folds learn: `default`, `dataset`, or a CSV.")
    ] = "default",
    layout: Layout = "auto",
    n_per_class: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Blocks per class and patient that folds learn from. Default: 1000, or 200 with "
            "--curve.",
        ),
    ] = None,
    trees: Annotated[
        int | None,
        typer.Option(min=1, help="Trees of the folds' forests. Default: 100, or 40 with --curve."),
    ] = None,
    learn: Annotated[str, typer.Option(help="What folds learn: forest or cnn.")] = "forest",
    architecture: Annotated[str, typer.Option(help="Of a cnn, as for train.")] = "towers",
    steps: Annotated[int | None, typer.Option(min=1, help="Of a cnn, as for train.")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    threads: Threads = 2,
    as_json: AsJson = False,
) -> None:
    """Score a model, or folds of models, on labelled scans; means with 95 % intervals.

    Give one of --model, --folds, --leave-one-out and --split. Intervals are bootstrapped over
    patients. An organ that a case does not annotate is not scored there.
    """
    from organfast.batchworker import loaded as load
    from organfast.blocks import Block
    from organfast.evaluation import (
        Scoring,
        cross_validate,
        read_folds,
        save_evaluation,
    )
    from organfast.evaluation import evaluate as score
    from organfast.grid import ModelGrid
    from organfast.layouts import find_cases
    from organfast.learning import Recipe
    from organfast.models.forest import ForestSettings
    from organfast.pipeline import Settings
    from organfast.scorebook import compare
    from organfast.sweep import model_curve

    _check_ways(
        {"--model": model, "--folds": folds, "--leave-one-out": leave_one_out or None}, split
    )
    if against is not None and model is None:
        raise ValueError("--against compares with a model; give --model as well")
    if levels is not None and block_size is None and not curve:
        raise ValueError("--levels is about a block; give --block-size as well")
    _check_curve(
        curve,
        model,
        {"--store": store or None},
        {"--sizes": sizes, "--depths": depths},
        {"--strides": strides, "--slice-steps": slice_steps, "--tree-counts": tree_counts},
        adapt,
    )
    sweep = _sweep(strides, slice_steps, tree_counts, seed, is_learned=model is None)
    found = find_cases(dataset, layout)
    scoring = Scoring(tolerance, blocks, Settings(adapt=adapt), seed=seed)
    splits = None if split is None else read_folds(split, found)
    other = None
    swept: Swept | None = None
    with _progress() as progress, _kept(out, curve and model is None) as folder:
        if model is not None:
            tested = None if splits is None else {p for s in splits for p in s.test}

            def judged(path: Path) -> Evaluation:
                loaded = load(path, device)
                return score(
                    loaded, found, scoring, tested, out, threads=threads, progress=progress
                )

            evaluation = judged(model)
            other = None if against is None else judged(against)
            if curve:
                loaded = load(model, device)
                swept = model_curve(
                    loaded, found, sweep, tested, out, threads=threads, progress=progress
                )
        else:
            network = _network(learn, architecture, steps, False, seed, (None, None, device))
            spacing = spacing or ("1.5,1.5,3" if network is None else "3,3,3")
            spacing_mm = None if spacing == "native" else _three_lengths(spacing)
            recipe = Recipe(
                grid=ModelGrid(spacing_mm, "piecewise" if spacing_mm else "identity"),
                n_per_class=n_per_class or (200 if curve else 1000),
                forest=ForestSettings(n_trees=trees or (40 if curve else 100), seed=seed),
                network=network,
                classes=_classes(classes, found),
                seed=seed,
            )
            dealt: Folds = splits or folds or "leave-one-out"
            sets = [_integers("--levels", part) for part in (levels or "1").split(";")]
            pattern = None if block_size is None else Block(block_size, levels=sets[0])
            if curve:
                swept = _learned_curve(
                    (found, recipe, dealt, sweep),
                    (sizes, None if levels is None else sets, depths),
                    folder,
                    threads=threads,
                    progress=progress,
                )
            evaluation = cross_validate(
                found,
                pattern,
                recipe,
                dealt,
                scoring,
                folder,
                threads=threads,
                progress=progress,
            )
    if swept is not None:
        evaluation = replace(evaluation, curve=swept.curve)
        _stored(swept, model if store else None)
    if out is not None:
        save_evaluation(evaluation, out)
        if other is not None:
            save_evaluation(other, out / "against")
    compared = None if other is None else compare(evaluation, other)
    _evaluated(evaluation, other, compared, as_json=as_json)
    if swept is not None and not as_json:
        _told_curve(swept.curve, model if store else None, out)
    failed = [f for e in (evaluation, other, swept) if e is not None for f in e.failures]
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED if evaluation.cases else EXIT_INPUT)


@app.command()
def view(
    out: Annotated[Path, typer.Argument(help="A folder of segment or evaluate, or a report.")],
    scan: Annotated[
        Path | None,
        typer.Option("-i", "--input", help="The scan of the result: makes its report anew."),
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = True,
) -> None:
    """Open the report of a result or an evaluation; make it where it is missing.

    A result knows its labels, not where its scan lies: without -i a missing report shows labels
    alone.
    """
    from organfast.viewing import report_of

    path = report_of(out, scan)
    print(path)
    if show:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            _complain(f"{path}: no browser could be started; open the file in one")


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A .organfast model, or a folder of scans.")],
    layout: Layout = "auto",
    check: Annotated[
        bool,
        typer.Option(
            "--check/--quick",
            help="Read every scan of a dataset and say what is wrong with it, or only list it.",
        ),
    ] = False,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Describe a model, or list what is recognised in a dataset and, with --check, its faults.

    Faults (exit code 1) would spoil training: files that cannot be read, labels on another grid,
    HU that are none, left and right exchanged, an impossible order of organs, masks of two organs
    that overlap, one scan under two patients. Notes (exit code 0) are worth a look: empty masks,
    organs that most others have, odd volumes and spacings. --threads cases are in memory at a time.
    """
    if path.is_dir():
        from organfast.layouts import find_cases

        dataset = find_cases(path, layout)
        if check:
            raise typer.Exit(_checked(dataset, threads=threads, as_json=as_json))
        described = _described_dataset(dataset)
    elif check or layout != "auto":
        flag = "--check" if check else "--layout"
        raise ValueError(f"{flag} is about a dataset, and {path} is no folder; leave it")
    else:
        from organfast.models.classifier import load_model

        model = load_model(path)
        described = {"digest": model.digest, **_described(model)}
    if as_json:
        _json(described)
        return
    for key, value in described.items():
        _say(f"{key:12}  {_plain(value)}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A .organfast file with a CNN in it.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    to: Annotated[str, typer.Option(help="onnx or stablehlo.")] = "onnx",
) -> None:
    """Write the network of a CNN for other programs; kept only if it gives what the model gives.

    It takes blocks of the levels of the model's grid, (n, levels, slices, size, size) int16, and
    gives probabilities, (n, classes) float32. The ONNX file's metadata name the classes, the
    pattern, the window and the grid.
    """
    from organfast.models.classifier import load_model
    from organfast.models.export import TOLERANCE, export_model
    from organfast.results import check_file_target

    check_file_target(out)
    export_model(load_model(model), out, to)
    _say(f"wrote {out}: probabilities within {TOLERANCE:g} of the model's")


@app.command()
def bench(
    full: Annotated[
        bool, typer.Option("--full", help="All block sizes, strides and threads, too.")
    ] = False,
    cnn: Annotated[
        bool, typer.Option("--cnn", help="The CNN, too, dense and block by block; needs JAX.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time organfast against its peers and this machine's limits, as ratios; takes minutes."""
    from organfast import benchcnn
    from organfast.bench import measure_all, run_record, sweep_rows, table_rows
    from organfast.benchcases import SWEEP, TABLE

    rounds = 3 if quick else 9
    flags = {"--full": full, "--cnn": cnn, "--quick": quick}
    command = " ".join(["organfast bench", *(flag for flag, given in flags.items() if given)])
    networks, notes = benchcnn.cnn_cases() if cnn else {}, [benchcnn.gpu_note()] if cnn else []
    with _progress() as progress:
        table = measure_all([*TABLE.values(), *networks.values()], rounds, progress)
        sweep = measure_all(SWEEP.values() if full else (), rounds, progress)
    record = run_record(table, dict(zip(SWEEP, sweep, strict=False)), command, notes)
    if as_json:
        _json(record)
        return
    machine = record["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB, {record['date']}\n")
    _table(("work", "ours", "against", "times as fast"), table_rows(record["table"]))
    if full:
        print()
        _table(
            ("work", "positions/s", "Mvoxel/s", "ns a visit", "MB", "times scikit-learn"),
            sweep_rows(record["sweep"]),
        )
    skipped = sorted({name for c in record["table"] for name in c["skipped"]})
    if skipped:
        print(f"\nnot installed, skipped: {', '.join(skipped)}")
    for note in record["notes"]:
        print(f"\n{note}")


# --- arguments ------------------------------------------------------------------------------------


def _integers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} {text} is no list of integers; give N or N,N,...") from None


def _gigabytes(flag: str, text: str) -> float:
    """Memory such as 8GB, 500MB or 1.5GiB, in GiB; one prefix is as good as the other."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(?:i?B)?", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"{flag} {text} is no amount of memory; give one such as 8GB or 500MB")
    return float(match[1]) / (1024 if match[2] in "Mm" else 1)


def _stride(text: str | None) -> int | tuple[int, int, int] | None:
    if text is None:
        return None
    numbers = _integers("--stride", text)
    if min(numbers) < 1:
        raise ValueError(f"--stride {text} is less than 1 voxel; give N or COLS,ROWS,SLICES")
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 3:
        return numbers[0], numbers[1], numbers[2]
    raise ValueError(f"--stride {text} has {len(numbers)} numbers; give N or COLS,ROWS,SLICES")


def _network(
    model: str,
    architecture: str,
    steps: int | None,
    standardise: bool,
    seed: int,
    run: tuple[Path | None, Path | None, str],
) -> NetworkRecipe | None:
    """What network to learn, where one is asked for."""
    if model not in ("forest", "cnn"):
        raise typer.BadParameter(f"{model!r} is unknown; use forest or cnn", param_hint="--model")
    resume, log, device = run
    given = {
        "--architecture": architecture != "towers",
        "--steps": steps is not None,
        "--standardise": standardise,
        "--resume": resume is not None,
        "--log": log is not None,
        "--device": device != "auto",
    }
    if model == "forest":
        for flag, is_given in given.items():
            if is_given:
                raise typer.BadParameter("is about a cnn; give --model cnn", param_hint=flag)
        return None
    from organfast.networklearning import NetworkRecipe, training_settings

    options = {"seed": seed, "device": device} | ({} if steps is None else {"steps": steps})
    settings, outputs = training_settings(options, architecture, checkpoints=resume, log=log)
    return NetworkRecipe(architecture, standardise=standardise, training=settings, outputs=outputs)


def _refine(coarse_to_fine: bool | None, margin: float | None) -> Refine | None:
    from organfast.refinement import Refine

    if not coarse_to_fine:
        if margin is not None:
            raise ValueError("--margin says where --coarse-to-fine asks; give that, too")
        return None
    return Refine() if margin is None else Refine(margin)


def _adapting(adapt: bool) -> str:
    return "--adapt" if adapt else "--no-adapt"


def _without_atlas(adapt: bool | None, model: Model) -> Adapt:
    """How a model adapts as asked for, but for the atlas."""
    from organfast.pipeline import Settings

    usual = Settings(adapt=adapt).adapts(model)
    if usual is None or model.atlas is None:
        raise ValueError("--no-atlas leaves nothing out, for no atlas would be used; leave it")
    return replace(usual, atlas=False)


def _three_lengths(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--spacing {text} is not X,Y,Z in mm; give 1.5,1.5,3 or native") from None
    return x, y, z


def _classes(choice: str, dataset: Dataset) -> ClassTable | None:
    from organfast.anatomy import ClassTable
    from organfast.layouts import check_classes

    if choice == "default":
        return None
    if choice == "dataset":
        return ClassTable.from_names(dataset.structures)
    classes = ClassTable.read(choice)
    try:
        check_classes(classes, dataset)
    except ValueError as error:
        problem, _, remedy = str(error).partition("; ")
        raise InputError(choice, problem, remedy) from None
    return classes


def _split(path: Path, dataset: Dataset) -> Split:
    from organfast.sampling import Split

    split = Split.read(path, {case.name: case.patient for case in dataset.cases})
    try:
        split.check(dataset.patients)
    except ValueError as error:
        raise InputError(path, str(error), "see `organfast info DATASET`") from None
    return split


def _output_types(given: list[str] | None, out: str) -> tuple[str, ...]:
    from organfast.results import OUTPUT_TYPES, is_one_file

    types = tuple(dict.fromkeys(given or ["nifti"]))
    for name in types:
        if name not in OUTPUT_TYPES:
            known = " or ".join(OUTPUT_TYPES)
            raise typer.BadParameter(f"{name!r} is unknown; use {known}", param_hint="-ot")
    if types != ("nifti",) and is_one_file(out):
        raise ValueError(f"-ot dicom_seg needs a folder, and {out} is one file")
    return types


def _check_place(scans: list[str], out: str, *, is_batch: bool, shard: str | None) -> None:
    """Refuse an output that one scan, or several, cannot have."""
    from organfast.results import is_one_file

    if is_batch:
        if is_one_file(out):
            raise ValueError(f"{out} is one file, but there are several scans; give a folder")
        return
    if os.path.realpath(out) == os.path.realpath(scans[0]):
        raise ValueError(f"{out} is the scan itself; give another output")
    if shard is not None:
        raise ValueError("--shard parts several scans, and there is one; leave it")


def _check_fits(scan: Path, model: Model, settings: Settings, plan: BatchPlan) -> None:
    """Refuse a scan that takes more memory than is allowed."""
    from organfast.memory import LIBRARIES, resident_bytes, scan_bytes

    if plan.max_memory_gb is None:
        return
    held = resident_bytes() + LIBRARIES
    needs = (held + (scan_bytes(scan, model, settings) or 0)) / (1 << 30)
    if needs > plan.max_memory_gb:
        problem = f"needs about {needs:.2g} GB of memory, more than {plan.max_memory_gb:.3g} GB"
        raise InputError(scan, problem, "allow more (--max-memory), or crop the scan")


def _with_shortcuts(
    settings: Settings,
    asked: tuple[int | tuple[int, int, int] | None, bool | None, Refine | None, int | None],
    preset: str | None,
    source: tuple[Path, Model],
) -> Settings:
    """Settings of a preset, if one is wanted, and over it what was asked for one by one."""
    from organfast.curve import LOSSES
    from organfast.pipeline import Settings

    stride, coarse_to_fine, refine, trees = asked
    path, model = source
    base = settings
    if preset is not None:
        if preset not in LOSSES:
            raise ValueError(f"--preset {preset} is unknown; use {', '.join(LOSSES)}")
        try:
            base = Settings.of_preset(model, preset)
        except ValueError as error:
            problem, _, remedy = str(error).partition("; ")
            raise InputError(path, problem, remedy) from None
    return replace(
        settings,
        stride=base.stride if stride is None else stride,
        refine=base.refine if coarse_to_fine is None else refine,
        trees=base.trees if trees is None else trees,
        preset=preset,
    )


def _check_ways(ways: dict[str, Any], split: Path | None) -> None:
    """One way to come by a model, and only one."""
    chosen = [flag for flag, value in ways.items() if value is not None]
    if len(chosen) > 1 or not (chosen or split) or (split and chosen not in ([], ["--model"])):
        given = " and ".join([*chosen, *(["--split"] if split else [])]) or "none of them"
        raise ValueError(
            f"give one of --model, --folds, --leave-one-out and --split, not {given}; "
            "--split goes with --model, too"
        )


def _check_curve(
    curve: bool,
    model: Path | None,
    stored: dict[str, Any],
    learned: dict[str, Any],
    either: dict[str, Any],
    adapt: bool | None,
) -> None:
    """Refuse flags that say nothing without others, or that a curve does not heed."""
    if curve and adapt is not None:
        raise ValueError(
            f"a curve asks models as they were trained; leave it, or {_adapting(adapt)}"
        )
    for flag, value in {**stored, **learned, **either}.items():
        if value is None:
            continue
        if not curve:
            raise ValueError(f"{flag} is about a curve; give --curve as well")
        if flag in stored and model is None:
            raise ValueError(f"{flag} is about a model; give --model as well")
        if flag in learned and model is not None:
            raise ValueError(f"{flag} is about what is learned; leave it, or give --folds")


def _sweep(
    strides: str | None,
    slice_steps: str | None,
    tree_counts: str | None,
    seed: int,
    *,
    is_learned: bool,
) -> Sweep | None:
    """Settings to try; None leaves them to the curve."""
    from organfast.sweep import Sweep

    given = {"strides": strides, "slice_steps": slice_steps, "trees": tree_counts}
    flags = {"strides": "--strides", "slice_steps": "--slice-steps", "trees": "--tree-counts"}
    numbers: dict[str, Any] = {
        name: None if text is None else _integers(flags[name], text) for name, text in given.items()
    }
    if not is_learned:
        return Sweep(**numbers, seed=seed)
    if not any(given.values()):
        return None
    return Sweep(**numbers, margins=(None,), seed=seed)


def _learned_curve(
    task: tuple[Dataset, Recipe, Folds, Sweep | None],
    compared: tuple[str | None, list[tuple[int, ...]] | None, str | None],
    folder: Path | None,
    *,
    threads: int,
    progress: Progress,
) -> Swept:
    from organfast.sweep import SIZES, learned_curve, ways_to_learn

    dataset, recipe, folds, sweep = task
    sizes, levels, depths = compared
    try:
        limits = [None if d == "none" else int(d) for d in (depths or "none").split(",")]
    except ValueError:
        raise ValueError(f"--depths {depths} is no list of depths; give such as 8,none") from None
    ways = ways_to_learn(
        recipe, SIZES if sizes is None else _integers("--sizes", sizes), levels, limits
    )
    return learned_curve(dataset, ways, folds, sweep, folder, threads=threads, progress=progress)


def _stored(swept: Swept, model: Path | None) -> None:
    """Say whom a curve lacks, and write it into a model's file where it is to be stored."""
    from organfast.sweep import store_presets

    if swept.left_out:
        _complain(f"note: left out of the curve, trained on: {', '.join(swept.left_out)}")
    if model is not None:
        store_presets(model, swept.curve)


@contextmanager
def _kept(out: Path | None, is_needed: bool) -> Iterator[Path | None]:
    """The folder that a run goes on from, or one for the run alone, so that none learns twice."""
    if out is not None or not is_needed:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="organfast-") as folder:
        yield Path(folder)


# --- segmenting -----------------------------------------------------------------------------------


def _segment_one(
    scan: Path,
    out: Path,
    model: Model,
    how: tuple[Settings, Outputs],
    *,
    threads: int,
    as_json: bool,
) -> None:
    from organfast.pipeline import segment as label
    from organfast.results import check_target, too_large

    settings, outputs = how
    check_target(out)
    with _progress() as progress:
        try:
            result = label(scan, model, settings, threads=threads, progress=progress)
        except MemoryError:
            raise too_large(scan) from None
        # No file holds the confidence: its memory is for what writing takes.
        result = replace(result, confidence=None)
        outputs.save(result, out)
    _warn(scan, result.warnings)
    present = [organ for organ in result.organs.values() if organ.present]
    if as_json:
        volumes = {organ.name: round(organ.volume_ml, 3) for organ in present}
        _json({"input": str(scan), "output": str(out), "organs_ml": volumes}, indent=None)
        return
    _organ_table(present)
    seconds = sum(result.timings["seconds"].values())
    _say(f"{scan}: {len(present)} organs in {seconds:.1f} s -> {out}")


def _segment_batch(
    inputs: tuple[BatchInput, ...],
    out: str,
    how: tuple[str, Settings, Outputs, BatchPlan],
    *,
    threads: int,
    as_json: bool,
) -> int:
    """Segment several scans, tell of each as it ends, and return the exit code."""
    from organfast.batch import segment_batch
    from organfast.batchinputs import is_in_shard
    from organfast.remote import shown

    total = sum(is_in_shard(one.name, how[3].shard) for one in inputs)
    place = shown(out).rstrip("/")
    told = _ToldBatch(total, time.monotonic())
    with _progress() as progress, _terminable():
        outcomes = segment_batch(inputs, out, *how, threads=threads, progress=progress)
        try:
            for outcome in outcomes:
                told.tell(outcome, place, as_json=as_json)
        except InputError as error:  # and what was finished before stays
            _complain(str(error))
            return EXIT_SOME_FAILED if told.n_done else EXIT_INPUT
        except KeyboardInterrupt:
            outcomes.close()
            n_left = total - told.n_done - told.n_failed
            _complain(
                f"{place}: interrupted, {n_left} scans left; the same command goes on from here"
            )
            return EXIT_INPUT
    if told.n_elsewhere:
        _complain(f"note: {told.n_elsewhere} scans are in the hands of another run")
    if not as_json:
        kept = f" ({told.n_kept} by an earlier run)" if told.n_kept else ""
        _say(f"{told.n_done} scans done{kept}, {told.n_failed} failed -> {place}/batch.jsonl")
    if told.n_failed:
        return EXIT_SOME_FAILED if told.n_failed < total else EXIT_INPUT
    return 0


@dataclass
class _ToldBatch:
    """How far a batch is, and what is said of each scan."""

    total: int
    start: float
    n_done: int = 0
    n_kept: int = 0
    n_failed: int = 0
    n_elsewhere: int = 0

    def tell(self, outcome: Outcome, out: str, *, as_json: bool) -> None:
        scan = outcome.scan
        if outcome.error is not None:
            self.n_failed += 1
            _complain(str(outcome.error))
            return
        if outcome.status == "elsewhere":
            self.n_elsewhere += 1
            return
        self.n_done += 1
        self.n_kept += outcome.status == "kept"
        target = f"{out}/{scan.output}"
        if as_json:
            told = {"input": scan.shown, "output": target, "organs_ml": outcome.organs_ml}
            _json({**told, "status": outcome.status}, indent=None)
        if outcome.status == "kept":
            return
        _warn(scan.shown, outcome.warnings)
        if not as_json:
            n_told = self.n_done + self.n_failed + self.n_elsewhere
            _say(
                f"[{n_told}/{self.total}] {scan.shown}: {len(outcome.organs_ml)} organs in "
                f"{outcome.seconds:.1f} s -> {target}{self._left(n_told)}"
            )
            sys.stdout.flush()

    def _left(self, n_told: int) -> str:
        n_left, n_new = self.total - n_told, n_told - self.n_kept
        if not n_left:
            return ""
        seconds = (time.monotonic() - self.start) / n_new * n_left
        for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
            if seconds >= 1.5 * size:
                return f"; about {seconds / size:.0f} {unit} left"
        return "; about a second left"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as good as Ctrl-C; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


# --- printing -------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar per kind of work on standard error; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
        # Rich prints above its bars, on standard error: not what is meant for a file or a pipe.
        redirect_stdout=sys.stdout.isatty(),
    ) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _complain(text: str) -> None:
    """One line on standard error, whatever the name of a file holds."""
    print(f"organfast: {_printable(' '.join(text.split()))}", file=sys.stderr)


def _say(text: str) -> None:
    """One line on standard output, whatever the name of a file holds."""
    print(_printable(text))


def _printable(text: str) -> str:
    """Nothing that ends a line, steers a terminal or turns its text around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _introduce_starter(path: Path | str, model: Model) -> None:
    """Who did not choose the model is told what it is."""
    from organfast.models.classifier import STARTER

    if str(path) == STARTER:
        n_organs = len(model.classes.organs)
        _complain(
            f"note: this is the starter model: {n_organs} structures, learned from public label "
            "maps and two CT scans; for research only. `organfast info starter` tells how far to "
            "trust it"
        )


def _warn(path: Path | str, warnings: Iterable[str]) -> None:
    for warning in warnings:
        _complain(f"{path}: warning: {warning}")


def _json(content: Any, indent: int | None = 1) -> None:
    print(json.dumps(content, indent=indent))


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[n]) for row in [columns, *rows]) for n in range(len(columns))]
    for row in [columns, *rows]:
        first, *others = (
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        _say("  ".join([first, *others]).rstrip())


def _organ_table(organs: Iterable[Organ]) -> None:
    rows = []
    for organ in organs:
        where = organ.centroid_mm if organ.present else None
        rows.append(
            (
                organ.name,
                f"{organ.volume_ml:.0f}" if organ.present else "absent",
                _number(organ.confidence, 2),
                "-" if where is None else " ".join(f"{x:.0f}" for x in where),
                " ".join(organ.cut_off) or "-",
            )
        )
    _table(("organ", "volume ml", "confidence", "centre x y z mm (RAS)", "cut off at"), rows)


def _certified(found: Certificate) -> None:
    print(f"{found.n_voxels} voxels recomputed the slow way, from {found.n_positions} positions:")
    print(f"  largest difference of a probability  {found.largest_difference:.2g}")
    print(f"  positions of another class           {found.flipped_positions}")
    print(f"  voxels of another label              {found.flipped_voxels}")
    print(f"  of another, but as probable          {found.tied}")
    if found.stride_one is not None:
        stride = ",".join(map(str, found.stride))
        print(f"\nstride 1 instead of the model's {stride}:")
        _verified(found.stride_one, ("this stride", "stride 1"))
        times, longer = found.stride_one.share_asked or 0, 1 / found.stride_one.time_ratio
        print(f"stride 1 asks {times:.1f} times as many positions and takes {longer:.1f}x as long")


def _verified(found: Verification, names: tuple[str, str] = ("full grid", "shortcut")) -> None:
    rows = [
        (
            organ.name,
            _number(organ.dice, 4),
            _number(organ.shift_mm, 2),
            *(f"{ml:.1f}" for ml in organ.volumes_ml),
        )
        for organ in found.agreement.organs
    ]
    columns = ("organ", "Dice", "centre moved by mm", *(f"{name} ml" for name in names))
    _table(columns, rows)
    everywhere, in_organs = found.agreement.differing, found.agreement.differing_in_organs
    print(f"labels that differ: {_percent(everywhere)} of all voxels,")
    print(f"  {_percent(in_organs)} of those that are an organ in either")


def _saved(found: Verification) -> None:
    full, short = found.seconds
    print(f"positions asked: {found.asked[1]} of {found.asked[0]}, {_percent(found.share_asked)}")
    print(f"classified in {short:.2f} s instead of {full:.2f} s: {found.time_ratio:.1f}x as fast")


def _evaluated(
    evaluation: Evaluation,
    other: Evaluation | None,
    compared: dict[str, PairedComparison] | None,
    *,
    as_json: bool,
) -> None:
    from organfast.scorebook import comparison_rows, summary_rows

    for one in (evaluation, *(() if other is None else (other,))):
        for failure in one.failures:
            _complain(failure.reason)
        if one.trained_on:
            _complain(
                f"warning: the model was trained on {', '.join(one.trained_on)}: scores of these "
                "say nothing of new scans"
            )
    if as_json:
        content = evaluation.to_dict()
        if compared is not None:
            content["comparison"] = {name: found.to_dict() for name, found in compared.items()}
        _json(content)
        return
    level = evaluation.how["level"]
    patients = len(evaluation.patients)
    print(f"{patients} patients, {len(evaluation.cases)} cases; mean [{level:.0%} interval]\n")
    _table(*summary_rows(evaluation))
    if evaluation.blocks is not None:
        from organfast.metrics import accuracy

        blocks = evaluation.blocks
        print(
            f"\n{int(blocks.counts.sum())} balanced blocks: {accuracy(blocks.counts):.1%} right, "
            f"expected calibration error {blocks.reliability.expected_error:.3f}"
        )
    if compared is not None:
        print("\nDice of the other model less this one's:\n")
        _table(*comparison_rows(compared, level))


def _told_curve(curve: Curve, stored: Path | None, out: Path | None) -> None:
    from organfast.curve import curve_rows, smallest_rows

    print(
        f"\nAccuracy against throughput: {curve.n_patients} patients, {curve.n_cases} cases, "
        f"{len(curve.points)} points timed {curve.n_timings} times each, {curve.threads} threads."
    )
    print("The front, and presets; of every other point one of these is as fast and as good.\n")
    _table(*curve_rows(curve))
    if curve.smallest:
        print("\nThe smallest block that still recognises each organ: it loses at most 0.05 Dice")
        print("against the best size and, from 3 patients on, at most 0.10 by a 95 % interval.\n")
        _table(*smallest_rows(curve))
    if stored is not None:
        print()
        _say(f"wrote the curve and its presets into {stored}")
    if out is not None:
        print()
        _say(f"drawn in {out / 'curve.png'}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _described(model: Model) -> dict[str, Any]:
    scores = {
        use: {name: value for name, value in score.items() if name != "confusion"}
        for use, score in model.scores.items()
    }
    return {
        "classifier": model.kind,
        **({"network": model.network} if model.network else {}),
        "classes": list(model.classes.names),
        "pattern": model.pattern.to_dict(),
        "grid": model.grid.to_dict(),
        "stride": list(model.stride[::-1]),
        "trained on": list(model.training["cases"]),
        "examples": model.training["n_examples"],
        "scores": scores,
        **({"card": model.training["card"]} if "card" in model.training else {}),
        "calibration": None if model.calibration is None else model.calibration.to_dict()["kind"],
        "adapt": None if model.adapt is None else asdict(model.adapt),
        "versions": dict(model.versions),
    }


def _describe(model: Model) -> None:
    if model.kind == "cnn":
        of_network = model.training["network"]
        print(f"cnn: {of_network['n_steps']} steps; stopped {of_network['stopped']}")
    print(f"{len(model.classes)} classes, {model.training['n_examples']} blocks")
    if not model.scores:
        print("no patient was held out, so there is no score; give --split or more patients")
    for use, score in model.scores.items():
        print(
            f"{use}: {score['n_patients']} patients, {score['n_blocks']} blocks: "
            f"{score['block_accuracy']:.1%} right, organs {score['block_accuracy_organs']:.1%}"
            + _calibration_error(score)
        )
    print(f"calibration: {_calibration_text(model)}")
    if model.adapt is not None:
        print("adapts to each scan, unless it is segmented with --no-adapt")


def _calibration_error(score: Mapping[str, Any]) -> str:
    error = score.get("calibration_error")
    return "" if error is None else f", confidence off by {error:.1%}"


def _calibration_text(model: Model) -> str:
    from organfast.calibration import Temperature

    if model.calibration is None:
        return "none; confidence is the classifier's own (organfast calibrate)"
    if isinstance(model.calibration, Temperature):
        return f"temperature {model.calibration.temperature:.2f}"
    return "isotonic, a curve for each class"


def _described_dataset(dataset: Dataset) -> dict[str, Any]:
    from organfast.layouts import dataset_classes, dataset_notes

    classes = dataset_classes(dataset)
    return {
        "layout": dataset.layout,
        "patients": len(dataset.patients),
        "cases": [case.name for case in dataset.cases],
        "without labels": list(dataset.skipped),
        "classes": list(classes.names),
        "structures": list(dataset.structures),
        "notes": list(dataset_notes(dataset, classes)),
    }


def _checked(dataset: Dataset, *, threads: int, as_json: bool) -> int:
    """Print what is wrong with a dataset, and return the exit code."""
    from organfast.doctor import KINDS, check_dataset

    with _progress() as progress:
        checkup = check_dataset(dataset, threads=threads, progress=progress)
    code = EXIT_INPUT if checkup.n_faults else 0
    if as_json:
        _json({**_described_dataset(dataset), "check": checkup.to_dict()})
        return code
    n_faults, n_notes = checkup.n_faults, len(checkup.findings) - checkup.n_faults
    print(f"layout {dataset.layout}: {len(dataset.cases)} cases, ", end="")
    print(f"{n_faults} faults, {n_notes} notes; {len(dataset.skipped)} scans without labels")
    if checkup.findings:
        print()
        rows = [(f.level, f.kind, f.case, f.text) for f in checkup.findings]
        _text_table(("level", "what", "case", "found"), rows)
        print()
        for kind in dict.fromkeys(f.kind for f in checkup.findings):
            print(f"{kind}: {KINDS[kind]}")
    return code


def _text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of text; the last one goes on below itself as wide as the terminal is."""
    printable = [["".join(c if c.isprintable() else "?" for c in cell) for cell in r] for r in rows]
    every = [list(columns), *printable]
    widths = [max(len(row[n]) for row in every) for n in range(len(columns) - 1)]
    indent = sum(widths) + 2 * len(widths)
    room = max(40, shutil.get_terminal_size().columns - indent)
    for *cells, last in every:
        first = "".join(f"{c.ljust(w)}  " for c, w in zip(cells, widths, strict=True))
        lines = textwrap.wrap(last, room) or [""]
        print("\n".join([first + lines[0], *(" " * indent + line for line in lines[1:])]))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) or "-"
    return str(value)
