"""Import torch, DeepSpeed and megatron-core without the warnings and chatter of their imports."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from types import ModuleType


def quiet_libraries() -> None:
    """Let DeepSpeed and torch print warnings and errors only; call it before DeepSpeed's import."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for name in ("DeepSpeed", "deepspeed", "torch.distributed", "megatron", "numexpr"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import torch

    if not torch.cuda.is_available():
        # Else DeepSpeed prints that it found no GPU, and on stdout, where --json writes.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def import_quietly(module: str, threads: int) -> ModuleType:
    """Import one of our modules that needs torch; `threads` 0 takes all cores.

    The optional packages that the libraries warn about are listed in the start-up table of a run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_libraries()
        import torch

        found = importlib.import_module(module)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return found
