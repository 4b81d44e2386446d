"""Every `auto` of a config becomes its value here, once, before anything is compiled."""

import dataclasses
import pathlib
from typing import Literal

from fm_distill.config import Config, NetworkConfig
from fm_distill.config.code import named_code
from fm_distill.config.objective import BY_CLASS, terms_of
from fm_distill.config.resolved import DataFacts, RecordingFacts, ResolvedRun, WeightFacts
from fm_distill.config.serialization import differences
from fm_distill.config.steps import total_steps
from fm_distill.config.teachers import teachers_of
from fm_distill.data.resident import is_resident
from fm_distill.data.splits import Data, open_data
from fm_distill.errors import UserError
from fm_distill.models import is_own, own_code
from fm_distill.models import resolve as resolve_network
from fm_distill.networks.shrinking import pruned_network
from fm_distill.preparation.check import points_after, points_after_run
from fm_distill.preparation.input_moments import with_input_moments
from fm_distill.preparation.open_networks import open_networks
from fm_distill.runs.workdir import Workdir
from fm_distill.system.foreign_code import code_files
from fm_distill.system.references import is_reference, load_reference
from fm_distill.system.sharding import Layout, make_layout
from fm_distill.weights.card import only_network
from fm_distill.weights.hub import PREFIX

# Steps of a dispatch of `auto` on an accelerator with resident data: several steps in one loop on
# the device save its time between calls; on a CPU they would cost a multiple of the step's time.
STEPS_PER_DISPATCH = 16


def resolve(
    config: Config,
    data: DataFacts,
    weights: WeightFacts,
    layout: Layout,
    memory_bytes: int | None = None,
) -> ResolvedRun:
    """The run of `config` on these data, weights and devices.

    `memory_bytes` is what a device has; None for those that are here. Raises `UserError`.
    """
    resident = is_resident(config.data, data.examples, memory_bytes)
    dispatch = config.steps_per_dispatch
    if dispatch == "auto":
        dispatch = STEPS_PER_DISPATCH if resident and layout.platform != "cpu" else 1
    steps = total_steps(config, data.examples)
    if problems := list(points_after_run(config.views, steps)):
        raise UserError(problems[0])
    networks = (weights.student, *weights.teachers)
    return ResolvedRun(
        data=data.identity,
        examples=data.examples,
        classes=weights.classes,
        class_names=weights.class_names,
        student=weights.student,
        teachers=weights.teachers,
        student_weights=weights.student_weights,
        teacher_weights=weights.teacher_weights,
        total_steps=steps,
        precision=_precision(config, layout),
        feeding="resident" if resident else "streaming",
        steps_per_dispatch=dispatch,
        mesh=dict(layout.mesh.shape),
        code=_own_code(config, networks),
        code_files=code_files(
            (*(x.model for x in networks if is_own(x.model)), *named_code(config))
        ),
        recording=weights.recording.identity if weights.recording else None,
        period_steps=_period_steps(config, steps, weights.recording),
        class_counts=data.class_counts,
        target_images=data.target_images,
        headless=weights.headless,
    )


