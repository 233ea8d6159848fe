"""A small picture of where one organ of a case was segmented wrongly."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from organfast.overlay import WINDOW_HU
from organfast.segmentation import Labels
from organfast.volume import Volume

__all__ = ["thumbnail"]

_SIDE = 256  # px of the longer side; with one byte a pixel it never exceeds 70 kB
_GREYS = 64
# Okabe and Ito's sky blue and orange, which the colour-blind tell apart; fill and line besides.
_SEGMENTED, _TRUE = (86, 180, 233), (255, 159, 0)


def thumbnail(volume: Volume, truth: Labels, found: Labels, label: int) -> bytes:
    """PNG of the axial slice with most wrong voxels of an organ: filled as found, the truth a line.

    Parameters
    ----------
    volume : Volume
        The scan.
    truth, found : (n_k, n_i, n_j) integer
        Label maps in working order.
    label : int
        The organ.
    """
    wrong = [
        np.count_nonzero((t == label) != (f == label)) for t, f in zip(truth, found, strict=True)
    ]
    k = int(np.argmax(wrong))
    height, width = (
        n * mm for n, mm in zip(truth.shape[1:], volume.working_spacing_mm[1:], strict=True)
    )
    px_mm = max(height, width) / _SIDE
    rows, columns = (
        # High ends first: the front on top, the patient's left at the right.
        ((np.arange(max(1, round(length / px_mm))) + 0.5) * px_mm / mm)
        .astype(int)
        .clip(0, n - 1)[::-1]
        for length, mm, n in zip(
            (height, width), volume.working_spacing_mm[1:], truth.shape[1:], strict=True
        )
    )
    at = np.ix_(rows, columns)
    low, high = WINDOW_HU
    share = (volume.working[k][at].astype(np.float32) - low) / (high - low)
    pixels = (share.clip(0, 1) * (_GREYS - 1)).astype(np.uint8)
    pixels[found[k][at] == label] += _GREYS
    pixels[_edge(truth[k][at] == label)] = 2 * _GREYS
    grey = np.repeat(np.linspace(0, 255, _GREYS)[:, None], 3, axis=1)
    filled = 0.55 * grey + 0.45 * np.array(_SEGMENTED)
    return _png(pixels, np.vstack([grey, filled, [_TRUE]]).astype(np.uint8))


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: NDArray[np.bool_] = mask & ~inner
    return edge


def _png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """Portable Network Graphics (ISO 15948), colour type 3."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = np.pad(pixels, ((0, 0), (1, 0)))  # each row begins with its filter, none
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            chunk(b"PLTE", palette.tobytes()),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )
