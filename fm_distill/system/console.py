"""Lines for the person who watches a run; standard output is kept for results."""

import math
import sys

from tqdm import tqdm


def log(text: str) -> None:
    """A line for the person who watches; standard output is kept for results."""
    tqdm.write(text, file=sys.stderr)


def sessions_left(hours_left: float | None, hours: float) -> str:
    """`3.4 hours are left, 2 stretches of 2 hours`."""
    if hours_left is None:
        return "how long the rest takes is not known yet"
    count = math.ceil(hours_left / hours) if hours > 0 else 1
    of_length = f"{count:,} stretch{'es' if count != 1 else ''} of {hours_text(hours)}"
    return f"about {hours_text(hours_left)} left, {of_length} like this one"


def hours_text(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
