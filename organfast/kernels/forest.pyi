import numpy as np
from numpy.typing import NDArray

CHUNK: int

def walk_forest(
    nodes: NDArray[np.void],
    tree_starts: NDArray[np.int64],
    leaf_table: NDArray[np.float64],
    slab: NDArray[np.int16],
    reads: NDArray[np.intp],
    positions: NDArray[np.int32],
    sums: NDArray[np.float64],
    out: NDArray[np.float32] | NDArray[np.float64],
) -> None: ...
