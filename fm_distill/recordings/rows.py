"""Teacher logits as they are stored and sent to the devices, and how they become logits again."""

import dataclasses
import urllib.parse
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from fm_distill.array_tree import AnyArray, array_tree
from fm_distill.errors import UserError

RowType = Literal["float16", "float32"]


# In front of the name of a tap, in the names of arrays.
FEATURE = "feature."


@array_tree
@dataclasses.dataclass(frozen=True)
class TargetRows:
    """The outputs of each teacher for some examples, before temperature and ensemble.

    A logit is `values + offset`. Of top-K recordings the classes are in `indices`, the most likely
    one first, and `rest` is the log-sum-exp of all other classes.
    """

    values: Float[AnyArray, "*steps batch teachers kept"]
    # The row's largest logit in float16, whose rounding grows with the size of a number; else 0.
    offset: Float32[AnyArray, "*steps batch teachers"]
    indices: Integer[AnyArray, "*steps batch teachers kept"] | None = None
    # T log of the sum of exp(logit / T) over the other classes, less `offset`.
    rest: Float32[AnyArray, "*steps batch teachers"] | None = None
    # The teacher's features by their taps, each its mean over the positions.
    features: Mapping[str, Float[AnyArray, "*steps batch _"]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def arrays(self) -> dict[str, AnyArray]:
        """Those that are there, by name."""
        present = {x: y for x, y in vars(self).items() if y is not None and x != "features"}
        return present | {feature_name(x): y for x, y in self.features.items()}


def feature_name(tap: str) -> str:
    """The name of a tap's array; that of a module is a path, whose `/` is no folder here."""
    return FEATURE + urllib.parse.quote(tap, safe="")


def encode(
    logits: Float[np.ndarray, "*rows classes"],
    dtype: RowType,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> TargetRows:
    """The rows of `logits`, exact in float32; in float16 to 2^-11 of the distance to the largest.

    With `top_k` the rest is summed at `temperature`, the only one at which the distance
    to it is exact. Without the shift, which no softmax sees, logits near 20 would be rounded to
    multiples of 1/64. Raises `UserError` where a logit is further from the largest than `dtype`
    holds, and is kept.
    """
    logits = logits.astype(np.float32)
    largest = logits.max(axis=-1)
    offset = largest if dtype == "float16" else np.zeros_like(largest)
    shifted = logits - offset[..., None]
    if top_k is None:
        return TargetRows(_as_stored(shifted, dtype), offset)
    order = np.argsort(-logits, axis=-1, kind="stable")
    top_indices, other_indices = order[..., :top_k], order[..., top_k:]
    scaled = np.take_along_axis(shifted, other_indices, axis=-1).astype(np.float64) / temperature
    highest = scaled.max(axis=-1, keepdims=True)
    total = np.log(np.exp(scaled - highest).sum(axis=-1)) + highest[..., 0]
    return TargetRows(
        _as_stored(np.take_along_axis(shifted, top_indices, axis=-1), dtype),
        offset,
        top_indices.astype(index_type(logits.shape[-1])),
        (temperature * total).astype(np.float32),
    )


def _as_stored(
    shifted: Float32[np.ndarray, "*rows kept"], dtype: RowType
) -> Float[np.ndarray, "*rows kept"]:
    limit, largest = float(np.finfo(dtype).max), float(np.abs(shifted).max())
    if largest > limit:
        raise UserError(
            f"a logit of the teacher is {largest:,.0f} below the largest one, and {dtype} holds "
            f"{limit:,.0f} at most; use --dtype float32"
        )
    return shifted.astype(dtype)


def encode_features(
    features: Mapping[str, Float32[np.ndarray, "steps batch _"]], dtype: RowType, step: int
) -> dict[str, Float[np.ndarray, "steps batch _"]]:
    """As they are stored: in float16 to 2^-11 of a number's size, and to 2^-25 near zero.

    Raises `UserError` where one, from `step` on, is not finite or larger than `dtype` holds.
    """
    limit = float(np.finfo(dtype).max)
    for name, x in features.items():
        largest = float(np.abs(x).max())
        if not np.isfinite(largest):
            raise UserError(
                f"the teacher's feature {name} in step {step:,} has values that are not finite: "
                "are its weights and input_range right, and does --precision float32 help?"
            )
        if largest > limit:
            raise UserError(
                f"the teacher's feature {name} reaches {largest:,.0f} in step {step:,}, and "
                f"{dtype} holds {limit:,.0f} at most; use --dtype float32, or another tap"
            )
    return {name: x.astype(dtype) for name, x in features.items()}


def unseen(
    logits: Float[np.ndarray, "*rows classes"], top_k: int, temperature: float
) -> tuple[float, float]:
    """What the KL to a top-K recording does not see, as means over the rows.

    The probability r of the classes beyond the K, and r KL(p || uniform) in nats for their own
    distribution p: by so much the KL is too low for a student that spreads r evenly over them.
    """
    scaled = np.sort(logits.astype(np.float64) / temperature, axis=-1)[..., ::-1]
    weights = np.exp(scaled - scaled[..., :1])
    other_weights = weights[..., top_k:]
    mass = other_weights.sum(axis=-1)
    share = mass / weights.sum(axis=-1)
    conditional = other_weights / np.maximum(mass, np.finfo(np.float64).tiny)[..., None]
    entropy = -(conditional * np.log(np.maximum(conditional, np.finfo(np.float64).tiny))).sum(
        axis=-1
    )
    hidden = share * (np.log(other_weights.shape[-1]) - entropy)
    return float(share.mean()), float(hidden.mean())


def index_type(classes: int) -> Literal["uint16", "uint32"]:
    """The smallest type that numbers the classes."""
    return "uint16" if classes <= 2**16 else "uint32"


def decode(rows: TargetRows) -> tuple[Float32[Array, "batch kept"], ...]:
    """The logits of each teacher; of a top-K recording one more column stands for the rest."""
    values = rows.values.astype(jnp.float32)
    if rows.rest is not None:
        values = jnp.concatenate([values, rows.rest[..., None]], axis=-1)
    logits = values + rows.offset[..., None]
    return tuple(jnp.moveaxis(logits, -2, 0))


def indices_of(rows: TargetRows) -> tuple[Integer[Array, "batch kept"], ...]:
    """The classes of each teacher's columns; empty where all classes are there."""
    if rows.indices is None:
        return ()
    return tuple(jnp.moveaxis(rows.indices.astype(jnp.int32), -2, 0))


def decode_features(rows: TargetRows) -> dict[str, Float32[Array, "batch _"]]:
    """The teacher's features by their taps."""
    return {name: x.astype(jnp.float32) for name, x in rows.features.items()}


def row_bytes(classes: int, teachers: int, dtype: RowType, top_k: int | None) -> int:
    """Of one example, without its identity."""
    stored_classes = classes if top_k is None else top_k
    value_bytes = stored_classes * np.dtype(dtype).itemsize + 4
    index_bytes = (
        0 if top_k is None else stored_classes * np.dtype(index_type(classes)).itemsize + 4
    )
    return teachers * (value_bytes + index_bytes)
