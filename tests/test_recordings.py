"""Recorded teachers: what is stored, that it is found intact, and that it teaches as they do."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, command_environment, run_command, write_experiment
from disturb import arrays_of
from test_accelerator_paths import matching
from test_train import lines_of, same_bits, stop_at

from fm_distill.config import (
    CurveConfig,
    DivergenceConfig,
    ExampleWeightsConfig,
    LogConfig,
    MeshConfig,
    ObjectiveConfig,
    ScheduleConfig,
    TeacherConfig,
    TermConfig,
)
from fm_distill.config.serialization import changed
from fm_distill.data.feeding import Reader, StreamingFeed
from fm_distill.data.resident import ResidentFeed
from fm_distill.data.sources import open_source
from fm_distill.errors import TrainingFailed, UserError
from fm_distill.evaluation.inference import evaluate
from fm_distill.objectives.distances import kl_divergence
from fm_distill.objectives.terms import Outputs, Targets, make_terms, values_of
from fm_distill.recordings import status as recordings
from fm_distill.recordings import writing
from fm_distill.recordings.manifest import open_recording
from fm_distill.recordings.reading import RecordingReader
from fm_distill.recordings.rows import decode, encode, indices_of, unseen
from fm_distill.recordings.shards import read_shard, write_shard
from fm_distill.recordings.view_digest import same_views, view_digests
from fm_distill.reports.sweep import sweep
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import make_layout
from fm_distill.training.record import record
from fm_distill.training.train import train

LOGITS = np.random.Generator(np.random.Philox(3)).normal(20, 5, (7, 2, 30)).astype(np.float32)


def softmax(logits, temperature):
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def logits_of(rows):
    return np.stack([np.asarray(x) for x in decode(rows)], axis=1)


def test_float32_rows_are_the_logits():
    np.testing.assert_array_equal(logits_of(encode(LOGITS, "float32")), LOGITS)


def test_float16_rows_are_near_in_the_distance_to_the_largest():
    rows = encode(LOGITS, "float16")
    assert rows.values.dtype == np.float16
    below = LOGITS.max(-1, keepdims=True) - LOGITS
    assert (np.abs(logits_of(rows) - LOGITS) <= below * 2.0**-11 + 4e-6).all()
    # Without the shift, a float16 near 20 is a multiple of 1/64.
    assert np.abs(LOGITS.astype(np.float16) - LOGITS).max() > 4e-3
    one, two = (jnp.asarray(x.reshape(-1, 30)) for x in (LOGITS, logits_of(rows)))
    assert float(kl_divergence(one, two).max()) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_top_k_compares_what_is_lumped_together(temperature):
    """Against float64: KL of (p_1, ..., p_K, rest), value and gradient."""
    kept = 5
    rows = encode(LOGITS, "float32", kept, temperature)
    students = jnp.asarray(np.random.Generator(np.random.Philox(4)).normal(0, 3, (7, 30)), "f4")
    targets = Targets(decode(rows), indices=indices_of(rows))
    objective = ObjectiveConfig(
        temperature=temperature, temperature_squared=False, ensemble="sum_of_distances"
    )
    terms = make_terms(objective)

    def reference(students):
        total = np.zeros(7)
        for i in range(2):
            p, q = softmax(LOGITS[:, i], temperature), softmax(students, temperature)
            order = np.argsort(-LOGITS[:, i], axis=-1)[:, :kept]
            p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
            p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
            total += (p * np.log(p / q)).sum(-1)
        return total

    host = np.asarray(students, np.float64)
    (found,) = values_of(terms, Outputs(students), targets, 0.0)
    np.testing.assert_allclose(found, reference(host), rtol=2e-5)
    gradient = jax.grad(lambda x: values_of(terms, Outputs(x), targets, 0.0)[0].sum())(students)
    for row, column in itertools.product((0, 3), range(30)):
        moved = np.zeros_like(host)
        moved[row, column] = 1e-6
        slope = (reference(host + moved) - reference(host - moved))[row] / 2e-6
        assert float(gradient[row, column]) == pytest.approx(slope, abs=2e-5)
    full = sum(kl_divergence(students, jnp.asarray(LOGITS[:, i]), temperature) for i in range(2))
    assert (np.asarray(found) <= np.asarray(full) + 1e-5).all()


def test_what_a_top_k_does_not_see():
    mass, hidden = unseen(LOGITS, 5, 2.0)
    p = np.sort(softmax(LOGITS, 2.0), axis=-1)[..., :25]
    r = p.sum(-1)
    assert mass == pytest.approx(r.mean())
    inside = p / r[..., None]
    assert hidden == pytest.approx((r * (inside * np.log(inside * 25)).sum(-1)).mean())


def test_a_view_digest_knows_each_part_of_a_view():
    boxes = np.array([[1.0, 2.0, 30.0, 40.0]] * 8, np.float32)
    flips, partners = np.zeros(8, bool), np.arange(8)
    coefficients = np.full(8, 0.6, np.float32)
    base = view_digests(boxes, flips, coefficients, partners)
    assert len({*base.tolist()}) == 8  # the partners differ
    assert same_views(base, view_digests(boxes + 1e-5, flips, coefficients + 1e-6, partners))
    for i in range(4):
        moved = boxes.copy()
        moved[:, i] += 1
        assert not same_views(base, view_digests(moved, flips, coefficients, partners))
    assert not same_views(base, view_digests(boxes, ~flips, coefficients, partners))
    assert not same_views(base, view_digests(boxes, flips, coefficients + 0.01, partners))
    assert not same_views(base, view_digests(boxes, flips, coefficients, np.roll(partners, 1)))
    assert not same_views(base, view_digests(boxes, flips, None, None))


QUIET = LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False, final_evaluation=False)


def record_now(config, folder, **options):
    found = record(config, folder, Stop(), **options)
    assert found.complete
    return found.recording


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run with a live teacher, and its recording in float32 in shards of two steps."""
    folder = tmp_path_factory.mktemp("taught")
    config = matching(folder, MeshConfig(data=1), log=QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "SHARD_STEPS", (2, 2))
        record_now(config, folder / "recording", dtype="float32")
    assert train(config, folder / "live").complete
    return config, folder


