"""Every shell block of the README runs, and what it names exists."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, command_environment

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
# Lines that need what this machine has not: each with the reason why it is only looked at.
NOT_RUN = {
    "pip install": "installs into the running environment; .ci/run does that",
    "git clone": "needs the network",
    "pytest": "this is pytest",
    "tfds build": "needs TensorFlow and the network",
    "kaggle kernels push": "needs a Kaggle account",
    "--teacher.weights": "needs a weight file of gigabytes",
    "--resume-from": "needs a run that was stopped elsewhere; tests/test_patience.py has one",
}


def lines_of(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    return [x.split("  #")[0].strip() for x in joined.splitlines() if x.strip()]


LINES = [part.strip() for block in BLOCKS for x in lines_of(block) for part in x.split(" && ")]


def reason_of(line: str) -> str | None:
    return next((why for mark, why in NOT_RUN.items() if mark in line), None)


def test_the_two_commands_stand_first():
    assert LINES[:2] == ["pip install -e '.[quickstart]'", "fm-distill train experiments/digits.py"]
    assert "pytest" in LINES


PROGRAMS = {"fm-distill": f"{sys.executable} -m fm_distill", "python": sys.executable}
SHRUNK = "--schedule.total-steps 2 --log.tensorboard False"


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
    """A folder like a checkout, with a finished run of the README's name and own images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    shutil.copytree(ROOT / "tools", folder / "tools")
    teacher = folder / "experiments" / "digits_teacher.py"
    teacher.write_text(teacher.read_text().replace("total_steps=600", "total_steps=2"))
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(130):
                image = Image.new("RGB", (30, 40), (i, 0, 0))
                image.save(folder / "photos" / split / name / f"{i}.png")
    Image.new("RGB", (30, 40)).save(folder / "photo.jpg")
    run(next(x for x in LINES if "train" in x and "--workdir runs/mine" in x), folder)
    return folder


def run(line: str, place) -> None:
    if line.startswith(("fm-distill train", "fm-distill sweep")):
        line = f"{line} {SHRUNK}"
    program, options = line.split(" ", 1)
    environment = command_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        f"{PROGRAMS[program]} {options}",
        shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("line", [x for x in LINES if not reason_of(x)])
def test_line_runs(line, place):
    run(line, place)


@pytest.mark.parametrize("line", [x for x in LINES if reason_of(x) and "fm-distill" in x])
def test_line_that_is_not_run_names_real_options(line):
    words = line.split()
    options = [x.split("=")[0] for x in words if x.startswith("--")]
    help_ = subprocess.run(
        [sys.executable, "-m", "fm_distill", words[1], words[2], "--help"],
        cwd=ROOT, env=command_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert help_.returncode == 0, help_.stderr
    for option in options:
        assert option in help_.stdout, option


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:fm_distill|experiments|tests|tools)/[\w./]+)`", README))
    assert named
    for name in named:
        assert os.path.exists(ROOT / name), name
