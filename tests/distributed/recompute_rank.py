"""What the one rank does in the test of recomputation: count what a forward pass keeps alive."""

from __future__ import annotations

import equality_rank
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

SEQ_LEN, ROWS = 192, 2


class Storages(TorchDispatchMode):
    """Remember every storage that comes into being, without keeping it."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive_bytes(self):
        return sum(size for weak, size in self.seen.values() if not weak.expired())


def kept_bytes(process, choices):
    """Return {choice: (bytes kept, bytes kept with scores written out)}."""
    from megatron_mode.engine.build import build_engine, build_mesh, join_group

    join_group(process, 1)
    layout, found = None, {}
    for choice in choices:
        config = equality_rank.make_config(
            1, 1, 1, True, 1,
            model={"seq_len": SEQ_LEN, "layers": 4},
            parallel={"activation_checkpointing": choice},
        )  # fmt: skip
        layout = layout or build_mesh(config, process.world_size)
        stage = build_engine(config, layout, equality_rank.VOCAB_TOKENS).deepspeed.module
        rows = equality_rank.make_batches(ROWS, SEQ_LEN)[0]
        input_BT, position_BT = (torch.stack([row[n] for row in rows]) for n in (0, 5))
        counts = []
        for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):
            with sdpa_kernel(backends), Storages() as storages:
                heads = stage((input_BT, position_BT))
            counts.append(storages.alive_bytes())
            del heads
        found[choice] = tuple(counts)
    return found
