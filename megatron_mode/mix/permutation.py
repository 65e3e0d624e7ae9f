"""Shuffle [0, size) by a keyed permutation that needs no table and can be inverted.

Write the index as (left, right) in Z_a x Z_b with a*b just above the size. A generalised Feistel
network (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains") adds a keyed hash of one
half to the other, in turn; each round is undone by a subtraction. An image outside [0, size) is
sent through again (cycle walking) until it falls inside, which is rare since a*b - size < a.
Not meant to keep secrets.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from megatron_mode.mix.floors import IntArray

KeyArray = npt.NDArray[np.uint64]

ROUNDS = 12  # with 8, orders of five rows differ from uniform by some percent
LARGEST_SIZE = 2**62
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment; the two multipliers are its finaliser's
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def stream_key(*parts: str | int) -> int:
    """Hash a name for a stream of permutations, such as (seed, source name), to 64 bits."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def epoch_key(key: npt.ArrayLike, epoch: npt.ArrayLike) -> KeyArray:
    """Derive the key of each epoch of a stream, splitmix64 of (key, epoch); at least 1-d."""
    z = np.atleast_1d(np.asarray(epoch)).astype(np.uint64) + np.uint64(1)
    z = z * np.uint64(_GOLDEN) + np.atleast_1d(np.asarray(key, dtype=np.uint64))
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    mixed: KeyArray = z ^ (z >> np.uint64(31))
    return mixed


def permute(index: npt.ArrayLike, size: npt.ArrayLike, key: npt.ArrayLike) -> IntArray:
    """Send each index in [0, size) to its image in [0, size).

    `size` and `key` may be one number or one for each index. Raises ValueError for an index
    outside [0, size) and for sizes above 2**62.
    """
    return _walk(index, size, key, forward=True)


def invert(index: npt.ArrayLike, size: npt.ArrayLike, key: npt.ArrayLike) -> IntArray:
    """Return the index whose image under `permute` is given."""
    return _walk(index, size, key, forward=False)


def _walk(
    index: npt.ArrayLike, size: npt.ArrayLike, key: npt.ArrayLike, *, forward: bool
) -> IntArray:
    start = np.atleast_1d(np.asarray(index, dtype=np.int64))
    sizes = np.atleast_1d(np.asarray(size, dtype=np.int64))
    if np.any(start < 0) or np.any(start >= sizes) or np.any(sizes > LARGEST_SIZE):
        raise ValueError("an index must be in [0, size), with size at most 2**62")
    keys = np.atleast_1d(np.asarray(key, dtype=np.uint64))
    # Any a with a*b >= size serves; the root of a float64 is rounded alike everywhere.
    a = (np.sqrt(sizes.astype(np.float64)).astype(np.int64) + 1).astype(np.uint64)
    limit = sizes.astype(np.uint64)
    b = (limit + (a - np.uint64(1))) // a
    image = _rounds(start.astype(np.uint64), a, b, keys, forward=forward)
    outside = np.flatnonzero(image >= limit)
    while outside.size:
        a_out, b_out, key_out = (_at(x, outside) for x in (a, b, keys))
        image[outside] = _rounds(image[outside], a_out, b_out, key_out, forward=forward)
        outside = outside[image[outside] >= _at(limit, outside)]
    return image.astype(np.int64)


def _at(values: KeyArray, index: npt.NDArray[np.intp]) -> KeyArray:
    return values if values.size == 1 else values[index]


def _rounds(index: KeyArray, a: KeyArray, b: KeyArray, key: KeyArray, *, forward: bool) -> KeyArray:
    left = index // b
    right = index - left * b
    for number in range(ROUNDS) if forward else reversed(range(ROUNDS)):
        half, other, size = (right, left, b) if number % 2 else (left, right, a)
        # Unsigned wrap-around makes the minimum a conditional subtraction or addition.
        if forward:
            half += _hash(other, key, number, size)
            np.minimum(half, half - size, out=half)
        else:
            half -= _hash(other, key, number, size)
            np.minimum(half, half + size, out=half)
    return left * b + right


def _hash(half: KeyArray, key: KeyArray, number: int, modulus: KeyArray) -> KeyArray:
    """Hash one half with the round's key to [0, modulus), modulus at most 2**32."""
    h = half + (key + np.uint64(number * _GOLDEN % 2**64))
    h *= _MIX1
    h ^= h >> _HALF
    h *= _MIX2
    h >>= _HALF
    h *= modulus
    h >>= _HALF
    return h
