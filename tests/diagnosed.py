"""A healthy run as `Evidence`, and one with each cause planted into its numbers."""

import dataclasses

import numpy as np

from fm_distill.diagnosis.evidence import (
    BatchNorm,
    CentralView,
    Evidence,
    Gradients,
    InRanges,
    Log,
    Setting,
    TrainingView,
)

LINES, EXAMPLES, CLASSES = 100, 1000, 10
TOTAL = 2000


def curve(level=0.1, first=2.0, halved_in=0.12, noise=0.15, seed=0) -> np.ndarray:
    """A loss that falls from `first` to `level`, with the noise of a coefficient a batch."""
    share = np.arange(1, LINES + 1) / LINES
    loss = level + (first - level) * 0.5 ** (share / halved_in)
    return loss * np.exp(noise * np.random.default_rng(seed).standard_normal(LINES))


def healthy(**changes) -> Evidence:
    """Of a complete run of 2,000 steps whose student is near its teacher."""
    rng = np.random.default_rng(1)
    share = np.arange(1, LINES + 1) / LINES
    rate = np.minimum(share / 0.1, 0.5 * (1 + np.cos(np.pi * np.clip((share - 0.1) / 0.9, 0, 1))))
    label = rng.integers(0, CLASSES, EXAMPLES)

    def right_for(fraction: float) -> np.ndarray:
        other = (label + rng.integers(1, CLASSES, EXAMPLES)) % CLASSES
        return np.where(rng.random(EXAMPLES) < fraction, label, other)

    central, mixed = right_for(0.95), right_for(0.6)
    kl = rng.exponential(0.05, EXAMPLES)
    evidence = Evidence(
        setting=Setting("function_matching", TOTAL, TOTAL, 100, 2.0, complete=True),
        log=Log(
            step=TOTAL * share,
            loss=curve(),
            learning_rate=3e-3 * rate,
            update_norm=0.05 * rate,
            gradient_norm=np.exp(0.3 * rng.standard_normal(LINES)),
            seconds=np.ones(LINES),
            data_wait=rng.uniform(0.0, 0.1, LINES),
            terms={},
        ),
        central=CentralView(
            example=np.arange(EXAMPLES),
            label=label,
            classes=CLASSES,
            teacher_class=(central,),
            target_class=central,
            kl_nats=kl,
            ranges=(
                ranges("student", "teacher", {"zero_one": 0.9, "imagenet": 0.7}),
                ranges("teacher", "label", {"zero_one": 0.95, "imagenet": 0.93}),
            ),
        ),
        training=TrainingView(
            same_class=rng.random(EXAMPLES) < 0.9,
            kl_nats=kl,
            views_kl_nats=np.zeros(EXAMPLES),
            label=label,
            teacher_class=mixed,
            teacher_entropy=rng.uniform(0.3, 0.9, EXAMPLES),
            teacher_entropy_one=rng.uniform(0.1, 0.7, EXAMPLES),
            information_nats=1.2,
            classes=CLASSES,
        ),
        batch_norm=BatchNorm({"norm": 0.1}, {"norm": 0.15}, 0.05, 0.048),
        gradients=Gradients(
            ("kl", "labels"), np.exp(rng.standard_normal((8, 2)) / 5), np.eye(2), 30.0, 20.0
        ),
    )
    return dataclasses.replace(evidence, **changes)


def ranges(network: str, aim: str, accuracy: dict[str, float]) -> InRanges:
    """Configured is `zero_one`; the same examples are right first."""
    order = np.random.default_rng(2).permutation(EXAMPLES) / EXAMPLES
    right = {name: order < share for name, share in accuracy.items()}
    return InRanges(
        network, network, "zero_one", aim, right, {x: 0.1 + 2.0 * ~y for x, y in right.items()}
    )


def by_chance() -> InRanges:
    """Of 50 examples, 21 are right with another range alone, and 19 with the configured one."""
    place = np.arange(50)
    right = {"zero_one": place < 19, "imagenet": (place >= 19) & (place < 40)}
    distance = {x: 0.1 + 2.0 * ~y for x, y in right.items()}
    return InRanges("teacher", "teacher", "zero_one", "label", right, distance)


