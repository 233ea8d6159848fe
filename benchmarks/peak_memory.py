"""Peak memory of segmenting one scan natively, beyond the interpreter and its imports.

    python benchmarks/peak_memory.py [COLUMNS ROWS SLICES]      # default 512 512 400

A fresh process loads the model and segments the file; its largest resident memory before and after
is compared (VmHWM of Linux: getrusage would count the parent's). Everything it needs is imported
before the first reading.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from organfast.anatomy import ClassTable
from organfast.blocks import Block
from organfast.grid import ModelGrid
from organfast.layouts import write_case
from organfast.learning import Recipe, train
from organfast.models.classifier import save_model
from organfast.models.forest import ForestSettings
from organfast.nifti import write_volume
from organfast.painting import paint
from organfast.phantom import FieldOfView, class_labels, phantom
from organfast.sampling import Split
from organfast.volume import Volume

CHILD = """
import json, re, sys
import cc3d, fill_voids, numpy, scipy.ndimage
import organfast.pipeline as pipeline
from organfast.models.classifier import load_model
from organfast.kernels import label_statistics
model_path, scan_path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
result = pipeline.segment(scan_path, load_model(model_path), threads=threads)
json.dump({
    "imports_mb": before,
    "peak_beyond_imports_mb": peak() - before,
    "organs": sum(organ.present for organ in result.organs.values()),
    "seconds": result.timings["seconds"],
}, sys.stdout)
"""


def peak_memory(shape: tuple[int, int, int], threads: int) -> dict[str, object]:
    """Segment a phantom of so many columns, rows and slices at stride 4, 33-pixel blocks.

    Parameters
    ----------
    shape : (n_x, n_y, n_z)
        Voxels; the trunk is spread over them.
    threads : int
        Threads of the measured process.
    """
    spacing = (410 / shape[0], 410 / shape[1], 600 / shape[2])
    anatomy = phantom(FieldOfView(shape, spacing), seed=3, threads=2)
    scan = paint(anatomy, seed=3, threads=2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # Learning from every eighth slice of the same phantom is enough to have a real forest.
        thin = Volume(np.asfortranarray(scan.hu[:, :, ::8]), scan.affine)
        labels = np.asfortranarray(class_labels(anatomy)[:, :, ::8])
        write_case(root / "cases", "thin", thin, labels, ClassTable.default())
        recipe = Recipe(
            grid=ModelGrid(None),
            n_per_class=400,
            forest=ForestSettings("extra_trees"),
            split=Split(("thin",)),
        )
        save_model(train(root / "cases", Block(33), recipe, threads=2), root / "m.organfast")
        write_volume(root / "scan.nii.gz", scan)
        del anatomy, scan, thin, labels
        command = [sys.executable, "-c", CHILD, str(root / "m.organfast")]
        run = subprocess.run(
            [*command, str(root / "scan.nii.gz"), str(threads)],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    return {"shape": shape, "threads": threads, **json.loads(run.stdout)}


if __name__ == "__main__":
    columns, rows, slices = (int(n) for n in sys.argv[1:4] or (512, 512, 400))
    for n_threads in (1, 2):
        print(json.dumps(peak_memory((columns, rows, slices), n_threads)))
