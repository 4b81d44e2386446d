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
    findings = [x for x in map(_better_range, networks) if x is not None]
    return max(findings, key=lambda x: x.strength, default=None)


def _better_range(network: InRanges) -> Finding | None:
    configured = network.configured
    correct, distance = network.right[configured], network.distance_nats[configured]
    for name in sorted(network.right, key=lambda x: network.distance_nats[x].mean()):
        accuracy_gain = network.right[name].astype(float) - correct
        distance_gain = distance - network.distance_nats[name]
        if (
            name != configured
            and accuracy_gain.mean() >= LEAST_ACCURACY_GAIN
            and all(x.mean() > SURE_ERRORS * _error(x) for x in (accuracy_gain, distance_gain))
        ):
            measured = "cross-entropy" if network.aim == "label" else "KL"
            return Finding(
                MEASURED,
                f"on the central crop of {len(correct):,} training images the {network.network}'s "
                f"top-1 class is the {network.aim}'s for {correct.mean():.1%} of them with "
                f"input_range={configured}, and for {network.right[name].mean():.1%} with {name} "
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
    has_label = central.label >= 0
    if has_label.sum() < EXAMPLES_A_CLASS * central.classes:
        return None
    label = central.label[has_label]
    for i, classes in enumerate(central.teacher_class):
        predicted = classes[has_label]
        accuracy, renamed = (
            (predicted == label).mean(),
            renamed_accuracy(predicted, label, central.classes),
        )
        if renamed - accuracy >= LEAST_ORDER_GAIN:
            teacher_name = "the teacher" if i == 0 else f"teacher {i + 1}"
            return Finding(
                MEASURED,
                f"{teacher_name}'s top-1 class is the label for {accuracy:.1%} of "
                f"{has_label.sum():,} training images, and for {renamed:.1%} once its classes are "
                "renamed to the labels that they coincide with on other images",
                "the classes of the teacher's head are in another order than those of the data: "
                "number the classes of the data as in the teacher's training, or reorder its head",
            )
    return None


def renamed_accuracy(found: np.ndarray, label: np.ndarray, classes: int) -> float:
    """The accuracy under the best other names of `found`, chosen on the other half of the examples.

    One to one: pairs are taken by falling counts.
    """
    correct = np.zeros(len(found), bool)
    for half in (0, 1):
        in_half = np.arange(len(found)) % 2 == half
        counts = np.zeros((classes, classes))
        np.add.at(counts, (found[~in_half], label[~in_half]), 1)
        names = np.full(classes, -1)
        while counts.max() > 0:
            row, column = np.unravel_index(counts.argmax(), counts.shape)
            names[row] = column
            counts[row], counts[:, column] = 0, 0
        correct[in_half] = names[found[in_half]] == label[in_half]
    return float(correct.mean())


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
    labelled_views = training.label >= 0
    if central is None or not labelled_views.any() or not (central.label >= 0).any():
        return None
    chance = 1 / central.classes
    top1 = (training.label == training.teacher_class)[labelled_views].mean()
    labelled_crops = central.label >= 0
    crop_top1 = (central.target_class == central.label)[labelled_crops].mean()
    skill, crop_skill = top1 - chance, crop_top1 - chance
    noise = SURE_ERRORS * (chance * (1 - chance) / labelled_views.sum()) ** 0.5
    if skill < max(LEAST_SKILL_KEPT * crop_skill, noise):
        return Finding(
            CLEAR,
            f"the teacher is right for {top1:.1%} of {labelled_views.sum():,} training views (of a "
            f"mixture, the label of its larger part), for {crop_top1:.1%} of the same images' "
            f"central crops, and chance is {chance:.1%}",
            advice,
        )
    return None


def views_differ(evidence: Evidence) -> Finding | None:
    """The teacher sees another view than the student's."""
    training = evidence.training
    if training is None or training.views_kl_nats is None:
        return None
    distance, information = training.views_kl_nats.mean(), training.information_nats
    if distance < max(MOST_NOISE * information, LEAST_NOISE_NATS):
        return None
    return Finding(
        MEASURED,
        f"with teaching={evidence.setting.teaching} the teacher's outputs for its own view and "
        f"for the student's differ by {distance:.3g} nats (KL), where its outputs carry "
        f"{information:.3g} nats of information about the view in all",
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
    drifted = norm.shift[shifted] > MOST_SHIFT or norm.spread[spread] > MOST_SPREAD
    excess = norm.kl_kept_nats - norm.kl_batch_nats
    harmful = excess > max(MOST_KEPT_LOSS * norm.kl_batch_nats, LEAST_KEPT_NATS)
    # Where the kept moments are trained with, the distance to the batch's says it alone.
    if not (drifted and (harmful or evidence.setting.keeps_statistics)):
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
    running_kl, central_kl = central.kl_nats.mean(), central.central_statistics_kl_nats.mean()
    error = gain.std() / np.sqrt(len(gain))
    least_gain = max(MOST_KEPT_LOSS * running_kl, LEAST_KEPT_NATS, SURE_ERRORS * error)
    if gain.mean() < least_gain:
        return None
    return Finding(
        LIKELY,
        f"on central crops of training images the student is {running_kl:.3g} nats from its "
        f"teacher with BatchNorm's running moments, of mixed crops, and {central_kl:.3g} with "
        "those of central crops",
        "end the run with the latter: --student.final_statistics central",
    )


def saturated_gradient(evidence: Evidence) -> Finding | None:
    """At the temperature of the training, all targets are alike, or each is one class."""
    training, temperature = evidence.training, evidence.setting.temperature
    if training is None:
        return None
    entropy, entropy_one = training.teacher_entropy.mean(), training.teacher_entropy_one.mean()
    text = (
        f"at temperature {temperature:g} the teacher's outputs have {entropy:.2%} of the maximum "
        f"entropy, and {entropy_one:.2%} at temperature 1"
    )
    if evidence.gradients is not None:
        text += f"; the gradient's norm is {evidence.gradients.norms.sum(axis=1).mean():.2g}"
    if temperature > 1 and entropy > MOST_ENTROPY:
        return Finding(CLEAR, text, "lower objective.temperature; the paper uses 1 to 10")
    if temperature < 1 and entropy < LEAST_ENTROPY:
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
