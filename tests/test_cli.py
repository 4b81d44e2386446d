"""What bad input gets: one clear message, the right exit code, nothing overwritten."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command_environment, run_command, write_experiment
from PIL import Image

from fm_distill.cli import main as cli


def command(capsys, *arguments) -> tuple[int, str, str]:
    """The command in this process: exit code, standard output and error."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(x) for x in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return exit_.value.code, captured.out, captured.err


def refused(capsys, *arguments) -> str:
    code, _, error = command(capsys, *arguments)
    assert code == 2, error
    return error


@pytest.fixture
def tiny(tmp_path):
    return write_experiment(tmp_path / "tiny.py")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
        (["--batch-size", "many"], "--batch-size"),
        (["--batch-size", "12"], "not divisible by the 8 devices of the mesh (data=8, fsdp=1); "
         "use 8 or 16"),
        (["--batch-size", "0"], "batch_size is 0; expected a number above zero"),
        (["--mesh.fsdp", "3"], "mesh.fsdp=3 does not divide the 8 devices"),
        (["--mesh.data", "16"], "needs 16 devices; there are 8"),
        (["--data.source", "video"], "expected one of class_folders, digits, images, tfds"),
        (["--data.train.name", "dev"], "the digits have no split 'dev'"),
        (["--data.train.name", "train[1:9]"], "expected e.g. train[40%:80%]"),
        (["--data.train.name", "train[80%:40%]"], "has no image"),
        (["--data.classes", "7"], "data.classes is 7, but the labels of digits/train have 10"),
        (["--student.model", "vit"], "expected one of bit, bit_r101x1"),
        (["--student.options.groups", "3"], "does not divide the 8 channels"),
        (["--views.crop", "random"], "expected one of tensorflow, torchvision, whole"),
        (["--views.crop-area", "0.5", "0.1"], "expected 0 < lowest <= highest"),
        (["--views.mixup", "cutmix"], "invalid choice"),
        (["--views.smallest-area-points", "5", "0.5", "5", "0.1"], "must increase"),
        (["--views.smallest-area-points", "0", "0.5", "9", "0"], "an area of 0 or less"),
        (["--views.resolution-points", "0", "0.5"], "got less than 1 pixel"),
        (["--views.smallest-area-points", "0", "2"], "expected values from 0 to 1"),
        (["--views.mixup-strength-points", "0", "0", "--views.mixup", "none"], "has none"),
        (
            ["--views.mixup-strength-points", "0", "0", "9", "1", "--views.period-steps", "4"],
            "repeat after 4 steps (views.period_steps)",
        ),
        (["--objective.target", "teacher"], "needs a teacher"),
        (["--objective.distance", "cka"], "expected one of dist_rows, euclidean"),
        (["--objective.temperature", "0"], "expected a number above zero"),
        (["--optimizer.learning-rate", "nan"], "expected a number above zero"),
        (["--optimizer.weight-decay", "-1"], "expected 0 to 1"),
        (["--ema-decay", "1.5"], "ema_decay is 1.5"),
        (["--schedule.total-steps", "None"], "got neither of total_steps and total_epochs"),
        (["--schedule.total-steps", "9", "--schedule.total-epochs", "3"], "got both"),
        (["--schedule.total-epochs", "0.001"], "less than one batch"),
        (["--data.feeding", "streaming", "--steps-per-dispatch", "4"], "needs data.feeding=res"),
    ],
)  # fmt: skip
def test_wrong_options(capsys, tiny, tmp_path, options, said):
    workdir = tmp_path / "run"
    error = refused(capsys, "train", tiny, "--workdir", workdir, *options)
    # tyro draws a box around its messages and breaks their lines.
    plain = " ".join(error.replace("│", " ").split())
    assert said in plain
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: fm-distill COMMAND"),
        (
            ["distill"],
            "there is no command 'distill'; expected train, record, sweep, evaluate, ",
        ),
        (["train"], "expected fm-distill train EXPERIMENT.py"),
        (["train", "--seed", "3"], "expected fm-distill train EXPERIMENT.py"),
        (["train", "none.py"], "there is no experiment file none.py"),
        (["evaluate", "none"], "none is not the workdir of a run"),
        (["predict", "none", "x.jpg"], "none is not the workdir of a run"),
        (["show", "none.py"], "there is no experiment file"),
    ],
)
def test_wrong_commands(capsys, arguments, said):
    code, out, error = command(capsys, *arguments)
    assert code == 2 and said in out + error