def few_lines(count: int) -> Evidence:
    """A level that doubles once, within the noise of single lines."""
    names = ("step", "learning_rate", "update_norm", "gradient_norm", "seconds", "data_wait")
    log = {x: vars(healthy().log)[x][:count] for x in names}
    loss = np.tile([1.0, 1.0, 1.0, 1.0, 6.0], count // 5)
    loss[:5] = 1.2
    return within(healthy(), "log", loss=loss, **log)


def within(evidence: Evidence, part: str, **changes) -> Evidence:
    """`evidence` with fields of one of its parts replaced."""
    replaced = dataclasses.replace(vars(evidence)[part], **changes)
    return dataclasses.replace(evidence, **{part: replaced})


def _central(evidence: Evidence, **changes) -> Evidence:
    return within(evidence, "central", **changes)


def _log(**changes) -> Evidence:
    return within(healthy(), "log", **changes)


def _renamed() -> Evidence:
    central = healthy().central
    return _central(healthy(), teacher_class=((central.teacher_class[0] * 3 + 1) % CLASSES,))


def _foreign() -> Evidence:
    kl = healthy().central.kl_nats.copy()
    kl[::50] = 5.0
    return _central(healthy(), kl_nats=kl)


def _weak() -> Evidence:
    noise = np.random.default_rng(3).integers(0, CLASSES, EXAMPLES)
    return within(healthy(), "training", teacher_class=noise)


def _far(evidence: Evidence) -> Evidence:
    same = np.random.default_rng(4).random(EXAMPLES) < 0.5
    return within(evidence, "training", same_class=same)


def _power(exponent: float) -> np.ndarray:
    """A loss that falls by 1 - 2^-exponent from a step to the double of it, and is far at last."""
    share = np.arange(1, LINES + 1) / LINES
    noise = 0.08 * np.random.default_rng(5).standard_normal(LINES)
    return 2 * np.minimum(1, (20 * share) ** -exponent) * np.exp(noise)


def _jump() -> np.ndarray:
    loss = curve()
    loss[40:55] = 4.0
    return loss


PLANTED = {
    "wrong-class-order": _renamed(),
    "wrong-input-range": _central(
        healthy(), ranges=(ranges("teacher", "label", {"zero_one": 0.7, "imagenet": 0.9}),)
    ),
    "views-differ": within(healthy(), "training", views_kl_nats=np.full(EXAMPLES, 0.1)),
    "saturated-gradient": within(
        within(healthy(), "setting", temperature=200.0),
        "training",
        teacher_entropy=np.full(EXAMPLES, 0.9999),
    ),
    "weak-teacher-on-training-view": _weak(),
    "dead-adapter": _log(adapter_gradients={"hint": np.r_[1.0, np.zeros(LINES - 1)]}),
    "batch-norm-drift": healthy(
        batch_norm=BatchNorm({"a": 0.2, "b": 1.5}, {"a": 0.1, "b": 1.0}, 0.4, 0.05)
    ),
    "statistics-of-training-views": _central(
        healthy(), central_statistics_kl_nats=0.5 * healthy().central.kl_nats
    ),
    "learning-rate-too-high": _far(_log(loss=_jump())),
    "learning-rate-too-low": _far(_log(loss=curve(level=1.9), update_norm=np.full(LINES, 1e-5))),
    "warm-up-too-long": within(healthy(), "setting", warmup_steps=900),
    "dominant-term": within(healthy(), "gradients", norms=np.tile([1.0, 0.02], (8, 1))),
    "unmatchable-examples": _foreign(),
    # Every other line has waited for two batches, and has all of the time.
    "input-bound": _log(
        data_wait=np.tile([0.9, 0.02], LINES // 2), seconds=np.tile([1.0, 0.02], LINES // 2)
    ),
    "capacity-reached": _far(_log(loss=curve(level=1.0, halved_in=0.01, noise=0.05))),
    "too-little-patience": _far(_log(loss=_power(0.25))),
}
# A second way to the same cause.
NOTHING_LEARNED = _far(_log(loss=curve(level=2.0, first=2.0), update_norm=np.full(LINES, 5.0)))
# What is near to a cause and none, each with the cause that it is near to.
NEAR = {
    "another range is as good": ("wrong-input-range", _central(
        healthy(), ranges=(ranges("teacher", "label", {"zero_one": 0.9, "imagenet": 0.91}),)
    )),
    "another range is better by chance": ("wrong-input-range", _central(
        healthy(), ranges=(by_chance(),)
    )),
    "a teacher that confuses classes": ("wrong-class-order", _central(
        healthy(), teacher_class=(np.minimum(healthy().central.label, 6),)
    )),
    "views that hardly differ": ("views-differ", within(
        healthy(), "training", views_kl_nats=np.full(EXAMPLES, 0.01)
    )),
    "a temperature of ten": ("saturated-gradient", within(
        within(healthy(), "setting", temperature=10.0),
        "training", teacher_entropy=np.full(EXAMPLES, 0.99),
    )),
    "a sure teacher at temperature one": ("saturated-gradient", within(
        within(healthy(), "setting", temperature=1.0),
        "training", teacher_entropy=np.full(EXAMPLES, 0.01),
    )),
    "mixtures are hard": ("weak-teacher-on-training-view", within(
        healthy(), "training",
        teacher_class=(healthy().training.label + (np.arange(EXAMPLES) % 5 > 1)) % CLASSES,
    )),
    "an adapter whose term has no weight any more": ("dead-adapter", _log(
        terms={"hint": np.r_[np.ones(40), np.zeros(LINES - 40)]},
        adapter_gradients={"hint": np.r_[np.ones(40), np.zeros(LINES - 40)]},
    )),
    "moments of other batches": ("batch-norm-drift", healthy(
        batch_norm=BatchNorm({"a": 0.6}, {"a": 0.8}, 0.05, 0.049)
    )),
    "moments that make no difference": ("statistics-of-training-views", _central(
        healthy(), central_statistics_kl_nats=0.9 * healthy().central.kl_nats
    )),
    "moments that are still to come": ("statistics-of-training-views", within(
        PLANTED["statistics-of-training-views"], "setting",
        complete=False, ends_with_central_statistics=True,
    )),
    "moments that are meant for central crops": ("batch-norm-drift", within(
        PLANTED["batch-norm-drift"], "setting", ends_with_central_statistics=True
    )),
    "noise": ("learning-rate-too-high", _log(loss=curve(noise=0.35))),
    "few noisy lines": ("learning-rate-too-high", few_lines(30)),
    "a run too short to learn": ("learning-rate-too-high", _far(_log(loss=curve(level=2.0)))),
    "a run that has just begun": ("learning-rate-too-low", within(
        _log(loss=curve()[:8], step=np.arange(1.0, 9), learning_rate=np.linspace(0, 1e-3, 8),
             update_norm=np.full(8, 1e-5), gradient_norm=np.ones(8), data_wait=np.zeros(8),
             seconds=np.ones(8)),
        "setting", complete=False, step=8,
    )),
    "a warm-up of a quarter": ("warm-up-too-long", within(healthy(), "setting", warmup_steps=500)),
    "a term of a tenth": (
        "dominant-term", within(healthy(), "gradients", norms=np.tile([1.0, 0.1], (8, 1)))
    ),
    "few far ones among matched": ("unmatchable-examples", _central(
        healthy(), kl_nats=np.where(np.arange(EXAMPLES) % 50 == 0, 0.3, 0.001)
    )),
    "waiting a little": ("input-bound", _log(data_wait=np.full(LINES, 0.2))),
    "flat, and all is matched": (
        "capacity-reached", _log(loss=curve(level=1.0, halved_in=0.01, noise=0.05))
    ),
    "flat until the rate falls": ("capacity-reached", _far(_log(
        loss=np.where(np.arange(LINES) > 60, 0.6, 1.0) * curve(1.0, halved_in=0.01, noise=0.05)
    ))),
    "falling, and not at its end": ("too-little-patience", within(
        PLANTED["too-little-patience"], "setting", complete=False
    )),
    "falling, and near": ("too-little-patience", _far(_log(loss=curve(level=0.3, halved_in=0.3)))),
}  # fmt: skip
