"""Compare opening and reading a corpus with megatron-core's GPTDataset and BlendedDataset.

Each contender runs in a process of its own. First on a synthetic source of many documents whose
.bin is sparse: time to the first batch, and anonymous memory beyond the memory maps. Then on
prepared sources: rows read in a second by one thread, batches of 8 rows, contenders in turn.

    python tests/bench/data_peers.py --documents 50000000
    python tests/bench/data_peers.py --rows DATA_ROOT SOURCE SOURCE --seq-len 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mode.tokens.source.index import index_chunks

DOCUMENT_TOKENS = 100
BATCH_ROWS = 8
VOCABULARY = 32768
ROUNDS, ROUND_BATCHES = 7, 200


class Tokenizer:
    """Stand for the tokenizer that GPTDataset asks for."""

    vocab_size, eod, pad = VOCABULARY, 3, 0
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 - the peer reads it from the instance


def write_sparse(folder: Path, documents: int) -> None:
    """Write an index of `documents` documents and a .bin without a single block."""
    lengths = np.full(documents, DOCUMENT_TOKENS, np.int32)
    with (folder / "many.idx").open("wb") as stream:
        for chunk in index_chunks(lengths, "uint16"):
            stream.write(chunk)
    with (folder / "many.bin").open("wb") as stream:
        stream.truncate(documents * DOCUMENT_TOKENS * 2)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon")


def ours(root: Path, names: list[str], seq_len: int) -> Any:
    """Return a loader over the sources, its order and rows worked out as in a run."""
    from megatron_mode.config.mix import MixConfig
    from megatron_mode.mix.loader import Loader
    from megatron_mode.mix.order import Order
    from megatron_mode.mix.packing import PackedSource, rows_in_stream
    from megatron_mode.mix.rows import RowReader
    from megatron_mode.tokens.source.shards import Source

    sources = [Source.open(root, name, mode=1) for name in names]
    mix = MixConfig.model_validate(
        {"mode1": {"sources": [{"name": n} for n in names]}, "mode2_fraction": {"start": 0}}
    )
    rows = {s.name: rows_in_stream(s.tokens, seq_len) for s in sources}
    total = sum(rows.values()) // BATCH_ROWS * BATCH_ROWS
    order = Order(mix, seq_len, total, 1, rows)
    reader = RowReader([PackedSource(s, seq_len) for s in sources], seq_len, mix)
    return Loader(
        order,
        reader,
        global_rows=BATCH_ROWS,
        micro_rows=BATCH_ROWS,
        end_step=total // BATCH_ROWS,
    )


def peer(root: Path, names: list[str], seq_len: int, cache: Path) -> Any:
    """Return megatron-core's dataset over the sources, its indices built anew."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefixes = [str(root / name) for name in names]
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_len,
        blend=(prefixes, [1.0] * len(prefixes)) if len(prefixes) > 1 else (prefixes, None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    size = sum((root / f"{name}.bin").stat().st_size // 2 for name in names) // seq_len
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [size, 0, 0], lambda: True, config)
    return builder.build()[0]


def first_batch(kind: str, root: Path) -> dict[str, float]:
    import torch  # both contenders need it: not part of the time

    if kind == "peer":
        import megatron.core.datasets.gpt_dataset  # noqa: F401
    else:
        import megatron_mode.mix.loader
        import megatron_mode.tokens.source.shards  # noqa: F401
    before, begin = anonymous_bytes(), time.perf_counter()
    if kind == "ours":
        with ours(root, ["many"], 4096) as loader:
            next(loader)
            seconds = time.perf_counter() - begin
            memory = anonymous_bytes() - before
    else:
        with tempfile.TemporaryDirectory() as cache:
            dataset = peer(root, ["many"], 4096, Path(cache))
            torch.utils.data.default_collate([dataset[i] for i in range(BATCH_ROWS)])
            seconds = time.perf_counter() - begin
            memory = anonymous_bytes() - before
    return {"first_batch_seconds": round(seconds, 3), "anonymous_mb": round(memory / 1e6, 1)}


def rows_per_second(root: Path, names: list[str], seq_len: int) -> dict[str, object]:
    import torch

    torch.set_num_threads(1)
    # BlendedDataset asks for a process group.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    with ours(root, names, seq_len) as loader, tempfile.TemporaryDirectory() as cache:
        dataset = peer(root, names, seq_len, Path(cache))
        at = 0
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            for _ in range(ROUND_BATCHES):
                next(loader)
            found["ours"].append(ROUND_BATCHES * BATCH_ROWS / (time.perf_counter() - begin))
            begin = time.perf_counter()
            for _ in range(ROUND_BATCHES):
                rows = [dataset[i % len(dataset)] for i in range(at, at + BATCH_ROWS)]
                torch.utils.data.default_collate(rows)
                at += BATCH_ROWS
            found["peer"].append(ROUND_BATCHES * BATCH_ROWS / (time.perf_counter() - begin))
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    ratios = [a / b for a, b in zip(found["ours"], found["peer"], strict=True)]
    return {
        **{f"{kind}_rows_per_second": round(value) for kind, value in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--rows", nargs="+", metavar="DATA_ROOT SOURCE")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--contender", nargs=2)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(first_batch(args.contender[0], Path(args.contender[1]))))
    elif args.rows:
        root, *names = args.rows
        print(json.dumps(rows_per_second(Path(root), names, args.seq_len)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_sparse(Path(folder), args.documents)
            for kind in ("ours", "peer"):
                words = [sys.executable, __file__, "--contender", kind, folder]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                print(kind, done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