@pytest.mark.parametrize("flag", ["--verbose", "--trust-code"])
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["evaluate", "none.onnx"], 2, "none.onnx cannot be read"),
        (["profile", "."], 2, ". is not the workdir of a run"),
        (["status", "."], 2, ". is not the workdir of a run"),
        (["status", "--help"], 0, "usage: fm-distill status DIR"),
        (["--help"], 0, "usage: fm-distill COMMAND"),
    ],
)
def test_flags_of_every_command_stand_anywhere(
    capsys, tmp_path, monkeypatch, flag, arguments, code, said
):
    monkeypatch.chdir(tmp_path)
    for place in range(len(arguments) + 1):
        given = [*arguments[:place], flag, *arguments[place:]]
        found, out, error = command(capsys, *given)
        assert found == code and said in out + error, given


@pytest.mark.parametrize("name", ["train", "record", "sweep"])
def test_hours_that_no_run_fits_in(capsys, tiny, name):
    """Before what else is wrong, so that nothing is trained."""
    over = ["--over", "seed:0"] if name == "sweep" else []
    error = refused(capsys, name, tiny, *over, "--max-hours", "-1")
    assert "--max-hours is -1.0; expected a number above zero" in error


# As the config's classes, which under test are wrapped for their shapes and have other words.
SETTINGS = """
import dataclasses
@dataclasses.dataclass(kw_only=True)
class Mine:
    name: str
    rate: float
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config = 3", "defines no `config"),
        ("confg = 3", "defines no `config"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("config = (", "SyntaxError"),
        (SETTINGS + "Mine(nam='x', rate=1)", "Mine has no field 'nam'"),
        (SETTINGS + "Mine(name='x')", "does not set what Mine needs: 'rate'"),
        (SETTINGS + "Mine()", "does not set what Mine needs: 'name' and 'rate'"),
        ("int(None)", "TypeError: int() argument"),
    ],
)
def test_broken_experiment_files(capsys, tmp_path, text, said):
    (tmp_path / "x.py").write_text(text)
    assert said in refused(capsys, "train", tmp_path / "x.py")


def test_a_field_that_is_left_out_is_named(tmp_path):
    """By the real command: the tests' checks of types say it in other words."""
    path = tmp_path / "x.py"
    path.write_text("from fm_distill.config import *\ndata = DataConfig(source='digits')")
    done = run_command("show", path)
    assert done.returncode == 2
    assert "does not set what DataConfig needs: 'train' and 'canvas'" in done.stderr


@pytest.mark.parametrize(
    ("schedule", "said"), [("", "neither"), ("total_steps=3, total_epochs=2.0", "both")]
)
def test_a_file_says_steps_or_epochs(capsys, tmp_path, schedule, said):
    path = write_experiment(tmp_path / "x.py", f"schedule=ScheduleConfig({schedule})")
    assert f"got {said} of" in refused(capsys, "show", path)


def test_one_of_steps_and_epochs_replaces_the_other(capsys, tiny):
    code, out, _ = command(capsys, "show", tiny, "--schedule.total-epochs", "2.5")
    assert code == 0
    assert "schedule.total_steps = None" in out and "schedule.total_epochs = 2.5" in out


def test_help_lists_every_field(capsys, tiny):
    code, out, _ = command(capsys, "train", tiny, "--help")
    assert code == 0
    for option in ("--workdir", "--views.mixup-partner", "--data.train.name", "--ema-decay"):
        assert option in out
    code, out, _ = command(capsys, "--help")
    assert code == 0 and "predict DIR|STUDENT.{safetensors,onnx,stablehlo,tflite} IMAGE" in out


def test_a_workdir_of_another_run(capsys, trained, tmp_path):
    before = {p: p.read_bytes() for p in (trained / "run").glob("*.json*")}
    error = refused(
        capsys, "train", trained / "student.py", "--workdir", trained / "run",
        "--seed", "3", "--optimizer.learning-rate", "0.5", "--log.every-steps", "2",
    )  # fmt: skip
    assert "seed: 0 in the workdir, 3 now" in error
    assert "optimizer.learning_rate: 0.003 in the workdir, 0.5 now" in error
    assert "log.every_steps" not in error
    assert {p: p.read_bytes() for p in before} == before
    assert "can also remove" not in error
    shutil.copy(trained / "run" / "config.json", tmp_path)
    error = refused(capsys, "train", trained / "student.py", "--workdir", tmp_path, "--seed", "3")
    assert f"no step was done here, so you can also remove {tmp_path}/config.json" in error


