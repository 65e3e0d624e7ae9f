"""Say whether the Triton kernels can run, without importing Triton where it is absent."""

from __future__ import annotations

import importlib.util


def why_no_triton(device_type: str) -> str | None:
    """Return why the kernels cannot run on a device, or None where they can.

    On a CPU they run in Triton's interpreter, which is chosen before Triton is imported.
    """
    if importlib.util.find_spec("triton") is None:
        return "is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    return f"has no compiler for {device_type} (its interpreter runs under TRITON_INTERPRET=1)"
