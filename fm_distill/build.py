"""A config made into networks, optimizer and step: what `train` runs, and what can be planned."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from fm_distill.config import Config, NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import build_network, resolve
from fm_distill.optim import make_optimizer, make_schedule
from fm_distill.sharding import Layout
from fm_distill.step import Seat, TrainState, TrainStep, init_state, make_train_step
from fm_distill.views import Picture

# Steps a dispatch of `auto` on an accelerator with resident data.
STEPS_PER_DISPATCH = 16


@dataclasses.dataclass(frozen=True)
class Build:
    """The parts of a run that do not depend on data or weights."""

    student: Seat
    teachers: tuple[Seat, ...]  # those that are compared with
    schedule: Callable[[Array | int], Array]
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    # Those that the step runs: none where labels are the target, or the teachers are fixed.
    taught_by: tuple[Seat, ...]
    config: Config

    def init(self, key: PRNGKeyArray) -> TrainState:
        return init_state(key, self.student.network, self.optimizer, self.config.ema_decay)

    def abstract_state(self) -> TrainState:
        """Shapes of the state."""
        return jax.eval_shape(self.init, jax.random.key(0))


def compute_dtype(config: Config, layout: Layout) -> jnp.dtype:
    """`auto`: bfloat16 on TPU and GPU, float32 on CPU."""
    if config.precision != "auto":
        return jnp.dtype(config.precision)
    platform = layout.mesh.devices.flat[0].platform
    return jnp.dtype("float32" if platform == "cpu" else "bfloat16")


def make_seat(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Seat:
    return Seat(build_network(config, classes, dtype), Picture.of(resolve(config)))


def build(
    config: Config,
    classes: int,
    teacher_networks: tuple[NetworkConfig, ...],
    total_steps: int,
    layout: Layout,
) -> Build:
    """Everything that the step needs, from the config alone."""
    dtype = compute_dtype(config, layout)
    student = make_seat(config.student, classes, dtype)
    teachers = tuple(make_seat(network, classes, dtype) for network in teacher_networks)
    _check_accumulation(config, student)
    online = config.objective.target == "teacher" and config.teaching != "fixed"
    taught_by = teachers if online else ()
    schedule = make_schedule(config.schedule, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_train_step(
        student,
        taught_by,
        optimizer,
        config.views,
        config.objective,
        config.teaching,
        config.ema_decay,
        config.student.keep_statistics,
        config.memory,
    )
    return Build(student, teachers, schedule, optimizer, step, taught_by, config)


def _check_accumulation(config: Config, student: Seat) -> None:
    """Raises `UserError` where accumulating would change the statistics of the student."""
    if config.memory.accumulate == 1 or config.student.keep_statistics:
        return
    if jax.tree.leaves(jax.eval_shape(student.network.init, jax.random.key(0)).statistics):
        raise UserError(
            f"memory.accumulate={config.memory.accumulate} would give {config.student.model}'s "
            "BatchNorm the statistics of parts of the batch: use memory.accumulate=1 with another "
            "lever (memory.rematerialise, memory.teacher_parts, mesh.fsdp), or a GroupNorm student"
        )


def steps_per_dispatch(config: Config, resident: bool, layout: Layout) -> int:
    """Steps that one call does: several in one loop on the device save an accelerator's time
    between calls, and cost a CPU a multiple of the step's time."""
    if config.steps_per_dispatch != "auto":
        return config.steps_per_dispatch
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    return STEPS_PER_DISPATCH if resident and not on_cpu else 1


def due(every: int, step: int, steps: int) -> bool:
    """Whether the dispatch of `steps` that led to `step` passed a multiple of `every`."""
    return every > 0 and step // every > (step - steps) // every


def dispatch_sizes(start_step: int, total_steps: int, size: int) -> Iterator[int]:
    """Steps of each dispatch from `start_step` on: full ones, then single steps at the end.

    The same from any start that is the end of a dispatch, so that a resumed run runs the same
    programs on the same steps.
    """
    step = start_step
    while step < total_steps:
        steps = size if step + size <= total_steps else 1
        yield steps
        step += steps
