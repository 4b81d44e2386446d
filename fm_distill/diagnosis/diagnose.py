"""What is wrong with a run: the public function, and its result as JSON."""

import dataclasses
import math
import os
from typing import Any

import numpy as np

from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.config.serialization import refuse_other_config
from fm_distill.diagnosis.causes import Cause, causes_of
from fm_distill.diagnosis.curve_rules import why_not_readable
from fm_distill.diagnosis.evidence import Evidence, Log, NotExamined
from fm_distill.diagnosis.measure import measure, measure_log
from fm_distill.errors import UserError
from fm_distill.runs.integrity import steps_in
from fm_distill.runs.open_run import open_run
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import COMPILING, log

EXAMPLES = 1024  # of the newest steps, so many are looked at
PARTS = 6  # in which the log is summed up


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The causes, and all that was measured for them."""

    run: str
    causes: tuple[Cause, ...]  # the likeliest first; none where all is well
    evidence: Evidence


def diagnose(
    workdir: str | os.PathLike[str], config: Config | None = None, examples: int = EXAMPLES
) -> Diagnosis:
    """What is wrong with the run in `workdir`, complete or not, which is only read.

    `config` may name new places of data and teacher. What cannot be examined is left out and noted.
    Raises `UserError` where there is no run, or nothing that it did or has to match.
    """
    if examples < 1:
        raise UserError(f"examples is {examples}; expected 1 or more")
    run_workdir = Workdir(workdir)
    stored = run_workdir.stored()
    config = config or stored.config
    refuse_other_config(stored.config, config, f"the run in {workdir}")
    if regime_of(config).targets == "labels":
        raise UserError(
            f"the run in {workdir} learns from labels, without a teacher: diagnose examines how a "
            "student matches its teacher; look at such a run with `fm-distill report`"
        )
    refuse_code_of_run(stored, run_workdir.path, config=config)
    if steps_in(run_workdir.checkpoints):
        log(COMPILING)
        evidence = measure(open_run(workdir), config, examples)
    else:
        evidence = measure_log(stored, run_workdir)
    if (reason := why_not_readable(evidence)) is not None:
        unexamined = NotExamined("the curve of the loss", reason)
        evidence = dataclasses.replace(evidence, not_examined=(*evidence.not_examined, unexamined))
    return Diagnosis(str(workdir), causes_of(evidence), evidence)


def as_json(found: Diagnosis) -> dict[str, Any]:
    """What `fm-distill diagnose --json` prints; null where something is not known."""
    evidence = found.evidence
    setting, cka = evidence.setting, evidence.cka
    tree = {
        "run": found.run,
        "step": setting.step,
        "total_steps": setting.total_steps,
        "complete": setting.complete,
        "causes": [dataclasses.asdict(x) for x in found.causes],
        "cka": cka and {**vars(cka), "values": cka.values.tolist()},
        "gradients": _gradients(evidence),
        "over_the_run": over_the_run(evidence.log),
        "training_view": _training_view(evidence),
        "central_view": _central_view(evidence),
        "batch_norm": evidence.batch_norm and vars(evidence.batch_norm),
        "not_examined": [dataclasses.asdict(x) for x in evidence.not_examined],
    }
    return _finite(tree)


def _finite(tree: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(tree, dict):
        return {name: _finite(x) for name, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(x) for x in tree]
    if isinstance(tree, float):
        return float(tree) if math.isfinite(tree) else None
    return tree


def _gradients(evidence: Evidence) -> dict[str, Any] | None:
    """Norms of each term's gradient: mean over the batches, their deviation, share of the sum."""
    if (gradients := evidence.gradients) is None:
        return None
    mean, deviation = gradients.norms.mean(axis=0), gradients.deviation
    return {
        "terms": {
            name: {
                "norm": float(mean[i]),
                "deviation": None if deviation is None else float(deviation[i]),
                "share": float(gradients.shares[i]),
            }
            for i, name in enumerate(gradients.terms)
        },
        "cosines": {
            name: dict(zip(gradients.terms, gradients.cosines[i].tolist(), strict=True))
            for i, name in enumerate(gradients.terms)
        },
    }


def over_the_run(logged: Log) -> list[dict[str, Any]]:
    """Means over parts of the log; of a loss of several terms, the share of each and its deviation.

    Shares are of the weighted values; norms and cosines of the terms' gradients are there where
    the run logged them (`log.term_gradients`).
    """
    count = len(logged.step)
    total = sum((np.abs(x) for x in logged.terms.values()), np.zeros(count))
    parts = []
    for indices in np.array_split(np.arange(count), min(PARTS, count)) if count else []:
        shares = {name: np.abs(x)[indices] / total[indices] for name, x in logged.terms.items()}
        parts.append(
            {
                "last_step": int(logged.step[indices][-1]),
                "loss": _mean(logged.loss[indices]),
                "gradient_norm": _mean(logged.gradient_norm[indices]),
                "update_norm": _mean(logged.update_norm[indices]),
                "data_wait": _mean(logged.data_wait[indices]),
                "terms": {
                    name: {"share": _mean(x), "deviation": float(x.std())}
                    for name, x in shares.items()
                },
                "term_gradients": {x: _mean(y[indices]) for x, y in logged.term_gradients.items()},
                "term_cosines": {x: _mean(y[indices]) for x, y in logged.term_cosines.items()},
            }
        )
    return parts


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _training_view(evidence: Evidence) -> dict[str, Any] | None:
    if (view := evidence.training) is None:
        return None
    labelled = view.label >= 0
    views = view.views_kl_nats
    return {
        "examples": len(view.kl_nats),
        "agreement": float(view.same_class.mean()),
        "kl_nats": float(view.kl_nats.mean()),
        "kl_between_views_nats": None if views is None else float(views.mean()),
        "teacher_top1": _mean((view.label == view.teacher_class)[labelled].astype(float)),
        "teacher_entropy": float(view.teacher_entropy.mean()),
        "teacher_entropy_one": float(view.teacher_entropy_one.mean()),
        "teacher_information_nats": view.information_nats,
    }


def _central_view(evidence: Evidence) -> dict[str, Any] | None:
    if (view := evidence.central) is None:
        return None
    labelled = view.label >= 0
    return {
        "examples": len(view.kl_nats),
        "kl_nats": float(view.kl_nats.mean()),
        "teacher_top1": [
            _mean((view.label == x)[labelled].astype(float)) for x in view.teacher_class
        ],
        "input_ranges": {
            x.network: {
                "configured": x.configured,
                "compared_with": x.aim,
                "top1": {name: float(y.mean()) for name, y in x.right.items()},
                "distance_nats": {name: float(y.mean()) for name, y in x.distance_nats.items()},
            }
            for x in view.ranges
        },
    }
