"""Run a pipeline schedule's own instructions against a clock: its bubble and its live activations.

DeepSpeed's schedules are generators of instructions, one stream a rank. Here a rank computes for
the given time and exchanges messages at no cost; an exchange ends when both sides have come to it,
as a send of NCCL does. What is left is the time that ranks wait for each other.

Imports no torch; `instructions` imports DeepSpeed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from megatron_mode.config import Config
from megatron_mode.cost.topology import Layout, accumulation_steps

PASSES = {"ForwardPass": 1, "BackwardPass": -1}
"""Computing instructions, and how many activations each leaves alive."""
BACKWARD_COST = 2.0
"""A backward pass takes two products where the forward pass takes one."""


class Pass(NamedTuple):
    """Compute for `duration`; a forward pass leaves one more activation alive, a backward fewer."""

    duration: float
    live: int


class Message(NamedTuple):
    """Name what goes from one rank to another."""

    kind: str
    sender: int
    receiver: int


Exchange = tuple[Message, ...]
"""Messages launched together; the rank continues when all of them have arrived."""
Posts = defaultdict[tuple[int, int, bool], list[tuple[str, float]]]
"""(sender, receiver, is the sender's side) to the (kind, time) of its messages, in order."""


class ScheduleCost(NamedTuple):
    """State what a step costs beside its work."""

    bubble_share: float
    """Share of the ranks' time in which they wait."""
    live_micro_batches: tuple[float, ...]
    """Most micro-batches whose activations a rank keeps, for each rank, in those of all its
    layers: a stage that is half of them counts half."""


def pipeline_line(config: Config, layout: Layout) -> str:
    """Say what a run's pipeline costs, for its start-up."""
    schedule = config.parallel.schedule
    micro_batches = accumulation_steps(config, layout.data)
    backward = BACKWARD_COST + (config.parallel.activation_checkpointing == "full")
    share, live = schedule_cost(schedule, layout.pipeline, micro_batches, 1.0, backward)
    return f"{schedule}, bubble {100 * share:.1f} %, at most {max(live):g} micro-batches in flight"


def schedule_cost(
    schedule: str, ranks: int, micro_batches: int, forward: float, backward: float
) -> ScheduleCost:
    """Run `1f1b` or `dualpipev` with the time of one micro-batch through all layers of a rank."""
    stages = 2 if schedule == "dualpipev" else 1
    durations = {"ForwardPass": forward / stages, "BackwardPass": backward / stages}
    streams = [instructions(schedule, ranks, micro_batches, rank) for rank in range(ranks)]
    programs = [list(program(stream, rank, durations)) for rank, stream in enumerate(streams)]
    live = [accumulate(step.live for step in p if isinstance(step, Pass)) for p in programs]
    busy = micro_batches * (forward + backward)
    return ScheduleCost(
        1 - busy / max(finish_times(programs)), tuple(max(alive) / stages for alive in live)
    )


def instructions(schedule: str, ranks: int, micro_batches: int, rank: int) -> Iterator[Any]:
    """Give the instructions that DeepSpeed's engine executes on a rank in one training step."""
    from deepspeed.runtime.pipe import schedule as schedules

    kinds = {"1f1b": schedules.TrainSchedule, "dualpipev": schedules.DualPipeVSchedule}
    for step in kinds[schedule](micro_batches, ranks, rank):
        yield from step


def program(
    stream: Iterable[Any], rank: int, durations: dict[str, float]
) -> Iterator[Pass | Exchange]:
    """Turn a rank's instructions into passes and exchanges.

    1F1B sends and receives at once; DualPipeV queues messages until its next CommitP2P.
    """
    steps = list(stream)
    commits = any(step.name == "CommitP2P" for step in steps)
    queued: list[Message] = []
    for step in steps:
        if step.name in PASSES:
            yield Pass(durations[step.name], PASSES[step.name])
        elif step.name.startswith(("Send", "Recv")):
            queued.append(_message(step, rank))
        if queued and (step.name == "CommitP2P" or not commits):
            yield tuple(queued)
            queued = []


def finish_times(programs: Sequence[Sequence[Pass | Exchange]]) -> list[float]:
    """Return when each rank is done; RuntimeError when ranks wait for each other for ever."""
    times = [0.0] * len(programs)
    posted: Posts = defaultdict(list)
    walks = {rank: _walk(rank, steps, times, posted) for rank, steps in enumerate(programs)}
    while walks:
        before = len(walks), sum(map(len, posted.values()))
        walks = {rank: walk for rank, walk in walks.items() if next(walk, False)}
        if (len(walks), sum(map(len, posted.values()))) == before:
            raise RuntimeError(f"the schedule stops: ranks {list(walks)} wait for each other")
    return times


def _message(step: Any, rank: int) -> Message:
    """Name the peers: phase 0 runs towards the last rank, phase 1 of DualPipeV back again."""
    onward = 1 if getattr(step, "phase", 0) == 0 else -1
    kind = "activation" if step.name.endswith("Activation") else "gradient"
    sends = step.name.startswith("Send")
    peer = rank + (onward if sends == (kind == "activation") else -onward)
    return Message(kind, rank, peer) if sends else Message(kind, peer, rank)


def _walk(
    rank: int, steps: Sequence[Pass | Exchange], times: list[float], posted: Posts
) -> Iterator[bool]:
    """Move a rank's clock through its program; yield True while it waits for a peer."""
    for step in steps:
        if isinstance(step, Pass):
            times[rank] += step.duration
            continue
        awaited = []
        for kind, sender, receiver in step:
            mine = posted[sender, receiver, sender == rank]
            awaited.append((sender, receiver, len(mine)))
            mine.append((kind, times[rank]))
        while (end := _arrival(awaited, posted)) is None:
            yield True
        times[rank] = end


def _arrival(awaited: Iterable[tuple[int, int, int]], posted: Posts) -> float | None:
    """Return when the (sender, receiver, number) messages have arrived; None before it is known."""
    ends = []
    for sender, receiver, index in awaited:
        sides = [posted[sender, receiver, side] for side in (True, False)]
        if any(len(side) <= index for side in sides):
            return None
        (sent, begin), (received, end) = (side[index] for side in sides)
        if sent != received:
            raise RuntimeError(f"rank {receiver} awaits {received}, {sender} sends {sent}")
        ends.append(max(begin, end))
    return max(ends)
