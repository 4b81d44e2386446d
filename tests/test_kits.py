"""The launch kits: each notebook is executed whole, and so is the one that continues it."""

import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from xml.etree import ElementTree

import jax
import make_kernel
import make_notebook
import nbformat
import pytest
from conftest import ROOT, command_environment
from nbclient import NotebookClient

from fm_distill.cli.command import guarded
from fm_distill.errors import UserError
from fm_distill.notebooks import backup, packing
from fm_distill.notebooks.backup import fetch_copy, keep_copy, keep_file
from fm_distill.notebooks.live import run_and_show
from fm_distill.notebooks.packing import archive, pack

STEPS = 40
SHRUNK = (
    f"--schedule.total-steps {STEPS} --schedule.warmup-steps 4 --batch-size 16 "
    "--log.every-steps 1 --log.evaluate-every-steps 10 --log.tensorboard False"
).split()
# In the experiment's file: as soon as the run has logged as many lines as the file STOP says, its
# process is told to stop, as a machine does whose time is over. Once.
STOPPING = """
import os, signal, threading, time

def _stop(stop, metrics):
    while not metrics.is_file() or metrics.read_text().count("\\n") < int(stop.read_text()):
        time.sleep(0.002)
    stop.unlink()
    os.kill(os.getpid(), signal.SIGTERM)

_stop_file = pathlib.Path(os.environ.get("STOP", "none"))
if _stop_file.is_file():
    _metrics = pathlib.Path(os.environ["STOP_METRICS"])
    threading.Thread(target=_stop, args=(_stop_file, _metrics), daemon=True).start()

teacher = load_experiment("""


@pytest.fixture
def experiment(tmp_path):
    """The digits with a teacher of four steps."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name, old, new in (
        ("digits.py", "\nteacher = load_experiment(", STOPPING),
        ("digits_teacher.py", "total_steps=600, warmup_steps=60", "total_steps=4"),
    ):
        text = (ROOT / "experiments" / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    return folder / "digits.py"


def made(tool, *arguments) -> str:
    """What a tool prints, which has to be content."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert guarded(tool.main, [str(x) for x in arguments]) == 0
    return out.getvalue()


def executed(path: pathlib.Path, work: pathlib.Path, stop_after: int | None) -> tuple[str, int]:
    """Text and number of PNG pictures in the outputs of a notebook, run whole in its own kernel."""
    stop = work.parent / "stop"
    if stop_after:
        stop.write_text(str(stop_after))
    environment = command_environment() | {
        "STOP": str(stop), "STOP_METRICS": str(work / "runs" / "digits" / "metrics.jsonl"),
    }  # fmt: skip
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(work.parent)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute(env=environment)
    assert not stop.exists(), "the run was not stopped"
    text, pictures = [], 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            text.append(output.get("text", ""))
            if svg := output.get("data", {}).get("image/svg+xml"):
                assert len(list(ElementTree.fromstring(svg).iter())) > 50
                pictures += 1
    return "".join(text), pictures


def status_of(run: pathlib.Path) -> tuple[str, int]:
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["step"]


