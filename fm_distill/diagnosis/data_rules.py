"""Causes that show on the data: inputs, classes, views, BatchNorm, temperature, single examples."""

import numpy as np

from fm_distill.diagnosis.evidence import CentralView, Evidence, InRanges
from fm_distill.diagnosis.finding import CLEAR, LIKELY, MEASURED, Finding

# Another input range has to be better by so many standard errors of the paired difference, since
# the best of several is looked for; and by so many points, since less is not worth a change.
SURE_ERRORS = 3.0
LEAST_ACCURACY_GAIN = 0.02
# A class needs so many examples on average for its new place to be found on one half of them and
# checked on the other.
EXAMPLES_A_CLASS = 8
# A fifth of all examples right by renaming the classes alone: neither chance nor confusion.
LEAST_ORDER_GAIN = 0.2
# Of what the teacher knows of the central crop above chance; the digits' recipe, whose crops go
# down to 5 % of the image, mixed, leaves a half.
LEAST_SKILL_KEPT = 0.25
# Information in the teacher's class about the view, over log C; 0.5 for the digits' recipe.
LEAST_INFORMATION = 0.05
# Share of the teacher's output that is noise to a student that saw another view. Rounding
# makes less than a thousandth, mild crops of uniform images half a hundredth,
# and independent crops of the digits a quarter.
MOST_NOISE = 0.02
LEAST_NOISE_NATS = 0.005
# Moments of a long average differ from those of some batches by less: standard deviations of a
# channel, and log of the ratio of variances.
MOST_SHIFT = 0.5
MOST_SPREAD = 0.7
# By how much of the distance the kept moments are worse than the batch's own.
MOST_KEPT_LOSS = 0.25
LEAST_KEPT_NATS = 0.01
# Softened targets within 0.2 % of log C of the uniform ones: their gradients are lost in the noise.
MOST_ENTROPY = 0.998
# And within 2 % of it of one class.
LEAST_ENTROPY = 0.02
# The few: of twenty examples, one. In a healthy run, they have a fifth of the distance.
FEW = 0.05
MOST_OF_FEW = 0.5
LEAST_FEW_NATS = 0.02  # mean distance below which all examples are matched
FEWEST_EXAMPLES = 100  # of which one in twenty can be told
SHOWN_EXAMPLES = 5


def wrong_input_range(evidence: Evidence) -> Finding | None:
    """A network does better when its input is normalised in another way."""
    networks = evidence.central.ranges if evidence.central else ()
    found = [x for x in map(_better_range, networks) if x is not None]
    return max(found, key=lambda x: x.strength, default=None)


def _better_range(network: InRanges) -> Finding | None:
    own = network.configured
    right, distance = network.right[own], network.distance_nats[own]
    for name in sorted(network.right, key=lambda x: network.distance_nats[x].mean()):
        gain = network.right[name].astype(float) - right
        nearer = distance - network.distance_nats[name]
        if (
            name != own
            and gain.mean() >= LEAST_ACCURACY_GAIN
            and all(x.mean() > SURE_ERRORS * _error(x) for x in (gain, nearer))
        ):
            measured = "cross-entropy" if network.aim == "label" else "KL"
            return Finding(
                MEASURED,
                f"on the central crop of {len(right):,} training images the {network.network}'s "
                f"top-1 class is the {network.aim}'s for {right.mean():.1%} of them with "
                f"input_range={own}, and for {network.right[name].mean():.1%} with {name} "
                f"({measured} {distance.mean():.3g} and {network.distance_nats[name].mean():.3g} "
                "nats)",
                f"give --{network.option}.input-range {name}, as the {network.network}'s weights "
                "were trained, and train again",
            )
    return None


def _error(values: np.ndarray) -> float:
    """The standard error of the mean."""
    return float(values.std() / max(len(values), 1) ** 0.5)


