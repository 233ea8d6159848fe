import numpy as np
from numpy.typing import NDArray

def slice_resampled(
    hu: NDArray[np.int16],
    table: NDArray[np.int16],
    down: tuple[NDArray[np.int32], NDArray[np.float32]],
    along: tuple[NDArray[np.int32], NDArray[np.float32]],
    work: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None: ...
def slices_blended(
    ring: NDArray[np.float32],
    slots: NDArray[np.int32],
    weights: NDArray[np.float32],
    out: NDArray[np.int16],
) -> None: ...
