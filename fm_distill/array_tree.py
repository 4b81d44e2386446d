"""Frozen dataclasses of arrays as JAX trees, with the shapes of their fields in annotations."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

if TYPE_CHECKING:
    AnyArray = Any
else:
    # On the host or on the devices.
    AnyArray = jax.Array | np.ndarray
Tree = TypeVar("Tree")


def array_tree(cls: type[Tree]) -> type[Tree]:
    """Registers a frozen dataclass as a JAX tree; fields with `metadata={"static": True}` are not
    mapped.

    Annotated shapes are checked (in tests, by jaxtyping) where an instance is made, and not where
    one is mapped, since it may be mapped to shardings or to shapes.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = tuple(x.name for x in fields if x.metadata.get("static"))
    arrays = tuple(x.name for x in fields if x.name not in static)

    def flatten(tree: Tree) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        values = vars(tree)
        return tuple(values[x] for x in arrays), tuple(values[x] for x in static)

    def flatten_with_keys(tree: Tree) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, rest = flatten(tree)
        keys = (jax.tree_util.GetAttrKey(x) for x in arrays)
        return tuple(zip(keys, children, strict=True)), rest

    def unflatten(rest: tuple[Any, ...], children: Iterable[Any]) -> Tree:
        tree = object.__new__(cls)
        names, values = (*arrays, *static), (*children, *rest)
        vars(tree).update(zip(names, values, strict=True))
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
