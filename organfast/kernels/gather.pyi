import numpy as np
from numpy.typing import NDArray

def all_inside(centres: NDArray[np.int64], n_k: int, n_i: int, n_j: int) -> bool: ...
def gather_blocks(
    hu: NDArray[np.int16],
    centres: NDArray[np.int64],
    lo: float,
    scale: float,
    least: float,
    most: float,
    out: NDArray[np.float32],
) -> None: ...
def gather_features(
    slab: NDArray[np.int16],
    starts: NDArray[np.int64],
    reads: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None: ...
