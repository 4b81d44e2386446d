"""What networks cost: parameters, FLOPs of an image, and on request latency and memory.

Of the forward pass alone, in evaluation mode and with what is constant computed before (`freeze`):
no image is read and no view is rendered. Several teachers cost what they cost together.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig, QuantisationConfig
from fm_distill.config.networks import FUNCTION
from fm_distill.config.resolved import ResolvedRun
from fm_distill.errors import UserError
from fm_distill.models import Variables, is_own, own_code, parameter_count
from fm_distill.networks.branch import Branch, make_branch
from fm_distill.system.device import device_name

WARM_UP = 3
CALLS = 30


@dataclasses.dataclass(frozen=True)
class Calls:
    """Forward passes of one batch on one device, over `CALLS` calls after `WARM_UP`."""

    batch_size: int
    median_ms: float
    p95_ms: float  # 95th percentile
    # XLA's temporary memory of the program (`temp_size_in_bytes`), without weights and images.
    # None where the compiler does not report it.
    activation_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one network, or of several together; None for a teacher that is a function."""

    parameters: int | None
    # Of one image at each network's own resolution; None also where `count_flops` raises.
    flops: int | None
    # Of a batch of one and of a full one; None where they were not measured.
    one: Calls | None = None
    batch: Calls | None = None


# Networks, their classes, the precision that they compute in, and the size of the batch to measure
# or None.
CostOf = Callable[[tuple[NetworkConfig, ...], int, str, int | None], Cost]


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating point operations of `function(*arguments)`; shapes suffice.

    2 for each multiply-add and 1 for any other operation, as XLA counts them before anything is
    compiled: products with the zeros of a padding are left out, transcendental functions are not
    counted, and the body of a loop is counted once.

    Raises `RuntimeError` where JAX has no CPU here, or the function no form for a TPU.
    """
    # In the form for a TPU: on a CPU some convolutions are written out as other sums. On a CPU:
    # JAX does not count for the plugins of TPUs and GPUs before it has compiled.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
        return float(lowered.cost_analysis()["flops"])


def cost_of(
    networks: tuple[NetworkConfig, ...], classes: int, precision: str, batch_size: int | None
) -> Cost:
    """The cost of `networks`, in which nothing is `auto`.

    With a `batch_size`, batches of one and of so many images are measured on the first device, with
    initial weights: the time does not depend on their values.
    """
    if any(x.model == FUNCTION for x in networks):
        return Cost(None, None)
    code = tuple(own_code(x.model) if is_own(x.model) else "" for x in networks)
    # Roundings in training are no operations of a file of integers.
    float_networks = tuple(
        dataclasses.replace(x, quantisation=QuantisationConfig()) for x in networks
    )
    cost = _counted(float_networks, code, classes, precision)
    if batch_size is None:
        return cost
    branches = tuple(make_branch(x, classes, jnp.dtype(precision)) for x in networks)
    weights = jax.jit(lambda: _frozen(branches, _initial(branches)))()
    try:
        one, batch = (_measured(branches, weights, size) for size in (1, batch_size))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"a batch of {batch_size} images cannot be measured on {device_name()} "
            f"({str(error).partition(chr(10))[0]}); leave out --cost"
        ) from None
    return dataclasses.replace(cost, one=one, batch=batch)


def run_cost(
    resolved: ResolvedRun, batch_size: int | None = None, cost: CostOf = cost_of
) -> dict[str, Any]:
    """`cost` in the figures of a run: of its student, and of its teachers together.

    With a `batch_size`, latency and memory are measured too, and `device` says where.
    """
    student, teacher = (
        dataclasses.asdict(cost(x, classes, resolved.precision, batch_size)) if x else None
        for x, classes in (
            ((resolved.student,), resolved.classes),
            (resolved.teachers, resolved.teacher_classes),
        )
    )
    device = None
    if batch_size is not None:
        device = f"{device_name()}, {resolved.precision}"
    return {"student": student, "teacher": teacher, "device": device}


@functools.cache  # two seconds of tracing for a large network, and runs of a process share theirs
def _counted(
    networks: tuple[NetworkConfig, ...], code: tuple[str, ...], classes: int, precision: str
) -> Cost:
    """`code`: digests of custom networks, whose files may change under the same names."""
    branches = tuple(make_branch(x, classes, jnp.dtype(precision)) for x in networks)
    initial = jax.eval_shape(lambda: _initial(branches))
    frozen = jax.eval_shape(lambda x: _frozen(branches, x), initial)
    images = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _images(branches, 1))
    return Cost(
        parameters=sum(parameter_count(x.params) for x in initial),
        flops=_flops(branches, frozen, images),
    )


def call_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of one call, until what it returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start)


def _initial(branches: tuple[Branch, ...]) -> tuple[Variables, ...]:
    return tuple(x.network.init(jax.random.key(0)) for x in branches)


def _frozen(
    branches: tuple[Branch, ...], variables: tuple[Variables, ...]
) -> tuple[Variables, ...]:
    return tuple(x.network.freeze(y) for x, y in zip(branches, variables, strict=True))


def _flops(branches: tuple[Branch, ...], *arguments: Any) -> int | None:
    # A run ends with its evaluation, which must not fail for this.
    try:
        return round(count_flops(_forward(branches), *arguments))
    except RuntimeError:
        return None


def _images(
    branches: tuple[Branch, ...], batch_size: int
) -> tuple[Float[np.ndarray, "batch height width 3"], ...]:
    rng = np.random.default_rng(0)
    sides = (x.input_spec.resolution for x in branches)
    return tuple(
        rng.uniform(-1, 1, (batch_size, side, side, 3)).astype(np.float32) for side in sides
    )


def _forward(branches: tuple[Branch, ...]) -> Callable[..., tuple[Array, ...]]:
    """The logits; of networks without a head, the last of their features."""
    last_features = tuple(
        () if x.has_head else (*x.network.feature_shapes(),)[-1:] for x in branches
    )

    def forward(frozen: tuple[Variables, ...], images: tuple[Array, ...]) -> tuple[Array, ...]:
        outputs = (
            (branch, branch.network.apply_frozen(variables, x, features=name))
            for branch, variables, x, name in zip(
                branches, frozen, images, last_features, strict=True
            )
        )
        return tuple(
            output.logits if branch.has_head else next(iter(output.features.values()))
            for branch, output in outputs
        )

    return forward


def _measured(
    branches: tuple[Branch, ...], frozen: tuple[Variables, ...], batch_size: int
) -> Calls:
    images = jax.device_put(_images(branches, batch_size))
    program = jax.jit(_forward(branches)).lower(frozen, images).compile()
    times_ms = [call_ms(lambda: program(frozen, images)) for _ in range(WARM_UP + CALLS)]
    measured_ms = times_ms[WARM_UP:]
    memory = program.memory_analysis()
    return Calls(
        batch_size=batch_size,
        median_ms=float(np.median(measured_ms)),
        p95_ms=float(np.quantile(measured_ms, 0.95)),
        activation_bytes=None if memory is None else int(memory.temp_size_in_bytes),
    )
