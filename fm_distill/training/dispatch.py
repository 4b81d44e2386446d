"""Steps per dispatch, and what is due after one."""

from collections.abc import Iterator

from fm_distill.config import Config
from fm_distill.system.sharding import Layout

# Steps a dispatch of `auto` on an accelerator with resident data.
STEPS_PER_DISPATCH = 16


def steps_per_dispatch(config: Config, resident: bool, layout: Layout) -> int:
    """Steps that one call does: several in one loop on the device save an accelerator's time
    between calls, and cost a CPU a multiple of the step's time."""
    if config.steps_per_dispatch != "auto":
        return config.steps_per_dispatch
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    return STEPS_PER_DISPATCH if resident and not on_cpu else 1


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
