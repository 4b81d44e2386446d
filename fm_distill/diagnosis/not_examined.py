"""What a diagnosis leaves out, and why: an absent teacher, too few examples, no labels."""

from collections.abc import Collection, Iterator

from fm_distill.diagnosis.data_rules import EXAMPLES_A_CLASS, FEWEST_EXAMPLES
from fm_distill.diagnosis.evidence import CentralView, NotExamined
from fm_distill.diagnosis.opened import Examined
from fm_distill.diagnosis.probes import taps_of


def left_out(
    examined: Examined, measured: Collection[str], central: CentralView | None
) -> Iterator[NotExamined]:
    """`measured` are the names of what was measured on each batch of training views."""
    if not examined.teachers:
        reason = (
            "the teacher itself is not available, only its recorded outputs; give "
            "--teacher.weights FILE"
        )
        yield NotExamined("features, input ranges, class order and single examples", reason)
        return
    if "cka" not in measured:
        untapped = [
            name
            for name, branch in (("student", examined.student), ("teacher", examined.teachers[0]))
            if not taps_of(branch)
        ]
        reason = f"the {' and the '.join(untapped)} has no named features"
        if not untapped:
            batch_size = examined.config.batch_size
            reason = f"a batch of {batch_size} is too small: the unbiased CKA needs four"
        yield NotExamined("features", reason)
    if central is None:
        what = "agreement, distances, input ranges, BatchNorm, class order and single examples"
        yield NotExamined(what, "the teacher has no head, and so no logits to compare with")
        return
    yield from _for_want_of_examples(central)
    if "views_kl_nats" not in measured:
        reason = "the recording holds only the most likely classes"
        yield NotExamined("how far views differ between the networks", reason)


def _for_want_of_examples(central: CentralView) -> Iterator[NotExamined]:
    labelled, needed = int((central.label >= 0).sum()), EXAMPLES_A_CLASS * central.classes
    if not labelled:
        reason = "the training images have no labels"
        yield NotExamined("the teacher's input range, class order and accuracy", reason)
    elif labelled < needed:
        reason = (
            f"{central.classes:,} classes need {needed:,} different images with labels, and "
            f"{labelled:,} were read; --examples reads more, where there are more"
        )
        yield NotExamined("class order", reason)
    if len(central.kl_nats) < FEWEST_EXAMPLES:
        reason = f"{FEWEST_EXAMPLES} different images are needed, and {len(central.kl_nats)} read"
        yield NotExamined("single examples", reason)
