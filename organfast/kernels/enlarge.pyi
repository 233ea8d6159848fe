import numpy as np
from numpy.typing import NDArray

def scratch_floats(classes: int, out_cols: int) -> int: ...
def enlarge_labels(
    probabilities: NDArray[np.float32],
    row_lower: NDArray[np.int32],
    row_weight: NDArray[np.float32],
    col_lower: NDArray[np.int32],
    col_weight: NDArray[np.float32],
    labels: NDArray[np.uint8] | NDArray[np.uint16],
    confidence: NDArray[np.float32] | NDArray[np.uint8],
    scratch: NDArray[np.float32],
) -> None: ...
def enlarge_map(
    probabilities: NDArray[np.float32],
    row_lower: NDArray[np.int32],
    row_weight: NDArray[np.float32],
    col_lower: NDArray[np.int32],
    col_weight: NDArray[np.float32],
    values: NDArray[np.float32] | NDArray[np.uint8],
    scratch: NDArray[np.float32],
) -> None: ...
def blend_slices(
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    weight: float,
    out: NDArray[np.float32],
) -> None: ...
def weigh_slice(
    probabilities: NDArray[np.float32],
    row_at: NDArray[np.float64],
    col_at: NDArray[np.float64],
    sums: NDArray[np.float64],
    extremes: NDArray[np.float32],
) -> None: ...
