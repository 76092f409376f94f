"""Reads a compiled module's text: computations, instructions, shapes, loops.

What is read is the text that XLA dumps after its optimizations. Only what the report needs is
understood: shapes and their memory space, operands, what an instruction calls, and how often a loop
runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<= ]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_BEGIN = re.compile(r"^  (?:ROOT )?%?[^\s=\"{}]+ = ")
_END = re.compile(r"^\}(?:$|, execution_thread=)")
_CALLED = re.compile(
    r"(calls|to_apply|body|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[^\s,{}]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    fast: bool  # in the chip's fast memory (VMEM), not in HBM

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _bits(self.dtype) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s32, c64
    return int(found[0]) if found else 0


@dataclasses.dataclass
class Instruction:
    name: str
    opcode: str
    shape: str  # as written
    operands: list[str]  # names
    arguments: str  # what stands in the parentheses
    rest: str  # all that follows them
    root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return arrays_of(self.shape)

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that it calls, a loop's condition left out."""
        found = []
        for match in _CALLED.finditer(self.rest):
            found += re.findall(r"[^\s,{}%]+", match[2])
        return found

    def attribute(self, key: str) -> str | None:
        """The number or the name that `key` is set to."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @functools.cached_property
    def op_name(self) -> str:
        """What it came from in the traced program."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1].replace("\\'", "'") if found else ""


def arrays_of(shape: str) -> list[Array]:
    """'(f32[2,3]{1,0}, u32[])' -> its two arrays."""
    out = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        dims = tuple(int(re.sub(r"\D", "", n)) for n in sizes.split(",") if n.strip())
        out.append(Array(dtype, dims, "S(1)" in layout))
    return out


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(
            (i for i in self.instructions.values() if i.root), list(self.instructions.values())[-1]
        )

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        out: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in instruction.operands:
                out.setdefault(name, []).append(instruction)
        return out

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))


@dataclasses.dataclass(frozen=True)
class Place:
    """An instruction that runs by itself, not inside of a fusion."""

    computation: Computation
    instruction: Instruction
    times: int  # a step
    asynchronous: bool  # inside of what an async-start started


@dataclasses.dataclass
class Module:
    computations: dict[str, Computation]
    entry: str

    def places(self) -> Iterator[Place]:
        """All that runs in a step, loops and calls followed, fusions as one instruction."""
        yield from self._walk(self.entry, 1, False)

    def _walk(self, name: str, times: int, asynchronous: bool) -> Iterator[Place]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Place(computation, instruction, times, asynchronous)
            opcode = instruction.opcode
            if opcode == "while":
                again = times * (self.trip_count(computation, instruction) or 1)
                yield from self._walk(instruction.attribute("body"), again, asynchronous)
            elif opcode in ("call", "conditional", "async-start", "custom-call"):
                inside = asynchronous or opcode == "async-start"
                for called in instruction.called:
                    if called in self.computations:
                        yield from self._walk(called, times, inside)

    def unknown_loops(self) -> int:
        """Loops that do not say how often they run; they count once."""
        return sum(
            p.instruction.opcode == "while"
            and self.trip_count(p.computation, p.instruction) is None
            for p in self.places()
        )

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop runs: what the compiler wrote down, or what its condition says."""
        if found := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations.get(loop.attribute("condition") or "")
        if condition is None:
            return None
        limits = [
            int(i.arguments)
            for i in condition.instructions.values()
            if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments)
        ]
        # A scan counts from 0 to its length, by 1.
        return limits[0] if len(limits) == 1 and limits[0] > 0 else None

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """What a fusion holds, fusions in it followed."""
        for name in instruction.called:
            if computation := self.computations.get(name):
                for inner in computation.instructions.values():
                    yield computation, inner
                    if inner.opcode == "fusion":
                        yield from self.inside(inner)


def parse(text: str) -> Module:
    """The module of a dumped text.

    Raises:
      ValueError: it has no entry.
    """
    computations: dict[str, Computation] = {}
    entry, current, lines = "", None, []
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current, lines = match[2], []
                entry = current if match[1] else entry
        elif _END.match(line):
            found = [i for i in map(_instruction, lines) if i]
            computations[current] = Computation(current, {i.name: i for i in found})
            current = None
        elif _BEGIN.match(line) or not lines:
            lines.append(line)
        else:  # what a kernel says of itself takes several lines
            lines[-1] += line
    if not entry:
        raise ValueError("the text of the module has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    root = head.startswith("ROOT ")
    name = head.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : close]
    operands = re.findall(r"%([^\s,(){}]+)", arguments)
    if not operands and opcode != "constant":  # a text without percent signs
        operands = [n for n in re.findall(r"[A-Za-z_][\w.\-]*", arguments) if "[" not in n]
    return Instruction(name, opcode, shape, operands, arguments, rest[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text) - 1
