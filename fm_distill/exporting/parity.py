"""Whether an exported function, run by its own runtime, is the function of the run.

On the same uint8 pixels: what the run sees of an image in evaluation, rounded to whole grey levels.
All is computed on the CPU, in float32: accelerators round the factors of their products.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from fm_distill.config import Config
from fm_distill.data.feeding import Reader, stack
from fm_distill.data.splits import open_named
from fm_distill.errors import UserError
from fm_distill.exporting.function import (
    BatchSize,
    Output,
    Outputs,
    Pixels,
    Runtime,
    central_squares,
    in_batches,
)
from fm_distill.models import Variables, build_network
from fm_distill.runs.student import BATCH, Student
from fm_distill.views.rendering import InputSpec, normalise
from fm_distill.weights.card import Parity

# Of the split, spread evenly over it; all where it has fewer.
IMAGES = 128

# Largest difference of a probability, or of a logit over the largest logit where that is above 1.
# XLA does the same arithmetic with its sums in another order. ONNX Runtime has kernels of its own
# and merges operations, so it has more room.
BOUNDS = {
    "stablehlo": 1e-4,
    "onnx": 5e-4,
    "onnx int8": 0.5,
    "tflite": 5e-4,
    "tflite float16": 0.05,
    "tflite dynamic": 0.5,
    "tflite int8": 0.5,
}
# Of a student that was quantised in training a sum in another order may round an activation to the
# next number of its grid, and a deep network hands that on. Then nearly all outputs have to be
# within a step of an output of eight bits, or the root mean square as below has to be small: an
# EfficientNet-Lite0 has 0.02 to 0.03.
STEPS = 255
WITHIN = 0.99
TRAINED_RELATIVE_BOUND = 0.05
# Root mean square of the difference, as a share of that of the run's outputs about their mean over
# the images: another function of the same outputs has 1.4. What is not quantised is bound above.
RELATIVE_BOUNDS = {
    "onnx int8": 0.35,
    "tflite float16": 0.05,
    "tflite dynamic": 0.35,
    "tflite int8": 0.35,
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """What the function and the run are compared on."""

    split: str
    pixels: Pixels
    labels: Int32[np.ndarray, " batch"]  # -1 where there is none


def examples_of(config: Config, student: Student) -> Examples:
    """Images of the validation split; of test, or train, where there is none.

    Raises `UserError` where the data are not there.
    """
    splits = (("validation", config.data.validation), ("test", config.data.test))
    split = next((name for name, value in splits if value is not None), "train")
    return images_of(config, student, split)


def images_of(config: Config, student: Student, split: str) -> Examples:
    """`IMAGES` of `split`, spread evenly over it, as evaluation shows them. Raises `UserError`."""
    reader = Reader(open_named(config, split), config.data, student.classes)
    indices = np.unique(np.linspace(0, len(reader) - 1, IMAGES).round().astype(int))
    items = [item for i in indices if (item := reader[int(i)])["valid"]]
    if not items:
        raise UserError(f"no image of the {split} split can be read, to compare the export with")
    batch = stack(items)
    pixels = central_squares(
        batch.canvases, batch.sizes, student.central_crop, student.network.resolution
    )
    return Examples(split, pixels, np.asarray(batch.labels))


def compare(
    runtime: Runtime,
    kind: str,
    student: Student,
    output: Output,
    batch: BatchSize,
    examples: Examples,
) -> Parity:
    """The figures of `runtime` beside `student`, which computes as in training, in float32.

    Raises `UserError` where they differ by more than the bound of `kind`, or of quantised
    activations.
    """
    with jax.default_device(_cpu()):
        with runs(runtime.name):
            outputs = in_batches(runtime.call, examples.pixels, batch, student.classes)
        expected = _logits(student, examples.pixels)
        if output == "probabilities":
            expected = np.asarray(jax.nn.softmax(expected, axis=-1))
    trained_in_integers = student.network.quantisation.activations != "none"
    bound = BOUNDS[kind] * max(1.0, float(np.abs(expected).max()))
    relative_bound = RELATIVE_BOUNDS.get(kind)
    if trained_in_integers:
        bound = max(bound, float(np.ptp(expected)) / STEPS)
        relative_bound = TRAINED_RELATIVE_BOUND
    differences = np.abs(outputs - expected)
    difference, share_within = float(differences.max()), float((differences <= bound).mean())
    spread = float(np.sqrt(np.square(expected - expected.mean(axis=0)).mean()))
    error = float(np.sqrt(np.square(differences).mean())) / max(spread, 1e-12)
    compared = f"{output} on {len(outputs)} images of the {examples.split} split"
    small = relative_bound is None or error <= relative_bound
    if not np.isfinite(difference):
        raise UserError(
            f"{runtime.name} returns numbers that are not finite as its {compared}, so nothing "
            "was written; export to another format, and report this"
        )
    if trained_in_integers:
        if not (small or share_within >= WITHIN):
            raise UserError(
                f"{runtime.name} differs from the run by {error:.3g} of the spread of its "
                f"{compared}, where {relative_bound:g} is allowed, and {share_within:.2%} of them "
                f"are within {bound:.3g}, where {WITHIN:.0%} would do, so nothing was written; "
                "export to another format, and report this"
            )
    elif share_within < 1:
        raise UserError(
            f"{runtime.name} differs from the run by up to {difference:.3g} in its {compared}, "
            f"where {bound:.3g} is allowed, so nothing was written; export to another format, "
            "and report this"
        )
    elif not small:
        raise UserError(
            f"{runtime.name} as {kind} differs from the run by {error:.3g} of the spread of its "
            f"{compared}, where {relative_bound:g} is allowed, so nothing was written; use "
            "--output logits, or a kind with more bits"
        )
    labelled = examples.labels >= 0
    top1 = [
        float((scores.argmax(axis=1) == examples.labels)[labelled].mean())
        if labelled.any()
        else None
        for scores in (outputs, expected)
    ]
    return Parity(
        runtime=f"{runtime.name} on a CPU",
        split=examples.split,
        images=len(outputs),
        largest_difference=difference,
        bound=bound,
        within_bound=share_within,
        relative_error=error,
        relative_bound=relative_bound,
        agreement=float((outputs.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        file_top1=top1[0],
        run_top1=top1[1],
    )


@contextlib.contextmanager
def runs(what: str) -> Iterator[None]:
    """Any error of a runtime with a function that was just converted, as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{what} cannot run the converted student ({type(error).__name__}: {reason}), so "
            "nothing was written; export to another format"
        ) from error


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            "an export is compared with its run on the CPU, which JAX may not use here; add "
            "`cpu` to JAX_PLATFORMS, after a comma"
        ) from None


def _logits(student: Student, pixels: Pixels) -> Outputs:
    network = build_network(student.network, student.classes, jnp.dtype("float32"))
    spec = InputSpec.of(student.network)

    @jax.jit
    def program(variables: Variables, pixels: Array) -> Float[Array, "batch classes"]:
        images = normalise(pixels.astype(jnp.float32), spec)
        return network.apply(variables, images, train=False).logits

    # From wherever they lie to the default device.
    variables = jax.tree.map(np.asarray, student.variables)
    return in_batches(lambda x: program(variables, x), pixels, BATCH, student.classes)
