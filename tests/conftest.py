"""Give the tests what megatron-core's layers ask for in a single process."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# A suite under nohup ignores it, and so would the runs that tests start and hang up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # the modules beside this file

# The suite has a process for each core. Two threads in each wait for each other: the fp64 oracle of
# the equality tests took 13.7 s of CPU with two, 0.9 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU the Triton kernels run in their interpreter; Triton reads this when it is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine may stall any example: what takes too long in all is pytest-timeout's to say.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


# Processes that take the files in this order end at about the same time.
LONGEST_FIRST = ("slurm", "distributed", "commands", "kernels", "tokens")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders that take longest first; within one, the order stays."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.parent, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Take back what a verb of a test before this one set: all cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tables() -> ModuleType:
    """Load docs/tables.py."""
    spec = importlib.util.spec_from_file_location("tables", TESTS.parent / "docs/tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """Stand as the only rank of a gloo group, so that megatron-core builds whole layers."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
