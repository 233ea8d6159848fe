"""Overlap of two label maps: how often each pair of labels meets, and where each label lies.

Compiled by Numba, cached. Maps are in C order and begin at a multiple of eight bytes; labels are
compared eight bytes at a time, which takes a machine that stores the lowest byte first.
"""

# Compiled functions take arrays whose layout Numba specialises on: no annotation says that.
# mypy: disable-error-code="no-untyped-def, assignment"

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types, uint64
from numba.extending import intrinsic

_LABELS = (types.uint8, types.uint16)
_COUNTS = types.Array(types.int64, 2, "C")
_SUMS = types.Array(types.int64, 3, "C")
_BOXES = types.Array(types.int64, 4, "C")
_JUDGED = types.Array(types.boolean, 1, "C")


def _pair(label: Any, n_axes: int) -> tuple[Any, Any]:
    return (types.Array(label, n_axes, "C", readonly=True),) * 2


@intrinsic
def trailing_zeros(context, word):
    """Zero bits below the lowest one of a word that is not zero: one instruction."""

    def build(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), build


@njit(nogil=True, inline="always")
def as_words(flat):
    """The whole words of eight bytes that a row of labels fills, and what is left as one more."""
    per_word, bits = 8 // flat.itemsize, 8 * flat.itemsize
    n_whole = flat.size // per_word * per_word
    rest = uint64(0)
    for n in range(n_whole, flat.size):
        rest |= uint64(flat[n]) << uint64(bits * (n - n_whole))
    return flat[:n_whole].view(np.uint64), rest


@njit(nogil=True, inline="always")
def run_end(truth, predicted, words, rests, start, end):
    """Where the run of one pair of labels that begins at ``start`` ends, at most at ``end``.

    words, rests : of truth and of predicted, by ``as_words``
    """
    # An item is 1 << shift to a word: a shift is faster than to divide by what is not known before.
    shift = 3 if truth.itemsize == 1 else 2
    bits_shift = 6 - shift
    ones = uint64(0x0101010101010101 if truth.itemsize == 1 else 0x0001000100010001)
    t, p = uint64(truth[start]) * ones, uint64(predicted[start]) * ones
    n_words = words[0].size
    word = start >> shift
    passed = uint64((start - (word << shift)) << bits_shift)
    if word < n_words:
        differing = (words[0][word] ^ t) | (words[1][word] ^ p)
    else:
        differing = (rests[0] ^ t) | (rests[1] ^ p)
    differing = differing >> passed << passed
    while differing == 0:
        word += 1
        if (word << shift) >= end:
            return end
        if word < n_words:
            differing = (words[0][word] ^ t) | (words[1][word] ^ p)
        else:
            differing = (rests[0] ^ t) | (rests[1] ^ p)
    return min((word << shift) + (np.int64(trailing_zeros(differing)) >> bits_shift), end)


@njit([types.int64(*_pair(label, 1), _COUNTS) for label in _LABELS], cache=True, nogil=True)
def overlap(truth, predicted, counts):
    """Count the pairs of labels, run by run.

    truth, predicted : (n,) uint8 or uint16, both alike, n > 0
    counts           : (n_classes, n_classes) int64, rows are truth; added to
    returns the number of voxels with a label beyond n_classes; these are left out
    """
    # As ``run_end`` does, but what is known of a run is kept from word to word.
    n_classes = uint64(counts.shape[0])
    truth_words, truth_rest = as_words(truth)
    predicted_words, predicted_rest = as_words(predicted)
    shift = 3 if truth.itemsize == 1 else 2
    bits_shift = 6 - shift
    ones = uint64(0x0101010101010101 if truth.itemsize == 1 else 0x0001000100010001)
    size = truth.size
    n_beyond = 0
    start, t, p = np.int64(0), uint64(truth[0]), uint64(predicted[0])
    all_t, all_p = t * ones, p * ones
    for word in range(truth_words.size + 1):
        if word < truth_words.size:
            here_t, here_p = truth_words[word], predicted_words[word]
        else:
            here_t, here_p = truth_rest, predicted_rest
        differing = (here_t ^ all_t) | (here_p ^ all_p)
        while differing:
            within = np.int64(trailing_zeros(differing)) >> bits_shift
            stop = (word << shift) + within
            if stop >= size:
                break
            if t < n_classes and p < n_classes:
                counts[t, p] += stop - start
            else:
                n_beyond += stop - start
            start, t, p = stop, uint64(truth[stop]), uint64(predicted[stop])
            all_t, all_p = t * ones, p * ones
            passed = uint64(within << bits_shift)
            differing = ((here_t ^ all_t) | (here_p ^ all_p)) >> passed << passed
    if t < n_classes and p < n_classes:
        counts[t, p] += size - start
    else:
        n_beyond += size - start
    return n_beyond


