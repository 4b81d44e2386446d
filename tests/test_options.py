"""Options over a config: help of every field, absent parts, other names, and what gives way."""

import collections
import dataclasses
import logging
import re

import pytest
from conftest import write_experiment
from test_cli import command, refused
from tiny import tiny_config
from tyro import _docstrings

import fm_distill.config as configs
from fm_distill.cli import (
    bench,
    compress,
    demo,
    diagnose,
    export,
    main,
    plan,
    profile,
    record,
    train,
)
from fm_distill.cli import command as command_module
from fm_distill.config import Config, DataConfig, NetworkConfig, StudentConfig
from fm_distill.config.bounds import out_of_bounds
from fm_distill.config.choices import not_a_choice
from fm_distill.config.options import empty, option_names, optional_parts, with_parts
from fm_distill.config.serialization import changed, differences
from fm_distill.data.class_names import IMAGENET, named_classes
from fm_distill.data.sources import SOURCES
from fm_distill.errors import UserError
from fm_distill.models import MODELS, resolve
from fm_distill.objectives.distances import DISTANCES
from fm_distill.preparation import parse_options
from fm_distill.preparation.check import check
from fm_distill.runs.metric_table import RANKED
from fm_distill.train_step.memory import REMATERIALISE
from fm_distill.train_step.optim import OPTIMIZERS
from fm_distill.views.crops import CROPS

PARTS = [x for x in map(vars(configs).get, configs.__all__) if dataclasses.is_dataclass(x)]
COMMANDS = [
    main._Evaluate, main._Predict, export._Export, main._Report, main._Show, main._Status,
    diagnose._Diagnose, plan._Plan, profile._Profile, train._Train, train._Sweep, bench._Bench,
    compress._Compress, record._Record, demo._Demo,
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    return write_experiment(tmp_path / "tiny.py")


def help_texts() -> dict[str, str]:
    """Every field's text as the help shows it; a section without one shows its dataclass's."""
    off = (parse_options.tyro.conf.HelptextFromCommentsOff,)
    found = {}
    for kind in PARTS:
        hints = options_types(kind)
        for field in dataclasses.fields(kind):
            if field.name not in vars(kind).get("__annotations__", {}):
                continue  # of the class that it derives from
            text = _docstrings.get_field_docstring(kind, field.name, off)
            if text is None and dataclasses.is_dataclass(hints[field.name]):
                text = hints[field.name].__doc__
            found[f"{kind.__name__}.{field.name}"] = text or ""
    return found


def options_types(kind):
    from fm_distill.config.options import _fields

    return {name: part for name, _, part, _ in _fields(empty(kind))}


def test_every_field_and_section_has_a_help_text_of_its_own():
    texts = help_texts()
    assert len(texts) > 80
    for name, text in texts.items():
        assert text.strip().endswith("."), name
        assert "\n" not in text.strip(), f"{name}: the help keeps line breaks"
    same = [x for x, count in collections.Counter(texts.values()).items() if count > 1]
    assert not same


def test_a_shared_help_text_would_be_seen():
    """A field without a text has none, instead of that of the field before."""

    @dataclasses.dataclass(frozen=True)
    class Two:
        one: int = 1
        """The one."""
        other: int = 2

    off = (parse_options.tyro.conf.HelptextFromCommentsOff,)
    assert _docstrings.get_field_docstring(Two, "one", off) == "The one."
    assert _docstrings.get_field_docstring(Two, "other", off) is None


def test_every_option_of_a_command_has_a_help_text():
    for kind in COMMANDS:
        for field in dataclasses.fields(kind):
            off = (parse_options.tyro.conf.HelptextFromCommentsOff,)
            if field.name not in ("config", "distributed"):
                assert _docstrings.get_field_docstring(kind, field.name, off), (kind, field.name)


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("NetworkConfig.model", MODELS),
        ("DataConfig.source", SOURCES),
        ("TransferConfig.source", SOURCES),
        ("ViewConfig.crop", CROPS),
        ("ObjectiveConfig.distance", DISTANCES),
        ("OptimizerConfig.name", OPTIMIZERS),
        ("MemoryConfig.rematerialise", REMATERIALISE),
        ("CheckpointConfig.keep_best", RANKED),
    ],
)
def test_help_lists_the_choices(field, table):
    text = help_texts()[field]
    assert [name for name in table if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", ["train", "sweep", "plan", "show", "evaluate"])
def test_help_needs_no_experiment(capsys, name):
    code, out, _ = command(capsys, name, "--help")
    assert code == 0
    for option in option_names(empty(Config)):
        if not re.search(r"\.\d\.", option):
            assert "--" + option.replace("_", "-") + " " in out, option
    assert "Decay per step of the student's" in out


def test_sections_show_their_own_text(capsys, tiny):
    code, out, _ = command(capsys, "train", tiny, "--help")
    assert code == 0
    plain = " ".join(out.replace("│", " ").split())
    assert plain.count("Training steps per call of the device") == 1
    assert "What is drawn for each image of each step" in plain


def settled(capsys, experiment, *arguments) -> dict[str, str]:
    """The config as `show` prints it."""
    code, out, error = command(capsys, "show", experiment, *arguments)
    assert code == 0, error
    return dict(line.split(" = ", 1) for line in out.splitlines() if " = " in line)


def test_other_names_of_options(capsys, tiny):
    found = settled(capsys, tiny, "--lr", "0.5", "--steps=9", "--batch-size", "24")
    assert found["optimizer.learning_rate"] == "0.5"
    assert found["schedule.total_steps"] == "9" and found["batch_size"] == "24"
    found = settled(capsys, tiny, "--epochs", "3")
    assert found["schedule.total_epochs"] == "3.0" and found["schedule.total_steps"] == "None"


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--optimizer.lr", "--optimizer.learning-rate"),
        ("--learning-rate", "--optimizer.learning-rate"),
        ("--optimizer.wd", "--optimizer.weight-decay"),
        ("--batchsize", "--batch-size"),
        ("--objective.temprature", "--objective.temperature"),
        ("--max-hour", "--max-hours"),
    ],
)
def test_a_misspelled_option_names_the_one_that_is_meant(capsys, tiny, option, meant):
    error = refused(capsys, "train", tiny, option, "1")
    assert f"there is no option {option}; did you mean {meant}" in error


