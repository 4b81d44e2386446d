"""A teacher of some of its classes: `teacher.classes` keeps only their logits.

The softmax over the logits that are left is the teacher's distribution, given that it is one of
these classes; so its probabilities are renormalised, at any temperature.
"""

import difflib
import hashlib
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_distill.config import NetworkConfig
from fm_distill.data.class_names import IMAGENET, read_names
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network
from fm_distill.networks.functions import Images, TeacherFunction

FLOAT32 = jnp.dtype("float32")


class Choice(NamedTuple):
    """Classes of a teacher, in the student's order."""

    places: tuple[int, ...]  # among the teacher's
    names: tuple[str, ...] | None  # where the teacher's are known, or all were given by name


def names_asked(asked: tuple[str, ...], option: str) -> tuple[str, ...]:
    """`teacher.classes` itself, or the lines of the one file that it names. Raises `UserError`."""
    if len(asked) == 1 and (asked[0].endswith(".txt") or pathlib.Path(asked[0]).is_file()):
        asked = read_names(pathlib.Path(asked[0]), f"{option}.classes={asked[0]}")
    if repeated := [x for i, x in enumerate(asked) if x in asked[:i]]:
        raise UserError(f"{option}.classes names {repeated[0]!r} more than once; name it once")
    if len(asked) < 2:
        raise UserError(
            f"{option}.classes names {f'only {asked[0]!r}' if asked else 'none'}; expected two "
            "classes or more, or a text file with one name per line"
        )
    return asked


def chosen(
    asked: tuple[str, ...], names: tuple[str, ...] | None, classes: int, option: str
) -> Choice:
    """The requested classes, by name or number, among the teacher's.

    `names` are the teacher's own; of 1,000 classes without any they are ImageNet's. Raises
    `UserError` for one that it does not have.
    """
    if not classes:
        raise UserError(
            f"{option}.classes chooses among a teacher's classes, and this one has no head; leave "
            "it out"
        )
    known_names = read_names(IMAGENET, "imagenet") if names is None and classes == 1000 else names
    positions = {name: i for i, name in enumerate(known_names or ())}

    def place(name: str) -> int:
        if name in positions:
            return positions[name]
        if name.isdecimal() and int(name) < classes:
            return int(name)
        suggestions = difflib.get_close_matches(name, positions, 3)
        hint = f"did you mean {', '.join(suggestions)}? " if suggestions else ""
        if not positions:
            hint = "its classes have no known names: "
        raise UserError(
            f"{option}.classes: the teacher has no class {name!r}; {hint}give names, or numbers "
            f"from 0 to {classes - 1}"
        )

    places = tuple(place(name) for name in asked)
    if repeated := [asked[i] for i, x in enumerate(places) if x in places[:i]]:
        raise UserError(f"{option}.classes: {repeated[0]!r} is given twice")
    if names:
        return Choice(places, tuple(names[i] for i in places))
    return Choice(places, asked if all(x in positions for x in asked) else None)


def refuse_other_recording(
    asked: tuple[str, ...], recorded: tuple[str, ...] | None, classes: int, where: str
) -> None:
    """Raises `UserError` where a recording of `classes` classes is not of those asked for."""
    names = recorded or asked
    is_same = len(asked) == classes and all(
        x == name or (x.isdecimal() and not name.isdecimal())
        for x, name in zip(asked, names, strict=True)
    )
    if not is_same:
        raise UserError(
            f"{where} recorded {_first(names)}, and teacher.classes asks for {_first(asked)}; "
            "record these, or leave out teacher.classes"
        )


def _first(names: tuple[str, ...]) -> str:
    listing = ", ".join(names[:5])
    return f"{len(names):,} classes ({listing}{', ...' if len(names) > 5 else ''})"


def function_of(function: TeacherFunction, places: tuple[int, ...]) -> TeacherFunction:
    """`function` with the logits at `places` alone."""

    def of_places(images: Images) -> np.ndarray:
        return function(images)[:, list(places)]

    return of_places


def fingerprint_of(fingerprint: str, places: tuple[int, ...]) -> str:
    """Of a function of which the logits at `places` are kept."""
    return hashlib.sha256(f"{fingerprint} {places}".encode()).hexdigest()


def variables_of(
    network: NetworkConfig, variables: Variables, classes: int, places: tuple[int, ...]
) -> Variables:
    """`variables` of a network of `classes` logits, with those at `places` alone."""
    key = jax.random.key(0)
    shapes, larger_shapes = (
        jax.eval_shape(build_network(network, count, FLOAT32).init, key)
        for count in (classes, classes + 1)
    )

    def axes(struct: jax.ShapeDtypeStruct, larger_struct: jax.ShapeDtypeStruct) -> list[int]:
        pairs = enumerate(zip(struct.shape, larger_struct.shape, strict=True))
        return [i for i, (size, larger_size) in pairs if size != larger_size]

    def kept(
        leaf: jax.Array, struct: jax.ShapeDtypeStruct, larger_struct: jax.ShapeDtypeStruct
    ) -> jax.Array:
        for axis in axes(struct, larger_struct):
            if struct.shape[axis] != classes:
                raise UserError(
                    f"teacher.classes needs a network with one output for each class, and an array "
                    f"of {network.model} has {struct.shape[axis]} for {classes} classes; "
                    "leave it out"
                )
            leaf = jnp.take(leaf, np.array(places), axis=axis)
        return leaf

    return jax.tree.map(kept, variables, shapes, larger_shapes)
