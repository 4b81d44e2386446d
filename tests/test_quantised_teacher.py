"""Teachers in eight bits: integers against NumPy, what is judged, stored and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_accelerator_paths import matching
from test_distances import log_softmax
from test_quantisation import INT8, STUDENT, random_array, with_head
from test_recordings import QUIET, losses, record_now
from test_train import lines_of, same_bits, stop_at
from tiny import NETWORK, logits_of, tiny_config

from fm_distill.config import (
    MeshConfig,
    ObjectiveConfig,
    QuantisationConfig,
    TeacherConfig,
    with_options,
)
from fm_distill.config.serialization import converted
from fm_distill.data.feeding import Reader, stack
from fm_distill.data.order import example_ids
from fm_distill.data.resident import Resident, load_split
from fm_distill.data.splits import open_data
from fm_distill.errors import UserError
from fm_distill.models import build_network, ranges_of, with_ranges
from fm_distill.models.convolutions import convolve, convolve_depthwise, convolve_integer
from fm_distill.models.integers import SCALE, integer_kernels, matmul_integer
from fm_distill.models.quantisation import Precision
from fm_distill.networks.branch import make_branch, step_views
from fm_distill.networks.loading import load_networks
from fm_distill.preparation.check import check
from fm_distill.recordings.reading import RecordingReader
from fm_distill.runs.open_run import open_run
from fm_distill.system.preemption import Stop
from fm_distill.training import quantised_teachers
from fm_distill.training.quantised_teachers import NAME, CalibratedTeachers
from fm_distill.training.record import record
from fm_distill.training.train import train
from fm_distill.views.draws import run_keys
from fm_distill.weights.card import only_network

FLOAT32 = jnp.dtype("float32")


def integer_sums(x: np.ndarray, around: int, kernel: np.ndarray, stride: int) -> np.ndarray:
    """A symmetric convolution by loops, in Python's integers."""
    size, groups = kernel.shape[0], x.shape[-1] // kernel.shape[2]
    pad = size // 2
    padded = np.pad(
        x.astype(np.int64), ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=around
    )
    places = range(0, padded.shape[1] - size + 1, stride)
    per_group = kernel.shape[-1] // groups
    out = np.zeros((len(x), len(places), len(places), kernel.shape[-1]), np.int64)
    for i, row in enumerate(places):
        for j, column in enumerate(places):
            met = padded[:, row : row + size, column : column + size]
            for channel in range(kernel.shape[-1]):
                first = channel // per_group * kernel.shape[2]
                part = met[..., first : first + kernel.shape[2]]
                out[:, i, j, channel] = (part * kernel[..., channel].astype(np.int64)).sum(
                    (1, 2, 3)
                )
    return out


def random_integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(3, 4, 1), (3, 4, 2), (1, 5, 1)])
def test_sums_of_integers_against_numpy(inputs, outputs, stride):
    """And those in floats are the same in every bit; with one input a group, depthwise."""
    channels = inputs if inputs > 1 else outputs
    x, kernel = random_integers(2, 5, 5, channels), random_integers(3, 3, inputs, outputs, seed=1)
    zero = -7
    found = convolve_integer(
        jnp.asarray(x), jnp.int8(zero), jnp.asarray(kernel), stride, groups=channels // inputs
    )
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, integer_sums(x, zero, kernel, stride))
    floats = convolve if inputs > 1 else convolve_depthwise
    shifted = jnp.asarray(x, jnp.float32) - zero
    expected = floats(shifted, jnp.asarray(kernel, jnp.float32), stride)
    sums = np.asarray(found) - zero * kernel.astype(np.int64).sum((0, 1, 2))
    np.testing.assert_array_equal(sums, expected)


def test_a_product_of_integers_against_numpy():
    x, kernel = random_integers(4, 3, 9), random_integers(9, 5, seed=1)
    found = matmul_integer(jnp.asarray(x), jnp.int8(3), jnp.asarray(kernel))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ kernel.astype(np.int64))