def test_a_number_that_is_none_names_what_is_expected(capsys, tiny):
    error = " ".join(refused(capsys, "train", tiny, "--steps", "1e3").split())
    assert "a number above zero" in error and "Bounds(" not in error


def test_parts_are_taken_out_and_brought_in(capsys, tiny):
    found = settled(capsys, tiny, "--data.test", "None", "--data.validation=None")
    assert found["data.test"] == "None" and found["data.validation"] == "None"
    assert found["data.train.name"] == "train"
    found = settled(
        capsys, tiny, "--objective.target", "teacher", "--teacher.weights", "a.npz",
        "--teacher.network.model", "bit_r50x1", "--teacher.network.resolution", "64",
        "--more-teachers.0.workdir", "runs/b",
    )  # fmt: skip
    assert found["teacher.network.model"] == "bit_r50x1"
    assert found["teacher.network.resolution"] == "64"
    assert found["more_teachers.0.workdir"] == "runs/b"
    found = settled(capsys, tiny, "--data.test", "None", "--data.test.name", "validation")
    assert found["data.test.name"] == "validation" and found["data.test.examples"] == "None"


def test_a_part_that_is_brought_in_is_complete(capsys, tiny):
    error = refused(capsys, "show", tiny, "--teacher.network.model", "bit_r50x1")
    assert "teacher.network is not set yet: give teacher.network.resolution as well" in error
    assert "no option --data.train" in refused(capsys, "show", tiny, "--data.train", "None")


