"""Estimates the cost of one turn of a loop for one warp, by walking through its machine code. Trust the ratios of these
estimates, not their cycles.

The walk takes the usual path: lanes do not diverge at a shuffle, votes find no lane, divisions do not call the
subroutine for rare operands. Of the paths that are left it takes those with most special functions, as for tanh and the
constraint, and of these the one with fewest instructions, as for aligned rows. It skips inner loops. One instruction
issues in each cycle, in order, when its operands are ready; LATENCY says when that is. Memory is as fast as the first
cache: the figures contain no waiting for memory, for other warps or for a unit.
"""

import re
from functools import cache
from typing import NamedTuple

from benchmarks.sass.sass import Instruction, Kernel, Loop

TURNS = (3, 6)  # these turns are measured: from the third on all are alike

# Cycles until a result can be read, by the first kind with which the opcode begins; all others are ARITHMETIC.
ARITHMETIC = 4
LATENCY = [
    (("LDG", "LD.", "ATOM"), 35),
    (("LDS", "LDSM", "LDL"), 30),
    (("LDC", "S2R", "S2UR", "MUFU", "F2F", "F2I", "I2F.", "FRND", "POPC", "FLO"), 30),
    (("SHFL",), 25),
    (("HMMA", "HGMMA", "DMMA", "IMMA"), 24),
    (("VOTE", "R2UR", "ULDC", "REDUX", "FCHK"), 12),
    (("DFMA", "DADD", "DMUL", "DSETP"), 8),
]
_NO_RESULT = ("ST", "RED.", "BAR", "BRA", "BRX", "EXIT", "NOP", "BSSY", "BSYNC", "WARPSYNC", "MEMBAR", "ERRBAR")
_NO_RESULT += ("CALL", "RET", "CCTL", "ENDCOLLECTIVE", "YIELD", "WARPGROUP", "FENCE", "LDGSTS", "BREAK")
_NO_RESULT += ("DEPBAR", "LDGDEPBAR")
_TESTS = ("ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UISETP", "UPLOP3", "FCHK", "PSETP")  # they write no register
_PAIRS = ("DFMA", "DADD", "DMUL", "DSETP")
_REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)(\.64)?|(?<![\w.])(U?P)(\d)")


class Access(NamedTuple):
    reads: tuple[str, ...]  # registers and predicates, "R4", "UP0"
    writes: tuple[str, ...]
    latency: int
    waits_for_all: bool  # a barrier


class Turn(NamedTuple):
    instructions: int
    in_order: int  # cycles, one instruction after the other
    chain: int  # cycles, if an instruction waits only for its operands and for barriers


def latency(opcode: str) -> int:
    return next((cycles for kinds, cycles in LATENCY if opcode.startswith(kinds)), ARITHMETIC)


def _registers(operand: str, width: int) -> list[str]:
    found = []
    width = 1 if "[" in operand else width  # an address
    for name, number, wide, predicate, of_predicate in _REGISTER.findall(operand):
        if predicate:
            found.append(predicate + of_predicate)
        else:
            found += [f"{name}{int(number) + i}" for i in range(max(width, 2 if wide else 1))]
    return found


def _width_written(opcode: str) -> int:
    """The number of consecutive registers that an instruction writes."""
    if opcode.startswith("HGMMA"):
        return int(re.search(r"\.64x(\d+)x", opcode)[1]) // 2
    if opcode.startswith(("HMMA", "LDSM.16.M88.4")) or ".128" in opcode:
        return 4
    if opcode.startswith(_PAIRS) or ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R":
        return 2
    return 2 if re.match(r"(F2F|I2F)\.F64", opcode) else 1


def _width_read(opcode: str, nth: int) -> int:
    """The number of consecutive registers in the nth operand; the result is the 0th."""
    if opcode.startswith("HMMA"):
        return {1: 4, 2: 2, 3: 4}.get(nth, 1)
    if opcode.startswith("HGMMA"):
        return _width_written(opcode)
    if opcode.startswith(_PAIRS):
        return 2
    if opcode.startswith("ST"):
        return 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    if ".WIDE" in opcode:
        return 2 if nth >= 3 else 1
    return 2 if re.match(r"(F2F|F2I|I2F)\.\w+\.F64", opcode) else 1


