"""The causes by name. To add one: a rule, a pure function of `Evidence`, and a line here."""

import dataclasses

from fm_distill.diagnosis import curve_rules, data_rules
from fm_distill.diagnosis.evidence import Evidence
from fm_distill.diagnosis.finding import Rule

# Of equally strong findings the first one is named first: what is above causes what is below.
CAUSES: dict[str, Rule] = {
    "wrong-class-order": data_rules.wrong_class_order,
    "wrong-input-range": data_rules.wrong_input_range,
    "views-differ": data_rules.views_differ,
    "saturated-gradient": data_rules.saturated_gradient,
    "weak-teacher-on-training-view": data_rules.weak_teacher,
    "dead-adapter": curve_rules.dead_adapter,
    "batch-norm-drift": data_rules.batch_norm_drift,
    "statistics-of-training-views": data_rules.statistics_of_training_views,
    "learning-rate-too-high": curve_rules.learning_rate_too_high,
    "learning-rate-too-low": curve_rules.learning_rate_too_low,
    "warm-up-too-long": curve_rules.warmup_too_long,
    "dominant-term": curve_rules.dominant_term,
    "unmatchable-examples": data_rules.unmatchable_examples,
    "input-bound": curve_rules.input_bound,
    "capacity-reached": curve_rules.capacity_reached,
    "too-little-patience": curve_rules.too_little_patience,
}


@dataclasses.dataclass(frozen=True)
class Cause:
    """Something that is wrong with a run."""

    name: str
    evidence: str
    advice: str


def causes_of(evidence: Evidence) -> tuple[Cause, ...]:
    """What is wrong, the likeliest first; empty where all is well."""
    findings = [(name, x) for name, rule in CAUSES.items() if (x := rule(evidence)) is not None]
    findings.sort(key=lambda x: -x[1].strength)  # stable
    return tuple(Cause(name, x.evidence, x.advice) for name, x in findings)