def test_another_model_drops_the_options_of_the_one_before(capsys, tmp_path):
    path = write_experiment(
        tmp_path / "x.py",
        "student=StudentConfig(model='bit', resolution=32, options=dict(depths=(1, 1), width=0.5, "
        "norm='batch', root_pool_padding='minus_infinity'))",
    )
    found = settled(capsys, path, "--student.model", "mobilenet_v3_small")
    assert not any(name.startswith("student.options") for name in found)
    assert found["student.resolution"] == "32"
    found = settled(capsys, path, "--student.model", "bit_r50x1",
                    "--student.options.root-pool-padding", "zero")  # fmt: skip
    assert {x: y for x, y in found.items() if x.startswith("student.options")} == {
        "student.options.root_pool_padding": "zero"
    }
    found = settled(capsys, path, "--student.options.depths", "2", "3", "--student.options.norm",
                    "None", "--student.options.width=0.25")  # fmt: skip
    assert found["student.options.depths"] == "(2, 3)" and "student.options.norm" not in found
    assert found["student.options.width"] == "0.25"
    error = refused(
        capsys, "show", path, "--student.model", "bit_r50x1", "--student.options.width", "2",
        "--student.options.stem", "small",
    )  # fmt: skip
    assert "bit_r50x1 has no option width, stem; it has root_pool_padding" in error
    error = refused(capsys, "show", path, "--student.width", "2")
    assert "An option of one model alone is written --student.options.width" in error
    # What was typed stays, also where the model before had the same.
    found = settled(capsys, path, "--student.model", "bit_r50x1",
                    "--student.options.root_pool_padding", "minus_infinity")  # fmt: skip
    assert found["student.options.root_pool_padding"] == "minus_infinity"
    error = refused(capsys, "show", path, "--student.options.width", "--lr", "1")
    assert "--student.options.width has no value; give one after it" in error


def test_conflicts_are_reported_together(capsys, tiny):
    error = refused(
        capsys, "show", tiny, "--batch-size", "0", "--student.model", "vit", "--fixed-crops", "3",
        "--objective.target", "teacher", "--optimizer.beta1", "1",
    )  # fmt: skip
    for line in (
        "5 settings are wrong:",
        "batch_size is 0; expected a number above zero",
        "optimizer.beta1 is 1.0; expected 0 or more and less than 1",
        "student.model is 'vit'; expected one of",
        "objective.target=teacher needs a teacher",
        "fixed_crops=3 belongs to teaching=fixed",
    ):
        assert line in error, line


@pytest.mark.parametrize(("width", "norm", "groups"), [
    (1.0, "group", 32), (0.125, "group", 8), (0.75, "group", 16), (3.0, "group", 32),
])  # fmt: skip
def test_groups_choose_themselves(width, norm, groups):
    network = NetworkConfig(
        model="bit", resolution=32, options={"depths": (1,), "width": width, "norm": norm}
    )
    assert resolve(network).options["groups"] == groups
    assert round(64 * width) % groups == 0
    check(dataclasses.replace(tiny_config(), student=StudentConfig(**vars(network))))


def test_bounds_of_numbers_in_all_parts():
    assert list(out_of_bounds(tiny_config())) == []
    data = tiny_config().data
    wrong = tiny_config(
        seed=-1,
        ema_decay=1.0,
        steps_per_dispatch=0,
        data=dataclasses.replace(data, classes=1, canvas=configs.CanvasConfig(size=0)),
        optimizer=configs.OptimizerConfig(learning_rate=float("inf"), clip_norm=0.0),
        teacher=configs.TeacherConfig(network=NetworkConfig(model="bit", resolution=0)),
        more_teachers=(configs.TeacherConfig(network=NetworkConfig(model="bit", resolution=0)),),
    )
    assert list(out_of_bounds(wrong)) == [
        "seed is -1; expected 0 to 4294967295",
        "ema_decay is 1.0; expected 0 or more and less than 1",
        "steps_per_dispatch is 0; expected a number above zero",
        "data.classes is 1; expected 2 or more",
        "data.canvas.size is 0; expected a number above zero",
        "teacher.network.resolution is 0; expected a number above zero",
        "more_teachers.0.network.resolution is 0; expected a number above zero",
        "optimizer.learning_rate is inf; expected a number above zero",
        "optimizer.clip_norm is 0.0; expected a number above zero",
    ]


def test_fields_of_any_teacher_are_swept():
    config = tiny_config(teacher=configs.TeacherConfig(weights="a"))
    found = changed(
        config,
        {
            "teacher.network.model": "bit_r50x1",
            "teacher.network.resolution": 64,
            "more_teachers.0.weights": "b",
        },
    )
    assert found.teacher.network == NetworkConfig(model="bit_r50x1", resolution=64)
    assert found.more_teachers == (configs.TeacherConfig(weights="b"),)
    assert changed(found, {"more_teachers.0.weights": "c"}).more_teachers[0].weights == "c"
    with pytest.raises(UserError, match=r"no option 'more_teachers\.9\.weights'"):
        changed(config, {"more_teachers.9.weights": "b"})
    with pytest.raises(UserError, match=r"no option 'sed'; did you mean seed\?"):
        changed(config, {"sed": 1})
    with pytest.raises(UserError, match=r"there is no more_teachers\.0 before more_teachers\.3"):
        changed(config, {"more_teachers.3.weights": "b"})


