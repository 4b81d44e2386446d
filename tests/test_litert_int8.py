"""A student quantised in training as `.tflite`: LiteRT has its ranges and computes its function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from test_export_functions import pixels_of, run_elsewhere
from test_export_litert import READ_LITERT
from test_quantisation import STUDENT, WITH_BATCH_NORM
from test_quantised_export import trained_logits
from tiny import tiny_config

from fm_distill.errors import UserError
from fm_distill.exporting import litert_file
from fm_distill.exporting.export import export
from fm_distill.exporting.function import function_of
from fm_distill.exporting.parity import compare, examples_of
from fm_distill.models import ranges_of
from fm_distill.models.quantisation import OF_ACTIVATIONS, Range, affine
from fm_distill.runs.open_run import open_run
from fm_distill.training.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Complete int8 runs, with GroupNorm and with BatchNorm."""
    folder = tmp_path_factory.mktemp("int8")
    for name, student in (("group", STUDENT), ("batch", WITH_BATCH_NORM)):
        train(tiny_config(student=student), folder / name)
    return folder


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_file_has_the_ranges_of_training_and_computes_its_function(runs, tmp_path, norm):
    path = tmp_path / "x.tflite"
    card = export(runs / norm, path, output="logits")
    assert card.function.parity.within_bound >= 0.99 and card.function.parity.images == 128
    pixels = pixels_of(1)
    found, _ = run_elsewhere(READ_LITERT, path, pixels, tmp_path)
    expected = trained_logits(runs / norm, pixels)
    np.testing.assert_allclose(found, expected, atol=3 * card.function.parity.bound)
    # Without what merges operations, so that all of them are told.
    interpreter = Interpreter(
        str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    tensors = {x["index"]: x for x in interpreter.get_tensor_details()}
    of_file = {
        (float(scale), int(zero))
        for x in tensors.values()
        if x["dtype"] == np.int8 and x["quantization_parameters"]["scales"].size == 1
        for scale in x["quantization_parameters"]["scales"]
        for zero in x["quantization_parameters"]["zero_points"]
    }
    ranges = ranges_of(open_run(runs / norm).student.variables)
    assert len(ranges) > 4
    for place, (low, high, _) in ranges.items():
        seen = Range(jnp.float32(low), jnp.float32(high))
        scale, zero = map(float, affine(seen, OF_ACTIVATIONS["int8"]))
        assert any(zero == there and scale == pytest.approx(x, rel=1e-5) for x, there in of_file), (
            place
        )
    if norm == "batch":
        kinds = [
            tensors[x["inputs"][1]]["dtype"]
            for x in interpreter._get_ops_details()
            if x["op_name"] == "CONV_2D"
        ]
        assert kinds.count(np.int8) >= 4


def test_a_changed_range_is_refused(runs):
    run = open_run(runs / "batch")
    examples = examples_of(run.config, run.student)
    ranges = jax.tree.map(lambda x: 0.7 * x, run.student.variables.ranges)
    variables = dataclasses.replace(run.student.variables, ranges=ranges)
    changed = dataclasses.replace(run.student, variables=variables)
    data = litert_file.to_litert(function_of(changed, "logits"), 16, 1, "bit")
    with pytest.raises(
        UserError, match=r"of the spread .* where 0.05 is allowed, and .* where 99% would"
    ):
        compare(litert_file.load_function(data), "tflite", run.student, "logits", 1, examples)


def test_it_is_not_quantised_twice(runs, tmp_path):
    with pytest.raises(UserError, match="is exported with its own ranges; leave out --quantise"):
        export(runs / "batch", tmp_path / "x.tflite", quantise="int8")
    assert not [*tmp_path.iterdir()]
