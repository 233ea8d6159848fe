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
) -> int: ...
def component_statistics(
    labels: NDArray[np.unsignedinteger[Any]],
    components: NDArray[np.uint32],
    origin: tuple[int, int, int],
    column_of_label: NDArray[np.int32],
    sizes: NDArray[np.int32],
    owners: NDArray[np.uint16],
    votes: NDArray[np.int32],
) -> None: ...
def enclosing_labels(
    labels: NDArray[np.unsignedinteger[Any]],
    components: NDArray[np.uint32],
    first: int,
    is_organ: NDArray[np.uint8],
    sizes: NDArray[np.int32],
    lowest: NDArray[np.uint16],
    highest: NDArray[np.uint16],
) -> None: ...
def join_components(pairs: NDArray[np.int32], parents: NDArray[np.int32]) -> None: ...
