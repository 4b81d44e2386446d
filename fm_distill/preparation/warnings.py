"""Likely mistakes in a config that can nevertheless be run."""

from fm_distill.config import Config
from fm_distill.config.objective import terms_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.objectives.features import OF_FEATURES


def warnings_on(config: Config, resolved: ResolvedRun) -> list[str]:
    """A sentence for each."""
    warmup, steps, size = (
        config.schedule.warmup_steps,
        resolved.total_steps,
        config.data.canvas.size,
    )
    warnings = []
    if warmup > steps / 5:
        warnings.append(
            f"WARNING: the warm-up of {warmup:,} steps is {warmup / steps:.0%} of the run of "
            f"{steps:,}: the learning rate has little time at its peak"
        )
    if config.batch_size > resolved.examples:
        warnings.append(
            f"WARNING: the batch of {config.batch_size:,} is larger than the {resolved.examples:,} "
            "training examples, so that each is in it more than once"
        )
    if all(x.kind in OF_FEATURES for x in terms_of(config.objective)):
        warnings.append(
            "WARNING: no term reads the student's logits, so its head learns nothing and its "
            "accuracy means nothing: add a term, such as labels, or train the head afterwards "
            "(another run with --student.weights)"
        )
    networks = [("student", resolved.student), *(("teacher", x) for x in resolved.teachers)]
    warnings += [
        f"WARNING: the canvas (data.canvas.size={size}) is smaller than the {name}'s resolution "
        f"{network.resolution}: even the largest crop is enlarged"
        for name, network in networks
        if size < network.resolution
    ]
    return warnings
