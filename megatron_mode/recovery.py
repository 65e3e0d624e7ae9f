"""Act on what is wrong with a step: report it, leave it out, go back to a checkpoint or stop.

RUN/health.jsonl gets one object an event: the step (from 0, as `megatron-mode order --step` has
it), what was found, what is done, and the rows of the step with their documents and losses.
Letters: B rows, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_mode.checkpoint.collective import gather
from megatron_mode.checkpoint.resume import roll_back
from megatron_mode.checkpoint.save import Checkpoints
from megatron_mode.engine.health import Verdict
from megatron_mode.engine.step import Engine, StepResult
from megatron_mode.errors import CheckpointError, DataError, HealthError
from megatron_mode.mix.audit.documents import describe_rows
from megatron_mode.mix.corpus import Corpus
from megatron_mode.mix.loader import StepBatch
from megatron_mode.mix.order import Order
from megatron_mode.process.failures import is_first_to_tell
from megatron_mode.process.watchdog import Watchdog
from megatron_mode.report.writers import HEALTH_FILE, write_event

WORST_ROWS = 4
KINDS = {DataError: "data", CheckpointError: "checkpoint", OSError: "disk"}
Batches = Generator[StepBatch, None, None]
Losses = dict[int, float]


class Recovery:
    """Give the steps of a run and act on what is wrong with one."""

    def __init__(self, checkpoints: Checkpoints, corpus: Corpus, watchdog: Watchdog) -> None:
        self.checkpoints, self.corpus, self.watchdog = checkpoints, corpus, watchdog
        self.engine, self.order = checkpoints.engine, checkpoints.order
        self.folder = checkpoints.folder.parent
        self.step = 0
        """The step in work."""
        self._back_to: int | None = None

    def steps(self, steps_from: Callable[[int], Batches], first_step: int) -> Iterator[StepBatch]:
        """Give the steps from `first_step` on, and again from where the run went back to."""
        start: int | None = first_step
        while start is not None:
            self.step = start
            with contextlib.closing(steps_from(start)) as batches:
                for batch in batches:
                    # The first compiles kernels, and meets the groups of others for the first time.
                    self.watchdog.beat(f"step {batch.step}", is_long=batch.step == start)
                    yield batch
                    self.step = batch.step + 1
                    if self._back_to is not None:
                        break
            start, self._back_to = self._back_to, None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Write down what breaks the run while inside, and a stall with the rows of its step."""
        before, self.watchdog.report = self.watchdog.report, self._tell_stall
        try:
            yield
        except (DataError, CheckpointError, OSError) as error:
            # Of what all ranks raise, one writes it down.
            if is_first_to_tell():
                kind = next(name for kind, name in KINDS.items() if isinstance(error, kind))
                cause = traceback.format_exception(error.__cause__) if error.__cause__ else []
                self._append(kind, str(error), "stop", cause="".join(cause))
            raise
        # Not after an error: a stall tears this rank out of the step that the event is of.
        self.watchdog.report = before

    def goes_back_to(self, batch: StepBatch, result: StepResult) -> int | None:
        """Act on the step's verdict; return the step that the run went back to, else None.

        Raises HealthError where the policy stops the run.
        """
        verdict = result.verdict
        if verdict.kind is None:
            return None
        self._report(batch, result)
        if verdict.action == "stop":
            # What is being written is from before this step, and good.
            self.checkpoints.wait()
            dist.barrier()  # none leaves while another still waits at rank 0
            raise HealthError(self._stop_sentence(verdict))
        note = "its update is left out" if verdict.is_left_out else "it is only reported"
        if verdict.action == "rollback":
            note = self._roll_back(verdict.first_left_out)
        self._say(f"note: step {self.step}: {verdict.reason}; {note}")
        return self._back_to

    def _roll_back(self, first: int) -> str:
        """Go back to a checkpoint from before step `first` and say to which."""
        self.checkpoints.wait()
        self.watchdog.beat(f"the rollback of step {self.step}", is_long=True)
        self._back_to, notes = roll_back(self.checkpoints, first, last=self.step)
        for note in notes:
            self._say(note)
            if self.engine.rank == 0 and note.startswith("WARNING"):
                self._append("checkpoint", note, "fallback")
        left_out = "".join(f" {step}" for step in range(first, self.step + 1))
        return f"back to step {self._back_to}, to leave out the updates of{left_out}"

    def _say(self, sentence: str) -> None:
        """Print beside the progress bar, once."""
        if self.engine.rank == 0:
            tqdm.write(sentence, file=sys.stderr)

    def _report(self, batch: StepBatch, result: StepResult) -> None:
        """Gather what each rank knows of the step, and let rank 0 write it down."""
        square = self.engine.gradient_square
        is_finite = square is not None and bool(torch.isfinite(square))
        gathered = gather((is_finite, row_losses(self.engine, self.order, batch, result)))
        if self.engine.rank != 0:
            return
        losses = {row: loss for _, of_rank in gathered for row, loss in of_rank.items()}
        not_finite = [rank for rank, (is_finite, _) in enumerate(gathered) if not is_finite]
        verdict = result.verdict
        assert verdict.kind is not None
        action = verdict.action if verdict.is_left_out else "report"
        more = {"loss": result.loss, "ranks_with_bad_gradient": not_finite}
        more["worst_rows"] = worst_rows(losses)
        self._append(verdict.kind, verdict.reason, action, losses, **more)

    def _stop_sentence(self, verdict: Verdict) -> str:
        key = "spike" if verdict.kind == "loss_spike" else "non_finite"
        health = self.engine.config.health
        rule = f"health.{key} is {getattr(health, key)}"
        other = f"health.{key} to skip or rollback"
        if getattr(health, key) != "stop":
            rule = f"health.max_skips is {health.max_skips}"
            other = "raise health.max_skips"
        steps = ",".join(map(str, sorted({*health.leave_out_steps, self.step})))
        return (
            f"step {self.step}: {verdict.reason}; {rule}, so the run stops and saves nothing of "
            f"this step. {self.folder / HEALTH_FILE} names its rows and documents; to continue "
            f"without it set health.leave_out_steps=[{steps}], or {other}, and start the run again"
        )

    def _tell_stall(self, sentence: str) -> None:
        say_stall(sentence)
        self._append("stall", sentence, "stop")

    def _append(
        self, kind: str, reason: str, action: str, losses: Losses | None = None, **more: object
    ) -> None:
        """Write an event of the step in work with its rows, and their losses where known."""
        config = self.engine.config
        if self.step < config.run.steps:  # the last save comes after all
            size = config.batch.global_rows
            rows = self.order.rows(self.step * size, (self.step + 1) * size)
            with contextlib.suppress(DataError):  # a damaged table of documents hides no sentence
                found = describe_rows(config, self.corpus, self.order, rows)
                if losses is not None:
                    of_rows = map(losses.get, rows.row.tolist())
                    found = [{**row, "loss": x} for row, x in zip(found, of_rows, strict=True)]
                more["rows"] = found
        write_event(self.folder, kind, reason, action, step=self.step, **more)


