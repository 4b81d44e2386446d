"""Teachers in eight bits: ranges on the run's own training views, and how close they stay.

Before the first step. The ranges follow the first views of the run; on the next ones, the float
teacher's outputs measure what the rounding costs. Sources: Krishnamoorthi 2018 (arXiv 1806.08342),
section 3.1, for ranges from some batches alone.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, PyTree

from fm_distill.config import Config, NetworkConfig
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.config.serialization import converted
from fm_distill.config.teachers import NamedTeacher, teachers_of
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, first_batches, send
from fm_distill.errors import UserError
from fm_distill.models import Variables, ranges_of, with_ranges
from fm_distill.networks.branch import (
    Branch,
    freeze_on_devices,
    frozen_teachers,
    make_branch,
    step_views,
)
from fm_distill.networks.teachers import Teacher
from fm_distill.objectives.distances import kl_divergence
from fm_distill.recordings.manifest import is_recording
from fm_distill.runs.workdir import Workdir
from fm_distill.system.sharding import Layout, on_devices
from fm_distill.train_step.memory import in_parts
from fm_distill.training.build import Build
from fm_distill.views.draws import ViewRoot

NAME = "quantised_teachers.json"
# Views that the ranges are taken from, and as many others that the teacher is judged on, in whole
# batches.
VIEWS = 512


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """A rounded teacher's outputs compared with the float one's, on training views."""

    views: int
    # Share of the views with the same most likely class.
    agreement: float
    # Mean KL(float || rounded) in nats, at temperature 1 and at the run's.
    kl: float
    temperature: float
    kl_at_temperature: float


@dataclasses.dataclass(frozen=True)
class CalibratedTeacher:
    """What makes a float teacher the one that teaches: its ranges, and what they are of."""

    weights: str  # SHA-256 of the float ones
    network: NetworkConfig
    calibration_views: int
    # As `models.ranges_of` has them.
    ranges: dict[str, tuple[float, float, float]]
    fidelity: Fidelity


@dataclasses.dataclass(frozen=True)
class CalibratedTeachers:
    """The contents of the file, in the order of the teachers that are quantised."""

    teachers: tuple[CalibratedTeacher, ...]


class FrozenTeachers(NamedTuple):
    """The teachers that are networks and lie here, on the devices."""

    # In floats, as the student is evaluated by them; none where there is no head.
    branches: tuple[Branch, ...]
    frozen: tuple[Variables, ...]
    # As they teach, by the teachers of `Build`: those that are quantised in integers.
    teaching: tuple[Variables, ...]
    notes: list[str]

    def live(self, built: Build) -> tuple[Variables, ...]:
        """Those that the step runs."""
        return self.teaching[: len(built.live_teachers)]


def freeze_teachers(
    config: Config,
    resolved: ResolvedRun,
    built: Build,
    teachers: tuple[Teacher, ...],
    reader: Reader,
    layout: Layout,
    folder: pathlib.Path,
    root: ViewRoot,
) -> FrozenTeachers:
    """Puts `teachers`, all of the run or none, on the devices.

    Those that are to be quantised are calibrated, judged, and stored in `folder`; what is stored
    there is taken as it is. Raises `UserError` where one is too far from its float self, or the
    file is another run's, damaged, or lost.
    """
    # Of recorded teachers that are not here, the config may name fewer.
    loaded = teachers if any(x.variables for x in teachers) else ()
    pairs = zip(teachers_of(config)[: len(loaded)], loaded, strict=True)
    available = [(named_teacher, x, x.variables) for named_teacher, x in pairs if x.variables]
    dtype = jnp.dtype(resolved.precision)
    branches = tuple(make_branch(x.network, x.classes, dtype) for _, x, _ in available)
    frozen = frozen_teachers(branches, tuple(x for _, _, x in available), layout)
    if resolved.headless:
        return FrozenTeachers((), (), frozen, [])
    quantised_indices = [i for i, (_, x, _) in enumerate(available) if x.quantisation.quantised]
    if not quantised_indices:
        return FrozenTeachers(branches, frozen, frozen, [])
    stored_teachers = _stored(folder, [available[i][1] for i in quantised_indices])
    calibrate = functools.partial(_calibrated, config, root, built.student)
    calibrated = stored_teachers or tuple(
        calibrate(built.teachers[i], branches[i], available[i][1], frozen[i], reader, layout)
        for i in quantised_indices
    )
    teaching, notes = list(frozen), []
    for i, ranges in zip(quantised_indices, calibrated, strict=True):
        named_teacher, _, variables = available[i]
        _refuse_unlike(named_teacher, ranges.fidelity)
        notes.append(_said(named_teacher.option, ranges))
        network = built.teachers[i].network
        quantised_variables = with_ranges(network, variables, ranges.ranges)
        teaching[i] = freeze_on_devices(network, quantised_variables, layout)
    if stored_teachers is None:
        contents = msgspec.to_builtins(CalibratedTeachers(calibrated))
        Workdir(folder).write_from_first(NAME, contents)
    return FrozenTeachers(branches, frozen, tuple(teaching), notes)


def _stored(folder: pathlib.Path, teachers: list[Teacher]) -> tuple[CalibratedTeacher, ...] | None:
    """What is in the file, of these very teachers; None where they are to be calibrated."""
    workdir, path = Workdir(folder), folder / NAME
    # Without a config or a recording it is unknown which run these ranges belong to.
    if not (workdir.has_config() or is_recording(folder)):
        return None
    tree = workdir.read(NAME)
    if tree is None:
        if workdir.has_config():
            raise UserError(
                f"{path}, which holds the ranges of the run's quantised teacher, is missing, and "
                "without it the teacher would compute a different function; restore it, or "
                "choose another --workdir"
            )
        return None
    try:
        stored_teachers = converted(tree, CalibratedTeachers).teachers
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or choose another --workdir"
        ) from None
    expected = [(x.fingerprint, x.teaching_network) for x in teachers]
    if [(x.weights, x.network) for x in stored_teachers] != expected:
        raise UserError(
            f"{path} holds the ranges of other teachers than the run's; remove it, so that they "
            "are computed again, or choose another --workdir"
        )
    return stored_teachers


def _calibrated(
    config: Config,
    root: ViewRoot,
    student: Branch,
    rounded: Branch,
    plain: Branch,
    teacher: Teacher,
    frozen: Variables,
    reader: Reader,
    layout: Layout,
) -> CalibratedTeacher:
    """Ranges and fidelity of `teacher`, whose float form is `plain` with `frozen`."""
    parts, temperature = config.memory.teacher_parts, config.objective.temperature
    view_sampling = regime_of(config).views
    # Of whole batches: parts of them would have other ranges.
    apply_observing = rounded.network.apply_observing
    assert apply_observing is not None and teacher.variables is not None

    def images_of(batch: Batch, root: ViewRoot, step: Array) -> Array:
        rendered = step_views(view_sampling, config.views, student, (rounded,), batch, root, step)
        return rendered.teachers[rounded.input_spec]

    def observed(variables: Variables, batch: Batch, root: ViewRoot, step: Array) -> PyTree:
        return apply_observing(variables, images_of(batch, root, step), train=False).ranges

    def compared(
        frozen: Variables, quantised_variables: Variables, batch: Batch, root: ViewRoot, step: Array
    ) -> tuple[Array, Array, Array]:
        def both(part: Array) -> tuple[Array, Array]:
            float_logits = plain.network.apply_frozen(frozen, part).logits
            return float_logits, rounded.network.apply_frozen(quantised_variables, part).logits

        float_logits, quantised_logits = in_parts(both, parts, images_of(batch, root, step))
        agreement = float_logits.argmax(-1) == quantised_logits.argmax(-1)
        kl = (kl_divergence(quantised_logits, float_logits, x) for x in (1.0, temperature))
        return agreement, *kl

    count = -(-VIEWS // config.batch_size)
    batches = _batches(config, reader, layout, 2 * count)
    shapes = jax.eval_shape(rounded.network.init, jax.random.key(0)).ranges
    empty_ranges = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    variables = dataclasses.replace(teacher.variables, ranges=empty_ranges)
    variables = on_devices(variables, layout.variables(variables))
    observe = jax.jit(observed, out_shardings=layout.replicated)
    for step, batch in itertools.islice(batches, count):
        ranges = observe(variables, batch, root, jnp.int32(step))
        variables = dataclasses.replace(variables, ranges=ranges)
    ranges = ranges_of(jax.device_get(variables))
    quantised_variables = freeze_on_devices(rounded.network, variables, layout)
    compare = jax.jit(compared, out_shardings=layout.replicated)
    rows = [
        jax.device_get(compare(frozen, quantised_variables, batch, root, jnp.int32(step)))
        for step, batch in batches
    ]
    columns = zip(*rows, strict=True)
    agreement, kl, kl_at_temperature = (np.concatenate(x).astype(np.float64) for x in columns)
    return CalibratedTeacher(
        weights=teacher.fingerprint,
        network=teacher.teaching_network,
        calibration_views=count * config.batch_size,
        ranges=ranges,
        fidelity=Fidelity(
            views=len(agreement),
            agreement=float(agreement.mean()),
            kl=float(kl.mean()),
            temperature=temperature,
            kl_at_temperature=float(kl_at_temperature.mean()),
        ),
    )


def _batches(
    config: Config, reader: Reader, layout: Layout, count: int
) -> Iterator[tuple[int, Batch]]:
    """The first steps of the run, and their batches, of which each process sends its rows."""
    for step, batch in enumerate(first_batches(reader, config.seed, config.batch_size, count)):
        yield step, jax.tree.map(lambda x: send(x, layout.batch, 0), batch)


def _refuse_unlike(teacher: NamedTeacher, fidelity: Fidelity) -> None:
    option, least_agreement = teacher.option, teacher.config.least_agreement
    if not np.isfinite([fidelity.kl, fidelity.kl_at_temperature]).all():
        raise UserError(
            f"{option}: its outputs, in floats or quantised, are not finite numbers on the "
            "training views; are its weights and input_range right?"
        )
    if fidelity.agreement < least_agreement:
        raise UserError(
            f"{option}.quantisation changes the most likely class on "
            f"{1 - fidelity.agreement:.1%} of {fidelity.views:,} training views (KL "
            f"{fidelity.kl:.3g} nats), and {option}.least_agreement={least_agreement:g} allows "
            f"{1 - least_agreement:.1%}: keep layers in floats "
            f"({option}.quantisation.float_layers), clip ranges "
            f"({option}.quantisation.range_percentile), or allow more"
        )


def _said(option: str, calibrated: CalibratedTeacher) -> str:
    fidelity = calibrated.fidelity
    return (
        f"{option} runs with {calibrated.network.quantisation.weights} weights and "
        f"{calibrated.network.quantisation.activations} activations, with ranges from "
        f"{calibrated.calibration_views:,} training views; on {fidelity.views:,} others it has the "
        f"float teacher's top-1 class for {fidelity.agreement:.2%}, KL {fidelity.kl:.3g} nats at "
        f"T=1 and {fidelity.kl_at_temperature:.3g} at T={fidelity.temperature:g}"
    )
