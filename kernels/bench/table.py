"""Write the rows of a case as an aligned table."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mode.kernels.bench.case import Case
from megatron_mode.kernels.bench.compare import Row
from megatron_mode.kernels.bench.interval import Interval

COLUMNS = (
    "implementation", "median s", "ratio", "min s", "calls", "extra MiB", "ratio", "loss error",
    "grad error",
)  # fmt: skip
NOTHING = "-"


def table(case: Case, rows: Sequence[Row]) -> str:
    """Return the table; the ratios of time and memory are to the peer with the least median."""
    peer = min(
        (row for row in rows if not row.implementation.ours),
        key=lambda row: row.median_seconds,
        default=None,
    )
    lines = [COLUMNS, *(_cells(row, peer) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = [_title(case, peer)]
    for first, *numbers in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join(cells))
    text += [
        f"mode head: {_share(row.mode_head_share)} of the time of {row.name} without it"
        for row in rows
        if row.mode_head_share is not None
    ]
    return "\n".join(text)


def _title(case: Case, peer: Row | None) -> str:
    tokens, hidden_size, vocab_size = case.shape
    where = f"{case.threads} threads" if case.device == "cpu" else "cuda"
    title = f"N={tokens} D={hidden_size} V={vocab_size}, {case.dtype}, {where}, forward + backward"
    return title if peer is None else f"{title}; ratios to {peer.name}, the fastest peer"


def _cells(row: Row, peer: Row | None) -> tuple[str, ...]:
    time_ratio = memory_ratio = memory = NOTHING
    if peer is not None:
        time_ratio = f"{row.median_seconds / peer.median_seconds:.2f}"
    if row.extra_bytes is not None:
        memory = f"{row.extra_bytes / 2**20:.1f}"
        if peer is not None and peer.extra_bytes:
            memory_ratio = f"{row.extra_bytes / peer.extra_bytes:.2f}"
    return (
        row.name,
        f"{row.median_seconds:.4g}",
        time_ratio,
        f"{min(row.seconds):.4g}",
        str(len(row.seconds)),
        memory,
        memory_ratio,
        f"{row.loss_error:.1e}",
        f"{row.grad_error:.1e}",
    )


def _share(share: Interval) -> str:
    return f"{share.median:+.2%} (95 % interval {share.low:+.2%} to {share.high:+.2%})"
