"""Blocks, warps and stages by pass, parameters and padded D. Written by benchmarks/gpu/tune_triton.py."""

# The GPU that the entries were timed on. None: they are reasoned from registers and bytes in flight, not measured.
MEASURED_ON = None

FEW_ROWS = 4096  # up to here the first entry holds, with little work a program; above it the second
# A thread has at least so many numbers, 16 bytes of a row: then few rows and many are summed in the same order, and a
# row's bits do not depend on the batch size.
LEAST_ELEMENTS = 4

# The direct form. (pass, parameters, block of D): rows of a program, its warps, and steps whose parameters are on
# their way, for few rows and for many.
DIRECT = {
    ("forward", "shared", 1): ((128, 1, 3), (256, 1, 3)),
    ("forward", "shared", 2): ((64, 1, 3), (128, 1, 3)),
    ("forward", "shared", 4): ((32, 1, 3), (64, 1, 3)),
    ("forward", "shared", 8): ((16, 1, 3), (32, 1, 3)),
    ("forward", "shared", 16): ((8, 1, 3), (16, 1, 3)),
    ("forward", "shared", 32): ((4, 1, 3), (8, 1, 3)),
    ("forward", "shared", 64): ((2, 1, 3), (4, 1, 3)),
    ("forward", "shared", 128): ((1, 1, 3), (2, 1, 3)),
    ("forward", "shared", 256): ((1, 1, 3), (1, 1, 3)),
    ("forward", "shared", 512): ((1, 2, 3), (1, 2, 3)),
    ("forward", "shared", 1024): ((1, 4, 2), (1, 4, 2)),
    ("forward", "shared", 2048): ((1, 8, 2), (1, 8, 2)),
    ("forward", "amortized", 1): ((128, 1, 4), (128, 1, 4)),
    ("forward", "amortized", 2): ((64, 1, 4), (64, 1, 4)),
    ("forward", "amortized", 4): ((32, 1, 4), (32, 1, 4)),
    ("forward", "amortized", 8): ((16, 1, 4), (16, 1, 4)),
    ("forward", "amortized", 16): ((8, 1, 4), (8, 1, 4)),
    ("forward", "amortized", 32): ((4, 1, 4), (4, 1, 4)),
    ("forward", "amortized", 64): ((2, 1, 4), (2, 1, 4)),
    ("forward", "amortized", 128): ((1, 1, 4), (1, 1, 4)),
    ("forward", "amortized", 256): ((1, 1, 4), (1, 1, 4)),
    ("forward", "amortized", 512): ((1, 2, 4), (1, 2, 4)),
    ("forward", "amortized", 1024): ((1, 4, 2), (1, 4, 2)),
    ("forward", "amortized", 2048): ((1, 8, 2), (1, 8, 2)),
    ("backward", "shared", 1): ((128, 1, 3), (256, 1, 3)),
    ("backward", "shared", 2): ((64, 1, 3), (128, 1, 3)),
    ("backward", "shared", 4): ((32, 1, 3), (64, 1, 3)),
    ("backward", "shared", 8): ((16, 1, 3), (32, 1, 3)),
    ("backward", "shared", 16): ((8, 1, 3), (16, 1, 3)),
    ("backward", "shared", 32): ((4, 1, 3), (8, 1, 3)),
    ("backward", "shared", 64): ((2, 1, 3), (4, 1, 3)),
    ("backward", "shared", 128): ((1, 1, 3), (2, 1, 3)),
    ("backward", "shared", 256): ((1, 1, 3), (1, 1, 3)),
    ("backward", "shared", 512): ((1, 2, 3), (1, 2, 3)),
    ("backward", "shared", 1024): ((1, 4, 2), (1, 4, 2)),
    ("backward", "shared", 2048): ((1, 8, 2), (1, 8, 2)),
    ("backward", "amortized", 1): ((128, 1, 3), (128, 1, 3)),
    ("backward", "amortized", 2): ((64, 1, 3), (64, 1, 3)),
    ("backward", "amortized", 4): ((32, 1, 3), (32, 1, 3)),
    ("backward", "amortized", 8): ((16, 1, 3), (16, 1, 3)),
    ("backward", "amortized", 16): ((8, 1, 3), (8, 1, 3)),
    ("backward", "amortized", 32): ((4, 1, 3), (4, 1, 3)),
    ("backward", "amortized", 64): ((2, 1, 3), (2, 1, 3)),
    ("backward", "amortized", 128): ((1, 1, 3), (1, 1, 3)),
    ("backward", "amortized", 256): ((1, 1, 3), (1, 1, 3)),
    ("backward", "amortized", 512): ((1, 2, 3), (1, 2, 3)),
    ("backward", "amortized", 1024): ((1, 4, 2), (1, 4, 2)),
    ("backward", "amortized", 2048): ((1, 8, 2), (1, 8, 2)),
}

FEW_COMPACT_ROWS = 16384

# The compact form. (pass, D): rows of a program, columns at a time, warps. 64 stands for all D up to there, where the
# forward keeps z in registers, 512 for all other. For few rows and for many.
COMPACT = {
    ("forward", 64): ((16, 16, 2), (64, 16, 4)),
    ("forward", 512): ((16, 16, 1), (64, 32, 4)),
    ("backward", 512): ((16, 16, 1), (64, 16, 8)),
}
