"""Fork processes from a server that has imported the trainer once; an import takes 8 s of CPU."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext

# What a run imports later than its program does: each rank would take 0.5 s of CPU for it.
LATE = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ma",
    "sentencepiece",
)


def context() -> ForkServerContext:
    """Return the context of processes that are forked from the server."""
    # As commands do, so that DeepSpeed does not print that there is no GPU.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["megatron_mode.train", *LATE])
    return server
