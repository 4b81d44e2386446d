"""Causes that show in the log, in settings and in gradients: rates, length, terms, feeding."""

import dataclasses

import numpy as np

from fm_distill.diagnosis.evidence import Evidence, Log
from fm_distill.diagnosis.finding import CLEAR, LIKELY, POSSIBLE, Finding
from fm_distill.training.reporter import MOST_WAIT

# Lines of the log below which a curve is not judged.
FEWEST_LINES = 20
# The level of the start is the mean of the first lines, of this share and no fewer than three.
START_SHARE = 0.04
# The last lines, over which a level is the mean.
END_SHARE = 1 / 6
# "Substantial": at least half of the highest learning rate so far.
HIGH_RATE = 0.5
# Of the loss at the start: what is above has not learned.
NOT_LEARNED = 0.9
LITTLE_LEARNED = 0.7
# The sum of the update norms over the norm of the parameters: the digits reach 1 in 200 steps;
# below 0.05, the student is still where it started.
NEAR_START = 0.05
# The largest update norm over the norm of the parameters at the start: for the digits' student,
# Adam at a good rate has 0.02.
LONGEST_UPDATE = 0.1
# A later level over an earlier one that is no fluctuation: levels are means of five lines or more,
# and the step between them has to be five of its standard errors.
SPIKE = 1.5
SPIKE_ERRORS = 5.0
LINES_A_LEVEL = 5
LONGEST_WARMUP = 1 / 3
# Of the loss at the start: above, the student is far from its teacher, and very far.
FAR_FROM_TEACHER = 0.25
VERY_FAR = 0.4
# Of the examples: a student that agrees so often can do it.
NEAR_AGREEMENT = 0.8
# The fall of the loss from a step to the double of it: a run that still learns has twice as much
# and more, a student of two channels on the digits half. With two standard errors, a little more.
FLAT_FALL = 0.08
SURELY_FLAT = 0.12
STILL_FALLING = 0.1
# By the end of the schedule, where the rate falls, a run at its limit gains less than this.
ANNEALING_FALL = 0.15
DOMINANT = 0.95
# Lines of the log with a gradient of exactly zero that are no accident.
FEWEST_OF_ADAPTER = 3


@dataclasses.dataclass(frozen=True)
class Fall:
    """The share of the loss that is gone when the steps have doubled, with its standard error."""

    share: float
    error: float


def start_level(log: Log) -> float:
    """The loss before anything was learned."""
    lines = max(3, round(START_SHARE * len(log.loss)))
    return float(np.nanmean(log.loss[:lines]))


def end_level(log: Log) -> float:
    """The loss over the last sixth of what was done."""
    return float(np.nanmean(log.loss[-max(3, round(END_SHARE * len(log.loss))) :]))


def at_high_rate(log: Log) -> np.ndarray:
    """Which lines have a substantial learning rate, warm-up left out."""
    high = log.learning_rate >= HIGH_RATE * np.nanmax(log.learning_rate)
    return high & np.isfinite(log.loss) & (log.step > log.step[-1] / 8)


def fall_at_high_rate(log: Log) -> Fall | None:
    """A line of the log of the loss over the log of the steps; None where it cannot be drawn."""
    selected = at_high_rate(log) & (log.loss > 0)
    if selected.sum() < FEWEST_LINES / 2:
        return None
    x, y = np.log2(log.step[selected]), np.log(log.loss[selected])
    centred = x - x.mean()
    if not (width := (centred**2).sum()):
        return None
    slope = (centred * y).sum() / width
    residuals = y - y.mean() - slope * centred
    error = ((residuals**2).sum() / (len(x) - 2) / width) ** 0.5
    return Fall(float(1 - np.exp(slope)), float(error))


def path_over_norm(evidence: Evidence) -> float | None:
    """The norms of all updates summed, over the norm of the parameters."""
    log, gradients = evidence.log, evidence.gradients
    if gradients is None or not gradients.parameter_norm:
        return None
    mean = np.nanmean(log.update_norm) if len(log.update_norm) else np.nan
    return float(mean * evidence.setting.step / gradients.parameter_norm)


