"""The documentation: the site builds, its commands and Python blocks run, what it names exists."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import draw_architecture
import pytest
from conftest import ROOT, command_environment, run_command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
MOST_LINES_OF_THE_README = 160

# Commands that no parser of ours knows, each with the reason why it is not run.
NOT_OURS = {
    "pip install": "installs into the running environment; .ci/run does that",
    "pytest": "this is pytest",
    "tfds build": "needs TensorFlow and the network",
    "kaggle kernels push": "needs a Kaggle account",
    "tensorboard": "is not installed here",
}
# Commands that only the command line's own parser reads, each with the reason.
ONLY_PARSED = {
    "--teacher.weights": "needs a weight file of gigabytes",
    "hf://": "needs the network",
    "--resume-from": "needs a run that was stopped elsewhere; tests/test_patience.py has one",
    "--topology v": "takes the TPU compiler minutes; tests/test_plan.py has one",
    "plan_table.py": "takes the TPU compiler minutes",
    "--over seed=0,1,2": "is six runs; the start page has a shorter one",
    "--workdir runs/digits_teacher": "is what the first command trains before its student",
    "my_parts.py:Small": "is on the page itself; tests/test_own_parts.py trains one like it",
    "runs/mine --cost": "takes a minute; tests/test_cost.py measures smaller networks",
    "--student.pruning.begin-step": "prunes after the two steps; tests/test_pruning.py has one",
    "--student.pruning.criterion taylor": "is long; tests/test_shrinking.py runs one like it",
    "fm-distill demo": "serves until it is interrupted; tests/test_demo.py has one",
    "experiments/photos": "takes weights from the network; tests/test_experiments.py runs both",
    "runs/photos": "is the run of the page's own commands, which are not run",
    "photos.onnx": "is the export of that run",
    "--max-hours 8.5": "is the first command but for its hours",
}


def commands() -> list[str]:
    """Every command of every page, once."""
    found = []
    for text in TEXTS.values():
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found += line.split("  #")[0].strip().split(" && ")
    return [x for x in dict.fromkeys(found) if x]


LINES = commands()
OURS = [x for x in LINES if not x.startswith(tuple(NOT_OURS))]
PARSED = [x for x in OURS if any(mark in x for mark in ONLY_PARSED)]
RUN = [x for x in OURS if x not in PARSED]
PROGRAMS = {"fm-distill": f"{sys.executable} -m fm_distill", "python": sys.executable}
SHRUNK = "--schedule.total-steps 2 --log.tensorboard False"


def test_the_two_commands_stand_first_and_the_readme_is_short():
    assert LINES[:2] == ["pip install -e '.[quickstart]'", "fm-distill train experiments/digits.py"]
    assert "pytest" in LINES
    assert len(TEXTS["README.md"].splitlines()) <= MOST_LINES_OF_THE_README


def test_every_mark_is_needed():
    for mark in NOT_OURS:
        assert any(x.startswith(mark) for x in LINES), mark
    for mark in ONLY_PARSED:
        assert any(mark in x for x in LINES), mark


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a checkout, with short experiments, a complete run and own images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    shutil.copytree(ROOT / "tools", folder / "tools")
    for name, steps in (("digits_teacher", "total_steps=600"), ("digits", "total_steps=2500")):
        path = folder / "experiments" / f"{name}.py"
        assert steps in path.read_text()
        path.write_text(path.read_text().replace(steps, "total_steps=2"))
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(130):
                image = Image.new("RGB", (30, 40), (i, 0, 0))
                image.save(folder / "photos" / split / name / f"{i}.png")
    Image.new("RGB", (30, 40)).save(folder / "photo.jpg")
    run(next(x for x in LINES if "--workdir runs/mine" in x), folder)
    shutil.copytree(folder / "runs" / "mine" / "teacher", folder / "runs" / "digits_teacher")
    (folder / "runs" / "photos").symlink_to("mine")
    return folder


def run(line: str, place) -> None:
    if line.startswith(("fm-distill train", "fm-distill sweep", "fm-distill record")):
        line = f"{line} {SHRUNK}"
    if " runs/mine --out " in line or " export runs/mine " in line:
        line = f"{line} --overwrite" if "--overwrite" not in line else line  # two pages write it
    program, *options = shlex.split(line)
    if program == "fm-distill" and ">" not in options:
        done = run_command(*options, cwd=place, timeout_s=900)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    else:
        shell(line.replace(program, PROGRAMS[program], 1), place)


def shell(command: str, place) -> str:
    environment = command_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# Each takes long, and its parts have tests of their own or a shorter sibling here.
LONG = (
    "experiments/own_images",
    "--out diagnosis.html",
    "fm-distill sweep",
    "fm-distill compress",
    "fm-distill plan",
    "mine_int8.onnx",
    "runs/features",
    "runs/half",
    "runs/int8",
    "fm-distill bench runs/mine",
    "runs/tail",
    "runs/progressive",
    "runs/warmer",
)


def marked(line):
    return pytest.param(line, marks=pytest.mark.slow) if any(x in line for x in LONG) else line


@pytest.mark.parametrize("line", map(marked, RUN))
def test_command_runs(line, place):
    run(line, place)


# Runs each command up to the moment at which its options are parsed.
PARSE = """
import argparse, json, runpy, shlex, sys
import tyro
from fm_distill.cli.main import main

