"""Time how long a checkpoint holds training up, and how long it takes to resume from one.

Saves of the same state alternate between waiting for the disk and writing in the background; then
a new process resumes from the last one and takes a step. Prints one JSON object. Rows are cut to
256 tokens and steps to one row, which changes nothing that is saved.

    python tests/bench/checkpoint.py --model 125m --data data/tiny --rounds 5
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mode.train import Run

ROOT = Path(__file__).resolve().parents[2]


def build(model: str, data: Path, run_dir: Path) -> Run:
    from megatron_mode.config import load_config
    from megatron_mode.process.launch import identify, prepare_environment
    from megatron_mode.quiet import quiet_libraries

    overrides = [f"model={model}", f"data.root={data}", f"run.dir={run_dir}", "run.steps=1000"]
    overrides += ["model.seq_len=256", "batch.global_rows=1", "batch.micro_rows=1"]
    config = load_config(ROOT / "configs/run/tiny.yaml", overrides)
    process = identify({})
    prepare_environment(process)
    quiet_libraries()
    from megatron_mode.engine.build import build_engine, build_mesh, join_group
    from megatron_mode.mix.corpus import build_order, build_train_reader, open_corpus
    from megatron_mode.train import Run

    corpus = open_corpus(config)
    join_group(process, 0)
    # The model keeps its own vocabulary, of which the data uses the beginning.
    engine = build_engine(config, build_mesh(config, 1), corpus.vocabulary.vocab_size)
    order = build_order(config, corpus)
    reader = build_train_reader(config, corpus, order)
    return Run(config, run_dir, corpus, order, reader, engine)


def checkpoints_of(run: Run):
    from megatron_mode.checkpoint.save import Checkpoints

    return Checkpoints(run.engine, run.folder, run.corpus, run.order, run.reader)


def take_step(run: Run, checkpoints, first_step: int) -> None:
    from megatron_mode.train import steps

    batches = steps(run, first_step)
    batch = next(batches)
    run.engine.train_step(batch.step, batch.micro_batches)
    checkpoints.record.update(batch.step, batch.rows)
    batches.close()


def measure_saves(run: Run, rounds: int) -> dict[str, object]:
    """Save in both ways in turn; the first round warms buffers and the disk and is left out."""
    checkpoints = checkpoints_of(run)
    take_step(run, checkpoints, 0)
    stalls: dict[bool, list[float]] = {True: [], False: []}
    probes = []
    for number in range(rounds + 1):
        for background in (False, True):
            settings = run.config.checkpoint.model_copy(update={"asynchronous": background})
            run.engine.config = run.config.model_copy(update={"checkpoint": settings})
            begin = time.perf_counter()
            checkpoints.probe.measure(run.engine)
            probe_seconds = time.perf_counter() - begin
            checkpoints.save(1)
            stall_seconds = checkpoints.take_stall_seconds()
            checkpoints.wait()
            if number:
                stalls[background].append(stall_seconds)
                probes.append(probe_seconds)
    folder = run.folder / "checkpoints" / "step-00000001"
    size = sum(path.stat().st_size for path in folder.iterdir())
    ratios = [a / b for a, b in zip(stalls[True], stalls[False], strict=True)]
    return {
        "checkpoint_bytes": size,
        "synchronous_stall_seconds": round(statistics.median(stalls[False]), 3),
        "asynchronous_stall_seconds": round(statistics.median(stalls[True]), 3),
        "asynchronous_over_synchronous": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "of_which_probe_seconds": round(statistics.median(probes), 3),
    }


def measure_resume(run: Run) -> dict[str, float]:
    """Go on from the checkpoint and take one step; times of each part in seconds."""
    from megatron_mode.checkpoint.manifest import check_shared, read_manifest
    from megatron_mode.checkpoint.resume import resume

    checkpoints = checkpoints_of(run)
    folder = run.folder / "checkpoints" / "step-00000001"
    begin = time.perf_counter()
    check_shared(folder, read_manifest(folder))
    digests_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    first_step, _ = resume(checkpoints)
    resume_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    take_step(run, checkpoints, first_step)
    return {
        "digest_check_seconds": round(digests_seconds, 3),
        "resume_seconds": round(resume_seconds, 3),
        "step_seconds": round(time.perf_counter() - begin, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="125m", help="preset of configs/model (default: 125m)")
    parser.add_argument("--data", type=Path, default=ROOT / "data/tiny", help="prepared data")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of saves (default: 5)")
    parser.add_argument("--run", type=Path, help="folder for the checkpoint (default: temporary)")
    parser.add_argument("--part", choices=["save", "resume"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run = build(options.model, options.data.resolve(), options.run)
        found = measure_saves(run, options.rounds) if options.part == "save" else {}
        print(json.dumps(found or measure_resume(run)))
        return 0
    folder = options.run or Path(tempfile.mkdtemp(prefix="checkpoint-bench-"))
    result: dict[str, object] = {"model": options.model}
    for part in ("save", "resume"):
        words = [sys.executable, __file__, "--part", part, "--run", str(folder)]
        words += ["--model", options.model, "--data", str(options.data.resolve())]
        begin = time.perf_counter()
        told = subprocess.run(
            [*words, "--rounds", str(options.rounds)], check=True, capture_output=True, text=True
        )
        result |= json.loads(told.stdout.splitlines()[-1])
        if part == "resume":
            result["start_to_first_step_seconds"] = round(time.perf_counter() - begin, 2)
    shutil.rmtree(folder / "checkpoints")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