def wrong_class_order(evidence: Evidence) -> Finding | None:
    """The teacher's classes are the labels' under other numbers."""
    central = evidence.central
    if central is None:
        return None
    known = central.label >= 0
    if known.sum() < EXAMPLES_A_CLASS * central.classes:
        return None
    label = central.label[known]
    for i, classes in enumerate(central.teacher_class):
        found = classes[known]
        before, after = (found == label).mean(), renamed_accuracy(found, label, central.classes)
        if after - before >= LEAST_ORDER_GAIN:
            who = "the teacher" if i == 0 else f"teacher {i + 1}"
            return Finding(
                MEASURED,
                f"{who}'s top-1 class is the label for {before:.1%} of {known.sum():,} training "
                f"images, and for {after:.1%} once its classes are renamed to the labels that "
                "they coincide with on other images",
                "the classes of the teacher's head are in another order than those of the data: "
                "number the classes of the data as in the teacher's training, or reorder its head",
            )
    return None


def renamed_accuracy(found: np.ndarray, label: np.ndarray, classes: int) -> float:
    """The accuracy under the best other names of `found`, chosen on the other half of the examples.

    One to one: pairs are taken by falling counts.
    """
    right = np.zeros(len(found), bool)
    for part in (0, 1):
        own = np.arange(len(found)) % 2 == part
        counts = np.zeros((classes, classes))
        np.add.at(counts, (found[~own], label[~own]), 1)
        names = np.full(classes, -1)
        while counts.max() > 0:
            row, column = np.unravel_index(counts.argmax(), counts.shape)
            names[row] = column
            counts[row], counts[:, column] = 0, 0
        right[own] = names[found[own]] == label[own]
    return float(right.mean())


def weak_teacher(evidence: Evidence) -> Finding | None:
    """The teacher's outputs carry little or no information about its training views."""
    training, central = evidence.training, evidence.central
    if training is None:
        return None
    advice = (
        "show the teacher views closer to those of its training: larger crops "
        "(--views.crop-area), no mixup (--views.mixup none), its own resolution; or use a better "
        "teacher"
    )
    share = training.information_nats / np.log(training.classes)
    if share < LEAST_INFORMATION:
        return Finding(
            CLEAR,
            f"the teacher's outputs hardly depend on the view: they carry {share:.1%} of the "
            "information that is needed to tell the classes apart",
            advice,
        )
    known = training.label >= 0
    if central is None or not known.any() or not (central.label >= 0).any():
        return None
    chance = 1 / central.classes
    here = (training.label == training.teacher_class)[known].mean()
    labelled = central.label >= 0
    there = (central.teacher_class[0] == central.label)[labelled].mean()
    skill, own = here - chance, there - chance
    noise = SURE_ERRORS * (chance * (1 - chance) / known.sum()) ** 0.5
    if skill < max(LEAST_SKILL_KEPT * own, noise):
        return Finding(
            CLEAR,
            f"the teacher is right for {here:.1%} of {known.sum():,} training views (of a mixture, "
            f"the label of its larger part), for {there:.1%} of the same images' central crops, "
            f"and chance is {chance:.1%}",
            advice,
        )
    return None


def views_differ(evidence: Evidence) -> Finding | None:
    """The teacher sees another view than the student's."""
    training = evidence.training
    if training is None or training.views_kl_nats is None:
        return None
    apart, all_of_it = training.views_kl_nats.mean(), training.information_nats
    if apart < max(MOST_NOISE * all_of_it, LEAST_NOISE_NATS):
        return None
    return Finding(
        MEASURED,
        f"with teaching={evidence.setting.teaching} the teacher's outputs for its own view and "
        f"for the student's differ by {apart:.3g} nats (KL), where its outputs carry "
        f"{all_of_it:.3g} nats of information about the view in all",
        "show both networks the same view: --teaching function_matching",
    )


