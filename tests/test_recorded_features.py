"""Pooled features of a teacher in its recording: what is stored, and that terms learn from it."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from conftest import write_experiment
from test_accelerator_paths import matching
from test_recordings import QUIET, learning, nearly_the_same, record_now
from test_train import lines_of, same_bits, stop_at
from tiny import resolved_run, tiny_config

from fm_distill.config import (
    BankConfig,
    MeshConfig,
    ObjectiveConfig,
    TeacherConfig,
    TermConfig,
)
from fm_distill.config.regime import regime_of
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, stack
from fm_distill.data.splits import open_data
from fm_distill.errors import UserError
from fm_distill.models import build_network
from fm_distill.networks.branch import StepViews, make_branch, step_views
from fm_distill.networks.loading import load_networks
from fm_distill.objectives.features import pooled
from fm_distill.planning.compile_step import Request, batch_of, recorded_taps
from fm_distill.planning.recording_plan import recording_plan
from fm_distill.planning.topologies import topology
from fm_distill.preparation.check import problems
from fm_distill.preparation.check_features import check_features
from fm_distill.recordings import status as recordings
from fm_distill.recordings import writing
from fm_distill.recordings.header import RecordedTap, header_differences
from fm_distill.recordings.manifest import open_recording
from fm_distill.recordings.reading import RecordingReader
from fm_distill.recordings.rows import encode, encode_features
from fm_distill.recordings.shards import read_shard, write_shard
from fm_distill.system.preemption import Stop
from fm_distill.train_step.teach import make_teach
from fm_distill.training.record import record
from fm_distill.training.recorded import check_recording, refuse_another_recording
from fm_distill.training.train import train
from fm_distill.views.draws import run_keys, step_draws
from fm_distill.weights.card import only_network

# A map, a vector, and the output of a module.
MODULE = "block1_unit01/b"
TAPS = ("block1", MODULE, "pre_logits")
TAPS_AND_HEAD = ("block1", MODULE, "head", "pre_logits")
CHANNELS = {"block1": 32, MODULE: 8, "pre_logits": 32}
OBJECTIVE = ObjectiveConfig(
    temperature=2.0,
    terms=(
        TermConfig(kind="kl"),
        TermConfig(kind="similarity", student_tap="root", teacher_tap="block1", pool="mean"),
        TermConfig(kind="hint", student_tap="root", teacher_tap=MODULE, pool="mean"),
        TermConfig(kind="rkd_distance", student_tap="pre_logits", teacher_tap="pre_logits"),
        TermConfig(
            kind="bank_similarity",
            student_tap="block1",
            teacher_tap="block1",
            pool="mean",
            bank=BankConfig(rows=32),
        ),
    ),
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run with a live teacher whose features terms read, and its recording in float32."""
    folder = tmp_path_factory.mktemp("tapped")
    config = matching(folder, MeshConfig(data=1), log=QUIET)
    config = dataclasses.replace(config, objective=OBJECTIVE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "SHARD_STEPS", (2, 2))
        record_now(config, folder / "recording", dtype="float32", taps=TAPS)
    assert train(config, folder / "live").complete
    return config, folder


