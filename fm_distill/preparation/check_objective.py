"""The checks of `objective`: its terms, their schedules, and what they need of the data."""

import itertools
from collections.abc import Iterator

from fm_distill.config import (
    BankConfig,
    Config,
    CurveConfig,
    ExampleWeightsConfig,
    ObjectiveConfig,
)
from fm_distill.config.objective import (
    BANK_SIMILARITY,
    BY_CLASS,
    BY_DIFFICULTY,
    LABELS,
    terms_of,
)
from fm_distill.config.teachers import recording_of, teachers_of
from fm_distill.objectives.distances import (
    BATCH_DISTANCES,
    DISTANCES,
    LABELLED_DISTANCES,
    WITHOUT_TEMPERATURE,
)
from fm_distill.objectives.features import ADAPTED, OF_FEATURES, OF_MAPS, OVER_BATCH
from fm_distill.objectives.terms import needs_labels
from fm_distill.system.references import not_an_entry

KINDS = dict.fromkeys(
    (LABELS, *DISTANCES, *BATCH_DISTANCES, *LABELLED_DISTANCES, *sorted(OF_FEATURES))
)

# The bank has two temperatures of its own, and a sentence of its own.
NO_TEMPERATURE = {LABELS, *WITHOUT_TEMPERATURE, *OF_FEATURES} - {BANK_SIMILARITY}


def wrong_objective(config: Config) -> Iterator[str]:
    """A sentence for each thing that is wrong, with what to change."""
    objective = config.objective
    unknown_kinds = [*not_an_entry(DISTANCES, objective.distance, "objective.distance")]
    unknown_kinds += [
        sentence
        for i, term in enumerate(objective.terms)
        for sentence in not_an_entry(KINDS, term.kind, f"objective.terms.{i}.kind")
    ]
    yield from unknown_kinds
    if objective.terms and (objective.target, objective.distance) != ("teacher", "kl"):
        yield (
            f"objective.terms are the whole loss, and objective.target={objective.target}, "
            f"objective.distance={objective.distance} would define another one; leave those out, "
            "and give each as a term"
        )
    curve_problems = [
        sentence for option, curve in _curves(objective) for sentence in _wrong_curve(option, curve)
    ]
    yield from curve_problems
    name_problems = [*_wrong_feature_names(objective)]
    yield from name_problems
    if not unknown_kinds and not curve_problems and not name_problems:
        yield from _wrong_weights(objective)
    if any(factor <= 0 for _, factor in objective.temperature_schedule.points):
        yield (
            "objective.temperature_schedule: got a factor of 0 or less; expected more than 0 at "
            "each point"
        )
    yield from _wrong_temperatures(config)
    yield from _wrong_labels(config)
    yield from _wrong_features(config)
    rate = config.optimizer.adapter_learning_rate
    if rate is not None and not any(
        x.kind in ADAPTED and x.adapter != "none" for x in objective.terms
    ):
        yield (
            f"optimizer.adapter_learning_rate={rate:g} is for adapters, and no term of "
            "objective.terms has one; leave it out"
        )
    yield from _wrong_example_weights(config)
    batch_kinds = OVER_BATCH | BATCH_DISTANCES.keys()
    batch_terms = [x.kind for x in terms_of(objective) if x.kind in batch_kinds]
    batch_terms += [
        f"{x.kind} with adapter=batch_norm"
        for x in objective.terms
        if x.kind in ADAPTED and x.adapter == "batch_norm"
    ]
    if batch_terms and config.memory.accumulate > 1:
        yield (
            f"the term {batch_terms[0]} compares the examples of a batch with each other, and "
            f"memory.accumulate={config.memory.accumulate} computes parts of it; use 1"
        )


def _curves(objective: ObjectiveConfig) -> Iterator[tuple[str, CurveConfig]]:
    yield "objective.temperature_schedule", objective.temperature_schedule
    for i, term in enumerate(objective.terms):
        yield f"objective.terms.{i}.schedule", term.schedule