def steps_logged(run: pathlib.Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [x["step"] for x in lines if x["split"] == "train"]


def test_kaggle_in_two_sessions(experiment, tmp_path):
    """The second is made by the very line that the first prints, and is given its output."""
    work, inputs, out = (tmp_path / x for x in ("working", "input", "kernel_1"))
    said = made(
        make_kernel, experiment, "--user", "ann", "--out", out, "--package", "installed",
        "--input-dir", inputs, "--work-dir", work, "--", *SHRUNK,
    )  # fmt: skip
    assert f"kaggle kernels push -p {out} --accelerator TpuV5E8 -t 32400\n" in said
    text, pictures = executed(out / "notebook.ipynb", work, stop_after=12)
    state, paused_at = status_of(work / "runs" / "digits")
    assert state == "paused" and 8 <= paused_at < STEPS
    assert "--max-hours 8." in text and "is paused" in text
    assert pictures == 8  # views, schedule, curves; and the report's five
    next_line = text.strip().splitlines()[-1]
    assert next_line == said.strip().splitlines()[-1].strip()

    # Kaggle mounts the output of a kernel; it cannot be written.
    mounted = inputs / "notebooks" / "ann" / "fm-distill-digits-1"
    mounted.parent.mkdir(parents=True)
    work.rename(mounted)
    subprocess.run(["chmod", "-R", "a-w", mounted], check=True)
    line, push = next_line.split(" && ")
    program, tool, *arguments = shlex.split(line)
    assert (program, tool) == ("python", "tools/kaggle/make_kernel.py") and "kernel_2" in push
    made(make_kernel, *arguments)
    metadata = json.loads((tmp_path / "kernel_2" / "kernel-metadata.json").read_text())
    assert metadata["kernel_sources"] == ["ann/fm-distill-digits-1"]
    assert metadata["id"] == "ann/fm-distill-digits-2"
    try:
        text, pictures = executed(tmp_path / "kernel_2" / "notebook.ipynb", work, None)
    finally:
        subprocess.run(["chmod", "-R", "u+w", mounted], check=True)
    assert f"continuing after step {paused_at:,}" in text and "is complete" in text
    assert status_of(work / "runs" / "digits") == ("complete", STEPS)
    assert steps_logged(work / "runs" / "digits") == list(range(1, STEPS + 1))
    assert pictures == 8 and (work / "report.html").is_file()


@pytest.mark.slow
def test_colab_in_two_runtimes(experiment, tmp_path):
    """The first ends after a stretch; the second has nothing but the copy, and two stretches."""
    work, place, out = tmp_path / "content", tmp_path / "drive", tmp_path / "digits.ipynb"
    arguments = [
        experiment, "--out", out, "--keep", place.as_uri(), "--work-dir", work,
        "--package", "installed", "--overwrite",
    ]  # fmt: skip
    made(make_notebook, *arguments, "--max-hours", "0.5", "--", *SHRUNK)
    text, pictures = executed(out, work, stop_after=8)
    state, paused_at = status_of(work / "runs" / "digits")
    assert state == "paused" and 4 <= paused_at < STEPS and pictures == 8
    assert "has no copy: a new run" in text and "is paused" in text
    copies = place / "digits"
    assert sorted(x.name for x in copies.iterdir()) == ["copy-000001", "report.html"]

    shutil.rmtree(work)
    made(make_notebook, *arguments, "--max-hours", "2", "--", *SHRUNK)
    text, pictures = executed(out, work, stop_after=paused_at + 8)
    found = [int(x.replace(",", "")) for x in re.findall(r"continuing after step ([\d,]+)", text)]
    assert found[0] == paused_at and paused_at < found[1] < STEPS and len(found) == 2
    assert status_of(work / "runs" / "digits") == ("complete", STEPS)
    assert steps_logged(work / "runs" / "digits") == list(range(1, STEPS + 1))
    assert sorted(x.name for x in copies.iterdir()) == ["copy-000003", "report.html"]
    assert status_of(copies / "copy-000003") == ("complete", STEPS)
    assert pictures == 11  # those of two stretches


def test_metadata_of_a_kernel(tmp_path):
    out = tmp_path / "k"
    made(
        make_kernel, ROOT / "experiments" / "flowers102.py", "--user", "ann", "--out", out,
        "--dataset", "bob/more", "--model", "google/bit/tensorFlow2/r152x2/1",
        "--no-internet", "--package", "ann/wheels", "--accelerator", "TpuV6E8",
        "--kernel", "ann/teacher-1", "--session", "2",
        "--", "--data.data-dir", "@ann/flowers", "--teacher.workdir", "@ann/teacher-1/runs/t",
        "--student.weights", "@ann/bit/B.npz",
    )  # fmt: skip
    assert json.loads((out / "kernel-metadata.json").read_text()) == {
        "id": "ann/fm-distill-flowers102-2",
        "title": "fm-distill-flowers102-2",
        "code_file": "notebook.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": "true",
        "enable_gpu": "false",
        "enable_tpu": "true",
        "enable_internet": "false",
        "machine_shape": "TpuV6E8",
        "dataset_sources": ["bob/more", "ann/flowers", "ann/bit", "ann/wheels"],
        "competition_sources": [],
        "kernel_sources": ["ann/fm-distill-flowers102-1", "ann/teacher-1"],
        "model_sources": ["google/bit/tensorFlow2/r152x2/1"],
    }


KERNEL = ["--user", "ann", "--out", "{out}"]


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        (make_kernel, [*KERNEL, "--accelerator", "TpuV9"], "expected one of\n  TpuV5E8 "),
        (make_kernel, [*KERNEL, "--user", "ann/x"], "--user is 'ann/x'"),
        (make_kernel, [*KERNEL, "--slug", "Digits_1"], "--slug is 'Digits_1'"),
        (make_kernel, [*KERNEL, "--max-hours", "9"], "a session has 9 hours"),
        (make_kernel, [*KERNEL, "--max-hours", "0"], "--max-hours is 0"),
        (make_kernel, [*KERNEL, "--session", "0"], "--session is 0"),
        (make_kernel, [*KERNEL, "--dataset", "flowers"], "expected OWNER/SLUG"),
        (make_kernel, [*KERNEL, "--kernel", "a/b/c"], "--kernel is 'a/b/c'"),
        (make_kernel, [*KERNEL, "--model", "a/b"], "OWNER/MODEL/FRAMEWORK/VARIATION/VERSION"),
        (make_kernel, [*KERNEL, "--no-internet"], "data set of wheels"),
        (make_kernel, ["--user", "ann", "--out", "{full}"], "is not empty"),
        (make_kernel, [*KERNEL, "--", "--objective.temperature", "0"], "above zero"),
        (make_kernel, [*KERNEL, "--", "--max-hours", "3"], "--max-hours"),
        (make_notebook, ["--out", "{out}"], "expected the name of an .ipynb file"),
        (make_notebook, ["--out", "{full}/x.ipynb"], "already exists"),
        (make_notebook, ["--out", "{out}.ipynb", "--keep", "drive"], "--keep is 'drive'"),
        (make_notebook, ["--out", "{out}.ipynb", "--stretch-hours", "0"], "above zero"),
    ],
)
def test_wrong_input(capsys, tmp_path, tool, arguments, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.ipynb").write_text("precious")
    places = {"out": tmp_path / "out", "full": tmp_path / "full"}
    line = [str(ROOT / "experiments" / "digits.py"), *(x.format(**places) for x in arguments)]
    try:
        code = guarded(tool.main, line)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2 and said in capsys.readouterr().err
    assert [x.name for x in tmp_path.rglob("*")] == ["full", "x.ipynb"]
    assert (tmp_path / "full" / "x.ipynb").read_text() == "precious"


def test_what_is_no_experiment(capsys, tmp_path):
    for text, said in (("x = 3", "defines no `config"), (None, "there is no experiment file")):
        path = tmp_path / "x.py"
        if text:
            path.write_text(text)
        assert guarded(make_kernel.main, [str(path), "--user", "ann", "--out", "k"]) == 2
        assert said in capsys.readouterr().err
        path.unlink(missing_ok=True)


def test_an_experiment_is_packed_with_all_that_it_reads(tmp_path):
    for names in (
        ["flowers102_lite_labels.py", "flowers102_lite.py", "flowers102.py"],
        ["digits_labels.py", "digits.py", "digits_teacher.py"],
    ):
        found = pack(ROOT / "experiments" / names[0])
        assert found == {name: (ROOT / "experiments" / name).read_text() for name in names}
    (tmp_path / "far").mkdir()
    shutil.copy(ROOT / "experiments" / "digits_teacher.py", tmp_path / "far" / "t.py")
    (tmp_path / "x.py").write_text(
        "import pathlib\nfrom fm_distill import load_experiment\n"
        "config = load_experiment(pathlib.Path(__file__).parent / 'far/t.py')\n"
    )
    with pytest.raises(UserError, match=r"needs more than the files beside it \(x.py\)"):
        pack(tmp_path / "x.py")


def test_own_parts_are_packed(tmp_path):
    (tmp_path / "my-parts.py").write_text(
        "def huber(student, teacher, temperature):\n    return (student - teacher).sum(-1)\n"
    )
    shutil.copy(ROOT / "experiments" / "digits_teacher.py", tmp_path / "base.py")
    (tmp_path / "x.py").write_text(
        "import dataclasses, pathlib\nfrom fm_distill import load_experiment\n"
        "from fm_distill.config import ObjectiveConfig, TeacherConfig\n"
        "config = dataclasses.replace(\n"
        "    load_experiment(pathlib.Path(__file__).with_name('base.py')),\n"
        "    objective=ObjectiveConfig(distance='my-parts.py:huber'),\n"
        "    teacher=TeacherConfig(workdir='runs/teacher'))\n"
    )
    assert set(pack(tmp_path / "x.py")) == {"x.py", "base.py", "my-parts.py"}


def install_cells(path: pathlib.Path) -> str:
    """The code of a notebook up to the installation."""
    cells = [x.source for x in nbformat.read(path, as_version=4).cells if x.cell_type == "code"]
    last = next(i for i, x in enumerate(cells) if "def install(" in x)
    return "\n".join(cells[: last + 1])


@pytest.mark.parametrize("tool", [make_kernel, make_notebook])
def test_the_package_comes_along_and_jax_stays(tmp_path, tool, monkeypatch):
    """The command for pip, the archive that it is given, and what it must not replace."""
    out = tmp_path / "made.ipynb"
    digits = ROOT / "experiments" / "digits.py"
    if tool is make_kernel:
        made(tool, digits, "--user", "ann", "--out", tmp_path, "--work-dir", tmp_path / "w")
        out = tmp_path / "notebook.ipynb"
    else:
        made(tool, digits, "--out", out, "--keep", "/x", "--work-dir", tmp_path / "w")
    asked = asked_of_pip(install_cells(out), monkeypatch)
    wanted = next(x for x in asked if x.startswith("fm-distill"))
    packed = pathlib.Path(wanted.removeprefix("fm-distill[plots] @ file://"))
    with tarfile.open(packed) as tar:
        names = set(tar.getnames())
        inside = tar.extractfile("fm-distill/fm_distill/train_step/step.py").read()
    assert inside == (ROOT / "fm_distill" / "train_step" / "step.py").read_bytes()
    modules = [p.relative_to(ROOT) for p in (ROOT / "fm_distill").rglob("*.py")]
    assert {f"fm-distill/{p}" for p in [*modules, "pyproject.toml", "README.md"]} <= names
    assert not any("__pycache__" in x for x in names)
    kept = pathlib.Path(asked[asked.index("--constraint") + 1]).read_text().splitlines()
    assert f"jax=={jax.__version__}" in kept and not any("jaxtyping" in x for x in kept)
    assert any(x.startswith("jaxlib==") for x in kept)
    assert archive() == archive()


def test_without_internet_wheels_come_from_a_data_set(tmp_path, monkeypatch):
    wheels = tmp_path / "input" / "datasets" / "ann" / "wheels" / "deeper"
    wheels.mkdir(parents=True)
    (wheels / "fm_distill-0.1.0-py3-none-any.whl").touch()
    made(
        make_kernel, ROOT / "experiments" / "digits.py", "--user", "ann", "--out", tmp_path / "k",
        "--no-internet", "--package", "ann/wheels", "--input-dir", tmp_path / "input",
        "--work-dir", tmp_path / "w",
    )  # fmt: skip
    code = install_cells(tmp_path / "k" / "notebook.ipynb")
    asked = asked_of_pip(code, monkeypatch)
    assert asked[-3:] == ["--no-index", f"--find-links={wheels}", "fm-distill[plots]"]
    shutil.rmtree(tmp_path / "input")
    with pytest.raises(RuntimeError, match="the input ann/wheels is not under"):
        asked_of_pip(code, monkeypatch)


def asked_of_pip(code: str, monkeypatch) -> list[str]:
    commands = []

    def run(command, **options):
        commands.append(command)
        return types.SimpleNamespace(stdout="", stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    exec(compile(code, "notebook", "exec"), {})
    assert commands[0][1:4] == ["-m", "pip", "install"]
    return commands[0]


@pytest.mark.parametrize("scheme", ["memory://kept", "{tmp}/kept", "file://{tmp}/kept"])
def test_copies_are_whole_or_not_there(trained, tmp_path, monkeypatch, scheme):
    place = scheme.format(tmp=tmp_path) + "/run"
    run = shutil.copytree(trained / "run", tmp_path / "run")
    assert fetch_copy(place, tmp_path / "none") is None
    assert keep_copy(run, place).endswith("copy-000001")
    files, root = backup._open(place)
    real, calls = files.put_file, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) == 5:
            raise OSError("the drive is full")
        real(*paths)

    monkeypatch.setattr(type(files), "put_file", lambda self, *paths: failing(*paths))
    with pytest.raises(UserError, match="the drive is full"):
        keep_copy(run, place)
    assert sorted(backup._folders(files, root)) == [1, 2] and backup._copies(files, root) == [1]
    (run / "metrics.jsonl").write_text("newer")
    assert (fetch_copy(place, tmp_path / "a") / "metrics.jsonl").read_text() != "newer"
    assert keep_copy(run, place).endswith("copy-000003")
    assert backup._folders(files, root) == [3]
    copy = fetch_copy(place, tmp_path / "b")
    for path in run.rglob("*"):
        if path.is_file() and path.name != "lock":
            assert (copy / path.relative_to(run)).read_bytes() == path.read_bytes()
    assert keep_file(run / "config.json", place).endswith("run/config.json")
    files.rm(root, recursive=True)


def test_an_interrupted_cell_stops_the_command_politely(tmp_path, capsys):
    """By SIGTERM, to which `fm-distill train` answers with a checkpoint; its last word is shown."""
    polite = (
        "import signal, sys, time\n"
        "def stop(*_): print('a checkpoint', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )

    def interrupt():
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGINT)

    # As in a notebook: a shell starts what runs in the background with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        assert run_and_show([sys.executable, "-c", polite], tmp_path / "run") == 75
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.endswith("ready\na checkpoint\n")


def test_a_picture_that_fails_does_not_stop_the_training(tmp_path, capsys, monkeypatch):
    def failing(screen):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr("fm_distill.notebooks.live.Screen.draw", failing)
    assert run_and_show([sys.executable, "-c", "print('trained')"], tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "trained\n" in printed
    assert "no picture of the run: ModuleNotFoundError: No module named 'matplotlib'" in printed


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    with pytest.raises(UserError, match=r"pip install 'fm-distill\[kits\]'"):
        packing.make_notebook(tmp_path, {}, {})
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="pip install fsspec"):
        keep_copy(tmp_path, "memory://x")
    with pytest.raises(UserError, match="cannot be opened"):
        monkeypatch.undo()
        keep_copy(tmp_path, "nonsense://x")