def test_kernels_of_integers_against_numpy():
    kernel = jnp.asarray(random_array(3, 3, 4, 6) * np.geomspace(1e-3, 10, 6, dtype=np.float32))
    params = {"a": {"kernel": kernel, "bias": np.ones(6)}, "b": {"kernel": kernel}}
    precision = Precision("int8", "int8")
    found = integer_kernels(
        params, {"a": precision, "b": Precision("int8", "none")}, lambda x: 2 * x
    )
    assert found["b"]["kernel"] is kernel and set(found["a"]) == {"kernel", "bias", SCALE}
    wide = 2 * np.asarray(kernel, np.float64)
    scale = np.abs(wide).max((0, 1, 2)) / 127
    np.testing.assert_allclose(found["a"][SCALE], scale, rtol=1e-6)
    assert found["a"]["kernel"].dtype == jnp.int8
    apart = np.abs(np.asarray(found["a"]["kernel"], np.float64) * scale - wide)
    assert (apart <= 0.5001 * scale).all()


def observed(network, variables, x):
    return jax.jit(lambda y: network.apply_observing(y, x, train=False).ranges)(variables)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_integers_are_the_fake_quantised_function(norm, monkeypatch):
    """To rounding of the scales; and a TPU's form is that of a CPU in every bit."""
    network = build_network(with_options(STUDENT, {"norm": norm}), 10, FLOAT32)
    x = jnp.asarray(random_array(4, 16, 16, 3))
    variables = with_head(network.init(jax.random.key(0)))
    variables = dataclasses.replace(variables, ranges=observed(network, variables, x))
    assert network.freeze_integer is not None
    whole = network.freeze_integer(variables)
    kernels = [y for y in jax.tree.leaves(whole.params) if y.dtype == jnp.int8]
    assert len(kernels) == len(network.quantised_layers)

    def logits(frozen):
        return jax.jit(lambda y: network.apply_frozen(y, x).logits)(frozen)

    fake, floats = logits(network.freeze(variables)), logits(whole)
    assert float(jnp.abs(floats).max()) > 0.1
    np.testing.assert_allclose(floats, fake, atol=2e-5 * float(jnp.abs(fake).max()))
    monkeypatch.setattr(
        "jax.lax.platform_dependent",
        lambda *x, tpu=None, cpu=None, default=None: (tpu or default)(*x),
    )
    np.testing.assert_array_equal(logits(whole), floats)


def test_ranges_are_read_as_they_were_written():
    network = build_network(STUDENT, 10, FLOAT32)
    variables = with_head(network.init(jax.random.key(0)))
    x = jnp.asarray(random_array(4, 16, 16, 3))
    ranges = observed(network, variables, x)
    stored = ranges_of(dataclasses.replace(variables, ranges=ranges))
    read = {x: tuple(y) for x, y in json.loads(json.dumps(stored)).items()}
    again = with_ranges(network, variables, read)
    jax.tree.map(np.testing.assert_array_equal, again.ranges, ranges)
    with pytest.raises(ValueError, match="no range"):
        with_ranges(network, variables, dict(list(stored.items())[1:]))
    with pytest.raises(ValueError, match="no activation"):
        with_ranges(network, variables, stored | {"other/input": (0.0, 1.0, 1.0)})


