"""What is left of a recording when it is interrupted, and what is refused before anything is lost.

Nothing is compiled here but the views of a teacher that is a function.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from conftest import write_experiment
from test_function_teachers import FUNCTION, taught_by
from tiny import NETWORK, resolved_run, tiny_config

from fm_distill.config import (
    MeshConfig,
    ObjectiveConfig,
    StudentConfig,
    TeacherConfig,
    TermConfig,
    ViewConfig,
)
from fm_distill.config.resolved import RecordingFacts
from fm_distill.data.feeding import Reader
from fm_distill.data.sources import open_source
from fm_distill.errors import UserError
from fm_distill.preparation.check import problems
from fm_distill.preparation.resolve import _period_steps
from fm_distill.recordings import shards
from fm_distill.recordings.manifest import ManifestWriter, Shard, open_recording
from fm_distill.recordings.rows import decode, encode
from fm_distill.recordings.shards import RecordedSteps, read_shard, write_shard
from fm_distill.runs.workdir import Workdir
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import make_layout
from fm_distill.training import quantised_teachers, recorded
from fm_distill.training import record as record_module
from fm_distill.training import train as train_module
from fm_distill.training.record import record
from fm_distill.training.recorded import (
    GOLDEN_SIZES,
    _same,
    digests_of_draw,
    make_draws,
    make_header,
)

FEATURES = TermConfig(kind="hint", student_tap="block1", teacher_tap="blok1")


def block(value):
    """Two steps of three examples."""
    logits = np.full((2, 3, 1, 10), value, np.float32)
    logits[..., 0] += 1
    examples = np.arange(6, dtype=np.int32).reshape(2, 3)
    return RecordedSteps(encode(logits, "float32"), examples, examples.astype(np.uint64))


def test_a_shard_that_is_half_written_does_not_take_the_place_of_a_lost_one(tmp_path, monkeypatch):
    """Its line is in a manifest already."""
    folder = tmp_path / "steps-00000000-00000002"
    write = shards._write

    async def killed(place, arrays):
        await write(place, {"values": arrays["values"]})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            write_shard(folder, block(1.0))
    assert not folder.exists()
    write_shard(folder, block(2.0))
    assert {x.name for x in tmp_path.iterdir()} == {folder.name}
    np.testing.assert_array_equal(read_shard(folder).rows.values, block(2.0).rows.values)


def test_the_line_of_the_last_session_counts(tmp_path):
    config = tiny_config()
    header = make_header(config, resolved_run(config), "float32", None)
    for number in range(12):  # by chance, one in twelve
        manifest = ManifestWriter(tmp_path, header, {})
        manifest.add(Shard(0, 2, {"values": str(number)}))
        manifest.close()
    # As earlier versions named them.
    shutil.copy(min(tmp_path.glob("manifest-*")), tmp_path / "manifest-ffffffffffff.jsonl")
    assert [x.files for x in open_recording(tmp_path).shards] == [{"values": "11"}]


def test_of_steps_that_were_lost_twice_the_last_lines_count(tmp_path):
    config = tiny_config()
    header = make_header(config, resolved_run(config), "float32", None)
    for pieces in ([(0, 4), (4, 6)], [(0, 2), (2, 4)], [(1, 3)]):
        manifest = ManifestWriter(tmp_path, header, {})
        for start, stop in pieces:
            manifest.add(Shard(start, stop, {}))
        manifest.close()
    found = open_recording(tmp_path)
    assert found.ranges == ((1, 3), (4, 6))
    (tmp_path / "steps-00000000-00000004").mkdir()
    assert open_recording(tmp_path).ranges == ((0, 6),)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_logit_too_far_from_the_largest_is_refused(top_k):
    logits = np.array([[[0.0, 2.0, -1e9], [0.0, 0.0, 1.0]]], np.float32)
    np.testing.assert_array_equal(decode(encode(logits, "float32"))[0], logits[:, 0])
    if top_k is not None:  # the far one is not kept
        assert np.isfinite(encode(logits, "float16", top_k).values).all()
        logits[0, 0, 0] = -1e9
    with pytest.raises(UserError, match=r"1,000,000,\d+ below the largest one, and float16 holds"):
        encode(logits, "float16", top_k)


def test_the_steps_before_a_failure_of_the_teacher_are_kept(tmp_path):
    (tmp_path / "mine.py").write_text(
        FUNCTION.replace("    assert", "    count(images)\n    assert")
    )
    with (tmp_path / "mine.py").open("a") as file:
        file.write(
            "BATCHES = []\n"
            "def count(images):\n"
            "    BATCHES.append(len(images))\n"
            "    if BATCHES.count(16) == 4:\n"
            "        raise OSError('the service is gone')\n"
        )
    config = taught_by(tmp_path / "mine.py", mesh=MeshConfig(data=1))
    with pytest.raises(UserError, match="the service is gone"):
        record(config, tmp_path / "recording", Stop())
    kept = open_recording(tmp_path / "recording")
    assert kept.ranges == ((0, 3),)
    assert shards.digests_of(kept.path / kept.shards[0].name) == kept.shards[0].files


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {"steps": (4, 2)}, "--steps is 4:2; expected a range within 0:6"),
        ({}, {"top_k": 10}, "--top-k is 10; expected less than the 10 classes"),
        ({"seed": 3}, {}, "seed: 0 in the recording, 3 in this run"),
        (
            {"objective": ObjectiveConfig(terms=(FEATURES,))},
            {},
            "did you mean 'block1'",
        ),
        (
            {
                "student": StudentConfig(
                    model="bit_r50x1", resolution=32, final_statistics="central"
                )
            },
            {},
            "is for a student with BatchNorm, and bit_r50x1 as configured has none",
        ),
    ],
)
def test_what_is_wrong_is_known_before_a_teacher_is_trained(
    tmp_path, monkeypatch, changes, options, said
):
    config = dataclasses.replace(taught_by("x"), teacher=None)
    header = make_header(config, resolved_run(config), "float16", None)
    manifest = ManifestWriter(tmp_path, header, {})
    manifest.add(Shard(0, 2, {}))
    manifest.close()
    teacher = str(write_experiment(tmp_path / "teacher.py"))
    monkeypatch.setattr(record_module, "train_teachers", lambda *_: pytest.fail("trained"))
    config = dataclasses.replace(config, teacher=TeacherConfig(experiment=teacher), **changes)
    with pytest.raises(UserError, match=said):
        record(config, tmp_path, Stop(), **options)


def test_weights_of_the_student_are_looked_for_before_a_teacher_is_trained(tmp_path, monkeypatch):
    teacher = TeacherConfig(experiment=str(write_experiment(tmp_path / "teacher.py")))
    student = dataclasses.replace(NETWORK, weights=str(tmp_path / "none.safetensors"))
    monkeypatch.setattr(train_module, "train_teachers", lambda *_: pytest.fail("trained"))
    config = tiny_config(teacher=teacher, student=student, objective=ObjectiveConfig())
    monkeypatch.setattr(record_module, "train_teachers", lambda *_: pytest.fail("trained"))
    said = r"student\.weights is .*none\.safetensors, which does not"
    with pytest.raises(UserError, match=said):
        train_module.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=said):
        record(config, tmp_path / "recording", Stop())
    assert not (tmp_path / "run").exists() and not (tmp_path / "recording").exists()


def test_processes_end_together_where_a_recording_at_a_url_is_refused(tmp_path, monkeypatch):
    config = dataclasses.replace(
        tiny_config(objective=ObjectiveConfig()),
        teacher=TeacherConfig(recording=f"file://{tmp_path / 'none'}"),
    )
    told = []

    def from_first(number):
        told.append(number)
        return 1

    monkeypatch.setattr(recorded, "broadcast_from_first", from_first)
    with pytest.raises(UserError, match="there is no folder file://"):
        recorded.with_recording_here(config, Workdir(tmp_path / "run"))
    monkeypatch.setattr(recorded, "first_process", lambda: False)
    with pytest.raises(UserError, match="is refused; the first process says why"):
        recorded.with_recording_here(config, Workdir(tmp_path / "run"))
    assert told == [1, 0]


def test_a_curriculum_that_ends_after_the_run():
    config = tiny_config(views=ViewConfig(resolution_points=((0, 4.0), (6, 16.0))))
    resolved_run(config)
    longer = ViewConfig(resolution_points=((0, 4.0), (7, 16.0)))
    with pytest.raises(UserError, match="resolution_points go to step 7, and the run ends after 6"):
        resolved_run(dataclasses.replace(config, views=longer))


def test_a_curriculum_that_a_short_recording_would_cut_off():
    views = ViewConfig(smallest_area_points=((0, 0.9), (5, 0.05)))
    config = tiny_config(views=views)
    assert not [*problems(config)]
    short = dataclasses.replace(views, period_steps=5)
    (said,) = problems(dataclasses.replace(config, views=short))
    assert "smallest_area_points go to step 5, and the views repeat after 5 steps" in said
    facts = RecordingFacts("rec", "", 5, ((0, 5),))
    with pytest.raises(UserError, match=r"the views repeat after 5 steps \(rec\)"):
        _period_steps(config, 8, facts)
    facts = RecordingFacts("rec", "", 6, ((0, 6),))
    assert _period_steps(config, 8, facts) == 6
    assert _period_steps(config, 6, facts) is None


def test_processes_share_the_views_that_ranges_are_found_on(monkeypatch):
    """One row each, in their order, as in training; not all rows from each of them."""
    config = tiny_config()
    reader = Reader(open_source(config.data, "train"), config.data, 10)
    layout = make_layout(MeshConfig(data=1))
    monkeypatch.setattr(quantised_teachers, "send", lambda x, *_: x)

    def images():
        found = quantised_teachers._batches(config, reader, layout, 3)
        return [batch.canvases for _, batch in found]

    whole, parts = images(), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(images())
    for step in range(3):
        np.testing.assert_array_equal(np.concatenate([x[step] for x in parts]), whole[step])


@pytest.mark.parametrize("mixup", ["batch", "example"])
def test_a_coefficient_that_another_device_rounds_otherwise_is_the_same(mixup):
    """Also where it is that of all rows, and lies at the border of two steps of the digest."""
    config = tiny_config(views=ViewConfig(mixup=mixup), teaching="function_matching")
    draw = make_draws(config)(0, GOLDEN_SIZES)
    border = np.float32((1000 + 0.5) / 4096)
    one, other, far = (
        dataclasses.replace(draw, coefficients=np.full_like(draw.coefficients, x))
        for x in (border - 1e-6, border + 1e-6, border + 2 / 4096)
    )
    assert digests_of_draw(one)[0] != digests_of_draw(other)[0]
    for before, now in ((one, other), (other, one)):
        assert _same(digests_of_draw(before), now)
        assert not _same(digests_of_draw(before), far)