def learning(config, recording, **changes):
    """`config` from a recording, with the teacher only where `changes` say so."""
    teacher = TeacherConfig(recording=str(recording))
    return dataclasses.replace(config, **{"teacher": teacher} | changes)


def losses(workdir):
    names = ("step", "loss", "gradient_norm", "update_norm", "agreement")
    return [[x[n] for n in names] for x in lines_of(workdir) if x["split"] == "train"]


def nearly_the_same(live, recorded):
    """Two programs, which the compiler fuses otherwise: equal up to the last bits."""
    np.testing.assert_allclose(losses(recorded), losses(live), rtol=3e-6)
    one, other = arrays_of(live), arrays_of(recorded)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("feeding", ["resident", "streaming"])
def test_a_recorded_teacher_teaches_as_the_live_one(taught, tmp_path, feeding):
    """To the end, and without the teacher being there."""
    config, folder = taught
    data = dataclasses.replace(config.data, feeding=feeding)
    train(learning(config, folder / "recording", data=data), tmp_path / "run")
    nearly_the_same(folder / "live", tmp_path / "run")
    if feeding == "resident":
        found, live = (evaluate(x) for x in (tmp_path / "run", folder / "live"))
        assert found["teacher"]["top1"] is None
        with pytest.raises(UserError, match="/gone"):  # what was asked for has to be there
            gone = changed(open_run(tmp_path / "run").config, {"teacher.workdir": "/gone"})
            evaluate(tmp_path / "run", config=gone)
        assert found["student"] == pytest.approx(live["student"], rel=1e-5)


def test_where_the_teacher_is_there_it_is_compared_and_evaluated(taught, tmp_path, capsys):
    config, folder = taught
    teacher = dataclasses.replace(config.teacher, recording=str(folder / "recording"))
    train(dataclasses.replace(config, teacher=teacher), tmp_path / "run")
    assert (
        "the recording compared with the teachers on this machine, in steps 0"
        in capsys.readouterr().err
    )
    found, live = (evaluate(x) for x in (tmp_path / "run", folder / "live"))
    for part in ("student", "teacher", "agreement", "kl"):
        assert found[part] == pytest.approx(live[part], rel=1e-4)


