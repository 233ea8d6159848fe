"""A network of random weights, for the tests that need no training."""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np

from organfast.blocks import Block
from organfast.models.architecture import architecture
from organfast.models.cnn import Cnn

WINDOW = (-160.0, 240.0)
MERGE = np.array([0, 1, 2, 2, 4])  # class 3 has no label
N_CLASSES = 5


@cache
def network(name: str, block: Block) -> Cnn:
    """Weights of such a size that probabilities are far from equal."""
    described = architecture(name, block)
    rng = np.random.default_rng(0)
    params = {}
    for key, shape in described.parameter_shapes(len(MERGE)).items():
        scale = 0.3 if key.endswith("bias") else (2 / prod(shape[:-1])) ** 0.5
        params[key] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return Cnn(described, block, WINDOW, params, MERGE, N_CLASSES)
