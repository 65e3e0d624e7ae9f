"""Save a run and resume it to the same bits.

A run keeps its checkpoints in RUN/checkpoints:

    latest                       names the checkpoint to resume from; a person may edit it
    publishing                   "NEW OLD" while a checkpoint is renamed; tells a kill from an edit
    .lock, .heartbeat            keep a second program out
    step-00000100/               a finished checkpoint; with `.partial` or `.deleting` it is none
      layer_II-model_TT...pt     weights of link II of the chain, tensor part TT
      mp_rank_KK_...pt           counters and generators of stage and tensor part KK
      zero_pp_rank_D_...pt       optimizer state of data rank D
      tokenizer.model
      manifest.json, .sha256     the run it belongs to, size and digest of each file; its own seal
    step-00000100-universal/     the same for every layout (`reshard`)
    step-00000200.damaged/       set aside, as `.aside`: kept, but no longer counted

A save. The loop waits until the state is copied; the rest happens on a thread of every rank:

    step N ─> copy ─> hash, write, read back ─> manifest.json ─> step-N/ ─> latest ─> prune
              writer  files, save               manifest         folders              folders

A resume (`resume.resume`). What differs is refused before anything is loaded, but for the probe:

    latest ─> check files ─> compare config ─> replay rows ─> load or re-shard ─> probe ─> step N
    folders   manifest       resumable         order_record   resume, reshard     probe

The order is the rows that each step takes, pinned by a chain of digests (`mix.digest`). The probe
is the losses of one fixed batch, measured at the save and after the load. On every rank:

    with run_lock(folder, process):
        checkpoints = Checkpoints(engine, folder, corpus, order, reader)
        step, notes = resume(checkpoints)
        ...                       # take steps, `checkpoints.record.update` after each
        checkpoints.save(step)    # returns when the state is copied
        checkpoints.wait()        # returns when the checkpoint is complete
"""
