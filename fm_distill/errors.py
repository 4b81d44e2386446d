"""The exceptions that carry an exit code. Any other that escapes is a fault of ours (exit 1)."""


class UserError(Exception):
    """Wrong input, or a workdir that may not be used: what was got, expected, and what to change.

    Exit code 2.
    """


class TrainingFailed(Exception):
    """The training itself failed: it diverged, the disk is full, a peer was lost. Exit code 4."""


EXIT_COMPLETE = 0
EXIT_OUR_FAULT = 1
EXIT_WRONG_INPUT = 2
EXIT_TRAINING_FAILED = 4
EXIT_PAUSED = 75
EXIT_INTERRUPTED_TWICE = 130
