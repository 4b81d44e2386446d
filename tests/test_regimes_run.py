"""Whole runs of each regime: stopped and continued, two teachers, a pretrained student."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import write_experiment
from test_cli import refused
from test_train import lines_of, same_bits, stop_at
from tiny import NETWORK, tiny_config

from fm_distill.config import ObjectiveConfig, TeacherConfig
from fm_distill.data import sources
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import evaluate
from fm_distill.exporting.export import export
from fm_distill.runs.open_run import open_run
from fm_distill.training.train import train


def taught(trained, **changes):
    """A matching run with the teacher of the session's trained run."""
    teacher = TeacherConfig(workdir=str(trained / "run" / "teacher"))
    config = tiny_config(objective=ObjectiveConfig(temperature=2.0), teacher=teacher)
    return dataclasses.replace(config, **changes)


def two_teachers(trained):
    """The second one is the student of the trained run, at a resolution of its own."""
    network = dataclasses.replace(open_run(trained / "run").network, resolution=24)
    return (TeacherConfig(weights=str(trained / "run"), network=network),)


@pytest.mark.parametrize(
    ("teaching", "feeding", "ensemble"),
    [
        ("fixed", "streaming", "mean_probabilities"),
        pytest.param("independent", "resident", "sum_of_distances", marks=pytest.mark.slow),
    ],
)
def test_a_regime_with_two_teachers_continues_bit_for_bit(
    trained, tmp_path, monkeypatch, teaching, feeding, ensemble
):
    config = taught(trained, teaching=teaching, more_teachers=two_teachers(trained))
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, ensemble=ensemble),
        data=dataclasses.replace(config.data, feeding=feeding),
    )
    whole = train(config, tmp_path / "whole")
    assert whole.complete
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert not train(config, tmp_path / "pieces").complete
    pieces = train(config, tmp_path / "pieces")
    assert pieces.evaluation == whole.evaluation
    same_bits(tmp_path / "whole", tmp_path / "pieces")
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "pieces")
    found = evaluate(tmp_path / "whole", "test")
    assert found["teacher"]["top1"] == whole.evaluation["teacher"]["top1"]
    assert found["kl"]["one"] == pytest.approx(whole.evaluation["kl"]["one"], rel=1e-3)
    assert whole.evaluation["training_view"]["kl"]["train_temperature"] > 0


@pytest.mark.slow
def test_the_regimes_give_different_students(trained, tmp_path):
    kernels = {}
    for teaching in ("function_matching", "consistent", "independent", "fixed"):
        train(taught(trained, teaching=teaching), tmp_path / teaching)
        student = open_run(tmp_path / teaching).student.variables
        kernels[teaching] = np.asarray(student.params["head"]["kernel"])
    names = list(kernels)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.abs(kernels[one] - kernels[other]).max() > 1e-5, (one, other)


def test_another_second_teacher_is_refused(trained, tmp_path):
    config = taught(trained, more_teachers=two_teachers(trained))
    train(config, tmp_path / "run")
    other = dataclasses.replace(
        config, more_teachers=(TeacherConfig(workdir=str(trained / "run" / "teacher")),)
    )
    with pytest.raises(UserError, match=r"not the teacher of the run|trained with another config"):
        evaluate(tmp_path / "run", "test", other)


def test_a_student_starts_from_weights_and_goes_on_without_them(trained, tmp_path, monkeypatch):
    source = tmp_path / "start.safetensors"
    export(trained / "run", source)
    start = dataclasses.replace(NETWORK, weights=str(source))
    slow = dataclasses.replace(tiny_config().optimizer, learning_rate=1e-9, weight_decay=0.0)
    config = tiny_config(student=start, optimizer=slow)
    stop_at(monkeypatch, 1)
    assert not train(config, tmp_path / "run").complete
    begun = open_run(tmp_path / "run").student.variables
    before = open_run(trained / "run").student.variables
    # At this learning rate the student is where it started: the head too, of the same classes.
    for a, b in zip(np_leaves(begun.params), np_leaves(before.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert len(stored["student_weights"]) == 64
    # Other weights under the same path are another run.
    scratch = dataclasses.replace(config, student=NETWORK)
    with pytest.raises(UserError, match=r"student_weights: [0-9a-f]{64} in the workdir, None now"):
        train(scratch, tmp_path / "run")


def np_leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_a_head_of_other_classes_is_replaced_and_said(trained, tmp_path, capsys):
    source = tmp_path / "start.safetensors"
    export(trained / "run", source)
    data = dataclasses.replace(tiny_config().data, classes=None)
    names = tuple(f"kind {i}" for i in range(10))
    config = tiny_config(student=dataclasses.replace(NETWORK, weights=str(source)), data=data)
    # The digits under other names: ten classes, but not those of the head.
    digits = sources.SOURCES["digits"]
    try:
        sources.SOURCES["digits"] = lambda c, n: dataclasses.replace(
            digits(c, n), class_names=names
        )
        train(config, tmp_path / "run")
        assert "head of 10 classes is replaced" in capsys.readouterr().err
        # As a teacher as it is, the same weights are refused: other classes.
        teacher = TeacherConfig(weights=str(source))
        matching = tiny_config(objective=ObjectiveConfig(), teacher=teacher, data=data)
        with pytest.raises(UserError, match=r"class 0 is"):
            train(matching, tmp_path / "other")
        assert not (tmp_path / "other" / "config.json").exists()
    finally:
        sources.SOURCES["digits"] = digits


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fixed-crops", "3"), "belongs to teaching=fixed"),
        (("--objective.label-smoothing", "0.1"), "needs objective.target=labels"),
        (("--schedule.shape", "bit_hyper_rule"), "by the number of examples"),
        (("--teaching", "fixd"), "fixd"),
        (("--student.keep-statistics", "True"), "needs student.weights"),
        (("--optimizer.head-learning-rate", "-1"), "head_learning_rate is -1"),
        (("--student.weights", "none.safetensors"), "none.safetensors"),
    ],
)
def test_wrong_input_is_refused(capsys, trained, tmp_path, arguments, said):
    experiment = write_experiment(
        tmp_path / "e.py",
        f'teacher=TeacherConfig(workdir="{trained}/run/teacher"), objective=ObjectiveConfig()',
    )
    assert said in refused(capsys, "train", experiment, "--workdir", tmp_path / "w", *arguments)
    assert not (tmp_path / "w" / "config.json").exists()