def _wrong_curve(option: str, curve: CurveConfig) -> Iterator[str]:
    shares = [share for share, _ in curve.points]
    if any(not 0 <= share <= 1 for share in shares):
        written = ", ".join(f"{x:g}" for x in shares)
        yield (
            f"{option}.points are at {written} of the run; expected 0 to 1, as the run never "
            "reaches points after its end"
        )
    elif any(a >= b for a, b in itertools.pairwise(shares)):
        yield f"{option}.points: the shares of the run must increase; got {shares}"
    if any(not 0 <= factor < float("inf") for _, factor in curve.points):
        yield f"{option}.points: expected factors of 0 or more; got {[y for _, y in curve.points]}"
    if not curve.points and curve.interpolation != "linear":
        yield f"{option}.interpolation={curve.interpolation} needs {option}.points"


def _wrong_weights(objective: ObjectiveConfig) -> Iterator[str]:
    """Where all weights are zero, the student learns nothing."""
    terms = terms_of(objective)
    shares = sorted({0.0, 1.0, *(x for term in terms for x, _ in term.schedule.points)})
    for start, end in itertools.pairwise(shares):
        middle = (start + end) / 2
        if not any(x.weight and _is_above_zero(x.schedule, middle) for x in terms):
            yield (
                f"the weights of objective.terms sum to zero from {start:g} to {end:g} of the run; "
                "give one term a weight there"
            )


def _is_above_zero(curve: CurveConfig, share: float) -> bool:
    """Whether the factor is, between two points. Without JAX: a plan must start no backend here."""
    if not curve.points:
        return True
    earlier = [factor for position, factor in curve.points if position <= share] or [
        curve.points[0][1]
    ]
    later = [factor for position, factor in curve.points if position > share] or [
        curve.points[-1][1]
    ]
    return earlier[-1] > 0 or (curve.interpolation != "step" and later[0] > 0)


def _wrong_feature_names(objective: ObjectiveConfig) -> Iterator[str]:
    for i, term in enumerate(objective.terms):
        names = (term.student_tap, term.teacher_tap)
        option = f"objective.terms.{i}"
        if term.kind in OF_FEATURES and not all(names):
            yield (
                f"{option}.kind={term.kind} compares features: give {option}.student_tap and "
                f"{option}.teacher_tap (`fm-distill show --taps` lists them)"
            )
        if term.kind not in OF_FEATURES and any(names):
            yield (
                f"{option}.kind={term.kind} compares outputs, and reads no features: leave out "
                f"{option}.student_tap and {option}.teacher_tap"
            )
        if term.kind not in OF_FEATURES and term.pool != "none":
            yield (
                f"{option}.kind={term.kind} compares outputs, which have no positions: leave out "
                f"{option}.pool={term.pool}"
            )
        if term.kind in OF_MAPS and term.pool != "none":
            yield (
                f"{option}.kind={term.kind} compares positions, and {option}.pool={term.pool} "
                "leaves none: leave it out, or use another kind"
            )
        if term.kind not in ADAPTED and term.adapter != "convolution":
            yield (
                f"{option}.kind={term.kind} takes no adapter: leave out "
                f"{option}.adapter={term.adapter}"
            )
        if term.kind != BANK_SIMILARITY and term.bank != BankConfig():
            yield (
                f"{option}.kind={term.kind} has no bank: leave out {option}.bank, or use "
                f"{BANK_SIMILARITY}"
            )
        if term.kind == BANK_SIMILARITY and term.temperature is not None:
            yield (
                f"{option}.kind={term.kind} divides by {option}.bank.student_temperature and "
                f"{option}.bank.teacher_temperature: leave out {option}.temperature"
            )


