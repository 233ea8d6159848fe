from typing import Any

import numpy as np
from numpy.typing import NDArray

def encode_runs(
    planes: NDArray[np.unsignedinteger[Any]],
    taken_for: NDArray[np.uint16],
    stops: NDArray[np.int32],
    labels: NDArray[np.uint16],
    rows: NDArray[np.int32],
) -> int: ...
def join_runs(
    stops: NDArray[np.int32],
    labels: NDArray[np.uint16],
    rows: NDArray[np.int32],
    n_rows: int,
    sought: NDArray[np.uint8],
    corners: bool,
    pieces: NDArray[np.int32],
) -> int: ...
def piece_sizes(
    stops: NDArray[np.int32],
    rows: NDArray[np.int32],
    n_rows: int,
    first: int,
    pieces: NDArray[np.int32],
    sizes: NDArray[np.int64],
) -> None: ...
def piece_origins(
    stops: NDArray[np.int32],
    labels: NDArray[np.uint16],
    rows: NDArray[np.int32],
    n_rows: int,
    pieces: NDArray[np.int32],
    order: tuple[int, ...],
    owners: NDArray[np.uint16],
    earliest: NDArray[np.int64],
) -> None: ...
def surrounding_labels(
    stops: NDArray[np.int32],
    labels: NDArray[np.uint16],
    rows: NDArray[np.int32],
    n_rows: int,
    first: int,
    pieces: NDArray[np.int32],
    column_of_label: NDArray[np.int32],
    votes: NDArray[np.int64],
) -> None: ...
def enclosing_labels(
    stops: NDArray[np.int32],
    labels: NDArray[np.uint16],
    rows: NDArray[np.int32],
    n_rows: int,
    pieces: NDArray[np.int32],
    ends: tuple[bool, bool],
    lowest: NDArray[np.uint16],
    highest: NDArray[np.uint16],
) -> None: ...
def rewrite_runs(
    stops: NDArray[np.int32],
    rows: NDArray[np.int32],
    first: int,
    pieces: NDArray[np.int32],
    becomes: NDArray[np.int32],
    planes: NDArray[np.unsignedinteger[Any]],
) -> None: ...
def join_pieces(pairs: NDArray[np.int32], parents: NDArray[np.int32]) -> None: ...
