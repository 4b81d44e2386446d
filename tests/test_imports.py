"""What an import or a command's help costs: JAX comes only with what computes."""

import pkgutil
import subprocess
import sys

import pytest
from conftest import ROOT, command_environment

import fm_distill

HEAVY = ("jax", "flax", "optax", "orbax", "tensorflow_datasets", "grain")


def imported_by(code: str) -> set[str]:
    """Names of the heavy libraries that a fresh process has imported after `code`."""
    code += f"\nimport sys\nprint('HEAVY', *[x for x in {HEAVY} if x in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=command_environment(), cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import fm_distill",
        "import fm_distill.config",
        "from fm_distill import Config, UserError",
        "from fm_distill.cli.main import main\ntry:\n main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_no_jax_where_nothing_is_computed(code):
    assert imported_by(code) == set()


def test_what_computes_brings_jax():
    assert "jax" in imported_by("from fm_distill import train")


def test_each_public_name_is_one_thing():
    """No name is a package or module beside being a function."""
    modules = {x.name for x in pkgutil.iter_modules(fm_distill.__path__)}
    assert not modules & set(fm_distill.__all__)
    for name in fm_distill.__all__:
        assert callable(getattr(fm_distill, name)), name
    assert set(fm_distill.__all__) == set(fm_distill._MODULES) <= set(dir(fm_distill))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        fm_distill.distil  # noqa: B018
