"""Know what hardware could do at best, to say what share of it a run used (no torch)."""

from __future__ import annotations

# Dense peak in FLOP/s for bf16 with fp32 accumulation, from NVIDIA's data sheets.
_PEAK_BF16 = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Return a GPU's dense bf16 peak in FLOP/s; None for other devices and for fp32.

    A CPU's peak depends on clocks and on the machine, so no share of it is reported.
    """
    if precision == "fp32":
        return None
    for name, peak in _PEAK_BF16.items():
        if name in device_name:
            return peak
    return None
