"""Draw initial weights from one table, the same whatever the layout.

Every parameter is drawn from its own generator, seeded by (seed, global name), at its full shape,
and then cut: no layout, however many stages or parts, changes a starting weight.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron_mode.config.fields import ModelConfig
from megatron_mode.model.sharding import full_shape, parameter_cuts, take_part

# First match wins. Residual outputs shrink with depth (GPT-2, section 2.3): each of the 2 * layers
# additions to the residual stream then adds variance init_std^2 / (2 * layers).
TABLE: tuple[tuple[str, str], ...] = (
    (r"norm\.weight$", "ones"),
    (r"\.mode_bias$", "zeros"),
    (r"\.(linear_proj|linear_fc2)\.weight$", "residual"),
    (r"\.(word|linear|linear_qkv|linear_fc1)\.weight$", "normal"),
    (r"\.mode_weight$", "normal"),
)


def rule_of(name: str) -> str:
    """Return the table's rule for a global parameter name; KeyError when no row matches."""
    for pattern, rule in TABLE:
        if re.search(pattern, name):
            return rule
    raise KeyError(f"no row of the initialisation table matches {name}")


def draw(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """Return the full initial tensor of one parameter in fp32, on the CPU."""
    rule = rule_of(name)
    if rule == "ones":
        return torch.ones(shape)
    if rule == "zeros":
        return torch.zeros(shape)
    std = model.init_std / (math.sqrt(2 * model.layers) if rule == "residual" else 1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator).mul_(std)


def initialise(
    links: Iterable[tuple[str, nn.Module]],
    model: ModelConfig,
    seed: int,
    *,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Fill the parameters of (global name, module) links with their share of the drawn weights."""
    with torch.no_grad():
        for link_name, module in links:
            cuts = parameter_cuts(module)
            for name, parameter in module.named_parameters():
                cut = cuts.get(name)
                full = draw(f"{link_name}.{name}", full_shape(parameter, cut, parts), model, seed)
                parameter.copy_(full if cut is None else take_part(full, cut, part, parts))
