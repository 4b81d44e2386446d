"""Eight simulated devices, experiment files, and the real command in processes."""

import fcntl
import os
import pathlib
import shutil
import sys
import tempfile

import jax
import pytest
from command_server import CommandServer, rare_collections
from xdist.scheduler import LoadFileScheduling

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT / "tools" / x) for x in ("", "kaggle", "colab")]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Most of the time goes into compiling programs that then run for milliseconds: XLA does as little
# as it can. And one folder for all processes of a session, which compile the same programs and need
# the same trained run. Both are inherited by the workers and commands that are started.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
SESSION_VARIABLE = "FM_DISTILL_TESTS_SESSION"
if SESSION_VARIABLE not in os.environ:
    KEPT_UNTIL_EXIT = tempfile.TemporaryDirectory(prefix="fm_distill_tests_")
    os.environ[SESSION_VARIABLE] = KEPT_UNTIL_EXIT.name
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
SESSION = pathlib.Path(os.environ[SESSION_VARIABLE])
CACHE = str(SESSION / "programs")
jax.config.update("jax_compilation_cache_dir", CACHE)
# Hundreds of small programs of a command take a second together.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

TINY = """
import sys
import tempfile
sys.path.insert(0, {tests!r})
from tiny import tiny_config
from fm_distill.config import *
config = tiny_config({changes})
"""


def write_experiment(path: pathlib.Path, changes: str = "") -> pathlib.Path:
    """An experiment file with `tiny_config(changes)`."""
    path.write_text(TINY.format(tests=str(ROOT / "tests"), changes=changes))
    return path


def run_command(*arguments, cwd=ROOT, devices: int = 1, timeout_s: float = 300):
    """The real command in a process of its own."""
    return SERVER.run([str(x) for x in arguments], cwd, command_environment(devices), timeout_s)


def command_environment(devices: int = 1) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


SERVER = CommandServer(command_environment())

# The tests of a file run in one process, one after another, but those of these files run wherever
# there is room: long ones, none of which needs another.
SPREAD = {
    "test_experiments",
    "test_faults",
    "test_kits",
    "test_patience",
    "test_regimes_run",
    "test_step",
    "test_sweep",
    "test_train",
}


class Spreading(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return nodeid if pathlib.PurePath(file).stem in SPREAD else file


def pytest_xdist_make_scheduler(config, log):
    return Spreading(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_finish(session):
    rare_collections()


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> pathlib.Path:
    """The workdir of a complete student of a complete teacher, and the experiment files."""
    kept = SESSION / "trained"
    with open(f"{kept}.lock", "w") as lock:  # one process trains, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (kept / "run" / "evaluation.json").exists():
            train_student_and_teacher(kept)
    # Tests move the run and write into it: each process has a copy of its own.
    return shutil.copytree(kept, tmp_path_factory.mktemp("copied") / "trained")


def train_student_and_teacher(folder: pathlib.Path) -> None:
    folder.mkdir(exist_ok=True)
    write_experiment(folder / "teacher.py")
    write_experiment(
        folder / "student.py",
        'teacher=TeacherConfig(experiment="teacher.py"), ema_decay=0.5, '
        "objective=ObjectiveConfig(temperature=2.0)",
    )
    done = run_command("train", folder / "student.py", "--workdir", folder / "run")
    assert done.returncode == 0, done.stderr
