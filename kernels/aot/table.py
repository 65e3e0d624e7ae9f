"""Write what was found as aligned text, and name the kernels that break a promise."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mode.kernels.aot.resources import Resources
from megatron_mode.kernels.aot.roofline import Machine, Stage, Step, floor_seconds

HEADINGS = (
    "kernel", "arch", "divisible", "warps", "registers", "spill B", "shared B", "tensor core",
    "cp.async", "atomics", "occupancy",
)  # fmt: skip
HELD_ARCHES = ("sm_80", "sm_90")
TENSOR_CORE_DTYPES = ("bf16", "fp16")


def resource_table(found: Sequence[Resources]) -> str:
    """Write one line per kernel, architecture and variant."""
    return _aligned([HEADINGS, *map(_cells, found)], left_columns=(0, 1, 2, 7))


def _cells(row: Resources) -> tuple[str, ...]:
    return (
        row.kernel,
        row.arch,
        "yes" if row.divisible else "no",
        f"{row.num_warps}",
        f"{row.registers}",
        f"{row.spill_bytes}",
        f"{row.shared_bytes}",
        row.tensor_core or "-",
        "yes" if row.cp_async else "-",
        f"{row.atomics}",
        f"{row.occupancy:.1%}",
    )


def roofline_text(parts: Sequence[Stage], step: Step, machine: Machine) -> str:
    """Write the time of each part, their sum and the floor."""
    header = (
        f"An estimate from peaks, not a measurement: {machine.name} at "
        f"{machine.flops_per_second / 1e12:.0f} TFLOP/s and "
        f"{machine.bytes_per_second / 1e12:g} TB/s; N={step.tokens} D={step.hidden_size} "
        f"V={step.columns}, dlogits in {step.slices} slices."
    )
    rows = [("part", "TFLOP", "GB", "ms")]
    rows += [
        (
            part.name,
            f"{part.flops / 1e12:.2f}",
            f"{part.moved_bytes / 1e9:.2f}",
            f"{1e3 * part.seconds(machine):.2f}",
        )
        for part in parts
    ]
    overlapped = sum(part.seconds(machine) for part in parts)
    serial = sum(part.compute_seconds(machine) + part.memory_seconds(machine) for part in parts)
    rows += [
        ("sum, memory hidden behind products", "", "", f"{1e3 * overlapped:.2f}"),
        ("sum, nothing hidden", "", "", f"{1e3 * serial:.2f}"),
        ("floor, three products", "", "", f"{1e3 * floor_seconds(step, machine):.2f}"),
    ]
    return f"{header}\n{_aligned(rows, left_columns=(0,))}"


def offences(found: Sequence[Resources]) -> list[str]:
    """Name what the divisible variants may not do: spill, use atomics, miss the tensor cores."""
    named = []
    for row in found:
        if not row.divisible or row.arch not in HELD_ARCHES:
            continue
        name = f"{row.kernel} on {row.arch}"
        if row.spill_bytes:
            named.append(f"{name} spills {row.spill_bytes} bytes")
        if row.atomics:
            named.append(f"{name} has {row.atomics} atomic instructions")
        if row.multiplies and row.dtype in TENSOR_CORE_DTYPES and row.tensor_core is None:
            named.append(f"{name} uses no tensor core")
        if not row.occupancy:
            named.append(f"{name} fits no multiprocessor ({row.shared_bytes} bytes shared)")
    return named


def _aligned(rows: Sequence[tuple[str, ...]], *, left_columns: tuple[int, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