def test_float16_is_near(taught, tmp_path):
    config, folder = taught
    record_now(config, tmp_path / "half")
    train(learning(config, tmp_path / "half"), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(folder / "live"), rtol=2e-3)
    assert losses(tmp_path / "run") != losses(folder / "live")


def test_stopped_and_continued_it_ends_in_the_same_bits(taught, tmp_path, monkeypatch):
    config, folder = taught
    config = learning(config, folder / "recording")
    train(config, tmp_path / "whole")
    for end in (3, 5):
        with monkeypatch.context() as patch:
            stop_at(patch, 2 if end == 3 else 1)
            assert train(config, tmp_path / "run").step == end
    assert train(config, tmp_path / "run").complete
    same_bits(tmp_path / "whole", tmp_path / "run")
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


@pytest.mark.slow
def test_several_steps_a_dispatch_on_eight_devices(taught, tmp_path, monkeypatch):
    monkeypatch.setattr("fm_distill.system.sharding.FSDP_SMALLEST", 64)
    config, folder = taught
    log = LogConfig(every_steps=2, evaluate_every_steps=0, tensorboard=False)
    changes = {"mesh": MeshConfig(data=2, fsdp=4), "steps_per_dispatch": 2, "log": log}
    train(dataclasses.replace(config, **changes), tmp_path / "live")
    train(learning(config, folder / "recording", **changes), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "live"), rtol=1e-4)
    one = dict(zip("slgua", losses(folder / "live")[-1], strict=True))
    assert losses(tmp_path / "run")[-1][1] == pytest.approx(one["l"], rel=1e-4)


def test_joined_passes_record_the_same_logits(taught, tmp_path):
    config, folder = taught
    joined = dataclasses.replace(config, steps_per_dispatch=3, mesh=MeshConfig(data=8))
    record_now(joined, tmp_path / "joined", dtype="float32")
    one, other = (
        RecordingReader(open_recording(x), 6) for x in (folder / "recording", tmp_path / "joined")
    )
    for step in range(6):
        a, b = one.at(step), other.at(step)
        np.testing.assert_allclose(a.rows.values, b.rows.values, atol=1e-5)
        np.testing.assert_array_equal(a.examples, b.examples)
        np.testing.assert_array_equal(a.views, b.views)


def test_a_recording_at_a_url_is_brought_once(taught, tmp_path, monkeypatch):
    config, folder = taught
    student = learning(config, f"file://{folder / 'recording'}")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert not train(student, tmp_path / "run").complete
    missing = learning(config, f"file://{tmp_path / 'nowhere'}")
    assert train(missing, tmp_path / "run").complete
    nearly_the_same(folder / "live", tmp_path / "run")
    with pytest.raises(UserError, match="there is no folder file://"):
        train(missing, tmp_path / "other")


def test_a_copy_of_another_recording_is_replaced_before_the_run_begins(taught, tmp_path):
    config, folder = taught
    remote, run = copied(folder, tmp_path), tmp_path / "run"
    student = learning(config, f"file://{remote}")
    with pytest.raises(
        UserError, match=r"file://.* belongs to another run:\n  seed: 0 in the recording"
    ):
        train(dataclasses.replace(student, seed=3), run)
    assert not run.exists()
    # A copy from when the recording had two shards.
    shutil.copytree(remote, run / "recording")
    (manifest,) = (run / "recording").glob("manifest-*.jsonl")
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    assert train(student, run).complete
    nearly_the_same(folder / "live", run)


