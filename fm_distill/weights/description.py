"""Which network a weight file holds and how it is fed, by the request and by the file."""

import dataclasses
from typing import cast

import msgspec
import numpy as np

from fm_distill.config import InputRange, NetworkConfig, with_options
from fm_distill.errors import UserError
from fm_distill.models import MODELS, all_options, model_of, resolve
from fm_distill.views.rendering import INPUT_RANGES
from fm_distill.weights.card import only_network
from fm_distill.weights.files import Facts, WeightFile

# Fields of a network that its weights do not fix.
FREE = ("resolution", "input_range", "input_rounding", "quantisation")
# Those that are the stored ones unless they are given.
STORED = ("block_widths", "input_mean", "input_deviation")
FREE_OPTIONS = ("root_pool_padding",)  # of a model's own
# Largest difference between a file's mean or deviation and the ones of an input range.
TOLERANCE = 1e-3


def describe(
    file: WeightFile, requested: NetworkConfig | None, fields: str
) -> tuple[NetworkConfig, list[str]]:
    """The requested network, checked against the file's own description."""
    stated = _said(file.facts)
    if requested is None:
        if stated is not None:
            return stated, [f"network: {stated.model} at {stated.resolution}, as the file says"]
        architecture = file.facts.architecture
        known = _model_of(architecture)
        what = f"says that it is a {architecture}" if architecture else "does not say what it is"
        if architecture and not known:
            raise UserError(
                f"{file.path} {what}, which is not one of the networks of this package: "
                + ", ".join(f"{x.timm} ({name})" for name, x in MODELS.items() if x.timm)
            )
        raise UserError(
            f"{file.path} {what}{', but not at what resolution' if known else ''}; give {fields} = "
            f"NetworkConfig(model={known or '...'!r}, resolution=...) in the experiment file"
        )
    card, architecture = file.facts.card, file.facts.architecture
    if card and (differ := differing(card.network, requested)):
        raise UserError(f"{file.path} holds a different network from {fields}: {differ}")
    timm = model_of(requested.model).timm
    if architecture and architecture != timm and (timm or _model_of(architecture)):
        raise UserError(
            f"{file.path} says that it is a {architecture}"
            + (f" ({_model_of(architecture)})" if _model_of(architecture) else "")
            + f", but {fields}.model is {requested.model}"
        )
    if card:
        asked = requested.options.items()
        free = {x: y for x, y in asked if x in FREE_OPTIONS and y != "auto"}
        requested = dataclasses.replace(
            requested,
            options={**card.network.options, **free},
            **{x: vars(card.network)[x] for x in STORED},
        )
    return requested, []


def differing(stored: NetworkConfig, requested: NetworkConfig) -> str:
    """The fields in which `requested` cannot be what is stored, as text; empty where it can be."""
    a, b = msgspec.to_builtins(stored), msgspec.to_builtins(only_network(requested))
    free = ("options", *FREE, *(x for x in STORED if not b[x]))
    fixed = [x for x in b if x not in free]
    pairs = [(name, a[name], b[name]) for name in fixed]
    if stored.model == requested.model:
        options = all_options(requested).items()
        asked = [(name, value) for name, value in options if name not in FREE_OPTIONS]
        pairs += [(f"options.{name}", stored.options.get(name), value) for name, value in asked]
    differ = [(name, x, y) for name, x, y in pairs if y not in ("auto", x)]
    return "; ".join(f"{name} is {x}, requested {y}" for name, x, y in differ)


def _said(facts: Facts) -> NetworkConfig | None:
    """The network, where the file describes it completely."""
    if facts.card:
        return facts.card.network
    model = _model_of(facts.architecture)
    if model and facts.resolution:
        return NetworkConfig(model=model, resolution=facts.resolution)
    return None


def _model_of(architecture: str | None) -> str | None:
    """Our name for what timm calls `architecture`."""
    return next(
        (name for name, x in MODELS.items() if architecture and x.timm == architecture), None
    )


def without_auto(
    network: NetworkConfig, file: WeightFile, naming: str, fields: str
) -> tuple[NetworkConfig, list[str]]:
    """`network` with the file's own input range and root pool where that is `auto`."""
    stated = _input_range(file, fields)
    remarks = []
    if network.input_range == "auto":
        chosen = stated or model_of(network.model).input_range
        why = (
            "as the file says"
            if stated
            else "the model's usual one, since the file does not state it"
        )
        network = dataclasses.replace(network, input_range=chosen)
        remarks.append(f"input range {chosen}: {why}")
    elif stated and stated != network.input_range:
        raise UserError(
            f"{fields}.input_range is {network.input_range}, but {file.path} states that it was "
            f"trained with {stated}; a wrong normalisation silently lowers the accuracy: use auto"
        )
    options = all_options(network)
    if options.get("root_pool_padding") == "auto":
        padding = "minus_infinity" if naming == "bit_flat" else "zero"
        network = with_options(network, {"root_pool_padding": padding})
        if options.get("stem", "imagenet") == "imagenet":
            remarks.append(f"root pool padding {padding}: as {naming} files were trained")
    return resolve(network), remarks


def _input_range(file: WeightFile, fields: str) -> InputRange | None:
    """The name of the file's mean and deviation; None where it does not state them."""
    if file.facts.card and file.facts.card.network.input_range == "adapt":
        return "adapt"
    mean, std = file.facts.mean, file.facts.std
    if mean is None or std is None:
        return None
    for name, (means, deviations) in INPUT_RANGES.items():
        ours = np.array([*means, *deviations]) / 255
        if np.abs(ours - np.array([*mean, *std])).max() <= TOLERANCE:
            return cast(InputRange, name)
    raise UserError(
        f"{file.path} was trained with mean {mean} and deviation {std}, which is none of the "
        f"input ranges of this package ({', '.join(INPUT_RANGES)}); a wrong normalisation "
        f"silently lowers the accuracy, so no {fields}.input_range can stand for it"
    )