TEACHER = TeacherConfig(weights="teacher", quantisation=INT8)
RUN = tiny_config(objective=ObjectiveConfig(), teacher=TEACHER)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantisation": QuantisationConfig(weights="int8")}, "give both"),
        ({"quantisation": QuantisationConfig(activations="int8")}, "give both"),
        ({"recording": "r", "weights": None}, "belongs to the recording"),
        ({"function": "f.py:f", "weights": None}, "called as it is"),
        (
            {
                "network": only_network(NETWORK),
                "quantisation": dataclasses.replace(INT8, float_layers=("rot",)),
            },
            "did you mean root",
        ),
        ({"least_agreement": 1.5}, "least_agreement"),
    ],
)
def test_what_cannot_be_quantised_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        check(dataclasses.replace(RUN, teacher=dataclasses.replace(TEACHER, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"teaching": "fixed"},
        {"objective": ObjectiveConfig(target="labels")},
    ],
)
def test_a_teacher_that_is_not_asked_in_each_step_is_not_quantised(changes):
    with pytest.raises(UserError, match="runs in each step"):
        check(dataclasses.replace(RUN, **changes))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A complete run with a quantised teacher."""
    folder = tmp_path_factory.mktemp("taught")
    config = matching(folder, MeshConfig(data=1), log=QUIET)
    assert config.teacher is not None
    teacher = dataclasses.replace(config.teacher, quantisation=INT8, least_agreement=0.5)
    config = dataclasses.replace(config, teacher=teacher)
    assert train(config, folder / "whole").complete
    return config, folder


def test_a_run_goes_on_with_the_ranges_that_it_began_with(taught, tmp_path, monkeypatch):
    """Bit for bit, without calibrating again; without them, or with others, it is refused."""
    config, folder = taught
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(config, tmp_path / "run").step == 3
    kept = tmp_path / "run" / NAME
    text = kept.read_text()
    assert text == (folder / "whole" / NAME).read_text()

    def refused(*_):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(quantised_teachers, "_calibrated", refused)
    (tmp_path / "run" / NAME).unlink()
    with pytest.raises(UserError, match="is missing"):
        train(config, tmp_path / "run")
    for damaged, said in (
        (text[:-9], "cannot be read"),
        (text.replace('"ranges"', '"other"'), "is damaged"),
        (text.replace('"weights": "int8"', '"weights": "int4"'), "other teachers"),
    ):
        kept.write_text(damaged)
        with pytest.raises(UserError, match=said):
            train(config, tmp_path / "run")
        assert kept.read_text() == damaged
    kept.write_text(text)
    assert train(config, tmp_path / "run").complete
    same_bits(folder / "whole", tmp_path / "run")
    assert lines_of(folder / "whole") == lines_of(tmp_path / "run")


def test_the_stored_figures_are_those_of_numpy(taught):
    """Ranges of the first layer: means of the extremes of batches. Fidelity, by float64."""
    config, folder = taught
    networks = load_networks(config, folder / "whole", 10, None)
    (teacher,) = networks.teachers
    student, plain, rounded = (
        make_branch(x, 10, FLOAT32)
        for x in (networks.student, teacher.network, teacher.teaching_network)
    )
    stored = json.loads((folder / "whole" / NAME).read_text())["teachers"][0]
    ranges = {x: tuple(y) for x, y in stored["ranges"].items()}
    whole = with_ranges(rounded.network, teacher.variables, ranges)
    views = jax.jit(
        lambda batch, step: step_views(
            "mixed", config.views, student, (plain,), batch, run_keys(config.seed).draws, step
        ).teachers[plain.input_spec]
    )
    logits = jax.jit(
        lambda x: (
            logits_of(plain.network, teacher.variables, x),
            logits_of(rounded.network, whole, x),
        )
    )
    data = open_data(config)[0].train
    images = Resident.of(load_split(Reader(data, config.data, 10))[0])
    count, size = 512 // config.batch_size, config.batch_size
    lows, highs, rows = [], [], []
    for step in range(2 * count):
        positions = np.arange(step * size, (step + 1) * size)
        ids = jnp.asarray(example_ids(config.seed, positions, len(data)))
        seen = views(images.at(ids), jnp.int32(step))
        if step < count:
            lows.append(float(seen.min()))
            highs.append(float(seen.max()))
        else:
            rows.append([np.asarray(x, np.float64) for x in logits(seen)])
    expected, found = (np.concatenate(x) for x in zip(*rows, strict=True))

    def kl(temperature):
        p, q = (log_softmax(x / temperature) for x in (expected, found))
        return (np.exp(p) * (p - q)).sum(1).mean()

    assert stored["network"]["quantisation"]["activations"] == "int8"
    fidelity = stored["fidelity"]
    assert stored["calibration_views"] == fidelity["views"] == 512
    same = expected.argmax(1) == found.argmax(1)
    assert fidelity["agreement"] == pytest.approx(same.mean(), abs=1 / 512)
    assert fidelity["kl"] == pytest.approx(kl(1.0), rel=0.02)
    assert fidelity["kl_at_temperature"] == pytest.approx(kl(2.0), rel=0.02)
    assert fidelity["temperature"] == config.objective.temperature == 2.0
    low, high, batches = stored["ranges"]["root/input"]
    assert batches == count
    assert (low, high) == pytest.approx((np.mean(lows), np.mean(highs)), rel=1e-5)
    resolved = open_run(folder / "whole").resolved
    assert resolved.teachers[0].quantisation == INT8


def test_ranges_of_a_run_that_never_began_are_taken_again(taught, tmp_path):
    """They may be of other settings: only a config, or a recording, says whose they are."""
    config, folder = taught
    (tmp_path / NAME).write_bytes((folder / "whole" / NAME).read_bytes())
    teachers = list(load_networks(config, folder / "whole", 10, None).teachers)
    assert quantised_teachers._stored(tmp_path, teachers) is None
    assert quantised_teachers._stored(folder / "whole", teachers) is not None


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"agreement": 0.49}, "51.0% of 512 training views"),
        ({"kl": float("nan")}, "not finite numbers"),
    ],
)
def test_a_teacher_that_changes_too_much_may_not_teach(
    taught, tmp_path, monkeypatch, figures, said
):
    """Before anything is written."""
    config, folder = taught
    tree = json.loads((folder / "whole" / NAME).read_text())
    (found,) = converted(tree, CalibratedTeachers).teachers
    found = dataclasses.replace(found, fidelity=dataclasses.replace(found.fidelity, **figures))
    monkeypatch.setattr(quantised_teachers, "_calibrated", lambda *_: found)
    with pytest.raises(UserError, match=said):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_float_and_quantised_teachers_are_two_runs(taught):
    config, folder = taught
    assert config.teacher is not None
    plain = dataclasses.replace(config.teacher, quantisation=QuantisationConfig())
    with pytest.raises(UserError, match=r"teacher\.quantisation\.activations"):
        train(dataclasses.replace(config, teacher=plain), folder / "whole")


def first_features(config, workdir, examples):
    """The mean over the places of `block1` in step 0, of the teacher in integers and in floats."""
    networks = load_networks(config, workdir, 10, None)
    (teacher,) = networks.teachers
    plain, rounded = (
        make_branch(x, 10, FLOAT32) for x in (teacher.network, teacher.teaching_network)
    )
    stored = json.loads((workdir / NAME).read_text())["teachers"][0]
    ranges = {x: tuple(y) for x, y in stored["ranges"].items()}
    whole = with_ranges(rounded.network, teacher.variables, ranges)
    reader = Reader(open_data(config)[0].train, config.data, 10)
    batch = jax.device_put(stack([reader[int(i)] for i in examples]))

    @jax.jit
    def features(batch, variables, whole):
        key = run_keys(config.seed).draws
        seen = step_views("mixed", config.views, plain, (plain,), batch, key, 0)
        return [
            network.apply_frozen(frozen, seen.student, features=("block1",)).features["block1"]
            for network, frozen in (
                (rounded.network, rounded.network.freeze_integer(whole)),
                (plain.network, plain.network.freeze(variables)),
            )
        ]

    return [np.asarray(x).mean((1, 2)) for x in features(batch, teacher.variables, whole)]


def test_its_recording_is_its_own_and_teaches_as_it_does(taught, tmp_path, monkeypatch):
    config, folder = taught
    recorded = tmp_path / "recorded"
    assert config.teacher is not None
    made = record_now(config, recorded, dtype="float32", taps=("block1",))
    assert (recorded / NAME).read_text() == (folder / "whole" / NAME).read_text()
    found = RecordingReader(made, 6, ("block1",)).at(0)
    rounded, floats = first_features(config, folder / "whole", found.examples[0])
    np.testing.assert_allclose(found.rows.features["block1"][0], rounded, rtol=1e-4, atol=1e-5)
    assert np.abs(rounded - floats).max() > 1e-3
    plain = dataclasses.replace(config.teacher, quantisation=QuantisationConfig())
    with pytest.raises(UserError, match="another recording"):
        record(
            dataclasses.replace(config, teacher=plain),
            recorded,
            Stop(),
            dtype="float32",
            taps=("block1",),
        )
    away = dataclasses.replace(plain, weights=None, recording=str(recorded))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(dataclasses.replace(config, teacher=away), tmp_path / "run").step == 3
    # With the float teacher beside the recording, it is the same run.
    beside = dataclasses.replace(plain, recording=str(recorded))
    assert train(dataclasses.replace(config, teacher=beside), tmp_path / "run").complete
    one, other = (losses(x) for x in (folder / "whole", tmp_path / "run"))
    np.testing.assert_allclose(one, other, rtol=3e-6)
