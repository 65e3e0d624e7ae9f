"""What each rank does in the preemption tests: train, and be signalled at a given moment."""

from __future__ import annotations

import os
import signal
import threading
import time


def run_training(process, config, moment=None, ranks=(), signals=("SIGUSR1",)):
    """Train; the ranks named get the signals in the middle of `moment`.

    A moment is ("step", n) for the n-th step, ("evaluation", n), ("save", n) or ("final", n) for
    the n-th source of the last evaluation, counted from 1 in this process. Files of checkpoints are
    written slowly, so that a save is still under way in the steps after it. Returns (name of the
    reason, saves begun).
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from megatron_mode import finish
    from megatron_mode import train as training
    from megatron_mode.checkpoint import save
    from megatron_mode.engine.step import Engine
    from megatron_mode.process.stopping import StopRequest

    numbers = [signal.Signals[name] for name in signals] if process.rank in ranks else []
    counted = dict.fromkeys(("step", "evaluation", "save", "final"), 0)

    def signalled(kind, function):
        def call(*args, **more):
            counted[kind] += 1
            now = moment == (kind, counted[kind])
            storm = threading.Thread(target=send, args=(numbers if now else [],))
            storm.start()
            result = function(*args, **more)
            storm.join()
            return result

        return call

    def send(numbers):
        for _ in range(20):
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.002)

    def written_slowly(*args):
        time.sleep(0.3)
        return save_tensors(*args)

    save_tensors = save.save_tensors
    save.save_tensors = written_slowly
    Engine.train_step = signalled("step", Engine.train_step)
    training.evaluate = signalled("evaluation", training.evaluate)
    finish.evaluate_source = signalled("final", finish.evaluate_source)
    PipelineEngine.save_checkpoint = signalled("save", PipelineEngine.save_checkpoint)
    reason = training.train(config, process, StopRequest().listen())
    return reason.name, counted["save"]
