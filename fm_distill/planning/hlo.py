"""What a compiled program does, read from its text: collectives, host transfers, loops.

The compiler's own counters see the body of a loop once; here each computation is weighed by how
often it runs.
"""

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Whatever moves data between a device and its host while the program runs.
HOST = ("infeed", "outfeed", "send", "recv")
# Instructions that move nothing.
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional")

_BITS = {"pred": 8, "bf16": 16}
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([a-z][\w\-]*)\((.*)"
)
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)[a-z0-9]*\[([0-9,]*)\](\{[^}]*\})?")
# In a layout: memory space 0, which is not written, is HBM.
_ON_CHIP = re.compile(r"S\([1-9]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    operation: str
    size: int  # bytes of its result
    hbm_bytes: int  # of these, what does not lie in memory on the chip
    operands: tuple[str, ...]
    rest: str  # of the line, with its attributes


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, for one device."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def times(self) -> dict[str, float]:
        """How often each computation that is not fused into another runs."""
        found: dict[str, float] = collections.defaultdict(float, {self.entry: 1.0})
        todo = [(self.entry, 1.0)]
        while todo:
            name, weight = todo.pop()
            for line in self.computations.get(name, ()):
                for called, count in self._calls(line):
                    found[called] += weight * count
                    todo.append((called, weight * count))
        return dict(found)

    def _calls(self, line: Instruction) -> list[tuple[str, float]]:
        """Computations that the instruction runs, and how often; not those fused into it."""
        if line.operation == "while":
            body, condition = (
                re.findall(rf"{x}=%?([\w.\-]+)", line.rest)[0] for x in ("body", "condition")
            )
            count = self._trips(line, condition)
            return [(body, count), (condition, count)]
        if line.operation in ("conditional", "call", "async-start"):
            names = re.findall(
                r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line.rest
            )
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line.rest):
                names += re.findall(r"%?([\w.\-]+)", group)
            return [(name, 1.0) for name in names]
        return []

    def _trips(self, line: Instruction, condition: str) -> float:
        """How often a loop runs; 1 where that depends on data."""
        if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line.rest):
            return float(match.group(1))
        # A TPU's text does not state it. Loops of `jax.lax` count from zero to below a constant.
        lines = {x.name: x for x in self.computations.get(condition, ())}
        last = next(reversed(lines.values()), None)
        if last is None or last.operation != "compare" or "direction=LT" not in last.rest:
            return 1.0
        limits = [lines[x] for x in last.operands if x in lines]
        counts = [x.rest.partition(")")[0] for x in limits if x.operation == "constant"]
        return float(counts[0]) if counts and counts[0].isdigit() else 1.0

    def collectives(self) -> dict[str, float]:
        """Name -> how often, in one run of the program."""
        found: dict[str, float] = collections.defaultdict(float)
        for name, count in self.times.items():
            for line in self.computations.get(name, ()):
                plain = line.operation.removesuffix("-start")
                if plain in COLLECTIVES:
                    found[plain] += count
        return dict(found)

    def host_transfers(self) -> int:
        """Instructions that wait for the host, wherever they stand."""
        lines = [line for lines in self.computations.values() for line in lines]
        return sum(
            line.operation in HOST or "callback" in line.rest.partition("metadata")[0]
            for line in lines
        )

    def loops_factor(self) -> float:
        """Bytes moved with each loop run as often as it does, over those with each run once."""
        once = often = 0.0
        for name, count in self.times.items():
            moved = _moved(self.computations.get(name, ()))
            once, often = once + moved, often + count * moved
        return often / once if once else 1.0


def read(text: str) -> Program:
    """Parses the text of a compiled program, `compiled.as_text()`."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name = "", ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line.split("(")[0] and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            lines = []
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        elif found := _INSTRUCTION.match(line):
            instruction, shape, operation, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            size = _bytes(shape)
            in_hbm = _bytes(shape, without=_ON_CHIP)
            lines.append(Instruction(instruction, operation, size, in_hbm, operands, rest))
    return Program(computations, entry)


def _bytes(shape: str, without: re.Pattern[str] | None = None) -> int:
    """Of all arrays in `shape` but those whose layout matches `without`."""
    total = 0
    for kind, dimensions, layout in _SHAPE.findall(shape):
        if without is not None and without.search(layout):
            continue
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)
        total += bits * math.prod(int(x) for x in dimensions.split(",") if x) // 8
    return total


def _moved(lines: tuple[Instruction, ...]) -> int:
    sizes = {line.name: line.size for line in lines}
    return sum(
        line.size + sum(sizes.get(x, 0) for x in line.operands)
        for line in lines
        if line.operation not in FREE
    )
