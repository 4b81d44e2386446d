"""The networks, behind one contract; the only room that imports Flax. Imports `config`, `system`.

A `Network` is a bundle of pure functions, called by `step.py` and `evaluate.py`:

    init(key)                                -> Variables
    apply(variables, images, train=, features=) -> Output
    freeze(variables)                        -> FrozenVariables, what is constant computed once
    apply_frozen(frozen, images, features=)  -> Output, in evaluation mode
    apply_portable(frozen, images)           -> logits, each convolution as one for other runtimes

To add a model: a file with a function `(NetworkConfig, classes, dtype) -> Network` and a line in
`MODELS`, or in the `MEMBERS` of its family; the tests run over the table. Without touching
this package: `own.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from fm_distill.config import InputRange, NetworkConfig
from fm_distill.config.networks import FUNCTION, OptionValue
from fm_distill.models import bit, convnext, keras_resnet_v2, mobilenet_v3, resnet, vit
from fm_distill.models import efficientnet_lite as lite
from fm_distill.models.contract import (
    CONVOLUTION,
    HEAD,
    UNIT,
    Freeze,
    Network,
    Output,
    Variables,
    parameter_count,
    ranges_of,
    with_ranges,
)
from fm_distill.models.inner_channels import ChannelAxis, InnerChannels
from fm_distill.models.options import ModelOptions, as_mapping, read_options
from fm_distill.models.own import check_logits, is_own, own_builder, own_code
from fm_distill.models.quantisation import with_switches

__all__ = [
    "CONVOLUTION",
    "HEAD",
    "MODELS",
    "UNIT",
    "ChannelAxis",
    "Freeze",
    "InnerChannels",
    "Network",
    "Output",
    "Variables",
    "all_options",
    "build_network",
    "check_network",
    "is_own",
    "model_of",
    "own_code",
    "parameter_count",
    "ranges_of",
    "resolve",
    "with_ranges",
    "with_switches",
]

Builder = Callable[[NetworkConfig, int, jnp.dtype], Network]


class Model(NamedTuple):
    """A line of the table."""

    build: Builder
    # The `input_range` of its published weights.
    input_range: InputRange
    # What timm calls it, where timm has it.
    timm: str | None = None
    # What its config may set beyond that of any network; None of code, which reads it itself.
    options: type[ModelOptions] | None = ModelOptions


def _as_in_timm(members: Mapping[str, Builder], input_range: InputRange) -> dict[str, Model]:
    """Lines of the models that have timm's names."""
    return {name: Model(build, input_range, name) for name, build in members.items()}


def _bit(depths: tuple[int, ...], width: float, timm: str) -> Model:
    """The line of a published BiT."""
    return Model(bit.member(depths, width), "minus_one_one", timm, bit.MemberOptions)


MODELS: dict[str, Model] = {
    "bit": Model(bit.build, "minus_one_one", None, bit.BitOptions),
    "bit_r50x1": _bit((3, 4, 6, 3), 1.0, "resnetv2_50x1_bit"),
    "bit_r50x3": _bit((3, 4, 6, 3), 3.0, "resnetv2_50x3_bit"),
    "bit_r101x1": _bit((3, 4, 23, 3), 1.0, "resnetv2_101x1_bit"),
    "bit_r101x3": _bit((3, 4, 23, 3), 3.0, "resnetv2_101x3_bit"),
    "bit_r152x2": _bit((3, 8, 36, 3), 2.0, "resnetv2_152x2_bit"),
    "bit_r152x4": _bit((3, 8, 36, 3), 4.0, "resnetv2_152x4_bit"),
    "efficientnet_lite0": Model(lite.member(0), "minus_one_one", "tf_efficientnet_lite0"),
    "efficientnet_lite1": Model(lite.member(1), "minus_one_one", "tf_efficientnet_lite1"),
    "efficientnet_lite2": Model(lite.member(2), "minus_one_one", "tf_efficientnet_lite2"),
    "efficientnet_lite3": Model(lite.member(3), "minus_one_one", "tf_efficientnet_lite3"),
    "efficientnet_lite4": Model(lite.member(4), "minus_one_one", "tf_efficientnet_lite4"),
    "mobilenet_v3_large": Model(mobilenet_v3.member("large"), "imagenet", "mobilenetv3_large_100"),
    "mobilenet_v3_small": Model(mobilenet_v3.member("small"), "imagenet", "mobilenetv3_small_100"),
    "mobilenet_v3_large_gn": Model(mobilenet_v3.member("large", 8), "imagenet"),
    "mobilenet_v3_small_gn": Model(mobilenet_v3.member("small", 8), "imagenet"),
    "resnet50v2": Model(keras_resnet_v2.build, "minus_one_one"),
    **_as_in_timm(resnet.MEMBERS, "imagenet"),
    **_as_in_timm(convnext.MEMBERS, "imagenet"),
    **_as_in_timm(vit.MEMBERS_OF_AUGREG, "minus_one_one"),
    **_as_in_timm(vit.MEMBERS_OF_FACEBOOK, "imagenet"),
}


def model_of(name: str) -> Model:
    """The line of `MODELS`, or the code that `name` stands for. Raises `UserError`."""
    if is_own(name):
        return Model(own_builder(name), "minus_one_one", options=None)
    return MODELS[name]


def all_options(config: NetworkConfig) -> Mapping[str, OptionValue]:
    """Of the model, with its defaults where `config` sets none. Raises `ValueError`."""
    kind = model_of(config.model).options
    return config.options if kind is None else as_mapping(read_options(config, kind))


def resolve(config: NetworkConfig) -> NetworkConfig:
    """`config` with the model's own values where it is `auto`, as for a network from scratch.

    Raises `ValueError` where it sets an option that the model does not have.
    """
    if config.model == FUNCTION:
        return config
    model = model_of(config.model)
    if config.input_range == "auto":
        config = dataclasses.replace(config, input_range=model.input_range)
    if model.options is None:
        return config
    options = as_mapping(read_options(config, model.options).resolved())
    return dataclasses.replace(config, options=options)


def build_network(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
    """The network of `config` with `classes` logits, computing in `dtype`.

    Raises `ValueError` where the fields of `config` do not describe a network.
    """
    return model_of(config.model).build(resolve(config), classes, dtype)


def check_network(config: NetworkConfig) -> None:
    """Raises `ValueError` where the fields of `config` do not describe a network.

    And `UserError` where a custom network does not run.
    """
    network = build_network(config, 2, jnp.dtype("float32"))
    if is_own(config.model):
        check_logits(network, config)
