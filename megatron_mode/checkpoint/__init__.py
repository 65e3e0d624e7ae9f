"""Save a run and resume it to the same bits.

A save. The loop waits until the state is copied; the rest happens on a thread of every rank:

    step N ─> copy ─> step-N.partial/ ─> manifest.json ─> step-N/ ─> latest ─> prune
              writer  files, save        manifest         folders              folders

1. Write every rank's files into `step-N.partial`.
2. Hash each file while it is written (SHA-256).
3. Verify: flush the file and read it back from the disk; rank 0 seals all digests in the manifest.
4. Rename the folder to `step-N` and let `latest` name it.
5. Prune older checkpoints.

A resume (`resume.resume`). What differs is refused before anything is loaded, but for the probe:

    latest ─> check files ─> compare config ─> replay rows ─> load or re-shard ─> probe ─> step N
    folders   manifest       resumable         order_record   writer, reshard     probe

Vocabulary:

    finished    a folder named step-NNNNNNNN; with `.partial` or `.deleting` it is none
    manifest    what the folder holds and the run it belongs to; sealed by its own SHA-256
    order       which rows each step takes; a chain of digests pins it (`mix.digest`)
    probe       the losses of one fixed batch, measured at the save and after the load
    universal   a folder beside a checkpoint that holds it for every layout (`reshard`)
    aside       `.damaged` or `.aside`: kept, but no longer counted

Example, on every rank:

    with run_lock(folder, process):
        step, notes = resume(engine, folder, record, order, probe)
        checkpoints = Checkpoints(engine, folder, tokenizer, probe)
        ...                               # take steps, `record.update` after each
        checkpoints.save(step, record)    # returns when the state is copied
        checkpoints.wait()                # returns when the checkpoint is complete
"""
