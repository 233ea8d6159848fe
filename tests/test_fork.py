"""The API in forked children: forests work there, networks work or are refused; nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SECONDS = 400

# A parent that has segmented, with more than one thread, and a way to ask a child. What hangs is
# ended by its alarm, whose signal is then the child's exit code.
BEGIN = """
import multiprocessing, os, signal, sys, threading, warnings
import numpy as np
import organfast as of
from organfast.anatomy import ClassTable
from organfast.grid import ModelGrid
from organfast.metrics import confusion
from organfast.models.classifier import Model
from test_model_file import small

warnings.filterwarnings("ignore", "os.fork")  # JAX's own, where it has started
MODEL = small()
rng = np.random.default_rng(0)
HU = rng.integers(-1000, 400, (24, 24, 12)).astype(np.int16)
SCAN = (HU, np.diag([-1.5, -1.5, 3.0, 1.0]))


def labels(model=MODEL, threads=2):
    settings = of.Settings(body_mask=False, cleaning=of.Cleaning("none"))
    return of.segment(SCAN, model, settings, threads=threads).labels.tobytes()


def network():
    from networks import network as random_weights
    block = of.Block(9)
    return Model(
        random_weights("towers", block), ClassTable.default().keep(
            ["liver", "spleen", "kidney_left", "kidney_right"]), block, ModelGrid()
    )


def in_child(function):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)
        try:
            answer = function()
        except RuntimeError as error:
            answer = str(error).encode()
        os.write(write, answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "the child hangs, or has failed"
    return answer

"""


def run(script: str) -> str:
    """What a fresh interpreter prints; it is given some minutes."""
    code = BEGIN + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_segments_as_its_parent_did() -> None:
    run("""
        truth = rng.integers(0, 4, (20, 20, 10)).astype(np.uint8)
        count = lambda: confusion(truth, truth[::-1].copy(), 4).tobytes()
        expected, counted = labels(), count()
        assert in_child(labels) == expected
        assert in_child(count) == counted
        assert in_child(lambda: in_child(labels)) == expected  # a child's child
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(labels, [MODEL] * 4).get(60) == [expected] * 4
    """)


def test_a_child_forked_while_threads_segment_segments() -> None:
    run("""
        expected, stop, rounds = labels(), threading.Event(), []

        def segment_on():
            while not stop.is_set():
                rounds.append(labels() == expected)

        threads = [threading.Thread(target=segment_on) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            assert in_child(labels) == expected
        stop.set()
        for thread in threads:
            thread.join()
        assert rounds and all(rounds)
    """)


def test_a_network_works_in_a_child_or_is_refused_there() -> None:
    pytest.importorskip("jax")
    run("""
        forest, model = labels(), network()
        found = in_child(lambda: labels(model))  # JAX starts there
        import jax
        assert float(jax.numpy.ones(3).sum()) == 3  # it has started here, by others than us
        assert b"spawn or forkserver" in in_child(lambda: labels(model))
        assert labels(model) == found
        assert b"forked after JAX had started" in in_child(lambda: labels(model))
        assert in_child(labels) == forest  # which is as well as ever
        assert labels(model) == found  # and so is the parent
        from jax._src import xla_bridge
        del xla_bridge._backends  # private: should it go one day
        assert b"forked after JAX had started" in in_child(lambda: labels(model))
    """)
