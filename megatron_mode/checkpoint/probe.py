"""Evaluate one fixed batch when a checkpoint is saved, and again when it is resumed from.

The batch is the beginning of the run's first rows, every token weighed alike. Digests show that the
files are those that were written; the probe shows that the model built from them is the same one.
Letters: B rows, T tokens of a row.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.manifest import Manifest
from megatron_mode.checkpoint.source_files import check_file, sealed_files
from megatron_mode.engine.step import Engine
from megatron_mode.errors import DamagedError
from megatron_mode.mix.loader import MicroBatch, micro_batch
from megatron_mode.mix.order import Order
from megatron_mode.mix.rows import RowReader
from megatron_mode.tokens.source.shards import Source

PROBE_ROWS = 2
PROBE_TOKENS = 64
# Another layout sums in another order. bf16 keeps 8 bits, of which a loss loses one or two.
RELATIVE_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


class Probe:
    """Hold the fixed batch of a run."""

    def __init__(self, order: Order, reader: RowReader, sources: Sequence[Source]) -> None:
        """Take the run's first rows; `sources` are checked where their losses differ."""
        rows = order.rows(0, min(PROBE_ROWS, order.total_rows))
        self._sources, self._rows = rows.source.tolist(), rows.source_row.tolist()
        self._reader = reader
        names = {reader.sources[index].name for index in self._sources}
        self._files = sealed_files([s for s in sources if s.name in names], set(), reader.seq_len)

    def measure(self, engine: Engine) -> dict[str, Any]:
        """Return the mean LM and mode loss of the batch, in nats; all ranks call it.

        `conditions` name what the last bits of both depend on beside the weights.
        """
        with engine.other_row_length():
            outputs = engine.forward_rows(range(len(self._rows)), 1, self._read)
        sums = torch.zeros(4, dtype=torch.float64)
        for output in outputs:
            for offset, loss_BT, weight_BT in (
                (0, output.loss.nll_BT, output.batch.lm_weight_BT),
                (2, output.loss.bce_BT, output.batch.mode_weight_BT),
            ):
                wide_BT = weight_BT.to(torch.float64)
                sums[offset] += (loss_BT.to(torch.float64) * wide_BT).sum().cpu()
                sums[offset + 1] += wide_BT.sum().cpu()
        lm_sum, lm_weight, mode_sum, mode_weight = engine.sum_over_ranks(sums).tolist()
        return {
            "lm_loss": lm_sum / lm_weight,
            "mode_loss": mode_sum / mode_weight,
            "conditions": conditions(engine),
        }

    def check(self, engine: Engine, manifest: Manifest, folder: Path) -> None:
        """Measure again and compare with what the checkpoint's run measured; all ranks call it.

        Raises DataError where prepared data changed, DamagedError where the losses differ and it
        did not.
        """
        found = self.measure(engine)
        # Ranks on other machines than the one that wrote the manifest have other conditions.
        differs = engine.largest_over_ranks(found["conditions"] != manifest.probe["conditions"])
        try:
            check_probe(manifest.probe, found, manifest.precision, str(folder), exact=not differs)
        except DamagedError:
            from_rank_0(lambda: [check_file(*item) for item in self._files.items()])
            raise

    def _read(self, some: Sequence[int]) -> MicroBatch:
        sources, rows = [self._sources[i] for i in some], [self._rows[i] for i in some]
        full = micro_batch(self._reader, sources, rows)
        short = MicroBatch(*(t[:, :PROBE_TOKENS].contiguous() if t.dim() == 2 else t for t in full))
        ones_BT = torch.ones_like(short.lm_weight_BT)
        return short._replace(lm_weight_BT=ones_BT, mode_weight_BT=ones_BT.clone())


def conditions(engine: Engine) -> dict[str, Any]:
    """Name what decides the rounding of a forward pass: layout, program, device, threads."""
    cuda = engine.device.type == "cuda"
    # The instruction set chooses the library's kernels.
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "layout": engine.layout._asdict(),
        "schedule": engine.config.parallel.schedule,
        "sequence_parallel": engine.config.parallel.sequence_parallel,
        "loss": engine.step_loss.mode_loss.implementation,
        "device": torch.cuda.get_device_name(engine.device) if cuda else processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def check_probe(
    saved: dict[str, Any], found: dict[str, Any], precision: str, where: str, *, exact: bool
) -> None:
    """Compare a probe with the saved one, to the last bit where `exact` says so.

    Raises DamagedError naming both losses where they do not agree.
    """
    tolerance = 0.0 if exact else RELATIVE_TOLERANCE[precision]
    for key in ("lm_loss", "mode_loss"):
        expected, value = float(saved[key]), float(found[key])
        # `not <=` also refuses NaN, unless the model was already broken when it was saved.
        agrees = abs(value - expected) <= tolerance * abs(expected)
        if not agrees and not (exact and value != value and expected != expected):
            bound = "to the last bit" if exact else f"to {tolerance:g} of it"
            raise DamagedError(
                f"{where} is loaded, but its probe has {key} {value!r} where {expected!r} was "
                f"saved, and they must agree {bound}. Checkpoint and data are as "
                "written, so memory, device or program differ (another machine may agree)"
            )
