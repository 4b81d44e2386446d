"""`student.input_range=adapt`: moments of the training images, computed once in a run's life."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from fm_distill.config import Config, NetworkConfig
from fm_distill.data.feeding import Reader
from fm_distill.data.grey_levels import CHANNELS, LevelCounts, Moments, count_levels, moments_of
from fm_distill.data.sources import Source
from fm_distill.networks.loading import Networks
from fm_distill.system.console import log
from fm_distill.system.processes import gathered

# In place of moments that are not there.
NONE = Moments((0.0,) * 3, (0.0,) * 3)


def wrong_moments(option: str, network: NetworkConfig) -> Iterator[str]:
    """A sentence where the moments that `network` gives cannot be those of its input."""
    mean, deviation = network.input_mean, network.input_deviation
    if (mean or deviation) and network.input_range != "adapt":
        yield (
            f"{option}.input_mean and {option}.input_deviation are for input_range=adapt, and "
            f"input_range is {network.input_range}; leave them out"
        )
    elif (mean or deviation) and not (
        len(mean) == len(deviation) == len(CHANNELS)
        and all(map(math.isfinite, (*mean, *deviation)))
        and min(deviation) > 0
    ):
        yield (
            f"{option}.input_mean is {list(mean)} and {option}.input_deviation {list(deviation)}; "
            "expected three numbers each, of red, green and blue, the deviations above zero"
        )


def with_input_moments(
    networks: Networks, config: Config, train: Source, stored: NetworkConfig | None
) -> Networks:
    """`networks` with the student's moments where its range is `adapt` and nothing gave them yet.

    Those of `stored`, the student of the same run from before; else of the pixels of `train`, of
    which each process reads its share. All processes have to call it. Raises `UserError`.
    """
    student = networks.student
    if student.input_range != "adapt" or student.input_mean:
        return networks
    moments = _of_first(stored)
    if moments == NONE:
        reader = Reader(train, config.data, networks.classes)
        local_counts = count_levels(reader, jax.process_index(), jax.process_count())
        moments = moments_of(_summed(local_counts), train.identity)
        log(
            f"student.input_range=adapt: mean {_text(moments.mean)} and deviation "
            f"{_text(moments.deviation)} over the pixels of {train.identity}, in grey levels"
        )
    student = dataclasses.replace(
        student, input_mean=moments.mean, input_deviation=moments.deviation
    )
    return dataclasses.replace(networks, student=student)


def _of_first(stored: NetworkConfig | None) -> Moments:
    """What the first process finds stored; `NONE` where that is nothing."""
    local_moments = NONE
    if stored is not None and stored.input_mean:
        local_moments = Moments(stored.input_mean, stored.input_deviation)
    first = np.frombuffer(gathered(np.array(local_moments, np.float64).tobytes())[0], np.float64)
    mean, deviation = first.reshape(2, len(CHANNELS)).tolist()
    return Moments(tuple(mean), tuple(deviation))


def _summed(own: LevelCounts) -> LevelCounts:
    """Over all processes; integers."""
    counts = [np.frombuffer(x, np.int64).reshape(own.shape) for x in gathered(own.tobytes())]
    return np.sum(counts, axis=0)


def _text(values: tuple[float, ...]) -> str:
    return " ".join(f"{x:.2f}" for x in values)
