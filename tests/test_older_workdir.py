"""A workdir of an older layout: one sentence, exit code 2, and nothing in it changes.

`data/older_config.json` was written by commit bb193ca, for `experiments/digits_teacher.py`.
"""

import json
import pathlib
import shutil

import pytest
from tiny import resolved_run, tiny_config

from fm_distill.cli.main import main
from fm_distill.config import TeacherConfig
from fm_distill.config.serialization import differences
from fm_distill.errors import EXIT_WRONG_INPUT
from fm_distill.runs.stored_run import describe_run, stored_run

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


def test_a_run_without_fields_of_later_versions_is_the_same_run():
    """A field that came later has its default, also where two configs are compared."""
    config = tiny_config(teacher=TeacherConfig(workdir="x"))
    resolved = resolved_run(tiny_config())
    tree = describe_run(config, resolved, ())
    for part, name in (
        ("views", "period_steps"), ("student", "seed"), ("teacher", "recording"),
        ("teacher", "function"),
    ):  # fmt: skip
        del tree["config"][part][name]
    del tree["config"]["objective"]["example_weights"], tree["config"]["data"]["long_tail"]
    for name in ("recording", "period_steps", "code", "class_counts", "code_files"):
        del tree["resolved"][name]
    stored = stored_run(tree, pathlib.Path("config.json"))
    assert vars(stored.config.student)["seed"] is None
    assert differences(stored.config, config) == []
    assert stored.resolved.differences(resolved) == [] == resolved.differences(stored.resolved)


def write_before_options(path: pathlib.Path) -> None:
    """A BiT's run as it was stored when its settings lay beside its model."""
    tree = describe_run(tiny_config(), resolved_run(tiny_config()), ())
    for network in (tree["config"]["student"], tree["resolved"]["student"]):
        network |= network.pop("options")
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("write", [lambda x: shutil.copy(CONFIG, x), write_before_options])
@pytest.mark.parametrize("name", COMMANDS)
def test_an_older_workdir_is_refused(name, write, tmp_path, capsys):
    run, new = tmp_path / "run", tmp_path / "new"
    (run / "checkpoints").mkdir(parents=True)
    write(run / "config.json")
    before = {x: x.read_bytes() for x in run.rglob("*") if x.is_file()}
    with pytest.raises(SystemExit) as exit_code:
        main([x.format(run=run, new=new) for x in COMMANDS[name]])
    assert exit_code.value.code == EXIT_WRONG_INPUT
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "older version of fm-distill" in message and "another workdir" in message
    assert {x: x.read_bytes() for x in run.rglob("*") if x.is_file() and x.name != "lock"} == before
    assert not [x for x in tmp_path.glob("new*/*") if x.name not in ("lock", "compiled")]
