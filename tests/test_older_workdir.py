"""A workdir of an older layout: one sentence, exit code 2, and nothing in it changes.

`data/older_config.json` was written by commit bb193ca, for `experiments/digits_teacher.py`.
"""

import pathlib
import shutil

import pytest

from fm_distill.cli.main import main
from fm_distill.errors import EXIT_WRONG_INPUT

CONFIG = pathlib.Path(__file__).parent / "data" / "older_config.json"
TEACHER = "experiments/digits_teacher.py"
COMMANDS = {
    "train": ("train", TEACHER, "--workdir", "{run}"),
    "resume from": ("train", TEACHER, "--workdir", "{new}", "--resume-from", "{run}"),
    "teacher": (
        "train",
        "experiments/digits.py",
        "--workdir",
        "{new}",
        "--teacher.workdir",
        "{run}",
    ),
    "evaluate": ("evaluate", "{run}"),
    "predict": ("predict", "{run}", "photo.png"),
    "export": ("export", "{run}", "{new}.safetensors"),
    "report": ("report", "{run}", "--out", "{new}.html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_older_workdir_is_refused(name, tmp_path, capsys):
    run, new = tmp_path / "run", tmp_path / "new"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(CONFIG, run / "config.json")
    before = {x: x.read_bytes() for x in run.rglob("*") if x.is_file()}
    with pytest.raises(SystemExit) as exit_code:
        main([x.format(run=run, new=new) for x in COMMANDS[name]])
    assert exit_code.value.code == EXIT_WRONG_INPUT
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "older version of fm-distill" in message and "another workdir" in message
    assert {x: x.read_bytes() for x in run.rglob("*") if x.is_file() and x.name != "lock"} == before
    assert not [x for x in tmp_path.glob("new*/*") if x.name not in ("lock", "compiled")]
