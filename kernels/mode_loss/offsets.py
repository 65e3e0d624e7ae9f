"""Address tiles beyond 2^31 elements without paying for 64-bit offsets in every element.

The start of a tile is one 64-bit scalar; offsets inside the tile stay 32-bit. A tensor of 64-bit
offsets took 254 registers a thread where this takes 128 (128 x 128 tile, sm_90).

The kernels do not specialise on the number of tokens, columns and tiles: it changes from one
micro-batch to the next, and each new class of value would compile in the middle of a run.
"""

import triton
import triton.language as tl


@triton.jit
def row_start(tile, TILE_ROWS: tl.constexpr, stride):
    """Return the 64-bit offset of the first element of row `tile * TILE_ROWS`."""
    # Adding to a 64-bit zero widens plain numbers too, which have no `.to`.
    return (tl.zeros((), tl.int64) + tile) * TILE_ROWS * stride
