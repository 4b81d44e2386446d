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
        run_counts: dict[str, float] = collections.defaultdict(float, {self.entry: 1.0})
        pending = [(self.entry, 1.0)]
        while pending:
            name, caller_runs = pending.pop()
            for instruction in self.computations.get(name, ()):
                for called, count in self._calls(instruction):
                    run_counts[called] += caller_runs * count
                    pending.append((called, caller_runs * count))
        return dict(run_counts)

    def _calls(self, line: Instruction) -> list[tuple[str, float]]:
        """Computations that the instruction runs, and how often; not those fused into it."""
        if line.operation == "while":
            body, condition = (
                re.findall(rf"{attribute}=%?([\w.\-]+)", line.rest)[0]
                for attribute in ("body", "condition")
            )
            count = self._trips(line, condition)
            return [(body, count), (condition, count)]
        if line.operation in ("conditional", "call", "async-start"):
            names = re.findall(
                r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line.rest
            )
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line.rest):
                names += re.findall(r"%?([\w.\-]+)", branches)
            return [(name, 1.0) for name in names]
        return []

    def _trips(self, line: Instruction, condition: str) -> float:
        """How often a loop runs; 1 where that depends on data."""
        if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line.rest):
            return float(match.group(1))
        # A TPU's text does not state it. Loops of `jax.lax` count from zero to below a constant.
        instructions = {
            instruction.name: instruction for instruction in self.computations.get(condition, ())
        }
        comparison = next(reversed(instructions.values()), None)
        if (
            comparison is None
            or comparison.operation != "compare"
            or "direction=LT" not in comparison.rest
        ):
            return 1.0
        limits = [
            instructions[operand] for operand in comparison.operands if operand in instructions
        ]
        counts = [
            instruction.rest.partition(")")[0]
            for instruction in limits
            if instruction.operation == "constant"
        ]
        return float(counts[0]) if counts and counts[0].isdigit() else 1.0

    def collectives(self) -> dict[str, float]:
        """Name -> how often, in one run of the program."""
        counts: dict[str, float] = collections.defaultdict(float)
        for name, count in self.times.items():
            for instruction in self.computations.get(name, ()):
                operation = instruction.operation.removesuffix("-start")
                if operation in COLLECTIVES:
                    counts[operation] += count
        return dict(counts)

    def host_transfers(self) -> int:
        """Instructions that wait for the host, wherever they stand."""
        instructions = [
            instruction
            for instructions in self.computations.values()
            for instruction in instructions
        ]
        return sum(
            instruction.operation in HOST or "callback" in instruction.rest.partition("metadata")[0]
            for instruction in instructions
        )

    def loops_factor(self) -> float:
        """Bytes moved with each loop run as often as it does, over those with each run once."""
        bytes_once = bytes_repeated = 0.0
        for name, count in self.times.items():
            moved_bytes = _moved(self.computations.get(name, ()))
            bytes_once, bytes_repeated = (
                bytes_once + moved_bytes,
                bytes_repeated + count * moved_bytes,
            )
        return bytes_repeated / bytes_once if bytes_once else 1.0


def read(text: str) -> Program:
    """Parses the text of a compiled program, `compiled.as_text()`."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, computation_name = "", ""
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line.split("(")[0] and not line.startswith(" "):
            computation_name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = computation_name if line.startswith("ENTRY") else entry
            instructions = []
        elif line.startswith("}"):
            computations[computation_name] = tuple(instructions)
        elif match := _INSTRUCTION.match(line):
            instruction_name, shape, operation, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            size = _bytes(shape)
            in_hbm = _bytes(shape, without=_ON_CHIP)
            instructions.append(
                Instruction(instruction_name, operation, size, in_hbm, operands, rest)
            )
    return Program(computations, entry)


def _bytes(shape: str, without: re.Pattern[str] | None = None) -> int:
    """Of all arrays in `shape` but those whose layout matches `without`."""
    total = 0
    for dtype, dimensions, layout in _SHAPE.findall(shape):
        if without is not None and without.search(layout):
            continue
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
        total += bits * math.prod(int(x) for x in dimensions.split(",") if x) // 8
    return total


def _moved(lines: tuple[Instruction, ...]) -> int:
    sizes = {instruction.name: instruction.size for instruction in lines}
    return sum(
        instruction.size + sum(sizes.get(operand, 0) for operand in instruction.operands)
        for instruction in lines
        if instruction.operation not in FREE
    )
