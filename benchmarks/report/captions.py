"""The sentences of the report that say what its tables hold."""

from benchmarks.flow.contestants import GRAPH
from benchmarks.flow.loops import PLAIN, REFERENCE
from benchmarks.report.results import Results

NOISY = 1.5  # a time is marked if the contestant's slowest round took more than this many times its fastest
LEAST_FLOOR = 2e-6  # seconds of a function call; a ratio to a smaller floor has no meaning

NO_GPU = "Not measured on a GPU."
BACKEND_CAPTION = "Both: forward and backward, by the clock. Forward, backward: each alone, on the device."

RATIOS = (
    f"in parentheses: how many times as fast as the {PLAIN}, the median of the rounds' ratios. "
    f"The {PLAIN} is the fastest that was found in twenty lines of PyTorch (benchmarks/flow/loops.py). The {REFERENCE} "
    "is this package's own loop, for any input."
)
NO_RATIOS = f"without ratios, since this run has no {PLAIN}."
MARK = f" `~`: the slowest round took more than {NOISY} times the fastest."
FLOOR = (
    "The floor is the time that the memory traffic or the arithmetic alone takes, docs/math.md (19), at the bandwidth "
)
CPU_TIMES = (
    f"{FLOOR}of the copy of z timed in the same rounds and the rate of that run's best matrix product. The no-op only "
    "clones z: its time is the cost of autograd. Times are medians of the rounds' medians; "
)
CPU_LEAST = (
    f" The last column has no ratio if the floor is under {1e6 * LEAST_FLOOR:.0f} us, the time of a function call."
)
GPU_TIMES = (
    "Times are by the clock, for calls in a row until the device has done the last: medians of the rounds' medians; "
)
GPU_FLOOR = (
    f" {FLOOR}of a copy of 512 MiB timed in the same rounds and the rate of that run's float32 matrix products: by "
    "fused multiply-adds, or a third of the rate in TF32, whichever is larger. The last column divides the time on the "
    "device alone by the floor. That time is between events around a queued call whose inputs are in no cache. The "
    f"column has no ratio if the floor is under {1e6 * LEAST_FLOOR:.0f} us. The no-op only clones z."
)
FLOOR_CAPTION = "Time divided by the floor; the time in parentheses:"
GPU_FLOOR_CAPTION = "Time on the device divided by the floor; the time in parentheses:"
SHORT_STEP_CAPTION = (
    "A VAE's training step, 784-400-40, B = 100, as a ratio to the vanilla VAE's. An amortized flow also pays for the "
    "layer that computes its parameters:"
)


def on_gpu(run: Results) -> bool:
    return run.header["device"] == "cuda"


def time_caption(run: Results) -> str:
    """What times, ratios and floor are."""
    ratios = RATIOS if any(row.base == PLAIN for row in run.rows) else NO_RATIOS
    first, last = (GPU_TIMES, GPU_FLOOR) if on_gpu(run) else (CPU_TIMES, CPU_LEAST)
    return f"{first}{ratios}{MARK}{last}"


def floor_caption(run: Results) -> str:
    return GPU_FLOOR_CAPTION if on_gpu(run) else FLOOR_CAPTION


def compile_times(run: Results) -> str:
    """What torch.compile was given, and how long it took."""
    seconds = [row.compile_seconds for row in run.rows if row.compile_seconds]
    if not seconds:
        return ""
    took = f"took {min(seconds):.0f} to {max(seconds):.0f} s to compile a shape, not counted above"
    return f"torch.compile compiled the {run.header['compiled']}. It {took}."


def step_caption(run: Results) -> str:
    """It names the batch sizes that the run has."""
    steps = [row for row in run.rows if row.pass_ == "step"]
    others = "".join(f", and {rows} where the column says so" for rows in sorted({row.rows for row in steps} - {100}))
    compiled = any(row.contestant.startswith("torch.compile") for row in steps)
    in_graphs = any(row.contestant.endswith(GRAPH) for row in steps)
    return (
        f"784-400-40, B = 100{others}, as a ratio to the vanilla step of the same round: the median of the rounds, and "
        "in parentheses the smallest and the largest."
        + " torch.compile: only the flow is compiled." * compiled
        + " CUDA graph: the whole step is one graph." * in_graphs
    )


def memory_caption(run: Results) -> str:
    return (
        "Saved: bytes that the forward saves for the backward, without the inputs, which the caller holds anyway. "
        f"Peak: bytes of a forward and backward, above the inputs ({run.header['peak_bytes_method']})."
    )
