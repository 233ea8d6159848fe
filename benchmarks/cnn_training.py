"""Steps per second of training, against a plain PyTorch loop on the same network.

    python benchmarks/cnn_training.py [--threads 2] [--rounds 5]

The seed's network at 33 px, batches of 256. Ours draws positions, cuts each block from the scan and
standardises nothing; PyTorch's blocks lie in memory, cut and scaled beforehand. Both take Adam
steps, by turns, in one process with the same number of threads; printed is the median time of a
step of either and the median of the rounds' ratios, with and without alterations of the blocks.
Ratios of processor time are beside them: on a machine that others use, those of one thread are the
ones to trust.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

BATCH, SIZE, N_LABELS = 256, 33, 23
STEPS_PER_TURN = 8


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: chosen.threads]))
    print(json.dumps(measured(chosen.threads, chosen.rounds)))


def measured(threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per step of each loop, and ratios to PyTorch's of time and processor time.

    Parameters
    ----------
    threads : int
        Of either; the process must not have more processors than these.
    rounds : int
        Turns of each loop.
    """
    from organfast.models.block_augmentation import BlockAugmentation

    loops = {
        "torch": _torch_loop(threads),
        "ours": _our_loop(None),
        "ours, blocks altered": _our_loop(BlockAugmentation()),
        "ours, blocks altered, noise and blur": _our_loop(
            BlockAugmentation(noise_hu=20.0, blur=0.5)
        ),
    }
    for loop in loops.values():
        loop(2)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    processor: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            begin, busy = time.perf_counter(), time.process_time()
            loop(STEPS_PER_TURN)
            seconds[name].append((time.perf_counter() - begin) / STEPS_PER_TURN)
            processor[name].append((time.process_time() - busy) / STEPS_PER_TURN)
    return {
        "threads": threads,
        "batch": BATCH,
        "ms_per_step": {n: round(1e3 * float(np.median(s)), 1) for n, s in seconds.items()},
        "ratio_to_torch": _ratios(seconds),
        "processor_ratio_to_torch": _ratios(processor),
    }


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: round(float(np.median(np.divide(of_loop, seconds["torch"]))), 2)
        for name, of_loop in seconds.items()
        if name != "torch"
    }


def _our_loop(augmentation: Any) -> Callable[[int], None]:
    """The steps of ``train_network``, on 200 positions of each label in two scans."""
    import jax

    from organfast.blocks import Block
    from organfast.grid import GridVolume
    from organfast.models.examples import TrainingCase, TrainingData
    from organfast.models.training import NetworkPlan, TrainingSettings, _mesh, _Run

    random = np.random.default_rng(0)
    shape, labels = (60, 256, 256), np.repeat(np.arange(N_LABELS), 200)
    cases = [
        TrainingCase(
            patient,
            GridVolume(random.integers(-200, 300, shape).astype(np.int16)),
            random.integers(0, shape, (len(labels), 3)),
            labels,
        )
        for patient in ("a", "b")
    ]
    settings = TrainingSettings(
        steps=1_000_000, batch=BATCH, augmentation=augmentation, device="cpu"
    )
    run = _Run(
        TrainingData(cases, [], N_LABELS),
        NetworkPlan("readme", Block(SIZE), (-160.0, 240.0)),
        replace(settings, label_smoothing=0.0, clip=None),
        _mesh(settings),
    )

    def steps(n: int) -> None:
        jax.block_until_ready([run.step() for _ in range(n)])

    return steps


def _torch_loop(threads: int) -> Callable[[int], None]:
    """The same network and penalty; batches of random rows of a tensor of blocks."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def same() -> nn.Module:  # SAME with stride 2 on an even side: a zero at the end
        return nn.ZeroPad2d((0, 1, 0, 1))

    convolutions = [nn.Conv2d(1, 32, 3, 2), nn.Conv2d(32, 64, 3, 2), nn.Conv2d(64, 128, 3, 2)]
    first, second, third = convolutions
    network = nn.Sequential(
        *(first, nn.ReLU(), same(), second, nn.ReLU(), same(), third, nn.ReLU()),
        *(nn.Flatten(), nn.Linear(2048, 800), nn.Dropout(0.25), nn.Linear(800, 84)),
        nn.Linear(84, N_LABELS),
    )
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    blocks = torch.rand(N_LABELS * 200, 1, SIZE, SIZE)
    labels = torch.arange(N_LABELS).repeat_interleave(200)

    def steps(n: int) -> None:
        for _ in range(n):
            rows = torch.randint(len(blocks), (BATCH,))
            optimiser.zero_grad()
            penalty = 1e-3 * sum((layer.weight**2).sum() for layer in convolutions)
            loss = nn.functional.cross_entropy(network(blocks[rows]), labels[rows]) + penalty
            loss.backward()
            optimiser.step()

    return steps


if __name__ == "__main__":
    main()
