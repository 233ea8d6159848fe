import numpy as np
from numpy.typing import NDArray

def plane_level(
    hu: NDArray[np.int16], table: NDArray[np.int16] | None, floor: int, out: NDArray[np.int16]
) -> None: ...
def add_plane(sums: NDArray[np.uint32], plane: NDArray[np.int16], air: int, sign: int) -> None: ...
def box_level(
    sums: NDArray[np.uint32],
    width: int,
    depth: int,
    air: int,
    work: NDArray[np.uint32],
    out: NDArray[np.int16],
) -> None: ...
