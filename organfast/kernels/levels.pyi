import numpy as np
from numpy.typing import NDArray

def plane_level(
    hu: NDArray[np.int16],
    table: NDArray[np.int16] | None,
    floor: int,
    air: int,
    out: NDArray[np.int16],
) -> None: ...
def box_level(
    plane: NDArray[np.int16],
    width: int,
    air: int,
    work: NDArray[np.uint32],
    out: NDArray[np.int16],
) -> None: ...
