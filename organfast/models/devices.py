"""Where JAX runs, and where it keeps what it has compiled."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

__all__ = ["DEVICES", "check_not_forked", "compilation_cache", "find_devices"]

DEVICES = ("auto", "cpu", "gpu")
_LEAST_SECONDS = 0.2


class _Process:
    """Whether JAX has threads here, and whether it had some where this process was forked off:
    they hold locks that nobody here will ever release."""

    has_started = False
    lost_threads = False


def _after_fork() -> None:
    # JAX does not tell in public whether it has started; it may have been by others than us.
    bridge = sys.modules.get("jax._src.xla_bridge")
    if _Process.has_started or getattr(bridge, "_backends", None):
        _Process.lost_threads = True


os.register_at_fork(after_in_child=_after_fork)


def check_not_forked() -> None:
    """To be called before anything runs by JAX, which would wait forever in a forked child.

    Raises
    ------
    RuntimeError
        This process was forked after JAX had started in its parent.
    """
    if _Process.lost_threads:
        raise RuntimeError(
            "this process was forked after JAX had started in its parent, and would wait forever "
            "for threads that only the parent has; start it by multiprocessing's spawn or "
            "forkserver, or fork before the first network runs"
        )
    _Process.has_started = True


def find_devices(device: str) -> list[jax.Device]:
    """This process's devices of a kind.

    Parameters
    ----------
    device : {"auto", "cpu", "gpu"}
        "auto" is what JAX prefers: a GPU where it finds one.

    Raises
    ------
    ValueError
        The kind is unknown, or there is no GPU.
    RuntimeError
        See ``check_not_forked``.
    """
    import jax

    check_not_forked()
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is unknown; use {', '.join(DEVICES)}")
    if device == "auto":
        return list(jax.local_devices())
    try:
        return list(jax.local_devices(backend=device))
    except RuntimeError:
        raise ValueError(
            f"JAX finds no {device}; use device cpu or auto, or install JAX for it "
            '(pip install "jax[cuda13]")'
        ) from None


def compilation_cache() -> Path | None:
    """Let JAX keep compiled programs on disk; to be called before the first of them.

    They are kept in ``$XDG_CACHE_HOME/organfast/jax``, by default ``~/.cache/organfast/jax``,
    apart for each kind of processor. A place that the user has chosen for JAX
    (``JAX_COMPILATION_CACHE_DIR``) is left alone.

    Returns
    -------
    Path or None
        Where; None if nothing can be written there. Then programs are compiled in each process.
    """
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return Path(chosen)
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches) / "organfast" / "jax" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or a read-only one
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    return folder


def _processor() -> str:
    """A name for this kind of processor: code compiled for another may not run on it, and homes
    are shared between machines."""
    import zlib

    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
    except OSError:
        lines = []
    known = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return f"{platform.machine()}-{zlib.crc32(' '.join(known).encode()):08x}"
