"""The faster of the CUDA and the Triton backend by shape. Written by benchmarks/gpu/tune_backends.py."""

# The GPU that forward and backward were timed on, by the clock. None: nothing was measured.
MEASURED_ON = None

# (parameters, D up to, K up to): the faster by the rows up to which it is that. Only what was measured.
FASTER: dict[tuple[str, int, int], dict[int, str]] = {}
