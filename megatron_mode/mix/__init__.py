"""Decide which row of which source a run takes at which step, and read it.

    step 17 ── x global_rows ──> row indices 272 .. 287                          order
                                        │
              floor(F(i + 1)) > floor(F(i)) ?                                    schedule
                   │ no                      │ yes
                Mode 1                    Mode 2
                   └── row of the mode ──────┘
                             │  each source against the rest, by its weight      apportion
                   (source, n-th row of it)
                             │  keyed, invertible shuffle, anew in each epoch    permutation
                   (source, source row)
                             │  edits take the place of single rows              edits
                             │  stream: a slice; whole: a list of documents      packing
                   ids, targets, weights, positions                              rows
                             │
                   micro-batches of one reader, ahead of time                    loader

Vocabulary. A *row* is T tokens. A *row index* counts the rows of a run from 0; a *source row*
counts those of one prepared source. F(i) is the planned number of Mode 2 rows before row i, an
integral that is known exactly. An *epoch* is one pass over a source. A row index maps to (mode,
source, source row, epoch) and back (`order`); `digest` chains the hashes that pin the order of a
run; `corpus` opens everything; `audit` answers the questions of `megatron-mode order`.

Example. With mode2_fraction constant at 0.25, F(i) = i / 4: rows 3, 7, 11, ... are Mode 2. With two
Mode 2 sources of weights 2 and 1, two of three such rows come from the first.

The order is a pure function of the row index: nothing is built before a run and nothing but the
step is kept across a restart. Only `loader` imports torch.

Letters: B rows of a micro-batch, T row length, R_s rows of source s, P its permutation.
"""
