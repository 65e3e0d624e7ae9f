"""Run launch/pretrain.py many times for one import: ask the server that forks its runs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from free_port import free_port
from tiny_run import PRETRAIN, ROOT, Outcome, variables

SERVER = Path(__file__).with_name("pretrain_server.py")


class Started:
    """Hold a run that was started."""

    def __init__(self, process_id: int, folder: Path) -> None:
        self.process_id, self._folder = process_id, folder

    def wait(self, timeout_seconds: float = 120) -> Outcome:
        """Return the outcome; the status of a killed run is -9."""
        deadline = time.monotonic() + timeout_seconds
        status = self._folder / "status"
        while Path(f"/proc/{self.process_id}").exists():
            assert time.monotonic() < deadline, (self._folder / "err").read_text()
            time.sleep(0.02)
        code = int(status.read_text()) if status.exists() else -9
        return Outcome(code, *((self._folder / name).read_text() for name in ("out", "err")))


class Server:
    """Start runs of launch/pretrain.py."""

    def __init__(self, folder: Path) -> None:
        """Import launch/pretrain.py; what runs say goes below `folder`."""
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), str(PRETRAIN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=variables(),
        )

    def start(self, *words: str | Path, **more: str) -> Started:
        """Start a run with these words and launcher's variables."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        request = {"words": list(map(str, words)), "variables": more, "folder": str(folder)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Started(int(self._process.stdout.readline()), folder)

    def run(self, *words: str | Path, **more: str) -> Outcome:
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

    def close(self) -> None:
        """End the server; taking torch down in good order costs seconds."""
        self._process.kill()
        self._process.wait()