def _wrong_features(config: Config) -> Iterator[str]:
    """Features are those of one teacher, which runs in the step or was recorded with them."""
    kinds = [x.kind for x in config.objective.terms if x.kind in OF_FEATURES]
    if not kinds:
        return
    map_kinds = [x for x in kinds if x in OF_MAPS]
    if map_kinds and recording_of(config) is not None:
        yield (
            f"the term {map_kinds[0]} compares maps, and teacher.recording holds logits and, of "
            "`fm-distill record --taps`, features averaged over their positions; leave out one "
            "of them"
        )
    if any(teacher.function for _, teacher in teachers_of(config)):
        yield (
            f"the term {kinds[0]} reads the teacher's features, and teacher.function returns only "
            "logits; leave out one of them"
        )
    if config.teaching == "fixed":
        yield (
            f"the term {kinds[0]} reads the teacher's features of each view, and teaching=fixed "
            "keeps only its logits; use another teaching"
        )
    if config.more_teachers:
        yield (
            f"the term {kinds[0]} reads the features of one teacher, and there are more_teachers; "
            "leave out one of them"
        )


def _wrong_temperatures(config: Config) -> Iterator[str]:
    """The mean of probabilities is taken at one temperature, before the terms."""
    objective = config.objective
    for i, term in enumerate(objective.terms):
        if term.temperature is not None and term.kind in NO_TEMPERATURE:
            yield (
                f"objective.terms.{i}.kind={term.kind} has no temperature: leave out "
                f"objective.terms.{i}.temperature={term.temperature:g}"
            )
    term_temperatures = {x.temperature for x in objective.terms if x.temperature is not None}
    if objective.ensemble != "mean_probabilities" or not config.more_teachers:
        return
    if objective.temperature_schedule.points or term_temperatures - {objective.temperature}:
        yield (
            "objective.ensemble=mean_probabilities takes the mean at objective.temperature, and "
            "there are other temperatures; use mean_logits or sum_of_distances"
        )


def _wrong_example_weights(config: Config) -> Iterator[str]:
    objective, data = config.objective, config.data
    weights = objective.example_weights
    option = f"objective.example_weights.kind={weights.kind}"
    if weights.kind != "effective_number" and weights.beta != ExampleWeightsConfig().beta:
        yield (
            f"objective.example_weights.beta={weights.beta:g} belongs to kind=effective_number, "
            f"and {option}; leave it out"
        )
    if weights.kind in BY_CLASS:
        if data.transfer:
            yield (
                f"data.transfer has images without labels, and {option} needs labels: train on "
                "data.train, or weight by teacher_entropy or teacher_distance"
            )
        if data.source == "images":
            yield (
                f"{option} needs labels, and data.source=images has none; use class_folders, or "
                "weight by teacher_entropy or teacher_distance"
            )
    if weights.kind in BY_DIFFICULTY:
        if objective.target == "labels":
            yield (
                f"{option} needs the teacher, and objective.target=labels has none; weight by "
                "class, or use objective.target=teacher"
            )
        if config.memory.accumulate > 1:
            yield (
                f"{option} divides by the mean over the batch, and memory.accumulate="
                f"{config.memory.accumulate} computes parts of it; use 1"
            )


def _wrong_labels(config: Config) -> Iterator[str]:
    objective, data = config.objective, config.data
    if objective.target == "teacher" and objective.label_smoothing:
        yield (
            "objective.label_smoothing needs objective.target=labels: a teacher's output is not "
            "smoothed; use a higher objective.temperature"
        )
    if not needs_labels(objective):
        return
    if objective.terms:
        kind = next(x.kind for x in objective.terms if x.kind in {LABELS, *LABELLED_DISTANCES})
        subject, remedy = f"the term {kind}", "leave it out"
    else:
        subject, remedy = "objective.target=labels", "use objective.target=teacher"
    if data.transfer:
        yield (
            f"data.transfer has images without labels, and {subject} needs labels: train on "
            f"data.train, or {remedy}"
        )
    if data.source == "images":
        yield (
            f"{subject} needs labels, and data.source=images has none; use class_folders, or "
            f"{remedy}"
        )