def resolve_described(
    config: Config,
    teachers: tuple[NetworkConfig, ...],
    classes: int,
    examples: int,
    layout: Layout,
    memory_bytes: int | None = None,
) -> ResolvedRun:
    """The run as far as descriptions of its data and networks tell: neither is there.

    `teachers` may hold no `auto`. Where examples are weighted by class, all classes have the same
    number of them; where an input range adapts to data, its moments are `with_any_moments`.
    """
    student = described_student(config)
    weights = with_any_moments(WeightFacts(student, teachers, classes))
    by_class = config.objective.example_weights.kind in BY_CLASS
    counts = (max(1, examples // classes),) * classes if by_class else None
    return resolve(config, DataFacts("", examples, counts), weights, layout, memory_bytes)


def with_any_moments(weights: WeightFacts) -> WeightFacts:
    """For what looks at shapes and times alone: moments of no data, where none were computed."""

    def filled(network: NetworkConfig) -> NetworkConfig:
        if network.input_range != "adapt" or network.input_mean:
            return network
        return dataclasses.replace(network, input_mean=(127.5,) * 3, input_deviation=(127.5,) * 3)

    return dataclasses.replace(
        weights, student=filled(weights.student), teachers=tuple(map(filled, weights.teachers))
    )


def described_student(config: Config) -> NetworkConfig:
    """As its weights will make it, where they are a run that is here."""
    network, weights = resolve_network(only_network(config.student)), config.student.weights
    if weights and not network.block_widths and Workdir(weights).has_config():
        widths = Workdir(weights).stored().resolved.student.block_widths
        network = dataclasses.replace(network, block_widths=widths)
    try:
        return pruned_network(network, config.student.pruning)
    except ValueError as error:
        raise UserError(f"student: {error}") from None


def resolve_here(config: Config, workdir: pathlib.Path) -> ResolvedRun:
    """The run of `config` on the data, weights and devices that are here; nothing is downloaded.

    Raises `UserError` where they are not here.
    """
    teachers = [(x.option, x.config.weights) for x in teachers_of(config)]
    for option, weights in (("student", config.student.weights), *teachers):
        if weights and weights.startswith(PREFIX):
            raise UserError(f"{option}.weights are at {weights}, and nothing is downloaded here")
    layout = make_layout(config.mesh)
    data, _ = open_data(config)
    networks = open_networks(config, workdir, data)
    if networks.undecided:
        raise UserError(
            "student.pruning.criterion=taylor chooses channels by the gradient of the first "
            "batches, which only `train` computes; `show` does not"
        )
    networks = with_input_moments(
        networks, config, data.train, _stored_student(config, workdir, data)
    )
    return resolve(config, data.facts, networks.facts, layout)


def _stored_student(config: Config, path: pathlib.Path, data: Data) -> NetworkConfig | None:
    """Of the run that lies at `path`, where it is that of `config` on these data."""
    workdir = Workdir(path)
    if config.student.input_range != "adapt" or not workdir.has_config():
        return None
    stored = workdir.stored()
    same_run = stored.resolved.data == data.train.identity and not differences(
        stored.config, config
    )
    return stored.resolved.student if same_run else None


def _own_code(config: Config, networks: tuple[NetworkConfig, ...]) -> tuple[str, ...]:
    """SHA-256 of each file that the config names as code, the student's network first."""
    sources = (config.data.source, *(part.source for part in config.data.transfer))
    terms = (x.kind for x in terms_of(config.objective))
    references = (*sources, config.views.crop, *terms, config.optimizer.name)
    models = [own_code(x.model) for x in networks if is_own(x.model)]
    return (*models, *(load_reference(x, x).sha256 for x in references if is_reference(x)))


def _period_steps(config: Config, total: int, recording: RecordingFacts | None) -> int | None:
    """After how many steps the views repeat; None where they do not."""
    period = config.views.period_steps or total
    if recording is not None:
        steps = recording.steps
        contiguous = steps > 0 and len(recording.ranges) == 1
        if steps < period and (config.views.period_steps or not contiguous):
            ranges = ", ".join(f"{a:,} to {b:,}" for a, b in recording.ranges) or "none"
            advice = f", or give --views.period-steps {steps}" if steps else ""
            raise UserError(
                f"{recording.path} has the steps {ranges}, and this run needs 0 to {period:,}: "
                f"record what is missing with `fm-distill record`{advice}"
            )
        period = min(period, steps)
        if period < total and (
            problems := list(points_after(config.views, period, recording.path))
        ):
            raise UserError(f"{problems[0]}, or record the rest of the run, or shorten it")
    return period if period < total else None


def _precision(config: Config, layout: Layout) -> Literal["float32", "bfloat16"]:
    if config.precision != "auto":
        return config.precision
    return "float32" if layout.platform == "cpu" else "bfloat16"
