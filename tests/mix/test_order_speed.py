"""Hold the order to its speed and to building nothing."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc

from megatron_mode.config.mix import MixConfig
from megatron_mode.mix.order import Order


def test_ten_million_rows_take_at_most_five_seconds_and_no_index() -> None:
    """Count processor time of one thread, which other programs on the machine hardly change."""
    fraction = {"shape": "cosine", "start": "0.05", "end": "0.5"}
    mode1 = [{"name": f"web{n}", "weight": f"0.{n + 1}7"} for n in range(5)]
    mode2 = [{"name": f"chat{n}", "weight": f"0.{n + 1}3"} for n in range(3)]
    mix = MixConfig.model_validate(
        {"mode1": {"sources": mode1}, "mode2": {"sources": mode2}, "mode2_fraction": fraction}
    )
    sizes = {f"web{n}": 10**8 + n for n in range(5)} | {f"chat{n}": 10**5 + n for n in range(3)}
    order = Order(mix, 4096, 10**9, 7, sizes)
    order.rows(0, 1000)
    begin = time.thread_time()
    for row in range(4 * 10**8, 4 * 10**8 + 10**7, 10**6):
        order.rows(row, row + 10**6)
    assert time.thread_time() - begin <= 5
    tracemalloc.start()
    Order(mix, 4096, 10**9, 7, sizes).rows(5 * 10**8, 5 * 10**8 + 1000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


def test_planning_imports_no_torch() -> None:
    names = ("schedule", "permutation", "apportion", "order", "digest", "rows")
    imports = "".join(f"import megatron_mode.mix.{name}\n" for name in names)
    code = f"import sys\n{imports}assert not {{'torch', 'mpmath'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
