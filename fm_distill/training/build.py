"""A resolved run made into networks, optimizer and step: what is trained, and what is planned."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from fm_distill.config import Config
from fm_distill.config.networks import FUNCTION
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.errors import UserError
from fm_distill.networks.branch import Branch, make_branch
from fm_distill.preparation.check_features import check_features
from fm_distill.runs.state import TrainState, init_state
from fm_distill.train_step.loss import Loss, make_loss
from fm_distill.train_step.optim import adapter_optimizer, make_optimizer, make_schedule
from fm_distill.train_step.pruning import Prune, initial_masks, make_prune
from fm_distill.train_step.step import TrainStep, Update, make_train_step, make_update
from fm_distill.train_step.teach import Teach, make_teach
from fm_distill.train_step.term_state import TermShapes, init_terms, make_term_update


@dataclasses.dataclass(frozen=True)
class Build:
    """The parts of a run that do not depend on data or weights."""

    student: Branch
    teachers: tuple[Branch, ...]  # those that are networks
    schedule: Callable[[Array | int], Array]
    optimizer: optax.GradientTransformation
    loss: Loss
    # The two halves of the step, and the step itself.
    teach: Teach
    update: Update
    train_step: TrainStep
    # Those that the step runs: none where the targets are labels or a table.
    live_teachers: tuple[Branch, ...]
    config: Config
    term_shapes: TermShapes
    adapter_optimizer: optax.GradientTransformation
    # Of single weights; None where none are.
    prune: Prune | None

    def init(self, key: PRNGKeyArray) -> TrainState:
        terms = init_terms(key, self.term_shapes, self.adapter_optimizer)
        masks = None if self.prune is None else initial_masks
        decay = self.config.ema_decay
        return init_state(key, self.student.network, self.optimizer, decay, terms, masks)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes of the state."""
        return jax.eval_shape(self.init, jax.random.key(0))


def build(
    config: Config, resolved: ResolvedRun, optimizer: optax.GradientTransformation | None = None
) -> Build:
    """Everything that the step needs. Raises `UserError`.

    `optimizer` takes the student's gradients instead of that of `config`.
    """
    dtype = jnp.dtype(resolved.precision)
    student = make_branch(resolved.student, resolved.classes, dtype)
    networks = (x for x in resolved.teachers if x.model != FUNCTION)
    teachers = tuple(make_branch(x, resolved.teacher_classes, dtype) for x in networks)
    _check_accumulation(config, student)
    networks_of_teachers = tuple(x.network for x in teachers)
    term_shapes = check_features(config, resolved.examples, student.network, networks_of_teachers)
    regime = regime_of(config)
    has_live_teachers = regime.targets == "teachers"
    live_teachers = teachers if has_live_teachers else ()
    schedule = make_schedule(config.schedule, resolved.total_steps)
    optimizer = optimizer or make_optimizer(config.optimizer, schedule)
    optimizer_of_adapters = make_optimizer(adapter_optimizer(config.optimizer), schedule)
    objective, pruning = config.objective, config.student.pruning
    prune = make_prune(pruning, student.network, resolved.total_steps, resolved.student.model)
    teach = make_teach(
        regime.targets,
        live_teachers,
        resolved.classes,
        objective,
        config.memory,
        resolved.class_counts,
    )
    loss = make_loss(config, student, resolved.total_steps)
    update = make_update(
        loss,
        optimizer,
        ema_decay=config.ema_decay,
        accumulate=config.memory.accumulate,
        term_update=make_term_update(objective, optimizer_of_adapters),
        prune=prune,
        term_gradients=config.log.term_gradients,
    )
    step = make_train_step(
        student,
        live_teachers,
        teach,
        update,
        config.views,
        regime.views,
        resolved.period_steps,
    )
    return Build(
        student=student,
        teachers=teachers,
        schedule=schedule,
        optimizer=optimizer,
        loss=loss,
        teach=teach,
        update=update,
        train_step=step,
        live_teachers=live_teachers,
        config=config,
        term_shapes=term_shapes,
        adapter_optimizer=optimizer_of_adapters,
        prune=prune,
    )


def _check_accumulation(config: Config, student: Branch) -> None:
    """Raises `UserError` where accumulating would change what the student observes."""
    if config.memory.accumulate == 1:
        return
    if student.network.apply_observing is not None:
        raise UserError(
            f"memory.accumulate={config.memory.accumulate} would give quantised activations the "
            "ranges of parts of the batch: use memory.accumulate=1 with another option "
            "(memory.rematerialise, memory.teacher_parts, mesh.fsdp)"
        )
    if config.student.keep_statistics:
        return
    if jax.tree.leaves(jax.eval_shape(student.network.init, jax.random.key(0)).statistics):
        raise UserError(
            f"memory.accumulate={config.memory.accumulate} would give {config.student.model}'s "
            "BatchNorm the statistics of parts of the batch: use memory.accumulate=1 with another "
            "option (memory.rematerialise, memory.teacher_parts, mesh.fsdp), or a GroupNorm student"
        )
