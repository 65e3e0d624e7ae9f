"""Configure a run: frozen fields, YAML presets, dotted overrides, all validation; no torch."""

from megatron_mode.config.fields import Config
from megatron_mode.config.load import build_config, dump_config, load_config
from megatron_mode.config.rules import check_world_size

__all__ = [
    "Config",
    "build_config",
    "check_world_size",
    "dump_config",
    "load_config",
]
