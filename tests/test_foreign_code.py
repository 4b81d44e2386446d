"""Runs, exports and recordings of others that name code: none of it runs before its reader agrees.

Each part lies in a file of its own, which leaves a mark beside itself where it is run.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_cli import refused
from tiny import NETWORK, resolved_run, tiny_config

from fm_distill import predict, trusted_code
from fm_distill.cli.main import main
from fm_distill.config import (
    LogConfig,
    MeshConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeacherConfig,
)
from fm_distill.errors import UserError
from fm_distill.exporting.export import export
from fm_distill.exporting.load_student import load_student
from fm_distill.networks.teachers import recorded_teachers
from fm_distill.planning.plan import described_teachers
from fm_distill.recordings.manifest import Recording
from fm_distill.system.foreign_code import code_files, file_of, refuse_foreign_code
from fm_distill.training.recorded import make_header
from fm_distill.training.train import train

MARKED = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').write_text('')\n"
SMALL = """
import flax.linen as nn

class Small(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(images))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))
"""
PARTS = {
    "student": ("Small", SMALL),
    "teacher": ("Small", SMALL),
    "source": (
        "digits",
        "from fm_distill.data.sources import SOURCES\ndigits = SOURCES['digits']",
    ),
    "crop": (
        "boxes",
        "from fm_distill.views.crops import CROPS\nboxes = CROPS['whole']",
    ),
    "distance": (
        "far",
        "from fm_distill.objectives.distances import DISTANCES\nfar = DISTANCES['kl']",
    ),
    "optimizer": (
        "best",
        "from fm_distill.train_step.optim import OPTIMIZERS\nbest = OPTIMIZERS['adam']",
    ),
}
# The commands that would run the part, with the workdir in their first place.
OTHERS = ("diagnose", "profile", "compress", "report")
RUN_BY = {
    "student": ("evaluate", "predict", "export", "function", "demo", "bench", *OTHERS),
    "teacher": ("evaluate", *OTHERS),
    "source": ("evaluate", "function", *OTHERS),
    "crop": ("evaluate", *OTHERS),
    "distance": OTHERS,
    "optimizer": ("diagnose", "profile", "compress"),
}
COMMANDS = {
    "evaluate": ("evaluate", "{run}"),
    "predict": ("predict", "{run}", "{new}/image.npy"),
    "export": ("export", "{run}", "{new}/student.safetensors"),
    "function": ("export", "{run}", "{new}/student.stablehlo"),
    "report": ("report", "{run}", "--out", "{new}/report.html"),
    "diagnose": ("diagnose", "{run}"),
    "profile": ("profile", "{run}"),
    "demo": ("demo", "{run}", "--port", "0"),
    "bench": ("bench", "{run}"),
    "compress": ("compress", "{run}", "--steps", "quantise:int8", "--to", "{new}/smaller"),
}


def named(folder: pathlib.Path, part: str) -> str:
    return f"{folder / part}.py:{PARTS[part][0]}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The complete run of a student with a custom part at every place."""
    folder = tmp_path_factory.mktemp("made")
    for part, (_, text) in PARTS.items():
        (folder / f"{part}.py").write_text(MARKED + text)
    data = dataclasses.replace(tiny_config().data, source=named(folder, "source"))
    short = {
        "schedule": ScheduleConfig(total_steps=1, warmup_steps=0),
        "log": LogConfig(evaluate_every_steps=9, tensorboard=False, final_evaluation=False),
        "mesh": MeshConfig(data=1),
    }
    labels = tiny_config(
        **short,
        student=dataclasses.replace(NETWORK, model=named(folder, "teacher"), options={}),
    )
    assert train(labels, folder / "teacher_run").complete
    config = tiny_config(
        **short,
        data=data,
        student=dataclasses.replace(NETWORK, model=named(folder, "student"), options={}),
        teacher=TeacherConfig(workdir=str(folder / "teacher_run")),
        objective=ObjectiveConfig(distance=named(folder, "distance")),
        optimizer=OptimizerConfig(name=named(folder, "optimizer"), learning_rate=3e-3),
        views=dataclasses.replace(tiny_config().views, crop=named(folder, "crop")),
    )
    assert train(config, folder / "run").complete
    return folder


def downloaded(made: pathlib.Path, to: pathlib.Path, part: str) -> pathlib.Path:
    """A copy of the run that names its own file for one part, and claims to have found it there."""
    places = {str(made / f"{part}.py"): str(to / "run" / f"{part}.py")}
    places[str(made / "teacher_run")] = str(to / "teacher_run")
    for name in ("run", "teacher_run"):
        shutil.copytree(made / name, to / name)
        rewrite(to / name, places)
    shutil.copy(made / f"{part}.py", to / "run")
    return to / "run"


def rewrite(run: pathlib.Path, places: dict[str, str]) -> None:
    text = (run / "config.json").read_text()
    for before, now in places.items():
        text = text.replace(before, now)
    (run / "config.json").write_text(text)


@pytest.mark.parametrize(("part", "command"), [(x, y) for x, ys in RUN_BY.items() for y in ys])
def test_no_command_runs_code_that_came_with_the_run(made, tmp_path, capsys, part, command):
    run = downloaded(made, tmp_path, part)
    said = refused(capsys, *(x.format(run=run, new=tmp_path) for x in COMMANDS[command]))
    assert f"{part}.py:{PARTS[part][0]}, and would run {run / part}.py, which came with" in said
    assert "--trust-code" in said
    assert not [*tmp_path.rglob("*.ran")]


def test_code_at_its_place_runs_and_is_named(made, capsys):
    np.save(made / "image.npy", np.zeros((1, 20, 20, 3), np.uint8))
    for mark in made.glob("*.ran"):
        mark.unlink()
    assert len(predict(made / "run", [made / "image.npy"])) == 1
    assert f"runs custom code: {made / 'student.py'}" in capsys.readouterr().err
    assert not [x for x in made.glob("*.ran") if x.stem != "student"]