def test_ranges_of_several_sessions_are_joined(taught, tmp_path):
    config, folder = taught
    record_now(config, tmp_path / "b", dtype="float32", steps=(4, None))
    record_now(config, tmp_path / "a", dtype="float32", steps=(0, 2))
    for path in (tmp_path / "b").iterdir():
        if path.name != "lock":
            shutil.move(path, tmp_path / "a")
    found = open_recording(tmp_path / "a")
    assert found.ranges == ((0, 2), (4, 6))
    assert found.missing(0, 8) == ((2, 4), (6, 8))
    assert "MISSING: steps 2 to 4" in recordings.status_text(found)
    with pytest.raises(UserError, match=r"has the steps 0 to 2, 4 to 6, and this run needs 0 to 6"):
        train(learning(config, tmp_path / "a"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    joined = record_now(config, tmp_path / "a", dtype="float32")
    assert joined.ranges == ((0, 6),)
    assert len(joined.shards) == 3
    train(learning(config, tmp_path / "a"), tmp_path / "run")
    nearly_the_same(folder / "live", tmp_path / "run")


def test_views_repeat_after_the_end_of_a_shorter_recording(taught, tmp_path, capsys):
    config, folder = taught
    record_now(config, tmp_path / "short", dtype="float32", steps=(0, 4))
    train(learning(config, tmp_path / "short"), tmp_path / "run")
    assert "the views repeat after 4 steps" in capsys.readouterr().err
    views = dataclasses.replace(config.views, period_steps=4)
    live = dataclasses.replace(config, views=views)
    train(live, tmp_path / "live")
    nearly_the_same(tmp_path / "live", tmp_path / "run")
    train(learning(live, folder / "recording"), tmp_path / "longer")
    same_bits(tmp_path / "run", tmp_path / "longer")
    repeated, never = (np.array(losses(x / "live")) for x in (tmp_path, folder))
    np.testing.assert_allclose(repeated[:4], never[:4], rtol=3e-6)
    assert abs(repeated[4] - never[4]).max() > 1e-4
    wanted = dataclasses.replace(live, schedule=ScheduleConfig(total_steps=12, warmup_steps=1))
    with pytest.raises(UserError, match="0 to 4, and this run needs 0 to 5"):
        longer = dataclasses.replace(config.views, period_steps=5)
        train(learning(wanted, tmp_path / "short", views=longer), tmp_path / "refused")


def test_a_recording_that_grew_does_not_change_a_run_that_began(taught, tmp_path, monkeypatch):
    config, _ = taught
    record_now(config, tmp_path / "short", dtype="float32", steps=(0, 4))
    student = learning(config, tmp_path / "short")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert not train(student, tmp_path / "run").complete
    record_now(config, tmp_path / "short", dtype="float32")
    with pytest.raises(UserError, match=r"repeat after 4 steps in the workdir, after 6 now"):
        train(student, tmp_path / "run")
    views = dataclasses.replace(config.views, period_steps=4)
    with pytest.raises(UserError, match="period_steps: None in the workdir, 4 now"):
        train(dataclasses.replace(student, views=views), tmp_path / "run")


def test_a_sweep_over_temperatures_needs_no_teacher(taught, tmp_path):
    config, folder = taught
    log = dataclasses.replace(QUIET, final_evaluation=True)
    config = learning(config, folder / "recording", log=log)
    table = sweep(config, {"objective.temperature": (1.0, 2.0)}, tmp_path)
    assert len(table.splitlines()) == 4
    runs = sorted(x for x in tmp_path.iterdir() if (x / "metrics.jsonl").exists())
    one, two = (losses(x) for x in runs)
    np.testing.assert_allclose(two, losses(folder / "live"), rtol=3e-6)
    assert one[1][1] != two[1][1]


def test_another_initial_seed_changes_the_init_alone(taught, tmp_path):
    config, folder = taught
    other = dataclasses.replace(config.student, seed=7)
    train(learning(config, folder / "recording", student=other), tmp_path / "run")
    # Not in the first two: the head starts at zero, and the first learning rate is zero.
    found, live = (losses(x)[-1][1] for x in (tmp_path / "run", folder / "live"))
    assert found != pytest.approx(live, rel=1e-4)
    same = dataclasses.replace(config.student, seed=0)  # the run's own
    train(learning(config, folder / "recording", student=same), tmp_path / "same")
    nearly_the_same(folder / "live", tmp_path / "same")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: 0 in the recording, 1 in this run"),
        ({"batch_size": 8}, "batch_size: 16 in the recording, 8 in this run"),
        ({"teaching": "consistent"}, "views of `teaching`: mixed in the recording, unmixed in"),
        ({"views.mixup": "none"}, "views.mixup: batch in the recording, none in this run"),
        ({"data.canvas.size": 28}, "data.canvas.size: 32 in the recording, 28 in this run"),
        ({"data.train.name": "test"}, "1,259 examples of digits/train, and this run has 359 of"),
        ({"data.long_tail": 1.5}, "has 1,061 of digits/train with a long tail of 1.5"),
        ({"teaching": "fixed"}, "teaching=fixed computes its targets once"),
        ({"objective.target": "labels"}, "objective.target=labels learns from labels"),
    ],
)
def test_another_run_than_the_recorded_is_refused(taught, tmp_path, change, said):
    config, folder = taught
    changed = learning(config, folder / "recording")
    for name, value in change.items():
        changed = replaced(changed, name.split("."), value)
    with pytest.raises(UserError) as refused:
        train(changed, tmp_path / "run")
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def replaced(part, names, value):
    first, *rest = names
    if rest:
        value = replaced(vars(part)[first], rest, value)
    return dataclasses.replace(part, **{first: value})


