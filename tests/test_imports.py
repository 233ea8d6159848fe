"""The arrows of the house: a room imports only rooms to its left; importing is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "organfast"

# One line per column, left to right; modules of a column may import each other, never in a circle.
COLUMNS = [
    [
        *("errors", "files", "progress", "remote", "room", "tables", "workers", "surfaces"),
        *("statistics", "calibration", "curve"),
    ],
    ["anatomy", "volume"],
    ["cases", "labeltables"],
    ["surroundings"],
    [
        "nifti",
        "dicom",
        "scans",
        "decathlon",
        "blockfiles",
        "layouts",
        "phantom",
        "torso",
        "painting",
    ],
    ["grid", "levels", "body", "display", "page"],
    [
        *("blocks", "sampling", "augmentation", "paintedcopies"),
        *("diseasedscan", "lesions", "metal", "pathology"),
    ],
    ["probability", "adaptation", "atlas", "atlaslearning"],
    [
        "models.architecture",
        "models.block_augmentation",
        "models.checkpoints",
        "models.classifier",
        "models.cnn",
        "models.dense",
        "models.device_volumes",
        "models.devices",
        "models.examples",
        "models.export",
        "models.forest",
        "models.network",
        "models.training",
    ],
    ["refinement", "recomputation"],
    ["segmentation", "organs", "metrics", "overlay", "curvefigure", "thumbnail", "charts"],
    ["report", "evaluationreport", "scorebook"],
    [
        "results",
        "blocklearning",
        "networklearning",
        "learning",
        "pipeline",
        "verification",
        "doctor",
        "evaluation",
        "recalibration",
        "certificate",
        "sweep",
        "viewing",
    ],
    [
        "ledger",
        "remoteledger",
        "ledgers",
        "memory",
        "batchinputs",
        "batchworker",
        "crew",
        "cluster",
        "batch",
    ],
    ["bench", "benchcases", "benchcnn", "benchforest", "benchscan", "benchscores", "demo"],
    ["cli"],
]
COLUMN_OF = {module: n for n, column in enumerate(COLUMNS) for module in column}


def _modules() -> list[str]:
    names = [p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py")]
    dotted = [".".join(n.parts) for n in names]
    return sorted(
        n
        for n in dotted
        if not n.startswith("kernels") and n not in ("__init__", "models.__init__")
    )


def _imports(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text."""
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text("utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("organfast"):
            found.add((node.module or "").removeprefix("organfast").lstrip("."))
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("organfast.")
                for a in node.names
                if a.name.startswith("organfast.")
            }
    return {name for name in found if name and not name.startswith("kernels")}


@pytest.mark.parametrize("module", [m for m in _modules() if m != "__main__"])
def test_a_room_imports_only_rooms_to_its_left(module: str) -> None:
    assert module in COLUMN_OF, f"{module} has no place in the house"
    for imported in _imports(module):
        assert imported in COLUMN_OF, f"{module} imports {imported}, which has no place"
        assert COLUMN_OF[imported] <= COLUMN_OF[module], f"{module} imports {imported}"
        assert module not in _imports(imported), f"{module} and {imported} import each other"


def test_kernels_import_nothing_of_the_package_but_kernels() -> None:
    for path in (PACKAGE / "kernels").iterdir():
        if path.suffix in (".py", ".pyx") and path.name != "__init__.py":
            for line in path.read_text("utf-8").splitlines():
                if line.startswith(("import organfast", "from organfast", "cimport organfast")):
                    assert "organfast.kernels" in line, f"{path.name}: {line}"


def test_only_the_command_line_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("cli.py", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not is_print, f"{path.name} prints"


def test_only_dicom_imports_pydicom_and_highdicom() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "dicom.py":
            text = path.read_text("utf-8")
            assert "import pydicom" not in text, path.name
            assert "import highdicom" not in text, path.name


def test_only_nifti_imports_nibabel() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("nifti.py", "benchcases.py"):  # which times it as a peer
            assert "import nibabel" not in path.read_text("utf-8"), path.name


def test_only_cluster_imports_dask_and_only_remote_imports_fsspec() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        assert ("from distributed import" in text) == (path.name == "cluster.py"), path.name
        assert ("from fsspec" in text) == (path.name == "remote.py"), path.name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import organfast", ["scipy", "numba", "nibabel", "sklearn", "matplotlib", "typer"]),
        ("import organfast.cli", ["scipy", "numba", "nibabel", "sklearn", "matplotlib"]),
        (
            "import organfast.batch, organfast.batchworker",
            ["dask", "distributed", "fsspec", "s3fs"],
        ),
        (
            "import organfast.pipeline, organfast.models.forest, organfast.probability",
            ["numba", "sklearn", "jax", "matplotlib", "pydicom", "highdicom"],
        ),
    ],
)
def test_importing_loads_nothing_heavy(statement: str, absent: list[str]) -> None:
    code = f"{statement}\nimport sys\nsys.stdout.write(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert not loaded & set(absent)
