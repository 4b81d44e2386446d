"""A custom network: a function or a Flax module that a config names by its place."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from fm_distill.config import NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models.assembly import make_network
from fm_distill.models.contract import Images, Network
from fm_distill.models.layers import identity
from fm_distill.models.options import refuse_unknown
from fm_distill.system.references import is_reference, load_reference

Builder = Callable[[NetworkConfig, int, jnp.dtype], Network]
# Fields that every Flax module has.
OF_FLAX = ("parent", "name")


def is_own(model: str) -> bool:
    """Whether this names code, `FILE.py:NAME` or `package.module:name`, and no line of `MODELS`."""
    return is_reference(model)


def own_code(model: str) -> str:
    """SHA-256 of the file that `model` names. Raises `UserError`."""
    return load_reference(model, "the model").sha256


def own_builder(model: str) -> Builder:
    """The builder that `model` names: a function `(NetworkConfig, classes, dtype) -> Network`.

    Or a Flax module with a field `classes`, and `dtype` if it wants to know the compute type, whose
    `__call__(images, train)` returns logits, or logits and a dict of features; its other fields are
    set by the config's `options`. Raises `UserError`.
    """
    value = load_reference(model, "the model").value
    if isinstance(value, type) and issubclass(value, nn.Module):
        return functools.partial(_from_module, value, model)
    if isinstance(value, type) or not callable(value):
        raise UserError(
            f"the model {model} is a {type(value).__name__}; expected a function "
            "(NetworkConfig, classes, dtype) -> Network, or a flax.linen.Module"
        )

    def build(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        try:
            network = value(config, classes, dtype)
        except (UserError, ValueError):
            raise
        except Exception as error:
            raise UserError(
                f"the model {model} cannot be built: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(network, Network):
            raise UserError(
                f"the model {model} returned a {type(network).__name__}; expected a "
                "fm_distill.models.Network"
            )
        return network

    return build


class _WithFeatures(nn.Module):
    """A module that may return logits alone, as the ones here do: with features, in float32."""

    inner: nn.Module

    def setup(self) -> None:
        nn.share_scope(self, self.inner)  # parameters keep the module's own names

    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        outputs = self.inner(images, train)
        logits, features = outputs if isinstance(outputs, tuple) else (outputs, {})
        return logits.astype(jnp.float32), features


def _from_module(
    module: type[nn.Module], model: str, config: NetworkConfig, classes: int, dtype: jnp.dtype
) -> Network:
    arguments: dict[str, Any] = {"classes": classes, "dtype": dtype}
    parameters = inspect.signature(module).parameters
    fields = [name for name in parameters if name not in OF_FLAX]
    if "classes" not in fields:
        raise UserError(
            f"the model {model} has no field `classes`; give it one, the number of its logits"
        )
    refuse_unknown(config, [name for name in fields if name not in arguments])
    required = [name for name in fields if parameters[name].default is inspect.Parameter.empty]
    if missing := [
        name for name in required if name not in arguments and name not in config.options
    ]:
        raise ValueError(
            f"{model} needs the option {', '.join(missing)}: give --student.options.{missing[0]} "
            "VALUE, or the field a default"
        )
    arguments |= config.options
    inner_module = module(**{name: value for name, value in arguments.items() if name in fields})
    wrapped_module = _WithFeatures(inner_module)
    return make_network(
        wrapped_module, wrapped_module, identity, config, classes, jnp.dtype("float32")
    )


def check_logits(network: Network, config: NetworkConfig) -> None:
    """Raises `UserError` where the network does not run, or returns something else than logits."""
    model, classes = config.model, network.classes
    images = jax.ShapeDtypeStruct((2, config.resolution, config.resolution, 3), jnp.float32)

    def logits(images: Images) -> Array:
        return network.apply(network.init(jax.random.key(0)), images, train=True).logits

    try:
        shape = jax.eval_shape(logits, images).shape
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the model {model} does not run on images of {config.resolution} pixels: "
            f"{type(error).__name__}: {error}"
        ) from error
    if config.quantisation.quantised and not network.quantised_layers:
        raise UserError(
            f"the model {model} has no layer that can be quantised: build it from "
            "fm_distill.models.layers, or leave out quantisation"
        )
    if shape != (2, classes):
        raise UserError(
            f"the model {model} returned an array of shape {shape} for 2 images; expected logits "
            f"of shape (2, {classes})"
        )