def tell_stall(folder: Path, sentence: str) -> None:
    """Say that a run has stalled where no step is in work: at its start or its end."""
    say_stall(sentence)
    write_event(folder, "stall", sentence, "stop")


def say_stall(sentence: str) -> None:
    """Print the sentence below the progress bar."""
    print(f"\nerror: {sentence}", file=sys.stderr, flush=True)


def row_losses(engine: Engine, order: Order, batch: StepBatch, result: StepResult) -> Losses:
    """Return row index -> mean weighted loss of the rows that this rank was dealt."""
    if not engine.computes_loss or engine.at.tensor:
        return {}
    micro_rows, readers = engine.config.batch.micro_rows, engine.layout.data
    deal = order.deals(batch.step, batch.step + 1, len(batch.rows)).reshape(-1, readers, micro_rows)
    found: Losses = {}
    for dealt, output in zip(deal[:, engine.at.data], result.outputs, strict=True):
        lm_B = _row_means(output.loss.nll_BT, output.batch.lm_weight_BT)
        mode_B = _row_means(output.loss.bce_BT, output.batch.mode_weight_BT)
        loss_B = lm_B + engine.config.loss.mode_weight * mode_B
        found |= dict(zip(batch.rows.row[dealt].tolist(), loss_B.tolist(), strict=True))
    return found


def worst_rows(losses: Losses) -> list[int]:
    """Return the rows whose loss is not finite; where there are none, those of the largest."""
    broken = [row for row, loss in losses.items() if not abs(loss) < float("inf")]
    return sorted(broken) or sorted(losses, key=lambda row: -losses[row])[:WORST_ROWS]


def _row_means(loss_BT: torch.Tensor, weight_BT: torch.Tensor) -> torch.Tensor:
    weight_BT = weight_BT.to(loss_BT.dtype)
    return (loss_BT * weight_BT).sum(1) / weight_BT.sum(1).clamp(min=1e-12)
