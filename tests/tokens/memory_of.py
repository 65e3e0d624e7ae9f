"""Run a command and print the peak resident memory of it and its children together.

Every 50 ms the resident pages of all processes of the command's session are added up, as
/proc/PID/smaps_rollup tells them: `Pss` shares a page among the processes that map it, so that
shared libraries count once. Prints {"peak_bytes", "processes"} for the sample with the most.

    python tests/tokens/memory_of.py COMMAND ...
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path


def session_of(process: Path) -> int:
    """Return the session of a process; fields behind the name, which may hold anything."""
    return int((process / "stat").read_text().rpartition(")")[2].split()[3])


def resident_bytes(session: int) -> tuple[int, int]:
    """Return (bytes, processes) of a session."""
    total_bytes = count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if session_of(process) != session:
                continue
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total_bytes += 1024 * int(line.split()[1])
                    count += 1
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return total_bytes, count


def main() -> int:
    """Measure the command in the arguments."""
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, start_new_session=True)
    peak = (0, 0)
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.05)
    print(json.dumps({"peak_bytes": peak[0], "processes": peak[1]}))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