def test_skipping_batches_is_refused(taught, tmp_path):
    config, folder = taught
    skipping = learning(config, folder / "recording", divergence=DivergenceConfig(action="skip"))
    with pytest.raises(UserError, match=r"divergence\.action=skip leaves out batches"):
        train(skipping, tmp_path / "run")


def test_another_teacher_than_the_recorded_is_refused(taught, tmp_path):
    config, folder = taught
    with np.load(folder / "teacher.npz") as archive:
        tensors = {name: archive[name] for name in archive.files}
    name = next(iter(tensors))
    np.savez(tmp_path / "other.npz", **tensors | {name: tensors[name] + 1})
    teacher = dataclasses.replace(
        config.teacher, weights=str(tmp_path / "other.npz"), recording=str(folder / "recording")
    )
    with pytest.raises(
        UserError, match="was recorded from other teachers than the run's: their weights"
    ):
        train(dataclasses.replace(config, teacher=teacher), tmp_path / "run")


def test_a_top_k_recording_teaches_at_its_temperature_alone(taught, tmp_path):
    config, folder = taught
    recorded = record_now(config, tmp_path / "top", top_k=3)
    checked = recordings.status(recorded)
    live = open_recording(folder / "recording")
    logits = np.concatenate([read_shard(live.path / x.name).rows.values for x in live.shards])
    assert checked.unseen == pytest.approx(unseen(logits, 3, 2.0), rel=1e-4)
    share, nats = checked.unseen
    said = f"the others have {share:.2%} of the probability, and the KL is {nats:.2g} nats too low"
    assert said in recordings.status_text(recorded, checked)
    assert recordings.status(live).unseen is None
    student = learning(config, tmp_path / "top")
    assert train(student, tmp_path / "run").complete
    for change, said in (
        ({"temperature": 1.0}, "objective.temperature: 2.0 in the recording of the top 3"),
        ({"distance": "l2"}, "l2, and a recording of the top 3 supports only kl"),
        (
            {"example_weights": ExampleWeightsConfig(kind="teacher_entropy")},
            "teacher_entropy is that of all classes, and the recording has the top 3",
        ),
    ):
        objective = dataclasses.replace(config.objective, **change)
        with pytest.raises(UserError, match=said):
            train(dataclasses.replace(student, objective=objective), tmp_path / "other")
    with pytest.raises(UserError, match="--top-k is 10; expected less than the 10 classes"):
        record(config, tmp_path / "all", Stop(), top_k=10)


