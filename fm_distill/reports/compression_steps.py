"""The steps of `fm-distill compress`, and the config of the run that each of them is."""

import dataclasses
from collections.abc import Callable

from fm_distill.config import Config, PruningConfig, QuantisationConfig, ScheduleConfig
from fm_distill.config.pruning import OF_WEIGHTS
from fm_distill.errors import UserError

# The steps of the compressed run over those of a recovery, where its schedule is not given. A tenth
# of the steps was too few (experiments/LOG.md, 2026-11-26).
RECOVERY = 2
# In how many parts an unstructured pruning removes its weights, over the first half of its run.
PARTS = 20


@dataclasses.dataclass(frozen=True)
class CompressionStep:
    """One of the two, as it was written."""

    text: str
    pruning: PruningConfig | None = None
    quantisation: QuantisationConfig | None = None


def _structured(share: str) -> PruningConfig:
    return PruningConfig(pattern="channels", sparsity=float(share))


def _by_taylor(share: str) -> PruningConfig:
    return PruningConfig(pattern="channels", sparsity=float(share), criterion="taylor")


def _over_network(share: str) -> PruningConfig:
    return dataclasses.replace(_structured(share), ranking="network")


def _by_taylor_over_network(share: str) -> PruningConfig:
    return dataclasses.replace(_by_taylor(share), ranking="network")


def _unstructured(share: str) -> PruningConfig:
    return PruningConfig(pattern="unstructured", sparsity=float(share))


# By what stands before the share.
SHARED: dict[str, Callable[[str], PruningConfig]] = {
    "prune:structured": _structured,
    "prune:structured:taylor": _by_taylor,
    "prune:structured:network": _over_network,
    "prune:structured:taylor:network": _by_taylor_over_network,
    "prune:unstructured": _unstructured,
}
FIXED: dict[str, PruningConfig | QuantisationConfig] = {
    "prune:2:4": PruningConfig(pattern="2:4"),
    "prune:1:4": PruningConfig(pattern="1:4"),
    "quantise:int8": QuantisationConfig(weights="int8", activations="int8"),
    "quantise:int8-weights": QuantisationConfig(weights="int8"),
    "quantise:int4-weights": QuantisationConfig(weights="int4"),
}


def parse_step(text: str) -> CompressionStep:
    """`prune:structured:0.5` or `quantise:int8`, for example. Raises `UserError`."""
    if text in FIXED:
        fixed_config = FIXED[text]
        if isinstance(fixed_config, PruningConfig):
            return CompressionStep(text, pruning=fixed_config)
        return CompressionStep(text, quantisation=fixed_config)
    kind, _, share = text.rpartition(":")
    try:
        return CompressionStep(f"{kind}:{float(share):g}", pruning=SHARED[kind](share))
    except (KeyError, ValueError):
        choices = ", ".join([*(f"{prefix}:SHARE" for prefix in SHARED), *FIXED])
        raise UserError(
            f"--steps {text!r} is not one of {choices}, with a SHARE between 0 and 1"
        ) from None


def check_order(steps: tuple[CompressionStep, ...], before: PruningConfig) -> None:
    """Raises `UserError` where a step cannot follow those before it, and the run's own pruning."""
    earlier_pruning = "the run's own pruning" if before.pattern in OF_WEIGHTS else None
    earlier_quantisation: str | None = None
    for step in steps:
        pruning = step.pruning
        if pruning and pruning.pattern == "channels" and earlier_pruning:
            raise UserError(
                f"--steps {step.text} cannot follow {earlier_pruning}: in the smaller network the "
                "pruned weights would no longer stay zero; prune channels first"
            )
        if step.quantisation and earlier_quantisation:
            raise UserError(
                f"--steps {step.text} cannot follow {earlier_quantisation}: a student has one "
                "precision; keep one of them"
            )
        earlier_pruning = (
            step.text if pruning and pruning.pattern in OF_WEIGHTS else earlier_pruning
        )
        earlier_quantisation = step.text if step.quantisation else earlier_quantisation


def recovery_schedule(asked: ScheduleConfig, own: ScheduleConfig, steps: int) -> ScheduleConfig:
    """Of each step: what was `asked` for, or a shorter cosine where that has the run's own length.

    `own` is the schedule of the run, of so many `steps`.
    """
    length = asked.shape, asked.total_steps, asked.total_epochs
    if length != (own.shape, own.total_steps, own.total_epochs):
        return asked
    warmup = asked.warmup_steps
    return ScheduleConfig(
        total_steps=max(1, steps // RECOVERY),
        warmup_steps=warmup // RECOVERY if warmup == own.warmup_steps else warmup,
    )


def config_after(config: Config, step: CompressionStep, weights: str, total_steps: int) -> Config:
    """The run of `step` of so many steps, which starts from the run in `weights`.

    `config` is that of the step before: what it pruned stays pruned, and its precision is kept.
    """
    student = config.student
    pruning = step.pruning or PruningConfig()
    if pruning.pattern == "none" and student.pruning.pattern in OF_WEIGHTS:
        pruning = PruningConfig(pattern="kept")
    if pruning.pattern == "unstructured" and total_steps > 1:
        end_step = total_steps // 2
        pruning = dataclasses.replace(
            pruning, end_step=end_step, every_steps=max(1, end_step // PARTS)
        )
    student = dataclasses.replace(
        student,
        weights=weights,
        pruning=pruning,
        quantisation=step.quantisation or student.quantisation,
        block_widths=(),  # those of the weights
    )
    return dataclasses.replace(config, student=student)
