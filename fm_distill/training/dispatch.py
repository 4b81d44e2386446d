"""How steps are dispatched, and what is due after a dispatch."""

from collections.abc import Iterator


def due(every: int, step: int, steps: int) -> bool:
    """Whether the dispatch of `steps` that led to `step` passed a multiple of `every`."""
    return every > 0 and step // every > (step - steps) // every


def dispatch_sizes(start_step: int, total_steps: int, size: int) -> Iterator[int]:
    """Steps of each dispatch from `start_step` on: full ones, then single steps at the end.

    The same from any start that is the end of a dispatch, so that a resumed run runs the same
    programs on the same steps.
    """
    step = start_step
    while step < total_steps:
        steps = size if step + size <= total_steps else 1
        yield steps
        step += steps
