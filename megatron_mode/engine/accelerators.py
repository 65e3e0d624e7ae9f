"""Say which optional accelerators were found, and what is used instead of the others."""

from __future__ import annotations

import importlib
from typing import NamedTuple


class Accelerator(NamedTuple):
    """Describe an optional package and what stands in for it."""

    name: str
    module: str
    instead: str


ACCELERATORS = (
    Accelerator("apex", "amp_C", "torch's fused AdamW and RMSNorm"),
    Accelerator("TransformerEngine", "transformer_engine", "megatron-core's local layers"),
    Accelerator("flash-attention", "flash_attn", "torch's scaled_dot_product_attention"),
    Accelerator("triton", "triton", "the chunked loss in torch"),
)


def probe(accelerator: Accelerator) -> str:
    """Return "found", or why it is not usable with the true import error.

    NVIDIA apex is told from the unrelated PyPI package of that name by its extension `amp_C`.
    """
    try:
        importlib.import_module(accelerator.module)
    except ModuleNotFoundError as error:
        if error.name == accelerator.module:
            return "not installed"
        return f"broken ({error})"
    except Exception as error:
        return f"broken ({type(error).__name__}: {error})"
    return "found, not used"


def accelerator_table(loss_implementation: str = "chunked") -> str:
    """Return the start-up table, one line an accelerator.

    Triton is used where the loss is; apex and the others are only looked for.
    """
    lines = ["accelerator         state            used"]
    for accelerator in ACCELERATORS:
        state, used = probe(accelerator), accelerator.instead
        if accelerator.name == loss_implementation:
            state, used = "found", "the fused loss"
        lines.append(f"{accelerator.name:<19} {state:<16} {used}")
    return "\n".join(lines)