def test_the_mean_over_places():
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(pooled(jnp.asarray(x)), x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    tokens = x.reshape(3, 20, 6)
    np.testing.assert_allclose(pooled(jnp.asarray(tokens)), x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    half = jnp.asarray(tokens[:, 0], jnp.bfloat16)
    assert pooled(half).dtype == jnp.float32
    np.testing.assert_array_equal(pooled(half), half.astype(jnp.float32))


def features_of_the_teacher(config, folder, step):
    """By another path: a batch read by its ids, the views of the training step, not frozen."""
    data, _ = open_data(config)
    networks = load_networks(config, folder, data.train.classes, data.train.class_names)
    (teacher,) = networks.teachers
    branch = make_branch(teacher.network, 10, jnp.dtype("float32"))
    reader = Reader(data.train, config.data, 10)
    examples = RecordingReader(open_recording(folder / "recording"), 6).at(step).examples[0]
    batch = jax.device_put(stack([reader[int(i)] for i in examples]))
    law = regime_of(config).views

    @jax.jit
    def features(variables, batch, step):
        key = run_keys(config.seed).draws
        seen = step_views(law, config.views, branch, (branch,), batch, key, step)
        images = seen.teachers[branch.input_spec]
        return branch.network.apply(variables, images, train=False, features=TAPS).features

    found = jax.device_get(features(teacher.variables, batch, step))
    return {
        name: x.astype(np.float64).reshape(len(x), -1, x.shape[-1]).mean(1)
        for name, x in found.items()
    }


def test_what_is_stored_is_the_mean_of_what_the_teacher_computes(taught, tmp_path):
    config, folder = taught
    expected = features_of_the_teacher(config, folder, 3)
    whole = open_recording(folder / "recording")
    half = record_now(config, tmp_path / "half", taps=("head", *TAPS), steps=(3, 4))
    # A module whose channels are the classes.
    assert half.header.taps == tuple(RecordedTap(x, CHANNELS.get(x, 10)) for x in TAPS_AND_HEAD)
    assert whole.header.taps == tuple(RecordedTap(x, CHANNELS[x]) for x in TAPS)
    for recording, dtype, within in ((whole, "float32", 2e-5), (half, "float16", 2.0**-11)):
        steps = RecordingReader(recording, 6, TAPS)
        found = steps.at(3).rows.features
        for name in TAPS:
            assert found[name].dtype == dtype and found[name].shape == (1, 16, CHANNELS[name])
            size = np.abs(expected[name]).max()
            assert size > 0.1 and np.ptp(expected[name], axis=0).max() > 0.01
            np.testing.assert_allclose(
                found[name][0].astype(np.float64),
                expected[name],
                rtol=within,
                atol=2e-5 * size,
                err_msg=name,
            )
        # Only what is asked for is read.
        assert RecordingReader(recording, 6).at(3).rows.features == {}
    assert "block1 (32 channels)" in recordings.status_text(half)
    # A row of float16: ten logits, 72 channels and the head's ten, an offset, and the identity.
    assert writing.step_bytes(half.header) == 16 * (2 * (10 + 72 + 10) + 4 + 12)
    assert RecordingReader(half, 6, ("head",)).at(3).rows.features["head"].shape == (1, 16, 10)


def test_float16_says_what_it_cannot_hold():
    rows = {"stem": np.array([[[1.0, -7e4]]], np.float32)}
    with pytest.raises(UserError, match=r"stem reaches 70,000 in step 5, and float16 holds 65,"):
        encode_features(rows, "float16", 5)
    np.testing.assert_array_equal(encode_features(rows, "float32", 5)["stem"], rows["stem"])
    with pytest.raises(UserError, match=r"feature stem in step 5 has values that are not finite"):
        encode_features({"stem": rows["stem"] * np.nan}, "float32", 5)


@pytest.fixture(scope="module")
def learned(taught, tmp_path_factory):
    """The run of the recording where the teacher is there too, and what it said."""
    config, folder = taught
    teacher = dataclasses.replace(config.teacher, recording=str(folder / "recording"))
    workdir, said = tmp_path_factory.mktemp("learned") / "run", io.StringIO()
    with contextlib.redirect_stderr(said):
        assert train(dataclasses.replace(config, teacher=teacher), workdir).complete
    return workdir, said.getvalue()


def test_terms_learn_from_the_recording_as_from_the_live_teacher(taught, learned):
    live, (workdir, _) = taught[1] / "live", learned
    nearly_the_same(live, workdir)
    one, other = ([x for x in lines_of(y) if x["split"] == "train"] for y in (live, workdir))
    for term in OBJECTIVE.terms:
        values = [[x[f"term_{term.kind}"] for x in lines] for lines in (one, other)]
        assert min(values[0]) > 0
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=term.kind)


def test_where_the_teacher_is_there_its_features_are_compared(learned):
    _, said = learned
    found = re.search(r"features of block1, block1_unit01/b, pre_logits by at most (\S+) of", said)
    assert found and float(found[1]) < 1e-5


def test_stopped_and_continued_it_ends_in_the_same_bits(taught, learned, tmp_path, monkeypatch):
    """And without the teacher."""
    (config, folder), (whole, _) = taught, learned
    config = learning(config, folder / "recording")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(config, tmp_path / "run").step == 3
    assert train(config, tmp_path / "run").complete
    same_bits(whole, tmp_path / "run")
    assert lines_of(tmp_path / "run") == lines_of(whole)


def test_going_on_remembers_the_taps(taught, tmp_path):
    config, folder = taught
    options = {"dtype": "float32", "taps": ("pre_logits", MODULE, "block1")}  # in any order
    shutil.copytree(folder / "recording", tmp_path / "a")
    (manifest,) = (tmp_path / "a").glob("manifest-*")
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(lines[0] + lines[-1])
    shard = tmp_path / "a" / "steps-00000004-00000006"
    block = read_shard(shard, taps=TAPS)
    others = block.rows.features | {"block1": 1.1 * block.rows.features["block1"]}
    rows = dataclasses.replace(block.rows, features=others)
    write_shard(shard, dataclasses.replace(block, rows=rows))
    with pytest.raises(UserError, match=r"are not those that .* step 5 block1 differ by"):
        record(config, tmp_path / "a", Stop(), **options)
    write_shard(shard, block)
    # Another session, with four steps in one pass.
    config = dataclasses.replace(config, steps_per_dispatch=4)
    joined = record_now(config, tmp_path / "a", **options)
    assert joined.ranges == ((0, 6),) and len([*joined.path.glob("manifest-*")]) == 2
    whole = open_recording(folder / "recording")
    one, other = (RecordingReader(x, 6, TAPS) for x in (whole, joined))
    for step in range(6):
        a, b = one.at(step).rows.features, other.at(step).rows.features
        for name in TAPS:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
    said = "--taps: block1 block1_unit01/b pre_logits in the recording, %s in this run"
    with pytest.raises(UserError, match=said % "block1"):
        record(config, tmp_path / "a", Stop(), dtype="float32", taps=("block1",))
    assert header_differences(whole.header, {"taps": ()}) == [said % "none"]


def test_a_damaged_or_missing_feature_is_found(taught, tmp_path):
    config, folder = taught
    shutil.copytree(folder / "recording", tmp_path / "recording")
    shard = tmp_path / "recording" / "steps-00000000-00000002"
    feature = shard / "feature.block1_unit01%2Fb"
    path = next(x for x in feature.rglob("*") if x.is_file() and x.name != "zarr.json")
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    damaged = recordings.status(open_recording(tmp_path / "recording")).damaged
    assert f"{path.relative_to(shard)} is damaged" in str(damaged)
    student = learning(config, tmp_path / "recording")
    with pytest.raises(UserError, match="steps-00000000-00000002 of the recording is damaged"):
        train(student, tmp_path / "run")
    shutil.rmtree(feature)
    with pytest.raises(UserError, match="steps-00000000-00000002 of the recording is damaged"):
        train(student, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recording = open_recording(tmp_path / "recording")
    assert RecordingReader(recording, 6).at(0).rows.features == {}  # for those who read none


def reading(**term):
    given = {"kind": "similarity", "student_tap": "root", "teacher_tap": "block1"}
    return ObjectiveConfig(terms=(TermConfig(kind="kl"), TermConfig(**given | term)))


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            reading(kind="attention"),
            r"attention compares maps, and teacher.recording holds logits and, of `fm-distill "
            r"record --taps`, features averaged over their positions; leave out one",
        ),
        (
            reading(),
            r"objective.terms.1: block1 has shape \(16, 16, 32\) per image, and "
            r"teacher.recording holds its mean over the positions; give "
            r"objective.terms.1.pool=mean",
        ),
        (
            reading(teacher_tap="root", pool="mean"),
            r"a term reads the teacher's root, and the recording has its features of block1, "
            r"block1_unit01/b, pre_logits; record it with `fm-distill record --taps block1 "
            r"block1_unit01/b pre_logits root`",
        ),
    ],
)
def test_what_a_recording_does_not_hold_is_refused(taught, tmp_path, objective, said):
    config, folder = taught
    student = learning(config, folder / "recording", objective=objective)
    with pytest.raises(UserError, match=said):
        train(student, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recording_from_before_is_the_same_and_has_no_features(taught, tmp_path):
    config, folder = taught
    manifest = next((folder / "recording").glob("manifest-*"))
    tree = json.loads(manifest.read_text().splitlines()[0])
    del tree["taps"]
    (tmp_path / manifest.name).write_text(json.dumps(tree) + "\n")
    header = open_recording(tmp_path).header
    plain = dataclasses.replace(open_recording(folder / "recording").header, taps=())
    assert header == plain and header.identity == plain.identity
    student = learning(config, tmp_path, objective=reading(pool="mean"))
    with pytest.raises(UserError, match=r"the recording has no features; record it with .* block1"):
        train(student, tmp_path / "run")
    # `profile` opens a recording without the checks of a run.
    reader = Reader(open_data(config)[0].train, config.data, 10)
    with pytest.raises(UserError, match=r"lacks a feature: .* reads the teacher's block1, and the"):
        check_recording(student, resolved_run(student), open_recording(tmp_path), reader, 6)
    with pytest.raises(UserError, match=r"teacher_tap is 'block1', and the teacher is a function"):
        check_features(student, 1259, build_network(config.student, 10, jnp.dtype("float32")), ())


def test_a_plan_knows_the_features_of_a_batch(taught):
    config, folder = taught
    network = config.teacher.network
    for student, expected in (
        (learning(config, folder / "recording"), CHANNELS),
        (learning(config, folder / "recording", objective=ObjectiveConfig()), {}),
    ):
        recorded = batch_of(Request(student, (network,), 10, 160, topology("cpu:1"))).recorded
        shapes = {name: x.shape for name, x in recorded.features.items()}
        assert shapes == {name: (16, channels) for name, channels in expected.items()}


def test_a_plan_counts_the_features_that_a_recording_would_hold(taught):
    config, _ = taught
    request = Request(config, (config.teacher.network,), 10, 160, topology("cpu:1"))
    taps = recorded_taps(request)
    assert taps == CHANNELS
    flops = {"teacher": 1.0, "views": 1.0, "total": 3.0}
    analysis = {"recorded_taps": taps, "total_steps": 6, "flops": flops}
    found = recording_plan(config, analysis, None)
    # Steps, rows, then the classes in two bytes, the offset, the identity, and the features.
    assert found.bytes == 6 * 16 * (10 * 2 + 4 + 12 + 2 * sum(CHANNELS.values()))
    assert found.taps == tuple(CHANNELS)
    terms = (TermConfig(kind="attention", student_tap="block1", teacher_tap="block1"),)
    maps = dataclasses.replace(config, objective=ObjectiveConfig(terms=terms))
    taps = recorded_taps(dataclasses.replace(request, config=maps))
    assert taps is None and recording_plan(maps, analysis | {"recorded_taps": taps}, None) is None


def test_a_tap_is_missed_before_the_teacher_is_trained(taught, tmp_path, monkeypatch):
    config, _ = taught
    teacher = TeacherConfig(experiment=str(write_experiment(tmp_path / "teacher.py")))
    config = dataclasses.replace(config, teacher=teacher, objective=ObjectiveConfig())
    monkeypatch.setattr("fm_distill.training.record.train_teachers", None)
    with pytest.raises(UserError, match=r"--taps is 'blok1', .* did you mean 'block1'"):
        record(config, tmp_path / "recording", Stop(), taps=("blok1",))


def test_a_top_k_recording_may_have_features(taught, tmp_path):
    config, folder = taught
    whole = open_recording(folder / "recording")
    header = dataclasses.replace(whole.header, top_k=3, temperature=2.0)
    (tmp_path / "manifest-0.jsonl").write_text(json.dumps(msgspec.to_builtins(header)) + "\n")
    objective = dataclasses.replace(reading(pool="mean"), temperature=2.0)
    student = learning(config, tmp_path, objective=objective)
    refuse_another_recording(student)
    rows = RecordingReader(whole, 6, ("block1",)).at(0).rows
    features = encode_features(rows.features, "float16", 0)
    rows = dataclasses.replace(encode(rows.values, "float16", 3, 2.0), features=features)
    rows = jax.tree.map(lambda x: x[0], rows)
    teach = make_teach("recording", (), 10, student.objective)

    @jax.jit
    def taught_by(rows):
        sizes, pictures = jnp.full((16, 2), 8), jnp.zeros((16, 8, 8, 3), jnp.uint8)
        batch = Batch(pictures, sizes, jnp.zeros(16, jnp.int32), recorded=rows)
        draw = step_draws("mixed", run_keys(0).draws, 0, sizes, student.views).student
        return teach((), batch, StepViews(draw, pictures, {}))

    targets = taught_by(rows)
    assert targets.indices[0].shape == (16, 3)
    np.testing.assert_array_equal(targets.teacher_features["block1"], rows.features["block1"])
    assert targets.teacher_features["block1"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "taps", "said"),
    [
        (
            {},
            ("blok1",),
            "--taps is 'blok1', which the teacher does not have; did you mean 'block1",
        ),
        (
            {"teacher": TeacherConfig(function="f.py:g")},
            ("block1",),
            "teacher.function returns only logits",
        ),
        (
            {"more_teachers": (TeacherConfig(weights="w"),), "objective": ObjectiveConfig()},
            ("block1",),
            "--taps names features of one teacher, and there are more_teachers",
        ),
    ],
)
def test_taps_that_cannot_be_recorded_are_refused(
    taught, tmp_path, monkeypatch, changes, taps, said
):
    config, _ = taught
    monkeypatch.setattr("fm_distill.training.record.make_header", None)  # compiles the first draw
    config = dataclasses.replace(config, **{"objective": ObjectiveConfig()} | changes)
    if config.teacher.function:
        network = dataclasses.replace(
            only_network(config.student), model="function", input_range="zero_one", options={}
        )
        config = dataclasses.replace(
            config, teacher=dataclasses.replace(config.teacher, network=network)
        )
    with pytest.raises(UserError, match=said):
        record(config, tmp_path / "recording", Stop(), taps=taps)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"kind": "attention", "pool": "mean"}, "attention compares positions, and"),
        (
            {"kind": "l2", "pool": "mean", "student_tap": None, "teacher_tap": None},
            "l2 compares outputs, which have no positions: leave out objective.terms.1.pool=mean",
        ),
    ],
)
def test_pool_where_there_is_nothing_to_pool(taught, term, said):
    config, _ = taught
    assert said in "\n".join(problems(dataclasses.replace(config, objective=reading(**term))))


@pytest.mark.parametrize("kind", ["hint", "labels", "l2", "hard", "euclidean", "rkd_angle"])
def test_a_temperature_where_there_is_none(kind):
    term = TermConfig(kind=kind, temperature=4.0)
    config = tiny_config(objective=ObjectiveConfig(terms=(TermConfig(kind="kl"), term)))
    said = f"objective.terms.1.kind={kind} has no temperature: leave out "
    assert said in "\n".join(problems(config))
