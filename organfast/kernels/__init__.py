"""Compiled and Numba kernels: arrays and numbers only, nothing of the package is imported here."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def _make_place_for_compiled_code() -> None:
    """Numba keeps what it has compiled beside its source or in the home folder.

    Where neither can be written (an installation of somebody else's, no home) it would refuse to
    compile: then it keeps it in a folder of this process alone, for as long as that lives.
    """
    places = [Path(__file__).parent / "__pycache__", Path(__file__).parent]
    if "NUMBA_CACHE_DIR" in os.environ or any(os.access(p, os.W_OK) for p in places if p.is_dir()):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    above = (Path(home) / "numba", Path(home), *Path(home).absolute().parents)
    nearest = next(path for path in above if path.is_dir())
    if os.access(nearest, os.W_OK):
        return
    try:
        own = tempfile.mkdtemp(prefix="organfast-numba-")
    except OSError:
        return  # nothing can be written anywhere
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = own


_make_place_for_compiled_code()
