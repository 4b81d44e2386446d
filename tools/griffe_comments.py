"""Comments of fields as their descriptions in the reference; `mkdocs.yml` names this extension.

A field is described by the comment above it, or behind it. A docstring under it comes first.
"""

import ast
from typing import Any

import griffe


def comment_of(lines: list[str], first: int, last: int) -> str:
    """The comment behind line `last` or directly above line `first`, counted from 1."""
    behind = lines[last - 1].partition("  # ")[2].strip()
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return behind or " ".join(above)


class Comments(griffe.Extension):
    """Gives each field of a class that has no docstring its comment."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any
    ) -> None:
        first, last, file = attr.lineno, attr.endlineno, attr.filepath
        if first is None or last is None or isinstance(file, list):
            return
        if attr.docstring or not isinstance(attr.parent, griffe.Class):
            return
        if text := comment_of(attr.lines_collection[file], first, last):
            text = text[0].upper() + text[1:]
            attr.docstring = griffe.Docstring(text, parent=attr)