def test_a_folder_that_is_no_workdir(capsys, tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("precious")
    error = refused(capsys, "train", tiny, "--workdir", tmp_path / "photos")
    assert "is not empty and not a workdir of a run (it has me.jpg)" in error
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["me.jpg"]
    (tmp_path / "file").write_text("x")
    error = refused(capsys, "train", tiny, "--workdir", tmp_path / "file")
    assert "is a file; give a folder as --workdir" in error
    taught = "--objective.target", "teacher", "--teacher.experiment", tiny
    error = refused(capsys, "record", tiny, *taught, "--to", tmp_path / "file")
    assert "is a file; give --to a folder" in error
    error = refused(capsys, "record", tiny, *taught, "--to", tmp_path / "photos")
    assert "is not empty and not the folder of a recording (it has me.jpg)" in error


def test_a_workdir_in_use(capsys, tiny, tmp_path):
    holder = (
        "import sys, time; from fm_distill.runs.workdir import Workdir\n"
        "with Workdir(sys.argv[1]).locked():\n print('held', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")],
        env=command_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    error = refused(capsys, "train", tiny, "--workdir", tmp_path / "run")
    assert "is in use by another process" in error
    process.kill()  # the lock does not outlive its holder
    process.communicate()
    from fm_distill.runs.workdir import Workdir

    with Workdir(tmp_path / "run").locked():
        pass


def test_wrong_teachers(capsys, tmp_path, trained):
    student = write_experiment(
        tmp_path / "s.py",
        "objective=ObjectiveConfig(), "
        "teacher=TeacherConfig(network=NetworkConfig(model='bit_r50x1', resolution=32))",
    )
    run = ("train", student, "--workdir", tmp_path / "run")
    assert "give --teacher.weights FILE (.npz, .safetensors" in refused(capsys, *run)
    assert "there is no weight file" in refused(capsys, *run, "--teacher.weights", "none.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    error = refused(capsys, *run, "--teacher.weights", tmp_path / "other.npz")
    assert "are none of bit_original" in error and "got a" in error
    error = refused(capsys, *run, "--teacher.weights", "x.npz", "--teacher.workdir", "y")
    assert "exclude each other" in error
    error = refused(capsys, *run, "--teacher.workdir", tmp_path / "none")
    assert "not the workdir of a run" in error
    error = refused(capsys, *run, "--teacher.experiment", tmp_path / "none.py")
    assert "there is no experiment file" in error
    assert not (tmp_path / "run").exists()
    nested = ("train", student, "--workdir", tmp_path / "runs" / "run")
    assert "give --teacher.weights FILE" in refused(capsys, *nested)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()  # what was there stays
    assert "give --teacher.weights FILE" in refused(
        capsys, "train", student, "--workdir", tmp_path / "mine"
    )
    assert (tmp_path / "mine").is_dir()


def test_teacher_of_other_classes(capsys, tmp_path, trained):
    for name, count in (("a", 3), ("b", 3), ("c", 3)):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (i * 9, 0, 0)).save(tmp_path / f"data/train/{name}/{i}.png")
    student = write_experiment(
        tmp_path / "s.py",
        "objective=ObjectiveConfig(), batch_size=8, teacher=TeacherConfig(workdir='x'), "
        f"data=DataConfig(source='class_folders', data_dir={str(tmp_path / 'data')!r}, "
        "train=SplitConfig(name='train'), canvas=CanvasConfig(size=32))",
    )
    error = refused(
        capsys, "train", student, "--workdir", tmp_path / "run",
        "--teacher.workdir", trained / "run" / "teacher",
    )  # fmt: skip
    assert "number of classes differs (the data's labels: 3, the teacher's head: 10)" in error


def test_splits_of_evaluate(capsys, trained):
    error = refused(capsys, "evaluate", trained / "run", "--split", "dev")
    assert "split is 'dev'; expected one of test, train, validation" in error
    error = refused(capsys, "evaluate", trained / "run", "--seed", "9")
    assert "was trained with another config" in error and "seed: 0 in the workdir, 9 now" in error


