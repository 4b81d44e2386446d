"""Changes of one line that no other test saw; `MUTATIONS.md` lists each with its test."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_evaluate import lookup_network
from test_step import DRAWS, KEY, random_batch, with_random_head
from tiny import resolved_run, tiny_config

from fm_distill.config import (
    CanvasConfig,
    CheckpointConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    ViewConfig,
    with_options,
)
from fm_distill.config.resolved import IDENTITY, CodeFile, ResolvedRun
from fm_distill.config.serialization import NOT_IDENTITY
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader
from fm_distill.data.images import shrink
from fm_distill.data.resident import Resident, ResidentSteps
from fm_distill.data.sources import open_source
from fm_distill.data.splits import open_data
from fm_distill.evaluation.evaluate import Evaluator
from fm_distill.evaluation.inference import open_split, predict
from fm_distill.evaluation.predictions import predict_split
from fm_distill.evaluation.teacher_check import check_teacher
from fm_distill.exporting.export import export
from fm_distill.exporting.load_student import load_student
from fm_distill.models import Network, Output, Variables
from fm_distill.models.layers import Convolution, DepthwiseConvolution, Head
from fm_distill.networks.branch import Branch
from fm_distill.networks.loading import load_networks
from fm_distill.runs.checkpoint import CheckpointWriter
from fm_distill.runs.metrics import MetricsWriter
from fm_distill.runs.open_run import open_run
from fm_distill.runs.state import TrainState
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import Progress, hours_text
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import make_layout
from fm_distill.train_step.program import make_program
from fm_distill.training.build import build
from fm_distill.training.dispatch import due
from fm_distill.training.reporter import Reporter
from fm_distill.training.setup import Setup, prepare
from fm_distill.views.crops import CROPS
from fm_distill.views.rendering import CentralCrop, InputSpec, render_central

ONE = make_layout(MeshConfig(data=1))


@pytest.mark.parametrize(
    ("every", "step", "steps", "expected"),
    [
        (10, 10, 1, True),
        (10, 11, 1, False),
        # Dispatches of 4 never end on 10.
        (10, 8, 4, False),
        (10, 12, 4, True),
        (10, 16, 4, False),
        (3, 8, 8, True),
        (0, 8, 4, False),
    ],
)
def test_what_is_due_within_a_dispatch_is_due_after_it(every, step, steps, expected):
    assert due(every, step, steps) is expected


def test_the_head_starts_at_zero():
    params = Head(10).init(KEY, jnp.ones((1, 8)))["params"]
    assert params["kernel"].shape == (8, 10)
    for values in params.values():
        np.testing.assert_array_equal(values, 0)


def test_kernels_start_as_lecun_s_truncated_normal():
    """Variance 1 / fan-in, cut off at two deviations of the normal before it was cut."""
    cut = 2 / 0.87962566103423978  # in deviations of what is left
    for layer, channels, fan_in in (
        (Convolution(256, 3, 1, jnp.dtype("float32")), 64, 9 * 64),
        (DepthwiseConvolution(3, 1, jnp.dtype("float32"), "same"), 4096, 9),
    ):
        kernel = layer.init(KEY, jnp.ones((1, 3, 3, channels)))["params"]["kernel"]
        deviation = float(kernel.std())
        assert deviation == pytest.approx(fan_in**-0.5, rel=0.02)
        assert abs(float(kernel.mean())) < 0.02 * deviation
        assert 0.98 * cut < float(jnp.abs(kernel).max()) / deviation < 1.02 * cut


def test_the_metrics_of_a_dispatch_are_those_of_its_last_step():
    def train_step(state, teachers, batch, root):
        now = state.step.astype(jnp.float32)
        metrics = dict.fromkeys(("loss", "gradient_norm", "update_norm", "agreement"), now)
        return dataclasses.replace(state, step=state.step + 1), metrics

    state = TrainState(jnp.int32(5), Variables({}, {}), (), None)
    data = Resident.of(random_batch())
    program = make_program(train_step, state, (), data, ONE)
    fed = ResidentSteps(np.zeros((3, 8), np.int32))
    _, metrics = program(state, (), data, fed, DRAWS)
    assert {name: float(x) for name, x in metrics.items()} == dict.fromkeys(metrics, 7.0)


def test_images_are_shrunk_by_a_triangle_over_two_pixels_of_the_result():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    found = shrink(Image.fromarray(pixels), CanvasConfig(size=6, fit="long"))

    def weights(size):  # bilinear, antialiased: 1 - |distance| / 2, within the image
        places = np.arange(size) + 0.5
        rows = np.array(
            [np.maximum(1 - np.abs(places - 2 * (i + 0.5)) / 2, 0) for i in range(size // 2)]
        )
        return rows / rows.sum(axis=1, keepdims=True)

    expected = np.einsum("ih,hwc,jw->ijc", weights(8), pixels.astype(float), weights(12))
    assert found.shape == (4, 6, 3)
    np.testing.assert_allclose(found, expected, atol=1.01)  # Pillow rounds twice


def test_torchvision_crop_s_aspect_is_log_uniform():
    low, high = 0.25, 4.0
    config = ViewConfig(crop="torchvision", crop_area=(0.02, 0.05), crop_aspect=(low, high))
    sizes = jnp.tile(jnp.array([[2000, 2000]]), (20_000, 1))
    _, _, height, width = np.asarray(
        CROPS["torchvision"](KEY, sizes, config, config.crop_area[0])
    ).T
    found = np.quantile(np.log(width / height), (0.1, 0.25, 0.5, 0.75, 0.9))
    expected = np.log(low) + np.array((0.1, 0.25, 0.5, 0.75, 0.9)) * np.log(high / low)
    np.testing.assert_allclose(found, expected, atol=0.05)


def constant_network(classes: int) -> Network:
    """Says the same of every image."""

    def apply(variables, images, *, train=False, features=()):
        return Output(jnp.tile(variables.params["logits"], (images.shape[0], 1)), {}, {})

    return Network(
        classes,
        lambda key: Variables({"logits": jnp.arange(float(classes))}, {}),
        apply,
        lambda variables: variables,
        lambda frozen, images, *, features=(): apply(frozen, images),
    )


def test_a_constant_teacher_is_noticed_on_the_run_s_own_images():
    config = tiny_config(objective=ObjectiveConfig())
    teacher = Branch(constant_network(10), InputSpec(4, "zero_one"))
    reader = Reader(open_source(config.data, "train"), config.data, 10)
    frozen = teacher.network.init(KEY)
    warnings = check_teacher(config, teacher, teacher, frozen, reader, ONE, DRAWS)
    assert any("hardly differ between images" in x for x in warnings)
    assert any("no better than chance" in x for x in warnings)


def test_evaluation_looks_at_the_central_fraction():
    """Of images that say their index in their middle, and another one around it."""
    index = np.arange(16, dtype=np.uint8)
    canvases = np.zeros((16, 4, 4, 3), np.uint8) + 100
    canvases[:, 1:3, 1:3] = index[:, None, None, None]
    labels = np.random.default_rng(0).integers(0, 9, 16).astype(np.int32)
    logits = np.full((101, 9), -10.0)
    logits[np.arange(16), labels] = 10.0
    branch = Branch(lookup_network(logits), InputSpec(2, "zero_one"))
    config = tiny_config(views=ViewConfig(central_fraction=0.5))
    evaluator = Evaluator.make(config, branch, (), ONE)
    batch = Batch(canvases, np.full((16, 2), 4, np.int32), labels), np.ones(16, bool)
    figures = evaluator(branch.network.init(KEY), (), [batch], "test", 0)
    assert figures["student"]["top1"] == 1.0


def run_with(folder, fraction: float):
    """A workdir whose checkpoint holds a student with a random head."""
    config = tiny_config(views=ViewConfig(central_fraction=fraction))
    resolved = resolved_run(config)
    state = jax.jit(build(config, resolved).init)(jax.random.key(0))
    state = dataclasses.replace(state, student=with_random_head(state.student))
    workdir = Workdir(folder)
    with workdir.locked():
        workdir.claim(config, resolved, False)
        writer = CheckpointWriter(workdir.checkpoints, CheckpointConfig(), ())
        writer.save(dataclasses.replace(state, step=jnp.int32(1)), {"step": 1})
        writer.wait()
    return folder


def test_predict_and_export_know_the_central_fraction(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    Image.fromarray(pixels[8:24, 8:24]).save(tmp_path / "middle.png")
    half, whole = run_with(tmp_path / "half", 0.5), run_with(tmp_path / "whole", 1.0)
    (found,) = predict(half, [tmp_path / "whole.png"], 10)
    (expected,) = predict(whole, [tmp_path / "middle.png"], 10)
    (other,) = predict(whole, [tmp_path / "whole.png"], 10)
    assert found.classes == expected.classes
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-4)
    assert not np.allclose(other.probabilities, expected.probabilities, rtol=1e-2)
    for workdir, fraction in ((half, 0.5), (whole, 1.0)):
        card = export(workdir, tmp_path / f"{workdir.name}.safetensors")
        assert card.central_fraction == fraction
    # What is asked of a whole split looks at the same middle.
    opened = open_split(half, "validation")
    reader = opened.reader
    views = render_central(
        jnp.stack([reader[i]["canvas"] for i in range(len(reader))]),
        jnp.stack([reader[i]["size"] for i in range(len(reader))]),
        CentralCrop(0.5),
        opened.student_branch.input_spec,
    )
    apply = jax.jit(lambda v, x: opened.student_branch.network.apply(v, x, train=False).logits)
    logits = apply(opened.run.student.variables, views)
    np.testing.assert_allclose(
        predict_split(opened).student_probability, jax.nn.softmax(logits).max(-1), rtol=1e-4
    )


def test_an_export_makes_up_no_names(tmp_path):
    """Invented ones would contradict the names of the data that it teaches on later."""
    run = run_with(tmp_path / "run", 1.0)
    assert open_run(run).class_names == tuple(f"class {i}" for i in range(10))
    assert export(run, tmp_path / "x.safetensors").class_names is None
    assert load_student(tmp_path / "x.safetensors").class_names == open_run(run).class_names


def setup_of(config, folder) -> Setup:
    data, _ = open_data(config)
    networks = load_networks(config, folder, data.train.classes, data.train.class_names)
    resolved = resolved_run(config, examples=len(data.train))
    return prepare(config, resolved, data, networks, ONE, folder)[0]


def test_hours_are_of_3600_seconds(tmp_path, monkeypatch):
    config = tiny_config(schedule=ScheduleConfig(total_steps=50))
    stop = Stop()
    setup, writer = setup_of(config, tmp_path), MetricsWriter(None, 0, tensorboard=False)
    reporter = Reporter(setup, Workdir(tmp_path), writer, Progress(), 0, stop)
    assert reporter.hours_left() is None
    # 20 steps in two hours, and 20 are left.
    reporter.first, reporter.step = (10, 1000.0), 30
    clock = types.SimpleNamespace(monotonic=lambda: 8200.0)
    monkeypatch.setattr("fm_distill.training.reporter.time", clock)
    monkeypatch.setattr("fm_distill.system.preemption.time", clock)
    assert reporter.hours_left() == pytest.approx(2.0)
    stop.started = 1000.0
    assert stop.hours() == pytest.approx(2.0)
    assert [hours_text(x) for x in (0.5, 2.0)] == ["30.0 minutes", "2.0 hours"]


@pytest.mark.parametrize("head", [None, 1.0])
def test_a_slowed_run_is_slower_in_its_head_too(tmp_path, head):
    optimizer = OptimizerConfig(
        name="sgd", learning_rate=0.1, head_learning_rate=head, weight_decay=0.0, clip_norm=None
    )
    config = tiny_config(
        optimizer=optimizer, schedule=ScheduleConfig(total_steps=10, warmup_steps=0)
    )
    slowed = setup_of(config, tmp_path).slowed(0.25)
    params = {"head": {"kernel": jnp.ones(2)}, "root": {"kernel": jnp.ones(2)}}
    transform = slowed.built.optimizer
    updates, _ = transform.update(params, transform.init(params), params)
    np.testing.assert_allclose(updates["root"]["kernel"], -0.025, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.25 * (head or 0.1), rtol=1e-6)


# What a run is made from: another value is another run, wherever the files lie.
MADE_FROM = {
    "data", "classes", "class_names", "student", "student_weights", "teachers", "teacher_weights",
    "recording", "code", "target_images",
}  # fmt: skip
# What may differ between the places and machines on which one run goes on.
MAY_DIFFER = {
    "name", "data.data_dir", "data.class_names", "data.transfer.data_dir", "data.transfer.examples",
    "data.resident_share", "data.workers", "data.train.examples", "data.validation", "data.test",
    "views.fourier.folder",
    "student.weights", "teacher.weights", "teacher.experiment", "teacher.workdir",
    "teacher.recording", "teacher.function", "teacher.classes", "teacher.least_agreement",
    "mesh", "memory", "checkpoint", "divergence", "log",
}  # fmt: skip


def test_the_identity_of_a_run_is_what_it_is():
    assert set(IDENTITY) == MADE_FROM and set(NOT_IDENTITY) == MAY_DIFFER
    config = tiny_config(objective=ObjectiveConfig())
    run = resolved_run(config, (config.student,))
    other = resolved_run(tiny_config(objective=ObjectiveConfig(), name="other"))
    values = {
        "data": "other", "examples": 1, "classes": 3, "class_names": ("a",),
        "student": with_options(other.student, {"width": 2.0}), "teachers": other.teachers,
        "student_weights": "other", "teacher_weights": ("other",), "total_steps": 1,
        "precision": "bfloat16", "feeding": "streaming", "steps_per_dispatch": 9,
        "mesh": {"data": 9, "fsdp": 1}, "recording": "other", "code": ("other",),
        "period_steps": 4, "class_counts": (1,), "headless": True,
        "target_images": "other", "code_files": {"mine.py:x": CodeFile("a", "b")},
    }  # fmt: skip
    for field in dataclasses.fields(ResolvedRun):
        changed = dataclasses.replace(run, **{field.name: values[field.name]})
        assert changed != run, field.name
        differ = [line.split(":")[0] for line in run.differences(changed)]
        expected = [field.name] if field.name in MADE_FROM else []
        if field.name == "period_steps":  # of a run of 6 steps, it repeats some
            expected = [
                "the views repeat after 6 steps in the workdir, after 4 now, because the length of "
                "the recording changed; set views.period_steps=6"
            ]
        assert differ == expected
