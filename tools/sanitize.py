"""Compiled kernels under sanitizers and with checked bounds, in a copy of the package.

    python tools/sanitize.py fuzz --seconds 60          # the forest, as tools/fuzz_forest.py says
    python tools/sanitize.py fuzz --executions 10000000 --record fuzz.json
    python tools/sanitize.py weakened                   # does the fuzzer see a check that is wrong?
    python tools/sanitize.py tests [TEST...]            # the kernels' tests under both sanitizers
    python tools/sanitize.py bounds [TEST...]           # all tests on kernels that check each index

Needs gcc with libasan and libubsan (Debian's gcc brings them). The exit code is that of what ran.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
KERNEL_TESTS = [
    f"tests/test_{name}.py"
    for name in ("blocks", "forest", "levels", "grid", "probability", "segmentation", "organs")
]
# Checks of models/forest.py, and the same off by one.
WEAKENED = {
    "the last child": {
        "(child >= size_of[inner] - 1)": "(child >= size_of[inner] + 1)",
        "has_parent[child + start] = True": "has_parent[(child + start) % n_nodes] = True",
    },
    "the last leaf code": {">= n_classes + len(leaf_table):": "> n_classes + len(leaf_table):"},
    "the last feature": {'["feature"].max()) >= n_features': '["feature"].max()) > n_features'},
    "the last level": {"greatest[0] >= slab.shape[0]": "greatest[0] > slab.shape[0]"},
    "the last voxel": {"high >= slab.shape[axis]": "high > slab.shape[axis]"},
    "the first voxel": {"if low < 0 or": "if low < -1 or"},
}
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


def main() -> int:
    """Build a copy, and run what was asked for in it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["fuzz", "weakened", "tests", "bounds"])
    given, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="organfast-sanitize-") as folder:
        copy = copied(Path(folder))
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
        if given.what == "bounds":
            check_bounds(copy)
            build(copy, environment)
            few = ["--numprocesses", "2", "--dist", "loadfile"]
            return run([*pytest, *few, *(others or ["tests"])], environment, copy)
        # -O3 takes ten times as long to compile with sanitizers, and finds no more.
        setup = copy / "setup.py"
        setup.write_text(setup.read_text("utf-8").replace('"-O3"', '"-O1"'), "utf-8")
        if given.what in ("fuzz", "weakened"):
            reuse_all_but_the_forest(copy)
        build(copy, {**environment, "CFLAGS": f"-g {SANITIZERS}", "LDFLAGS": SANITIZERS})
        environment |= {
            "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so"))),
            # Python itself leaks at its end.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        if given.what in ("fuzz", "weakened"):
            # What is allocated is small: wide zones around it, and what was freed stays in cache.
            environment["ASAN_OPTIONS"] += ":redzone=256:quarantine_size_mb=16"
            fuzzer = [str(copy / "tools" / "fuzz_forest.py"), *others]
            return run(fuzzer, environment) if given.what == "fuzz" else weaken(copy, environment)
        # Python keeps freed memory, which would hide a use after it.
        environment["PYTHONMALLOC"] = "malloc"
        alone = ["-x", "-p", "no:xdist", *(others or KERNEL_TESTS)]
        return run([*pytest, *alone], environment, copy)


def copied(folder: Path) -> Path:
    """The package, its tests and tools without anything that was built."""
    copy = folder / "organfast"
    built = shutil.ignore_patterns("*.so", "*.c", "__pycache__", "build", "*.egg-info")
    for name in ("organfast", "tests", "tools", "benchmarks"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=built)
    texts = [path.name for path in REPOSITORY.glob("*.md")]
    for name in (*texts, "setup.py", "pyproject.toml", "LICENSE", "Makefile"):
        shutil.copy(REPOSITORY / name, copy / name)
    return copy


def check_bounds(copy: Path) -> None:
    """Cython checks each index of each kernel, and refuses negative ones."""
    for source in (copy / "organfast" / "kernels").glob("*.pyx"):
        text = source.read_text("utf-8")
        if "boundscheck=False" not in text:
            raise SystemExit(f"{source.name} does not say boundscheck=False")
        source.write_text(text.replace("boundscheck=False", "boundscheck=True"), "utf-8")


def reuse_all_but_the_forest(copy: Path) -> None:
    """Other kernels as they were built for use: half a minute of compiling instead of minutes."""
    kernels = copy / "organfast" / "kernels"
    for source in kernels.glob("*.pyx"):
        if source.stem != "forest":
            built = sorted((REPOSITORY / "organfast" / "kernels").glob(f"{source.stem}.*.so"))
            if not built:
                raise SystemExit("the kernels are not built; run `pip install -e .` first")
            shutil.copy(built[0], kernels)
            source.unlink()


def weaken(copy: Path, environment: dict[str, str]) -> int:
    """Fuzz with one check after the other off by one; 1 where that goes unseen for a minute."""
    checks = copy / "organfast" / "models" / "forest.py"
    right, n_unseen = checks.read_text("utf-8"), 0
    fuzzer = [sys.executable, str(copy / "tools" / "fuzz_forest.py"), "--seconds", "60"]
    for name, changes in WEAKENED.items():
        text = right
        for old, new in changes.items():
            if text.count(old) != 1:
                raise SystemExit(f"{checks.name} does not say {old!r} once")
            text = text.replace(old, new)
        checks.write_text(text, "utf-8")
        begin = time.monotonic()
        done = subprocess.run(fuzzer, env=environment, capture_output=True, text=True, check=False)
        reasons = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
        said = [line for line in reasons if "SUMMARY" in line or "runtime error" in line]
        n_unseen += done.returncode == 0
        print(
            f"{name}: {'NOT SEEN' if done.returncode == 0 else 'seen'} after "
            f"{time.monotonic() - begin:.1f} s: {(said or reasons or ['-'])[-1]}",
            flush=True,
        )
    return int(n_unseen > 0)


def build(copy: Path, environment: dict[str, str]) -> None:
    """Compile the kernels of the copy in place."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel", "2"]
    subprocess.run(command, cwd=copy, env=environment, check=True, stdout=subprocess.DEVNULL)


def library(name: str) -> str:
    """Where gcc keeps a sanitizer's library."""
    find = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()


def run(arguments: list[str], environment: dict[str, str], folder: Path | None = None) -> int:
    """Run Python on the copy, by default from where we are."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