def test_the_rest_of_a_top_k_recording_has_the_temperature_of_the_terms(taught, tmp_path):
    config, _ = taught
    kl = TermConfig(kind="kl", temperature=4.0)
    own = dataclasses.replace(
        config, objective=ObjectiveConfig(terms=(kl, TermConfig(kind="labels", weight=0.1)))
    )
    recorded = record_now(own, tmp_path / "top", top_k=3)
    assert recorded.header.temperature == 4.0
    assert train(learning(own, tmp_path / "top"), tmp_path / "run").complete
    weights = ExampleWeightsConfig(kind="teacher_distance")  # at objective.temperature
    weighted = dataclasses.replace(own.objective, example_weights=weights)
    with pytest.raises(UserError, match=r"4\.0 in the recording of the top 3, .* 1\.0 in this run"):
        train(
            dataclasses.replace(learning(own, tmp_path / "top"), objective=weighted),
            tmp_path / "weighted",
        )
    for objective, said in (
        (weighted, r"this objective has 1\.0, 4\.0; record all classes"),
        (
            dataclasses.replace(
                config.objective, temperature_schedule=CurveConfig(points=((0.0, 1.0), (1.0, 2.0)))
            ),
            "this objective has a schedule of it",
        ),
    ):
        with pytest.raises(UserError, match=said):
            record(dataclasses.replace(own, objective=objective), tmp_path / "x", Stop(), top_k=3)
    assert not (tmp_path / "x").exists()


def copied(folder, tmp_path):
    return shutil.copytree(folder / "recording", tmp_path / "recording")


def test_every_flipped_bit_is_found_before_it_teaches(taught, tmp_path):
    config, folder = taught
    recording = copied(folder, tmp_path)
    shard = recording / "steps-00000002-00000004"
    for path in sorted(x for x in shard.rglob("*") if x.is_file() and x.name != "zarr.json"):
        whole = path.read_bytes()
        for at in np.linspace(0, len(whole) - 1, 9).astype(int):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(TrainingFailed, match="is damaged"):
                read_shard(shard)
        assert f"{path.relative_to(shard)} is damaged" in str(
            recordings.status(open_recording(recording)).damaged
        )
        path.write_bytes(whole)
    values = shard / "values" / "c" / "0" / "0" / "0" / "0"
    values.write_bytes(bytes([values.read_bytes()[0] ^ 1]) + values.read_bytes()[1:])
    with pytest.raises(TrainingFailed, match=r"the shard .*steps-00000002-00000004 of the rec"):
        train(learning(config, recording), tmp_path / "run")
    # The step before it was done, and its state is there.
    assert [x[0] for x in losses(tmp_path / "run")] == [1, 2]
    with pytest.raises(UserError, match=r"steps-00000002-00000004 of the recording is damaged"):
        train(learning(config, recording), tmp_path / "run")  # which begins with that step