def why_not_readable(evidence: Evidence) -> str | None:
    """Why the curve of the loss cannot be judged; None where it can."""
    finite = int(np.isfinite(evidence.log.loss).sum())
    if finite < FEWEST_LINES:
        return f"{FEWEST_LINES} lines of the log are needed (log.every_steps), and it has {finite}"
    if not evidence.setting.comparable:
        return "views or terms follow a schedule, so that losses cannot be compared over the run"
    return None


def _readable(evidence: Evidence) -> bool:
    return why_not_readable(evidence) is None


def learning_rate_too_high(evidence: Evidence) -> Finding | None:
    """The run diverged, jumped, or went far without learning."""
    setting, log = evidence.setting, evidence.log
    advice = "divide optimizer.learning_rate by 3 to 10; keep optimizer.clip_norm"
    if "finite" in setting.failure or setting.rollbacks:
        reason = f"it went back {setting.rollbacks} times" if setting.rollbacks else setting.failure
        return Finding(CLEAR, f"the run diverged: {reason}", advice)
    if not _readable(evidence):
        return None
    start, longest = start_level(log), _longest_update(evidence)
    if (jump := _jump(log, LITTLE_LEARNED * start)) is not None:
        return Finding(
            CLEAR,
            f"the loss rose from {jump[0]:.3g} to {jump[1]:.3g}, and was {start:.3g} at the start",
            advice,
        )
    plateau = np.nanmean(log.loss[at_high_rate(log)])
    if plateau > NOT_LEARNED * start and longest is not None and longest > LONGEST_UPDATE:
        return Finding(
            LIKELY,
            f"the loss is {plateau:.3g} while the learning rate is high, and was {start:.3g} at "
            f"the start; the norm of the largest update is {longest:.2g} times that of the "
            "initial parameters",
            advice,
        )
    return None


