"""Shared by the benchmarks of one session: contestants, the current case, rejections, and the line of progress."""

import contextlib
import math
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.flow.cases import GPU_CASES, Case
from benchmarks.flow.contestants import Contestant, Prepared, baselines, ours
from benchmarks.flow.measure import Block, Refused, Run, Stage, failures_refused, settle_allocator
from benchmarks.flow.peers import peers

OUT_OF_TIME = "not run: the session's time was up"
AFTER_COMPILING, A_CASE = 20, 9  # seconds that torch.compile leaves for the session, and for each later case


class Bench:
    """The state that the benchmark functions share."""

    def __init__(self, device: str, quick: bool, seconds: float = math.inf) -> None:
        settle_allocator()
        self.run, self.quick, self.on_gpu = Run(torch.device(device)), quick, device == "cuda"
        self.seconds, self.cut_short = seconds, False  # the session's time, and whether it was too short
        self.contestants: dict[str, Contestant] = {c.name: c for c in [*ours(device), *baselines(), *peers()]}
        self.backends = [n.removeprefix("vvae_fast ") for n in self._ours() if self.contestants[n].runs]  # of steps
        self.started = time.time()
        self._stage: Stage | None = None

    def _ours(self) -> list[str]:
        return [c.name for c in self.contestants.values() if c.role == "ours"]

    def chosen(self, cases: list[Case], gpu_cases: list[Case]) -> list[Case]:
        return [case for case in (gpu_cases if self.on_gpu else cases) if case.quick or not self.quick]

    @property
    def left(self) -> float:
        """Seconds that the session has left."""
        return self.seconds - (time.time() - self.started)

    def names(self, case: Case) -> list[str]:
        """The contestants of a case, with all backends in place of vvae_fast."""
        return [name for wanted in case.contestants for name in (self._ours() if wanted == "vvae_fast" else [wanted])]

    def stage(self, case: Case) -> Stage:
        """The current case; the one before is dropped to free its memory."""
        if self._stage is None or self._stage.case is not case:
            self._stage = None
            self._stage = Stage(case, self.run.device)
            self.run.copy_bytes[case] = 2 * self._stage.copy_source.nbytes
            if case.passes:
                self.run.measure_rate(case.dtype)
        return self._stage

    def to_compile(self, case: Case) -> float:
        """Seconds that torch.compile may take for a case."""
        behind = GPU_CASES[::-1].index(case) if case in GPU_CASES else 0
        return self.left - AFTER_COMPILING - A_CASE * behind

    def prepared(self, block: Block) -> Prepared:
        """The block's contestant, ready and checked; raises Refused otherwise."""
        contestant = self.contestants[block.contestant]
        if contestant.compiled and self.quick:
            raise Refused("not run: the quick run compiles nothing")
        stage = self.stage(block.group)
        prepared = stage.prepared(contestant, self.to_compile(block.group) if contestant.compiled else math.inf)
        if contestant.compiled:
            self.run.compile_seconds[block.group, block.contestant] = stage.compile_seconds[block.contestant]
        return prepared

    @contextlib.contextmanager
    def recording(self, block: Block):
        """A refused contestant gets a row that says why. Its test is skipped for a peer, and fails for any other."""
        try:
            with failures_refused():
                if self.left <= 0:
                    self.cut_short = True
                    raise Refused(OUT_OF_TIME)
                yield
        except Refused as refusal:
            if str(refusal) == OUT_OF_TIME and self.run.timings[block.group, block.pass_, block.contestant].rounds:
                pytest.skip(OUT_OF_TIME)  # the earlier rounds count
            self.run.refuse(block, str(refusal))
            contestant = self.contestants.get(block.contestant)
            excused = (contestant and contestant.role == "peer") or str(refusal).startswith(("missing", "not run"))
            (pytest.skip if excused else pytest.fail)(f"{block.contestant}: {refusal}")


class Progress:
    """A line with the session's position: rewritten in place on a terminal, else one line for each case and pass."""

    def __init__(self, bench: Bench, reporter, checkpoint: Callable[[], None]) -> None:
        self.bench, self.reporter, self.checkpoint = bench, reporter, checkpoint
        self.blocks: dict[str, Block] = {}
        self.groups: list[tuple[object, str]] = []
        self.done, self.shown = 0, None

    def plan(self, items) -> None:
        self.blocks = {item.nodeid: item.callspec.params["block"] for item in items}
        self.groups = list(dict.fromkeys((block.group, block.pass_) for block in self.blocks.values()))

    def pytest_runtest_logstart(self, nodeid):  # the only hook before a test that runs outside the capture of output
        block = self.blocks[nodeid]
        group = (block.group, block.pass_)
        contestant = self.bench.contestants.get(block.contestant)
        if self.bench.on_gpu and (self.shown != group or (contestant and contestant.compiled)):
            self.checkpoint()  # the machine may go away before the end, or a compiler may take all the time
        seconds = int(time.time() - self.bench.started)
        place = f"{self.groups.index(group) + 1}/{len(self.groups)} {block.group} {block.pass_}"
        line = f"[{100 * self.done // len(self.blocks):3d}%] {seconds // 60}:{seconds % 60:02d} {place}"
        if self.reporter.isatty:
            self.reporter.rewrite(f"{line}: {block.contestant}, round {block.round + 1}", erase=True)
        elif self.shown != group:
            self.reporter.ensure_newline()
            self.reporter.write_line(line)
        self.done, self.shown = self.done + 1, group
