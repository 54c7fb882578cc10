"""A permutation of 0 .. count - 1 that is computed, not stored: any place of it costs the same, at any count.

A Feistel network (Luby & Rackoff 1988) permutes the smallest power of two that holds `count`; values beyond it walk on
along their cycle until they fall inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), on average
less than once. Its keys depend on nothing but the seed's words, and no library's generator is asked, so that the order
is the same on every machine and in every version.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
"""Even, so that halves of unequal width end where they began; four make a permutation pseudorandom."""

SMALL = 2**12
"""Counts up to here are sorted by random keys: halves of a few bits would favour some places (measured)."""


def permuted(places: ArrayLike, count: int, *seed: int | str) -> NDArray[np.int64]:
    """The items at these places of the permutation of range(count) that `seed` names; int64, of the shape of `places`.

    Places are integers from 0 to count - 1.
    """
    at = np.asarray(places, np.uint64)
    assert not at.size or at.max() < count, "places within the permutation"
    keys = _keys(seed)
    if count <= SMALL:
        sorting = _mixed(_mixed(np.arange(count, dtype=np.uint64) ^ keys[0]) ^ keys[1])
        return np.argsort(sorting, kind="stable")[at]
    bits = (count - 1).bit_length()
    found = _feistel(at, bits, keys)
    outside = found >= count
    while outside.any():
        found[outside] = _feistel(found[outside], bits, keys)
        outside = found >= count
    return found.astype(np.int64)


def _keys(seed: tuple[int | str, ...]) -> NDArray[np.uint64]:
    digest = hashlib.shake_128(":".join(map(str, seed)).encode()).digest(8 * ROUNDS)
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(x: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of range(2**bits)."""
    high, low = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    one = np.uint64(1)
    left, right = x >> low, x & ((one << low) - one)
    for key in keys:
        left, right = right, (left ^ _mixed(right ^ key)) & ((one << high) - one)
        high, low = low, high
    return (left << low) | right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
