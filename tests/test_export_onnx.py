"""Exports to ONNX: each operation against JAX, whole networks, and what only ONNX refuses."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_cli import command
from test_export_functions import (
    expected_logits,
    initial_student,
    pixels_of,
    run_elsewhere,
    with_one_weight_changed,
    workdir,
)

from fm_distill.errors import UserError
from fm_distill.evaluation.inference import open_student, predict
from fm_distill.exporting.export import export
from fm_distill.exporting.function import function_of
from fm_distill.exporting.operations import operations_in
from fm_distill.exporting.parity import compare, examples_of
from fm_distill.models.pooling import average_pool, max_pool
from fm_distill.runs.open_run import open_run
from fm_distill.weights.card import CARD_KEY

__all__ = ["workdir"]  # a fixture

import onnx

from fm_distill.exporting import onnx_file
from fm_distill.exporting.onnx_operations import RULES

# What somebody else would write, who has ONNX Runtime alone.
READ_ONNX = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
found, = session.run(None, {session.get_inputs()[0].name: np.load(sys.argv[2])})
assert not {"fm_distill", "jax"} & {x.split(".")[0] for x in sys.modules}
np.save(sys.argv[3], found)
stated = session.get_modelmeta().custom_metadata_map
assert json.loads(stated["fm_distill"])["function"]["format"] == "onnx"
print(json.loads(stated["class_names"])[0])
"""

# Of float32 images (batch, 4, 4, 3) between -1 and 1; each ends in another shape or type than the
# next, and together they have every operation of the table.
KERNEL = np.linspace(-1, 1, 2 * 3 * 3 * 6, dtype=np.float32).reshape(2, 3, 3, 6)
DEPTHWISE = np.linspace(-1, 1, 27, dtype=np.float32).reshape(3, 3, 1, 3)
NUMBERS = ("NHWC", "HWIO", "NHWC")
FUNCTIONS = {
    "of one number": lambda x: (
        jnp.abs(x) + jnp.exp(x) * jnp.tanh(x) - jnp.sin(x) / (2 + jnp.cos(x)) + jax.lax.erf(x)
        + jax.lax.erfc(x) + jax.lax.logistic(x) + jnp.floor(3 * x) + jnp.sign(x) + (-x) ** 3
        + jnp.log(x + 2) + jnp.sqrt(x + 1) + jax.lax.rsqrt(x + 2) + jnp.square(x) + (x + 2) ** x
        + jnp.round(9 * x) + jax.lax.stop_gradient(x)
    ),
    "chosen": lambda x: jnp.where(
        ((x > 0.1) | (x < -0.5)) & ~((x >= 0.8) | (x <= -0.9) | (x == 0)),
        jnp.clip(x, -0.6, 0.7), jnp.maximum(x, 0) + jnp.minimum(x, 0.2),
    ),
    "clamped": lambda x: jax.lax.clamp(-0.5, x, 0.25),
    "convolved": lambda x: jax.lax.conv_general_dilated(
        x, KERNEL, (2, 1), ((0, 1), (2, 1)), rhs_dilation=(1, 2), dimension_numbers=NUMBERS),
    "depthwise": lambda x: jax.lax.conv_general_dilated(
        x, DEPTHWISE, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NUMBERS, feature_group_count=3),
    "pooled": lambda x: max_pool(x)[:, :, :1] + average_pool(x[:, 1:, 1:])[:, :, :1],
    "reduced": lambda x: x.max(axis=(1, 2)) + x.min(axis=3)[:, 0, :3] * x.sum(axis=(1, 2)),
    "one place": lambda x: x[:, 1, 2],
    "cut": lambda x: sum(jnp.split(
        jnp.pad(jax.lax.slice(x, (0, 0, 1, 0), x.shape, (1, 2, 1, 1)),
                ((0, 0), (1, 2), (0, 0), (0, 0)), constant_values=0.5),
        [1, 2], axis=3)),
    "moved": lambda x: jnp.concatenate(
        [x.transpose(0, 3, 1, 2).reshape(x.shape[0], 3, 16),
         jnp.broadcast_to(KERNEL[:1, 0, :3, :1], (x.shape[0], 3, 1)).copy()], axis=2),
    "product": lambda x: x.reshape(x.shape[0], 48) @ jnp.ones((48, 5)) * 0.1,
    "attention": lambda x: jnp.einsum(
        "bqhc,bkhc->bhqk", x, jax.ad_checkpoint.checkpoint_name(2 * x, "name")),
    "broadcast": lambda x: x.mean((1, 2))[:, None, None] * jnp.ones((1, 4, 1, 1)) + x,
}  # fmt: skip


