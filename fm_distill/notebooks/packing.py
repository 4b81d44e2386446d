"""An experiment packed into a notebook: what the tools in `tools/kaggle` and `tools/colab` share.

A notebook's source is a Python file with `# %%` cells. Those with the tag `parameters` get their
values, one with the tag `hidden` is folded, and before the one with the tag `experiment` stands a
cell for each of the experiment's files.
"""

import ast
import base64
import dataclasses
import io
import os
import pathlib
import re
import tarfile
import tempfile
from collections.abc import Mapping
from typing import Any, TypeVar

import tyro

from fm_distill.config import Config
from fm_distill.errors import UserError
from fm_distill.preparation.check import check
from fm_distill.preparation.experiment import load_experiment
from fm_distill.preparation.parse_options import OverConfig, parse_over

ROOT = pathlib.Path(__file__).parents[2]
# What a notebook needs of a checkout to install the package.
PACKAGE = ("pyproject.toml", "README.md", "LICENSE", "fm_distill")
# Of `--package`: the image has it already.
INSTALLED = "installed"
# `OWNER/NAME` and whatever lies inside it, in an option of the training.
INPUT = re.compile(r"@([\w-]+/[\w-]+)(/.*)?")


Tool = TypeVar("Tool")


@dataclasses.dataclass(frozen=True)
class _Options(OverConfig):
    """The options of a training."""


def tool_options(
    kind: type[Tool], arguments: list[str], program: str
) -> tuple[Tool, list[str], list[str]]:
    """A tool's own options, read, and as they were written; the training's options behind `--`."""
    separator_index = arguments.index("--") if "--" in arguments else len(arguments)
    tool_arguments, options = arguments[:separator_index], arguments[separator_index + 1 :]
    parsed = tyro.cli(
        kind, args=tool_arguments, prog=program, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return parsed, tool_arguments, options


def read_options(experiment: str, options: list[str], program: str) -> Config:
    """The config of an experiment with the options of its training. Raises `UserError`."""
    parsed = parse_over(_Options, load_experiment(experiment), options, program)
    check(parsed.config)
    return parsed.config


def pack(experiment: str | os.PathLike[str]) -> dict[str, str]:
    """The experiment file and those beside it that it reads, by name; the experiment comes first.

    A file is read where another one names it in a string or imports it. Raises `UserError` where
    the packed files cannot be loaded on their own.
    """
    path = pathlib.Path(experiment)
    check(load_experiment(path))
    files: dict[str, str] = {}
    pending = [path.name]
    while pending:
        name = pending.pop(0)
        if name not in files:
            files[name] = (path.parent / name).read_text()
            pending += [
                reference
                for reference in _named(files[name])
                if (path.parent / reference).is_file()
            ]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (pathlib.Path(folder) / name).write_text(text)
        try:
            config = load_experiment(pathlib.Path(folder) / path.name)
            check(config)
            for teacher in (config.teacher, *config.more_teachers):
                if teacher and teacher.experiment:
                    check(load_experiment(teacher.experiment))
        except UserError as error:
            raise UserError(
                f"{path} needs more than the files beside it ({', '.join(files)}): {error}; put "
                "what it reads into the same folder"
            ) from None
    return files


def _named(text: str) -> list[str]:
    """Python files in a file's strings (`FILE.py` or `FILE.py:NAME`) and imports, in order."""
    references = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            references.append(node.value)
        elif isinstance(node, ast.Import):
            references += [f"{alias.name}.py" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            references.append(f"{node.module}.py")
    matches = (re.fullmatch(r"([\w-]+\.py)(:\w+)?", reference) for reference in references)
    return [match[1] for match in matches if match]


def archive() -> str:
    """The package of this checkout as a source archive that pip installs, in base64."""
    if missing := [name for name in PACKAGE if not (ROOT / name).exists()]:
        raise UserError(
            f"{ROOT} is not a checkout of fm-distill (it has no {missing[0]}), so the package "
            "cannot be put into the notebook; give --package SPEC, as for pip"
        )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name in PACKAGE:
            tar.add(ROOT / name, f"fm-distill/{name}", filter=_source_only)
    return base64.b64encode(buffer.getvalue()).decode()


def _source_only(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return None if member.name.endswith("__pycache__") else member


def make_notebook(source: pathlib.Path, values: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The notebook of `source` as JSON, with its parameters and the files of the experiment."""
    try:
        import jupytext
        import nbformat
    except ImportError:
        raise UserError(
            "notebooks are made with jupytext: pip install 'fm-distill[kits]'"
        ) from None
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    unused_values, cells = dict(values), []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            cell.source = _filled(cell.source, unused_values)
        if "hidden" in tags:
            cell.metadata |= {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}
        if "experiment" in tags:
            for name, text in files.items():
                cells.append(nbformat.v4.new_code_cell(f"%%writefile {{FILES}}/{name}\n{text}"))
        cells.append(cell)
    assert not unused_values, f"{source} has no parameters {', '.join(unused_values)}"
    for number, cell in enumerate(cells):
        # Drawn at random otherwise, and a notebook that is made twice is to be the same.
        cell.id = f"cell-{number}"
    notebook.cells = cells
    return str(jupytext.writes(notebook, fmt="ipynb"))


def _filled(source: str, values: dict[str, Any]) -> str:
    """The lines `NAME = value  # remark` of a cell with the values, which are taken out."""
    lines = []
    for line in source.splitlines():
        match = re.match(r"(([A-Z]+)(?:: \S+)? = ).*?(  # .*)?$", line)
        if match and match[2] in values:
            line = f"{match[1]}{values.pop(match[2])!r}{match[3] or ''}"
        lines.append(line)
    return "\n".join(lines)
