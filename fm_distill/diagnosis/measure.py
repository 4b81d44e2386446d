"""From a run to its `Evidence`: the log, and the probes over the batches of its newest steps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from fm_distill.config import Config, ObjectiveConfig
from fm_distill.config.teachers import teachers_of
from fm_distill.data.feeding import sampled_batches
from fm_distill.diagnosis.cka import ratio
from fm_distill.diagnosis.evidence import (
    BatchNorm,
    CentralView,
    Cka,
    Evidence,
    Gradients,
    InRanges,
    Log,
    NotExamined,
    Setting,
    TrainingView,
)
from fm_distill.diagnosis.logged import log_of, setting_of
from fm_distill.diagnosis.not_examined import left_out
from fm_distill.diagnosis.opened import Examined, examine
from fm_distill.diagnosis.probes import (
    RECOMPUTED,
    Found,
    central_probe,
    ranges_to_try,
    taps_of,
    training_probe,
)
from fm_distill.errors import TrainingFailed, UserError
from fm_distill.models import Variables
from fm_distill.networks.batch_statistics import with_central_statistics
from fm_distill.objectives.ensemble import as_one, combine
from fm_distill.objectives.terms import make_terms
from fm_distill.runs.history import read_history
from fm_distill.runs.open_run import Run
from fm_distill.runs.stored_run import StoredRun
from fm_distill.runs.workdir import Workdir
from fm_distill.views.draws import run_keys
from fm_distill.views.rendering import CentralCrop

EPSILON = 1e-5  # of a variance that BatchNorm keeps


def measure(run: Run, config: Config, examples: int) -> Evidence:
    """All that can be known of `run`, from about so many of the examples that it saw last.

    Raises `UserError` where `config` names other places of the teachers or of their recording, and
    they are not there.
    """
    setting = setting_of(run.stored, run.workdir, run.step, run.complete)
    log = log_of(read_history(run.workdir.path), config.batch_size)
    try:
        examined = examine(run, config)
        return _probed(examined, setting, log, examples)
    except (UserError, TrainingFailed) as error:
        if teachers_of(config) != teachers_of(run.config):
            raise
        unexamined = (NotExamined("networks and views", str(error)),)
        return Evidence(setting, log, not_examined=unexamined)


def measure_log(stored: StoredRun, workdir: Workdir) -> Evidence:
    """What is known of a run that has no checkpoint yet. Raises `UserError` if it logged nothing.

    A run may have failed so early.
    """
    setting = setting_of(stored, workdir, 0, False)
    log = log_of(read_history(workdir.path), stored.config.batch_size)
    if not setting.failure and not len(log.step):
        raise UserError(f"the run in {workdir.path} has no checkpoint yet; train it first")
    unexamined = (NotExamined("networks and views", "the run has no checkpoint yet"),)
    return Evidence(setting, log, not_examined=unexamined)


def _probed(examined: Examined, setting: Setting, log: Log, examples: int) -> Evidence:
    probe_training, probe_central = training_probe(examined), central_probe(examined)
    rows: list[Found] = []
    central: list[Found] = []
    example_ids: list[np.ndarray] = []
    total = examined.run.resolved.total_steps
    has_logits = examined.teachers_have_heads
    recomputed = _recomputed(examined, examples) if has_logits else None
    newest = jnp.int32(min(examined.run.step, total) - 1)
    for step, ids, batch in examined.batches(examined.steps(examples)):
        measured = probe_training(
            examined.evaluated, examined.trained, examined.terms, examined.frozen, batch,
            examined.root, jnp.int32(step), newest,
        )  # fmt: skip
        rows.append(_on_host(measured))
        if has_logits:
            crop_logits = probe_central(examined.evaluated, recomputed, examined.frozen, batch)
            central.append(_on_host(crop_logits | {"label": batch.labels}))
        example_ids.append(ids)
    places = np.concatenate(example_ids)
    central_view = _central(examined, central, places, setting) if central else None
    return Evidence(
        setting=setting,
        log=log,
        central=central_view,
        training=_training(rows) if "teacher_class" in rows[0] else None,
        batch_norm=_batch_norm(examined, rows),
        gradients=_gradients(examined, rows),
        cka=_cka(examined, rows),
        not_examined=tuple(left_out(examined, rows[0].keys(), central_view)),
    )


def _recomputed(examined: Examined, examples: int) -> Variables | None:
    """The student with BatchNorm's moments of central crops; None where it has no BatchNorm."""
    config, student = examined.config, examined.evaluated
    if not jax.tree.leaves(student.statistics):
        return None
    batches = sampled_batches(examined.reader, config.seed, config.batch_size, examples)
    crop = CentralCrop.of(config.views)
    return with_central_statistics(examined.student, student, batches, crop, examined.layout)


