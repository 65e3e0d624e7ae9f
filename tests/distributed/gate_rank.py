"""What each rank does in the tests of the gate: poison a step, and hold the state beside it."""

from __future__ import annotations

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


def poisoned(engine, what):
    """Return a context in which this rank's loss or one of its gradients is NaN."""
    from megatron_mode.engine import step

    if what == "loss":
        scaled_loss = step.scaled_loss
        return mock.patch.object(step, "scaled_loss", lambda *words: scaled_loss(*words) * math.nan)
    # A norm's weight is replicated over tensor ranks: DeepSpeed's norm sees that of the first only.
    parameter = next(
        p for n, p in engine.deepspeed.module.named_parameters() if n.endswith("norm.weight")
    )
    # ZeRO takes the gradient in a hook of its own that was registered before: poison the gradient
    # that the node before it gives.
    node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
    handle = node.register_prehook(lambda grads: tuple(g * math.nan for g in grads))

    class Removed:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            handle.remove()

    return Removed()


def run_case(case, process, layout):
    """Take three steps with the second poisoned on one rank, and three with it left out."""
    from megatron_mode.engine.build import build_engine

    what, bad_rank, sections = case
    changes = {"parallel": sections.get("parallel")}
    config = equality_rank.make_config(
        layout.tensor, layout.pipeline, 2, True, layout.data, **changes
    )
    fields = {**config.model_dump(), "run": {**config.run.model_dump(), **sections.get("run", {})}}

    def engine_with(**health):
        engine = build_engine(
            type(config).model_validate({**fields, "health": health}),
            layout,
            equality_rank.VOCAB_TOKENS,
        )
        batches = equality_rank.make_batches(config.batch.global_rows, config.model.seq_len)
        mine = [
            equality_rank.micro_batches_of(batch, layout, engine.at, config.batch.micro_rows)
            for batch in batches
        ]
        return engine, [batch if engine.reads_data else [] for batch in mine]

    engine, batches = engine_with(non_finite="skip")
    results = [engine.train_step(0, batches[0])]
    before = state_of(engine)
    if process.rank == bad_rank:
        with poisoned(engine, what):
            results.append(engine.train_step(1, batches[1]))
    else:
        results.append(engine.train_step(1, batches[1]))
    changed_by_bad_step = differing(before, state_of(engine))
    results.append(engine.train_step(2, batches[2]))
    after = state_of(engine)
    planned, batches = engine_with(leave_out_steps=(1,))
    again = [planned.train_step(step, batches[step]) for step in range(3)]
    return {
        "verdicts": [result.verdict for result in results],
        "planned": [result.verdict for result in again],
        "losses": ([results[i].loss for i in (0, 2)], [again[i].loss for i in (0, 2)]),
        "bad_norm": results[1].grad_norm,
        "changed": changed_by_bad_step,
        "moved": len(differing(before, after)),
        "against_planned": differing(after, state_of(planned)),
        "optimizer": type(engine.deepspeed.optimizer).__name__,
    }


def run_cases(process, layout_sizes, cases):
    from megatron_mode.engine.build import build_mesh, join_group

    join_group(process, 1)
    tensor, pipeline, data = layout_sizes
    config = equality_rank.make_config(tensor, pipeline, 2, True, data)
    layout = build_mesh(config, process.world_size)
    return [run_case(case, process, layout) for case in cases]
