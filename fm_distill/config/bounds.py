"""Bounds of numbers: annotations of the fields that they hold for, checked in one place."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Bounds:
    """The finite numbers that a field takes."""

    least: int | float = -math.inf
    most: int | float = math.inf
    # These two are outside.
    above: int | float = -math.inf
    below: int | float = math.inf

    def hold(self, value: int | float) -> bool:
        in_range = self.least <= value <= self.most and self.above < value < self.below
        return in_range and math.isfinite(value)

    def __repr__(self) -> str:
        # The command line's parser prints it where a value has another type.
        if self.above > -math.inf and self.most < math.inf:
            return f"more than {self.above:.12g}, and {self.most:.12g} or less"
        if self.above == 0:
            return "a number above zero"
        if self.most < math.inf:
            return f"{self.least:.12g} to {self.most:.12g}"
        upper_bound = f" and less than {self.below:.12g}" if self.below < math.inf else ""
        return f"{self.least:.12g} or more{upper_bound}"


PositiveInt = Annotated[int, Bounds(above=0)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Count = Annotated[int, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, most=1)]
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]
Decay = Annotated[float, Bounds(least=0, below=1)]


def out_of_bounds(part: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each number of a config, or of a part of it, that its field does not take."""
    hints = typing.get_type_hints(type(part), include_extras=True)
    for name, value in vars(part).items():
        option = prefix + name
        if dataclasses.is_dataclass(value):
            yield from out_of_bounds(value, f"{option}.")
        elif isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
            for i, item in enumerate(value):
                yield from out_of_bounds(item, f"{option}.{i}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for bounds in _bounds(hints[name]):
                if not bounds.hold(value):
                    yield f"{option} is {value}; expected {bounds}"


def _bounds(hint: Any) -> Iterator[Bounds]:
    """The bounds in an annotation, also in those of a union."""
    if typing.get_origin(hint) is Annotated:
        yield from (bounds for bounds in hint.__metadata__ if isinstance(bounds, Bounds))
    elif typing.get_origin(hint) is not tuple:
        for part in typing.get_args(hint):
            yield from _bounds(part)
