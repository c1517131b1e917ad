"""A shuffled order of any length that is computed place by place, without a table.

A table of 10^8 samples would take a second to shuffle and a gigabyte in every process.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 6  # an even number, after which both halves are where they were
LEAST_BITS = 6  # with fewer, some orders of a few numbers are more likely than others
MASK_64 = 2**64 - 1


def round_keys(seeds: Sequence[int]) -> list[int]:
    """The keys of a permutation: 64 bits for each round, that depend on all `seeds`."""
    return [int(key) for key in np.random.SeedSequence(seeds).generate_state(ROUNDS, np.uint64)]


def permuted(place: int, size: int, keys: Sequence[int]) -> int:
    """Where `place` goes in a permutation of the numbers 0 … size - 1.

    A Feistel network permutes the numbers of as many bits as `size` needs. Results of `size` or more are permuted
    again, until one is below ("cycle walking": Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains). From
    33 numbers on that happens less than once in the mean, since fewer than half of the results are too large.
    """
    bits = max(LEAST_BITS, (size - 1).bit_length())
    right_bits = bits // 2
    left_mask, right_mask = (1 << (bits - right_bits)) - 1, (1 << right_bits) - 1
    while True:
        left, right = place >> right_bits, place & right_mask
        mask, other_mask = left_mask, right_mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
            mask, other_mask = other_mask, mask
        place = left << right_bits | right
        if place < size:
            return place


def _mixed(number: int) -> int:
    """A hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    number &= MASK_64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK_64
    return number ^ number >> 31
