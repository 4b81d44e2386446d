"""`fm-distill evaluate FILE`: an exported file on a split, against NumPy and against its run."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command
from test_cli import command
from test_export_functions import expected_logits, softmax, workdir
from tiny import logits_of

from fm_distill.data.feeding import Reader, stack
from fm_distill.data.splits import open_named
from fm_distill.evaluation.evaluate_file import config_in, evaluate_file
from fm_distill.exporting.export import export
from fm_distill.exporting.function import central_squares
from fm_distill.models import build_network
from fm_distill.runs.open_run import open_run
from fm_distill.views.rendering import CentralCrop

__all__ = ["workdir"]  # a fixture


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "student.stablehlo"
    export(workdir, path, batch=8)
    return path


def test_by_the_same_command_with_figures_of_numpy(workdir, exported):
    """All but the training view: 359 test images in batches of 16, through a file of eight."""
    done = run_command("evaluate", exported, "--teacher.workdir", workdir / "teacher", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    run = open_run(workdir)
    reader = Reader(open_named(run.config, "test"), run.config.data, 10)
    batch = stack([reader[i] for i in range(len(reader))])
    pixels, labels = (
        central_squares(batch.canvases, batch.sizes, CentralCrop(1.0), 16),
        np.asarray(batch.labels),
    )
    logits = expected_logits(workdir, pixels).astype(np.float64)
    teacher = open_run(workdir / "teacher").student
    built = build_network(teacher.network, 10, jnp.dtype("float32"))
    images = jnp.asarray((central_pixels(batch) - 127.5) / 127.5)
    aim = np.asarray(logits_of(built, teacher.variables, images), np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert found["examples"] == 359 and found["step"] == 6 and found["split"] == "test"
    assert found["student"]["top1"] == pytest.approx((order[:, 0] == labels).mean(), abs=3 / 359)
    assert found["student"]["top5"] == pytest.approx(
        (order == labels[:, None]).any(1).mean(), abs=3 / 359
    )
    same = (order[:, 0] == aim.argmax(1)).mean()
    assert found["agreement"]["top1"] == pytest.approx(same, abs=3 / 359)
    for name, temperature in (("one", 1.0), ("train_temperature", 2.0)):
        p, q = softmax(aim / temperature), softmax(logits / temperature)
        expected = (p * np.log(p / q)).sum(1).mean()
        assert found["kl"][name] == pytest.approx(expected, rel=5e-3)
    # As the run, but for the rounding of its pictures.
    stored = json.loads((workdir / "evaluation.json").read_text())
    for view in (found, found["training_view"]):
        other = stored if view is found else stored["training_view"]
        assert view["kl"]["one"] == pytest.approx(other["kl"]["one"], rel=2e-2)
        assert view["agreement"]["top1"] == pytest.approx(other["agreement"]["top1"], abs=0.02)
    assert found["teacher"]["top1"] == stored["teacher"]["top1"]
    assert found["runtime"].startswith("XLA of jax")


def central_pixels(batch) -> np.ndarray:
    """Not rounded: only the file sees whole grey levels."""
    from fm_distill.views.rendering import central_pixels

    canvases, sizes = jnp.asarray(batch.canvases), jnp.asarray(batch.sizes)
    return np.asarray(central_pixels(canvases, sizes, CentralCrop(1.0), 16))


def test_without_its_teacher_labels_judge_alone(workdir, exported, tmp_path, capsys):
    code, out, said = command(capsys, "evaluate", exported, "--split", "validation", "--json")
    found = json.loads(out)
    assert code == 0 and "without the teacher, which is not available" in said
    assert found["agreement"]["top1"] is None and found["teacher"]["top1"] is None
    stored = json.loads((workdir / "evaluation.json").read_text())
    assert found["student"]["top1"] is not None and found["examples"] == 179
    # Beside the file, where the run keeps it, it is found.
    beside = shutil.copy(exported, workdir / "student.stablehlo")
    assert evaluate_file(beside)["teacher"]["top1"] == stored["teacher"]["top1"]


def test_what_is_refused(workdir, exported, tmp_path, capsys):
    for said, *arguments in (
        ("--step and --cost are for runs", exported, "--step", 2),
        ("--step and --cost are for runs", exported, "--cost"),
        ("was trained with another config", exported, "--student.options.width", 0.25),
        ("expected one of test, train, validation", exported, "--split", "none"),
        ("x is not the workdir of a run", exported, "--teacher.workdir", "x"),
        ("is not the teacher of the run of", exported, "--teacher.workdir", workdir),
        ("cannot be read", tmp_path / "none.stablehlo"),
    ):
        code, out, error = command(capsys, "evaluate", *arguments)
        assert code == 2 and said in error and not out, error
    assert config_in(exported) == open_run(workdir).config
