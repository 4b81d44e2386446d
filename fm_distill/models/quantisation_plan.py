"""Which layers of a network are quantised, and how: the first one, the head, and all between."""

import difflib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_distill.config import NetworkConfig
from fm_distill.models.contract import HEAD
from fm_distill.models.quantisation import Precision, QuantisableLayer


def plan_of(module: nn.Module, config: NetworkConfig) -> tuple[tuple[str, Precision], ...]:
    """The precision of each layer by its path, in the order of the calls; empty without any.

    Raises `ValueError` where a kernel is of a layer that cannot be quantised, by its name, for
    quantised activations of weights that are not, and for a float layer that is not there.
    """
    quantisation = config.quantisation
    if not quantisation.quantised:
        return ()
    if quantisation.weights == "none":
        raise ValueError(
            f"quantisation.activations={quantisation.activations} needs quantised weights: give "
            "quantisation.weights=int8 too, or neither"
        )
    layers, kernels = _layers_and_kernels(module, config.resolution)
    if unknown := [x for x in kernels if x not in layers]:
        raise ValueError(
            f"{config.model} has layers that cannot be quantised, {', '.join(unknown)}: build "
            "them from fm_distill.models.layers, or leave out quantisation"
        )
    if unknown := [x for x in quantisation.float_layers if x not in layers]:
        suggestions = difflib.get_close_matches(unknown[0], layers, 1)
        hint = f"did you mean {suggestions[0]}" if suggestions else f"it has {', '.join(layers)}"
        raise ValueError(
            f"quantisation.float_layers names {', '.join(unknown)}, which {config.model} does not "
            f"have; {hint}"
        )
    plan = tuple(
        (path, precision)
        for i, path in enumerate(layers)
        if (precision := _precision(path, i == 0, config)).weights != "none"
    )
    if quantisation.float_layers and not plan:
        raise ValueError(
            f"quantisation.float_layers leaves no layer of {config.model} quantised; leave out "
            "quantisation"
        )
    return plan


def _precision(path: str, first: bool, config: NetworkConfig) -> Precision:
    quantisation = config.quantisation
    if path in quantisation.float_layers:
        return Precision("none", "none")
    override = (
        quantisation.head
        if path.split("/")[0] == HEAD
        else quantisation.first_layer
        if first
        else None
    )
    if override is None:
        return Precision(quantisation.weights, quantisation.activations)
    return Precision(override, "none" if override == "none" else quantisation.activations)


def _layers_and_kernels(module: nn.Module, resolution: int) -> tuple[list[str], list[str]]:
    """Paths of the quantisable layers, as they are called, and of all that have a kernel."""
    layers: dict[str, None] = {}

    def noted(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, QuantisableLayer):
            layers["/".join(context.module.path)] = None
        return call(*args, **kwargs)

    def init() -> Any:
        images = jnp.zeros((1, resolution, resolution, 3), jnp.float32)
        return module.init(jax.random.key(0), images, train=False)["params"]

    with nn.intercept_methods(noted):
        shapes = jax.eval_shape(init)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    return [*layers], [x.removesuffix("/kernel") for x in paths if x.endswith("/kernel")]
