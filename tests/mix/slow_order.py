"""Work an order out row by row, slowly: the truth that the order is held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from megatron_mode.mix.apportion import Supply
from megatron_mode.mix.permutation import epoch_key, permute, stream_key


def weight_at(supply: Supply, row: int, side: str) -> Fraction:
    """Read the table of points by a plain search; `side` decides at a jump."""
    before = [p for p in supply.points if p[0] < row or (p[0] == row and side == "right")]
    after = [p for p in supply.points if p not in before]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (a, u), (b, v) = before[-1], after[0]
    return u + (v - u) * Fraction(row - a, b - a)


def share(weights: list[Fraction]) -> Fraction | None:
    return weights[0] / sum(weights) if sum(weights) else None


def deal_levels(
    w0: list[Fraction], w1: list[Fraction], left: list[int], carry: list[Fraction]
) -> tuple[dict[int, int], list[list[Fraction]], list[list[int]]]:
    """Return the owner of each row, and of each level its planned sums and the rows offered."""
    owner: dict[int, int] = {}
    planned: list[list[Fraction]] = []
    offered: list[list[int]] = []
    for source in range(len(w0)):
        u, v = share(w0[source:]), share(w1[source:])
        u, v = (v if u is None else u) or Fraction(0), (u if v is None else v) or Fraction(0)
        sums = [carry[source]]
        for x in range(len(left)):
            at, nxt = (u + (v - u) * Fraction(y, len(left)) for y in (x, x + 1))
            sums.append(sums[-1] + (at + nxt) / 2)
        mine = {row for x, row in enumerate(left) if math.floor(sums[x + 1]) > math.floor(sums[x])}
        planned.append(sums)
        offered.append(left)
        owner |= dict.fromkeys(mine, source)
        left = [row for row in left if row not in mine]
    return owner, planned, offered


def walk(supplies: list[Supply], rows: int) -> list[tuple[int, int]]:
    """Deal stretch by stretch and level by level, adding the share up over each offered row."""
    carry = [Fraction(0)] * len(supplies)
    taken = [0] * len(supplies)
    dry: set[int] = set()
    dealt: list[tuple[int, int]] = []
    knots = sorted({row for s in supplies for row, _ in s.points if row > 0})
    while len(dealt) < rows:
        begin = len(dealt)
        end = next((knot for knot in knots if knot > begin), max(rows, begin) + 50)
        live = [i not in dry for i in range(len(supplies))]
        flat = end not in knots
        w0 = [weight_at(s, begin, "right") * on for s, on in zip(supplies, live, strict=True)]
        w1 = w0
        if not flat:
            w1 = [weight_at(s, end, "left") * on for s, on in zip(supplies, live, strict=True)]
        if not any(w0) and not any(w1):
            return dealt
        owner, planned, offered = deal_levels(w0, w1, list(range(begin, end)), carry)
        stop, exhausted = end, None
        count = list(taken)
        for row in range(begin, end):
            source = owner[row]
            if count[source] == supplies[source].rows_max:
                stop, exhausted = row, source
                break
            count[source] += 1
        for row in range(begin, stop):
            dealt.append((owner[row], taken[owner[row]]))
            taken[owner[row]] += 1
        for source in range(len(supplies)):
            seen = sum(row < stop for row in offered[source])
            carry[source] = planned[source][seen] % 1
            if carry[source].denominator > 2**96:
                carry[source] = Fraction(math.floor(carry[source] * 2**96), 2**96)
        if exhausted is not None:
            dry.add(exhausted)
    return dealt[:rows]


def mode2_flags(share: Callable[[int, str], Fraction], rows: int) -> list[bool]:
    """Say of each row whether it is Mode 2; `share(row, side)` is f at a row's begin or end."""
    total, flags = Fraction(0), []
    for row in range(rows):
        before = math.floor(total)
        total += (share(row, "right") + share(row + 1, "left")) / 2
        flags.append(math.floor(total) > before)
    return flags


def spread(free: list[int], exposures: int) -> list[int]:
    """Choose `exposures` of the free rows, evenly: where n*E/M passes a whole number."""
    count = len(free)
    return [
        row for n, row in enumerate(free) if (n + 1) * exposures // count > n * exposures // count
    ]


def row_of_epoch(key_parts: tuple[object, ...], size: int, number: int) -> int:
    """Return the source row that a stream of `size` rows gives as its row `number`."""
    key = epoch_key(stream_key(*key_parts), number // size)
    return int(permute(number % size, size, key)[0])
