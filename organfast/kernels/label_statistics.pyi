from typing import Any

import numpy as np
from numpy.typing import NDArray

def label_statistics(
    labels: NDArray[np.unsignedinteger[Any]],
    confidence: NDArray[np.uint8] | None,
    counts: NDArray[np.int64],
    sums: NDArray[np.int64],
    boxes: NDArray[np.int64],
    confidence_sums: NDArray[np.int64],
    n_runs: NDArray[np.int64],
) -> int: ...
def clear_labels(labels: NDArray[np.unsignedinteger[Any]], kept: NDArray[np.uint8]) -> None: ...
