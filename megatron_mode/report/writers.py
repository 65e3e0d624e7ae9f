"""Write the files of a run folder (metrics.jsonl, tb/, summary.json, ...) and the progress bar."""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, Any, NoReturn, Self

from megatron_mode.atomic import write_whole
from megatron_mode.report.registry import METRICS

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter
    from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
HEALTH_FILE = "health.jsonl"
SUMMARY_FILE = "summary.json"
ENVIRONMENT_FILE = "environment.json"
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
    """Keep TensorBoard's thread from printing a traceback of an error that `write` raises too.

    A full disk fails the thread first.
    """
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        is_writer = type(failed.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = hook


class RunLog:
    """Append one line a step to metrics.jsonl and the same numbers to TensorBoard; move the bar.

    On ranks that do not report it does nothing. Floats keep their last bit; NaN and infinity are
    null in JSON. A line reaches the file before `write` returns.
    """

    def __init__(self, run_dir: Path, steps: int, first_step: int, *, reports: bool = True) -> None:
        """Open the files of `run_dir`, keeping what belongs to steps up to `first_step`.

        In a log, where lines pile up, the bar of `steps` is drawn every half minute.
        """
        from tqdm import tqdm

        self._run_dir, self._reports = run_dir, reports
        if reports:
            self._open(first_step)
        self._bar: tqdm[NoReturn] = tqdm(
            total=steps,
            initial=first_step,
            disable=not reports,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )

    def write(self, line: Mapping[str, Any]) -> None:
        """Write a step's metrics: numbers, None or objects of them by key; `step` is an int."""
        if not self._reports:
            return
        unknown = line.keys() - METRICS.keys()
        assert not unknown, f"report/registry.py has no entry for {sorted(unknown)}"
        self._lines.write(_to_json(line) + "\n")
        self._lines.flush()
        for key, value in line.items():
            tag = key.replace("valid_", "valid/", 1) if METRICS[key].is_held_out else f"train/{key}"
            if key != "step":
                for name, number in _scalars(tag, value):
                    self._tensorboard.add_scalar(name, number, line["step"])
        shown = {"loss": f"{line['loss']:.3f}", "auroc": line.get("mode_auroc")}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def rewind(self, step: int) -> None:
        """Continue from `step` and remove what was written of later steps."""
        if self._reports:
            self._close()
            self._open(step)
            self._bar.update(step - self._bar.n)

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._run_dir.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(self._run_dir / METRICS_FILE, first_step)
        self._lines = (self._run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard: SummaryWriter = SummaryWriter(
            str(self._run_dir / "tb"), purge_step=first_step + 1, flush_secs=30
        )

    def _close(self) -> None:
        self._lines.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.close()
        # A file that could not be written to cannot be closed either, and the first error counts.
        if self._reports and kind is None:
            self._close()


def write_event(run_dir: Path, kind: str, reason: str, action: str, **more: object) -> bool:
    """Append an event to RUN/health.jsonl, as any rank may; return False if the disk refuses it.

    A full disk, which the event may be about, is no further error.
    """
    event = {"time": time.time(), "kind": kind, "action": action, "reason": reason, **more}
    try:
        with (run_dir / HEALTH_FILE).open("a", encoding="utf-8") as lines:
            lines.write(_to_json(event) + "\n")
    except OSError:
        return False
    return True


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Replace a JSON file at once, so that a reader never sees half of it."""
    write_whole(path, _to_json(values, indent=2) + "\n")


def write_environment(run_dir: Path, **more: object) -> None:
    """Write RUN/environment.json: versions (null where not installed), machine and devices."""
    import torch

    devices = range(torch.cuda.device_count())
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(device) for device in devices],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": sys.argv,
    }
    write_json(run_dir / ENVIRONMENT_FILE, {**found, **more})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_writable(run_dir: Path) -> None:
    """Raise OSError naming the folder if a run folder cannot be written; make nothing."""
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not folder.is_dir():
        reason = errno.ENOTDIR
    elif os.access(folder, os.W_OK):
        return
    else:
        # A read-only file system also refuses the administrator, whom modes do not stop.
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        reason = errno.EROFS if is_read_only else errno.EACCES
    raise OSError(reason, os.strerror(reason), str(folder))


def _drop_lines_after(path: Path, last_step: int) -> None:
    """Keep the complete lines of steps up to `last_step`; a line torn by a crash goes too."""

    def is_kept(line: bytes) -> bool:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return line.endswith(b"\n") and bool(json.loads(line)["step"] <= last_step)
        return False

    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        write_whole(path, b"".join(line for line in lines if is_kept(line)).decode())


def _to_json(values: Mapping[str, object], indent: int | None = None) -> str:
    return json.dumps(_finite(values), allow_nan=False, ensure_ascii=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(tag: str, value: object) -> Iterator[tuple[str, float]]:
    """Yield a finite number with its tag, or those of an object by source."""
    if isinstance(value, Mapping):
        for source, number in value.items():
            yield from _scalars(f"{tag}/{source}", number)
    elif isinstance(value, int | float) and math.isfinite(value):
        yield tag, float(value)
