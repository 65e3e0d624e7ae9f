"""Choose who computes what optional packages compute too, and say at start-up what was found."""

from __future__ import annotations

import importlib
from typing import NamedTuple, assert_never

from megatron_mode.config import Config
from megatron_mode.errors import ConfigError
from megatron_mode.model.attention_cores import CoreName

FOUND = "found"
SMALLEST_FLEX_HEAD = 16
FLASH_HEAD_MULTIPLE, LARGEST_FLASH_HEAD = 8, 256


class Accelerator(NamedTuple):
    """Describe an optional package, and the config key and value that take it."""

    name: str
    module: str
    key: str
    value: str


class Implementations(NamedTuple):
    """Name who computes each part."""

    attention: CoreName
    norm: str
    adamw: str
    loss: str = "chunked"


# The extension `amp_C` distinguishes NVIDIA apex from the unrelated PyPI package of that name.
ACCELERATORS = (
    Accelerator("apex", "amp_C", "adamw", "apex"),
    Accelerator("TransformerEngine", "transformer_engine.pytorch", "norm", "transformer_engine"),
    Accelerator("flash-attention", "flash_attn", "attention", "flash"),
    Accelerator("triton", "triton", "loss", "triton"),
)
PARTS = {"adamw": "AdamW", "norm": "RMSNorm", "attention": "attention", "loss": "loss"}


def probe(module: str) -> str:
    """Return "found", or why a package is not usable with the true import error."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name == module.partition(".")[0]
        return "not installed" if missing else f"broken ({error})"
    except Exception as error:
        return f"broken ({type(error).__name__}: {error})"
    return FOUND


def choose_implementations(config: Config, device_type: str, *, bf16: bool) -> Implementations:
    """Return who computes each part of a run: the one place of choice (the loss has its own).

    `auto` looks at the device only. Raises ConfigError for a choice that cannot run here, with the
    true import error where a package is missing or broken.
    """
    asked, model = config.accelerators, config.model
    for package in ACCELERATORS:
        if getattr(asked, package.key, None) == package.value:
            state = probe(package.module)
            if state != FOUND:
                _refuse(package.key, package.value, f"needs {package.name}, here {state}")
            if device_type != "cuda":
                reason = f"runs on a GPU, and this run is on {device_type}"
                _refuse(package.key, package.value, reason)
    head_size = model.hidden_size // model.attention_heads
    flex_runs = device_type == "cuda" and head_size >= SMALLEST_FLEX_HEAD
    attention: CoreName
    match asked.attention:
        case "auto":
            attention = "flex" if flex_runs else "dense"
        case "dense":
            attention = "dense"
        case "flex":
            attention = "flex"
            if not flex_runs:
                reason = f"runs on a GPU with heads of at least {SMALLEST_FLEX_HEAD}"
                _refuse("attention", "flex", reason)
        case "flash":
            attention = "flash"
            divisible = head_size % FLASH_HEAD_MULTIPLE == 0 and head_size <= LARGEST_FLASH_HEAD
            if not (bf16 and divisible):
                _refuse("attention", "flash", "runs in bf16 with heads of 8, 16, 24 ... 256")
        case _:
            assert_never(asked.attention)
    norm, adamw = ("torch" if who == "auto" else who for who in (asked.norm, asked.adamw))
    return Implementations(attention, norm, adamw)


def _refuse(key: str, value: str, reason: str) -> None:
    raise ConfigError(
        f"accelerators.{key} is {value!r}, which {reason}: set accelerators.{key}=auto"
    )


def accelerator_table(chosen: Implementations) -> str:
    """Return the start-up table: each package, its state, and who computes its part."""
    lines = [f"{'accelerator':<19} {'state':<16} used"]
    for name, module, key, value in ACCELERATORS:
        taken, state = getattr(chosen, key), probe(module)
        if state == FOUND and taken != value:
            state = "found, not used"
        lines.append(f"{name:<19} {state:<16} {taken} {PARTS[key]}")
    return "\n".join(lines)
