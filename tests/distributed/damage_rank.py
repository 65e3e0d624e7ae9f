"""What each rank does in the tests of damaged checkpoints: try to resume, say what it was told."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist


def apply(damage, checkpoints):
    """Damage a file as `damage` says; return what brings the old state back."""
    kind, name, *where = damage
    path = Path(checkpoints) / name
    old = path.read_bytes()
    if kind == "flip":
        at, change = where
        path.write_bytes(old[:at] + bytes([old[at] ^ change]) + old[at + 1 :])
    elif kind == "cut":
        path.write_bytes(old[: where[0]])
    elif kind == "add":
        extra = path.with_name(where[0])
        extra.write_bytes(b"x")
        return extra.unlink
    else:
        path.unlink()
    return lambda: path.write_bytes(old)


def attempts(process, config, damages):
    """Try to resume under each damage; return what each said, and last where the sound one went."""
    from megatron_mode.checkpoint.resume import resume
    from megatron_mode.checkpoint.save import Checkpoints
    from megatron_mode.engine.build import join_group
    from megatron_mode.errors import CheckpointError
    from megatron_mode.train import build_run, open_data

    data = open_data(config)
    join_group(process, config.run.threads)
    run = build_run(data, process)
    said = []
    for damage in [*damages, None]:
        undo = None
        if run.engine.rank == 0 and damage is not None:
            undo = apply(damage, run.folder / "checkpoints")
        dist.barrier()
        checkpoints = Checkpoints(run.engine, run.folder, run.corpus, run.order, run.reader)
        try:
            step, _ = resume(checkpoints)
            said.append(f"went on at step {step}")
        except CheckpointError as error:
            said.append(str(error))
        dist.barrier()
        if undo is not None:
            undo()
        dist.barrier()
    return said