def _on_host(found: Mapping[str, Any]) -> Found:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(dict(found)))


def _joined(rows: Iterable[Found], name: str) -> np.ndarray:
    return np.concatenate([x[name] for x in rows])


def _training(rows: list[Found]) -> TrainingView:
    mean = np.mean([x["teacher_probabilities"] for x in rows], axis=0)
    # Entropy of the mean less the mean of the entropies.
    entropy_of_mean = -(mean * np.log(np.maximum(mean, 1e-30))).sum()
    entropy_one = _joined(rows, "teacher_entropy_one")
    return TrainingView(
        same_class=_joined(rows, "same_class") > 0,
        kl_nats=_joined(rows, "kl_nats"),
        views_kl_nats=_joined(rows, "views_kl_nats") if "views_kl_nats" in rows[0] else None,
        label=_joined(rows, "label").astype(int),
        teacher_class=_joined(rows, "teacher_class").astype(int),
        teacher_entropy=_joined(rows, "teacher_entropy"),
        teacher_entropy_one=entropy_one,
        information_nats=float(entropy_of_mean - entropy_one.mean() * np.log(len(mean))),
        classes=len(mean),
    )


def aim_of(
    teachers: Sequence[np.ndarray], objective: ObjectiveConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all teachers as one, (examples, classes), and the classes of the first target."""
    outputs = tuple(map(jnp.asarray, teachers))
    as_logits = as_one(outputs, objective.ensemble, objective.temperature)
    first_target = combine(outputs, objective.ensemble, objective.temperature)[0]
    return np.asarray(as_logits, np.float64), np.asarray(first_target).argmax(-1)


def _central(
    examined: Examined, rows: list[Found], examples: np.ndarray, setting: Setting
) -> CentralView:
    branches = (examined.student, *examined.teachers)
    # The steps of a small data set show an image several times; its central crop is the same.
    first = np.sort(np.unique(examples, return_index=True)[1])
    label = _joined(rows, "label")[first].astype(int)
    configured_keys = [f"{i} {x.input_spec.input_range}" for i, x in enumerate(branches)]
    student, *teachers = (_joined(rows, x)[first] for x in configured_keys)
    target, target_class = aim_of(teachers, examined.config.objective)
    names = ["teacher", *(f"teacher {i}" for i in range(2, len(teachers) + 1))]
    options = [x.option for x in teachers_of(examined.config)]
    labelled = label >= 0
    ranges = []
    for i, branch in enumerate(branches):
        logits = {x: _joined(rows, f"{i} {x}")[first] for x in ranges_to_try(branch)}
        configured = branch.input_spec.input_range
        if i == 0:
            correct = {x: y.argmax(-1) == target.argmax(-1) for x, y in logits.items()}
            distance = {x: kl(target, y) for x, y in logits.items()}
            ranges.append(InRanges("student", "student", configured, "teacher", correct, distance))
        elif labelled.any():
            correct = {x: (y.argmax(-1) == label)[labelled] for x, y in logits.items()}
            distance = {x: cross_entropy(y[labelled], label[labelled]) for x, y in logits.items()}
            option = f"{options[i - 1]}.network"
            ranges.append(InRanges(names[i - 1], option, configured, "label", correct, distance))
    return CentralView(
        example=examples[first],
        label=label,
        classes=examined.run.classes,
        teacher_class=tuple(x.argmax(-1) for x in teachers),
        target_class=target_class,
        kl_nats=kl(target, student, setting.temperature),
        ranges=tuple(ranges),
        central_statistics_kl_nats=kl(target, _joined(rows, RECOMPUTED)[first], setting.temperature)
        if RECOMPUTED in rows[0]
        else None,
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """KL(teacher || student) of logits in float64, nats, an entry an example."""
    teacher_logp, student_logp = (log_softmax(x / temperature) for x in (teacher, student))
    return (np.exp(teacher_logp) * (teacher_logp - student_logp)).sum(axis=-1)


def cross_entropy(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    return -log_softmax(logits)[np.arange(len(label)), label]


def _batch_norm(examined: Examined, rows: list[Found]) -> BatchNorm | None:
    if "moments" not in rows[0]:
        return None
    running = jax.tree.map(np.asarray, jax.device_get(examined.evaluated.statistics))
    batches = jax.tree.map(lambda *x: np.mean(x, axis=0), *(x["moments"] for x in rows))
    by_layer: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(running), jax.tree.leaves(batches), strict=True)
    for (path, running_value), batch_value in pairs:
        *layer, moment = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        by_layer.setdefault("/".join(layer), {})[moment] = (running_value, batch_value)
    layers = {x: y for x, y in by_layer.items() if {"mean", "var"} <= y.keys()}

    def shift(mean: tuple[np.ndarray, np.ndarray], var: tuple[np.ndarray, np.ndarray]) -> float:
        return float((np.abs(mean[1] - mean[0]) / np.sqrt(var[1] + EPSILON)).mean())

    def spread(var: tuple[np.ndarray, np.ndarray]) -> float:
        running_value, batch_value = (np.maximum(x, 0) + EPSILON for x in var)
        return float(np.abs(np.log(batch_value / running_value)).mean())

    return BatchNorm(
        shift={x: shift(y["mean"], y["var"]) for x, y in layers.items()},
        spread={x: spread(y["var"]) for x, y in layers.items()},
        kl_kept_nats=float(_joined(rows, "kl_nats").mean()),
        kl_batch_nats=float(_joined(rows, "kl_batch_nats").mean()),
    )


def _gradients(examined: Examined, rows: list[Found]) -> Gradients:
    products = np.stack([x["products"] for x in rows])
    norms = np.sqrt(np.maximum(products.diagonal(axis1=1, axis2=2), 0))
    mean = products.mean(axis=0)
    size = np.sqrt(np.outer(mean.diagonal(), mean.diagonal()))
    return Gradients(
        terms=tuple(x.name for x in make_terms(examined.config.objective)),
        norms=norms,
        cosines=np.where(size > 0, mean / np.where(size > 0, size, 1), 0.0),
        parameter_norm=float(optax.global_norm(examined.trained.params)),
        initial_norm=_initial_norm(examined),
    )


def _initial_norm(examined: Examined) -> float | None:
    student = examined.config.student
    if student.weights:
        return None

    def norm(key: PRNGKeyArray) -> Array:
        return optax.global_norm(examined.student.network.init(key).params)

    return float(jax.jit(norm)(run_keys(examined.config.seed, student.seed).init))


def _cka(examined: Examined, rows: list[Found]) -> Cka | None:
    if "cka" not in rows[0]:
        return None
    sums = {x: np.sum([row["cka"][x] for row in rows], axis=0) for x in rows[0]["cka"]}
    return Cka(
        student=taps_of(examined.student),
        teacher=taps_of(examined.teachers[0]),
        values=ratio(sums["between"], sums["student"], sums["teacher"]),
        examples=len(rows) * examined.config.batch_size,
    )
