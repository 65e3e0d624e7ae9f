"""Say which row of which source is taken at which step, and read it.

    schedule     share of Mode 2 by tokens seen, and its exact integral F
    floors       exact floors of F over consecutive rows, in integers where they fit
    supplies     weights over time and epochs of each source, as rows of its mode
    apportion    rows of one mode dealt to its sources, each against the rest (`level`: one of them)
    permutation  keyed, invertible shuffling of a source's rows
    placement    injections and cohorts in the place of rows of their mode (`edits` plans them)
    order        row index -> (mode, source, source row, epoch), and back
    steps        the rows of consecutive steps, many at once
    digest       the chain of hashes that pins the order of a run
    packing      source row -> pieces of documents: stream, whole, one document
    rows         source row -> ids, targets, weights, positions (`edited_source`: as if changed)
    corpus       opens all of it (`edit_lookup`: documents by id)
    forecast, exposures, order_document    what `megatron-mode order` answers
    loader       rows of a step -> micro-batches of one reader, ahead of time

The order is a pure function of the row index: nothing is built before a run and nothing but the
step is kept across a restart. Row i is Mode 2 exactly when floor(F(i + 1)) > floor(F(i)), so
the number of Mode 2 rows before row i is floor(F(i)), whatever the schedule's path was. Sources
are apportioned inside their mode by the same rule. Only `loader` imports torch.

Letters: B rows of a micro-batch, T row length, R_s rows of source s, P its permutation.
"""
