"""Compiled modules only; everything else is in pyproject.toml."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

KERNELS = Path("organfast") / "kernels"

# No -march: wheels stay portable. gcc 12's -O2 does not vectorise the gather (2x slower).
# -ffp-contract=off: a fused multiply-add would round differently from one machine to the next.
extensions = [
    Extension(
        f"organfast.kernels.{source.stem}",
        [source.as_posix()],
        extra_compile_args=["-O3", "-ffp-contract=off"],
        include_dirs=[KERNELS.as_posix()],
        depends=[header.as_posix() for header in sorted(KERNELS.glob("*.h"))],
    )
    for source in sorted(KERNELS.glob("*.pyx"))
]

setup(ext_modules=cythonize(extensions, language_level=3))