def test_what_is_damaged_or_missing_at_the_start_is_wrong_input(taught, tmp_path):
    """Found by the views that are checked before the first step, and before a workdir is there."""
    config, folder = taught
    recording = copied(folder, tmp_path)
    first, last = recording / "steps-00000000-00000002", recording / "steps-00000004-00000006"
    values = first / "values" / "c" / "0" / "0" / "0" / "0"
    whole = values.read_bytes()
    values.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    damaged = r"the shard .*steps-00000000-00000002 of the recording is damaged: .*copy"
    with pytest.raises(UserError, match=damaged):
        train(learning(config, recording), tmp_path / "run")
    values.write_bytes(whole)
    shutil.rmtree(last)
    with pytest.raises(
        UserError, match=r"1 of the shards .* missing, the first one steps-00000004"
    ):
        train(learning(config, recording), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.MonkeyPatch.context() as patch:  # a run that ends before it needs none of it
        stop_at(patch, 1)
        short = dataclasses.replace(config.views, period_steps=4)
        train(learning(config, recording, views=short), tmp_path / "short")


def test_a_missing_shard_is_named_and_recorded_again(taught, tmp_path):
    config, folder = taught
    recording = copied(folder, tmp_path)
    shutil.rmtree(recording / "steps-00000002-00000004")
    assert recordings.status(open_recording(recording)).damaged == {
        "steps-00000002-00000004": "is missing"
    }
    again = record_now(config, recording, dtype="float32")
    assert recordings.status(again).damaged == {}
    # Two that are next to each other are recorded again in one piece.
    for name in ("steps-00000002-00000004", "steps-00000004-00000006"):
        shutil.rmtree(recording / name)
    again = record_now(config, recording, dtype="float32")
    assert [(x.start, x.stop) for x in again.shards] == [(0, 2), (2, 6)]
    assert recordings.status(again).damaged == {}
    train(learning(config, recording), tmp_path / "run")
    nearly_the_same(folder / "live", tmp_path / "run")


def rewritten(recording, change):
    (manifest,) = recording.glob("manifest-*.jsonl")
    lines = [json.loads(x) for x in manifest.read_text().splitlines()]
    change(lines)
    manifest.write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[0].update(format=9), "has format 9, and this version reads up to 1"),
        (lambda lines: lines[0].pop("seed"), "does not begin with the header of a recording"),
        (lambda lines: lines[1].update(start="x"), "is not the manifest of a recording"),
        (lambda lines: lines.clear(), "is not the manifest of a recording"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(taught, tmp_path, change, said):
    config, folder = taught
    recording = copied(folder, tmp_path)
    rewritten(recording, change)
    with pytest.raises(UserError, match=said):
        train(learning(config, recording), tmp_path / "run")


def test_steps_that_are_there_twice_are_refused(taught, tmp_path):
    config, folder = taught
    recording = copied(folder, tmp_path)
    rewritten(recording, lambda lines: lines[1].update(stop=3))
    shutil.copytree(recording / "steps-00000000-00000002", recording / "steps-00000000-00000003")
    with pytest.raises(UserError, match="has the steps 2 to 3 twice"):
        train(learning(config, recording), tmp_path / "run")


def test_views_of_another_generator_are_noticed(taught, tmp_path):
    """By the draws of fixed keys, and by those of the recorded steps."""
    config, folder = taught
    recording = copied(folder, tmp_path)
    rewritten(recording, lambda lines: lines[0]["golden"].reverse())
    with pytest.raises(UserError, match="were drawn by another version of JAX or of fm-distill"):
        train(learning(config, recording), tmp_path / "run")
    rewritten(recording, lambda lines: lines[0]["golden"].reverse())
    first = recording / "steps-00000000-00000002"
    block = read_shard(first)
    write_shard(first, dataclasses.replace(block, views=block.views + np.uint64(1)))
    with pytest.raises(UserError, match="the views of step 0 are not those of the recording in"):
        train(learning(config, recording), tmp_path / "run")


@pytest.mark.parametrize("feeding", ["resident", "streaming"])
def test_outputs_for_other_examples_are_refused(taught, feeding):
    """In each batch, whatever the header says."""
    config, folder = taught
    reader = Reader(open_source(config.data, "train"), config.data, 10)
    recording = RecordingReader(open_recording(folder / "recording"), 6)
    layout = make_layout(MeshConfig(data=1))
    shared = {"recording": recording, "period_steps": None}
    if feeding == "resident":
        feed = ResidentFeed(reader, 1, 16, layout.replicated, layout.ids, **shared)
    else:
        feed = StreamingFeed(reader, 1, 16, 6, layout.batch, **shared)
    with pytest.raises(UserError, match=r"the recording has example .* where this run has"):
        next(feed.feed(0, iter([1])))


def test_a_line_that_was_cut_off_does_not_count(taught, tmp_path):
    _, folder = taught
    recording = copied(folder, tmp_path)
    (manifest,) = recording.glob("manifest-*.jsonl")
    manifest.write_text(manifest.read_text()[:-20])
    assert open_recording(recording).ranges == ((0, 4),)


def test_another_recording_is_not_added_to(taught, tmp_path):
    config, folder = taught
    recording = copied(folder, tmp_path)
    with pytest.raises(UserError, match="dtype: float32 in the recording, float16 in this run"):
        record(config, recording, Stop())
    other = dataclasses.replace(config, seed=3)
    with pytest.raises(UserError, match="seed: 0 in the recording, 3 in this run"):
        record(other, recording, Stop(), dtype="float32")
    record_now(other, tmp_path / "other", dtype="float32", steps=(0, 2))
    (manifest,) = (tmp_path / "other").glob("manifest-*.jsonl")
    shutil.copy(manifest, recording)
    with pytest.raises(UserError, match="belong to different recordings: seed: "):
        open_recording(recording)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"objective": ObjectiveConfig(target="labels")}, {}, "there is nothing to record"),
        ({"teaching": "fixed"}, {}, "there is nothing to record"),
        ({}, {"steps": (4, 2)}, "--steps is 4:2; expected a range within 0:6"),
        ({}, {"steps": (0, 7)}, "--steps is 0:7; expected a range within 0:6"),
        ({}, {"top_k": 0}, "--top-k is 0; expected 1 or more"),
    ],
)
def test_what_cannot_be_recorded_is_refused(taught, tmp_path, changes, options, said):
    config, _ = taught
    with pytest.raises(UserError, match=said):
        record(dataclasses.replace(config, **changes), tmp_path / "x", Stop(), **options)


