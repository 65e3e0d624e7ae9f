"""What each rank does in the tests of the gate: poison a step, and hold the state beside it."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import equality_rank
import torch


def state_of(engine):
    """Return copies of every tensor that an update may touch."""
    found = dict(engine.deepspeed.module.named_parameters())
    optimizer = engine.deepspeed.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        for index, part in enumerate(getattr(optimizer, name, ())):
            found[f"{name}.{index}"] = part
    inner = getattr(optimizer, "optimizer", optimizer)
    for index, state in enumerate(inner.state.values()):
        found |= {f"moment.{index}.{name}": value for name, value in state.items()}
    return {name: torch.as_tensor(value).detach().clone() for name, value in found.items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@contextlib.contextmanager
def poisoned(engine, what):
    """Make this rank's loss, or one of its gradients, NaN."""
    from megatron_mode.engine import step

    if what == "loss":
        scaled_loss = step.scaled_loss
        with mock.patch.object(step, "scaled_loss", lambda *w: scaled_loss(*w) * math.nan):
            yield
        return
    # A norm's weight is replicated over tensor ranks: DeepSpeed's norm sees that of the first only.
    parameter = next(
        p for n, p in engine.deepspeed.module.named_parameters() if n.endswith("norm.weight")
    )
    # ZeRO takes the gradient in a hook that is registered already: poison what comes before it.
    node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
    handle = node.register_prehook(lambda grads: tuple(g * math.nan for g in grads))
    try:
        yield
    finally:
        handle.remove()


def make_engine(sections, layout, **health):
    """Return an engine and this rank's micro-batches of three steps."""
    from megatron_mode.engine.build import build_engine

    base = equality_rank.make_config(
        layout.tensor, layout.pipeline, 2, True, layout.data, **sections
    )
    config = type(base).model_validate({**base.model_dump(), "health": health})
    engine = build_engine(config, layout, equality_rank.VOCAB_TOKENS)
    batches = equality_rank.make_batches(config.batch.global_rows, config.model.seq_len)
    mine = [
        equality_rank.micro_batches_of(batch, layout, engine.at, config.batch.micro_rows)
        for batch in batches
    ]
    return engine, [batch if engine.reads_data else [] for batch in mine]


def run_case(what, bad_rank, rank, made):
    """Take three steps, the second of them poisoned on one rank."""
    engine, batches = made
    results = [engine.train_step(0, batches[0])]
    before = state_of(engine)
    with poisoned(engine, what) if rank == bad_rank else contextlib.nullcontext():
        results.append(engine.train_step(1, batches[1]))
    changed = differing(before, state_of(engine))
    results.append(engine.train_step(2, batches[2]))
    after = state_of(engine)
    return results, changed, after


def run_cases(process, layout_sizes, sections, cases):
    """Run each case (what, bad rank), and once the same steps with the second left out by plan."""
    from megatron_mode.engine.build import build_mesh, join_group

    join_group(process, 1)
    tensor, pipeline, data = layout_sizes
    config = equality_rank.make_config(tensor, pipeline, 2, True, data)
    layout = build_mesh(config, process.world_size)
    found = []
    for section, some in zip(sections, cases, strict=True):
        engine, batches = make_engine(section, layout, leave_out_steps=(1,))
        planned = [engine.train_step(step, batches[step]) for step in range(3)]
        expected = state_of(engine)
        for what, bad_rank in some:
            made = make_engine(section, layout, non_finite="skip")
            results, changed, after = run_case(what, bad_rank, process.rank, made)
            found.append(
                {
                    "verdicts": [result.verdict for result in results],
                    "planned": [result.verdict for result in planned],
                    "losses": [results[0].loss, results[2].loss],
                    "planned_losses": [planned[0].loss, planned[2].loss],
                    "bad_norm": results[1].grad_norm,
                    "changed": changed,
                    "against_planned": differing(after, expected),
                    "optimizer": type(engine.deepspeed.optimizer).__name__,
                }
            )
    return found
