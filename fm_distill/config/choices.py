"""Checks of a value against the choices that it has."""

from collections.abc import Iterable

from fm_distill.errors import UserError


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise UserError(f"{option} is {value!r}; expected one of {', '.join(sorted(known))}")