@njit(
    [types.int64(*_pair(label, 3), types.int64, _COUNTS, _SUMS, _BOXES) for label in _LABELS],
    cache=True,
    nogil=True,
)
def pair_statistics(truth, predicted, first, counts, sums, boxes):
    """Count the pairs of labels, and sum and bound the indices of each label in either map.

    truth, predicted : (n_0, n_1, n_2) uint8 or uint16, both alike
    first            : index of the first slice along axis 0; slabs are given in ascending order
    counts           : (n_classes, n_classes) int64, rows are truth; added to
    sums             : (2, n_classes, 3) int64, sums of indices in truth and in predicted; added to
    boxes            : (2, n_classes, 3, 2) int64, first and last + 1; to begin with, more than any
                       index and 0
    returns the number of voxels with a label beyond n_classes; these are left out
    """
    n_classes = counts.shape[0]
    truth_flat, predicted_flat = truth.reshape(truth.size), predicted.reshape(truth.size)
    truth_words, truth_rest = as_words(truth_flat)
    predicted_words, predicted_rest = as_words(predicted_flat)
    words, rests = (truth_words, predicted_words), (truth_rest, predicted_rest)
    n_beyond = 0
    row = 0
    for a in range(truth.shape[0]):
        for b in range(truth.shape[1]):
            start, end = row, row + truth.shape[2]
            while start < end:
                stop = run_end(truth_flat, predicted_flat, words, rests, start, end)
                t, p = np.int64(truth_flat[start]), np.int64(predicted_flat[start])
                n = stop - start
                if t < n_classes and p < n_classes:
                    counts[t, p] += n
                    along = n * (start + stop - 1 - 2 * row) // 2
                    for which, label in ((0, t), (1, p)):
                        sums[which, label, 0] += n * (first + a)
                        sums[which, label, 1] += n * b
                        sums[which, label, 2] += along
                        box = boxes[which, label]
                        box[0, 0] = min(box[0, 0], first + a)
                        box[0, 1] = first + a + 1  # along the outermost axis a box only grows
                        box[1, 0] = min(box[1, 0], b)
                        box[1, 1] = max(box[1, 1], b + 1)
                        box[2, 0] = min(box[2, 0], start - row)
                        box[2, 1] = max(box[2, 1], stop - row)
                else:
                    n_beyond += n
                start = stop
            row = end
    return n_beyond


@njit(
    [
        types.void(
            *_pair(label, 1), types.Array(types.uint8, 1, "C", readonly=True), _JUDGED, _COUNTS
        )
        for label in _LABELS
    ],
    cache=True,
    nogil=True,
)
def confidence_counts(truth, predicted, confidence, judged, counts):
    """How often each confidence was right, over the voxels predicted to be one of some labels.

    truth, predicted : (n,) uint8 or uint16, both alike
    confidence       : (n,) uint8
    judged           : (n_classes,) bool, by predicted label
    counts           : (2, 256) int64, all voxels and those that are right; added to
    """
    for n in range(truth.size):
        p = np.int64(predicted[n])
        if p < judged.size and judged[p]:
            counts[0, confidence[n]] += 1
            counts[1, confidence[n]] += truth[n] == p
