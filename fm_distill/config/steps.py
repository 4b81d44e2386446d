"""How long a run is: in examples and in steps."""

from fm_distill.config import Config, DataConfig
from fm_distill.errors import UserError

# BiT's hyper-rule: up to how many examples; steps of the warm-up, of the three drops, and in all.
# Source: big_transfer, bit_hyperrule.py (Kolesnikov et al. 2020, arXiv 1912.11370, section 3.3).
BIT_HYPER_RULE: tuple[tuple[float, tuple[int, int, int, int, int]], ...] = (
    (20_000, (100, 200, 300, 400, 500)),
    (500_000, (500, 3000, 6000, 9000, 10_000)),
    (float("inf"), (500, 6000, 12_000, 18_000, 20_000)),
)


def transfer_examples(data: DataConfig) -> int | None:
    """How many examples are trained on, as far as the config knows."""
    counts = [part.examples for part in data.transfer] or [data.train.examples]
    known_counts = [count for count in counts if count is not None]
    return sum(known_counts) if len(known_counts) == len(counts) else None


def total_steps(config: Config, examples: int) -> int:
    """Steps of the whole run: given, by the rule, or round(examples x epochs / batch size)."""
    schedule = config.schedule
    if schedule.shape == "bit_hyper_rule":
        return next(steps[-1] for limit, steps in BIT_HYPER_RULE if examples < limit)
    if schedule.total_steps is not None:
        return schedule.total_steps
    assert schedule.total_epochs is not None
    steps = round(examples * schedule.total_epochs / config.batch_size)
    if steps < 1:
        raise UserError(
            f"schedule.total_epochs={schedule.total_epochs:g} of {examples} examples is less than "
            f"one batch of {config.batch_size}: raise it, or lower batch_size"
        )
    return steps
