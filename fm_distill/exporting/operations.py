"""The operations of a traced function, as JAX lists them."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

# Operations that are other operations, and where these stand in their parameters.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
}


def inside(operation: JaxprEqn) -> tuple[Jaxpr, list[Any]] | None:
    """What `operation` is made of, and the constants in it; None of one that is made of none."""
    if operation.primitive.name not in CALLS:
        return None
    called = operation.params[CALLS[operation.primitive.name]]
    # Closed over its constants, or with none.
    return (called, []) if isinstance(called, Jaxpr) else (called.jaxpr, list(called.consts))


def operations_in(traced: Jaxpr) -> Iterator[JaxprEqn]:
    """All operations, those inside of others in their place."""
    for operation in traced.eqns:
        if (called := inside(operation)) is None:
            yield operation
        else:
            yield from operations_in(called[0])
