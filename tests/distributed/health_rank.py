"""What each rank does in the health tests: train, with a poisoned step or a broken reader."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from unittest import mock


@contextlib.contextmanager
def poisoned(process, poison):
    """Poison the loss of one rank at some steps: (rank, steps, what).

    "nan" breaks the hidden states of the step's second micro-batch before the loss; "spike" makes
    the loss of the step a hundred times as large.
    """
    from megatron_mode.engine import step as engine_step

    rank, steps, what = poison or (None, (), "")
    now, calls = [-1], [0]
    train_step, loss_fn = engine_step.Engine.train_step, engine_step.StepLoss.__call__
    scaled_loss = engine_step.scaled_loss

    def noting(self, step, micro_batches):
        now[0], calls[0] = step, 0
        result = train_step(self, step, micro_batches)
        now[0] = -1
        return result

    def broken(self, outputs, labels):
        calls[0] += 1
        if what == "nan" and now[0] in steps and calls[0] == 2:
            outputs = (outputs[0] * math.nan, *outputs[1:])
        return loss_fn(self, outputs, labels)

    def larger(*words):
        return scaled_loss(*words) * (100 if what == "spike" and now[0] in steps else 1)

    with contextlib.ExitStack() as stack:
        if process.rank == rank:
            stack.enter_context(mock.patch.object(engine_step.Engine, "train_step", noting))
            stack.enter_context(mock.patch.object(engine_step.StepLoss, "__call__", broken))
            stack.enter_context(mock.patch.object(engine_step, "scaled_loss", larger))
        yield


def run_poisoned(process, config, poison=None):
    """Train; return None, or the sentence that ended the run."""
    from megatron_mode.errors import HealthError
    from megatron_mode.train import train

    with poisoned(process, poison):
        try:
            train(config, process)
        except HealthError as error:
            return str(error)
    return None


def run_hanging(process, config, inside):
    """Train with a second rank that hangs where `inside` says: a function of train.py."""
    import time

    from megatron_mode import train

    def hangs(*words):
        time.sleep(600)

    with contextlib.ExitStack() as stack:
        if process.rank == 1:
            stack.enter_context(mock.patch.object(train, inside, hangs))
        train.train(config, process)


def wait_in_vain(process, port):
    """Join a group of two alone; return the error."""
    from datetime import timedelta

    from megatron_mode.config.fields import HealthConfig
    from megatron_mode.engine import build
    from megatron_mode.errors import MegatronModeError
    from megatron_mode.process.launch import prepare_environment

    lonely = dataclasses.replace(process, world_size=2, master_port=port)
    prepare_environment(lonely)
    health = HealthConfig(stall_seconds=1, start_stall_seconds=1)
    with mock.patch.object(build, "GROUP_TIMEOUT", timedelta(0)):
        try:
            build.join_group(lonely, 1, health)
        except MegatronModeError as error:
            return type(error).__name__, str(error)
    return None


def run_with_a_broken_reader(process, config, error, after):
    """Train with a loader thread that ends with `error` after reading some batches."""
    from megatron_mode.errors import DataError
    from megatron_mode.mix.rows import RowReader
    from megatron_mode.train import train

    read_batch, count = RowReader.read_batch, [0]

    def breaking(self, *picks):
        import threading

        if threading.current_thread().name.startswith("loader"):
            count[0] += 1
            if count[0] > after:
                raise error
        return read_batch(self, *picks)

    with mock.patch.object(RowReader, "read_batch", breaking):
        try:
            train(config, process)
        except DataError as told:
            return str(told)
    return None
