"""Import launch/pretrain.py once, then fork a run of it for each line of the input.

A line is a JSON object with the words, variables and folder of the run; the answer is its process
id. The folder gets `out`, `err` and, at the end, `status`.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path
from typing import Any


def run_child(main: Any, words: list[str], more: dict[str, str], folder: Path) -> None:
    """Run in a forked process as the program itself does, and leave the status behind."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    os.environ.update(more)
    leave = os._exit

    def note_and_leave(status: int) -> None:
        (folder / "status").write_text(str(status))
        leave(0)

    os._exit = note_and_leave  # also for a thread that ends the process
    try:
        main(words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def serve() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed talks to stdout
    warnings.simplefilter("ignore")
    import megatron_mode.train  # noqa: F401  # what takes the time

    main = runpy.run_path(sys.argv[1])["main"]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run_child(main, request["words"], request["variables"], Path(request["folder"]))
        print(child, file=answers, flush=True)


if __name__ == "__main__":
    serve()
