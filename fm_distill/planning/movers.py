"""Which operations of a compiled step move the most memory, and the lines that they come from.

Bytes are those of operands and results that lie in HBM, as the text of the program has them: what
a fusion reads only slices of counts as the slices, what it updates in place as the update.
"""

import collections
import dataclasses
import re

from fm_distill.planning.hlo import FREE, Instruction, Program

MOST = 20
# The scopes of a step, as `step.py` and JAX name them, and what a reader calls them.
PARTS = {
    "views": "views",
    "teacher": "teacher",
    "jvp(student)": "student",
    "transpose(jvp(student))": "student, backwards",
    "update": "update",
}
HOPS = 4  # from a copy to its user
EVERYTHING = 2**62
SLICES = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass(frozen=True)
class Mover:
    """What one line of the code moves in one part of the step."""

    part: str  # a value of `PARTS`, or "" for what is in none of them
    operation: str  # JAX's name of it, of the kind that moves most
    place: str  # file:line; "" where the program does not record it
    bytes: float  # of HBM, a step and a device
    share: float  # of what all operations together move
    count: float  # operations a step


class Places:
    """The tables of a program's text that say which line an operation comes from."""

    def __init__(self, text: str) -> None:
        tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
        table = ""
        header, _, _ = text.partition("\n%")  # the tables stand before the first computation
        for line in header.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = line
            elif table and (match := re.match(r"(\d+) (.*)", line)):
                tables[table][int(match[1])] = match[2]
        self.files = {key: value.strip('"') for key, value in tables["FileNames"].items()}
        self.locations = {
            key: (int(_field(fields, "file_name_id")), int(_field(fields, "line")))
            for key, fields in tables["FileLocations"].items()
        }
        # The text counts parents from one, so that the outermost frame has the parent 1.
        self.frames = {
            key: (
                int(_field(fields, "file_location_id")),
                int(_field(fields, "parent_frame_id")) - 1,
            )
            for key, fields in tables["StackFrames"].items()
        }

    def of(self, metadata: str) -> str:
        """The innermost line that is no library's, as file:line; "" where there is none."""
        if inline := re.search(r'source_file="([^"]+)" source_line=(\d+)', metadata):
            return f"{_short(inline[1])}:{inline[2]}"
        match = re.search(r"stack_frame_id=(\d+)", metadata)
        frame = int(match[1]) if match else 0
        while frame in self.frames:
            location, frame = self.frames[frame]
            file, line = self.locations[location]
            if short_path := _short(self.files[file]):
                return f"{short_path}:{line}"
        return ""


def largest_movers(text: str, program: Program, steps: int) -> list[Mover]:
    """The `MOST` largest of the program in `text`, which runs so many steps."""
    places = Places(text)
    moved_bytes: dict[tuple[str, str], dict[str, float]] = {}
    counts: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, run_count in program.times.items():
        instructions = program.computations.get(name, ())
        by_name = {instruction.name: instruction for instruction in instructions}
        users = {
            operand: instruction
            for instruction in reversed(instructions)
            for operand in instruction.operands
        }
        for instruction in instructions:
            bytes_per_step = run_count * _bytes_of(instruction, by_name, program) / steps
            if not bytes_per_step:
                continue
            metadata = _source(instruction, users, program)
            scopes = (_field(metadata, "op_name", "") or "").strip('"').split("/")
            part = next((PARTS[scope] for scope in scopes if scope in PARTS), "")
            key = part, places.of(metadata)
            bytes_by_operation = moved_bytes.setdefault(key, collections.defaultdict(float))
            bytes_by_operation[
                "copy" if instruction.operation.startswith("copy") else scopes[-1]
            ] += bytes_per_step
            counts[key] += run_count / steps
    total_bytes = sum(
        sum(bytes_by_operation.values()) for bytes_by_operation in moved_bytes.values()
    )
    movers = [
        Mover(
            part=part,
            operation=max(bytes_by_operation, key=lambda operation: bytes_by_operation[operation]),
            place=place,
            bytes=sum(bytes_by_operation.values()),
            share=sum(bytes_by_operation.values()) / total_bytes,
            count=counts[part, place],
        )
        for (part, place), bytes_by_operation in moved_bytes.items()
    ]
    return sorted(movers, key=lambda mover: (-mover.bytes, mover.place))[:MOST]


def _bytes_of(line: Instruction, inside: dict[str, Instruction], program: Program) -> int:
    if line.operation in FREE or line.operation.endswith("-done"):
        return 0
    sizes = {operand: inside[operand].hbm_bytes for operand in line.operands if operand in inside}
    call_match = re.search(r"calls=%?([\w.\-]+)", line.rest) if line.operation == "fusion" else None
    if call_match is None:
        return _of_plain(line, sizes)
    body = program.computations.get(call_match[1], ())
    total = _written(line, body)
    for i, name in enumerate(line.operands):
        total += min(sizes.get(name, 0), _read(i, body))
    return total


def _of_plain(line: Instruction, sizes: dict[str, int]) -> int:
    if line.operation.endswith("-start"):
        return line.hbm_bytes  # of source and destination: both are in its result
    if line.operation in SLICES:
        return 2 * line.hbm_bytes
    if line.operation == "dynamic-update-slice":
        return 2 * sizes.get(line.operands[1], 0)
    return line.hbm_bytes + sum(sizes.get(operand, 0) for operand in line.operands)


def _read(parameter: int, body: tuple[Instruction, ...]) -> int:
    """Bytes that a fusion may read of an operand: all, or the slices that it takes."""
    parameter_names = [
        instruction.name
        for instruction in body
        if instruction.operation == "parameter" and instruction.rest.startswith(f"{parameter})")
    ]
    users = [
        instruction
        for instruction in body
        if parameter_names and parameter_names[0] in instruction.operands
    ]
    total = 0
    for user in users:
        if user.operation in SLICES and user.operands[0] == parameter_names[0]:
            total += user.size
        elif user.operation == "dynamic-update-slice" and user.operands[0] == parameter_names[0]:
            total += _size(user.operands[1], body)
        else:
            return EVERYTHING
    return total


def _written(line: Instruction, body: tuple[Instruction, ...]) -> int:
    root = body[-1] if body else None
    if root is not None and root.operation == "dynamic-update-slice":
        return min(line.hbm_bytes, _size(root.operands[1], body))
    return line.hbm_bytes


def _size(name: str, body: tuple[Instruction, ...]) -> int:
    return next((instruction.size for instruction in body if instruction.name == name), EVERYTHING)


def _source(line: Instruction, users: dict[str, Instruction], program: Program) -> str:
    """Its metadata, those of the fusion's last operation that has some, or those of its user.

    Copies onto the chip have none of their own.
    """
    instruction: Instruction | None = line
    for _ in range(HOPS):
        if instruction is None:
            break
        call_match = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
        body = program.computations.get(call_match[1], ()) if call_match else ()
        for candidate in (instruction, *reversed(body)):
            if "stack_frame_id=" in candidate.rest or "source_line=" in candidate.rest:
                return candidate.rest
        instruction = users.get(instruction.name)
    return ""


def _field(text: str, name: str, default: str | None = None) -> str:
    match = re.search(rf'\b{name}=("[^"]*"|\d+)', text)
    if match is None:
        if default is None:
            raise ValueError(f"{name} is not in {text!r}")
        return default
    return match[1]


def _short(path: str) -> str:
    """From the package on; "" for a library's file."""
    parts = path.split("/")
    if "fm_distill" in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index("fm_distill") :])
    return "" if "site-packages" in parts or "dist-packages" in parts else parts[-1]
