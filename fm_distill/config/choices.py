"""Checks of a value against the choices that it has."""

from collections.abc import Iterable, Iterator

from fm_distill.errors import UserError


def not_a_choice(option: str, value: str, known: Iterable[str]) -> Iterator[str]:
    """A sentence where `value` is none of those that are `known`."""
    if value not in tuple(known):
        yield f"{option} is {value!r}; expected one of {', '.join(sorted(known))}"


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    for message in not_a_choice(option, value, known):
        raise UserError(message)
