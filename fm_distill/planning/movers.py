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
            elif table and (found := re.match(r"(\d+) (.*)", line)):
                tables[table][int(found[1])] = found[2]
        self.files = {x: y.strip('"') for x, y in tables["FileNames"].items()}
        self.locations = {
            x: (int(_field(y, "file_name_id")), int(_field(y, "line")))
            for x, y in tables["FileLocations"].items()
        }
        # The text counts parents from one, so that the outermost frame has the parent 1.
        self.frames = {
            x: (int(_field(y, "file_location_id")), int(_field(y, "parent_frame_id")) - 1)
            for x, y in tables["StackFrames"].items()
        }

    def of(self, metadata: str) -> str:
        """The innermost line that is no library's, as file:line; "" where there is none."""
        if inline := re.search(r'source_file="([^"]+)" source_line=(\d+)', metadata):
            return f"{_short(inline[1])}:{inline[2]}"
        found = re.search(r"stack_frame_id=(\d+)", metadata)
        frame = int(found[1]) if found else 0
        while frame in self.frames:
            location, frame = self.frames[frame]
            file, line = self.locations[location]
            if short := _short(self.files[file]):
                return f"{short}:{line}"
        return ""


def largest_movers(text: str, program: Program, steps: int) -> list[Mover]:
    """The `MOST` largest of the program in `text`, which runs so many steps."""
    places = Places(text)
    moved: dict[tuple[str, str], dict[str, float]] = {}
    counts: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, times in program.times.items():
        lines = program.computations.get(name, ())
        inside = {line.name: line for line in lines}
        users = {x: line for line in reversed(lines) for x in line.operands}
        for line in lines:
            size = times * _bytes_of(line, inside, program) / steps
            if not size:
                continue
            source = _source(line, users, program)
            scopes = (_field(source, "op_name", "") or "").strip('"').split("/")
            part = next((PARTS[x] for x in scopes if x in PARTS), "")
            key = part, places.of(source)
            kinds = moved.setdefault(key, collections.defaultdict(float))
            kinds["copy" if line.operation.startswith("copy") else scopes[-1]] += size
            counts[key] += times / steps
    total = sum(sum(kinds.values()) for kinds in moved.values())
    found = [
        Mover(
            part=part,
            operation=max(kinds, key=lambda x: kinds[x]),
            place=place,
            bytes=sum(kinds.values()),
            share=sum(kinds.values()) / total,
            count=counts[part, place],
        )
        for (part, place), kinds in moved.items()
    ]
    return sorted(found, key=lambda x: (-x.bytes, x.place))[:MOST]


def _bytes_of(line: Instruction, inside: dict[str, Instruction], program: Program) -> int:
    if line.operation in FREE or line.operation.endswith("-done"):
        return 0
    sizes = {x: inside[x].hbm_bytes for x in line.operands if x in inside}
    called = re.search(r"calls=%?([\w.\-]+)", line.rest) if line.operation == "fusion" else None
    if called is None:
        return _of_plain(line, sizes)
    body = program.computations.get(called[1], ())
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
    return line.hbm_bytes + sum(sizes.get(x, 0) for x in line.operands)


def _read(parameter: int, body: tuple[Instruction, ...]) -> int:
    """Bytes that a fusion may read of an operand: all, or the slices that it takes."""
    own = [
        x.name for x in body if x.operation == "parameter" and x.rest.startswith(f"{parameter})")
    ]
    users = [x for x in body if own and own[0] in x.operands]
    total = 0
    for user in users:
        if user.operation in SLICES and user.operands[0] == own[0]:
            total += user.size
        elif user.operation == "dynamic-update-slice" and user.operands[0] == own[0]:
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
    return next((x.size for x in body if x.name == name), EVERYTHING)


def _source(line: Instruction, users: dict[str, Instruction], program: Program) -> str:
    """Its metadata, those of the fusion's last operation that has some, or those of its user.

    Copies onto the chip have none of their own.
    """
    seen: Instruction | None = line
    for _ in range(HOPS):
        if seen is None:
            break
        called = re.search(r"calls=%?([\w.\-]+)", seen.rest)
        body = program.computations.get(called[1], ()) if called else ()
        for candidate in (seen, *reversed(body)):
            if "stack_frame_id=" in candidate.rest or "source_line=" in candidate.rest:
                return candidate.rest
        seen = users.get(seen.name)
    return ""


def _field(text: str, name: str, default: str | None = None) -> str:
    found = re.search(rf'\b{name}=("[^"]*"|\d+)', text)
    if found is None:
        if default is None:
            raise ValueError(f"{name} is not in {text!r}")
        return default
    return found[1]


def _short(path: str) -> str:
    """From the package on; "" for a library's file."""
    parts = path.split("/")
    if "fm_distill" in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index("fm_distill") :])
    return "" if "site-packages" in parts or "dist-packages" in parts else parts[-1]
