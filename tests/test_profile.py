"""Where time and memory go: the command on a resident split, and a feed that is too slow."""

import dataclasses
import gzip
import json
import time

import jax
import numpy as np
import pytest
from conftest import run_command, write_experiment
from test_accelerator_paths import matching
from test_cli import refused
from tiny import resolved_run, tiny_config

from fm_distill.config import MeshConfig
from fm_distill.data.feeding import Reader
from fm_distill.models import parameter_count
from fm_distill.training.build import build
from fm_distill.training.profile import profile


def test_the_command_measures_and_writes_a_trace_alone(tmp_path):
    path = write_experiment(tmp_path / "tiny.py")
    found = run_command(
        "profile", path, "--measured-steps", "3", "--trace", tmp_path / "trace", "--json",
        "--data.feeding", "resident", cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout)
    assert figures["steps"] == 3 and figures["feeding"] == "resident"
    assert figures["step_ms"] > 0 and figures["bound"] == "compute"
    assert figures["images_per_second"] == pytest.approx(16e3 / figures["step_ms"])
    for part in ("views", "targets", "student", "update", "logging"):
        assert figures[f"{part}_ms"] > 0, part
    assert figures["reading_ms"] == figures["decoding_ms"] == 0
    config = tiny_config()
    state = build(config, resolved_run(config)).abstract_state
    numbers = parameter_count(state.student.params)
    assert figures["memory_bytes"]["student"] == 4 * numbers
    # Adam's two moments, and counters.
    assert 0 <= figures["memory_bytes"]["optimizer"] - 8 * numbers < 64
    # 1,259 canvases of 32 pixels, three bytes each.
    assert figures["memory_bytes"]["data"] >= 1259 * 32 * 32 * 3
    assert "teachers" not in figures["memory_bytes"]
    (written,) = (tmp_path / "trace").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]
    assert sum(x.get("name") == "train" for x in events) == 3
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))  # TensorBoard's
    assert {x.name for x in tmp_path.iterdir()} == {"tiny.py", "trace"}


def test_a_feed_that_is_too_slow_is_named(tmp_path, monkeypatch):
    read = Reader.__getitem__

    def slowly(self, index):
        time.sleep(0.1)
        return read(self, index)

    monkeypatch.setattr(Reader, "__getitem__", slowly)
    config = matching(tmp_path, MeshConfig(data=1))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, feeding="streaming", validation=None)
    )
    found = profile(config, tmp_path / "run", steps=1)
    # Each of 16 images takes 0.1 s of a thread.
    assert found.decoding_ms > 1600 > found.reading_ms > 0
    assert found.bound == "input" and found.feeding_ms > found.step_ms - found.wait_ms
    shapes = build(config, resolved_run(config, (config.teacher.network,))).abstract_state
    student = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.student))
    assert found.memory_bytes["student"] == found.memory_bytes["moving average"] == student
    assert found.memory_bytes["teachers"] >= 0.9 * student and found.targets_ms > 0
    assert np.isfinite(found.student_ms) and not (tmp_path / "run").exists()


def test_what_cannot_be_profiled_is_refused(capsys, tmp_path):
    path = write_experiment(tmp_path / "tiny.py")
    assert "--measured-steps is 0" in refused(capsys, "profile", path, "--measured-steps", "0")
    assert "there is no experiment" in refused(capsys, "profile", tmp_path / "none.py")
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(capsys, "profile", tmp_path / "folder")
    (tmp_path / "file").write_text("")
    text = refused(capsys, "profile", path, "--trace", tmp_path / "file", "--measured-steps", "1")
    assert f"no trace can be written to {tmp_path / 'file'}" in text