def test_code_at_another_place_runs_with_the_flag_alone(made, tmp_path, capsys, monkeypatch):
    """The run of another machine, which named its file as seen from there."""
    run = downloaded(made, tmp_path, "student")
    shutil.move(run / "student.py", tmp_path)
    rewrite(run, {f'"{run}/student.py:Small': '"student.py:Small'})
    np.save(tmp_path / "image.npy", np.zeros((1, 20, 20, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    asked = ("predict", "run", "image.npy")
    assert f"{tmp_path}/student.py, where it found {run}/student.py" in refused(capsys, *asked)
    assert not [*tmp_path.rglob("*.ran")]
    with pytest.raises(SystemExit) as done:
        main([*asked, "--trust-code"])
    assert done.value.code == 0 and (tmp_path / "student.ran").is_file()
    assert f"custom code: {tmp_path / 'student.py'}" in capsys.readouterr().err
    (tmp_path / "student.ran").unlink()
    with (tmp_path / "student.py").open("a") as file:  # the flag is about places, not contents
        file.write("# other\n")
    assert "that file was changed: its SHA-256 was" in refused(capsys, *asked, "--trust-code")
    assert not [*tmp_path.rglob("*.ran")]


@pytest.mark.slow
def test_the_flag_reaches_the_processes_of_bench(made, tmp_path):
    run = downloaded(made, tmp_path, "student")
    with pytest.raises(SystemExit) as done:
        main(["bench", str(run), "--seconds", "0.05", "--trust-code"])
    assert done.value.code == 0 and (run / "student.ran").is_file()


def test_an_option_of_the_users_is_not_asked_about(made, tmp_path):
    """A moved crop, whose new place the user names."""
    run = downloaded(made, tmp_path, "crop")
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["views"]["crop"].startswith(str(run))
    shutil.move(run / "crop.py", tmp_path)
    crop = f"{tmp_path}/crop.py:boxes"
    with pytest.raises(SystemExit) as done:
        main(["evaluate", str(run), "--views.crop", crop, "--json"])
    assert done.value.code == 0 and (tmp_path / "crop.ran").is_file()


def test_an_export_that_names_code_knows_where_it_lay(made, tmp_path):
    path = tmp_path / "student.safetensors"
    export(made / "run", path)
    assert load_student(path).classes == 10
    with safe_open(path, "np") as file:
        card = json.loads(file.metadata()["fm_distill"])
    text = json.dumps(card | {"code_files": {}})
    save_file(load_file(path), path, {"fm_distill": text})
    shutil.copy(made / "student.py", tmp_path)
    moved = text.replace(f"{made}/student.py:", f"{tmp_path}/student.py:")
    save_file(load_file(path), tmp_path / "moved.safetensors", {"fm_distill": moved})
    for file in (path, tmp_path / "moved.safetensors"):
        with pytest.raises(
            UserError, match=r"whose path and contents it did not record.*--trust-code"
        ):
            load_student(file)
    assert not [*tmp_path.rglob("*.ran")]
    with trusted_code():
        load_student(tmp_path / "moved.safetensors")
    assert (tmp_path / "student.ran").is_file()


def test_a_recording_that_names_code_is_asked_about(made, tmp_path):
    shutil.copy(made / "teacher.py", tmp_path)
    model = f"{tmp_path}/teacher.py:Small"
    header = dataclasses.replace(
        make_header(tiny_config(), resolved_run(tiny_config()), "float16", None),
        teachers=(NetworkConfig(model=model, resolution=16, input_range="minus_one_one"),),
        teacher_weights=("x",),
    )
    config = tiny_config(teacher=TeacherConfig(workdir="x", recording=str(tmp_path)))
    assert dataclasses.replace(header, code_files=code_files([model])).identity == header.identity
    with pytest.raises(UserError, match=r"teacher.py, which came with it.*--trust-code"):
        recorded_teachers(config, tmp_path, Recording(tmp_path, header, ()))
    known = dataclasses.replace(header, code_files=code_files([model]))
    elsewhere = Recording(tmp_path / "recording", known, ())
    assert recorded_teachers(config, tmp_path, elsewhere)[0].network.model == model
    assert not [*tmp_path.rglob("*.ran")]


def test_the_run_of_a_teacher_is_asked_about(made, tmp_path):
    run = downloaded(made, tmp_path, "student")
    config = tiny_config(teacher=TeacherConfig(workdir=str(run)))
    with pytest.raises(UserError, match=r"student.py, which came with it.*--trust-code"):
        described_teachers(config)
    assert not [*tmp_path.rglob("*.ran")]


def test_a_module_is_found_without_an_import(tmp_path, monkeypatch):
    """Not of the packages around it, either."""
    (tmp_path / "mine_around" / "inner").mkdir(parents=True)
    for name in ("mine_around/__init__", "mine_around/inner/__init__", "mine_around/inner/parts"):
        (tmp_path / f"{name}.py").write_text(MARKED + SMALL)
    monkeypatch.syspath_prepend(tmp_path)
    reference = "mine_around.inner.parts:Small"
    assert file_of(reference) == (tmp_path / "mine_around/inner/parts.py").resolve()
    with pytest.raises(UserError, match=r"which came with it"):
        refuse_foreign_code([reference], code_files([reference]), "the run", tmp_path)
    for absent in ("mine_around.inner.absent:x", "sys:exit", "absent_package.x:y"):
        with pytest.raises(UserError, match=r"its module was not found"):
            refuse_foreign_code([absent], {}, "the run", tmp_path)
    assert not [*tmp_path.rglob("*.ran")]
