"""The machine code of NVIDIA's GPUs as `nvdisasm -c` prints it: instructions, blocks and loops. No GPU is needed.

A branch back to a block that is on every path to it closes a natural loop. Code that ptxas moved behind the loop's end,
because it runs seldom, belongs to the loop too.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

_FUNCTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L_\w+):$")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P(?:T|\d)) )?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET")  # these end a block


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@P0", "@!UP1", or "" if it always runs
    opcode: str  # with its modifiers, "SHFL.BFLY"
    operands: str
    targets: tuple[str, ...] = ()  # labels that it may jump to

    @property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def is_conditional(self) -> bool:
        """Whether a branch may also continue with the next instruction: by its guard, a predicate, or divergence."""
        if self.guard not in ("", "@PT", "@UPT"):
            return True
        return self.kind == "BRA" and re.match(r"!?U?P\d|UR\d", self.operands) is not None


@dataclass
class Block:
    first: int  # the index of its first instruction in the kernel
    instructions: list[Instruction]
    after: tuple[int, ...] = ()  # blocks that may follow; the next one in the code comes first


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]


@dataclass
class Kernel:
    name: str  # mangled
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label to the index of the next instruction

    @cached_property
    def blocks(self) -> list[Block]:
        starts = {0, *self.labels.values()}
        starts |= {i + 1 for i, one in enumerate(self.instructions) if one.kind in _ENDS}
        cuts = [*sorted(start for start in starts if start < len(self.instructions)), len(self.instructions)]
        number = {start: i for i, start in enumerate(cuts)}
        blocks = [Block(start, self.instructions[start:end]) for start, end in pairwise(cuts)]
        for i, block in enumerate(blocks):
            last = block.instructions[-1]
            follows = last.kind not in _ENDS or last.is_conditional
            after = [i + 1] if follows and i + 1 < len(blocks) else []
            if last.kind in _ENDS:
                after += [number[self.labels[label]] for label in last.targets if self.labels[label] in number]
            block.after = tuple(dict.fromkeys(after))
        return blocks

    @cached_property
    def in_order(self) -> list[int]:
        """The reachable blocks, each before the blocks that follow it, apart from the loops' branches back."""
        order, seen, stack = [], {0}, [(0, iter(self.blocks[0].after))]
        while stack:
            block, after = stack[-1]
            following = next((b for b in after if b not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].after)))
        return order[::-1]

    @cached_property
    def _dominators(self) -> dict[int, int]:
        """For each reachable block, the nearest block that is on every path to it."""
        order = self.in_order
        place = {block: i for i, block in enumerate(order)}
        before = {block: [] for block in order}
        for block in order:
            for following in self.blocks[block].after:
                before[following].append(block)
        nearest = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                found = None
                for other in (b for b in before[block] if b in nearest):
                    found = other if found is None else _meet(found, other, nearest, place)
                if nearest.get(block) != found:
                    nearest[block], changed = found, True
        return nearest

    def _dominates(self, one: int, other: int) -> bool:
        while other != one and other != 0:
            other = self._dominators[other]
        return other == one

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, each before the loops that it contains."""
        before: dict[int, list[int]] = {}
        backward = []
        for block in self._dominators:
            for following in self.blocks[block].after:
                before.setdefault(following, []).append(block)
                if self._dominates(following, block):
                    backward.append((block, following))
        bodies: dict[int, set[int]] = {}
        for end, header in backward:
            body, stack = bodies.setdefault(header, {header}), [end]
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack += before.get(block, [])
        loops = [Loop(header, frozenset(body)) for header, body in bodies.items()]
        return sorted(loops, key=lambda loop: (-len(loop.blocks), loop.header))

    def inner(self, loop: Loop) -> list[Loop]:
        """The loops inside it."""
        return [other for other in self.loops if other.blocks < loop.blocks]

    def own(self, loop: Loop) -> list[Instruction]:
        """A loop's instructions without those of the loops inside it."""
        inside = frozenset().union(*(other.blocks for other in self.inner(loop)))
        return [one for block in sorted(loop.blocks - inside) for one in self.blocks[block].instructions]


def _meet(one: int, other: int, nearest: dict[int, int], place: dict[int, int]) -> int:
    while one != other:
        while place[one] > place[other]:
            one = nearest[one]
        while place[other] > place[one]:
            other = nearest[other]
    return one


def parse(text: str) -> list[Kernel]:
    """The kernels in nvdisasm's output for a cubin."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            address, guard, opcode, operands = found.groups()
            targets = tuple(re.findall(r"\.L_\w+", operands)) if opcode.startswith(("BRA", "BRX", "JM")) else ()
            operands = operands.split("(*")[0].strip()  # without its comments
            kernels[-1].instructions.append(Instruction(int(address, 16), guard or "", opcode, operands, targets))
        elif found := _LABEL.match(line):
            if kernels:
                kernels[-1].labels[found[1]] = len(kernels[-1].instructions)
        elif found := _FUNCTION.match(line):
            kernels.append(Kernel(found[1]))
    return kernels
