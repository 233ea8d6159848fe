"""Write Cython's annotated C of every kernel: yellow lines are where Python is still called.

python tools/annotate_kernels.py [FOLDER]     # default: build/annotated
"""

from __future__ import annotations

import sys
from pathlib import Path

from Cython.Compiler.Main import CompilationOptions, compile_single

KERNELS = Path(__file__).parents[1] / "organfast" / "kernels"


def annotate(folder: Path) -> list[Path]:
    """Annotate each ``.pyx`` into ``folder`` and return the pages written."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = []
    for source in sorted(KERNELS.glob("*.pyx")):
        target = folder / f"{source.stem}.c"
        options = CompilationOptions(annotate="default", output_file=str(target))
        compile_single(str(source), options, f"organfast.kernels.{source.stem}")
        pages.append(target.with_suffix(".html"))
    return pages


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build") / "annotated"
    for page in annotate(out):
        print(page)
