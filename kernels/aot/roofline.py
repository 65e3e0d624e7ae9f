"""Estimate the least time of one step of the LM + mode loss from its FLOPs and its bytes.

An estimate, not a measurement: every product runs at the machine's matrix peak, every byte at its
memory peak, caches hold what the order of the programs lets them hold.

Letters: N tokens, D hidden size, V columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mode.kernels.aot.resources import aligned

if TYPE_CHECKING:
    from megatron_mode.kernels.mode_loss.tiling import MatmulTile

FLOOR_PRODUCTS = 3
"""Logits, dH and dW: what any implementation must multiply."""


@dataclass(frozen=True)
class Machine:
    """Hold the peaks of a device."""

    name: str
    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Step:
    """Hold the sizes of one step, forward and backward."""

    tokens: int
    hidden_size: int
    columns: int
    slices: int
    """Pieces of the vocabulary whose dlogits exist at a time."""
    element_bytes: int = 2

    @property
    def product_flops(self) -> int:
        """Return the FLOPs of one product of N x D x V."""
        return 2 * self.tokens * self.hidden_size * self.columns


@dataclass(frozen=True)
class Stage:
    """Hold what one part of the step computes and moves."""

    name: str
    flops: int
    moved_bytes: int

    def compute_seconds(self, machine: Machine) -> float:
        """Return the time of the products alone."""
        return self.flops / machine.flops_per_second

    def memory_seconds(self, machine: Machine) -> float:
        """Return the time of the bytes alone."""
        return self.moved_bytes / machine.bytes_per_second

    def seconds(self, machine: Machine) -> float:
        """Return the longer of the two, as if they overlapped fully."""
        return max(self.compute_seconds(machine), self.memory_seconds(machine))


H100 = Machine("H100", flops_per_second=790e12, bytes_per_second=3e12)
# Of the size of Llama 3 8B; eight slices keep dlogits in 256 MiB.
EXAMPLE = Step(tokens=8192, hidden_size=4096, columns=128256, slices=8)


def stages(step: Step, tile: MatmulTile) -> list[Stage]:
    """Return the parts of the step in order, logits computed again in the backward pass.

    The LM weight is read once per GROUP_N blocks of tokens; the hidden states stay in the L2
    cache. Statistics of tokens are fp32. The products add to dH in fp32, once a slice, and write
    each row of dW once, with no pass over them beside.
    """
    hidden = step.tokens * step.hidden_size
    hidden_bytes, sum_bytes = hidden * step.element_bytes, hidden * 4
    weight_bytes = step.columns * step.hidden_size * step.element_bytes
    logits_bytes = step.tokens * step.columns * step.element_bytes
    groups = -(-step.tokens // (tile.GROUP_N * tile.BLOCK_N))
    partial_bytes = 12 * step.tokens * -(-step.columns // tile.BLOCK_V)
    operand_bytes = hidden_bytes + weight_bytes * groups
    product = step.product_flops
    # label and weight in; logit, cross-entropy, gradient and candidate out
    prologue_bytes = hidden_bytes + step.tokens * (2 * 4 + 3 * 4 + 1)
    rounds = step.slices
    return [
        Stage("mode prologue", 0, prologue_bytes),
        Stage("logits, forward", product, operand_bytes + partial_bytes),
        Stage("merge of tiles", 0, partial_bytes + 12 * step.tokens),
        Stage("logits again, write dlogits", product, operand_bytes + logits_bytes),
        Stage("dH = dlogits W", product, logits_bytes + weight_bytes + 2 * sum_bytes * rounds),
        Stage("dW = dlogits^T H", product, logits_bytes + weight_bytes + hidden_bytes * rounds),
        Stage("mode term of dH, dw_mode", 0, sum_bytes + 2 * hidden_bytes),
    ]


def floor_seconds(step: Step, machine: Machine) -> float:
    """Return the time of the three products that nothing can avoid."""
    return FLOOR_PRODUCTS * step.product_flops / machine.flops_per_second


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
    return f"{header}\n{aligned(rows, left_columns=(0,))}"
