"""Run launch/pretrain.py many times for one import of the trainer."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import warnings
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from forked import context
from free_port import free_port
from tiny_run import PRETRAIN, ROOT, Outcome, variables


def run_child(words: list[str], environment: dict[str, str], folder: Path, paths: Any) -> None:
    """Run in a forked process as the program itself does; what it prints goes to the folder."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path[:0] = paths
    warnings.simplefilter("ignore")
    try:
        runpy.run_path(str(PRETRAIN))["main"](words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Started:
    """Hold a run that was started."""

    def __init__(self, process: ForkServerProcess, folder: Path) -> None:
        assert process.pid is not None
        self.process_id, self._process, self._folder = process.pid, process, folder

    def wait(self, timeout_seconds: float = 120) -> Outcome:
        """Return the outcome; the status of a killed run is -9."""
        self._process.join(timeout_seconds)
        status = self._process.exitcode
        assert status is not None, (self._folder / "err").read_text()
        files = [self._folder / name for name in ("out", "err")]
        return Outcome(status, *("" if file.is_symlink() else file.read_text() for file in files))


class Server:
    """Start runs of launch/pretrain.py."""

    def __init__(self, folder: Path) -> None:
        """Keep what runs print below `folder`."""
        self._folder = folder

    def start(
        self, *words: str | Path, paths: tuple[str, ...] = (), output: str = "", **more: str
    ) -> Started:
        """Start a run with these words and variables; modules may come from `paths`.

        What it prints may go to a device, which is not read.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        if output:
            for name in ("out", "err"):
                (folder / name).symlink_to(output)
        arguments = ([*map(str, words)], variables(**more), folder, paths)
        process = context().Process(target=run_child, args=arguments)
        process.start()
        return Started(process, folder)

    def run(self, *words: str | Path, **more: Any) -> Outcome:
        """Start a run and wait for its end."""
        return self.start(*words, **more).wait()

    def run_world(self, world_size: int, *words: str | Path) -> list[Outcome]:
        """Start a run of several processes as a launcher does, and wait for their ends."""
        return [run.wait() for run in self.start_world(world_size, *words)]

    def start_world(self, world_size: int, *words: str | Path) -> list[Started]:
        """Start a run of several processes without waiting for it."""
        port = str(free_port())
        world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = map(str, range(world_size))
        return [self.start(*words, RANK=rank, LOCAL_RANK=rank, **world) for rank in ranks]