def _number_written(kind: str, opcode: str, operands: list[str]) -> int:
    """How many of the first operands are results."""
    if kind in _TESTS:
        return 1 if kind == "FCHK" else 2
    if opcode.startswith(_NO_RESULT):
        return 0
    if kind in ("VOTE", "VOTEU") and operands[0].lstrip("U").startswith("P"):
        return 1
    predicate, number = re.compile(r"U?P[\dT]|PR"), 0
    while number < len(operands) and predicate.fullmatch(operands[number]):  # SHFL's
        number += 1
    if number < len(operands) and re.match(r"U?R[\dZ]", operands[number]):
        number += 1
        while number < len(operands) - 1 and predicate.fullmatch(operands[number]):  # a sum's carry
            number += 1
    return number


@cache
def _access(opcode: str, guard: str, text: str) -> Access:
    kind, operands = opcode.split(".")[0], re.split(r",\s*(?![^\[]*\])", text) if text else []
    results = _number_written(kind, opcode, operands)
    writes = [name for operand in operands[:results] for name in _registers(operand, _width_written(opcode))]
    reads = [name for i, op in enumerate(operands[results:], 1) for name in _registers(op, _width_read(opcode, i))]
    every = [f"P{i}" for i in range(7)]
    if kind == "P2R":
        reads += every
    if kind == "R2P":
        writes += every
    if guard:
        reads += [*_registers(guard.lstrip("@!"), 1), *writes]  # if it does not run, the old value stays
    return Access(tuple(reads), tuple(writes), latency(opcode), opcode.startswith("BAR"))


def access(one: Instruction) -> Access:
    return _access(one.opcode, one.guard, one.operands)


def _usual(kernel: Kernel, block: int) -> tuple[int, ...]:
    """The blocks that usually follow."""
    instructions, after = kernel.blocks[block].instructions, kernel.blocks[block].after
    last = instructions[-1]
    if last.opcode == "BRA.DIV":
        return after[:1]
    if last.kind == "BRA" and len(after) == 2:
        predicate = last.guard.lstrip("@!") or last.operands.split(",")[0].lstrip("!")
        inverted = "!" in last.guard or last.operands.startswith("!")
        setter = next((one for one in reversed(instructions[:-1]) if predicate in access(one).writes), None)
        if setter and setter.kind in ("VOTE", "VOTEU"):
            return after[1:] if inverted else after[:1]
    return after


def usual_way(kernel: Kernel, loop: Loop) -> list[Instruction]:
    """The instructions of one turn on the usual path, from the loop's first block to a branch back to it."""
    inside = frozenset().union(*(other.blocks for other in kernel.inner(loop)))
    rank = {block: i for i, block in enumerate(kernel.in_order)}
    best: dict[int, tuple[int, int, int | None]] = {}  # from a block on: special functions, -instructions, next block
    for block in sorted(loop.blocks, key=rank.__getitem__, reverse=True):
        own = [] if block in inside else kernel.blocks[block].instructions
        if any(one.kind == "CALL" for one in own):
            continue
        special, length = sum(one.kind == "MUFU" for one in own), len(own)
        ways = []
        for following in _usual(kernel, block):
            if following == loop.header:
                ways.append((special, -length, None))
            elif following in best and rank[following] > rank[block]:
                ways.append((special + best[following][0], best[following][1] - length, following))
        if ways:
            best[block] = max(ways, key=lambda way: way[:2])
    if loop.header not in best:
        raise ValueError(f"{kernel.name}: every way through its loop is a rare one")
    way, block = [], loop.header
    while block is not None:
        way += [] if block in inside else kernel.blocks[block].instructions
        block = best[block][2]
    return way


def _cycles(accesses: list[Access], in_order: bool) -> int:
    """Cycles of one turn among several in a row."""
    there: dict[str, int] = {}  # the cycle when a register can be read
    now, last, ends = 0, 0, []
    for turn in range(TURNS[1]):
        for reads, writes, takes, waits_for_all in accesses:
            start = max([now, *(there.get(name, 0) for name in reads)])
            if waits_for_all:
                now = start = max(start, last)
            if in_order:
                now = start + 1
            for name in writes:
                there[name] = start + takes
            last = max(last, start + takes)
        if turn + 1 in TURNS:
            ends.append(now if in_order else last)
    return round((ends[1] - ends[0]) / (TURNS[1] - TURNS[0]))


def walk(kernel: Kernel, loop: Loop) -> Turn:
    way = usual_way(kernel, loop)
    accesses = [access(one) for one in way]
    return Turn(len(way), _cycles(accesses, True), _cycles(accesses, False))
