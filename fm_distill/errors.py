"""The exceptions that carry an exit code. Any other that escapes is a bug (exit 1)."""


class UserError(Exception):
    """Wrong input, or a workdir that may not be used: what was got, expected, and what to change.

    Exit code 2.
    """


class TrainingFailed(Exception):
    """The training itself failed: it diverged, the disk is full, a peer was lost. Exit code 4."""


class Diverged(TrainingFailed):
    """The loss, its gradient or the update is no longer finite, noticed at `step`."""

    def __init__(self, step: int):
        super().__init__(
            f"the loss, its gradient or the update is not finite at step {step:,}; the last "
            "checkpoint before it is kept. Try a lower optimizer.learning_rate, a longer "
            "schedule.warmup_steps or --precision float32, or continue past it with "
            "--divergence.action skip or slow"
        )
        self.step = step


EXIT_COMPLETE = 0
EXIT_OUR_FAULT = 1
EXIT_WRONG_INPUT = 2
EXIT_DOES_NOT_FIT = 3
EXIT_TRAINING_FAILED = 4
EXIT_PAUSED = 75
EXIT_INTERRUPTED_TWICE = 130
