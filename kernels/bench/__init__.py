"""Time the LM + mode loss against its peers: same inputs, same work, alternating calls."""