def batch_norm_drift(evidence: Evidence) -> Finding | None:
    """BatchNorm's running moments are not those of the batches."""
    norm = evidence.batch_norm
    if norm is None or not norm.shift:
        return None
    if evidence.setting.complete and evidence.setting.ends_with_central_statistics:
        return None  # they are meant for other views
    shifted = max(norm.shift, key=lambda x: norm.shift[x])
    spread = max(norm.spread, key=lambda x: norm.spread[x])
    far = norm.shift[shifted] > MOST_SHIFT or norm.spread[spread] > MOST_SPREAD
    worse = norm.kl_kept_nats - norm.kl_batch_nats
    hurts = worse > max(MOST_KEPT_LOSS * norm.kl_batch_nats, LEAST_KEPT_NATS)
    # Where the kept moments are trained with, the distance to the batch's says it alone.
    if not (far and (hurts or evidence.setting.keeps_statistics)):
        return None
    return Finding(
        CLEAR,
        f"the running mean of {shifted} is {norm.shift[shifted]:.2g} standard deviations from the "
        f"batches', the running variance of {spread} is off by a factor of "
        f"{np.exp(norm.spread[spread]):.2g}; on the training view the student is "
        f"{norm.kl_kept_nats:.3g} nats from its target with the running moments and "
        f"{norm.kl_batch_nats:.3g} with the batch's own",
        "train on until the running averages have caught up, with a smaller learning rate or "
        "larger batches; turn student.keep_statistics off where the data differ from the "
        "weights'; or use GroupNorm",
    )


def statistics_of_training_views(evidence: Evidence) -> Finding | None:
    """With BatchNorm's moments of central crops, the student is nearer to its teacher on these."""
    central, setting = evidence.central, evidence.setting
    if central is None or central.central_statistics_kl_nats is None:
        return None
    if setting.ends_with_central_statistics and not setting.complete:
        return None  # they come with the last step
    gain = central.kl_nats - central.central_statistics_kl_nats
    before, after = central.kl_nats.mean(), central.central_statistics_kl_nats.mean()
    error = gain.std() / np.sqrt(len(gain))
    least = max(MOST_KEPT_LOSS * before, LEAST_KEPT_NATS, SURE_ERRORS * error)
    if gain.mean() < least:
        return None
    return Finding(
        LIKELY,
        f"on central crops of training images the student is {before:.3g} nats from its teacher "
        f"with BatchNorm's running moments, of mixed crops, and {after:.3g} with those of central "
        "crops",
        "end the run with the latter: --student.final_statistics central",
    )


def saturated_gradient(evidence: Evidence) -> Finding | None:
    """At the temperature of the training, all targets are alike, or each is one class."""
    training, temperature = evidence.training, evidence.setting.temperature
    if training is None:
        return None
    own, plain = training.teacher_entropy.mean(), training.teacher_entropy_one.mean()
    text = (
        f"at temperature {temperature:g} the teacher's outputs have {own:.2%} of the maximum "
        f"entropy, and {plain:.2%} at temperature 1"
    )
    if evidence.gradients is not None:
        text += f"; the gradient's norm is {evidence.gradients.norms.sum(axis=1).mean():.2g}"
    if temperature > 1 and own > MOST_ENTROPY:
        return Finding(CLEAR, text, "lower objective.temperature; the paper uses 1 to 10")
    if temperature < 1 and own < LEAST_ENTROPY:
        return Finding(
            CLEAR,
            text,
            "raise objective.temperature to 1 or more: below, only the teacher's top class "
            "is left to learn",
        )
    return None


def unmatchable_examples(evidence: Evidence) -> Finding | None:
    """Few examples carry most of the distance."""
    central = evidence.central
    if central is None or (share := few_share(central)) is None or share < MOST_OF_FEW:
        return None
    worst = np.argsort(-central.kl_nats, kind="stable")[:SHOWN_EXAMPLES]
    numbers = ", ".join(str(central.example[i]) for i in worst)
    return Finding(
        LIKELY,
        f"{FEW:.0%} of {len(central.kl_nats):,} training images account for {share:.0%} of the "
        f"distance to the teacher on the central crop; the furthest are the examples {numbers}",
        "look at these images: remove those that are corrupt, unlike the teacher's training data "
        "or mislabelled, or accept that the mean distance will not fall further",
    )


def few_share(central: CentralView) -> float | None:
    """The share of the distance that is the few's; None where all are matched, or too few."""
    count, total = len(central.kl_nats), central.kl_nats.sum()
    if count < FEWEST_EXAMPLES or total < LEAST_FEW_NATS * count:
        return None
    return float(np.sort(central.kl_nats)[-round(FEW * count) :].sum() / total)
