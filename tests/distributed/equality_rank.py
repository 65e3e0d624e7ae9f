"""What each rank does in the equality tests: build the engine, take three steps, hand gradients in.

The data is made here from a seed, as plain rows, so that engine and oracle get the same numbers.
"""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

import numpy as np
import torch
from stand_ins import FLASH_ATTN, let_flex_train_on_a_cpu

VOCAB_TOKENS = 117  # of 128 padded columns
STEPS = 3


def make_config(tensor, pipeline, accumulation, tied, data, **changes):
    from megatron_mode.config import Config

    fields = {
        "run": {"dir": "unused", "steps": STEPS, "seed": 7, "precision": "fp32"},
        "model": {
            "name": "test",
            "layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "attention_heads": 4,
            "kv_heads": 2,
            "seq_len": 24,
            "vocab_size": 128,
            "tied_embeddings": tied,
            # Large enough for logits and attention to matter in the first steps.
            "init_std": 0.2,
        },
        "mix": {"mode2_fraction": {"start": "0"}},
        "loss": {"mode_weight": 0.3},
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "batch": {"global_rows": 2 * accumulation * data, "micro_rows": 2},
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant", "clip_grad_norm": 0.5},
    }
    for section, keys in changes.items():
        fields[section] = {**fields.get(section, {}), **keys}
    return Config.model_validate(fields)


def make_batches(rows: int, seq_len: int, seed: int = 3):
    """Return STEPS batches of rows (input, target, lm weight, label, mode weight, position).

    Masks are ragged: some rows have no LM weight at all, one has no mode weight.
    """
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(STEPS):
        batch = []
        for row in range(rows):
            ids = rng.integers(0, VOCAB_TOKENS, seq_len + 1)
            starts = rng.random(seq_len) < 0.15
            position, count = np.zeros(seq_len, np.int64), 0
            for t in range(seq_len):
                count = 0 if starts[t] or t == 0 else count + 1
                position[t] = count
            lm_weight = (rng.random(seq_len) < rng.random()).astype(np.float64)
            if row % 4 == 1:
                lm_weight[:] = 0
            mode_weight = (rng.random(seq_len) < 0.9).astype(np.float64) * (row != 2)
            label = (rng.random(seq_len) < 0.5).astype(np.float64)
            batch.append(
                tuple(
                    torch.from_numpy(np.ascontiguousarray(a))
                    for a in (ids[:-1], ids[1:], lm_weight, label, mode_weight, position)
                )
            )
        batches.append(batch)
    return batches


def micro_batches_of(batch, layout, at, micro_rows):
    """Deal a batch's rows out: micro-batch by micro-batch, in each data rank by data rank."""
    from megatron_mode.mix.loader import MicroBatch

    stacked = [torch.stack(column) for column in zip(*batch, strict=True)]
    stride = layout.data * micro_rows
    found = []
    for begin in range(0, len(batch), stride):
        mine = slice(begin + at.data * micro_rows, begin + (at.data + 1) * micro_rows)
        ids, target, lm_weight, label, mode_weight, position = (c[mine] for c in stacked)
        found.append(
            MicroBatch(
                input_BT=ids,
                target_BT=target,
                lm_weight_BT=lm_weight.float(),
                mode_label_BT=label.float(),
                mode_weight_BT=mode_weight.float(),
                position_BT=position,
                flags_BT=torch.zeros_like(ids, dtype=torch.uint8),
                source_B=torch.zeros(len(ids), dtype=torch.int64),
            )
        )
    return found


def capture_gradients(engine, store):
    """Note every parameter's full gradient just before the update."""
    from deepspeed.utils import safe_get_full_grad

    update = engine.deepspeed._exec_optimizer_step

    def captured(*args, **kwargs):
        grads = {}
        for link, module in engine.deepspeed.module.named_links():
            for name, parameter in module.named_parameters():
                grads[f"{link}.{name}"] = safe_get_full_grad(parameter).double().clone()
        store.append(grads)
        return update(*args, **kwargs)

    # The engine's schedule looks instructions up in a map of functions on the class.
    engine.deepspeed._INSTRUCTION_MAP = {
        kind: (lambda self, **kw: captured(**kw))
        if function.__name__ == "_exec_optimizer_step"
        else function
        for kind, function in engine.deepspeed._INSTRUCTION_MAP.items()
    }


def note_lengths(engine, lengths):
    """Note how many tokens of a row the norms see."""
    from megatron_mode.model.elementwise import RMSNorm

    for module in engine.deepspeed.module.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(lambda _, inputs, __: lengths.add(len(inputs[0])))


@contextlib.contextmanager
def attention_of_a_gpu(config):
    """Let an attention that is refused on a CPU train there, by what stands in for it."""
    from megatron_mode.engine import build
    from megatron_mode.engine.accelerators import Implementations

    attention = config.accelerators.attention
    if attention == "auto":
        yield
        return
    sys.modules["flash_attn"] = FLASH_ATTN
    let_flex_train_on_a_cpu(setattr)
    chosen = Implementations(attention, "torch", "torch")
    with mock.patch.object(build, "choose_implementations", return_value=chosen):
        yield


def three_steps(process, layout_sizes, variants):
    """Run each variant of a layout.

    Returns [(losses, norms, gradients, cuts, coordinates, row lengths that norms saw)].
    """
    from megatron_mode.engine.build import build_engine, build_mesh, join_group
    from megatron_mode.model.sharding import parameter_cuts

    tensor, pipeline, data = layout_sizes
    join_group(process, 1)
    layout, results = None, []
    for accumulation, tied, changes in variants:
        config = make_config(tensor, pipeline, accumulation, tied, data, **changes)
        if layout is None:
            layout = build_mesh(config, process.world_size)
        with attention_of_a_gpu(config):
            engine = build_engine(config, layout, VOCAB_TOKENS)
        store, losses, norms, lengths = [], [], [], set()
        capture_gradients(engine, store)
        note_lengths(engine, lengths)
        batches = make_batches(config.batch.global_rows, config.model.seq_len)
        for step, batch in enumerate(batches):
            mine = micro_batches_of(batch, layout, engine.at, config.batch.micro_rows)
            result = engine.train_step(step, mine if engine.reads_data else [])
            losses.append(result.loss)
            norms.append(result.grad_norm)
        cuts = {
            f"{link}.{name}": cut
            for link, module in engine.deepspeed.module.named_links()
            for name, cut in parameter_cuts(module).items()
        }
        results.append((losses, norms, store, cuts, engine.at, lengths))
    return results
