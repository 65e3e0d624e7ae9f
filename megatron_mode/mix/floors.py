"""Take exact floors of a function at consecutive integers, fast.

A window of a few thousand points is anchored at its first one: what is added to the exact value
there stays small, so 64-bit integers or float64 decide nearly every floor. The points that float64
cannot decide are handed to exact arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

INTEGER_LIMIT = 2**62


def floor_quadratic(constant: Fraction, slope: Fraction, curve: Fraction, count: int) -> IntArray:
    """Return floor(constant + slope*k + curve*k*k) for k = 0 .. count, exactly.

    With q the common denominator of slope and curve, the floor equals
    floor((floor(constant*q) + slope*q*k + curve*q*k*k) / q): an odd denominator of the constant
    does not matter. Integers are used where all terms fit in 62 bits, else float64 with an error
    of at most 2**-50 times the sum of the terms' magnitudes, and exact integers within it.
    """
    floor = math.floor(constant)
    scale = math.lcm(slope.denominator, curve.denominator)
    a = math.floor((constant - floor) * scale)
    b, c = int(slope * scale), int(curve * scale)
    size = scale + abs(b) * count + abs(c) * count * count
    k = np.arange(count + 1, dtype=np.int64)
    if size < INTEGER_LIMIT:
        return ((k * c + b) * k + a) // scale + floor
    approximation = a / scale + k * (b / scale + k * (c / scale))
    bound = math.ldexp(size / scale, -50)
    return settle(approximation, bound, lambda k: (a + b * k + c * k * k) // scale) + floor


def settle(
    approximation: npt.NDArray[np.float64], bound: float, exact_floor: Callable[[int], int]
) -> IntArray:
    """Return floors of values known to within `bound`; ask `exact_floor(k)` where that is too wide.

    A value farther than the bound from every integer has the floor of its approximation.
    """
    floors = np.floor(approximation).astype(np.int64)
    distance = np.abs(approximation - np.rint(approximation))
    for k in np.flatnonzero(distance <= bound).tolist():
        floors[k] = exact_floor(k)
    return floors
