import numpy as np
from numpy.typing import NDArray

CHUNK: int
TILE: int
WALK_BYTES: int
PATHS: tuple[str, ...]

def walk_forest(
    nodes: NDArray[np.void],
    tree_starts: NDArray[np.int64],
    leaf_table: NDArray[np.float64],
    slab: NDArray[np.int16],
    reads: NDArray[np.intp],
    positions: NDArray[np.int32],
    staged: NDArray[np.int16],
    scratch: NDArray[np.uint8],
    sums: NDArray[np.float64],
    path: int,
    out: NDArray[np.float32] | NDArray[np.float64],
) -> None: ...
def label_forest(
    nodes: NDArray[np.void],
    tree_starts: NDArray[np.int64],
    leaf_table: NDArray[np.float64],
    slab: NDArray[np.int16],
    reads: NDArray[np.intp],
    positions: NDArray[np.int32],
    staged: NDArray[np.int16],
    scratch: NDArray[np.uint8],
    sums: NDArray[np.float64],
    path: int,
    out: NDArray[np.uint16],
    n_between: int,
) -> int: ...
