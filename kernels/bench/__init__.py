"""Time the LM + mode loss against its peers: same inputs, same work, alternating calls.

__main__         the command line; imports torch only after parsing
case             what is compared: shape, dtype, device, and how much time it may take
implementations  the rows of the table: each peer, with a separate mode head, and ours
inputs           one batch that all of them get
truth            loss and gradients in fp64, and how far off a result is
timing           alternating rounds, and the share of the mode head from paired calls
interval         the 95 % interval of a median
memory           peak extra memory, each implementation in a process of its own
compare          one case from inputs to rows
table            rows as text
failure          why something could not be measured, in one line
"""
