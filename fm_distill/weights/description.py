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
    stated_network = _said(file.facts)
    if requested is None:
        if stated_network is not None:
            return stated_network, [
                f"network: {stated_network.model} at {stated_network.resolution}, as the file says"
            ]
        architecture = file.facts.architecture
        model = _model_of(architecture)
        statement = (
            f"says that it is a {architecture}" if architecture else "does not say what it is"
        )
        if architecture and not model:
            raise UserError(
                f"{file.path} {statement}, which is not one of the networks of this package: "
                + ", ".join(f"{x.timm} ({name})" for name, x in MODELS.items() if x.timm)
            )
        raise UserError(
            f"{file.path} {statement}{', but not at what resolution' if model else ''}; "
            f"give {fields} = NetworkConfig(model={model or '...'!r}, resolution=...) in the "
            "experiment file"
        )
    card, architecture = file.facts.card, file.facts.architecture
    if card and (differences := differing(card.network, requested)):
        raise UserError(f"{file.path} holds a different network from {fields}: {differences}")
    timm = model_of(requested.model).timm
    if architecture and architecture != timm and (timm or _model_of(architecture)):
        raise UserError(
            f"{file.path} says that it is a {architecture}"
            + (f" ({_model_of(architecture)})" if _model_of(architecture) else "")
            + f", but {fields}.model is {requested.model}"
        )
    if card:
        requested_options = requested.options.items()
        free_options = {
            name: value
            for name, value in requested_options
            if name in FREE_OPTIONS and value != "auto"
        }
        requested = dataclasses.replace(
            requested,
            options={**card.network.options, **free_options},
            **{x: vars(card.network)[x] for x in STORED},
        )
    return requested, []


def differing(stored: NetworkConfig, requested: NetworkConfig) -> str:
    """The fields in which `requested` cannot be what is stored, as text; empty where it can be."""
    stored_fields, requested_fields = (
        msgspec.to_builtins(stored),
        msgspec.to_builtins(only_network(requested)),
    )
    free_fields = ("options", *FREE, *(x for x in STORED if not requested_fields[x]))
    fixed_fields = [x for x in requested_fields if x not in free_fields]
    compared = [(name, stored_fields[name], requested_fields[name]) for name in fixed_fields]
    if stored.model == requested.model:
        options = all_options(requested).items()
        requested_options = [(name, value) for name, value in options if name not in FREE_OPTIONS]
        compared += [
            (f"options.{name}", stored.options.get(name), value)
            for name, value in requested_options
        ]
    differences = [(name, x, y) for name, x, y in compared if y not in ("auto", x)]
    return "; ".join(f"{name} is {x}, requested {y}" for name, x, y in differences)


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
    stated_range = _input_range(file, fields)
    notes = []
    if network.input_range == "auto":
        input_range = stated_range or model_of(network.model).input_range
        reason = (
            "as the file says"
            if stated_range
            else "the model's usual one, since the file does not state it"
        )
        network = dataclasses.replace(network, input_range=input_range)
        notes.append(f"input range {input_range}: {reason}")
    elif stated_range and stated_range != network.input_range:
        raise UserError(
            f"{fields}.input_range is {network.input_range}, but {file.path} states that it was "
            f"trained with {stated_range}; a wrong normalisation silently lowers the accuracy: use "
            "auto"
        )
    options = all_options(network)
    if options.get("root_pool_padding") == "auto":
        padding = "minus_infinity" if naming == "bit_flat" else "zero"
        network = with_options(network, {"root_pool_padding": padding})
        if options.get("stem", "imagenet") == "imagenet":
            notes.append(f"root pool padding {padding}: as {naming} files were trained")
    return resolve(network), notes


def _input_range(file: WeightFile, fields: str) -> InputRange | None:
    """The name of the file's mean and deviation; None where it does not state them."""
    if file.facts.card and file.facts.card.network.input_range == "adapt":
        return "adapt"
    mean, std = file.facts.mean, file.facts.std
    if mean is None or std is None:
        return None
    for name, (means, deviations) in INPUT_RANGES.items():
        moments = np.array([*means, *deviations]) / 255
        if np.abs(moments - np.array([*mean, *std])).max() <= TOLERANCE:
            return cast(InputRange, name)
    raise UserError(
        f"{file.path} was trained with mean {mean} and deviation {std}, which is none of the "
        f"input ranges of this package ({', '.join(INPUT_RANGES)}); a wrong normalisation "
        f"silently lowers the accuracy, so no {fields}.input_range can stand for it"
    )
