"""Draws `docs/architecture.svg` from the imports: packages as rooms on floors, an arrow per import.

    python tools/draw_architecture.py [--out docs/architecture.svg]

A room stands one floor above the highest of those that it imports. Colours tell the rooms' arrows
apart; hovering over a room shows what it owns.
"""

import argparse
import ast
import functools
import html
import pathlib
from collections.abc import Iterable, Mapping

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "fm_distill"
PICTURE = ROOT / "docs" / "architecture.svg"

# Pixels.
WIDTH, ROOM_WIDTH, ROOM_HEIGHT, FLOOR_HEIGHT, MARGIN = 960, 124, 40, 96, 24
HUES = 7  # neighbouring rooms differ


def rooms() -> dict[str, list[pathlib.Path]]:
    """Room -> its files: a package, or a module that stands beside the packages."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first not in ("__init__", "__main__"):
            found.setdefault(first, []).append(path)
    return found


def imports_of(path: pathlib.Path) -> set[str]:
    """Modules that a file imports, and names that it imports from them, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{path}: a relative import; name the module in full")
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def arrows() -> dict[str, list[str]]:
    """Room -> the other rooms that it imports."""
    files = rooms()
    found: dict[str, list[str]] = {}
    for room, paths in files.items():
        names = set().union(*map(imports_of, paths))
        others = {x.split(".")[1] for x in names if x.startswith("fm_distill.")}
        found[room] = sorted(others & (files.keys() - {room}))
    return found


def heights(graph: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """The floor of each room, from 1: one above the highest of those that it imports.

    Raises `RecursionError` for a circle.
    """

    @functools.cache  # there are many ways down from the top
    def floor(room: str) -> int:
        return 1 + max((floor(other) for other in graph[room]), default=0)

    return {room: floor(room) for room in graph}


def floors(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The rooms of each floor, the lowest first."""
    floor_of = heights(graph)
    return [[r for r in graph if floor_of[r] == i] for i in range(1, max(floor_of.values()) + 1)]


def sentence(room: str) -> str:
    """The first paragraph of the room's docstring."""
    text = ast.get_docstring(ast.parse(rooms()[room][0].read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def draw() -> str:
    """The picture as SVG."""
    graph = arrows()
    levels = floors(graph)
    height = 2 * MARGIN + FLOOR_HEIGHT * (len(levels) - 1) + ROOM_HEIGHT
    centres: dict[str, tuple[float, float]] = {}
    for i, level in enumerate(levels):
        y = height - MARGIN - ROOM_HEIGHT / 2 - i * FLOOR_HEIGHT
        # Floors are shifted against each other, so that fewer arrows run behind rooms.
        shift = (i % 3 - 1) * 0.22 * WIDTH / (len(level) + 1)
        for j, room in enumerate(level):
            centres[room] = (WIDTH * (j + 1) / (len(level) + 1) + shift, y)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14" role="img">',
        "<title>The packages of fm_distill and their imports</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i in range(len(levels)):
        y = height - MARGIN - ROOM_HEIGHT / 2 - i * FLOOR_HEIGHT
        lines.append(f'<text x="6" y="{y + 5:.0f}" fill="#999999">{i + 1}</text>')
    for k, (room, others) in enumerate(graph.items()):
        x1, y1 = centres[room]
        for other in others:
            x2, y2 = centres[other]
            start, end = y1 + ROOM_HEIGHT / 2, y2 - ROOM_HEIGHT / 2
            bend = (end - start) / 2
            lines.append(
                f'<path d="M{x1:.0f} {start:.0f}C{x1:.0f} {start + bend:.0f} '
                f'{x2:.0f} {end - bend:.0f} {x2:.0f} {end:.0f}" fill="none" '
                f'stroke="hsl({360 * (k % HUES) // HUES},55%,50%)" stroke-opacity="0.6">'
                f"<title>{room} imports {other}</title></path>"
            )
    for room, (x, y) in centres.items():
        lines.append(
            f'<g><rect x="{x - ROOM_WIDTH / 2:.0f}" y="{y - ROOM_HEIGHT / 2:.0f}" '
            f'width="{ROOM_WIDTH}" height="{ROOM_HEIGHT}" rx="6" fill="#eef1fb" '
            f'stroke="#3f51b5"/><text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" '
            f'fill="#111111">{room}</text><title>{html.escape(sentence(room))}</title></g>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the packages and their imports.")
    parser.add_argument("--out", type=pathlib.Path, default=PICTURE, help="the file to write")
    picture = parser.parse_args().out
    picture.write_text(draw())
    print(picture)


if __name__ == "__main__":
    main()