def of_pixels(function):
    return lambda pixels: function(pixels.astype(jnp.float32) / 127.5 - 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_what_it_is_in_jax(name):
    function, pixels = of_pixels(FUNCTIONS[name]), pixels_of(3, 4)
    expected = np.asarray(function(jnp.asarray(pixels)))
    for batch in (3, "dynamic"):
        found = onnx_file.load_function(onnx_file.to_onnx(function, 4, batch, name)).call(pixels)
        assert found.shape == expected.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.ptp(expected) > 0.1


def test_every_operation_of_the_table_is_tested():
    seen = set()
    for function in FUNCTIONS.values():
        for shape in ((3, 4, 4, 3), jax.export.symbolic_shape("batch, 4, 4, 3")):
            pixels = jax.ShapeDtypeStruct(shape, np.uint8)
            traced = jax.make_jaxpr(of_pixels(function))(pixels).jaxpr
            seen |= {x.primitive.name for x in operations_in(traced)}
    assert {*RULES} - seen == set()


def test_an_export_runs_without_jax(workdir, tmp_path):
    path, pixels = tmp_path / "x.onnx", pixels_of(5)
    card = export(workdir, path, batch="dynamic", output="logits")
    found, name = run_elsewhere(READ_ONNX, path, pixels, tmp_path)
    np.testing.assert_allclose(found, expected_logits(workdir, pixels), atol=1e-4)
    assert found.dtype == np.float32 and name == "0"
    parity = card.function.parity
    assert parity.runtime.startswith("ONNX Runtime") and parity.agreement == 1.0
    assert 0 < parity.largest_difference <= parity.bound == pytest.approx(5e-4)
    model = onnx.load(path)
    (taken,), (returned,) = model.graph.input, model.graph.output
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [x.dim_param or x.dim_value for x in taken.type.tensor_type.shape.dim] == [
        "batch", 16, 16, 3,
    ]  # fmt: skip
    assert returned.type.tensor_type.shape.dim[1].dim_value == 10


def test_a_changed_weight_is_refused(workdir):
    run = open_run(workdir)
    examples = examples_of(run.config, run.student)
    data = onnx_file.to_onnx(
        function_of(with_one_weight_changed(run.student), "logits"), 16, "dynamic", "bit"
    )
    with pytest.raises(UserError, match=r"ONNX Runtime .* differs from the run by up to"):
        compare(onnx_file.load_function(data), "onnx", run.student, "logits", "dynamic", examples)


def test_each_depthwise_convolution_leaves_as_one():
    """MobileNetV3-small has 11 of its 53."""
    function = function_of(initial_student("mobilenet_v3_small"), "logits")
    model = onnx.ModelProto.FromString(onnx_file.to_onnx(function, 32, 1, "mobilenet_v3_small"))
    kinds = [x.op_type for x in model.graph.node]
    convolutions = [x for x in model.graph.node if x.op_type == "Conv"]
    groups = [y.i for x in convolutions for y in x.attribute if y.name == "group"]
    assert len(convolutions) == 53 and sum(x > 1 for x in groups) == 11
    assert kinds.count("MatMul") == 1 and "Expand" not in kinds


def test_predict_takes_the_file(workdir, tmp_path, capsys):
    np.save(tmp_path / "images.npy", pixels_of(2, 40))
    code, out, _ = command(capsys, "export", workdir, tmp_path / "x.onnx")
    assert code == 0 and "uint8 (1, 16, 16, 3) to probabilities" in out and "ONNX Runtime" in out
    assert [x.name for x in tmp_path.glob("x*")] == ["x.onnx"]
    places = [tmp_path / "images.npy"]
    for x, y in zip(
        predict(tmp_path / "x.onnx", places, 10), predict(workdir, places, 10), strict=True
    ):
        theirs = dict(zip(x.classes, x.probabilities, strict=True))
        for name, probability in zip(y.classes, y.probabilities, strict=True):
            assert theirs[name] == pytest.approx(probability, abs=5e-3)


def renamed_operation(model):
    next(x for x in model.graph.node if x.op_type == "Add").op_type = "Mul"


def another_card(model):
    card = next(x for x in model.metadata_props if x.key == CARD_KEY)
    card.value = card.value.replace('"classes": 10', '"classes": 7')
    assert '"classes": 7' in card.value


def test_what_is_refused(workdir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the operation cumsum is not supported"):
        onnx_file.to_onnx(of_pixels(lambda x: jnp.cumsum(x, axis=1)), 4, 1, "mine")
    transposed = of_pixels(lambda x: jax.lax.conv_transpose(x, KERNEL[..., :3], (2, 2), "SAME"))
    with pytest.raises(UserError, match=r"conv_general_dilated .* with a transposed"):
        onnx_file.to_onnx(transposed, 4, 1, "mine")
    for_one = of_pixels(lambda x: jnp.ones(len(x))[:, None] * x.sum())
    with pytest.raises(UserError, match="a batch of dynamic cannot be traced: TypeError"):
        onnx_file.to_onnx(for_one, 4, "dynamic", "mine")
    path = tmp_path / "x.onnx"
    path.write_bytes(b"this is no model")
    with pytest.raises(UserError, match=r"x.onnx is not an ONNX model"):
        open_student(path)
    path.write_bytes(onnx_file.to_onnx(of_pixels(FUNCTIONS["clamped"]), 4, 1, "mine"))
    with pytest.raises(UserError, match=r"x.onnx has no card of fm-distill"):
        open_student(path)
    export(workdir, path, overwrite=True)
    data = bytearray(path.read_bytes())
    weight = max(onnx.load(path).graph.initializer, key=lambda x: len(x.raw_data))
    data[data.index(weight.raw_data) + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged or was changed: its contents"):
        open_student(path)
    for change in (renamed_operation, another_card):
        export(workdir, path, overwrite=True)
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)
        with pytest.raises(UserError, match="is damaged or was changed: its contents"):
            open_student(path)
    path.unlink()
    for missing in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(UserError, match=r"not installed: pip install -e '\.\[onnx\]'"):
                export(workdir, path)
    assert not [*tmp_path.iterdir()]
    assert "\nonnx = [" in (ROOT / "pyproject.toml").read_text()