def test_places_of_any_teacher_are_no_identity():
    one, other = (
        tiny_config(
            teacher=configs.TeacherConfig(weights=x),
            more_teachers=(configs.TeacherConfig(weights=x),),
        )
        for x in "ab"
    )
    assert differences(one, other) == []
    both = dataclasses.replace(one, more_teachers=(*one.more_teachers, configs.TeacherConfig()))
    network = with_parts(
        both, {"more_teachers.1.network.model", "more_teachers.1.network.resolution"}
    )
    assert len(differences(both, network)) > 0


def test_optional_parts_and_choices():
    assert {*optional_parts(tiny_config())} == {
        "data.transfer", "data.validation", "data.test", "teacher", "teacher.network",
        "more_teachers", "objective.terms",
    }  # fmt: skip
    assert list(not_a_choice("x", "a", ["a", "b"])) == []
    assert "name" in dict.fromkeys(option_names(empty(DataConfig)))


def test_libraries_remarks_are_shown_when_asked_for(capsys, tiny):
    logger = logging.getLogger("tensorboardX")
    logger.setLevel(logging.WARNING)
    command_module.quiet(["x.py", "--verbose"])
    assert logger.level == logging.WARNING
    command_module.quiet(["x.py"])
    assert logger.level == logging.CRITICAL
    code, _, error = command(capsys, "show", "--verbose", tiny, "--seed", "1", "--verbose")
    assert code == 0, error


def test_class_names_of_unlabelled_images(tmp_path):
    data = DataConfig(
        source="images",
        train=configs.SplitConfig(name="."),
        canvas=configs.CanvasConfig(size=32),
    )
    assert named_classes(data) is None
    names = named_classes(dataclasses.replace(data, class_names="imagenet"))
    assert len(names) == 1000 and IMAGENET.is_file()
    # Places that published heads are known for; `crane` and `maillot` are there twice.
    assert [names[i] for i in (0, 207, 281, 963, 999)] == [
        "tench", "golden retriever", "tabby", "pizza", "toilet tissue",
    ]  # fmt: skip
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    assert named_classes(dataclasses.replace(data, class_names=str(tmp_path / "names.txt"))) == (
        "a",
        "b",
    )
    (tmp_path / "twice.txt").write_text("a\na\n")
    with pytest.raises(UserError, match="names classes more than once: a"):
        named_classes(dataclasses.replace(data, class_names=str(tmp_path / "twice.txt")))
    with pytest.raises(UserError, match="cannot be read"):
        named_classes(dataclasses.replace(data, class_names="none.txt"))
    with pytest.raises(UserError, match="has names of its own"):
        changes = {"class_names": "imagenet"}
        check(tiny_config(data=dataclasses.replace(tiny_config().data, **changes)))


def test_show_resolves_what_is_here(capsys, tiny):
    found = settled(
        capsys, tiny, "--student.options.groups", "auto", "--steps-per-dispatch", "auto"
    )
    assert found["examples"] == "1259" and found["total_steps"] == "6"
    assert found["feeding"] == "resident" and found["steps_per_dispatch"] == "1"
    code, out, _ = command(capsys, "show", "experiments/flowers102.py")
    assert code == 0 and "# not resolved: " in out


def test_an_experiment_derives_from_one_in_another_folder(capsys, tmp_path, monkeypatch):
    """The path of a teacher's experiment is relative to the file that names it."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write_experiment(tmp_path / "a" / "teacher.py")
    write_experiment(
        tmp_path / "a" / "student.py",
        "objective=ObjectiveConfig(), teacher=TeacherConfig(experiment='teacher.py')",
    )
    for folder in ("a", "b"):
        derived = tmp_path / folder / "derived.py"
        derived.write_text(
            "from fm_distill import load_experiment\nconfig = load_experiment('a/student.py')\n"
        )
        found = settled(capsys, derived.relative_to(tmp_path))
        assert found["teacher.experiment"] == "a/teacher.py"
