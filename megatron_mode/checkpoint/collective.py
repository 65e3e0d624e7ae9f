"""Let all ranks come to one answer: what one of them finds wrong, every one raises.

A rank that raises alone leaves the others in a collective that it never joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_mode.errors import MegatronModeError

Answer = TypeVar("Answer")


def gather(mine: Answer) -> list[Answer]:
    """Return what every rank gives, in the order of the ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


@contextmanager
def agreed() -> Iterator[None]:
    """Raise on every rank what a user can mend on one; inside, no rank may wait for another."""
    mine = None
    try:
        yield
    except (MegatronModeError, OSError) as error:
        mine = error
    for refusal in gather(mine):
        if refusal is not None:
            raise refusal


def from_rank_0(ask: Callable[[], Answer]) -> Answer:
    """Return what `ask` returns on rank 0; what a user can mend is raised on all ranks."""
    found: list[Any] = [None]
    with agreed():
        if dist.get_rank() == 0:
            found[0] = ask()
    dist.broadcast_object_list(found, src=0)
    answer: Answer = found[0]
    return answer
