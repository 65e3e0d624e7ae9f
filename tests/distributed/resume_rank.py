"""What each rank does in the resume tests: train, or die without warning at a given step."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest import mock

VALID_SOURCES = ("prose-valid", "chat-valid-plain", "chat-valid-chat")


def make_config(data_root, run_dir, **sections):
    from megatron_mode.config import Config

    fields = {
        "run": {
            "dir": str(run_dir),
            "steps": 6,
            "eval_every_steps": 2,
            "eval_rows": 4,
            "threads": 1,
        },
        "model": {
            "name": "test",
            "layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "attention_heads": 4,
            "kv_heads": 2,
            "seq_len": 32,
            "tied_embeddings": True,
        },
        "data": {"root": str(data_root)},
        "mix": {
            "mode1": {"sources": [{"name": "prose"}]},
            "mode2": {"sources": [{"name": "chat"}]},
            "valid": {"sources": [{"name": name} for name in VALID_SOURCES]},
            "mode2_fraction": {"start": "0.5"},
        },
        "loss": {
            "blocking": {
                "policy": "both",
                "direction": "both",
                "tau": 0.51,
                "renormalise": True,
                "warmup_tokens": 256,
            }
        },
        "parallel": {"tensor": 2, "pipeline": 2},
        "batch": {"global_rows": 4, "micro_rows": 2},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "checkpoint": {"every_steps": 3, "keep": 2},
    }
    for name, changes in sections.items():
        fields[name] = {**fields.get(name, {}), **changes}
    return Config.model_validate(fields)


def run_training(process, config, die_at_step=None):
    """Train; return the first step that was taken (0-based), None where none was left.

    With `die_at_step`, leave at the beginning of that step as kill -9 would, once the checkpoint
    that is due before it is complete.
    """
    from megatron_mode.engine.step import Engine
    from megatron_mode.train import train

    train_step, taken = Engine.train_step, []

    def noting(self, step, micro_batches):
        if step == die_at_step:
            due = step - step % config.checkpoint.every_steps
            folder = Path(config.run.dir, f"checkpoints/step-{due:08d}")
            while due and not folder.exists():
                time.sleep(0.01)
            os._exit(9)
        taken.append(step)
        return train_step(self, step, micro_batches)

    with mock.patch.object(Engine, "train_step", noting):
        train(config, process)
    return taken[0] if taken else None


def run_elsewhere(process, config):
    """Train with a last rank on a machine of another kind; return the first step taken."""
    from megatron_mode.checkpoint import probe

    if process.rank == process.world_size - 1:
        here = probe.conditions
        with mock.patch.object(probe, "conditions", lambda e: {**here(e), "device": "another"}):
            return run_training(process, config)
    return run_training(process, config)


def run_with_slow_writes(process, config, seconds):
    """Train with a disk that takes `seconds` for each file.

    Return the steps at whose beginning a checkpoint was being written, and the seconds that writing
    took on this rank.
    """
    import time
    from pathlib import Path

    from megatron_mode.checkpoint import save
    from megatron_mode.engine.step import Engine
    from megatron_mode.train import train

    train_step, save_tensors = Engine.train_step, save.save_tensors
    checkpoints = Path(config.run.dir) / "checkpoints"
    beside, wrote = [], [0.0]

    def noting(self, step, micro_batches):
        if list(checkpoints.glob("*.partial")):
            beside.append(step)
        return train_step(self, step, micro_batches)

    def slowly(*args):
        begin = time.monotonic()
        time.sleep(seconds)
        record = save_tensors(*args)
        wrote[0] += time.monotonic() - begin
        return record

    with (
        mock.patch.object(Engine, "train_step", noting),
        mock.patch.object(save, "save_tensors", slowly),
    ):
        train(config, process)
    return beside, wrote[0]


def refusals(process, config, changed):
    """Try to resume under each changed config; return the message of each refusal."""
    from megatron.core import parallel_state

    from megatron_mode.errors import MegatronModeError
    from megatron_mode.train import train

    messages = []
    for other in changed:
        try:
            train(other, process)
        except MegatronModeError as error:
            messages.append(str(error))
        else:
            messages.append("went on")
        parallel_state.destroy_model_parallel()
    return messages


def refused_then_trained(process, refused, config):
    """Try to resume under `refused`, then train; return the message and the first step."""
    (message,) = refusals(process, refused, [refused])
    return message, run_training(process, config)
