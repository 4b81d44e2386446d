"""The shape of the house: imports run one way, files stay short, libraries have rooms."""

import ast
import pathlib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "fm_distill"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file may import those of its own line before it, and of the lines above.
ORDER = [
    ["errors", "topologies", "hlo", "config.data", "config.networks", "config.training"],
    ["config"],
    ["length", "identity", "stopping", "processes", "digests", "command_line"],
    ["views", "distances", "sharding", "metrics"],
    [
        "models.contract",
        "models.layers",
        "models.pooling",
        "models.assembly",
        "models.inverted_residual",
    ],
    ["models.bit", "models.efficientnet_lite", "models.mobilenet_v3", "models.keras_resnet_v2"],
    ["models", "optim"],
    ["memory"],
    [
        "data.order",
        "data.images",
        "data.sources",
        "data.transfer",
        "data.feeding",
        "data.resident",
        "data",
    ],
    ["step"],
    [
        "weights.names",
        "weights.card",
        "weights.hub",
        "weights.structure",
        "weights.saved_model",
        "weights.files",
        "weights.description",
        "weights.load",
        "weights",
        "checkpoint",
        "evaluate",
        "probe",
        "build",
        "experiment",
        "workdir",
        "rollback",
        "bucket",
        "bring",
        "compiled",
        "status",
        "run",
    ],
    ["networks", "targets"],
    ["setup", "reporter", "resume", "loop"],
    ["compile_step", "plan", "plan_text"],
    ["train", "inference", "sweep", "export"],
    ["history", "shown", "answers", "figures", "report"],
    ["kits", "keep", "watch"],
    [""],
    ["cli_train", "cli_plan", "cli", "__main__"],
]
RANK = {name: (i, j) for i, line in enumerate(ORDER) for j, name in enumerate(line)}


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: pathlib.Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    own = {m.removeprefix("fm_distill.") for m in imports_of(path) if m.startswith("fm_distill.")}
    for imported in (own & RANK.keys()) - {name_of(path)}:
        assert RANK[imported] < RANK[name_of(path)], f"{path} imports {imported}"


def test_every_file_has_its_place():
    assert {name_of(p) for p in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_read_in_a_sitting(path):
    assert len(path.read_text().splitlines()) <= 300
    assert path.stem != "utils"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_have_rooms(path):
    roots = {m.split(".")[0] for m in imports_of(path)}
    name = name_of(path)
    assert "flax" not in roots or name.startswith("models")
    assert "orbax" not in roots or name == "checkpoint"
    assert "tensorflow" not in roots or name == "weights.saved_model"
    assert "fsspec" not in roots or name in ("bucket", "keep")
    assert "huggingface_hub" not in roots or name == "weights.hub"
    assert "safetensors" not in roots or name in ("weights.files", "export")
    assert "matplotlib" not in roots or name == "figures"
    assert "IPython" not in roots or name == "watch"
    assert not roots & {"jupytext", "nbformat"} or name == "kits"
    assert not roots & {"pickle", "torch"}
    assert "jax" not in roots or name.split(".")[0] not in ("config", "errors", "cli")


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
