"""The structure: imports between rooms run one way, files stay short, libraries have one place."""

import ast
import pathlib

import pytest
from conftest import ROOT
from draw_architecture import arrows, heights, imports_of

PACKAGE = ROOT / "fm_distill"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_FLOORS = 12
MOST_LINES = 300


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def own_imports(path: pathlib.Path) -> set[str]:
    """Modules of this package that a file imports, by their name inside of it."""
    own = {m.removeprefix("fm_distill.") for m in imports_of(path) if m.startswith("fm_distill.")}
    return (own & MODULES) - {name_of(path)}


def test_imports_between_rooms_run_one_way_on_few_floors():
    assert max(heights(arrows()).values()) <= MOST_FLOORS


def test_a_circle_would_be_seen():
    with pytest.raises(RecursionError):
        heights({"a": {"b"}, "b": {"a"}})


def test_imports_between_files_have_no_circle():
    """Inside of a room too."""
    # A package's `__init__` stands for what it exports.
    heights({name_of(path): own_imports(path) for path in FILES})


def test_rooms_are_packages_and_few_files_stand_beside_them():
    beside = {x.stem for x in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(beside) <= 3


def test_no_room_has_to_be_passed():
    """Without any one room, what the rooms above it reach beside it is still reached."""
    graph = arrows()
    top = [room for room in graph if not any(room in others for others in graph.values())]

    def reached(without: str) -> set[str]:
        seen, waiting = set(), [room for room in top if room != without]
        while waiting:
            room = waiting.pop()
            if room not in seen:
                seen.add(room)
                waiting += [x for x in graph[room] if x != without]
        return seen

    for room in graph.keys() - set(top):
        assert len(graph) - 1 - len(reached(room)) <= len(graph) // 4, room


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_read_in_a_sitting(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
    assert path.stem not in ("utils", "helpers", "common")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_have_rooms(path):
    roots = {m.split(".")[0] for m in imports_of(path)}
    name = name_of(path)
    assert "flax" not in roots or name.startswith("models")
    assert "orbax" not in roots or name == "runs.checkpoint"
    assert "tensorflow" not in roots or name in (
        "weights.saved_model", "exporting.litert_conversion"
    )  # fmt: skip
    assert not roots & {"ai_edge_litert", "flatbuffers"} or name in (
        "exporting.litert_file", "exporting.litert_weights"
    )  # fmt: skip
    assert "fsspec" not in roots or name in ("runs.remote", "notebooks.backup")
    assert "huggingface_hub" not in roots or name == "weights.hub"
    assert "tensorstore" not in roots or name == "recordings.shards"
    assert "safetensors" not in roots or name in ("weights.files", "exporting.export")
    assert "matplotlib" not in roots or name == "reports.plots"
    assert "onnx" not in roots or name.startswith("exporting.onnx_")
    assert "onnxruntime" not in roots or name == "exporting.onnx_file"
    assert "IPython" not in roots or name == "notebooks.live"
    assert not roots & {"jupytext", "nbformat"} or name == "notebooks.packing"
    assert not roots & {"pickle", "torch"}
    assert "jax" not in roots or name.split(".")[0] not in ("config", "errors", "cli")


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_room_says_what_it_may_import():
    for room in arrows():
        if (PACKAGE / room).is_dir():
            text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
            assert "mport" in text, room
