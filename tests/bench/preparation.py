"""Compare `megatron-mode prepare` with SentencePiece's bare batch call over the same texts.

The bare side holds all texts in memory and calls `encode(texts, num_threads=n)` once, nothing else.
Besides the time on the clock, which other jobs on the machine lengthen, the CPU seconds of both are
told. Ours is the whole command with n workers: start of the processes, reading, parsing, rendering,
tokenising, dropping copies, shuffling, hashing and writing. Both alternate; files are cached.

    python tests/bench/preparation.py --input a.jsonl.gz b.jsonl.gz --tokenizer M [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Run the comparison and print tokens/s of both and the ratio of each pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = compare(args.input, args.tokenizer, args.rounds, args.threads)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"ours {result['ours_tokens_per_second']:,.0f} tokens/s, SentencePiece alone "
        f"{result['bare_tokens_per_second']:,.0f} tokens/s; ratio of medians "
        f"{result['ratio']:.3f}, of pairs {result['pair_ratios']}; ratio of CPU seconds "
        f"{result['cpu_ratio']:.3f}"
    )


def compare(inputs: list[Path], tokenizer: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Time both sides in turn after one untimed bare call."""
    import sentencepiece

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    texts = rendered_texts(inputs)
    bare_tokens = sum(map(len, processor.encode(texts, num_threads=threads)))
    ours_tokens = 0
    ours_seconds: list[float] = []
    bare_seconds: list[float] = []
    ours_cpu_seconds: list[float] = []
    bare_cpu_seconds: list[float] = []
    for _ in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        processor.encode(texts, num_threads=threads)
        bare_seconds.append(time.perf_counter() - began)
        bare_cpu_seconds.append(time.process_time() - began_cpu)
        began_cpu = children_cpu_seconds()
        ours_tokens, seconds = timed_preparation(inputs, tokenizer, threads)
        ours_seconds.append(seconds)
        ours_cpu_seconds.append(children_cpu_seconds() - began_cpu)
    ours = [ours_tokens / seconds for seconds in ours_seconds]
    bare = [bare_tokens / seconds for seconds in bare_seconds]
    return {
        "rounds": rounds,
        "threads": threads,
        "text_tokens": bare_tokens,
        "ours_tokens": ours_tokens,
        "ours_seconds": [round(seconds, 2) for seconds in ours_seconds],
        "bare_seconds": [round(seconds, 2) for seconds in bare_seconds],
        # Over the tokens of the text on both sides: ours also writes control pieces, uncounted.
        "ours_tokens_per_second": bare_tokens / statistics.median(ours_seconds),
        "bare_tokens_per_second": statistics.median(bare),
        "ratio": statistics.median(bare_seconds) / statistics.median(ours_seconds),
        "pair_ratios": [
            round(theirs / mine, 3) for theirs, mine in zip(bare_seconds, ours_seconds, strict=True)
        ],
        "ours_cpu_seconds": [round(seconds, 2) for seconds in ours_cpu_seconds],
        "bare_cpu_seconds": [round(seconds, 2) for seconds in bare_cpu_seconds],
        "cpu_ratio": statistics.median(bare_cpu_seconds) / statistics.median(ours_cpu_seconds),
        "ours_with_control_pieces_per_second": statistics.median(ours),
    }


def children_cpu_seconds() -> float:
    """Return the CPU time of all processes that this one started and that have ended.

    The workers' parent is a process that ends after the command: as a subreaper we inherit it.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rendered_texts(inputs: list[Path]) -> list[str]:
    """Return the texts that the preparation tokenises, with its default shares."""
    from megatron_mode.tokens.prepare.encode import line_batches, parse_batch
    from megatron_mode.tokens.prepare.request import RENDERINGS, Split
    from megatron_mode.tokens.template import parts

    split = Split(seed=1234, plain_share=0.25, valid_share=0.0, valid_sources=frozenset())
    texts: list[str] = []
    for batch in line_batches(list(enumerate(inputs)), lambda read_bytes: None):
        for number, document in parse_batch(batch)[0]:
            for code in split.outputs(document, number):
                found = parts(document, RENDERINGS[code & 1])
                texts += [part.text for part in found if not part.is_control]
    return texts


def timed_preparation(inputs: list[Path], tokenizer: Path, workers: int) -> tuple[int, float]:
    """Run the command once; return its tokens and the seconds that the whole process took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatron_mode", "prepare", "--json"]
        command += ["--out", f"{folder}/data", "--tokenizer", str(tokenizer)]
        # Copies are kept, so that both sides have the same texts to show for.
        command += ["--workers", str(workers), "--duplicates", "keep"]
        command += ["--input", *map(str, inputs)]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
    sources = json.loads(done.stdout)["sources"]
    return sum(source["tokens"] for source in sources), seconds


if __name__ == "__main__":
    main()