def _jump(log: Log, least: float) -> tuple[float, float] | None:
    """The lowest level of the loss and a later one that is surely higher, and above `least`."""
    parts = np.array_split(log.loss[np.isfinite(log.loss)], min(12, len(log.loss) // LINES_A_LEVEL))
    levels = [float(x.mean()) for x in parts]
    errors = [float(x.std(ddof=1) / len(x) ** 0.5) for x in parts]
    for later in range(1, len(parts)):
        lowest = int(np.argmin(levels[:later]))
        error = (errors[lowest] ** 2 + errors[later] ** 2) ** 0.5
        rise = levels[later] - levels[lowest]
        if levels[later] > max(SPIKE * levels[lowest], least) and rise > SPIKE_ERRORS * error:
            return levels[lowest], levels[later]
    return None


def _longest_update(evidence: Evidence) -> float | None:
    """Over the norm of the parameters at the start."""
    gradients, norms = evidence.gradients, evidence.log.update_norm
    if gradients is None or not gradients.initial_norm or not np.isfinite(norms).any():
        return None
    return float(np.nanmax(norms) / gradients.initial_norm)


def learning_rate_too_low(evidence: Evidence) -> Finding | None:
    """The student is still where it started."""
    path = path_over_norm(evidence)
    if not _readable(evidence) or path is None or path > NEAR_START:
        return None
    start, end = start_level(evidence.log), end_level(evidence.log)
    if end < LITTLE_LEARNED * start:
        return None
    return Finding(
        LIKELY,
        f"the loss went from {start:.3g} to {end:.3g}, and the norms of the updates over "
        f"{evidence.setting.step:,} steps sum to {path:.2g} times the parameters' norm, while the "
        f"gradient's norm stays near {np.nanmedian(evidence.log.gradient_norm):.2g}",
        "multiply optimizer.learning_rate by 10",
    )


def warmup_too_long(evidence: Evidence) -> Finding | None:
    """More than a third of the run is its warm-up."""
    setting = evidence.setting
    share = setting.warmup_steps / max(setting.total_steps, 1)
    if share <= LONGEST_WARMUP:
        return None
    return Finding(
        LIKELY,
        f"the warm-up of {setting.warmup_steps:,} steps is {share:.0%} of the run of "
        f"{setting.total_steps:,}",
        "shorten schedule.warmup_steps to a tenth of the run or less",
    )


def _share_left(evidence: Evidence) -> float:
    """The loss at the end over the one at the start."""
    return end_level(evidence.log) / max(start_level(evidence.log), float(np.finfo(float).tiny))


def capacity_reached(evidence: Evidence) -> Finding | None:
    """The distance is large and no longer falls, at a rate at which it could."""
    if not _readable(evidence):
        return None
    log, training = evidence.log, evidence.training
    share, fall, path = _share_left(evidence), fall_at_high_rate(log), path_over_norm(evidence)
    if training is not None and training.same_class.mean() >= NEAR_AGREEMENT:
        return None
    if fall is None or path is None or path < NEAR_START:
        return None
    if not FAR_FROM_TEACHER < share < NOT_LEARNED:
        return None
    # Surely flat: a noisy curve proves nothing.
    if fall.share + 2 * fall.error > SURELY_FLAT or fall.share > FLAT_FALL:
        return None
    annealing_fall = 1 - end_level(log) / np.nanmean(log.loss[at_high_rate(log)])
    if annealing_fall > ANNEALING_FALL:
        return None
    return Finding(
        POSSIBLE,
        "while the learning rate was at least half of its peak, the loss on the training view "
        f"fell by {fall.share:.1%} ± {fall.error:.1%} each time the number of steps doubled, and "
        f"it stays at {share:.0%} of its initial value",
        "use a larger student, or views that are easier to match; more steps will not help",
    )


def too_little_patience(evidence: Evidence) -> Finding | None:
    """The run ended while the distance was large and falling."""
    setting = evidence.setting
    if not (setting.complete and _readable(evidence)):
        return None
    share, fall = _share_left(evidence), fall_at_high_rate(evidence.log)
    if fall is None or not VERY_FAR < share < NOT_LEARNED:
        return None
    if fall.share - 2 * fall.error < STILL_FALLING:
        return None
    return Finding(
        POSSIBLE,
        "while the learning rate was at least half of its peak, the loss fell by "
        f"{fall.share:.0%} ± {fall.error:.0%} each time the number of steps doubled, and the run "
        f"of {setting.total_steps:,} steps ended at {share:.0%} of its initial value",
        f"train longer: --steps {3 * setting.total_steps} in another workdir",
    )


def dominant_term(evidence: Evidence) -> Finding | None:
    """One term of several makes the whole gradient."""
    gradients = evidence.gradients
    if gradients is None or len(gradients.terms) < 2:
        return None
    shares = gradients.shares
    first = int(shares.argmax())
    if shares[first] <= DOMINANT:
        return None
    name = gradients.terms[first]
    others = [f"{x} {y:.1%}" for x, y in zip(gradients.terms, shares, strict=True) if x != name]
    return Finding(
        LIKELY,
        f"the gradient of {name} is {shares[first]:.1%} of the sum of the terms' gradient norms; "
        f"the others are {', '.join(others)}",
        f"lower the weight of {name}, or raise those of the others, until each has a tenth or more",
    )


def dead_adapter(evidence: Evidence) -> Finding | None:
    """An adapter has had no gradient in the later half of the lines in which its term counted."""
    log = evidence.log
    for name, norms in log.adapter_gradients.items():
        active = np.isfinite(norms) & (log.terms.get(name, np.ones(len(norms))) != 0)
        recent = norms[active][active.sum() // 2 :]
        if len(recent) >= FEWEST_OF_ADAPTER and not recent.any():
            return Finding(
                CLEAR,
                f"the gradient of the adapter of the term {name} is zero in the last "
                f"{len(recent):,} lines of the log: the student's feature is zero everywhere",
                f"let the term {name} read another student_tap, or lower "
                "optimizer.learning_rate, which may have killed the activations",
            )
    return None


def input_bound(evidence: Evidence) -> Finding | None:
    """The steps wait for their batches."""
    log = evidence.log
    # The first lines have the time of the compiler in them.
    later = np.arange(len(log.step)) >= len(log.step) // 4
    valid = later & np.isfinite(log.data_wait) & np.isfinite(log.seconds)
    if valid.sum() < 3:
        return None
    # By time: batches come in pairs, and every other line has waited for both.
    wait = float((log.data_wait * log.seconds)[valid].sum() / log.seconds[valid].sum())
    if wait <= MOST_WAIT:
        return None
    return Finding(
        LIKELY,
        f"the steps spent {wait:.0%} of the time waiting for their batches",
        "keep the data in device memory (--data.feeding resident), raise data.workers, store "
        "smaller images, or use a smaller canvas",
    )