def test_a_stop_while_the_teacher_is_trained_is_no_error(taught, tmp_path):
    config, _ = taught
    write_experiment(tmp_path / "teacher.py")
    teacher = TeacherConfig(experiment=str(tmp_path / "teacher.py"))
    config = dataclasses.replace(config, teacher=teacher)
    found = record(config, tmp_path / "recording", Stop(max_hours=1e-9))
    assert not found.complete and found.recording is None
    assert found.reason == "the 1e-09 hours are used up"
    assert Workdir(tmp_path / "recording" / "teacher").read_status().state == "paused"


def test_a_full_disk_keeps_the_shards_before(taught, tmp_path, monkeypatch):
    config, folder = taught
    monkeypatch.setattr(writing, "SHARD_STEPS", (2, 2))
    write, calls = writing.write_shard, []

    def full(place, block):
        calls.append(place)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(place, block)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_shard", full)
        with pytest.raises(UserError, match=r"can no longer be written: .*No space left"):
            record(config, tmp_path / "full", Stop(), dtype="float32")
    assert open_recording(tmp_path / "full").ranges == ((0, 2),)
    again = record_now(config, tmp_path / "full", dtype="float32")
    assert again.header.identity == open_recording(folder / "recording").header.identity
    train(learning(config, tmp_path / "full"), tmp_path / "run")
    nearly_the_same(folder / "live", tmp_path / "run")


def test_the_command_killed_goes_on_and_is_known_to_status(taught, tmp_path):
    """Killed without a word in the middle; then to the end, and a student from it."""
    _, folder = taught
    teacher = f'teacher=TeacherConfig(weights="{folder}/teacher.npz", network=NetworkConfig('
    teacher += 'model="bit", resolution=16, options=dict(depths=(1,), width=0.125, groups=4, '
    teacher += 'stem="small")))'
    changes = teacher + ", objective=ObjectiveConfig(temperature=2.0)"
    schedule = ", schedule=ScheduleConfig(total_steps=40000, warmup_steps=1)"
    experiment = write_experiment(tmp_path / "run.py", changes + schedule)
    recording = tmp_path / "recording"
    taps = ["--taps", "block1", "block1_unit01/b"]
    arguments = [sys.executable, "-m", "fm_distill", "record", experiment, "--to", recording, *taps]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=command_environment(), stderr=subprocess.PIPE, text=True
    )
    give_up = time.monotonic() + 200
    while len([*recording.glob("steps-*")]) < 2 and time.monotonic() < give_up:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = open_recording(recording).steps
    assert done >= 512
    options = ["--schedule.total-steps", str(done + 20)]
    finished = run_command("record", experiment, "--to", recording, *taps, *options)
    assert finished.returncode == 0, finished.stderr
    assert "20 to do" in finished.stderr
    known = json.loads(run_command("status", recording, "--json").stdout)
    assert known["ranges"] == [[0, done + 20]]
    assert known["damaged"] == {}
    assert known["taps"] == taps[1:]
    student = ["--teacher.recording", recording, "--teacher.weights", "None", "--steps", "3"]
    trained = run_command("train", experiment, "--workdir", tmp_path / "student", *student)
    assert trained.returncode == 0, trained.stderr
    wrong = run_command("record", experiment, "--to", tmp_path / "x", "--steps", "seven")
    assert wrong.returncode == 2
    assert "--steps is 'seven'; expected A:B" in wrong.stderr
    wrong = run_command("record", experiment, "--to", tmp_path / "x", "--taps", "blok1")
    assert wrong.returncode == 2
    assert "--taps is 'blok1', which the teacher does not have; did you mean" in wrong.stderr
