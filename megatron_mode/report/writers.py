"""Write the files of a run folder: metrics.jsonl, tb/, summary.json, environment.json."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from megatron_mode.atomic import write_whole
from megatron_mode.report.registry import METRICS

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS_FILE = "metrics.jsonl"
HEALTH_FILE = "health.jsonl"
SUMMARY_FILE = "summary.json"
ENVIRONMENT_FILE = "environment.json"
TENSORBOARD_FOLDER = "tb"
_PACKAGES = (
    "megatron-mode",
    "torch",
    "deepspeed",
    "megatron-core",
    "triton",
    "numpy",
    "sentencepiece",
    "transformer-engine",
    "flash-attn",
    "apex",
)


def silence_tensorboard() -> None:
    """Keep TensorBoard's thread from printing a traceback of what `write` raises in the loop too.

    A disk that is full fails it first.
    """
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        is_writer = type(failed.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = hook


class MetricsWriter:
    """Append one line a step to metrics.jsonl and the same numbers to TensorBoard.

    Only the process that reports (rank 0) makes one. Floats keep their last bit; NaN and infinity,
    which JSON lacks, are written as null. A line reaches the file before `write` returns.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        """Open the files of `run_dir`, keeping what belongs to steps up to `resume_step`.

        None starts a run: lines of an earlier start that reached no checkpoint are dropped.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir, path = run_dir, run_dir / METRICS_FILE
        last_step = -1 if resume_step is None else resume_step
        _drop_lines_after(path, last_step)
        self._lines = path.open("a", encoding="utf-8")
        self._tensorboard: SummaryWriter = SummaryWriter(
            str(run_dir / TENSORBOARD_FOLDER), purge_step=last_step + 1, flush_secs=30
        )

    def write(self, metrics: Mapping[str, object]) -> None:
        """Write one line; `metrics` holds `step` and numbers, None or nested dicts of them."""
        step = metrics["step"]
        if not isinstance(step, int):
            raise TypeError(f"step must be an int, got {step!r}")
        unknown = metrics.keys() - METRICS.keys()
        assert not unknown, f"report/registry.py has no entry for {sorted(unknown)}"
        self._lines.write(_to_json(metrics) + "\n")
        self._lines.flush()
        for name, value in _scalars(metrics):
            if name != "step":
                held_out = METRICS[name.partition("/")[0]].is_held_out
                tag = f"valid/{name.removeprefix('valid_')}" if held_out else f"train/{name}"
                self._tensorboard.add_scalar(tag, value, step)

    def rewound(self, step: int) -> MetricsWriter:
        """Close, and return the writer of a run that goes on from `step`."""
        self.close()
        return MetricsWriter(self._run_dir, step or None)

    def close(self) -> None:
        """Flush and close both files."""
        self._lines.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def write_event(run_dir: Path, kind: str, reason: str, action: str, **more: object) -> bool:
    """Append an event to RUN/health.jsonl, as any rank may; tell whether the disk took it.

    A full disk, of which the event may tell, is no further error.
    """
    event = {"time": time.time(), "kind": kind, "action": action, "reason": reason, **more}
    try:
        with (run_dir / HEALTH_FILE).open("a", encoding="utf-8") as lines:
            lines.write(_to_json(event) + "\n")
    except OSError:
        return False
    return True


def write_summary(run_dir: Path, summary: Mapping[str, object]) -> Path:
    """Replace RUN/summary.json at once, so that a reader never sees half of it."""
    return write_whole(run_dir / SUMMARY_FILE, _to_json(summary, indent=2) + "\n")


def write_environment(run_dir: Path, extra: Mapping[str, object] | None = None) -> Path:
    """Write RUN/environment.json: versions, machine and devices, with `extra` beside them."""
    whole = {**environment(), **(extra or {})}
    return write_whole(run_dir / ENVIRONMENT_FILE, _to_json(whole, indent=2) + "\n")


def environment() -> dict[str, object]:
    """Describe what this process runs on; packages that are not installed are null."""
    import torch

    devices = range(torch.cuda.device_count())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(device) for device in devices],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": sys.argv,
    }


def check_writable(run_dir: Path) -> None:
    """Raise OSError naming the folder where a run folder cannot be written; nothing is made."""
    folder = run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    # A read-only file system refuses here also the administrator, whom modes do not stop.
    if not os.access(folder, os.W_OK):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        reason = errno.EROFS if read_only else errno.EACCES
        raise OSError(reason, os.strerror(reason), str(folder))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _drop_lines_after(path: Path, last_step: int) -> None:
    """Keep the whole lines of steps up to `last_step`; a line torn by a crash goes too."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        kept = [line for line in lines if _step_of(line) <= last_step]
    write_whole(path, b"".join(kept).decode())


def _step_of(line: bytes) -> float:
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _to_json(values: Mapping[str, object], indent: int | None = None) -> str:
    return json.dumps(_finite(values), allow_nan=False, ensure_ascii=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _scalars(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)
