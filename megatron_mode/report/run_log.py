"""Show a run's progress on the one rank that reports: the progress bar and the metrics files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from tqdm import tqdm

from megatron_mode.config.fields import RunConfig
from megatron_mode.report.writers import MetricsWriter


class RunLog:
    """Write a line a step and move the bar; on ranks that do not report, do nothing."""

    def __init__(self, run: RunConfig, first_step: int, *, reports: bool) -> None:
        """Open the files of `run.dir`, keeping what belongs to steps up to `first_step`.

        In a log, where lines pile up, the bar is drawn every half minute.
        """
        self._writer = MetricsWriter(Path(run.dir), first_step or None) if reports else None
        self._bar: tqdm[NoReturn] = tqdm(
            total=run.steps,
            initial=first_step,
            disable=not reports,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )

    def write(self, line: Mapping[str, object]) -> None:
        """Write a step's metrics."""
        if self._writer is not None:
            self._writer.write(line)
            shown = {"loss": f"{line['loss']:.3f}", "auroc": line["mode_auroc"]}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def rewind(self, step: int) -> None:
        """Continue from `step` and remove what was written of later steps."""
        if self._writer is not None:
            self._writer = self._writer.rewound(step)
            self._bar.update(step - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        # A file that could not be written to cannot be closed either, and the first error counts.
        if self._writer is not None and kind is None:
            self._writer.close()
