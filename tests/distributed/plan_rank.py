"""What each rank does in the test of plans: take a step, save, and weigh what it holds."""

from __future__ import annotations

from pathlib import Path


def bytes_of(tensors):
    """Count what tensors take, memory that several of them share once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def master_weights(optimizer):
    """Return the fp32 copies that DeepSpeed's optimizers keep; none without ZeRO."""
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def train_and_save(process, layout_sizes, variants, folder):
    """Return for each (tied, changes) the files that this rank wrote and the bytes it held."""
    from equality_rank import VOCAB_TOKENS, make_batches, make_config, micro_batches_of

    from megatron_mode.engine.build import build_engine, build_mesh, join_group

    join_group(process, 1)
    layout, results = None, []
    for index, (tied, changes) in enumerate(variants):
        config = make_config(*layout_sizes[:2], 1, tied, layout_sizes[2], **changes)
        layout = layout or build_mesh(config, process.world_size)
        engine = build_engine(config, layout, VOCAB_TOKENS)
        written = []
        write = engine.deepspeed.checkpoint_engine.save

        def note(state_dict, path, write=write, written=written):
            written.append(Path(path).name)
            return write(state_dict, path)

        engine.deepspeed.checkpoint_engine.save = note
        batch = make_batches(config.batch.global_rows, config.model.seq_len)[0]
        mine = micro_batches_of(batch, layout, engine.at, config.batch.micro_rows)
        gradients = weigh_gradients(engine)
        engine.train_step(0, mine if engine.reads_data else [])
        engine.deepspeed.save_checkpoint(folder, tag=f"v{index}", client_state={})
        optimizer = engine.deepspeed.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        moments = [t for s in inner.state.values() for t in s.values() if t.dim() > 0]
        weights = list(engine.deepspeed.module.parameters())
        held = (bytes_of(weights), gradients[0], bytes_of([*moments, *master_weights(optimizer)]))
        results.append((written, sum(p.numel() for p in weights), held))
    return results


def weigh_gradients(engine):
    """Note, when the update begins, the bytes of all gradients; the list fills in a step."""
    found = []
    reduce = engine.deepspeed._exec_reduce_grads

    def weighed(self, **kwargs):
        weights = list(self.module.parameters())
        flat = getattr(self.optimizer, "fp32_groups_gradients_flat", [])
        found.append(bytes_of([p.grad for p in weights if p.grad is not None] + list(flat)))
        return reduce(**kwargs)

    # The engine's schedule looks instructions up in a map of functions on the class.
    engine.deepspeed._INSTRUCTION_MAP = {
        kind: weighed if function.__name__ == "_exec_reduce_grads" else function
        for kind, function in engine.deepspeed._INSTRUCTION_MAP.items()
    }
    return found