class Parsed(BaseException):
    pass

def stopping(parse):
    def parse_and_stop(*arguments, **options):
        parse(*arguments, **options)
        raise Parsed
    return parse_and_stop

tyro.cli = stopping(tyro.cli)
reached = []
for line in json.load(sys.stdin):
    program, *arguments = shlex.split(line)
    try:
        if program == "fm-distill":
            main(arguments)
        else:
            argparse.ArgumentParser.parse_args = stopping(argparse.ArgumentParser.parse_args)
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except Parsed:
        reached.append(line)
    except SystemExit as stop:
        print(line, stop.code, file=sys.stderr)
print(json.dumps(reached))
"""


def parsed(lines: list[str], place) -> list[str]:
    """Those of `lines` whose options the program's own parser accepts."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(lines), cwd=place, text=True,
        env=command_environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_commands_that_are_not_run_are_parsed(place):
    wrong = f"fm-distill train experiments/digits.py {SHRUNK} --optimizer.learning-rat 1"
    assert PARSED
    assert parsed([*PARSED, wrong], place) == PARSED


OWN_LOOP = re.findall(r"```python\n(.*?)```", TEXTS["docs/own-loop.md"], flags=re.DOTALL)[0]

# What blocks do here instead: few steps, one seed, and no TPU compiler.
SHORTER = {"2500": "2", "(0, 1, 2)": "(0,)", '"v3-8"': '"cpu:1"'}
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}", marks=[pytest.mark.slow] if "sweep(" in block else [])
    for name, text in TEXTS.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    if block != OWN_LOOP  # has a test of its own
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block, place):
    compile(block, "block", "exec")
    if "import timm" in block:
        pytest.importorskip("timm")
    for long, short in SHORTER.items():
        block = block.replace(long, short)
    (place / "block.py").write_text(block)
    shell(f"{sys.executable} block.py", place)


# How far the loop's student is from the run's, as a share of how far both moved.
APART = """
def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.abs(x - y).sum()) for x, y in pairs)

trained = load_pretrained("runs/digits", None, "teacher").variables.params
print(distance(state.student.params, trained) / distance(start, trained))
"""


def test_own_loop_trains_the_student_that_the_command_trains(place):
    run("fm-distill train experiments/digits.py", place)
    own = [x for x in OWN_LOOP.splitlines() if x and not x.startswith(("from ", "import "))]
    assert len(own) < 30
    block = OWN_LOOP.replace("2500", "2").replace("runs/digits_teacher", "runs/digits/teacher")
    block = block.replace("\n\n\n@jax.jit", "\nstart = state.student.params\n\n\n@jax.jit")
    (place / "loop.py").write_text(block + APART)
    assert float(shell(f"{sys.executable} loop.py", place).splitlines()[-1]) < 0.05


def test_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    # A docstring, and the comment of a field.
    assert "Trains the run of" in api and "True height and width on the canvas" in api
    assert (tmp_path / "site" / "experiments" / "LOG" / "index.html").is_file()


def test_picture_of_the_architecture_is_current():
    """If not: `python tools/draw_architecture.py`."""
    assert draw_architecture.draw() == draw_architecture.PICTURE.read_text()


def test_rooms_stand_above_what_they_import():
    levels = draw_architecture.floors({"top": ["low", "mid"], "mid": ["low"], "low": []})
    assert levels == [["low"], ["mid"], ["top"]]
    graph = draw_architecture.arrows()
    assert "models" in graph["networks"] and graph["errors"] == []


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_named_exists(name):
    text, folder = TEXTS[name], (ROOT / name).parent
    for path in re.findall(r"`((?:fm_distill|experiments|tests|tools|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert f": {page.name}\n" in navigation, page.name
