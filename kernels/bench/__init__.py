"""Time the LM + mode loss against its peers: same inputs, same work, alternating calls.

`__main__` is the command line; the rows of `implementations` run on one batch of `problem`, which
holds its truth in fp64; `compare` makes the table from `timing` and `memory`.
"""