def test_evaluate_prints_one_object(trained):
    done = run_command("evaluate", trained / "run", "--split", "validation", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == [
        "split", "examples", "step", "student", "teacher", "agreement", "kl", "training_view",
        "retention", "retention_interval", "gap", "gap_interval", "cost",
    ]  # fmt: skip
    assert list(found["student"]) == ["top1", "top5", "cross_entropy", "ece"]
    assert found["split"] == "validation" and found["examples"] == 179


def test_predict_own_images(capsys, trained, tmp_path):
    Image.new("L", (40, 60), 90).save(tmp_path / "grey.png")
    Image.new("RGBA", (300, 20), (1, 2, 3, 4)).save(tmp_path / "wide.png")
    code, out, error = command(
        capsys, "predict", trained / "run", tmp_path / "grey.png", tmp_path / "wide.png",
        "--top", "3",
    )  # fmt: skip
    assert code == 0, error
    assert "compiling, usually a minute" in error  # or the terminal would stand still
    lines = out.splitlines()
    assert len(lines) == 8 and lines[0].endswith("grey.png") and "%" in lines[1]
    shares = [float(x.split()[0]) for x in lines[1:4]]
    assert shares == sorted(shares, reverse=True) and shares[0] < 50
    code, out, error = command(capsys, "predict", trained / "run", tmp_path, "--top", "3", "--json")
    found = json.loads(out)
    assert [x["image"].split("/")[-1] for x in found] == ["grey.png", "wide.png"]
    assert found[0]["probabilities"][0] == pytest.approx(shares[0] / 100, abs=1e-4)
    error = refused(capsys, "predict", trained / "run", "none.jpg")
    assert "there is no image" in error and "compiling" not in error
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    error = refused(capsys, "predict", trained / "run", tmp_path / "bad.jpg")
    assert "bad.jpg is not a complete image" in error


def test_warnings_before_hours_are_spent(tmp_path):
    """On the real command, so that they are seen to reach the person."""
    path = write_experiment(tmp_path / "tiny.py")
    done = run_command(
        "train", path, "--workdir", tmp_path / "run", "--schedule.warmup-steps", "4",
        "--data.canvas.size", "12", "--data.train.examples", "1000",
    )  # fmt: skip
    assert done.returncode == 0
    assert "the warm-up of 4 steps is 67% of the run of 6" in done.stderr
    assert "data.canvas.size=12) is smaller than the student's resolution 16" in done.stderr
    assert "data.train.examples is 1,000, but digits/train has 1,259" in done.stderr
    assert "feeding: resident (1,259 canvases need" in done.stderr


def test_a_corrupt_image_stops_the_run_or_is_skipped(tmp_path):
    for i in range(12):
        folder = tmp_path / "data" / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    broken = tmp_path / "data" / "train" / "a" / "4.png"
    broken.write_bytes(broken.read_bytes()[:200])
    path = write_experiment(
        tmp_path / "own.py",
        "batch_size=8, log=LogConfig(every_steps=1, tensorboard=False), "
        f"data=DataConfig(source='class_folders', data_dir={str(tmp_path / 'data')!r}, "
        "train=SplitConfig(name='train'), canvas=CanvasConfig(size=24))",
    )
    for feeding in ("resident", "streaming"):
        workdir = tmp_path / feeding
        run = ("train", path, "--workdir", workdir, "--data.feeding", feeding)
        stopped = run_command(*run)
        assert stopped.returncode == 2, stopped.stderr
        assert "a/4.png is not a complete image" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        done = run_command(*run, "--workdir", f"{workdir}2", "--data.corrupt", "skip")
        assert done.returncode == 0, done.stderr
        assert "train, 11 examples" in done.stdout
        last = json.loads((tmp_path / f"{feeding}2" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["corrupt_images"] >= 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_below_standard_output(tmp_path, unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fm_distill", "--help"], cwd=tmp_path, stdout=full,
            env=command_environment() | {"PYTHONUNBUFFERED": unbuffered},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "fm-distill: the disk or its quota is full; free some space, and run the same command "
        "again\n"
    )


def test_forked_command_is_like_one_started_anew(tmp_path):
    """`run_command` forks; the same arguments in a new process say and return the same."""
    for arguments in (["status", "nowhere"], ["--help"], ["train", "nothing.py", "--steps", "1"]):
        forked = run_command(*arguments, cwd=tmp_path)
        started = subprocess.run(
            [sys.executable, "-m", "fm_distill", *arguments],
            cwd=tmp_path, env=command_environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert (forked.returncode, forked.stdout, forked.stderr) == (
            started.returncode, started.stdout, started.stderr,
        )  # fmt: skip
