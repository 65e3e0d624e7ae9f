"""Let all ranks come to one answer: what one of them finds wrong, every one raises.

A rank that raises alone leaves the others in a collective that it never joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_mode.errors import CheckpointError, MegatronModeError

Answer = TypeVar("Answer")


def from_rank_0(ask: Callable[[], Answer]) -> Answer:
    """Return what `ask` returns on rank 0; what a user can mend is raised on all ranks."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = ask()
        except (MegatronModeError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    answer, refusal = told
    if refusal is not None:
        raise refusal
    found: Answer = answer
    return found


@contextmanager
def agreed(tell: Callable[[OSError], str]) -> Iterator[None]:
    """Raise CheckpointError on every rank where the block raises it on one.

    Of a write that fails `tell` makes the sentence. Inside no rank may wait for another.
    """
    failure = None
    try:
        yield
    except CheckpointError as error:
        failure = str(error)
    except OSError as error:
        failure = tell(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    said = [text for text in failures if text is not None]
    if said:
        raise CheckpointError(said[0])
