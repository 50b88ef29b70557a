"""The problems that the benchmarks run, with their bytes, flops and floor, docs/math.md (19). Imports no torch."""

from dataclasses import dataclass

PASSES = ("forward", "backward", "forward+backward")
BYTES_OF = {"float32": 4, "float64": 8}

# Contestants by name; "vvae_fast" stands for every backend of the package.
FAST = ("vvae_fast", "no-op")
LOOPS = (*FAST, "plain loop", "normflows")
UNCOMPILED = (*LOOPS, "reference", "Pyro", "pythae", "flowjax")
EVERYONE = (*UNCOMPILED, "torch.compile")


@dataclass(frozen=True)
class Case:
    """K = num_steps planar steps of z [rows, dim], with parameters shared by the rows or one set for each row."""

    rows: int
    dim: int
    num_steps: int
    amortized: bool = False
    dtype: str = "float32"
    contestants: tuple[str, ...] = UNCOMPILED
    passes: tuple[str, ...] = PASSES
    quick: bool = False  # part of the quick run

    def __str__(self) -> str:
        kind = "amortized" if self.amortized else "shared"
        suffix = "" if self.dtype == "float32" else f"-{self.dtype}"
        return f"{kind}-B{self.rows}-D{self.dim}-K{self.num_steps}{suffix}"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return BYTES_OF[self.dtype]

    def traffic(self, pass_: str) -> int:
        """Bytes that a pass must read and write at least; the forward saves its pre-activations."""
        B, D, K = self.rows, self.dim, self.num_steps
        if pass_ == "forward+backward":
            return self.traffic("forward") + self.traffic("backward")
        backward = pass_ == "backward"
        per_row = (3 if backward else 2) * D + 1 + K
        if self.amortized:  # u, w, b read; in the backward their gradients written as well
            return self.itemsize * B * (per_row + (2 if backward else 1) * K * (2 * D + 1))
        return self.itemsize * (B * per_row + (4 if backward else 2) * K * D)

    def flops(self, pass_: str) -> int:
        """Floating-point operations that a pass must do."""
        B, D, K = self.rows, self.dim, self.num_steps
        if pass_ == "forward+backward":
            return self.flops("forward") + self.flops("backward")
        backward = pass_ == "backward"
        if self.amortized:
            return (24 if backward else 10) * B * K * D
        return (8 if backward else 4) * B * K * D + 20 * B * K

    def floor(self, pass_: str, bandwidth: float, rate: float) -> float:
        """The least seconds of a pass, for a copy bandwidth in bytes/s and a matrix-product rate in flops/s."""
        if pass_ == "forward+backward":
            return self.floor("forward", bandwidth, rate) + self.floor("backward", bandwidth, rate)
        return max(self.traffic(pass_) / bandwidth, self.flops(pass_) / rate)


FB = ("forward+backward",)

# On a CPU. torch.compile takes up to two minutes for a shape, so it runs only in the README's table. The loops are left
# out if one of their calls would take more than about a fifth of a second.
PLANAR_CASES = [
    # The README's table.
    Case(100, 2, 8, contestants=EVERYONE, quick=True),
    Case(100, 40, 16, contestants=EVERYONE),
    Case(128, 40, 80, contestants=EVERYONE, quick=True),
    Case(1000, 64, 32, contestants=EVERYONE, quick=True),
    Case(4096, 64, 32, contestants=EVERYONE),
    Case(1000, 40, 16, amortized=True, contestants=EVERYONE, quick=True),
    Case(100, 40, 16, amortized=True),
    Case(100, 8, 16, amortized=True),
    Case(128, 40, 80, dtype="float64", contestants=LOOPS, quick=True),
    # Against K at 128 x 40, with the 80 above.
    *(Case(128, 40, K, contestants=LOOPS, passes=FB) for K in (1, 8, 32, 128)),
    # Against B at D = 64, K = 32, with the 1,000 and 4,096 above.
    *(Case(B, 64, 32, contestants=LOOPS, passes=FB) for B in (1, 10, 100)),
    Case(16384, 64, 32, contestants=(*FAST, "plain loop")),
    Case(65536, 64, 32, contestants=FAST, quick=True),
    Case(262144, 64, 32, contestants=FAST),
    # Wide and long.
    Case(4096, 1024, 32, contestants=FAST),
    Case(4096, 64, 256, contestants=FAST),
]

# On a GPU, in one session of about six minutes: first the cases that have bars (bars.py), last those that the session
# may have to leave out.
FIRST_BOTH = ("forward+backward", "forward", "backward")
GPU_CASES = [
    Case(65536, 64, 32, contestants=FAST, quick=True),
    Case(4096, 512, 64, contestants=(*FAST, "vvae_fast cuda direct"), passes=FIRST_BOTH, quick=True),
    Case(4096, 40, 16, amortized=True, contestants=FAST, quick=True),
    Case(128, 40, 80, contestants=EVERYONE, passes=FIRST_BOTH, quick=True),
    Case(100, 2, 8, contestants=(*FAST, "plain loop")),
    Case(4096, 64, 32, contestants=(*FAST, "plain loop")),
    Case(262144, 64, 32, contestants=FAST),
    Case(4096, 1024, 32, contestants=FAST),
    Case(4096, 64, 256, contestants=FAST),
    Case(1000, 40, 16, amortized=True, contestants=(*FAST, "plain loop")),
    Case(128, 40, 80, dtype="float64", contestants=(*FAST, "plain loop")),
    Case(1000, 64, 32, contestants=EVERYONE, passes=FIRST_BOTH),
]

MEMORY_CASES = [
    *(Case(4096, 64, K, contestants=LOOPS, passes=()) for K in (1, 4, 16)),
    Case(4096, 64, 32, passes=(), quick=True),
    *(Case(4096, 64, K, contestants=LOOPS, passes=()) for K in (64, 128, 256)),
    Case(65536, 64, 32, contestants=FAST, passes=(), quick=True),
    Case(1000, 40, 16, amortized=True, passes=()),
]
GPU_MEMORY_CASES = [Case(B, 64, 32, contestants=(*FAST, "plain loop"), passes=(), quick=True) for B in (4096, 65536)]
